"""Token reducers: visual tokens in, fewer visual tokens out. One method a file; see `mllm_vision.methods()`."""

from typing import Any

from mllm_vision.registry import exported


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return exported(__name__, name)
