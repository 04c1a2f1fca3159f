"""Text-only contrast: against what the language model would say without the image, the plainest of baselines.

Paper: the contrast with an unconditioned model of M3ID, arXiv 2403.14003, without its schedule over the steps.

Shapes: B images, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm_vision.contrast import OneCall
from mllm_vision.encoding import ImageTokens, SeenImages
from mllm_vision.operations import Contrast, ContrastConfig, TowerFacts
from mllm_vision.tokens import VisualTokens

__all__ = ["TextOnlyConfig", "text_only"]


@dataclass(kw_only=True)
class TextOnlyConfig(ContrastConfig, type="text_only", paper="baseline"):
    """Contrast with the prompt without its images.

    Args:
        alpha: Weight of the contrast, 0 or more.
        beta: Tokens with less than this share of the probability of the likeliest are out, in [0, 1).
    """

    def build(self, tower: TowerFacts) -> Contrast:
        return TextOnly(self)


class TextOnly(Contrast):
    def forward(self, seen: SeenImages) -> list[ImageTokens]:
        return seen.only(nothing)


def nothing(tokens: VisualTokens) -> VisualTokens:
    """None of the tokens (B, N), so (B, 0)."""
    return tokens.take(tokens.patch_index[:, :0])


def text_only(**settings: Any) -> OneCall:
    """`TextOnlyConfig` with these settings for one call: ``model.generate(**inputs, custom_generate=text_only())``."""
    return OneCall(TextOnlyConfig(**settings))
