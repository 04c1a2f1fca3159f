"""The host: a stock model class with slots. The stock forward pass and the stock generation loop do all the work.

Shapes: B prompts of L columns before and M after fitting.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation.streamers import BaseStreamer
from transformers.quantizers import AutoQuantizationConfig

from mllm_vision.auto import slotted_config
from mllm_vision.contrast import OneCall, require_sampling_loop, say_decoded_plainly, with_contrast
from mllm_vision.encoding import encode_images
from mllm_vision.fitting import fit_prompt, fittable_images
from mllm_vision.host import HEAD, SLOTS, Adapter, NoProjector, adapter_for, adapters
from mllm_vision.slots import Slots, restored

CONTRAST = "contrast"
"""Where `generate` puts the contrastive prompt: among the encoded images, which the stock code hands on to the loop."""


@dataclass
class PromptPrefix:
    """What a cache holds of an earlier prompt.

    Kept on the cache as ``visual_prefix``, where the next turn of a conversation finds it, in copies of the cache, too.

    Args:
        length: Columns of the prompt as the caller wrote it.
        fitted: Its fitted ids and masks, (B, M) each.
    """

    length: int
    fitted: dict[str, Tensor] = field(default_factory=dict)


class SlottedModel(PreTrainedModel, GenerationMixin):
    """Mixed in before a stock model class: fits the prompt to what the slots made of the images, then runs stock code.

    Nothing is filled in as long as `vision_slots` has no methods, and everything is stock.
    """

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        slots = Slots(restored(config.mllm_vision), config)
        if slots.projection is not None:  # the checkpoint will have no weights for the host's own
            adapter_for(config).projector(self).to("meta")
        self.plug(slots)

    def plug(self, slots: Slots) -> None:
        """Hold ``slots`` in place of those held so far, and a method's projector in place of the host's own.

        Raises:
            ValueError: the host's own is asked for, and the checkpoint had none; nothing is changed then.
        """
        adapter = adapter_for(self.config)
        projector = adapter.projector(self)
        if slots.projection is not None and not isinstance(projector, NoProjector):
            self.set_submodule(adapter.projector_name, NoProjector(projector))
        elif slots.projection is None and isinstance(projector, NoProjector):
            like = next(self.get_input_embeddings().parameters())
            self.set_submodule(adapter.projector_name, projector.take_back(like))
        if (held := getattr(self, "vision_slots", None)) is not None:
            self._no_split_modules -= held.undivided
        self.vision_slots = slots
        self._no_split_modules |= slots.undivided

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As the stock class, but a weight that the checkpoint lacks is an error, never a random layer.

        Quantisation leaves the slots alone.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _sparing_slots(kwargs["quantization_config"])
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        require_weights(info)
        return (model, info) if output_loading_info else model

    def _forward(self, **inputs: Any) -> Any:
        """The stock forward pass over the fitted prompt; logits have the fitted length M."""
        return super().forward(**self._fitted(inputs, generating=False))

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: BaseStreamer | None = None,
        custom_generate: str | Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock `generate`: returns the caller's own prompt and the new tokens, whatever was pruned.

        Logits processors and stopping criteria see the fitted prompt, shorter or longer. A `max_length` or `min_length`
        allows as many new tokens as it would without methods. A decoding strategy that is plugged in is used unless
        there is a `custom_generate`.
        """
        contrast = self.vision_slots.decoding if custom_generate is None else None
        if isinstance(custom_generate, OneCall):  # which would get neither streamer nor tokenizer from stock `generate`
            contrast, custom_generate = custom_generate.contrast(self), None
        stock = functools.partial(super().generate, custom_generate=custom_generate)
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if contrast is not None and not self._has_images(kwargs):
            say_decoded_plainly(contrast.config)
            contrast = None
        cache = kwargs.get("past_key_values")
        prefix = getattr(cache, "visual_prefix", None) if cache is not None and cache.get_seq_length() else None
        if contrast is None and (prompt is None or (prefix is None and not self._reduces(kwargs))):
            return stock(prompt, generation_config, streamer=streamer, **kwargs)
        if prompt is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._inferred_mask(prompt, generation_config, kwargs)
        if contrast is None:
            fitted = self._fitted_turn({"input_ids": prompt, **kwargs}, prefix)
        else:
            require_sampling_loop(
                contrast.config,
                self._prepare_generation_config(generation_config, **kwargs)[0],
                assistant_model=kwargs.get("assistant_model"),
                past_key_values=cache,
            )
            fitted, contrastive = with_contrast(self, self.vision_slots, contrast, {"input_ids": prompt, **kwargs})
            fitted["mm_encoder_outputs"][CONTRAST] = contrastive
        grown = fitted["input_ids"].shape[1] - prompt.shape[1]
        if cache is not None and grown > 0:
            _require_room(cache, fitted["input_ids"].shape[1], grown)
        fitted |= self._shifted_limits(generation_config, fitted, grown)
        out = stock(
            generation_config=generation_config,
            streamer=None if streamer is None else _PromptStreamer(streamer, prompt),
            **fitted,
        )
        sequences = out if isinstance(out, Tensor) else out.sequences
        copies = len(sequences) // len(prompt)
        own = prompt.to(sequences.device).repeat_interleave(copies, dim=0)
        sequences = torch.cat([own, sequences[:, fitted["input_ids"].shape[1] :]], dim=1)
        for used in (cache, getattr(out, "past_key_values", None)):
            if used is not None:
                used.visual_prefix = _prefix(fitted, prompt, prefix, copies)
        if isinstance(out, Tensor):
            return sequences
        out.sequences = sequences
        return out

    def _sample(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The stock sampling loop; over both prompts where `generate` put a contrastive one beside the images."""
        contrastive = (kwargs.get("mm_encoder_outputs") or {}).pop(CONTRAST, None)
        if contrastive is None:
            return super()._sample(input_ids, **kwargs)
        return contrastive.sample(self, input_ids, **kwargs)

    def _has_images(self, inputs: dict[str, Any]) -> bool:
        return inputs.get(adapter_for(self.config).image_inputs[0]) is not None

    def _reduces(self, inputs: dict[str, Any]) -> bool:
        """Whether there are images in ``inputs`` and methods that change what the prompt gets of them."""
        return self.vision_slots.changes_prompt and self._has_images(inputs)

    def _fitted(self, inputs: dict[str, Any], *, generating: bool) -> dict[str, Any]:
        """``inputs`` with the images encoded and reduced, and the prompt fitted to them."""
        if not self._reduces(inputs):
            return inputs
        encoded = encode_images(self, self.vision_slots, fittable_images(self, inputs))
        return fit_prompt(self, self.vision_slots, inputs, encoded, generating=generating)

    def _fitted_turn(self, inputs: dict[str, Any], prefix: PromptPrefix | None) -> dict[str, Any]:
        """As `_fitted`, for a conversation of which a cache may hold an earlier, fitted part."""
        if prefix is None:
            return self._fitted(inputs, generating=True)
        adapter = adapter_for(self.config)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        inputs = {**inputs, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        length = inputs["attention_mask"].shape[1]
        # As in stock `generate`, ids that are shorter than the mask are the new ones only.
        whole = [name for name in prefix.fitted if name in inputs and inputs[name].shape[1] == length]
        turn = {**inputs, **{name: inputs[name][:, prefix.length :] for name in whole}}
        if self._reduces(inputs):
            if adapter.keeps_positions or "input_ids" not in whole:
                raise ValueError(
                    f"{adapter.model_type} takes no new image in a later turn of a cached conversation"
                    if adapter.keeps_positions
                    else "a new image in a later turn needs the ids of the whole conversation, got the new ones only"
                )
            turn = self._fitted(turn, generating=True)
        return {**turn, **{name: torch.cat([prefix.fitted[name], turn[name]], dim=1) for name in whole}}

    def _inferred_mask(self, ids: Tensor, config: GenerationConfig | None, inputs: dict[str, Any]) -> Tensor:
        """The mask (B, L) that stock `generate` infers from pad ids where the caller gives none."""
        prepared = self._prepare_generation_config(config, **inputs)[0]
        self._prepare_special_tokens(prepared, False, device=ids.device, batch_size=len(ids))
        return self._prepare_attention_mask_for_generation(ids, prepared, inputs)

    def _shifted_limits(self, config: GenerationConfig | None, inputs: dict[str, Any], by: int) -> dict[str, int]:
        """Limits on the whole length, moved ``by`` the columns that fitting added, so that they allow the same."""

        def asked(name: str) -> int | None:
            sources = (inputs.get(name), getattr(config, name, None), getattr(self.generation_config, name))
            return next((value for value in sources if value is not None), None)

        pairs = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
        return {name: limit + by for name, new in pairs if asked(new) is None and (limit := asked(name))}


def _prefix(fitted: dict[str, Tensor], prompt: Tensor, earlier: PromptPrefix | None, copies: int) -> PromptPrefix:
    """What a cache holds after generating from ``fitted``, each prompt ``copies`` times."""
    if earlier is not None and fitted["input_ids"].shape[1] == prompt.shape[1]:
        return earlier  # the caller gave the new ids only, nothing of which was fitted
    mask = fitted.get("attention_mask")
    held = {**fitted, "attention_mask": torch.ones_like(fitted["input_ids"]) if mask is None else mask}
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    return PromptPrefix(
        prompt.shape[1],
        {name: held[name].repeat_interleave(copies, dim=0) for name in names if held.get(name) is not None},
    )


def _require_room(cache: Any, length: int, grown: int) -> None:
    """Raise ValueError where a cache of a fixed size has no column left for the first new token."""
    columns = min((layer.max_cache_len for layer in cache.layers if type(layer) is StaticLayer), default=None)
    if columns is not None and columns <= length:
        raise ValueError(
            f"the cache has {columns} columns, but the prompt takes {length} with the tokens that are added to images; "
            f"make it {grown} longer than without them"
        )


class _PromptStreamer(BaseStreamer):
    """Shows the caller's own prompt to a streamer where the loop shows the fitted one."""

    def __init__(self, streamer: BaseStreamer, prompt: Tensor):
        self.streamer = streamer
        self.prompt: Tensor | None = prompt.cpu()

    def put(self, value: Tensor) -> None:
        prompt, self.prompt = self.prompt, None
        self.streamer.put(value if prompt is None else prompt)

    def end(self) -> None:
        self.streamer.end()


@functools.cache
def slotted_model(adapter: Adapter) -> type[SlottedModel]:
    """The host's stock model class with slots, known to `from_pretrained` under the weight names of the stock class."""
    stock, config = adapter.stock_model, slotted_config(adapter)
    names = list(inspect.signature(stock.forward).parameters)[1:]

    @functools.wraps(stock.forward)  # `generate` and Trainer read the signature
    def forward(self: SlottedModel, *args: Any, **kwargs: Any) -> Any:
        return self._forward(**dict(zip(names, args, strict=False)), **kwargs)

    # Weights are renamed on loading by class name or model type; ours must be renamed as the stock ones are.
    slotted = f"Slotted{stock.__name__}"
    for name, stock_name in ((slotted, stock.__name__), (config.model_type, adapter.model_type)):
        if (conversion := get_checkpoint_conversion_mapping(stock_name)) is not None:
            register_checkpoint_conversion_mapping(name, conversion, overwrite=True)
    members = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with slots.",
        "config_class": config,
        "forward": forward,
    }
    return type(slotted, (SlottedModel, stock), members)


