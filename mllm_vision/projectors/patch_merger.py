"""Patch merger: a projector that makes one token of every window of patches, laid side by side and seen by an MLP.

Paper: arXiv 2409.12191 (section 2.1); LLaVA-UHD v3, arXiv 2511.21150, has it as one of its projectors.
Code: github.com/thunlp/LLaVA-UHD @ 13981b5 (Apache-2.0), multimodal_projector/merger.py.

Differs: on a grid that windows do not divide, the last row or column is seen twice; theirs drops it. Any window, where
theirs is 2 x 2, and any dtype, where theirs is bfloat16.

Shapes: T tiles of (H, W) patches, (h, w) windows of s x s patches, C channels of the tower, D of the language
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from mllm_vision.operations import Projection, ProjectionConfig, TowerFacts

__all__ = ["AuthorsMerger", "PatchMerger", "PatchMergerConfig", "from_authors"]

AUTHORS_NAMES = {
    f"mm_projector.{theirs}.{part}": f"{ours}.{part}"
    for theirs, ours in (("nl", "norm"), ("mlp.0", "hidden"), ("mlp.2", "project"))
    for part in ("weight", "bias")
}
"""Our name of each of the authors' weights."""


@dataclass(kw_only=True)
class PatchMergerConfig(ProjectionConfig, type="patch_merger", paper="arXiv 2409.12191"):
    """Make one token of every window of patches, by weights that have to be trained.

    Args:
        size: Patches along a side of a window (the papers: 2).
    """

    size: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size must be 1 or more, got {self.size}")

    def check(self, tower: TowerFacts) -> None:
        super().check(tower)
        if tower.grid is not None and self.size > min(tower.grid):
            height, width = tower.grid
            raise ValueError(
                f"size must be in 1..{min(tower.grid)} for a tower that sees {height} x {width}, got {self.size}"
            )

    def build(self, tower: TowerFacts) -> PatchMerger:
        return PatchMerger(self, tower.width, tower.out)


class PatchMerger(Projection):
    """One token of every window of s x s patches.

    Args:
        config: Its settings.
        width: C.
        out: D.
    """

    def __init__(self, config: PatchMergerConfig, width: int, out: int):
        super().__init__()
        self.size = config.size
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.hidden = nn.Linear(width * self.size**2, width * self.size**2)
        self.project = nn.Linear(width * self.size**2, out)

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        height, width = grid
        return -(-height // self.size), -(-width // self.size)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Row-major patches (T, H * W, C) to tokens (T, h * w, D), windows row-major, too, and patches inside them."""
        (height, width), (h, w), s = grid, self.grid(grid), self.size
        maps = self.norm(features).transpose(1, 2).unflatten(2, grid)  # (T, C, H, W)
        if (height, width) != (h * s, w * s):
            maps = pad(maps, (0, w * s - width, 0, h * s - height), mode="replicate")
        windows = maps.unflatten(3, (w, s)).unflatten(2, (h, s))  # (T, C, h, s, w, s)
        beside = windows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (T, h * w, s * s * C)
        return self.project(gelu(self.hidden(beside)))


@dataclass(frozen=True)
class AuthorsMerger:
    """What a checkpoint of the authors holds.

    Args:
        config: The settings it was trained with.
        width: C.
        out: D.
        weights: State dict of `PatchMerger`.
    """

    config: PatchMergerConfig
    width: int
    out: int
    weights: dict[str, Tensor]


def from_authors(weights: Mapping[str, Tensor]) -> AuthorsMerger:
    """The authors' weights under our names; the size of the window follows from them.

    Args:
        weights: ``mm_projector.*`` under the authors' names, without the prefix ``model.``.

    Raises:
        ValueError: keys are missing or surplus, or a weight is of another shape than the others ask for.
    """
    if weights.keys() != AUTHORS_NAMES.keys():
        missing, surplus = AUTHORS_NAMES.keys() - weights.keys(), weights.keys() - AUTHORS_NAMES.keys()
        raise ValueError(
            f"not the weights of a patch merger: missing are {', '.join(sorted(missing)) or 'none'}, surplus are "
            f"{', '.join(sorted(surplus)) or 'none'}"
        )
    width, (out, beside) = len(weights["mm_projector.nl.weight"]), weights["mm_projector.mlp.2.weight"].shape
    config = PatchMergerConfig(size=max(1, round((beside / width) ** 0.5)))
    beside = width * config.size**2
    shapes = {"norm": (width,), "hidden": (beside, beside), "project": (out, beside)}
    for theirs, ours in AUTHORS_NAMES.items():
        shape = shapes[ours.partition(".")[0]]
        expected = shape if ours.endswith("weight") else shape[:1]
        if weights[theirs].shape != expected:
            raise ValueError(f"{theirs} must be {expected} beside the others, got {tuple(weights[theirs].shape)}")
    return AuthorsMerger(config, width, out, {ours: weights[theirs] for theirs, ours in AUTHORS_NAMES.items()})
