"""Drawn scenes: a few things on a background, sometimes with a printed word or number.

A scene is a plain description; `render` draws it and `label_patches` says what lies under each patch. Everything
follows from (split, index), so no picture has to be stored. Which split a scene belongs to is decided by a hash of its
*content* (what is in it, wherever it lies): two splits cannot share a scene, whatever the seeds.

Shapes co-occur unevenly, as in life: every scene has a theme, and a theme makes some shapes likely together. Without
that there would be no such thing as a plausible hallucination.
"""

import hashlib
import json
import math
import random
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SPLITS = ("train", "validation", "test")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = {
    "red": (214, 32, 38),
    "green": (28, 150, 56),
    "blue": (30, 70, 215),
    "yellow": (248, 224, 32),
    "orange": (250, 132, 12),
    "purple": (140, 40, 170),
    "black": (16, 16, 18),
    "white": (252, 252, 252),
}
SIZES = {"small": (26, 30), "large": (40, 48)}  # pixels across, in a picture of REFERENCE_SIDE
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("plain", "gradient", "noise", "stripes")
WORDS = ("stop", "exit", "open", "sale", "taxi", "milk", "zoo", "park", "jump", "gold", "fish", "wow")
NUMBERS = ("2", "4", "5", "7", "8", "10", "36", "42", "64", "99")
TEXTS = WORDS + NUMBERS
REFERENCE_SIDE = 140

# The weight of a shape that a theme does not name is 1.
THEMES: dict[str, dict[str, float]] = {
    "sky": {"star": 9, "moon": 7, "circle": 4},
    "cards": {"heart": 8, "cross": 6, "square": 3},
    "road": {"triangle": 8, "circle": 6, "cross": 2},
    "jewels": {"ring": 8, "heart": 4, "star": 4},
    "blocks": {"square": 8, "triangle": 4, "circle": 5},
}

_HELD_OUT_BUCKETS = {0: "test", 1: "validation"}  # of 10; the other eight are training scenes
_SUPERSAMPLING = 4
_INK = {"black": (12, 12, 14), "white": (255, 255, 255)}


@dataclass(frozen=True)
class Thing:
    """A coloured shape. `x`, `y` is its centre and `width` its extent, in pixels."""

    shape: str
    colour: str
    size: str
    texture: str
    x: int
    y: int
    width: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        left, top = self.x - self.width // 2, self.y - self.width // 2
        return left, top, left + self.width, top + self.width


@dataclass(frozen=True)
class PrintedText:
    """A printed word or number. `x`, `y` is the top left corner of its ink, `points` the font size."""

    text: str
    ink: str
    points: int
    x: int
    y: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        width, height = _ink_extent(self.text, self.points)
        return self.x, self.y, self.x + width, self.y + height


@dataclass(frozen=True)
class Background:
    """`kind` is one of BACKGROUNDS; `seed` fixes what is random in it."""

    kind: str
    tone: tuple[int, int, int]
    second_tone: tuple[int, int, int]
    seed: int


@dataclass(frozen=True)
class Scene:
    """What is in a picture of `side` x `side` pixels. `things` are in reading order of their centres."""

    split: str
    index: int
    side: int
    background: Background
    things: tuple[Thing, ...]
    text: PrintedText | None

    def content_hash(self) -> str:
        """Hash of what is in the scene, regardless of where it lies: the key that keeps the splits apart."""
        return _content_hash(self.things, self.text)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def shape_count(self, shape: str) -> int:
        return sum(thing.shape == shape for thing in self.things)

    def unique_things(self) -> tuple[Thing, ...]:
        """The things that their shape alone identifies."""
        return tuple(thing for thing in self.things if self.shape_count(thing.shape) == 1)


