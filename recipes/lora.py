"""LoRA on the parts of a host, and full training of what stands between them.

LoRA: Hu et al., arXiv 2106.09685; the layers are PEFT's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from mllm_vision.adapter_folder import Base
from mllm_vision.host import HEAD, PARTS, SLOTS, adapter_for, find_host, inside
from mllm_vision.recipes.parameters import transformer_layers
from mllm_vision.settings import Settings
from mllm_vision.slotted import SlottedModel

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Part = Literal["language", "tower", "projector"]
_OURS = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "layers_pattern")
"""Settings of `peft.LoraConfig` that follow from those of `LoraSpec`, or that need names which PEFT makes up."""


@dataclass(kw_only=True)
class LoraSpec(Settings):
    """Where LoRA goes, and how.

    Args:
        target: Parts whose linear layers get it; "all" is every part that has any. Never the head.
        r: Rank.
        alpha: Updates are multiplied by alpha / r (alpha / sqrt(r) with rsLoRA).
        dropout: Share of an update's inputs that is dropped in training, in [0, 1).
        options: Other settings of `peft.LoraConfig`, as use_dora, use_rslora or layers_to_transform.

    Raises:
        ValueError: a value out of range, or an option that PEFT does not know or that follows from the rest.
    """

    target: Literal["all", Part] | list[Part] = "language"
    r: int
    alpha: float
    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        from peft import LoraConfig

        if self.r < 1:
            raise ValueError(f"r must be 1 or more, got {self.r}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be more than 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.target == []:
            raise ValueError(f"target must name a part, one or more of {', '.join(PARTS)}, or all")
        valid = [name for name in inspect.signature(LoraConfig).parameters if name not in _OURS]
        if unknown := sorted(set(self.options) - set(valid)):
            raise ValueError(f"options has no field {', '.join(unknown)}; its fields are {', '.join(sorted(valid))}")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are asked for; of "all", those without linear layers get nothing."""
        return PARTS if self.target == "all" else (self.target,) if isinstance(self.target, str) else tuple(self.target)


def with_lora(model: PreTrainedModel, spec: LoraSpec, trains: Sequence[str] = ()) -> PeftModel:
    """The model with LoRA. All else is frozen, except modules trained in full, which PEFT copies.

    Weights of methods are always trained in full.

    Args:
        model: A host, stock or with slots, quantised or not; it is changed.
        trains: Parts, or names of submodules, that are trained in full.

    Raises:
        ValueError: a part that is both trained and adapted, that has no linear layer, or that there is not.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already; merge it first, or attach it with is_trainable=True")
    host = find_host(model)
    layers, full = lora_modules(host, spec, trains)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=layers,
        modules_to_save=list(dict.fromkeys(full)) or None,
        **{name: value for name, value in spec.options.items() if name != "layers_to_transform"},
    )
    trained_on = Base.of(host, full)
    adapted = get_peft_model(model, config)
    adapted.trained_on = trained_on
    return adapted


def lora_modules(host: PreTrainedModel, spec: LoraSpec, trains: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Names of the linear layers that get LoRA, and of the submodules that are trained in full.

    Args:
        host: With its weights or on the meta device.

    Raises:
        ValueError: as `with_lora`.
    """
    full = [name for asked in trains for name in trained_in_full(host, asked)]
    if isinstance(host, SlottedModel):
        held = zip(host.vision_slots.methods, host.vision_slots.places, strict=True)
        full += [f"{SLOTS}.{place}" for method, place in held if method.needs_weights]
    layers: list[str] = []
    for part in spec.parts:
        found = linear_layers(host, part, spec.options.get("layers_to_transform"))
        if not found and spec.target != "all":
            raise ValueError(f"the {part} of this model has no linear layer for LoRA; take {part} out of target")
        if both := sorted(name for name in found if any(inside(name, module) for module in full)):
            raise ValueError(f"the {part} is both trained in full and adapted, as {both[0]}; take it out of either")
        layers += found
    if not layers:
        raise ValueError(f"there is no linear layer for LoRA in {', '.join(spec.parts)} with options {spec.options}")
    return layers, full


def linear_layers(host: PreTrainedModel, part: str, numbers: int | list[int] | None = None) -> list[str]:
    """Names of the linear layers of a part that a gradient can reach, quantised ones among them.

    Args:
        numbers: Of the transformer layers to restrict this to, since PEFT ignores `layers_to_transform` when it is
            given full names; None for all linear layers, those outside any transformer layer among them.
    """
    adapter = adapter_for(host.config)
    idle = (*adapter.idle(host.config), HEAD, SLOTS)
    names = [
        name
        for name, module in host.named_modules()
        if isinstance(module, nn.Linear)
        and adapter.part_of(name) == part
        and not any(inside(name, other) for other in idle)
    ]
    if numbers is None:
        return names
    wanted = {numbers} if isinstance(numbers, int) else set(numbers)
    chosen = [layer for i, layer in enumerate(transformer_layers(host, part)) if i in wanted]
    return [name for name in names if any(inside(name, layer) for layer in chosen)]


def trained_in_full(host: PreTrainedModel, asked: str) -> list[str]:
    """Names of the submodules that are trained where a part or a submodule is ``asked`` for.

    Raises:
        ValueError: there is neither, or the language model shares weights with its head, which a copy would part.
    """
    adapter = adapter_for(host.config)
    if asked == "language":
        if host.get_input_embeddings().weight is host.get_output_embeddings().weight:
            raise ValueError(
                "the language model's head is its embeddings (tie_word_embeddings), which training it in full beside "
                "LoRA would part; give it LoRA, or train without"
            )
        return [adapter.language_name, HEAD]
    if asked == "tower" and inside(adapter.projector_name, adapter.tower_name):
        return _beside(host, adapter.tower_name, adapter.projector_name)
    name = {"tower": adapter.tower_name, "projector": adapter.projector_name}.get(asked, asked)
    names = [name for name, _ in host.named_modules() if name]
    if name not in names:
        raise ValueError(f"trains must be of {', '.join(PARTS)} or the name of a submodule, got {asked!r}")
    # NoProjector, where a method is the projector, has nothing to train; that method is trained anyway.
    return [name] if any(True for _ in host.get_submodule(name).parameters()) else []


def _beside(host: PreTrainedModel, whole: str, part: str) -> list[str]:
    """Submodules that together have every weight of ``whole`` but those of its ``part``; lists are given by item."""
    names = []
    for name, module in host.get_submodule(whole).named_children():
        items = [f"{name}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
        names += [f"{whole}.{item}" for item in items]
    return [name for name in names if name != part and any(True for _ in host.get_submodule(name).parameters())]
