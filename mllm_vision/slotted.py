"""The host: a stock model class with slots. The stock forward pass and the stock generation loop do all the work.

Shapes: B prompts of L columns before and M after fitting.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import BitsAndBytesConfig, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.quantizers import AutoQuantizationConfig

from mllm_vision.auto import slotted_config
from mllm_vision.encoding import ImageTokens, encode_images, image_inputs
from mllm_vision.host import Adapter, adapter_for, adapters
from mllm_vision.placeholders import PAD_VALUES, fit_columns
from mllm_vision.slots import Slots, restored


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
        self.plug(Slots(restored(config.mllm_vision), config))

    def plug(self, slots: Slots) -> None:
        """Hold ``slots`` in place of those held so far."""
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
        **kwargs: Any,
    ) -> Any:
        """As the stock `generate`: returns the caller's own prompt and the new tokens, whatever was pruned.

        Logits processors and stopping criteria see the fitted prompt, shorter or longer. A `max_length` or `min_length`
        allows as many new tokens as it would without methods.
        """
        stock = super().generate
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        cache = kwargs.get("past_key_values")
        prefix = getattr(cache, "visual_prefix", None) if cache is not None and cache.get_seq_length() else None
        if prompt is None or (prefix is None and not self._reduces(kwargs)):
            return stock(prompt, generation_config, streamer=streamer, **kwargs)
        fitted = self._fitted_turn({"input_ids": prompt, **kwargs}, prefix)
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

    def _reduces(self, inputs: dict[str, Any]) -> bool:
        """Whether there are images in ``inputs`` and methods that change what the prompt gets of them."""
        pixels = adapter_for(self.config).image_inputs[0]
        return inputs.get(pixels) is not None and bool(self.vision_slots.methods)

    def _fitted(self, inputs: dict[str, Any], *, generating: bool) -> dict[str, Any]:
        """``inputs`` with the images encoded and reduced, and the prompt fitted to them."""
        if not self._reduces(inputs):
            return inputs
        adapter = adapter_for(self.config)
        images = image_inputs(self, inputs)
        if inputs.get("pixel_values_videos") is not None:
            raise ValueError("images and videos in one call are not supported with methods plugged in; split the call")
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:
            raise ValueError("images need input_ids, whose placeholders say where they stand; got inputs_embeds only")
        encoded = encode_images(self, self.vision_slots, images)
        if self._has_room(ids, encoded):
            encoded = [image.with_placeholders(self.vision_slots.added) for image in encoded]
        of_pairs = mask if mask is not None and mask.dim() != 2 else None
        fit = fit_columns(
            ids,
            mask if of_pairs is None else None,
            self.config.image_token_id,
            [i.placeholders for i in encoded],
            [i.slots for i in encoded],
            self.vision_slots.added,
        )
        stays = fit.keeps(ids.shape[1])
        if of_pairs is not None and not stays:
            raise ValueError(
                "attention_mask must be (batch, length) where images have more or fewer tokens than placeholders, got "
                f"{tuple(of_pairs.shape)}"
            )
        fitted = {name: value for name, value in inputs.items() if name not in adapter.image_inputs}
        if inputs.get("position_ids") is None:
            fitted["position_ids"] = adapter.positions(self, inputs)
        if mask is None and bool(fit.padded.any()):
            fitted["attention_mask"] = torch.ones_like(ids)
        for name, pad_value in {"input_ids": self._pad_id(), **PAD_VALUES}.items():
            if fitted.get(name) is not None and not stays:
                fitted[name] = fit.apply(fitted[name], pad_value)
        features = [image.features for image in encoded]
        fitted["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        adapter.after_fit(self, fitted, generating=generating)
        return fitted

    def _has_room(self, ids: Tensor, images: Sequence[ImageTokens]) -> bool:
        """Whether a processor wrote placeholders for the added tokens (with `num_additional_image_tokens` raised)."""
        if not self.vision_slots.added:
            return False
        marked = pad(ids == self.config.image_token_id, (0, 1)).flatten()
        ends = marked.cumsum(0)[:-1][marked[:-1] & ~marked[1:]].tolist()  # of the runs of placeholders, counted through
        room = list(accumulate(image.placeholders + self.vision_slots.added for image in images))
        return ends[-1:] == room[-1:] and set(ends) <= set(room)

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

    def _shifted_limits(self, config: GenerationConfig | None, inputs: dict[str, Any], by: int) -> dict[str, int]:
        """Limits on the whole length, moved ``by`` the columns that fitting added, so that they allow the same."""

        def asked(name: str) -> int | None:
            sources = (inputs.get(name), getattr(config, name, None), getattr(self.generation_config, name))
            return next((value for value in sources if value is not None), None)

        pairs = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
        return {name: limit + by for name, new in pairs if asked(new) is None and (limit := asked(name))}

    def _pad_id(self) -> int:
        ids = (self.generation_config.pad_token_id, self.config.get_text_config().pad_token_id)
        return next((i for i in ids if i is not None), 0)


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
        others = [name for name in quantised.llm_int8_skip_modules or ["lm_head"] if name != "vision_slots"]
        quantised.llm_int8_skip_modules = (
            [*others, "vision_slots"] if spared else None if others == ["lm_head"] else others
        )


def _sparing_slots(quantised: Any) -> Any:
    """A quantisation config that, if it is of bitsandbytes, leaves the slots alone, and the head as it would untold."""
    sparing = AutoQuantizationConfig.from_dict(quantised) if isinstance(quantised, dict) else copy.copy(quantised)
    if isinstance(sparing, BitsAndBytesConfig):
        sparing.llm_int8_skip_modules = [*(sparing.llm_int8_skip_modules or ["lm_head"]), "vision_slots"]
    return sparing


def require_weights(info: Any) -> None:
    """Raise RuntimeError where a checkpoint lacked weights, naming them."""
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise RuntimeError(f"the checkpoint lacks {len(missing)} weights, which would be random: {shown}")
