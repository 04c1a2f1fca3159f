"""Random pruning: the baseline that every pruning method must beat.

Shapes: B images, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mllm_vision.operations import KeepConfig, TokenOperation, TowerFacts
from mllm_vision.tokens import VisualTokens

__all__ = ["RandomConfig"]


@dataclass(kw_only=True)
class RandomConfig(KeepConfig, type="random", paper="baseline"):
    """Keep patches drawn at random, the same ones in every image of a layout, so that a batch equals its images alone.

    Args:
        keep: Tokens to keep of an image; a float in (0, 1) is a share of its tokens.
        seed: Seed of the draw.
    """

    seed: int = 0

    def build(self, tower: TowerFacts) -> TokenOperation:
        return Random(self)


class Random(TokenOperation):
    def __init__(self, config: RandomConfig):
        super().__init__()
        self.config = config

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        generator = torch.Generator().manual_seed(self.config.seed)
        draw = torch.rand(tokens.patches, generator=generator).to(tokens.features.device)
        scores = draw.expand(len(tokens.features), -1)  # (B, P)
        return tokens.keep_best(scores, self.config.count(tokens.features.shape[1]))
