"""Down-sampling of the image before the tower: fewer tokens because there is less to see, and a cheaper tower, too.

A baseline that many pruning methods fail to beat, so every honest table has it.

Shapes: (H, W) grid of a tile, (h, w) coarse grid, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

from mllm_vision.operations import ImageOperation, KeepConfig, TowerFacts, coarse_grid

__all__ = ["DownsampleConfig"]


@dataclass(kw_only=True)
class DownsampleConfig(KeepConfig, type="downsample", paper="baseline"):
    """Resize the image so that the tower makes at most `keep` tokens of it, as near to it as the aspect allows.

    Args:
        keep: Tokens to keep of an image; a float in (0, 1) is a share of its tokens.
    """

    def build(self, tower: TowerFacts) -> ImageOperation:
        return Downsample(self)


class Downsample(ImageOperation):
    def __init__(self, config: DownsampleConfig):
        super().__init__()
        self.config = config

    def forward(self, grid: tuple[int, int], tiles: int) -> tuple[int, int]:
        return coarse_grid(grid, max(1, self.config.count(tiles * grid[0] * grid[1]) // tiles))
