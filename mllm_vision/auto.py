"""Registration of the slotted architectures with the Auto classes, at the moment when they can be needed.

`import transformers` does not load torch, and neither shall `import mllm_vision`: configs are registered as soon as
someone loads `AutoConfig`, a model class when the first of its configs is created.
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
AUTO_MODEL = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register every slotted architecture: now where `AutoConfig` is loaded, else as soon as it is."""
    if AUTO_CONFIG in sys.modules:
        _register_configs()
    elif not any(isinstance(finder, _AfterAutoConfig) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAutoConfig())


class _AfterAutoConfig(importlib.abc.MetaPathFinder):
    """Lets the config modules of transformers load as they would; once `AutoConfig` is there, registers and is gone.

    Configs import one another and the Auto classes in circles, so registration waits until none is half loaded.
    """

    def __init__(self) -> None:
        self.loading: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = fullname.rpartition(".")
        watched = fullname == AUTO_MODEL or module.startswith("configuration_")
        if not package.startswith("transformers.models.") or not watched or fullname in self.loading:
            return None
        self.loading.add(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            self.loading.discard(fullname)
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(loaded: ModuleType) -> None:
            try:
                execute(loaded)
            finally:
                self.loading.discard(fullname)
            if AUTO_CONFIG in sys.modules and not self.loading and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register_configs()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign, assignment]
        return spec


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from mllm_vision.host import adapters

    for adapter in adapters().values():
        config = slotted_config(adapter)
        AutoConfig.register(config.model_type, config, exist_ok=True)


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
