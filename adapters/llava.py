"""LLaVA-1.5 and every checkpoint of its class: a ViT (CLIP, SigLIP), an MLP, a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mllm_vision.host import Adapter, Encoded, Layout, seeded_noise
from mllm_vision.operations import TowerFacts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

OBJECT_DEPTH = 9 / 24
"""Share of the tower's depth at which attention is on objects: the 9th of CLIP-L's 24 layers (HiPrune, section 3)."""

TOWERS_HAVE_CLS = {"clip_vision_model": True, "siglip_vision_model": False}


class LlavaAdapter(Adapter):
    model_type = "llava"
    config_name = "LlavaConfig"
    model_name = "LlavaForConditionalGeneration"
    image_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def facts(self, config: PreTrainedConfig) -> TowerFacts:
        vision = config.vision_config
        height, width = tile_grid(config)
        return TowerFacts(
            depth=vision.num_hidden_layers,
            has_cls=has_cls(config),
            object_layer=max(0, round(OBJECT_DEPTH * vision.num_hidden_layers) - 1),
            deep_layer=max(-2, -vision.num_hidden_layers),
            width=vision.hidden_size * len(feature_layers(config, {})),
            out=config.text_config.hidden_size,
            grid=(height, width),
            image_tokens=height * width,
        )

    def tower(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.model.vision_tower

    def projector(self, model: PreTrainedModel) -> nn.Module:
        return model.model.multi_modal_projector

    def layouts(self, model: PreTrainedModel, images: dict[str, Any]) -> list[Layout]:
        height, width = tile_grid(model.config)
        patch = torch.arange(height * width)
        if keeps_cls(model.config, images):
            patch = torch.cat([torch.tensor([-1]), patch])
        return [Layout((height, width), 1, patch)] * len(images["pixel_values"])

    def encode(
        self,
        model: PreTrainedModel,
        images: dict[str, Any],
        layouts: Sequence[Layout],
        grids: Sequence[tuple[int, int]],
    ) -> list[Encoded]:
        pixels, options = images["pixel_values"], {k: v for k, v in images.items() if k != "pixel_values"}
        if grids[0] != layouts[0].grid:
            pixels = resize_tiles(pixels, grids[0], model.config.vision_config.patch_size)
            options["interpolate_pos_encoding"] = True
        seen = model.model.get_image_features(pixel_values=pixels, return_dict=True, **options)
        maps = patch_maps(seen.hidden_states, grids[0], model.config, images)
        first = int(keeps_cls(model.config, images))
        by_image = zip(seen.pooler_output, maps, strict=True)
        return [Encoded(tokens[first:], tokens[:first], patches[None]) for tokens, patches in by_image]

    def by_patch(
        self, model: PreTrainedModel, heard: list[Tensor], images: dict[str, Any], grids: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        (tiles,) = heard
        return list(tiles[:, -grids[0][0] * grids[0][1] :])

    def noise(self, model: PreTrainedModel, images: dict[str, Any], seed: int) -> Tensor:
        pixels = images["pixel_values"]
        return seeded_noise(pixels.shape[1:], seed).expand(pixels.shape)


def tile_grid(config: PreTrainedConfig) -> tuple[int, int]:
    """(H, W), patches of one pass through the tower."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side


def has_cls(config: PreTrainedConfig) -> bool:
    """Whether the tower puts a CLS token before the patches.

    Raises:
        ValueError: a tower that this adapter does not know.
    """
    tower = config.vision_config.model_type
    if tower not in TOWERS_HAVE_CLS:
        raise ValueError(f"vision tower {tower!r} is not supported; supported are {', '.join(TOWERS_HAVE_CLS)}")
    return TOWERS_HAVE_CLS[tower]


def keeps_cls(config: PreTrainedConfig, images: dict[str, Any]) -> bool:
    """Whether the CLS token is among the visual tokens."""
    strategy = images.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    return strategy == "full" and has_cls(config)


def feature_layers(config: PreTrainedConfig, images: dict[str, Any]) -> list[int]:
    """Indices of the tower's hidden states that the projector takes, side by side."""
    layers = images.get("vision_feature_layer")
    layers = config.vision_feature_layer if layers is None else layers
    return [layers] if isinstance(layers, int) else list(layers)


def patch_maps(
    states: Sequence[Tensor], grid: tuple[int, int], config: PreTrainedConfig, images: dict[str, Any]
) -> Tensor:
    """What the projector takes of the tower's hidden ``states``, (tiles, H * W, C), without CLS."""
    chosen = [states[layer][:, -grid[0] * grid[1] :] for layer in feature_layers(config, images)]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)


def resize_tiles(pixels: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Tiles (B, 3, H, W), down-sampled to ``grid`` patches."""
    size = (grid[0] * patch_size, grid[1] * patch_size)
    return interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).to(pixels.dtype)


ADAPTER = LlavaAdapter()
