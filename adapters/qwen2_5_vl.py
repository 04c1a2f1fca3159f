"""Qwen2.5-VL: images of any size, windowed attention, a 2x2 merger, positions in three dimensions (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.vision_utils import get_vision_window_index

from mllm_vision.host import Adapter, Encoded, Layout, seeded_noise
from mllm_vision.operations import TowerFacts

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

OBJECT_DEPTH = 16 / 32
"""Share of the tower's depth at which attention is on objects: the 16th of 32 layers (HiPrune's code)."""


class Qwen25VLAdapter(Adapter):
    model_type = "qwen2_5_vl"
    config_name = "Qwen2_5_VLConfig"
    model_name = "Qwen2_5_VLForConditionalGeneration"
    image_inputs = ("pixel_values", "image_grid_thw")
    tower_name = "model.visual"
    projector_name = "model.visual.merger"
    keeps_positions = True

    def load_processor(self, source: str | Path, **hub: Any) -> ProcessorMixin:
        from transformers import Qwen2_5_VLProcessor
        from transformers.utils import is_torchvision_available

        if is_torchvision_available():
            return super().load_processor(source, **hub)

        class ForImages(Qwen2_5_VLProcessor):
            """The stock processor without its video processor, which is all that needs torchvision."""

            def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
                super().__init__(image_processor, tokenizer, chat_template=chat_template)

        ForImages.__name__ = Qwen2_5_VLProcessor.__name__  # saved under the stock name
        return ForImages.from_pretrained(source, **hub)

    def facts(self, config: PreTrainedConfig) -> TowerFacts:
        depth = config.vision_config.depth
        return TowerFacts(
            depth=depth,
            has_cls=False,
            object_layer=max(0, round(OBJECT_DEPTH * depth) - 1),
            deep_layer=-1,
            width=config.vision_config.out_hidden_size,
            out=config.text_config.hidden_size,
            fixed_projector="it is a part of the tower, a patch merger already",
        )

    def layouts(self, model: PreTrainedModel, images: dict[str, Any]) -> list[Layout]:
        merge = model.config.vision_config.spatial_merge_size
        grids = [(h // merge, w // merge) for _, h, w in images["image_grid_thw"].tolist()]
        return [Layout((h, w), 1, torch.arange(h * w)) for h, w in grids]

    def encode(
        self,
        model: PreTrainedModel,
        images: dict[str, Any],
        layouts: Sequence[Layout],
        grids: Sequence[tuple[int, int]],
    ) -> list[Encoded]:
        pixels, grid_thw = images["pixel_values"], images["image_grid_thw"]
        if list(grids) != [layout.grid for layout in layouts]:
            smaller = patch_grids(model.config, grids, grid_thw)
            per_image = zip(pixels.split(grid_thw.prod(-1).tolist()), grid_thw.tolist(), smaller.tolist(), strict=True)
            pixels = torch.cat([resize_patches(p, old, new, model.config.vision_config) for p, old, new in per_image])
            grid_thw = smaller
        features = model.model.get_image_features(pixels, grid_thw, return_dict=True).pooler_output
        # The merger, which is the projector, takes patches in the order of windows: the map is what it makes of them.
        return [Encoded(image, image[:0], image[None]) for image in features]

    def by_patch(
        self, model: PreTrainedModel, heard: list[Tensor], images: dict[str, Any], grids: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        vision = model.config.vision_config
        grid_thw = patch_grids(model.config, grids, images["image_grid_thw"])
        window_index, _ = get_vision_window_index(
            grid_thw,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        in_windows = torch.cat(heard, dim=-1).view(-1, vision.spatial_merge_size**2).mean(1)  # by merged token
        in_order = in_windows[window_index.argsort().to(in_windows.device)]
        return list(in_order.split([h * w for h, w in grids]))

    def noise(self, model: PreTrainedModel, images: dict[str, Any], seed: int) -> Tensor:
        vision = model.config.vision_config
        frames, area = vision.temporal_patch_size, vision.patch_size**2
        counts = images["image_grid_thw"].prod(-1).tolist()
        still = torch.cat([seeded_noise((n, vision.in_channels, 1, area), seed) for n in counts])
        return still.expand(-1, -1, frames, -1).flatten(1)  # an image is the same in each of its frames

    def positions(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor | None:
        ids = inputs["input_ids"]
        types = inputs.get("mm_token_type_ids")
        if types is None:
            types = (ids == model.config.image_token_id).int()
        positions, _ = model.model.get_rope_index(
            ids, types, image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs.get("attention_mask")
        )
        return positions

    def after_fit(self, model: PreTrainedModel, inputs: dict[str, Any], *, generating: bool) -> None:
        positions, mask = inputs["position_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        # The offset that later tokens add to their place in the fitted prompt, as the stock model keeps it.
        last = positions.amax(0).masked_fill(mask == 0, 0).amax(1)
        model.model.rope_deltas = (last + 1 - mask.sum(1))[:, None]
        if generating:  # `generate` expects a row of plain text positions above the three
            text = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 0)
            inputs["position_ids"] = torch.cat([text[None], positions])


def patch_grids(config: PreTrainedConfig, grids: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """(images, 3): the tower's grids (1, h, w) in patches, from grids in merged tokens."""
    merge = config.vision_config.spatial_merge_size
    return torch.tensor([(1, h * merge, w * merge) for h, w in grids], dtype=like.dtype, device=like.device)


def resize_patches(patches: Tensor, old: Sequence[int], new: Sequence[int], vision: PreTrainedConfig) -> Tensor:
    """The processor's patches of one image, (h * w, 3 * frames * p * p), down-sampled from grid ``old`` to ``new``."""
    frames, merge, side = vision.temporal_patch_size, vision.spatial_merge_size, vision.patch_size
    (_, h, w), (_, new_h, new_w) = old, new
    # Patches lie in blocks of merge x merge, each as (channel, frame, row, column).
    blocks = patches.view(h // merge, w // merge, merge, merge, -1, frames, side, side)
    image = blocks.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(frames, -1, h * side, w * side)
    size = (new_h * side, new_w * side)
    image = interpolate(image.float(), size=size, mode="bicubic", antialias=True).to(patches.dtype)
    tiled = image.view(frames, -1, new_h // merge, merge, side, new_w // merge, merge, side)
    return tiled.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(new_h * new_w, -1)


ADAPTER = Qwen25VLAdapter()
