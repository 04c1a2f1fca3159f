"""A model's inputs with the images encoded and the prompt fitted to them.

Shapes: B prompts of L columns before and M after fitting.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_vision.encoding import ImageTokens, image_inputs
from mllm_vision.host import adapter_for
from mllm_vision.placeholders import PAD_VALUES, fit_columns
from mllm_vision.slots import Slots


def fittable_images(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``inputs`` that describe images.

    Raises:
        ValueError: there are videos, too, or no ids, or embeddings in their place.
    """
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError("images and videos in one call are not supported with methods plugged in; split the call")
    given = [name for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None]
    if given != ["input_ids"]:
        raise ValueError(
            f"images need input_ids, whose placeholders are fitted to them, got {' and '.join(given) or 'none'}: "
            "pass the ids alone"
        )
    return image_inputs(model, inputs)


def fit_prompt(
    model: PreTrainedModel, slots: Slots, inputs: dict[str, Any], encoded: Sequence[ImageTokens], *, generating: bool
) -> dict[str, Any]:
    """``inputs`` with ``encoded`` in place of the images, and everything that runs along the prompt fitted to it.

    Raises:
        ValueError: the prompt holds more or fewer placeholders than the images need, or its mask is no (B, L).
    """
    adapter, ids, mask = adapter_for(model.config), inputs["input_ids"], inputs.get("attention_mask")
    if _has_room(model, slots, ids, encoded):
        encoded = [image.with_placeholders(slots.added) for image in encoded]
    fit = fit_columns(
        ids,
        mask if mask is None or mask.dim() == 2 else None,
        model.config.image_token_id,
        [i.placeholders for i in encoded],
        [i.slots for i in encoded],
        slots.added,
    )
    stays = fit.keeps(ids.shape[1])
    if mask is not None and mask.dim() != 2 and not stays:
        raise ValueError(
            "attention_mask must be (batch, length) where images have more or fewer tokens than placeholders, got "
            f"{tuple(mask.shape)}"
        )
    fitted = {name: value for name, value in inputs.items() if name not in adapter.image_inputs}
    if inputs.get("position_ids") is None:
        fitted["position_ids"] = adapter.positions(model, inputs)
    if mask is None and bool(fit.padded.any()):
        fitted["attention_mask"] = torch.ones_like(ids)
    for name, pad_value in _pad_values(model).items():
        if fitted.get(name) is not None and not stays:
            fitted[name] = fit.apply(fitted[name], pad_value)
    features = [image.features for image in encoded]
    fitted["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    adapter.after_fit(model, fitted, generating=generating)
    return fitted


def pad_left(model: PreTrainedModel, inputs: dict[str, Any], width: int) -> dict[str, Any]:
    """``inputs`` with all that runs along the prompt padded to ``width`` columns, and with a mask in any case."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    padded = {**inputs, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    for name, value in _pad_values(model).items():
        if isinstance(padded.get(name), Tensor):
            padded[name] = pad(padded[name], (width - ids.shape[1], 0), value=value)
    return padded


def _has_room(model: PreTrainedModel, slots: Slots, ids: Tensor, images: Sequence[ImageTokens]) -> bool:
    """Whether a processor wrote placeholders for the added tokens (with `num_additional_image_tokens` raised)."""
    if not slots.added:
        return False
    marked = pad(ids == model.config.image_token_id, (0, 1)).flatten()
    ends = marked.cumsum(0)[:-1][marked[:-1] & ~marked[1:]].tolist()  # of the runs of placeholders, counted through
    room = list(accumulate(image.placeholders + slots.added for image in images))
    return ends[-1:] == room[-1:] and set(ends) <= set(room)


def _pad_values(model: PreTrainedModel) -> dict[str, int]:
    known = (model.generation_config.pad_token_id, model.config.get_text_config().pad_token_id)
    return {"input_ids": next((i for i in known if i is not None), 0), **PAD_VALUES}
