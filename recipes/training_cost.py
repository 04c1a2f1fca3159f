"""What a step of training costs in every arm of a study: time, in turns, and memory, in processes of their own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mllm_vision.eval.measurement import in_fresh_process, in_turn, peak_memory, seconds, spread, torch_threads
from mllm_vision.recipes.recipe import load_recipe
from mllm_vision.recipes.stage_trainers import cached_features_allowed, trainer_for
from mllm_vision.recipes.train import beginning, prepared, training_arguments

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
    with torch_threads(threads):
        steps = [_step(recipe, overrides) for overrides in arms.values()]
        turns = in_turn([partial(seconds, step) for step in steps], repeats)
        memory = [in_fresh_process(_step_memory, recipe, overrides, threads) for overrides in arms.values()]
    found = {}
    for i, name in enumerate(arms):
        ratios = [turn[i] / turn[0] for turn in turns]
        found[name] = {
            "seconds": statistics.median(turn[i] for turn in turns),
            "ratio": spread(ratios),
            "megabytes": memory[i],
        }
    return found


def _step(recipe: str, overrides: Sequence[str]) -> Step:
    """One step of the last stage, on its first batch; call it as often as you like."""
    scratch = TemporaryDirectory()
    plan = replace(load_recipe(recipe, overrides), output=scratch.name)
    stage = plan.stages[-1]
    arguments = training_arguments(plan, stage)
    _, trained, processor = prepared(plan, stage, beginning(plan, Path(scratch.name)), arguments)
    trainer = trainer_for(stage, plan, trained, processor, arguments)
    optimizer = trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    batch.pop("row_ids", None)
    trainer.model.train()

    def step(_: Any = scratch) -> None:  # which holds cached features, and goes with the last step
        with cached_features_allowed(stage, trained):
            trainer.model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _step_memory(recipe: str, overrides: Sequence[str], threads: int) -> float:
    with torch_threads(threads):
        step = _step(recipe, overrides)
        loaded, peak = peak_memory(lambda: [step() for _ in range(3)])
    return peak - loaded
