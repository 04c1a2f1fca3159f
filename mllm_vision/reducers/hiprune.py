"""HiPrune: keep the patches that the middle and the deep layers of the tower attend to.

Paper: Training-free token pruning by hierarchical attention, arXiv 2508.00553.
Code: github.com/Danielement321/HiPrune @ 6e83a12 (MIT).

Differs: neighbours are found on the grid (the authors add 1 and W to the flat index, so that a neighbour can wrap to
the next row; ``neighbours="flat"`` does the same); the budget belongs to an image whatever the batch, and by default
to the image as a whole rather than to each of its tiles; patches that a host cuts away as padding are never chosen;
works on any grid, where the authors write 24 and 576. The number of anchors follows their code, round(K * alpha / 5).

Shapes: B images, P patches, (H, W) grid, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mllm_vision.operations import KeepConfig, TokenOperation, TowerFacts
from mllm_vision.tokens import AttentionReceived, Roles, VisualTokens

__all__ = ["HIPRUNE_ROLES", "HiPruneConfig", "hierarchical_roles"]

HIPRUNE_ROLES = Roles(("dropped", "register", "buffer", "anchor"))
REGISTER, BUFFER, ANCHOR = 1, 2, 3


@dataclass(kw_only=True)
class HiPruneConfig(KeepConfig, type="hiprune", paper="arXiv 2508.00553"):
    """Keep anchors (objects), their neighbours as buffers, and registers (the scene as a whole).

    Args:
        keep: Tokens to keep of an image; a float in (0, 1) is a share of its tokens.
        alpha: Share of `keep` given to anchors and their buffers, in [0, 1] (paper, section 4.1: 0.1).
        object_layer: Attention map that finds anchors, an index into the tower's layers; None is the one published for
            the host (CLIP-L: 8).
        deep_layer: Attention map that finds registers; None is the one published for the host (CLIP-L: -2).
        neighbours: "grid" stays inside the row, "flat" wraps as the authors' code does.
        budget: "image" spends `keep` wherever the image's attention is; "tile" gives each tile int(keep / T).
    """

    alpha: float = 0.1
    object_layer: int | None = None
    deep_layer: int | None = None
    neighbours: Literal["grid", "flat"] = "grid"
    budget: Literal["image", "tile"] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")

    def build(self, tower: TowerFacts) -> TokenOperation:
        return HiPrune(self, tower)


class HiPrune(TokenOperation):
    def __init__(self, config: HiPruneConfig, tower: TowerFacts):
        super().__init__()
        self.config = config
        self.objects = AttentionReceived(tower.layer(config.object_layer, tower.object_layer))
        self.scene = AttentionReceived(tower.layer(config.deep_layer, tower.deep_layer))
        self.requests = (self.objects, self.scene)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        cfg, (height, width) = self.config, tokens.grid
        keep, parts = cfg.count(tokens.features.shape[1]), 1
        if cfg.budget == "tile":
            keep, parts = max(1, keep // tokens.tiles), tokens.tiles
        # (B, P) -> (B * parts, P / parts): each row has a budget of its own
        objects, scene, present = (
            patches.reshape(-1, tokens.patches // parts)
            for patches in (tokens.evidence[self.objects], tokens.evidence[self.scene], tokens.present)
        )
        anchors = round(keep * cfg.alpha / 5)
        roles = hierarchical_roles(
            objects, scene, present, (height, width), keep=keep, anchors=anchors, wrap=cfg.neighbours == "flat"
        )
        roles = roles.reshape(-1, tokens.patches)
        tokens.evidence[HIPRUNE_ROLES] = roles
        return tokens.keep_patches(roles > 0)


def hierarchical_roles(
    objects: Tensor, scene: Tensor, present: Tensor, grid: tuple[int, int], *, keep: int, anchors: int, wrap: bool
) -> Tensor:
    """The role of every patch, as an index into `HIPRUNE_ROLES` (B, P).

    Args:
        objects: (B, P), score that chooses anchors.
        scene: (B, P), score that chooses registers.
        present: (B, P) bool, patches that may be chosen; as many in every row.
        grid: (H, W) with P a multiple of H * W; no neighbour lies in another tile.
        keep: Patches to choose in all, fewer only where fewer are present.
        anchors: Patches to choose by `objects` before their neighbours join as buffers.
        wrap: Neighbours by flat index, as in the authors' code.
    """
    roles = torch.zeros_like(objects, dtype=torch.long)
    keep = min(keep, int(present[0].sum()))
    anchor_index = objects.masked_fill(~present, -torch.inf).topk(min(anchors, keep), dim=1).indices
    anchor = torch.zeros_like(present).scatter_(1, anchor_index, True)
    buffer = (flat_neighbours if wrap else grid_neighbours)(anchor, grid) & present & ~anchor
    # One ranking for all three: anchors before buffers before the rest, inside a role by its own score.
    rank = torch.where(buffer, objects.argsort(1).argsort(1), scene.argsort(1).argsort(1)).double() / objects.shape[1]
    priority = (rank + anchor * 2.0 + buffer * 1.0).masked_fill(~present, -torch.inf)
    chosen = priority.topk(keep, dim=1).indices
    role = torch.where(anchor, ANCHOR, torch.where(buffer, BUFFER, REGISTER))
    return roles.scatter_(1, chosen, role.gather(1, chosen))


def grid_neighbours(marked: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches above, below, left and right of the ``marked`` ones (B, P), on the grid of each tile."""
    tiles = marked.reshape(marked.shape[0], -1, *grid)
    found = torch.zeros_like(tiles)
    found[..., 1:, :] |= tiles[..., :-1, :]
    found[..., :-1, :] |= tiles[..., 1:, :]
    found[..., 1:] |= tiles[..., :-1]
    found[..., :-1] |= tiles[..., 1:]
    return found.flatten(1)


def flat_neighbours(marked: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches at flat index +-1 and +-W of the ``marked`` ones (B, P), clamped to the tile: the authors' arithmetic."""
    (height, width), tiles = grid, marked.reshape(marked.shape[0], -1, grid[0] * grid[1])
    index = torch.arange(height * width, device=marked.device)
    found = torch.zeros_like(tiles)
    for step in (-1, 1, -width, width):
        target = (index + step).clamp(0, height * width - 1)
        found |= torch.zeros(tiles.shape, device=marked.device).index_add_(2, target, tiles.float()) > 0
    return found.flatten(1)
