"""Settings chosen on one split and scored on another: what each kind of method is worth once it is tuned.

Of every kind of method that is tried, the setting with the best score on the questions for choosing goes into the test,
greedy and, where asked, sampled with several seeds, each way with the setting that was best that way. Scores are beside
those of the model without methods, on the same questions and with the same seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from transformers import PreTrainedModel, ProcessorMixin

import mllm_vision as mv
from mllm_vision.eval.answers import Decoding
from mllm_vision.eval.environment import environment
from mllm_vision.eval.evaluation import evaluate
from mllm_vision.eval.report import TaskResult
from mllm_vision.eval.scores import LEVEL, RESAMPLES, seeds_against
from mllm_vision.eval.task import Task
from mllm_vision.registry import MethodConfig
from mllm_vision.settings import spec

RESULTS = "tune.json"
PLAIN = "plain"
CHOOSING, TESTING = "choosing", "testing"

Trial = Sequence[MethodConfig]


def tune(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    trials: Sequence[Trial],
    choosing: Task,
    testing: Task,
    out: str | Path,
    *,
    score: tuple[str, str] | None = None,
    temperatures: Sequence[float] = (0.0,),
    seeds: int = 3,
    name: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Find the best of the ``trials`` of each kind, test it, and write both into ``out``.

    A run into a folder where an earlier one was cut off goes on there.

    Args:
        trials: Methods to plug in together, each with settings of its own. Trials whose methods are of the same names
            are of one kind.
        choosing: The questions that a setting is chosen on.
        testing: Those it is tested on: another split of the same task.
        score: (group, score) to choose by; None is the task's headline.
        temperatures: Ways to answer: 0 is greedy, any other is sampled.
        seeds: Sampled runs of each test; a setting is chosen by the first seed.
        say: Is told what is being done.
        options: As for `evaluate`: batch_size, data, limit, system.

    Returns:
        What the JSON file holds and `report` shows: ``environment``, ``run``, ``task``, and by temperature ``chosen``
        (the value of every trial on the questions for choosing) and ``tested`` (of each kind the ``methods``, the
        ``seeds``' values, ``scores`` and ``differences`` to those without methods).

    Raises:
        ValueError: nothing to try, questions for choosing and for the test that are the same or of two tasks, or a
            score that they do not have.
    """
    if not trials or not temperatures:
        raise ValueError("tuning needs trials and temperatures, one of each at least")
    if type(choosing) is not type(testing) or choosing == testing:
        raise ValueError(
            f"choose on another split of the task that is tested, got {_named(choosing)} and {_named(testing)}"
        )
    group, value = score or choosing.headline
    runs = _Runs(model, processor, Path(out), overwrite, name, options, say)
    best = min if value in choosing.lower_is_better else max
    found = {}
    for temperature in temperatures:
        values = [_value(runs.result(CHOOSING, choosing, trial, temperature, 0), group, value) for trial in trials]
        kinds: dict[str, list[int]] = {}
        for i, trial in enumerate(trials):
            kinds.setdefault(_kind(trial), []).append(i)
        winners: dict[str, Trial] = {PLAIN: []}
        winners |= {kind: trials[best(members, key=values.__getitem__)] for kind, members in kinds.items()}
        drawn = range(seeds if temperature else 1)
        tests = {
            kind: [runs.result(TESTING, testing, trial, temperature, seed) for seed in drawn]
            for kind, trial in winners.items()
        }
        plain = [result.tallies for result in tests[PLAIN]]
        found[f"{temperature:g}"] = {
            "chosen": [{"methods": label(trial), "value": v} for trial, v in zip(trials, values, strict=True)],
            "tested": {
                kind: {
                    "methods": label(winners[kind]),
                    "seeds": [_value(result, group, value) for result in results],
                    **seeds_against(testing, [result.tallies for result in results], plain),
                }
                for kind, results in tests.items()
            },
        }
    record = {
        "environment": environment(),
        "run": {"model": name or model.config.name_or_path, "seeds": seeds, **options},
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "seed": 0},
        "task": {CHOOSING: _named(choosing), TESTING: _named(testing), "score": [group, value]},
        "temperatures": found,
    }
    (Path(out) / RESULTS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


class _Runs:
    """Evaluations of one model, each in a folder of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        out: Path,
        overwrite: bool,
        name: str | None,
        options: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        self.model, self.processor, self.out, self.overwrite = model, processor, out, overwrite
        self.name, self.options, self.say = name, options, say

    def result(self, part: str, task: Task, trial: Trial, temperature: float, seed: int) -> TaskResult:
        """What the model scores with the methods of ``trial`` plugged in."""
        self.say(f"{part}, temperature {temperature:g}, seed {seed}: {label(trial)}")
        folder = self.out / part / f"{temperature:g}-{seed}" / label(trial).replace(":", "-").replace("/", "-")
        with mv.using(self.model, *trial):
            found = evaluate(
                self.model,
                self.processor,
                task,
                decoding=Decoding(temperature=temperature, seed=seed),
                out=folder,
                overwrite=self.overwrite,
                name=self.name,
                **self.options,
            )
        return found.tasks[task.name]


def _value(result: TaskResult, group: str, name: str) -> float:
    if name not in result.scores.get(group, {}):
        known = (f"{g}/{n}" for g, row in result.scores.items() for n in row)
        raise ValueError(f"{result.task.name} has no score {group}/{name} here; there are {', '.join(known)}")
    return result.scores[group][name].value


def label(trial: Trial) -> str:
    """The line that plugs these methods in, "plain" for none."""
    stored = [config.to_dict() for config in trial]
    return "+".join(spec(config.pop("type"), config) for config in stored) or PLAIN


def _kind(trial: Trial) -> str:
    return "+".join(method.type for method in trial)


def _named(task: Task) -> str:
    return spec(task.name, vars(task))


def report(record: dict[str, Any]) -> RenderableType:
    """What was tested, as a table: the setting that was chosen, its score, and the difference to none."""
    group, name = record["task"]["score"]
    title = f"{record['run']['model']}, {record['task'][TESTING]}: {group}, {name}; {LEVEL:.0%} intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("temperature", "chosen"):
        table.add_column(heading)
    for heading in (name, "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for temperature, parts in record["temperatures"].items():
        for i, (kind, row) in enumerate(parts["tested"].items()):
            score, difference = (row[part][group][name] for part in ("scores", "differences"))
            cells = [
                f"{x['value']:{form}} ({x['low']:{form}}, {x['high']:{form}})"
                for x, form in ((score, ".3f"), (difference, "+.3f"))
            ]
            table.add_row("" if i else temperature, row["methods"], cells[0], "" if kind == PLAIN else cells[1])
        table.add_section()
    return table
