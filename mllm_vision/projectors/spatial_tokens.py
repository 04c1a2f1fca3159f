"""Spatial tokens: a few visual tokens that know how the patches lie, for the prompt beside the projected patches.

Every token comes from one kernel as large as the map it is shown, so that each patch has weights of its own. The maps
are crops that grow from the centre to the whole image, or the whole image pooled from coarse to fine.

Paper: LLaVA-SP, arXiv 2507.00505.
Code: github.com/CnFaker/LLaVA-SP @ 24d8a8f (Apache-2.0).

Differs: any grid and width, where the authors write 24, 1024, 512 and 4096; for 24 x 24 the rules below give their
sizes. The variant is a field; theirs is a string in three places of the source. There is no `nan_to_num`, which makes
a wrong number of an overflow: attention computes its scores in float32. Cropping adds details at any number of
scales; their trials of 3 and 12 crop without. Weights start as theirs do, from torch's defaults.

Cost at C 1024, O 512, D 4096 on 24 x 24: pooling 0.77 G parameters and 1.6 GFLOP an image, cropping 0.90 G and 8.3,
both in proportion to O; the MLP beside it has 0.02 G and takes 24 GFLOP. A crop, and the windows that details are taken
from (eleven maps), are copied while their kernel is at work.

Shapes: B images, P patches on an (H, W) grid, C channels of the tower, O of the spatial branch, D of the language
model, S scales of (h, w) patches, K places that the details are taken at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, gelu, linear, scaled_dot_product_attention, unfold

from mllm_vision.operations import AddedTokens, PluggedConfig, TowerFacts

__all__ = ["SpatialTokens", "SpatialTokensConfig", "from_authors"]

SIDE = 24
"""Side of the grid where the tower has none of its own: that of the authors' tower."""

DETAILS = 5
"""Places a side that the details are taken at: 5 x 5 in the authors' code."""

Variant = Literal["pooling", "cropping"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

AUTHORS_KERNEL = re.compile(r"conv_([1-9]\d*)(?:\.1)?\.weight")


@dataclass(kw_only=True)
class SpatialTokensConfig(PluggedConfig, type="spatial_tokens", kind="projector", paper="arXiv 2507.00505"):
    """Add a token a scale, computed from the tower's whole map of patches by weights that have to be trained.

    Args:
        variant: "cropping" sees growing crops around the centre, and details through cross-attention (the variant of
            the authors' quick start, for detail); "pooling" sees the whole image, pooled from coarse to fine.
        channels: Width of the spatial branch (the authors' code: 512); its size and cost grow with it.
        scales: Tokens to add to an image, or to each of its tiles (paper: 6; it also tries 3 and 12).
        side: Side of the square grid that the kernels are made for, at most the tower's own; a map of any other grid is
            brought onto it by average pooling. None is the tower's own grid, or 24 where that depends on the image.
    """

    variant: Variant = "cropping"
    channels: int = 512
    scales: int = 6
    side: int | None = None

    needs_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channels", "scales", "side"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")

    def check(self, tower: TowerFacts) -> None:
        if self.side is not None and tower.grid is not None and self.side > min(tower.grid):
            height, width = tower.grid
            raise ValueError(
                f"side must be in 1..{min(tower.grid)} for a tower that sees {height} x {width}, got {self.side}"
            )
        scale_sizes(self.grid(tower), self.scales)

    def build(self, tower: TowerFacts) -> SpatialTokens:
        return SpatialTokens(self, self.grid(tower), tower.width, tower.out)

    def grid(self, tower: TowerFacts) -> tuple[int, int]:
        """(H, W) that the kernels are made for."""
        return (tower.grid or (SIDE, SIDE)) if self.side is None else (self.side, self.side)


