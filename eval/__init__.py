"""Evaluate on benchmarks, and measure what a method costs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_vision.eval.answers import Decoding
    from mllm_vision.eval.evaluation import evaluate
    from mllm_vision.eval.report import Comparison, Evaluation, compare
    from mllm_vision.eval.task import Example, Task, list_tasks

_HOMES = {
    "Comparison": "report",
    "Decoding": "answers",
    "Evaluation": "report",
    "Example": "task",
    "Task": "task",
    "compare": "report",
    "evaluate": "evaluation",
    "list_tasks": "task",
}

__all__ = ["Comparison", "Decoding", "Evaluation", "Example", "Task", "compare", "evaluate", "list_tasks"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
