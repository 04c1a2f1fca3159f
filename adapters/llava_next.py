"""LLaVA-NeXT: an image as a base tile and a mosaic of tiles, unpadded, with a newline token after each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm_vision.adapters.llava import LlavaAdapter, keeps_cls, resize_tiles, tile_grid
from mllm_vision.host import Encoded, Layout
from mllm_vision.operations import TowerFacts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class LlavaNextAdapter(LlavaAdapter):
    model_type = "llava_next"
    config_name = "LlavaNextConfig"
    model_name = "LlavaNextForConditionalGeneration"

    def facts(self, config: PreTrainedConfig) -> TowerFacts:
        return replace(super().facts(config), image_tokens=None)  # the number of tiles depends on the image

    def layouts(self, model: PreTrainedModel, images: dict[str, Any]) -> list[Layout]:
        if keeps_cls(model.config, images):
            raise ValueError(
                "vision_feature_select_strategy='full' with a CLS token leaves no grid to unpad; use 'default'"
            )
        grid = tile_grid(model.config)
        layouts = []
        for tiles, size in zip(tile_counts(model.config, images), images["image_sizes"], strict=True):
            # The host's own packing, shown the number of each patch instead of its token, tells where every patch goes.
            numbers = torch.arange(tiles * grid[0] * grid[1], dtype=torch.float32).view(tiles, -1, 1)
            (packed,), _ = model.model.pack_image_features([numbers], [size], "default", torch.tensor([-1.0]))
            layouts.append(Layout(grid, tiles, packed.squeeze(-1).long()))
        return layouts

    def encode(
        self,
        model: PreTrainedModel,
        images: dict[str, Any],
        layouts: Sequence[Layout],
        grids: Sequence[tuple[int, int]],
    ) -> list[Encoded]:
        if list(grids) == [layout.grid for layout in layouts]:
            packed = model.model.get_image_features(return_dict=True, **images).pooler_output
            return [unpacked(image, layout) for image, layout in zip(packed, layouts, strict=True)]
        return [
            Encoded(on_patches, model.model.image_newline.expand(int((layout.patch < 0).sum()), -1))
            for on_patches, layout in zip(self._encode_resized(model, images, grids), layouts, strict=True)
        ]

    def _encode_resized(
        self, model: PreTrainedModel, images: dict[str, Any], grids: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Tower and projector over tiles of any grid, (P_i, D) each; the stock method packs full grids only."""
        core, config = model.model, model.config
        layers = images.get("vision_feature_layer") or config.vision_feature_layer
        pixels, counts = images["pixel_values"], tile_counts(config, images)
        tiles = (
            [image[:n] for image, n in zip(pixels, counts, strict=True)] if pixels.dim() == 5 else pixels.split(counts)
        )
        features: dict[int, Tensor] = {}
        for grid, members in images_by_grid(grids).items():
            batch = resize_tiles(torch.cat([tiles[i] for i in members]), grid, config.vision_config.patch_size)
            states = core.vision_tower(
                batch, interpolate_pos_encoding=True, output_hidden_states=layers, return_dict=True
            ).hidden_states
            chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
            projected = core.multi_modal_projector(torch.cat(chosen, dim=-1)[:, -grid[0] * grid[1] :])
            features |= zip(members, projected.split([counts[i] for i in members]), strict=True)
        return [features[i].flatten(0, 1) for i in range(len(grids))]

    def by_patch(
        self, model: PreTrainedModel, heard: list[Tensor], images: dict[str, Any], grids: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        counts = tile_counts(model.config, images)
        evidence: dict[int, Tensor] = {}
        for tiles, (grid, members) in zip(heard, images_by_grid(grids).items(), strict=True):
            patches = tiles[:, -grid[0] * grid[1] :].split([counts[i] for i in members])
            evidence |= zip(members, patches, strict=True)
        return [evidence[i].flatten() for i in range(len(grids))]


def images_by_grid(grids: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """The images that go through the tower together: those that are seen on the same grid."""
    members: dict[tuple[int, int], list[int]] = {}
    for i, grid in enumerate(grids):
        members.setdefault(grid, []).append(i)
    return members


def tile_counts(config: PreTrainedConfig, images: dict[str, Any]) -> list[int]:
    """T of each image, the base tile included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches  # loads the whole model

    size = config.vision_config.image_size
    return [image_size_to_num_patches(s, config.image_grid_pinpoints, size) for s in images["image_sizes"]]


def unpacked(packed: Tensor, layout: Layout) -> Encoded:
    """The tokens of one image (S, D) out of the host's packing."""
    on = (layout.patch >= 0).to(packed.device)
    on_patches = packed.new_zeros(len(layout.place), packed.shape[-1])
    return Encoded(on_patches.index_copy(0, layout.patch.to(packed.device)[on], packed[on]), packed[~on])


ADAPTER = LlavaNextAdapter()
