"""Settings of a ViT-UHD."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedConfig

__all__ = ["ViTUHDConfig"]

MERGERS = ("average", "adaptive")
ROTARY_UNITS = ("patches", "tokens")


class ViTUHDConfig(PreTrainedConfig):
    """Settings of a ViT-UHD; the default sizes are those of LLaVA-UHD v3's tower, which came from MoonViT-SO-400M.

    Args:
        patch_size: Side of a patch in pixels.
        position_grid: Rows and columns of the learned table of positions, resampled to the grid of every image.
        merger_layers: Layers, counted from 0 and rising, after each of which every 2 x 2 tokens become one.
        merger: "average" of the four tokens, or "adaptive", a mean with a weight for each of them in each channel.
        rotary_theta: Base of the 2-D rotary angles; None for a tower that has learned positions only.
        rotary_units: What the angles count, once tokens are merged: "patches" keeps a patch's distance to every other
            as the steps between tokens grow to 2, 4, ...; "tokens" counts the tokens of the coarser grid, so that
            distances shrink, as the authors' code does.
        pre_norm: Whether the embeddings are normalised before the first layer.
        post_norm: Whether the tokens are normalised after the last layer.

    Raises:
        ValueError: a value that no tower can have.
    """

    model_type = "vit_uhd"
    base_config_key = "vision_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    patch_size: int = 10
    position_grid: tuple[int, ...] | list[int] = (64, 64)
    merger_layers: tuple[int, ...] | list[int] = (4, 18)
    merger: str = "adaptive"
    rotary_theta: float | None = 10000.0
    rotary_units: str = "patches"
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-5
    pre_norm: bool = False
    post_norm: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.position_grid, self.merger_layers = tuple(self.position_grid), tuple(self.merger_layers)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.rotary_theta is not None and self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(
                "2-D rotary positions need heads of a multiple of 4 channels, got "
                f"{self.hidden_size // self.num_attention_heads}; set rotary_theta to None to go without"
            )
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be 1 or more, got {self.patch_size}")
        if len(self.position_grid) != 2 or min(self.position_grid) < 1:
            raise ValueError(f"position_grid must be rows and columns, 1 or more each, got {self.position_grid}")
        layers = range(self.num_hidden_layers)
        if list(self.merger_layers) != sorted({layer for layer in self.merger_layers if layer in layers}):
            raise ValueError(
                f"merger_layers must rise and be in 0..{self.num_hidden_layers - 1}, got {self.merger_layers}"
            )
        for name, valid in (("merger", MERGERS), ("rotary_units", ROTARY_UNITS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}")
        _register_model()

    @property
    def merge_size(self) -> int:
        """Patches along a side of the square that becomes one token of the output."""
        return 1 << len(self.merger_layers)

    @property
    def token_size(self) -> int:
        """Side in pixels of the square that becomes one token of the output."""
        return self.patch_size * self.merge_size


@functools.cache
def _register_model() -> None:
    from transformers import AutoModel

    from mllm_vision.towers.vit_uhd.modeling import ViTUHDModel

    AutoModel.register(ViTUHDConfig, ViTUHDModel, exist_ok=True)