class SpatialTokens(AddedTokens):
    """The spatial tokens of images that lie on one grid; the kernels are made for that grid.

    Args:
        config: Its settings.
        grid: (H, W).
        width: C.
        out: D.

    Raises:
        ValueError: the grid has fewer rows or columns than there are scales.
    """

    def __init__(self, config: SpatialTokensConfig, grid: tuple[int, int], width: int, out: int):
        super().__init__(grid, config.scales)
        cropping = config.variant == "cropping"
        self.width = width
        self.sizes = scale_sizes(grid, config.scales)
        self.see = centre_crop if cropping else adaptive_avg_pool2d
        self.kernels = nn.ModuleList(Kernel(width, config.channels, size) for size in self.sizes)
        self.details = Details(grid, width, config.channels) if cropping else None
        self.project = nn.Linear(config.channels * (2 if cropping else 1), out, bias=cropping)

    def forward(self, features: Tensor) -> Tensor:
        """The tokens (B, S, D) of row-major patches (B, P, C), from the smallest scale to the whole grid.

        Raises:
            ValueError: patches of another grid or width.
        """
        height, width = self.grid
        if features.shape[1:] != (height * width, self.width):
            raise ValueError(
                f"expected the patches of a {height} x {width} grid, (images, {height * width}, {self.width}), got "
                f"{tuple(features.shape)}; the kernels fit one grid, so build spatial tokens for the one the tower sees"
            )
        patches = features.transpose(1, 2).unflatten(2, self.grid)  # (B, C, H, W), a view
        maps = (self.see(patches, size).flatten(1) for size in self.sizes)
        seen = [kernel(window) for kernel, window in zip(self.kernels, maps, strict=True)]
        tokens = torch.stack(seen, dim=1)  # (B, S, O)
        if self.details is not None:
            tokens = torch.cat([tokens, self.details(tokens, patches)], dim=-1)
        return self.project(gelu(tokens))


class Kernel(nn.Module):
    """The kernel (O, C, h, w) of a convolution without bias, begun as torch begins one, for windows of its own size."""

    def __init__(self, width: int, channels: int, size: tuple[int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width, *size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, windows: Tensor) -> Tensor:
        """Flat windows (..., C * h * w) to (..., O)."""
        # As a matrix product, which only reads the kernel: a processor's convolution would first reorder all of it.
        return linear(windows, self.weight.flatten(1))


class Details(nn.Module):
    """What tokens (B, S, O) attend to in the map of patches (B, C, H, W), seen through one strided convolution."""

    def __init__(self, grid: tuple[int, int], width: int, channels: int):
        super().__init__()
        (height, down), (across, right) = detail_window(grid[0]), detail_window(grid[1])
        self.size, self.stride = (height, across), (down, right)
        self.conv = Kernel(width, channels, self.size)
        self.query = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels))
        self.key = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels))
        self.value = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels))

    def forward(self, tokens: Tensor, patches: Tensor) -> Tensor:
        details = self.conv(unfold(patches, self.size, stride=self.stride).transpose(1, 2))  # (B, K, O)
        return scaled_dot_product_attention(self.query(tokens), self.key(details), self.value(details))


