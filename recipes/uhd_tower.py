"""Go on from a checkpoint with its tower as a ViT-UHD: finer patches, and mergers on the way.

Paper: LLaVA-UHD v3, arXiv 2511.21150. Projector and language model stay as they are; all is to be trained further.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

import mllm_vision as mv
from mllm_vision.host import adapter_for, adapter_of_type
from mllm_vision.settings import Settings
from mllm_vision.towers import ViTUHDImageProcessor, ViTUHDModel, ViTUHDProcessor


@dataclass(kw_only=True)
class UHDTowerSpec(Settings):
    """A checkpoint and what becomes of its tower.

    Args:
        base: A folder, a hub id, or "tiny-llava-scenes".
        patch_size: Side of the new patches in pixels.
        merger_layers: As in `ViTUHDConfig`.
        merger: As in `ViTUHDConfig`.
    """

    base: str
    patch_size: int
    merger_layers: list[int]
    merger: str = "adaptive"


def with_uhd_tower(spec: UHDTowerSpec, side: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model and a processor that fits it.

    Args:
        side: Of the pictures to come, in pixels: the table of positions gets an entry for each of their patches, and
            smaller pictures are enlarged to as many pixels.

    Raises:
        ValueError: a host or a tower that cannot be converted, or a side that patches and mergers do not divide.
    """
    model, processor = mv.load(spec.base)
    family = adapter_of_type(model.config.model_type)
    tower = ViTUHDModel.from_vit(
        family.tower(model),
        patch_size=spec.patch_size,
        merger_layers=spec.merger_layers,
        merger=spec.merger,
        position_grid=(side // spec.patch_size,) * 2,
    )
    if side % tower.config.token_size:
        raise ValueError(
            f"side must be a multiple of {tower.config.token_size} pixels ({spec.patch_size} for a patch, 2 for each "
            f"merger), got {side}"
        )
    model.set_submodule(family.tower_name, tower)
    model.config.vision_config = tower.config
    model.config.image_seq_length = (side // tower.config.token_size) ** 2
    model.config.vision_feature_select_strategy = "full"  # there is no CLS token to leave out
    adapter = adapter_for(model.config)
    if adapter is family:
        raise ValueError(f"{family.model_name} of {spec.base} cannot take a tower for pictures of any size")
    adapter.facts(model.config)  # refuses what the host cannot do with these mergers
    stock: Any = processor.image_processor
    image_processor = ViTUHDImageProcessor.for_tower(
        tower.config,
        min_pixels=side**2,
        max_pixels=2 * side**2,
        image_mean=stock.image_mean,
        image_std=stock.image_std,
    )
    return model, ViTUHDProcessor(image_processor, processor.tokenizer, chat_template=processor.chat_template)