def sample_scene(
    split: str, index: int, *, side: int = REFERENCE_SIDE, text_scale: float = 1.0, seed: int = 0
) -> Scene:
    """The `index`-th scene of a split; the same arguments always give the same scene.

    Args:
        split: One of `SPLITS`.
        index: 0, 1, 2, ...
        side: Width and height in pixels; everything scales with it.
        text_scale: Height of printed text over its usual share of the picture; 0.5 in a picture twice as large draws
            letters of the usual size in pixels, which only that resolution shows.
        seed: Another seed is another data set. The splits stay apart across seeds too.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if side < 56:
        raise ValueError(f"side must be at least 56 pixels so that a shape can be told from another, got {side}")
    if not 0 < text_scale <= 1:
        raise ValueError(
            f"text_scale must be above 0 and at most 1, the scale at which text still fits, got {text_scale}"
        )
    rng = random.Random(f"scenes-{seed}-{split}-{index}")
    while True:
        text, things = _sample_content(rng, side, text_scale)
        if len(things) >= 2 and _split_of(_content_hash(things, text)) == split:
            return Scene(split, index, side, _sample_background(rng), things, text)


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image."""
    image = _draw_background(scene.background, scene.side)
    for thing in scene.things:
        image.paste(_fill(thing), thing.box[:2], _shape_mask(thing.shape, thing.width))
    if scene.text:
        left, top = _font(scene.text.points).getbbox(scene.text.text)[:2]
        ImageDraw.Draw(image).text(
            (scene.text.x - left, scene.text.y - top), scene.text.text, _INK[scene.text.ink], _font(scene.text.points)
        )
    return image


def label_patches(scene: Scene, patch: int, *, least_cover: float = 0.15) -> np.ndarray:
    """What lies under each patch: an index into `scene.things`, `len(scene.things)` for printed text, -1 for nothing.

    A patch belongs to whatever covers most of it, and to nothing if that is less than `least_cover` of its area.

    Returns:
        Integers of shape (H, W), row-major, with H = W = side // patch.
    """
    grid = scene.side // patch
    cover = np.full((len(scene.things) + 2, grid, grid), least_cover * 255)
    for i, thing in enumerate(scene.things):
        canvas = Image.new("L", (scene.side, scene.side))
        canvas.paste(_shape_mask(thing.shape, thing.width), thing.box[:2])
        cover[i + 1] = np.asarray(canvas.reduce(patch))[:grid, :grid]
    if scene.text:
        canvas = Image.new("L", (scene.side, scene.side))
        canvas.paste(255, scene.text.box)
        cover[-1] = np.asarray(canvas.reduce(patch))[:grid, :grid]
    else:
        cover[-1] = 0
    return cover.argmax(0) - 1


def _content_hash(things: tuple[Thing, ...], text: PrintedText | None) -> str:
    content = sorted([thing.shape, thing.colour, thing.size, thing.texture] for thing in things)
    return hashlib.sha256(json.dumps([content, text.text if text else None]).encode()).hexdigest()


def _split_of(content_hash: str) -> str:
    return _HELD_OUT_BUCKETS.get(int(content_hash[:8], 16) % 10, "train")


