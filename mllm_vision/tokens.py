"""The core type: visual tokens of images that share one grid, and the evidence a method may ask for.

Shapes: B images, T tiles an image, (H, W) patches a tile, P = T * H * W patches and N tokens an image, C channels.
Patches are numbered row-major within a tile, tile after tile: patch p lies in tile ``p // (H * W)``.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionReceived:
    """Request: what every patch receives in one layer, mean over heads, summed over all queries (1.0 on average).

    Args:
        layer: Index of the attention map, 0 for the tower's first layer.
    """

    layer: int


@dataclass(frozen=True)
class AttentionFromCLS:
    """Request: attention of the CLS query to every patch in one layer, mean over heads.

    Args:
        layer: Index of the attention map, 0 for the tower's first layer.
        heads: False is one softmax over the full width of queries and keys, as if the layer had a single head.
    """

    layer: int
    heads: bool = True


Evidence = AttentionReceived | AttentionFromCLS
"""What the attention tap can compute."""


@dataclass(frozen=True)
class Roles:
    """Key of the map a method leaves behind for whoever looks: role ``names[i]`` of a patch is stored as i."""

    names: tuple[str, ...]


@dataclass
class VisualTokens:
    """Visual tokens of B images that lie on one grid.

    Args:
        features: (B, N, C).
        patch_index: (B, N), the patch that each token came from, -1 for a token that sits on no patch.
        patch_count: (B, N), how many patches were folded into each token.
        grid: (H, W), patches of a tile.
        tiles: T, grids an image consists of.
        evidence: maps of shape (B, P), always numbered by patch, never by token.
    """

    features: Tensor
    patch_index: Tensor
    patch_count: Tensor
    grid: tuple[int, int]
    tiles: int = 1
    evidence: dict[Hashable, Tensor] = field(default_factory=dict)

    @property
    def patches(self) -> int:
        """P, the number of patches of an image."""
        return self.tiles * self.grid[0] * self.grid[1]

    @property
    def present(self) -> Tensor:
        """(B, P) bool: which patches have a token of their own."""
        present = self.patch_index.new_zeros(self.patch_index.shape[0], self.patches + 1, dtype=torch.bool)
        present.scatter_(1, self.patch_index.masked_fill(self.patch_index < 0, self.patches), True)
        return present[:, :-1]

    def image(self, row: int) -> VisualTokens:
        """The tokens of image ``row`` alone, as a batch of one."""
        one = slice(row, row + 1)
        return replace(
            self,
            features=self.features[one],
            patch_index=self.patch_index[one],
            patch_count=self.patch_count[one],
            evidence={key: maps[one] for key, maps in self.evidence.items()},
        )

    def take(self, index: Tensor) -> VisualTokens:
        """The tokens at ``index`` (B, K), in that order."""
        return replace(
            self,
            features=self.features.gather(1, index[..., None].expand(-1, -1, self.features.shape[-1])),
            patch_index=self.patch_index.gather(1, index),
            patch_count=self.patch_count.gather(1, index),
        )

    def keep_best(self, scores: Tensor, keep: int) -> VisualTokens:
        """The ``keep`` tokens whose patches score highest in ``scores`` (B, P), in raster order."""
        present = self.present
        chosen = scores.masked_fill(~present, -torch.inf).topk(keep, dim=1).indices
        return self.keep_patches(torch.zeros_like(present).scatter_(1, chosen, True))

    def keep_patches(self, keep: Tensor) -> VisualTokens:
        """The tokens whose patch is marked in ``keep`` (B, P), in raster order; every image keeps equally many.

        Raises:
            ValueError: the images would keep different numbers of tokens.
        """
        on_patch = self.patch_index.clamp(min=0)
        kept = keep.gather(1, on_patch) & (self.patch_index >= 0)  # (B, N)
        counts = kept.sum(1)
        if counts.numel() and not bool((counts == counts[0]).all()):
            raise ValueError(f"every image of a group must keep equally many tokens, got {counts.tolist()}")
        raster = torch.where(kept, on_patch, self.patches).argsort(dim=1, stable=True)
        return self.take(raster[:, : int(counts[0]) if counts.numel() else 0])