def __getattr__(name: str) -> Any:
    """The slotted classes by name, as unpickling asks for them."""
    for adapter in adapters().values():
        for kind, make in ((adapter.config_name, slotted_config), (adapter.model_name, slotted_model)):
            if name == f"Slotted{kind}":
                return make(adapter)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def spare_slots(config: PreTrainedConfig, spared: bool) -> None:
    """Note in the config of a quantised model that its slots are not quantised, or take that back."""
    quantised = getattr(config, "quantization_config", None)
    if isinstance(quantised, BitsAndBytesConfig):
        others = [name for name in quantised.llm_int8_skip_modules or [HEAD] if name != SLOTS]
        quantised.llm_int8_skip_modules = [*others, SLOTS] if spared else None if others == [HEAD] else others


def _sparing_slots(quantised: Any) -> Any:
    """A quantisation config that, if it is of bitsandbytes, leaves the slots alone, and the head as it would untold."""
    sparing = AutoQuantizationConfig.from_dict(quantised) if isinstance(quantised, dict) else copy.copy(quantised)
    if isinstance(sparing, BitsAndBytesConfig):
        spared = [*(sparing.llm_int8_skip_modules or [HEAD]), SLOTS]
        sparing.llm_int8_skip_modules = list(dict.fromkeys(spared))
    return sparing


def require_weights(info: Any) -> None:
    """Raise RuntimeError where a checkpoint lacked weights, naming them."""
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise RuntimeError(f"the checkpoint lacks {len(missing)} weights, which would be random: {shown}")
