"""A study: one recipe trained in several ways with several seeds, and what the differences in scores are worth.

Every run is one of the recipe, in a folder of its own, so a study that was cut off goes on where it was. The arms are
compared pair by pair, on the same questions: with the first one, or with another that they name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from transformers import PreTrainedModel, ProcessorMixin

import mllm_vision as mv
from mllm_vision.eval.answers import inputs_for, prompt_for
from mllm_vision.eval.bench import prompt_lengths
from mllm_vision.eval.environment import environment
from mllm_vision.eval.evaluation import evaluate
from mllm_vision.eval.flops import counting_flops
from mllm_vision.eval.measurement import measure_steps
from mllm_vision.eval.report import TaskResult
from mllm_vision.eval.scores import LEVEL, RESAMPLES, seeds_against
from mllm_vision.eval.task import Task, parse_tasks
from mllm_vision.host import find_host
from mllm_vision.recipes.publish import STAGE_RECORD
from mllm_vision.recipes.recipe import RECIPES, Recipe, built, load_recipe, read_yaml
from mllm_vision.recipes.stages import ANSWERS, MODEL
from mllm_vision.recipes.train import train
from mllm_vision.recipes.training_cost import training_cost
from mllm_vision.registry import parse_methods
from mllm_vision.settings import Settings
from mllm_vision.slotted import SlottedModel

STUDIES = RECIPES / "studies"
BEFORE = "before training"


@dataclass(kw_only=True)
class Study(Settings):
    """What is compared.

    Args:
        recipe: Name of a recipe of the library, or the path of a YAML file.
        output: Folder of the runs, one folder each.
        task: What the trained models are asked.
        seeds: Of the runs of each arm.
        arms: By name, the `key=value` overrides of the recipe that make it. Arms with the same overrides share their
            runs.
        plug: By arm, methods that take the place of the recipe's when the trained model is asked, as
            "hiprune:keep=1/3".
        against: By arm, the one that it is compared with, if that is not the first.
    """

    recipe: str
    output: str
    task: str
    seeds: list[int]
    arms: dict[str, list[str]]
    plug: dict[str, str] = field(default_factory=dict)
    against: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or not self.arms:
            raise ValueError("a study needs seeds and arms, one of each at least")
        for name, named in (("plug", {*self.plug}), ("against", {*self.against, *self.against.values()})):
            if unknown := sorted(named - set(self.arms)):
                raise ValueError(f"{name} names no arm with {', '.join(unknown)}; the arms are {', '.join(self.arms)}")
        for methods in self.plug.values():
            parse_methods(methods)

    def baseline(self, arm: str) -> str:
        """The arm that one is compared with."""
        return self.against.get(arm, next(iter(self.arms)))

    def runs(self, arm: str) -> list[Recipe]:
        """The runs of an arm, one a seed."""
        return [load_recipe(self.recipe, self.overrides(arm, seed)) for seed in self.seeds]

    def overrides(self, arm: str, seed: int) -> list[str]:
        """What makes the recipe one run of this study."""
        runs_of = next(name for name, overrides in self.arms.items() if overrides == self.arms[arm])
        return [*self.arms[arm], f"seed={seed}", f"output={Path(self.output) / f'{runs_of}-{seed}'}"]


def study_names() -> list[str]:
    """The studies that come with the library."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(study: str | Path) -> Study:
    """Read a study, and every recipe that it asks for.

    Args:
        study: A name from `study_names()` or the path of a YAML file.

    Raises:
        FileNotFoundError: there is none; the message lists those there are.
        ValueError: an unknown key, or a recipe that cannot be run.
    """
    path = Path(study) if Path(study).suffix in (".yaml", ".yml") else STUDIES / f"{study}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no study {str(study)!r}; there are {', '.join(study_names())}, or name a YAML file")
    plan: Study = built(Study, read_yaml(path), str(path))
    parse_tasks([plan.task])
    for arm in plan.arms:
        plan.runs(arm)
    return plan


