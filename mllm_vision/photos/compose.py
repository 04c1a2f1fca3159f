"""Composed photographs: one to five cut-outs on a crop of a background, with a record of what was pasted where.

Everything follows from (split, index, seed) and the two folders of `Material`. Nouns come in themes, as shapes do in
drawn scenes: without that there would be no such thing as a plausible hallucination.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mllm_vision.photos.material import SPLITS, Background, Material

REFERENCE_SIDE = 336
SCALES = (0.20, 0.45)  # longer side of a pasted cut-out over that of the photograph
LEAST_VISIBLE = 0.8
MOST_OBJECTS = 5

_OBJECT_ODDS = (2, 3, 4, 4, 4)  # of 1, 2, ... 5 objects
_COPY_ODDS = (11, 4, 3, 2)  # of 1, 2, 3, 4 objects of one noun
_THEME_ODDS = 0.7
_TRIES = 25
_OPAQUE = 128


@dataclass(frozen=True)
class Pasted:
    """A cut-out in a photograph. `box` is left, top, right, bottom in pixels; `visible` the share of it that shows."""

    noun: str
    cutout: str
    box: tuple[int, int, int, int]
    visible: float

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of its box, in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Photo:
    """What is in a photograph of `side` x `side` pixels: `objects` in the order pasted, `shown` by the background."""

    split: str
    index: int
    side: int
    background: str
    shown: tuple[str, ...]
    objects: tuple[Pasted, ...]

    @property
    def name(self) -> str:
        """Its id, and its file's name without suffix."""
        return f"{self.split}-{self.index:06d}"

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each noun, from left to right by the leftmost."""
        ordered = [thing.noun for thing in sorted(self.objects, key=lambda thing: thing.centre)]
        return {noun: ordered.count(noun) for noun in dict.fromkeys(ordered)}

    def single_objects(self) -> tuple[Pasted, ...]:
        """The objects that their noun alone identifies."""
        return tuple(thing for thing in self.objects if self.counts[thing.noun] == 1)

    def to_dict(self) -> dict[str, object]:
        """Its line in the export's file of objects."""
        return {"id": self.name, **asdict(self)}


def compose(material: Material, split: str, index: int, *, seed: int = 0) -> tuple[Photo, Image.Image]:
    """The `index`-th photograph of a split; the same arguments always give the same one.

    Cut-outs are flipped, turned and lit differently in training alone.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"photos-{seed}-{split}-{index}")
    augment = split == "train"
    background = rng.choice(material.backgrounds[split])
    canvas = _crop(material.backdrop(rng.choice(background.paths)), material.side, rng, augment)
    top = np.full((material.side, material.side), -1)  # which object shows at a pixel
    pasted: list[tuple[str, str, tuple[int, int, int, int]]] = []
    areas: list[int] = []
    for noun in sample_nouns(material, split, background, rng):
        name = rng.choice(material.pools[split][noun])
        image = _vary(material.cutout(name), rng) if augment else material.cutout(name)
        for scale in (rng.uniform(*SCALES), SCALES[0]):  # a cut-out that finds no room tries once more, small
            sized = _resize(image, scale * material.side)
            mask = np.asarray(sized.getchannel("A")) >= _OPAQUE
            place = _find_place(mask, top, areas, rng)
            if place:
                left, upper = place
                canvas.paste(sized, place, sized)
                top[upper : upper + sized.height, left : left + sized.width][mask] = len(pasted)
                pasted.append((noun, name, (left, upper, left + sized.width, upper + sized.height)))
                areas.append(int(mask.sum()))
                break
    objects = (Pasted(*thing, round(float((top == i).sum() / areas[i]), 3)) for i, thing in enumerate(pasted))
    return Photo(split, index, material.side, background.name, background.shows, tuple(objects)), canvas


def sample_nouns(material: Material, split: str, background: Background, rng: random.Random) -> list[str]:
    """What to paste, 1 to `MOST_OBJECTS` nouns, some several times; most are of one theme."""
    allowed = set(material.pools[split]) - set(background.shows)
    themes = [theme for nouns in material.vocabulary.themes.values() if len(theme := allowed & set(nouns)) > 1]
    theme = rng.choice(themes or [allowed])  # a folder of few cut-outs may have one of each theme
    n = rng.choices(range(1, MOST_OBJECTS + 1), _OBJECT_ODDS)[0]
    chosen: list[str] = []
    while len(chosen) < n:
        open_to = sorted((theme & allowed if rng.random() < _THEME_ODDS else allowed) or allowed)
        noun = rng.choices(open_to, [material.weights[noun] for noun in open_to])[0]
        copies = rng.choices(range(1, len(_COPY_ODDS) + 1), _COPY_ODDS)[0]
        chosen += [noun] * min(copies, n - len(chosen))
        allowed -= {noun} | material.vocabulary.kin(noun)
    return chosen


def _crop(image: Image.Image, side: int, rng: random.Random, augment: bool) -> Image.Image:
    length = rng.randint(side, min(image.size))
    left, upper = rng.randint(0, image.width - length), rng.randint(0, image.height - length)
    box = (left, upper, left + length, upper + length)
    cropped = image.resize((side, side), Image.Resampling.BICUBIC, box)
    return ImageOps.mirror(cropped) if augment and rng.random() < 0.5 else cropped


def _vary(image: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    image = image.crop(image.getbbox())
    lit = ImageEnhance.Brightness(image.convert("RGB")).enhance(rng.uniform(0.75, 1.2))
    lit.putalpha(image.getchannel("A"))
    return lit


def _resize(image: Image.Image, longer: float) -> Image.Image:
    width, height = (max(1, round(length * longer / max(image.size))) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _find_place(mask: np.ndarray, top: np.ndarray, areas: list[int], rng: random.Random) -> tuple[int, int] | None:
    """Top left corner where what is already there stays visible enough; None when no try found one."""
    height, width = mask.shape
    showing = [int((top == i).sum()) for i in range(len(areas))]
    for _ in range(_TRIES):
        left, upper = rng.randint(0, top.shape[1] - width), rng.randint(0, top.shape[0] - height)
        under = top[upper : upper + height, left : left + width][mask]
        hidden = np.bincount(under[under >= 0], minlength=len(areas))
        if all(showing[i] - hidden[i] >= LEAST_VISIBLE * area for i, area in enumerate(areas)):
            return left, upper
    return None
