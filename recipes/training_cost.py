"""What a step of training costs in every arm of a study: time, in turns, and memory, in processes of their own."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mllm_vision.eval.measurement import in_fresh_process, in_turn, torch_threads

Step = Callable[[], None]


def training_cost(recipe: str, arms: dict[str, list[str]], *, repeats: int = 7, threads: int = 2) -> dict[str, Any]:
    """A step of the last stage of a recipe, forward, backward and the optimiser's, in every arm.

    Args:
        arms: By name, the overrides of the recipe; the first is what others are compared with.
        repeats: Steps a median is of; arms take turns, so that a busy machine disturbs all alike.
        threads: Of torch.

    Returns:
        By arm: ``seconds`` a step (median) and ``ratio`` to the first arm's of the same turn (median, min, max); and
        ``megabytes`` of the process above the loaded model, at most, during three steps.
    """
    with TemporaryDirectory() as scratch, torch_threads(threads):
        steps = [step_of(recipe, overrides, Path(scratch) / name) for name, overrides in arms.items()]
        turns = in_turn([_timed(step) for step in steps], repeats)
        memory = [in_fresh_process(_step_memory, recipe, overrides, threads) for overrides in arms.values()]
    found = {}
    for i, name in enumerate(arms):
        ratios = [turn[i] / turn[0] for turn in turns]
        found[name] = {
            "seconds": statistics.median(turn[i] for turn in turns),
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "megabytes": memory[i],
        }
    return found
