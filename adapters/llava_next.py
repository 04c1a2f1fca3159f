"""LLaVA-NeXT: an image as a base tile and a mosaic of tiles, unpadded, with a newline token after each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm_vision.adapters.llava import LlavaAdapter, feature_layers, keeps_cls, patch_maps, resize_tiles, tile_grid
from mllm_vision.host import Adapter, Encoded, Layout, NoProjector, images_by_grid, seeded_noise
from mllm_vision.operations import TowerFacts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class LlavaNextAdapter(LlavaAdapter):
    model_type = "llava_next"
    config_name = "LlavaNextConfig"
    model_name = "LlavaNextForConditionalGeneration"

    def on_tower(self, config: PreTrainedConfig) -> Adapter:
        return self  # its towers see tiles

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
        packs = not isinstance(self.projector(model), NoProjector)  # newline tokens are as wide as projected ones
        if packs and list(grids) == [layout.grid for layout in layouts]:
            seen = model.model.get_image_features(return_dict=True, **images)
            maps = patch_maps(seen.hidden_states, layouts[0].grid, model.config, images)
            by_image = zip(seen.pooler_output, layouts, maps.split([layout.tiles for layout in layouts]), strict=True)
            return [Encoded(*unpacked(packed, layout), tiles) for packed, layout, tiles in by_image]
        projected, resized = self._encode_resized(model, images, grids)
        newline = model.model.image_newline
        return [
            Encoded(tokens.flatten(0, 1), newline.expand(int((layout.patch < 0).sum()), -1), tiles)
            for tokens, tiles, layout in zip(projected, resized, layouts, strict=True)
        ]

    def _encode_resized(
        self, model: PreTrainedModel, images: dict[str, Any], grids: Sequence[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Tower and projector over tiles of any grid, (T_i, H_i * W_i, D) each, and the maps between the two, C wide.

        The stock method packs full grids only, and needs a projector of its own.
        """
        core, config = model.model, model.config
        pixels, counts = images["pixel_values"], tile_counts(config, images)
        tiles = (
            [image[:n] for image, n in zip(pixels, counts, strict=True)] if pixels.dim() == 5 else pixels.split(counts)
        )
        projected: dict[int, Tensor] = {}
        maps: dict[int, Tensor] = {}
        for grid, members in images_by_grid(grids).items():
            batch = resize_tiles(torch.cat([tiles[i] for i in members]), grid, config.vision_config.patch_size)
            layers = feature_layers(config, images)
            states = core.vision_tower(
                batch, interpolate_pos_encoding=True, output_hidden_states=layers, return_dict=True
            ).hidden_states
            seen, sizes = patch_maps(states, grid, config, images), [counts[i] for i in members]
            maps |= zip(members, seen.split(sizes), strict=True)
            projected |= zip(members, core.multi_modal_projector(seen).split(sizes), strict=True)
        return [projected[i] for i in range(len(grids))], [maps[i] for i in range(len(grids))]

    def by_patch(
        self, model: PreTrainedModel, heard: list[Tensor], images: dict[str, Any], grids: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        counts = tile_counts(model.config, images)
        evidence: dict[int, Tensor] = {}
        for tiles, (grid, members) in zip(heard, images_by_grid(grids).items(), strict=True):
            patches = tiles[:, -grid[0] * grid[1] :].split([counts[i] for i in members])
            evidence |= zip(members, patches, strict=True)
        return [evidence[i].flatten() for i in range(len(grids))]

    def noise(self, model: PreTrainedModel, images: dict[str, Any], seed: int) -> Tensor:
        pixels, counts = images["pixel_values"], tile_counts(model.config, images)
        drawn = [seeded_noise((tiles, *pixels.shape[-3:]), seed) for tiles in counts]
        if pixels.dim() == 4:
            return torch.cat(drawn)
        noise = torch.zeros(pixels.shape)  # rows of fewer tiles than the largest are padded
        for row, tiles in zip(noise, drawn, strict=True):
            row[: len(tiles)] = tiles
        return noise


def tile_counts(config: PreTrainedConfig, images: dict[str, Any]) -> list[int]:
    """T of each image, the base tile included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches  # loads the whole model

    size = config.vision_config.image_size
    return [image_size_to_num_patches(s, config.image_grid_pinpoints, size) for s in images["image_sizes"]]


def unpacked(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The tokens of one image out of the host's packing (S, D): on patches (P, D) and others (F, D)."""
    on = (layout.patch >= 0).to(packed.device)
    on_patches = packed.new_zeros(len(layout.place), packed.shape[-1])
    return on_patches.index_copy(0, layout.patch.to(packed.device)[on], packed[on]), packed[~on]


ADAPTER = LlavaNextAdapter()
