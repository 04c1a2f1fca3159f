"""What a method is to the host: an operation on visual tokens or the image, a projector, added tokens, a contrast.

Shapes: B images, N visual tokens, T tiles of S added tokens, C channels of the tower, D of the language model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mllm_vision.registry import MethodConfig
from mllm_vision.tokens import Evidence, VisualTokens

if TYPE_CHECKING:
    from mllm_vision.encoding import ImageTokens, SeenImages


@dataclass(frozen=True)
class TowerFacts:
    """What a method may know of the tower it works on, read from the config before any weight is loaded.

    Args:
        depth: Number of attention layers.
        has_cls: Whether a CLS token goes through the layers.
        object_layer: Attention map that attends to objects, as published for this family (scaled to `depth`).
        deep_layer: Attention map that attends to the whole scene.
        width: C, of the map of patches that a tile becomes.
        out: D.
        grid: (H, W) of every tile, or None where that depends on the image.
        image_tokens: Visual tokens of every image, or None where that depends on the image.
        fixed_projector: Why no other projector can take the place of the host's own; None where one can.
    """

    depth: int
    has_cls: bool
    object_layer: int
    deep_layer: int
    width: int
    out: int
    grid: tuple[int, int] | None = None
    image_tokens: int | None = None
    fixed_projector: str | None = None

    def layer(self, asked: int | None, default: int) -> int:
        """Index of the attention map ``asked`` for, negative counting from the end; ``default`` for None.

        Raises:
            ValueError: the tower has no such layer.
        """
        layer = default if asked is None else asked
        if not -self.depth <= layer < self.depth:
            raise ValueError(
                f"the tower has {self.depth} layers, so a layer is in {-self.depth}..{self.depth - 1}, got {layer}"
            )
        return layer % self.depth


class TokenOperation(nn.Module, ABC):
    """Visual tokens in, visual tokens out: pruning, merging, pooling.

    `requests` is the evidence that the tap computes for it; it is found under the same keys in ``tokens.evidence``.
    """

    requests: tuple[Evidence, ...] = ()

    @abstractmethod
    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Tokens of B images, (B, N, C), to (B, M, C); M is the same for the B images."""


class ImageOperation(nn.Module, ABC):
    """An image in, a smaller image out, before the tower sees it."""

    @abstractmethod
    def forward(self, grid: tuple[int, int], tiles: int) -> tuple[int, int]:
        """The (h, w) grid that the tower shall see instead of the (H, W) grid of each of an image's tiles."""


class Projection(nn.Module, ABC):
    """A projector in place of the host's own: what the tower makes of a tile to tokens for the language model."""

    @abstractmethod
    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The (h, w) grid of the tokens that it makes of (H, W) patches."""

    @abstractmethod
    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Row-major patches of T tiles, (T, H * W, C), to row-major tokens (T, h * w, D)."""


class AddedTokens(nn.Module, ABC):
    """Tokens for the prompt beside those of the patches, made of the map that the tower hands to the host's projector.

    Args:
        grid: (H, W) of the maps it takes; a map of another grid is brought onto this one beforehand.
        count: S, the tokens it makes of a tile.
    """

    def __init__(self, grid: tuple[int, int], count: int):
        super().__init__()
        self.grid = grid
        self.count = count

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Row-major patches of T tiles, (T, H * W, C), to (T, S, D)."""


class Contrast(nn.Module, ABC):
    """What the contrastive prompt of a decoding strategy shows in place of the images; `contrast` does the rest.

    `requests` is the evidence that the tap computes for it.
    """

    requests: tuple[Evidence, ...] = ()

    def __init__(self, config: ContrastConfig):
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, seen: SeenImages) -> list[ImageTokens]:
        """What stands in the contrastive prompt for each of the images that the tower saw."""


@dataclass(kw_only=True)
class PluggedConfig(MethodConfig, ABC):
    """A method that is built for a tower and plugged into its host."""

    def check(self, tower: TowerFacts) -> None:
        """Raise ValueError where the tower cannot give what this config asks for."""
        return

    @abstractmethod
    def build(self, tower: TowerFacts) -> TokenOperation | ImageOperation | Projection | AddedTokens | Contrast:
        """What does the work, for a tower that `check` accepted."""


@dataclass(kw_only=True)
class ProjectionConfig(PluggedConfig, kind="projector"):
    """A projector in place of the host's own."""

    needs_weights = True

    def check(self, tower: TowerFacts) -> None:
        if tower.fixed_projector is not None:
            raise ValueError(f"{self.type} cannot take the place of the host's projector: {tower.fixed_projector}")

    @abstractmethod
    def build(self, tower: TowerFacts) -> Projection:
        """The projector, for a tower that `check` accepted."""


@dataclass(kw_only=True)
class ContrastConfig(PluggedConfig, kind="decoding"):
    """A decoding strategy: at every step (1 + alpha) * l - alpha * l_c, where l_c are logits of a contrastive prompt.

    Args:
        alpha: Weight of the contrast, 0 or more.
        beta: Tokens with less than this share of the probability of the likeliest are out, in [0, 1).
    """

    alpha: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a finite number of 0 or more, got {self.alpha}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {self.beta}")

    @abstractmethod
    def build(self, tower: TowerFacts) -> Contrast:
        """The contrast, for a tower that `check` accepted."""


@dataclass(kw_only=True)
class KeepConfig(PluggedConfig, kind="reducer"):
    """A reducer with a budget.

    Args:
        keep: Tokens to keep of an image; a float in (0, 1) is a share of its tokens.
    """

    keep: int | float

    def __post_init__(self) -> None:
        whole, share = isinstance(self.keep, int) and self.keep >= 1, isinstance(self.keep, float) and 0 < self.keep < 1
        if not whole and not share:
            raise ValueError(
                f"keep must be a number of tokens (an int of 1 or more) or a share in (0, 1), got {self.keep!r}"
            )
        super().__post_init__()

    def check(self, tower: TowerFacts) -> None:
        if tower.image_tokens is not None and self.keep > tower.image_tokens:
            raise ValueError(f"keep must be in 1..{tower.image_tokens}, the visual tokens of an image, got {self.keep}")

    def count(self, n: int) -> int:
        """Tokens to keep of n: at least 1, at most n."""
        return max(1, min(n, round(self.keep * n) if isinstance(self.keep, float) else self.keep))


def coarse_grid(grid: tuple[int, int], most: int, *, distortion: float = 4 / 3) -> tuple[int, int]:
    """The (h, w) with the most cells, at most ``most``, and an aspect within ``distortion`` of the (H, W) grid's.

    Where no such grid exists (a grid far from square and a handful of cells), the least distorted one.
    """
    height, width = grid
    fits = []
    for h in range(1, min(height, most) + 1):
        widest = min(width, most // h)
        for w in {widest, min(widest, max(1, h * width // height)), min(widest, -(-h * width // height))}:
            fits.append((abs(math.log(w * height / (h * width))), -h * w, h, w))
    near = [fit for fit in fits if fit[0] <= math.log(distortion) + 1e-9]
    return min(near, key=lambda fit: (fit[1], fit))[2:] if near else min(fits)[2:]
