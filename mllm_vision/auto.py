"""Registration of the slotted architectures and the towers with the Auto classes, when they can be needed.

`import transformers` does not load torch, and neither shall `import mllm_vision`: configs and image processors are
registered as soon as someone loads `AutoConfig`, a model class when the first of its configs is created.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mllm_vision.host import Adapter

AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register every slotted architecture and tower: now where `AutoConfig` is loaded, else as soon as it is."""
    if AUTO_CONFIG in sys.modules:
        _register_configs()
    elif not any(isinstance(finder, _AfterAutoConfig) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAutoConfig())


class _AfterAutoConfig(importlib.abc.MetaPathFinder):
    """Lets the modules of transformers load as they would; once `AutoConfig` is there, registers and is gone.

    They import one another in circles, so registration waits until none is half loaded.
    """

    def __init__(self) -> None:
        self.finding: set[str] = set()
        self.loading = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("transformers.") or fullname in self.finding:
            return None
        self.finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.finding.discard(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(loaded: ModuleType) -> None:
            self.loading += 1
            try:
                execute(loaded)
            finally:
                self.loading -= 1
            if AUTO_CONFIG in sys.modules and not self.loading and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register_configs()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign, assignment]
        return spec


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from mllm_vision.host import adapters
    from mllm_vision.registry import package_modules

    for adapter in adapters().values():
        config = slotted_config(adapter)
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for tower in package_modules("mllm_vision.towers"):
        tower.register()


def _register_model(config: type[PreTrainedConfig]) -> None:
    from transformers import AutoModelForImageTextToText

    from mllm_vision.host import adapter_of_type
    from mllm_vision.slotted import slotted_model

    AutoModelForImageTextToText.register(config, slotted_model(adapter_of_type(config.model_type)), exist_ok=True)


class SlottedConfig:
    """Mixed in before a stock config class: one more entry, ``mllm_vision``, that says which methods are plugged in."""

    mllm_vision: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        _register_model(type(self))


@functools.cache
def slotted_config(adapter: Adapter) -> type[PreTrainedConfig]:
    """The host's stock config class with slots, under a model type of its own."""
    stock = adapter.stock_config
    members = {
        "__module__": "mllm_vision.slotted",
        "__doc__": f"`{stock.__name__}` with slots: ``mllm_vision`` says which methods are plugged in.",
        "model_type": adapter.slotted_type,
    }
    return type(f"Slotted{stock.__name__}", (SlottedConfig, stock), members)
