"""Contrastive decoding: the prompt and a contrastive prompt go through the model together, one forward pass a step.

The stock sampling loop runs on the B prompts, unchanged. What it takes for the model doubles them inside each forward
pass: the contrastive prompts are B further rows of the same batch and the same cache, padded on the left, and are given
the tokens that the loop chose for their prompts. The contrast is the first of the loop's logits processors, so that all
others act after it.

Shapes: B prompts of L columns, V tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from mllm_vision.encoding import image_inputs, see_images
from mllm_vision.fitting import fit_prompt, fittable_images, pad_left
from mllm_vision.host import adapter_for, adapters
from mllm_vision.operations import Contrast, ContrastConfig
from mllm_vision.slots import Slots

log = logging.get_logger(__name__)


def contrasted(logits: Tensor, contrastive: Tensor, alpha: float, beta: float) -> Tensor:
    """(1 + alpha) * l - alpha * l_c, with tokens of l < log(beta) + max(l) at -inf; all (B, V)."""
    least = logits.amax(-1, keepdim=True) + (math.log(beta) if beta else -math.inf)
    return ((1 + alpha) * logits - alpha * contrastive).masked_fill(logits < least, -math.inf)


@dataclass(frozen=True)
class ContrastivePrompt:
    """What `generate` hands to the sampling loop beside the prompt.

    Args:
        config: Weights of the contrast.
        inputs: Of B contrastive prompts, as wide as the prompts.
        shown: (B,) bool, prompts with an image; the others are decoded plainly.
    """

    config: ContrastConfig
    inputs: dict[str, Any]
    shown: Tensor

    def sample(
        self, model: PreTrainedModel, input_ids: Tensor, *, logits_processor: LogitsProcessorList, **inputs: Any
    ) -> Any:
        """What the stock loop returns for prompts (B * copies, L) with `inputs`, decoded by contrast."""
        copies = len(input_ids) // len(self.shown)
        ids, contrastive = model._expand_inputs_for_generation(copies, **self.inputs)
        contrast = _Subtract(self.config, self.shown.repeat_interleave(copies))
        out = GenerationMixin._sample(
            _BothPrompts(model, ids, contrast),
            input_ids,
            logits_processor=LogitsProcessorList([contrast, *logits_processor]),
            **_both(input_ids, inputs, contrastive),
        )
        # The cache holds both prompts, which no later call would expect.
        return out if isinstance(out, Tensor) else replace(out, past_key_values=None)


def with_contrast(
    model: PreTrainedModel, slots: Slots, contrast: Contrast, inputs: dict[str, Any], *, width: int = 0
) -> tuple[dict[str, Any], ContrastivePrompt]:
    """``inputs`` fitted to their images, and the contrastive prompt, both of the same width and at least ``width``.

    The images are encoded once.
    """
    seen = see_images(model, slots, fittable_images(model, inputs), contrast.requests)
    # The contrastive prompt first: what a host remembers of a prompt shall be of the other one.
    contrastive = fit_prompt(model, slots, inputs, contrast(seen), generating=True)
    fitted = fit_prompt(model, slots, inputs, seen.reduced(), generating=True)
    width = max(width, *(prompt["input_ids"].shape[1] for prompt in (fitted, contrastive)))
    if (
        fitted["input_ids"].shape[1] < width
    ):  # of few kept tokens and many outliers, or more padding than fitting leaves
        fitted = pad_left(model, fitted, width)
    along = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "token_type_ids", "mm_encoder_outputs")
    contrastive = {name: value for name, value in pad_left(model, contrastive, width).items() if name in along}
    shown = (fitted["input_ids"] == model.config.image_token_id).any(1)
    if not shown.all():
        say_decoded_plainly(contrast.config)
    return fitted, ContrastivePrompt(contrast.config, contrastive, shown)


def require_sampling_loop(
    config: ContrastConfig,
    generation: GenerationConfig,
    *,
    assistant_model: PreTrainedModel | None = None,
    past_key_values: Cache | None = None,
) -> None:
    """Raise ValueError where `generate` was asked for another loop, or for a cache that does not hold both prompts."""
    mode = generation.get_generation_mode(assistant_model)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or generation.cache_implementation == "paged":
        asked = "paged caches" if generation.cache_implementation == "paged" else mode.value.replace("_", " ")
        raise ValueError(
            f"{config.type} decodes by greedy search or sampling, got {asked}: use num_beams=1, no assistant and no "
            "paged cache, or take the decoding out"
        )
    if past_key_values is not None:
        raise ValueError(
            f"{config.type} keeps a cache of its own, which holds the contrastive prompt, too, got past_key_values: "
            "leave it out and pass the whole conversation"
        )
    if generation.prefill_chunk_size is not None and generation.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"{config.type} cannot fill a {generation.cache_implementation} cache in chunks, whose size is fixed "
            "before; leave out prefill_chunk_size or cache_implementation"
        )


def say_decoded_plainly(config: ContrastConfig) -> None:
    """Say, once, that prompts without an image leave nothing to contrast with."""
    log.warning_once(f"{config.type}: prompts without an image are decoded plainly")


class OneCall:
    """A decoding strategy for one call: ``model.generate(**inputs, custom_generate=strategy)``.

    On a model without slots, transformers keeps `streamer`, `tokenizer` and `assistant_model` from every custom
    decoding: to stream, or to stop at strings, plug in slots by `apply(model)`, which changes nothing else.
    """

    def __init__(self, config: ContrastConfig):
        self.config = config
        # Stock `generate` hands to a decoding of its own what this signature names. Were the images not among it, they
        # would be encoded before we are called, and without the tap.
        names = dict.fromkeys(name for adapter in adapters().values() for name in adapter.image_inputs)
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = list(inspect.signature(type(self).__call__).parameters.values())[1:]
        images = [inspect.Parameter(name, keyword, default=None) for name in names]
        self.__signature__ = inspect.Signature([*own[:-1], *images, own[-1]])

    def contrast(self, model: PreTrainedModel) -> Contrast:
        """The strategy, built for this model.

        Raises:
            ValueError: the host cannot give what it needs.
        """
        facts = adapter_for(model.config).facts(model.config)
        self.config.check(facts)
        return self.config.build(facts)

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, **inputs: Any
    ) -> Any:
        """What stock `generate` calls with its inputs prepared, on a model without slots."""
        images = image_inputs(model, inputs)
        inputs = {name: value for name, value in inputs.items() if name not in adapter_for(model.config).image_inputs}
        loop = {"input_ids": input_ids, "generation_config": generation_config, **inputs}
        cache = inputs.get("past_key_values")  # by now there is one in any case
        given = cache if images and getattr(cache, "_is_user_defined", False) else None
        require_sampling_loop(self.config, generation_config, past_key_values=given)
        if adapter_for(model.config).image_inputs[0] not in images:
            say_decoded_plainly(self.config)
            return GenerationMixin._sample(model, **loop)
        copies = generation_config.num_return_sequences  # which the rows have been repeated for, but not the images
        along = ("input_ids", "inputs_embeds", "attention_mask", "mm_token_type_ids")
        prompt = {name: loop[name][::copies] for name in along if loop.get(name) is not None} | images
        prompt["pixel_values_videos"] = (inputs.get("mm_encoder_outputs") or {}).get("video")  # encoded by now
        slots, width = Slots([], model.config), input_ids.shape[1]
        fitted, contrastive = with_contrast(model, slots, self.contrast(model), prompt, width=width)
        _, fitted = model._expand_inputs_for_generation(copies, **fitted)
        for name in ("position_ids", "mm_encoder_outputs"):  # which stock `generate` made without the images
            if fitted.get(name) is not None:
                loop[name] = fitted[name]
        return contrastive.sample(model, **loop)


class _BothPrompts:
    """What the stock loop takes for the model: B rows go in and come out, 2B are in each forward pass and the cache."""

    def __init__(self, model: PreTrainedModel, contrastive_ids: Tensor, contrast: _Subtract):
        self.model = model
        self.contrastive_ids = contrastive_ids
        self.contrast = contrast

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._own(self.model(**inputs))

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        compiled = self.model.get_compiled_call(compile_config)
        return lambda **inputs: self._own(compiled(**inputs))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: Any) -> dict[str, Any]:
        return self.model.prepare_inputs_for_generation(self._doubled(input_ids), **inputs)

    def _prefill(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._own(self.model._prefill(self._doubled(input_ids), *args, **kwargs))

    def _doubled(self, input_ids: Tensor) -> Tensor:
        """The ids (B, L + t) and, under them, the contrastive prompts with the same t new tokens."""
        new = input_ids[:, self.contrastive_ids.shape[1] :]
        return torch.cat([input_ids, torch.cat([self.contrastive_ids, new], dim=1)])

    def _own(self, outputs: Any) -> Any:
        """The outputs of the B prompts; the contrastive logits are put aside for the logits processor."""
        rows = len(self.contrastive_ids)
        self.contrast.contrastive = outputs.logits[rows:, -1]
        outputs.logits = outputs.logits[:rows]
        for name in ("hidden_states", "attentions"):
            if outputs.get(name) is not None:
                outputs[name] = tuple(layer[:rows] for layer in outputs[name])
        return outputs


class _Subtract(LogitsProcessor):
    """Contrasts the logits of the prompts with those that the last forward pass put aside."""

    contrastive: Tensor

    def __init__(self, config: ContrastConfig, shown: Tensor):
        self.config = config
        self.shown = shown

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        other = self.contrastive.to(scores)
        shown = self.shown.to(scores.device)[:, None]
        return torch.where(shown, contrasted(scores, other, self.config.alpha, self.config.beta), scores)


def _both(input_ids: Tensor, inputs: dict[str, Any], contrastive: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` of the loop with the rows of the contrastive prompts behind its own."""
    both = dict(inputs)
    own, other = inputs.get("attention_mask"), contrastive["attention_mask"]
    if own is not None or not bool(other.all()):  # stock `generate` drops a mask of ones, for speed
        both["attention_mask"] = torch.cat([torch.ones_like(input_ids) if own is None else own, other])
    positions = contrastive.get("position_ids")
    if positions is None:
        positions = (other.long().cumsum(-1) - 1).masked_fill(other == 0, 0)
    both["position_ids"] = torch.cat([inputs["position_ids"], positions], dim=-2)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if inputs.get(name) is not None:
            both[name] = torch.cat([inputs[name], contrastive[name]])
    images = (each["mm_encoder_outputs"]["image"].pooler_output for each in (inputs, contrastive))
    both["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=[i for row in images for i in row])}
    return both
