"""Text-only contrast: against what the language model would say without the image, the plainest of baselines.

Paper: Debiasing Multimodal Large Language Models, arXiv 2403.05262: visual debias decoding with no image ("None").
Code: github.com/yfzhang114/LLaVA-Align @ dfbecfa, ``use_dd`` (Apache-2.0).

Differs: on hosts whose tokens keep their positions, text behind an image stands where it stood with the image.
M3ID, arXiv 2403.14003, contrasts with the same prompt by a weight that grows with every step from none.

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
class TextOnlyConfig(ContrastConfig, type="text_only", paper="arXiv 2403.05262"):
    """Contrast with the prompt without its images.

    Args:
        alpha: Weight of the contrast, 0 or more (authors' scripts: 1).
        beta: Tokens with less than this share of the probability of the likeliest are out, in [0, 1) (authors' code:
            0.1).
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
