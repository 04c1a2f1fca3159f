"""LLaVA-1.5 and all of its class: a ViT (CLIP, SigLIP, DINOv2, ViT-UHD), an MLP, a causal language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mllm_vision.host import Adapter, Encoded, Layout, seeded_noise
from mllm_vision.operations import TowerFacts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

OBJECT_DEPTH = 9 / 24
"""Share of the tower's depth at which attention is on objects: the 9th of CLIP-L's 24 layers (HiPrune, section 3)."""

TOWERS_HAVE_CLS = {"clip_vision_model": True, "siglip_vision_model": False, "dinov2": True}
CLS_GOES_THROUGH = "the CLS token goes through it, too; set vision_feature_select_strategy to 'default'"
TOWER_LAYERS = ("encoder.layers", "encoder.layer", "layers")
"""What the towers call the list of their layers."""
BEHIND_LAYERS = ("post_layernorm", "layernorm", "head")
"""What makes something of a tower's last layer that the host, which takes hidden states, never asks for."""
PACKING_TOWER = "vit_uhd"
"""Sees images of any size as one pack of patches (L, 3, p, p); the others see tiles of one size (B, 3, H, W)."""


class LlavaAdapter(Adapter):
    model_type = "llava"
    config_name = "LlavaConfig"
    model_name = "LlavaForConditionalGeneration"
    image_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
    tower_name = "model.vision_tower"
    projector_name = "model.multi_modal_projector"

    def on_tower(self, config: PreTrainedConfig) -> Adapter:
        return PACKED if config.vision_config.model_type == PACKING_TOWER else self

    def facts(self, config: PreTrainedConfig) -> TowerFacts:
        vision, cls = config.vision_config, has_cls(config)
        height, width = tile_grid(config)
        return TowerFacts(
            depth=vision.num_hidden_layers,
            has_cls=cls,
            object_layer=max(0, round(OBJECT_DEPTH * vision.num_hidden_layers) - 1),
            deep_layer=max(-2, -vision.num_hidden_layers),
            width=vision.hidden_size * len(feature_layers(config, {})),
            out=config.text_config.hidden_size,
            grid=(height, width),
            image_tokens=height * width,
            fixed_projector=CLS_GOES_THROUGH if keeps_cls(config, {}) else None,
        )

    def idle(self, config: PreTrainedConfig) -> tuple[str, ...]:
        depth = config.vision_config.num_hidden_layers
        taken = max(layer % (depth + 1) for layer in feature_layers(config, {}))
        behind = [f"{name}.{i}" for name in TOWER_LAYERS for i in range(taken, depth)]
        return tuple(f"{self.tower_name}.{name}" for name in (*behind, *BEHIND_LAYERS))

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


class PackedLlavaAdapter(LlavaAdapter):
    """The same host around a tower that sees a pack: every image has a grid of its own, in tokens of the tower."""

    def facts(self, config: PreTrainedConfig) -> TowerFacts:
        vision = config.vision_config
        if config.vision_feature_select_strategy != "full":
            raise ValueError(
                f"a {vision.model_type} tower has no CLS token for vision_feature_select_strategy='default' to leave "
                "out; set it to 'full'"
            )
        depth, last_merger = vision.num_hidden_layers, max(vision.merger_layers, default=-1)
        for layer in feature_layers(config, {}):
            if not last_merger < layer % (depth + 1):
                raise ValueError(
                    f"vision_feature_layer {layer} is ahead of the merger behind layer {last_merger}, on a finer grid "
                    "than the tokens that come out; take a later one, such as -1"
                )
        return TowerFacts(
            depth=depth,
            has_cls=False,
            object_layer=max(0, round(OBJECT_DEPTH * depth) - 1),
            deep_layer=max(-2, -depth),
            width=vision.hidden_size * len(feature_layers(config, {})),
            out=config.text_config.hidden_size,
        )

    def layouts(self, model: PreTrainedModel, images: dict[str, Any]) -> list[Layout]:
        if "image_sizes" not in images:
            raise ValueError("image_sizes is missing; pass all that the processor of this model returns")
        side = model.config.vision_config.token_size
        sizes = torch.as_tensor(images["image_sizes"]).tolist()
        grids = [(height // side, width // side) for height, width in sizes]
        return [Layout((h, w), 1, torch.arange(h * w)) for h, w in grids]

    def encode(
        self,
        model: PreTrainedModel,
        images: dict[str, Any],
        layouts: Sequence[Layout],
        grids: Sequence[tuple[int, int]],
    ) -> list[Encoded]:
        vision, options = model.config.vision_config, dict(images)
        if list(grids) != [layout.grid for layout in layouts]:
            patches = images["pixel_values"].split([h * w for h, w in self._patch_grids(model, layouts)])
            smaller = [tuple(side * vision.merge_size for side in grid) for grid in grids]
            per_image = zip(patches, self._patch_grids(model, layouts), smaller, strict=True)
            options["pixel_values"] = torch.cat([resize_patches(*image) for image in per_image])
            options["image_sizes"] = torch.tensor(smaller) * vision.patch_size
        seen = model.model.get_image_features(return_dict=True, **options)
        counts = [h * w for h, w in grids]
        maps = [seen.hidden_states[layer][0].split(counts) for layer in feature_layers(model.config, images)]
        by_image = zip(seen.pooler_output, *maps, strict=True)
        return [Encoded(tokens, tokens[:0], torch.cat(layers, dim=-1)[None]) for tokens, *layers in by_image]

    def by_patch(
        self, model: PreTrainedModel, heard: list[Tensor], images: dict[str, Any], grids: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        # Ahead of a merger an image has more tokens: the tokens of a window are one of the coarse grid.
        evidence = []
        for tokens, (h, w) in zip(heard, grids, strict=True):
            step = math.isqrt(tokens.shape[-1] // (h * w))
            evidence.append(tokens.view(h, step, w, step).mean((1, 3)).flatten())
        return evidence

    def noise(self, model: PreTrainedModel, images: dict[str, Any], seed: int) -> Tensor:
        shape, grids = images["pixel_values"].shape[1:], self._patch_grids(model, self.layouts(model, images))
        return torch.cat([seeded_noise((h * w, *shape), seed) for h, w in grids])

    def _patch_grids(self, model: PreTrainedModel, layouts: Sequence[Layout]) -> list[tuple[int, int]]:
        merge = model.config.vision_config.merge_size
        return [(layout.grid[0] * merge, layout.grid[1] * merge) for layout in layouts]


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
    if tower == "dinov2_with_registers":
        raise ValueError(
            f"vision tower {tower!r} is not supported: the stock host would put its register tokens, which are on no "
            "patch, into the prompt; take a DINOv2 without registers"
        )
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


def resize_patches(patches: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The patches (h * w, 3, p, p) of one image, row-major, down-sampled from grid ``old`` to ``new``."""
    side = patches.shape[-1]
    image = patches.unflatten(0, old).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)  # (3, H, W)
    size = (new[0] * side, new[1] * side)
    image = interpolate(image[None].float(), size=size, mode="bicubic", antialias=True)[0].to(patches.dtype)
    return image.view(3, new[0], side, new[1], side).permute(1, 3, 0, 2, 4).flatten(0, 1)


PACKED = PackedLlavaAdapter()
ADAPTER = LlavaAdapter()
