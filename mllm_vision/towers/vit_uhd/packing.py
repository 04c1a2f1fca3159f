"""Where the tokens of several images lie that stand in one row, image after image, each row-major.

Everything here is tensor arithmetic over the whole pack: the grids are known on the host, so nothing is read back from
the device, and nothing loops over images.

Shapes: B images of (H, W) tokens, L tokens in all, M after merging windows of 2 x 2, C channels, d channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

Grid = tuple[int, int]

__all__ = ["on_device", "position_angles", "positions_on", "rotate", "token_places", "window_index"]


def on_device(numbers: Sequence[int] | Sequence[Grid], device: torch.device) -> Tensor:
    """A few integers as a tensor; a plain ``.to(device)`` would wait until the device has done all it was given."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def token_places(grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of every token, (L,) each."""
    sizes = on_device(grids, device)  # (B, 2)
    counts = sizes.prod(1)
    length = sum(height * width for height, width in grids)  # known on the host, so that the device need not tell
    image = torch.repeat_interleave(torch.arange(len(grids), device=device), counts, output_size=length)
    index = torch.arange(length, device=device) - (counts.cumsum(0) - counts)[image]
    width = sizes[image, 1]
    return image, index // width, index % width


def window_index(grids: Sequence[Grid], device: torch.device) -> Tensor:
    """The tokens of every window of 2 x 2, (M, 4), row-major in the window, windows in the order of the coarser grids.

    Args:
        grids: (H, W) of every image, all even.
    """
    image, row, column = token_places([(height // 2, width // 2) for height, width in grids], device)
    sizes = on_device(grids, device)
    counts, width = sizes.prod(1), sizes[image, 1]
    first = (counts.cumsum(0) - counts)[image] + 2 * row * width + 2 * column
    right = torch.ones_like(width)
    return first[:, None] + torch.stack([right * 0, right, width, width + 1], dim=1)


def positions_on(table: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The learned table (rows, columns, C), resampled bicubically to the grid of every image: (L, C) in float32.

    As `interpolate(mode="bicubic")` does it for one image, without anti-aliasing: a table on its own grid is unchanged.
    """
    rows, columns, _ = table.shape
    image, row, column = token_places(grids, table.device)
    sizes = on_device(grids, table.device)[image]
    above, by_row = _cubic(row, sizes[:, 0], rows)
    left, by_column = _cubic(column, sizes[:, 1], columns)
    index = above[:, :, None] * columns + left[:, None]  # (L, 4, 4)
    weight = by_row[:, :, None] * by_column[:, None]
    return embedding_bag(
        index.flatten(1), table.flatten(0, 1).float(), mode="sum", per_sample_weights=weight.flatten(1)
    )


def _cubic(place: Tensor, size: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """The four entries around every place on an axis of ``size`` places, and their weights, (L, 4) each."""
    at = (place + 0.5) * (entries / size) - 0.5
    low = at.floor()
    offset = torch.arange(-1, 3, device=place.device)
    distance = (at - low)[:, None] - offset
    x, a = distance.abs(), -0.75  # the cubic kernel of Keys, with the slope that torch uses
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    entry = (low.long()[:, None] + offset).clamp(0, entries - 1)
    return entry, torch.where(x <= 1, inner, outer)


def position_angles(grids: Sequence[Grid], step: int, dim: int, theta: float, device: torch.device) -> Tensor:
    """Rotary angle of every token for each pair of channels, (L, d / 2): x and y in turn, from fast to slow.

    Args:
        step: Distance between neighbouring tokens.
        dim: d, a multiple of 4.
        theta: Base of the frequencies.
    """
    _, row, column = token_places(grids, device)
    frequency = theta ** -(torch.arange(0, dim, 4, device=device) / dim)
    place = torch.stack([column, row], dim=1) * float(step)
    return (frequency[:, None] * place[:, None]).flatten(1)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pair of neighbouring channels of ``states`` (L, heads, d), turned by its angle: (L, d / 2) each."""
    cos, sin = cos[:, None], sin[:, None]
    even, odd = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(states.dtype)
