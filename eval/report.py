"""What an evaluation found: as a table, as JSON, and beside another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mllm_vision.eval.scores import LEVEL, RESAMPLES, Score, Tallies, differences
from mllm_vision.eval.task import Task, task_class
from mllm_vision.settings import spec

VERSION = 1


@dataclass(frozen=True)
class TaskResult:
    """What an evaluation found on one task.

    Args:
        task: With its options.
        data: Where the questions come from.
        prompt: Of the first question.
        max_new_tokens: Longest answer.
        questions: How many were answered.
        faults: By id, what was wrong with those that could not be asked; they count for nothing.
        seconds: Of this run, which may have found answers of an earlier one.
        scores: By group and name.
        tallies: Behind the scores.
    """

    task: Task
    data: dict[str, Any]
    prompt: str
    max_new_tokens: int
    questions: int
    faults: dict[str, str]
    seconds: float
    scores: dict[str, dict[str, Score]]
    tallies: Tallies

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "options": vars(self.task),
            "data": self.data,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "questions": self.questions,
            "units": len(self.tallies.units),
            "faults": self.faults,
            "seconds": round(self.seconds, 1),
            "scores": {
                group: {"n": self.n(group), **{name: asdict(score) for name, score in scores.items()}}
                for group, scores in self.scores.items()
            },
            "tallies": self.tallies.to_dict(),
        }

    @classmethod
    def from_dict(cls, name: str, stored: dict[str, Any]) -> TaskResult:
        """What `to_dict` made."""
        task = task_class(name)(**stored["options"])
        scores = {
            group: {key: Score(**score) for key, score in row.items() if key != "n"}
            for group, row in stored["scores"].items()
        }
        kept = {key: stored[key] for key in ("data", "prompt", "max_new_tokens", "questions", "faults", "seconds")}
        return cls(task=task, scores=scores, tallies=Tallies.from_dict(stored["tallies"]), **kept)

    def n(self, group: str) -> int | None:
        """What the scores of a group are out of; None for a group that sums up others."""
        counts = self.tallies.groups.get(group)
        return None if counts is None else int(counts["n"].sum())

    def values(self) -> dict[str, dict[str, float]]:
        """Scores without intervals, with their n; of groups that have one."""
        return {
            group: {"n": n, **{name: score.value for name, score in scores.items()}}
            for group, scores in self.scores.items()
            if (n := self.n(group)) is not None
        }

    @property
    def headline(self) -> Score:
        """The one score to quote.

        Raises:
            ValueError: no question was asked that has a part in it.
        """
        group, name = self.task.headline
        if group not in self.scores:
            raise ValueError(f"{self.task.name} is quoted by {group}, {name}, and no such question was asked; ask more")
        return self.scores[group][name]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; `print` shows it.

    Args:
        run: The model, its methods and how it answered.
        tasks: Results by name of the task.
        environment: Versions, hardware, commit, date.
    """

    run: dict[str, Any]
    tasks: dict[str, TaskResult]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "version": VERSION,
            "environment": self.environment,
            "run": self.run,
            "intervals": {"level": LEVEL, "resamples": RESAMPLES, "seed": self.run["seed"]},
            "tasks": {name: result.to_dict() for name, result in self.tasks.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """What `save` wrote.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            tasks = {name: TaskResult.from_dict(name, result) for name, result in stored["tasks"].items()}
            return cls(stored["run"], tasks, stored["environment"])
        except FileNotFoundError:
            raise ValueError(f"{path} is no file; give the results.json of an evaluation") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the results.json of an evaluation: {error!r}") from error

    def __rich__(self) -> RenderableType:
        tables = [_table(name, result.scores, result) for name, result in self.tasks.items()]
        faults = [
            Text(f"{name}: {len(result.faults)} could not be asked and count for nothing; {_first(result.faults)}")
            for name, result in self.tasks.items()
            if result.faults
        ]
        return Group(*tables, *faults, Text(self._caption(), style="dim"))

    def __str__(self) -> str:
        return _printed(self)

    def _caption(self) -> str:
        run, where = self.run, self.environment
        methods = " + ".join(spec(m["type"], {k: v for k, v in m.items() if k != "type"}) for m in run["methods"])
        decoding = {name: value for name, value in run["decoding"].items() if value is not None}
        how = "greedy" if not decoding["temperature"] and decoding["num_beams"] == 1 else f"{decoding}"
        git = where["git"]
        commit = "" if git is None else f", commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}"
        hardware = ", ".join(where["hardware"]["gpus"]) or where["hardware"]["cpu"]
        versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
        return (
            f"{run['model']}, {methods or 'all tokens'}, {run['dtype']}, {how}, seed {run['seed']}\n"
            f"{hardware}; {versions}{commit}"
        )


@dataclass(frozen=True)
class Comparison:
    """A second evaluation less a first, on what both were asked; `print` shows it.

    Args:
        names: Of the two.
        tasks: Differences by task, group and name.
        units: By task, how many units were compared.
        remarks: What else differs, or was left out.
    """

    names: tuple[str, str]
    tasks: dict[str, dict[str, dict[str, Score]]]
    units: dict[str, int]
    remarks: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        tables = [_table(f"{name}, {self.units[name]} units", scores) for name, scores in self.tasks.items()]
        lines = [f"{self.names[1]} less {self.names[0]}; paired bootstrap intervals", *self.remarks]
        return Group(*tables, *(Text(line, style="dim") for line in lines))

    def __str__(self) -> str:
        return _printed(self)


def compare(before: Evaluation, after: Evaluation, names: tuple[str, str] = ("A", "B"), *, seed: int = 0) -> Comparison:
    """The paired differences of two evaluations' scores, with their intervals.

    Raises:
        ValueError: they have no task in common, or no unit of one.
    """
    both = [name for name in before.tasks if name in after.tasks]
    if not both:
        raise ValueError(f"no task in common: {', '.join(before.tasks)} and {', '.join(after.tasks)}")
    found: dict[str, dict[str, dict[str, Score]]] = {}
    units: dict[str, int] = {}
    remarks = []
    for name in both:
        old, new = before.tasks[name], after.tasks[name]
        remarks += _remarks(name, old, new)
        theirs = set(new.tallies.units)
        common = [unit for unit in old.tallies.units if unit in theirs]
        if not common:
            raise ValueError(f"the two were asked no question of {name} in common")
        if len(common) < max(len(old.tallies.units), len(theirs)):
            remarks.append(f"{name}: only the {len(common)} units that both were asked")
        found[name] = differences(old.task, old.tallies.only(common), new.tallies.only(common), seed=seed)
        units[name] = len(common)
    return Comparison(names, found, units, remarks)


def _remarks(name: str, old: TaskResult, new: TaskResult) -> list[str]:
    pairs = {
        "options": (vars(old.task), vars(new.task)),
        "data": (old.data, new.data),
        "prompt": (old.prompt, new.prompt),
        "max_new_tokens": (old.max_new_tokens, new.max_new_tokens),
    }
    return [f"{name}: {what} differ: {a!r} and {b!r}" for what, (a, b) in pairs.items() if a != b]


def _table(title: str, scores: Mapping[str, Mapping[str, Score]], result: TaskResult | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("n", justify="right")
    for heading in ("score", "", f"{LEVEL:.0%} interval"):
        table.add_column(heading)
    for group, row in scores.items():
        n = "" if result is None else str(result.n(group) or "")
        for name, score in row.items():
            first = name == next(iter(row))
            interval = f"{score.low:.3f} to {score.high:.3f}"
            table.add_row(group if first else "", n if first else "", name, f"{score.value:.3f}", interval)
        table.add_section()
    return table


def _first(faults: Mapping[str, str]) -> str:
    id, fault = next(iter(faults.items()))
    return f"{id}: {fault}"


def _printed(shown: RenderableType) -> str:
    text = StringIO()
    Console(file=text, width=160).print(shown)
    return text.getvalue().rstrip()
