"""Projectors: visual tokens of width C in, tokens of the language model's width D out. See `mllm_vision.methods()`."""

from typing import Any

from mllm_vision.registry import exported


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return exported(__name__, name)
