"""Slots: the methods plugged into one model, and how `config.json` stores them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mllm_vision.host import adapter_for
from mllm_vision.operations import (
    AddedTokens,
    Contrast,
    ImageOperation,
    PluggedConfig,
    Projection,
    ProjectionConfig,
    TokenOperation,
    TowerFacts,
)
from mllm_vision.registry import MethodConfig
from mllm_vision.tokens import Evidence

log = logging.getLogger(__name__)

CONFIG_VERSION = 1
"""Version of what `config.json` stores under ``mllm_vision``."""

_PLACES: dict[str, type[nn.Module]] = {
    "projection": Projection,
    "projector": AddedTokens,
    "resize": ImageOperation,
    "operations": TokenOperation,
    "decoding": Contrast,
}
"""The attribute of `Slots` that holds modules of each type."""

_SINGLE = {
    "projection": "be the projector",
    "projector": "add tokens",
    "resize": "resize the image",
    "decoding": "say how to decode",
}


class Slots(nn.Module):
    """What the methods of one model do, built for its tower from their configs, in the order given.

    Args:
        methods: The configs.
        config: That of the model.
        keep: Slots whose modules, with their weights, are used again for the methods that they hold already.

    Attributes:
        projection: What takes the place of the host's projector, if anything does.
        projector: What adds tokens, if anything does.
        resize: What makes the image smaller, if anything does.
        operations: What the tokens go through.
        decoding: What the answer is contrasted with, if it is.

    Raises:
        TypeError: something that is no method config.
        ValueError: the host cannot give what a method needs, or two methods want one place.
    """

    def __init__(self, methods: Sequence[MethodConfig], config: PreTrainedConfig, keep: Slots | None = None):
        super().__init__()
        self.methods = [copy.copy(method) for method in methods]  # whoever changes his config changes no built module
        self.places: list[str] = []
        self.projection: Projection | None = None
        self.projector: AddedTokens | None = None
        self.resize: ImageOperation | None = None
        self.operations = nn.ModuleList()
        self.decoding: Contrast | None = None
        facts = adapter_for(config).facts(config)
        for method in methods:
            known = None if keep is None else keep.place_of(method)
            if keep is None or known is None:
                self._plug(_built(method, facts))
            else:
                self._plug(keep.get_submodule(known), known.partition(".")[0])

    def _plug(self, module: nn.Module, place: str | None = None) -> None:
        """Put ``module`` into its place, the one of its type unless another is given (PEFT wraps what it trains)."""
        place = next(name for name, kind in _PLACES.items() if isinstance(module, kind)) if place is None else place
        if place == "operations":
            self.places.append(f"operations.{len(self.operations)}")
            self.operations.append(module)
            return
        if place in self.places:
            names = ", ".join(method.type for method in self.methods)
            raise ValueError(f"only one method can {_SINGLE[place]}, and more do among {names}")
        self.places.append(place)
        setattr(self, place, module)

    def place_of(self, method: MethodConfig) -> str | None:
        """Name of the submodule that does what ``method`` says, None where there is none."""
        return next((place for held, place in zip(self.methods, self.places, strict=True) if held == method), None)

    def match(self, model: PreTrainedModel, keep: Slots | None, *, trained: bool = False) -> None:
        """Bring new weights, which ``keep`` does not hold, to the model's dtype and its projector's device.

        Args:
            trained: Whether an adapter is going to bring them trained.
        """
        held = set() if keep is None else set(keep.modules())
        own = adapter_for(model.config).projector(model)
        beside = own if keep is None or keep.projection is None else keep.projection
        for method, place in zip(self.methods, self.places, strict=True):
            module = self.get_submodule(place)
            if method.needs_weights and module not in held:
                module.to(compute_device(beside), model.dtype)
                if not trained:
                    log.warning(
                        "%s starts from %.3g million untrained weights: train vision_slots.%s before you trust an "
                        "answer",
                        method.type,
                        sum(parameter.numel() for parameter in module.parameters()) / 1e6,
                        place,
                    )
        for method in [] if keep is None else keep.methods:
            if method.needs_weights and self.place_of(method) is None:
                log.warning("%s goes, and its weights with it: %s", method.type, method)

    @property
    def changes_prompt(self) -> bool:
        """Whether the prompt gets other tokens of an image than under the stock host."""
        return any(place != "decoding" for place in self.places)

    @property
    def added(self) -> int:
        """S, the tokens added to those of a tile."""
        return 0 if self.projector is None else self.projector.count

    @property
    def undivided(self) -> set[str]:
        """Names of the classes whose layers compute together, so that a device map must not part them."""
        return {type(module).__name__ for module in (self.projection, self.projector) if module is not None}

    @property
    def requests(self) -> list[Evidence]:
        """The evidence that the operations need, each once."""
        operations = cast(Iterable[TokenOperation], self.operations)
        return list(dict.fromkeys(request for operation in operations for request in operation.requests))

    def grid(self, grid: tuple[int, int], tiles: int) -> tuple[int, int]:
        """The (h, w) grid on which the tower sees each tile of an image whose stock grid is ``grid``."""
        return grid if self.resize is None else self.resize(grid, tiles)


def _built(method: MethodConfig, facts: TowerFacts) -> nn.Module:
    if not isinstance(method, PluggedConfig):
        raise TypeError(f"expected a method config such as HiPruneConfig(keep=192), got {method!r}")
    method.check(facts)
    return method.build(facts)


def compute_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes, which is not where its weights lie if accelerate offloads them."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    asked = next((device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None), None)
    return next(module.parameters()).device if asked is None else torch.device(asked)


def replacing(held: Iterable[MethodConfig], methods: Sequence[MethodConfig]) -> list[MethodConfig]:
    """``methods`` in place of those that are ``held``; of these, what has weights stays unless its kind is replaced."""

    def kind(method: MethodConfig) -> tuple[str, bool]:
        return method.kind, isinstance(method, ProjectionConfig)  # the projector, or tokens beside those it makes

    kinds = {kind(method) for method in methods if isinstance(method, MethodConfig)}
    return [method for method in held if method.needs_weights and kind(method) not in kinds] + list(methods)


def stored(methods: Iterable[MethodConfig]) -> dict[str, Any]:
    """What `config.json` holds under ``mllm_vision``."""
    return {"version": CONFIG_VERSION, "operations": [method.to_dict() for method in methods]}


def restored(entry: dict[str, Any] | None) -> list[MethodConfig]:
    """The methods of a `config.json`.

    Raises:
        ValueError: written by a later version of this library, or with an unknown method or field.
    """
    if entry is None:
        return []
    if entry["version"] > CONFIG_VERSION:
        raise ValueError(
            f"config.json has slots of version {entry['version']}, this mllm_vision reads {CONFIG_VERSION}"
        )
    return [MethodConfig.from_dict(method) for method in entry["operations"]]