def scale_sizes(grid: tuple[int, int], scales: int) -> list[tuple[int, int]]:
    """The (h, w) of every scale i = 1..S on an (H, W) grid: H * i / S and W * i / S, rounded down.

    Raises:
        ValueError: the grid has fewer rows or columns than there are scales.
    """
    height, width = grid
    if scales > min(grid):
        raise ValueError(f"scales must be in 1..{min(grid)} on a {height} x {width} grid, got {scales}")
    return [(height * i // scales, width * i // scales) for i in range(1, scales + 1)]


def centre_crop(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle (h, w) of a map (B, C, H, W), a view; of two middles the upper and the left one."""
    top, left = ((whole - part) // 2 for whole, part in zip(patches.shape[2:], size, strict=True))
    return patches[..., top : top + size[0], left : left + size[1]]


def detail_window(side: int) -> tuple[int, int]:
    """Kernel and stride along a side of the grid: five places from edge to edge, a twelfth of the side apart.

    24 gives the authors' 16 and 2. A side of fewer than five patches has a place for each.
    """
    stride = max(1, (side + 6) // 12)  # to the nearest
    return max(1, side - (DETAILS - 1) * stride), stride


@dataclass(frozen=True)
class AuthorsWeights:
    """What a checkpoint of the authors holds.

    Args:
        config: The settings it was trained with.
        grid: (H, W).
        width: C.
        out: D.
        spatial: State dict of `SpatialTokens`.
        patch_branch: Their ``mm_projector.*`` under their names: the two-layer MLP that every host has of its own.
    """

    config: SpatialTokensConfig
    grid: tuple[int, int]
    width: int
    out: int
    spatial: dict[str, Tensor]
    patch_branch: dict[str, Tensor]


def from_authors(weights: Mapping[str, Tensor], side: int | None = None) -> AuthorsWeights:
    """The authors' weights under our names; variant and sizes, which their checkpoints do not state, follow from them.

    Args:
        weights: Under the authors' names, without the prefix ``model.`` or ``base_model.model.model.``.
        side: Of the grid that the tower sees; None is that of the largest kernel.

    Raises:
        ValueError: keys are missing or surplus, or a weight is of another shape than the others ask for.
    """
    kernels = [int(match[1]) for match in map(AUTHORS_KERNEL.fullmatch, weights) if match]
    if not kernels:
        raise ValueError(f"expected keys such as conv_4.weight, without a prefix, got {', '.join(weights) or 'none'}")
    patch_branch = {name: weight for name, weight in weights.items() if name.startswith("mm_projector.")}
    given, side = weights.keys() - patch_branch, side or max(kernels)
    if max(kernels) > side:
        raise ValueError(
            f"kernels for {max(kernels)} x {max(kernels)} patches do not fit a tower that sees {side} x {side}"
        )
    variant, scales = min(
        ((variant, scales) for variant in VARIANTS for scales in range(1, side + 1)),
        key=lambda found: len(authors_names(found[0], side, found[1]).keys() ^ given),
    )
    names = authors_names(variant, side, scales)
    if given != names.keys():
        missing, surplus = names.keys() - given, given - names.keys()
        raise ValueError(
            f"not the weights of {scales} {variant} scales on a {side} x {side} grid: missing are "
            f"{', '.join(sorted(missing)) or 'none'}, surplus are {', '.join(sorted(surplus)) or 'none'}"
        )
    largest = next(name for name in names if names[name] == f"kernels.{scales - 1}.weight")
    (channels, width), out = weights[largest].shape[:2], len(weights["conv_linear.1.weight"])
    config = SpatialTokensConfig(variant=variant, channels=channels, scales=scales)
    with torch.device("meta"):
        expected = SpatialTokens(config, (side, side), width, out).state_dict()
    for theirs, ours in names.items():
        if weights[theirs].shape != expected[ours].shape:
            raise ValueError(
                f"{theirs} must be {tuple(expected[ours].shape)} beside {largest}, got {tuple(weights[theirs].shape)}"
            )
    spatial = {ours: weights[theirs] for theirs, ours in names.items()}
    return AuthorsWeights(config, (side, side), width, out, spatial, patch_branch)


def authors_names(variant: Variant, side: int, scales: int) -> dict[str, str]:
    """Our name of each of the authors' weights for a (side, side) grid, their patch branch apart."""
    names = {}
    for i, (part, _) in enumerate(scale_sizes((side, side), scales)):
        layer = ".1" if variant == "pooling" and part < side else ""  # behind a pooling layer, where there is one
        names[f"conv_{part}{layer}.weight"] = f"kernels.{i}.weight"
    names["conv_linear.1.weight"] = "project.weight"
    if variant == "cropping":
        names |= {"conv_linear.1.bias": "project.bias", "conv_CM.weight": "details.conv.weight"}
        for role in ("query", "key", "value"):
            for part_name in ("0.weight", "0.bias", "1.weight", "1.bias"):
                names[f"{role}_projector.{part_name}"] = f"details.{role}.{part_name}"
    return names
