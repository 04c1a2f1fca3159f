"""Slots: the methods plugged into one model, and how `config.json` stores them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig

from mllm_vision.host import adapter_for
from mllm_vision.operations import ImageOperation, KeepConfig, TokenOperation
from mllm_vision.registry import MethodConfig
from mllm_vision.tokens import Evidence

CONFIG_VERSION = 1
"""Version of what `config.json` stores under ``mllm_vision``."""


class Slots(nn.Module):
    """The operations of one model, built for its tower from their configs, in the order given.

    Raises:
        TypeError: something that is no method config.
        ValueError: the host cannot give what a method needs.
    """

    def __init__(self, methods: Sequence[MethodConfig], config: PreTrainedConfig):
        super().__init__()
        self.methods = list(methods)
        operations = [_built(method, config) for method in methods]
        resizing = [operation for operation in operations if isinstance(operation, ImageOperation)]
        if len(resizing) > 1:
            raise ValueError(f"an image is resized once, got {len(resizing)} methods that resize it")
        self.resize = resizing[0] if resizing else None
        self.operations = nn.ModuleList(op for op in operations if isinstance(op, TokenOperation))

    @property
    def requests(self) -> list[Evidence]:
        """The evidence that the operations need, each once."""
        operations = cast(Iterable[TokenOperation], self.operations)
        return list(dict.fromkeys(request for operation in operations for request in operation.requests))

    def grid(self, grid: tuple[int, int], tiles: int) -> tuple[int, int]:
        """The (h, w) grid on which the tower sees each tile of an image whose stock grid is ``grid``."""
        return grid if self.resize is None else self.resize(grid, tiles)


def _built(method: MethodConfig, config: PreTrainedConfig) -> TokenOperation | ImageOperation:
    if not isinstance(method, KeepConfig):
        raise TypeError(f"expected a method config such as HiPruneConfig(keep=192), got {method!r}")
    facts = adapter_for(config).facts(config)
    method.check(facts)
    return method.build(facts)


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
