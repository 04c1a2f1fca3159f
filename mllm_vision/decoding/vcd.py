"""Visual contrastive decoding (VCD): contrast against the answer to a noised image.

Paper: Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding,
arXiv 2311.16922.
Code: github.com/DAMO-NLP-SG/VCD @ d6568ff (Apache-2.0).

Differs: the noise comes from a generator with a seed of its own, the same for every image of a shape, so that an answer
depends neither on the batch nor on the device. Frames that a host repeats of an image get the same noise.

Shapes: pixels as the host's processor lays them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm_vision.contrast import OneCall
from mllm_vision.encoding import ImageTokens, SeenImages
from mllm_vision.operations import Contrast, ContrastConfig, TowerFacts

__all__ = ["VCDConfig", "diffused", "vcd"]

DIFFUSION_STEPS = 1000
"""Steps of the forward process (authors' code)."""

LEAST_BETA, MOST_BETA = 1e-5, 5e-3
"""Variance of the noise added in a step, along a sigmoid from -6 to 6 (authors' code)."""


@dataclass(kw_only=True)
class VCDConfig(ContrastConfig, type="vcd", paper="arXiv 2311.16922"):
    """Contrast with a prompt whose image is noised as by the forward process of a diffusion model.

    Args:
        alpha: Weight of the contrast, 0 or more (paper: 1).
        beta: Tokens with less than this share of the probability of the likeliest are out, in [0, 1) (paper: 0.1).
        steps: How far the image is diffused, 0..999 (authors' scripts: 500, which leaves 0.86 of its amplitude; the
            most leaves 0.29).
        seed: Seed of the noise.
    """

    steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.steps < DIFFUSION_STEPS:
            raise ValueError(f"steps must be in 0..{DIFFUSION_STEPS - 1}, got {self.steps}")

    def build(self, tower: TowerFacts) -> Contrast:
        return VCD(self)


class VCD(Contrast):
    def __init__(self, config: VCDConfig):
        super().__init__(config)
        self.steps, self.seed = config.steps, config.seed

    def forward(self, seen: SeenImages) -> list[ImageTokens]:
        return seen.again(diffused(seen.pixels, seen.noise(self.seed), self.steps))


def diffused(pixels: Tensor, noise: Tensor, step: int) -> Tensor:
    """``pixels`` after ``step`` + 1 steps of diffusion by normal ``noise`` of their shape, in their dtype."""
    betas = LEAST_BETA + (MOST_BETA - LEAST_BETA) * torch.linspace(-6, 6, DIFFUSION_STEPS).sigmoid()
    left = (1 - betas[: step + 1]).prod().item()
    return (left**0.5 * pixels.float() + (1 - left) ** 0.5 * noise).to(pixels.dtype)


def vcd(**settings: Any) -> OneCall:
    """`VCDConfig` with these settings for one call: ``model.generate(**inputs, custom_generate=vcd(steps=999))``."""
    return OneCall(VCDConfig(**settings))