def _sample_content(rng: random.Random, side: int, text_scale: float) -> tuple[PrintedText | None, tuple[Thing, ...]]:
    scale = side / REFERENCE_SIDE
    boxes: list[tuple[int, int, int, int]] = []
    text = _sample_text(rng, side, text_scale) if rng.random() < 0.45 else None
    if text:
        boxes.append(text.box)
    weights = [THEMES[theme].get(shape, 1) for theme in [rng.choice(tuple(THEMES))] for shape in SHAPES]
    things = []
    for shape in rng.choices(SHAPES, weights, k=rng.randint(2, 5)):
        size = rng.choice(tuple(SIZES))
        width = round(rng.randint(*SIZES[size]) * scale)
        colour, texture = rng.choice(tuple(COLOURS)), rng.choices(TEXTURES, (2, 1, 1))[0]
        place = _find_place(rng, width, width, side, boxes)
        if place:  # a thing that finds no room is left out
            thing = Thing(shape, colour, size, texture, place[0] + width // 2, place[1] + width // 2, width)
            boxes.append(thing.box)
            things.append(thing)
    rows = REFERENCE_SIDE // 14  # reading order: by rows a tenth of the picture high, then from left to right
    things.sort(key=lambda thing: (thing.y * rows // side, thing.x))
    return text, tuple(things)


def _sample_text(rng: random.Random, side: int, text_scale: float) -> PrintedText:
    text = rng.choice(WORDS) if rng.random() < 0.6 else rng.choice(NUMBERS)
    points = max(1, round(rng.randint(27, 33) * side / REFERENCE_SIDE * text_scale))
    place = _find_place(rng, *_ink_extent(text, points), side, [])
    if place is None:
        raise ValueError(f"the text {text!r} at {points} points does not fit into a picture of {side} pixels")
    return PrintedText(text, rng.choice(tuple(_INK)), points, *place)


def _find_place(
    rng: random.Random, width: int, height: int, side: int, taken: list[tuple[int, int, int, int]]
) -> tuple[int, int] | None:
    """Top left corner of a free box, or None when 60 tries found none. Boxes may touch: shapes rarely fill theirs."""
    if width > side - 4 or height > side - 4:
        return None
    for _ in range(60):
        left, top = rng.randint(2, side - 2 - width), rng.randint(2, side - 2 - height)
        if all(left >= r or left + width <= l or top >= b or top + height <= t for l, t, r, b in taken):  # noqa: E741
            return left, top
    return None


def _sample_background(rng: random.Random) -> Background:
    def tone(level: int) -> tuple[int, int, int]:
        r, g, b = (level + rng.randint(-12, 12) for _ in range(3))
        return r, g, b

    level = rng.randint(125, 185)
    return Background(rng.choice(BACKGROUNDS), tone(level), tone(level + rng.choice((-22, 22))), rng.getrandbits(32))


def _draw_background(background: Background, side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), background.tone)
    if background.kind == "plain":
        return image
    if background.kind == "gradient":
        mask = Image.linear_gradient("L").rotate(90 * (background.seed % 4)).resize((side, side))
    elif background.kind == "noise":
        cells = random.Random(background.seed).randbytes((side // 2) ** 2)
        mask = Image.frombytes("L", (side // 2, side // 2), cells).resize((side, side), Image.Resampling.BILINEAR)
    else:
        mask = Image.new("L", (side, side))
        pitch, draw = side // 7, ImageDraw.Draw(mask)
        for start in range(-side, side, pitch):
            draw.line([(start, 0), (start + side * (background.seed % 2), side)], 255, pitch // 2)
    image.paste(background.second_tone, mask=mask)
    return image


def _fill(thing: Thing) -> Image.Image:
    colour = COLOURS[thing.colour]
    image = Image.new("RGB", (thing.width, thing.width), colour)
    if thing.texture == "plain":
        return image
    towards = 255 if sum(colour) < 330 else 0
    mark = tuple(round(0.68 * channel + 0.32 * towards) for channel in colour)
    draw, pitch = ImageDraw.Draw(image), 8
    if thing.texture == "striped":
        for start in range(-thing.width, thing.width, pitch):
            draw.line([(start, thing.width), (start + thing.width, 0)], mark, 3)
    else:
        for row in range(2, thing.width, pitch):
            for column in range(2, thing.width, pitch):
                draw.ellipse([column, row, column + 3, row + 3], mark)
    return image


def _shape_mask(shape: str, width: int) -> Image.Image:
    w = width * _SUPERSAMPLING
    mask = Image.new("L", (w, w))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse([0, 0, w - 1, w - 1], 255)
    elif shape == "square":
        draw.rectangle([0.06 * w, 0.06 * w, 0.94 * w, 0.94 * w], 255)
    elif shape == "triangle":
        draw.polygon([(0.5 * w, 0.02 * w), (w, 0.95 * w), (0, 0.95 * w)], 255)
    elif shape == "star":
        radii = [(0.53 if i % 2 == 0 else 0.22) * w for i in range(10)]
        draw.polygon(
            [
                (0.5 * w + r * math.sin(i * math.pi / 5), 0.53 * w - r * math.cos(i * math.pi / 5))
                for i, r in enumerate(radii)
            ],
            255,
        )
    elif shape == "heart":
        draw.ellipse([0, 0.04 * w, 0.54 * w, 0.58 * w], 255)
        draw.ellipse([0.46 * w, 0.04 * w, w - 1, 0.58 * w], 255)
        draw.polygon([(0.04 * w, 0.44 * w), (0.96 * w, 0.44 * w), (0.5 * w, 0.98 * w)], 255)
    elif shape == "cross":
        draw.rectangle([0.33 * w, 0, 0.67 * w, w], 255)
        draw.rectangle([0, 0.33 * w, w, 0.67 * w], 255)
    elif shape == "ring":
        draw.ellipse([0, 0, w - 1, w - 1], 255)
        draw.ellipse([0.27 * w, 0.27 * w, 0.73 * w, 0.73 * w], 0)
    elif shape == "moon":
        draw.ellipse([0, 0, w - 1, w - 1], 255)
        draw.ellipse([0.34 * w, -0.06 * w, 1.16 * w, 0.76 * w], 0)
    else:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    return mask.reduce(_SUPERSAMPLING)


def _font(points: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(points)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this build of Pillow has no FreeType, which the printed words need; install a Pillow wheel")
    return font


def _ink_extent(text: str, points: int) -> tuple[int, int]:
    left, top, right, bottom = _font(points).getbbox(text)
    return math.ceil(right - left), math.ceil(bottom - top)
