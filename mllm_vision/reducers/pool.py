"""Spatial average pooling of the token grid: the baseline that keeps a little of everything.

Paper: average pooling as the token reducer of PLLaVA, arXiv 2404.16994, and of the baselines in most pruning papers.

Shapes: B images, N tokens, M cells that hold a token, (H, W) grid, (h, w) coarse grid, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mllm_vision.operations import KeepConfig, TokenOperation, TowerFacts, coarse_grid
from mllm_vision.tokens import VisualTokens

__all__ = ["PoolConfig"]


@dataclass(kw_only=True)
class PoolConfig(KeepConfig, type="pool", paper="baseline"):
    """Average the tokens of each cell of a coarser grid: at most `keep` cells, as near to it as the aspect allows.

    Args:
        keep: Tokens to keep of an image; a float in (0, 1) is a share of its tokens.
    """

    def build(self, tower: TowerFacts) -> TokenOperation:
        return Pool(self)


class Pool(TokenOperation):
    def __init__(self, config: PoolConfig):
        super().__init__()
        self.config = config

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        patch = tokens.patch_index[0]
        if not bool((tokens.patch_index == patch).all()):
            raise ValueError("pool needs the same patches of every image: put it before a method that chooses patches")
        height, width = tokens.grid
        h, w = coarse_grid(tokens.grid, max(1, self.config.count(tokens.patches) // tokens.tiles))
        tile, row, column = patch // (height * width), patch // width % height, patch % width
        cell, member = ((tile * h + row * h // height) * w + column * w // width).unique(
            return_inverse=True
        )  # (M), (N)
        weight = tokens.patch_count.to(tokens.features.dtype)[..., None]  # (B, N, 1)
        index = member[None, :, None].expand_as(tokens.features)
        total = torch.zeros_like(tokens.features[:, :1]).repeat(1, len(cell), 1)
        mean = total.scatter_add(1, index, tokens.features * weight)
        mean = mean / torch.zeros_like(mean[..., :1]).scatter_add(1, index[..., :1], weight)
        # A cell stands where its member nearest to the cell's centre stands.
        off_centre = ((row + 0.5) * h / height % 1 - 0.5) ** 2 + ((column + 0.5) * w / width % 1 - 0.5) ** 2
        order = off_centre.argsort(stable=True)
        nearest = torch.full_like(cell, len(patch)).scatter_reduce(0, member, order.argsort(), "amin")
        centre = patch[order[nearest]]  # (M)
        batch = tokens.features.shape[0]
        count = torch.zeros(batch, len(cell), dtype=torch.long, device=patch.device)
        return replace(
            tokens,
            features=mean,
            patch_index=centre.expand(batch, -1),
            patch_count=count.scatter_add(1, member.expand(batch, -1), tokens.patch_count),
        )
