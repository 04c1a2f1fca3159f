"""Better eyes for LLaVA-style models: token reducers, projectors, towers and decoding on stock Hugging Face classes."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from mllm_vision import auto

if TYPE_CHECKING:
    from mllm_vision.api import apply, inspect_tokens, load, remove, using
    from mllm_vision.registry import methods

__all__ = ["apply", "inspect_tokens", "load", "methods", "remove", "using"]

__version__ = "0.1.0"

OLDEST_TRANSFORMERS = "5.18"

if Version(version("transformers")) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"mllm_vision needs transformers {OLDEST_TRANSFORMERS} or newer, found {version('transformers')}: "
        f"pip install -U 'transformers>={OLDEST_TRANSFORMERS}'"
    )

auto.register()


def __getattr__(name: str) -> Any:
    """The public verbs and the folders of methods, imported on first use so that `import mllm_vision` stays cheap."""
    if name in ("decoding", "projectors", "reducers"):
        return import_module(f"mllm_vision.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'mllm_vision' has no attribute {name!r}")
    return getattr(import_module("mllm_vision.registry" if name == "methods" else "mllm_vision.api"), name)
