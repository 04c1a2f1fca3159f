"""Benchmarks, one a file; see `mllm_vision.eval.list_tasks()`."""

from typing import Any

from mllm_vision.registry import exported


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return exported(__name__, name)