def run_study(plan: Study, say: Callable[[str], None] = lambda line: None, *, cost_repeats: int = 0) -> dict[str, Any]:
    """Train and ask what is not yet trained and asked, and compare.

    Args:
        say: Is told what is being done.
        cost_repeats: Steps of each arm that are measured for `training_cost`; 0 measures none.

    Returns:
        What `report` shows, as JSON holds it: ``environment``, ``study``, ``intervals``, ``before`` (the scores of the
        checkpoint that the runs begin with, None for a new model) and ``arms``, each with the recipe's ``overrides``,
        what was ``plug``ged in, ``parameters``, ``visual_tokens`` of the first question and the ``flops`` of its
        steps, ``seconds`` of training by seed (None for a run that was resumed), what each stage reached on
        ``held_out`` scenes by seed, the headline of each of the ``seeds``, ``scores`` of all seeds together and
        ``differences`` to the arm that it is compared ``against``. With ``cost_repeats`` also ``cost``, what
        `training_cost` returns.
    """
    (task,) = parse_tasks([plan.task])
    for seed in plan.seeds:
        for arm in plan.arms:
            run = load_recipe(plan.recipe, plan.overrides(arm, seed))
            if not (Path(run.output) / MODEL).is_dir():
                say(f"training: {arm}, seed {seed}")
                train(plan.recipe, plan.overrides(arm, seed))
    found: dict[str, list[TaskResult]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for arm in plan.arms:
        for run in plan.runs(arm):
            say(f"asking: {Path(run.output).name}")
            model, processor = mv.load(Path(run.output) / MODEL)
            answers = Path(run.output) / ANSWERS
            if arm in plan.plug:
                mv.apply(model, *parse_methods(plan.plug[arm]))
                answers = answers.with_name(f"{ANSWERS}-{arm}")
            facts[arm] = {"parameters": find_host(model).num_parameters(), **prompt_cost(model, processor, task)}
            asked = evaluate(model, processor, task, out=answers, batch_size=32)
            found.setdefault(arm, []).append(asked.tasks[task.name])
    tallies = {arm: [result.tallies for result in results] for arm, results in found.items()}
    first, *_ = plan.arms
    record = {
        "environment": environment(),
        "study": vars(plan),
        "recipe": {"stages": [asdict(stage) for stage in plan.runs(first)[0].stages]},
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "seed": 0},
        "task": {"name": task.name, "options": vars(task), "headline": list(task.headline)},
        "before": _before(plan, task.name, say),
        "arms": {
            arm: {
                "overrides": plan.arms[arm],
                "plug": plan.plug.get(arm),
                "against": plan.baseline(arm),
                **facts[arm],
                "seconds": [_seconds(run) for run in plan.runs(arm)],
                "held_out": [_held_out(run) for run in plan.runs(arm)],
                "seeds": [result.headline.value for result in results],
                **seeds_against(task, tallies[arm], tallies[plan.baseline(arm)]),
            }
            for arm, results in found.items()
        },
    }
    if cost_repeats:
        say("measuring a step of each arm")
        record["cost"] = training_cost(plan.recipe, plan.arms, repeats=cost_repeats)
    return record


@torch.no_grad()
def prompt_cost(model: PreTrainedModel, processor: ProcessorMixin, task: Task) -> dict[str, Any]:
    """The ``visual_tokens`` of the first question of ``task``, and ``flops`` by step as `measure_steps` has them.

    Args:
        model: Of a supported host; methods in it are counted, too.
    """
    question, *_ = task.load().examples
    prompt = prompt_for(processor, question.question, len(question.images))
    inputs = inputs_for(processor, [prompt], [[load() for load in question.images]])
    with nullcontext() if isinstance(find_host(model), SlottedModel) else mv.using(model), counting_flops() as clock:
        visual, _ = prompt_lengths(model, inputs)
        return {"visual_tokens": visual, "flops": asdict(measure_steps(model, inputs, 2, clock))}


def _before(plan: Study, task: str, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Scores of what all runs begin with."""
    base = load_recipe(plan.recipe).base
    if base is None:
        return None
    say(f"asking: {base}, {BEFORE}")
    asked = evaluate(*mv.load(base), plan.task, out=Path(plan.output) / "before" / ANSWERS, batch_size=32, name=base)
    scores = asked.tasks[task].scores
    return {group: {name: asdict(score) for name, score in row.items()} for group, row in scores.items()}


def _seconds(run: Recipe) -> int | None:
    """Seconds that all stages took, None where one was resumed."""
    seconds = [record["seconds"] for record in _stage_records(run)]
    return None if None in seconds else sum(seconds)


def _held_out(run: Recipe) -> dict[str, dict[str, float] | None]:
    """By stage, what it reached on validation scenes; None where it did not look."""
    return {record["name"]: record["curve"][-1] if record["curve"] else None for record in _stage_records(run)}


def _stage_records(run: Recipe) -> list[dict[str, Any]]:
    files = (Path(run.output) / stage.name / STAGE_RECORD for stage in run.stages)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def report(record: dict[str, Any]) -> RenderableType:
    """The arms as a table: their size and cost, the task's headline by seed and of all, the difference to another arm.

    GFLOPs are those of the first question, up to the first token of its answer; "a step" is the time of a step of
    training over the first arm's, MB its memory above the loaded model.
    """
    group, headline = record["task"]["headline"]
    title = f"{record['task']['name']}: {group}, {headline}; {LEVEL:.0%} intervals over questions"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    cost = record.get("cost", {})
    measured = ("a step", "MB") if cost else ()
    for heading in ("", "parameters", "visual tokens", "GFLOPs", *measured, "by seed", headline, "difference"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    if record["before"] is not None:
        scored = _cell(record["before"][group][headline], ".3f")
        table.add_row(BEFORE, *[""] * (4 + len(measured)), scored, "")
    first, *_ = record["arms"]
    for name, arm in record["arms"].items():
        difference = _cell(arm["differences"][group][headline], "+.3f") if name != arm["against"] else ""
        table.add_row(
            name,
            f"{arm['parameters'] / 1e6:.2f} M",
            f"{arm['visual_tokens']}",
            f"{arm['flops']['first_token'] / 1e9:.2f}",
            *((f"{cost[name]['ratio']['median']:.2f}", f"{cost[name]['megabytes']:.0f}") if cost else ()),
            ", ".join(f"{value:.3f}" for value in arm["seeds"]),
            _cell(arm["scores"][group][headline], ".3f"),
            difference + (f" to {arm['against']}" if arm["against"] != first else ""),
        )
    return table


def _cell(score: dict[str, float], form: str) -> str:
    return f"{score['value']:{form}} ({score['low']:{form}}, {score['high']:{form}})"
