"""Pictures of what was kept of an image: dropped patches dimmed, kept ones outlined in the colour of their role.

Shapes: (H, W) patches of a tile, (h, w) cells of a pooled one, N tokens of a tile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import cycle
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from mllm_vision.api import KeptTokens

__all__ = ["SheetCell", "SheetRow", "contact_sheet", "draw_batch", "draw_kept", "tile_pictures"]

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

KEPT, DROPPED = "kept", "dropped"
# From Okabe and Ito's palette, whose colours colour-blind people can tell apart.
ROLE_COLOURS: dict[str, Colour] = {
    "anchor": (213, 94, 0),
    "buffer": (240, 228, 66),
    "register": (86, 180, 233),
    KEPT: (0, 158, 115),
}
OTHER_COLOURS: tuple[Colour, ...] = ((204, 121, 167), (230, 159, 0), (0, 114, 178))
DROPPED_COLOUR = (70, 70, 70)
RIGHT_COLOUR, WRONG_COLOUR = (0, 114, 178), (190, 70, 0)
INK, PAPER = (30, 30, 30), (255, 255, 255)

DIMMED = 0.35
"""Brightness of a dropped patch."""


def tile_pictures(
    image: Image.Image, number: int, inputs: Mapping[str, Any], image_processor: Any
) -> list[Image.Image]:
    """What the tower sees of an image, one picture a tile: the processor may have cropped it and cut it up.

    Args:
        image: The picture that the processor was given.
        number: Its number in the batch.
        inputs: What the processor made of the batch.
        image_processor: The processor's image processor; one with a ``merge_size`` makes patches of the whole image.
    """
    if hasattr(image_processor, "merge_size"):
        return [image]
    pixels = inputs["pixel_values"]  # (B, 3, height, width) or (B, T, 3, height, width)
    tiles = pixels[number].float().cpu().reshape(-1, *pixels.shape[-3:])
    if image_processor.do_normalize:
        mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
        tiles = tiles * std[:, None, None] + mean[:, None, None]
    levels = (tiles * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return [Image.fromarray(tile.numpy()) for tile in levels]


def draw_kept(
    tiles: Sequence[Image.Image], kept: Sequence[KeptTokens], *, side: int = 448, legend: bool = True
) -> Image.Image:
    """The tiles of an image side by side, with their kept patches and what the colours mean.

    A token that a rectangle of patches was folded into is drawn as that rectangle, any other on the patch it sits on.

    Args:
        tiles: Pictures of the tiles, as from `tile_pictures`; each is stretched over its grid.
        kept: The entries of `inspect_tokens` for these tiles.
        side: Pixels of the longer side of a tile.
        legend: Whether to say below what the colours mean and how many tokens have each.

    Raises:
        ValueError: a tile without a picture, or no tile at all.
    """
    if not kept or max(tokens.tile for tokens in kept) >= len(tiles):
        raise ValueError(f"every tile needs a picture, got {len(tiles)} pictures for {len(kept)} tiles")
    drawn = [_draw_tile(tiles[tokens.tile], tokens, side) for tokens in kept]
    gap = side // 40
    picture = Image.new("RGB", (sum(d.width + gap for d in drawn) - gap, max(d.height for d in drawn)), PAPER)
    left = 0
    for tile in drawn:
        picture.paste(tile, (left, 0))
        left += tile.width + gap
    return _above(picture, _legend(_labels(kept), max(picture.width, side), side // 24)) if legend else picture


def draw_batch(
    images: Sequence[Image.Image], kept: Sequence[KeptTokens], inputs: Mapping[str, Any], image_processor: Any
) -> Image.Image:
    """`draw_kept` for every image of a batch, one below the other.

    Args:
        images: The pictures that the processor was given.
        kept: What `inspect_tokens` returned for the batch.
        inputs: What the processor made of it.
        image_processor: The processor's image processor.
    """
    drawn = []
    for number, image in enumerate(images):
        tiles = tile_pictures(image, number, inputs, image_processor)
        drawn.append(draw_kept(tiles, [tokens for tokens in kept if tokens.image == number]))
    return reduce(_above, drawn)


@dataclass(frozen=True)
class SheetCell:
    """What was kept for a question (a picture and the entries it shows), the answer given, and whether it is right."""

    picture: Image.Image
    kept: Sequence[KeptTokens]
    answer: str
    right: bool


@dataclass(frozen=True)
class SheetRow:
    """A question, its true answer, and one cell for each column of the sheet."""

    question: str
    answer: str
    cells: Sequence[SheetCell]


def contact_sheet(columns: Sequence[str], rows: Sequence[SheetRow]) -> Image.Image:
    """A sheet with one question a row and one method a column.

    Args:
        columns: Headings, of several lines where they contain newlines.
        rows: As many cells each as there are columns.
    """
    cells = [cell for row in rows for cell in row.cells]
    width, height = max(cell.picture.width for cell in cells), max(cell.picture.height for cell in cells)
    points, gap = width // 8, width // 12
    font, line = _font(points), round(points * 1.25)
    margin, head = round(width * 1.2), gap + line * (1 + max(heading.count("\n") for heading in columns))
    pitch_x, pitch_y = width + gap, height + line + 2 * gap
    sheet = Image.new("RGB", (margin + pitch_x * len(columns), head + pitch_y * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, heading in enumerate(columns):
        _write(draw, (margin + i * pitch_x + width // 2, gap), heading.split("\n"), line, font, INK, "ma")
    for j, row in enumerate(rows):
        top = head + gap + j * pitch_y
        lines = [*_wrapped(row.question, font, margin - 2 * gap), f"({row.answer})"]
        _write(draw, (gap, top), lines, line, font, INK, "la")
        for i, cell in enumerate(row.cells):
            left = margin + i * pitch_x
            sheet.paste(cell.picture, (left + (width - cell.picture.width) // 2, top))
            verdict, colour = ("right", RIGHT_COLOUR) if cell.right else ("wrong", WRONG_COLOUR)
            caption = f"{_wrapped(cell.answer, font, width * 3 // 5)[0]}: {verdict}"
            _write(draw, (left + width // 2, top + height + gap // 3), [caption], line, font, colour, "ma")
    roles = {role for cell in cells for tokens in cell.kept for role in _roles(tokens)}
    colours = _colours(roles)
    entries = [(role, colours[role]) for role in colours if role in roles]
    return _above(sheet, _legend([*entries, (DROPPED, DROPPED_COLOUR)], sheet.width, points))


def _draw_tile(tile: Image.Image, kept: KeptTokens, side: int) -> Image.Image:
    scale = side / max(tile.size)
    width, height = (max(1, round(pixels * scale)) for pixels in tile.size)
    bright = tile.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    picture = ImageEnhance.Brightness(ImageEnhance.Color(bright).enhance(0.3)).enhance(DIMMED)
    draw = ImageDraw.Draw(picture)
    rows, columns = kept.grid
    line = max(1, min(width // columns, height // rows, side // 10) // 9)
    roles, colours = _roles(kept), _colours(_roles(kept))
    for role, (top, left, bottom, right) in zip(roles, _boxes(kept), strict=True):
        box = (left * width // columns, top * height // rows, right * width // columns, bottom * height // rows)
        picture.paste(bright.crop(box), box)
        inside = (box[0], box[1], box[2] - 1, box[3] - 1)
        draw.rectangle(inside, outline=colours[role], width=max(1, line // 2) if role == KEPT else line)
    return picture


def _boxes(kept: KeptTokens) -> list[Box]:
    """Top, left, bottom and right of each token, in patches."""
    height, width = kept.grid
    index, count = kept.patch_index.tolist(), kept.patch_count.tolist()
    rows, columns = [patch // width for patch in index], [patch % width for patch in index]
    if max(count, default=1) > 1:
        h, w = len(set(rows)), len(set(columns))
        # Cell r of h covers the rows i with i * h // H == r.
        tops, lefts = [-(-r * height // h) for r in range(h + 1)], [-(-c * width // w) for c in range(w + 1)]
        cells = [(row * h // height, column * w // width) for row, column in zip(rows, columns, strict=True)]
        boxes = [(tops[r], lefts[c], tops[r + 1], lefts[c + 1]) for r, c in cells]
        if [(bottom - top) * (right - left) for top, left, bottom, right in boxes] == count:
            return boxes
    return [(row, column, row + 1, column + 1) for row, column in zip(rows, columns, strict=True)]


def _roles(kept: KeptTokens) -> list[str]:
    return [KEPT] * len(kept.patch_index) if kept.roles is None else kept.roles


def _colours(roles: Iterable[str]) -> dict[str, Colour]:
    return ROLE_COLOURS | dict(zip(sorted(set(roles) - set(ROLE_COLOURS)), cycle(OTHER_COLOURS)))


def _labels(kept: Sequence[KeptTokens]) -> list[tuple[str, Colour]]:
    """Each role with its number of tokens, and the number of patches that are in no token."""
    counts = Counter(role for tokens in kept for role in _roles(tokens))
    labels = [(f"{role} {counts[role]}", colour) for role, colour in _colours(counts).items() if counts[role]]
    patches = sum(tokens.grid[0] * tokens.grid[1] for tokens in kept)
    dropped = patches - sum(int(tokens.patch_count.sum()) for tokens in kept)
    return [*labels, (f"{DROPPED} {dropped}", DROPPED_COLOUR)] if dropped else labels


def _legend(labels: Sequence[tuple[str, Colour]], width: int, points: int) -> Image.Image:
    """A strip of swatches with their labels, in smaller letters where the ``width`` asks for it."""
    text = "".join(label for label, _ in labels)
    while points > 6 and _font(points).getlength(text) + 2.5 * points * len(labels) > width:
        points -= 1
    font = _font(points)
    strip = Image.new("RGB", (width, 2 * points), PAPER)
    draw, left = ImageDraw.Draw(strip), points // 2
    for label, colour in labels:
        draw.rectangle([left, points // 2, left + points, points * 3 // 2], colour)
        draw.text((left + points * 3 // 2, points), label, INK, font, anchor="lm")
        left += round(font.getlength(label) + 2.5 * points)
    return strip


def _above(picture: Image.Image, strip: Image.Image) -> Image.Image:
    both = Image.new("RGB", (max(picture.width, strip.width), picture.height + strip.height), PAPER)
    both.paste(picture, (0, 0))
    both.paste(strip, (0, picture.height))
    return both


def _font(points: int) -> Any:
    return ImageFont.load_default(points)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """The words of ``text`` in lines that fit into ``width``; a longer word has a line to itself."""
    lines: list[str] = []
    for word in text.split() or [""]:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    lines: Sequence[str],
    pitch: int,
    font: Any,
    colour: Colour,
    anchor: str,
) -> None:
    for i, line in enumerate(lines):
        draw.text((place[0], place[1] + i * pitch), line, colour, font, anchor=anchor)
