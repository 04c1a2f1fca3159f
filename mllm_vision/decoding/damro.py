"""DAMRO: contrast against the outliers of the tower's attention, background patches that the CLS token attends to most.

Paper: DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination, arXiv 2410.04514.
Code: github.com/coder-gx/DAMRO @ 03008ac (no licence; nothing of it is used here).

Differs: attention is by default the mean over heads that the paper speaks of, where the code has one softmax over the
full width (``attention="single"``). Logits processors and warpers act, after the contrast; the code skips them. A tower
without CLS is asked for the mean attention that its patches receive. As in the code, an image of several tiles gives
the outliers of the first, which shows it whole; the newline that the code puts behind them is left out. Outliers stand
in order of falling attention, but on hosts whose tokens keep their positions in raster order, each at its own.

Shapes: B images, N tokens, P patches, k outliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging

from mllm_vision.contrast import OneCall
from mllm_vision.encoding import ImageTokens, SeenImages
from mllm_vision.operations import Contrast, ContrastConfig, TowerFacts
from mllm_vision.tokens import AttentionFromCLS, AttentionReceived, Evidence, VisualTokens

__all__ = ["DamroConfig", "damro", "falling"]

log = logging.get_logger(__name__)


@dataclass(kw_only=True)
class DamroConfig(ContrastConfig, type="damro", paper="arXiv 2410.04514"):
    """Contrast with a prompt whose image is nothing but its attention outliers.

    Args:
        alpha: Weight of the contrast, 0 or more (authors' script: 2; 0.5 to 2 by benchmark).
        beta: Tokens with less than this share of the probability of the likeliest are out, in [0, 1).
        topk: Outliers of an image (paper: 10); fewer where it has fewer tokens.
        attention: "heads" is the mean over heads, "single" one softmax over the full width, as in the authors' code.
        layer: Attention map to read, an index into the tower's layers.
    """

    alpha: float = 2.0
    topk: int = 10
    attention: Literal["heads", "single"] = "heads"
    layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk < 1:
            raise ValueError(f"topk must be 1 or more, got {self.topk}")

    def check(self, tower: TowerFacts) -> None:
        if tower.image_tokens is not None and self.topk > tower.image_tokens:
            raise ValueError(f"topk must be in 1..{tower.image_tokens}, the visual tokens of an image, got {self.topk}")

    def build(self, tower: TowerFacts) -> Contrast:
        return Damro(self, tower)


class Damro(Contrast):
    def __init__(self, config: DamroConfig, tower: TowerFacts):
        super().__init__(config)
        self.topk = config.topk
        layer = tower.layer(config.layer, tower.deep_layer)
        self.attention: Evidence = AttentionFromCLS(layer, heads=config.attention == "heads")
        if not tower.has_cls:
            log.warning_once(
                "damro: this tower has no CLS token, whose attention the paper reads; the attention that each patch "
                "receives, mean over heads and queries, stands in for it"
            )
            self.attention = AttentionReceived(layer)
        self.requests = (self.attention,)

    def forward(self, seen: SeenImages) -> list[ImageTokens]:
        return seen.only(self.outliers)

    def outliers(self, tokens: VisualTokens) -> VisualTokens:
        """The `topk` tokens of the first tile with the most attention, in falling order."""
        first = tokens.patch_index[0] < tokens.grid[0] * tokens.grid[1]  # (N), the same of every image of a layout
        scores = tokens.evidence[self.attention].gather(1, tokens.patch_index)
        return tokens.take(falling(scores, first, self.topk))


def falling(scores: Tensor, among: Tensor, k: int) -> Tensor:
    """Indices (B, k) of the highest ``scores`` (B, N), best first; those outside of ``among`` (N,) do not take part."""
    return scores.masked_fill(~among, -torch.inf).topk(min(k, int(among.sum())), dim=1).indices


def damro(**settings: Any) -> OneCall:
    """`DamroConfig` with these settings for one call: ``model.generate(**inputs, custom_generate=damro(topk=5))``."""
    return OneCall(DamroConfig(**settings))
