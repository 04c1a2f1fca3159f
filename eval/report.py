"""What an evaluation found: as a table, as JSON, and beside another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mllm_vision.eval.scores import LEVEL, RESAMPLES, Score, Tallies, differences, scored
from mllm_vision.eval.task import Task, task_class
from mllm_vision.settings import spec

RESULTS = "results.json"
VERSION = 1
_SHOWN = 5
_OF_NO_MATTER = ("model", "weights", "methods", "batch_size", "processes", "limit", "seed")
"""What two runs that are compared may differ in without a word: what is compared, and what changes no answer."""


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
    def asked(self) -> dict[str, Any]:
        """What two results should have in common, besides the task's options."""
        return {**self.data, "max_new_tokens": self.max_new_tokens}

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

    def save(self, path: str | Path, others: Mapping[str, Any] | None = None) -> None:
        """Write JSON that `load` reads.

        Args:
            path: A file, which is replaced if there is one.
            others: Results of further tasks of the same run, by name, as JSON holds them.
        """
        stored = self.to_dict()
        stored["tasks"] = {**(others or {}), **stored["tasks"]}
        Path(path).write_text(json.dumps(stored) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """What `save` wrote.

        Args:
            path: The file, or the folder of an evaluation.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        path = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            if stored["version"] > VERSION:
                raise ValueError(f"{path} is of version {stored['version']}, this mllm_vision reads {VERSION}")
            tasks = {name: TaskResult.from_dict(name, result) for name, result in stored["tasks"].items()}
            return cls(stored["run"], tasks, stored["environment"])
        except FileNotFoundError:
            raise ValueError(f"{path} is no file; give the results.json of an evaluation, or its folder") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the results.json that an evaluation writes into its folder") from error

    def __rich__(self) -> RenderableType:
        parts = [part for result in self.tasks.values() for part in _task_parts(result)]
        return Group(*parts, Text(self._caption(), style="dim"))

    def __str__(self) -> str:
        return _printed(self)

    def _caption(self) -> str:
        run, where = self.run, self.environment
        methods = " + ".join(spec(m["type"], {k: v for k, v in m.items() if k != "type"}) for m in run["methods"])
        decoding = {name: value for name, value in run["decoding"].items() if value is not None}
        how = "greedy" if not decoding["temperature"] and decoding["num_beams"] == 1 else spec("sampled", decoding)
        git = where["git"]
        commit = "" if git is None else f", commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}"
        hardware = ", ".join(where["hardware"]["gpus"]) or where["hardware"]["cpu"]
        versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
        return (
            f"{run['model']}, {methods or 'all tokens'}, {run['dtype']}, {how}; bootstrap seed {run['seed']}\n"
            f"{hardware}; {versions}{commit}"
        )


@dataclass(frozen=True)
class Comparison:
    """Two evaluations and the second less the first, on what both answered; `print` shows it.

    Args:
        names: Of the two.
        values: Of both, by task, group and name.
        tasks: Differences by task, group and name.
        units: By task, how many units were compared.
        remarks: What else differs, or was left out.
    """

    names: tuple[str, str]
    values: dict[str, dict[str, dict[str, tuple[float, float]]]]
    tasks: dict[str, dict[str, dict[str, Score]]]
    units: dict[str, int]
    remarks: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        lines = [f"A: {self.names[0]}", f"B: {self.names[1]}", *self.remarks]
        return Group(*map(self._table, self.tasks), *(Text(line, style="dim") for line in lines))

    def _table(self, task: str) -> Table:
        table = Table(title=f"{task}, {self.units[task]} units; paired bootstrap", title_justify="left")
        for heading in ("", "score", "A", "B", "B - A", f"{LEVEL:.0%} interval"):
            table.add_column(heading)
        for group, row in self.tasks[task].items():
            for name, difference in row.items():
                first = group if name == next(iter(row)) else ""
                values = (f"{value:.3f}" for value in self.values[task][group][name])
                table.add_row(first, name, *values, f"{difference.value:+.3f}", _interval(difference, "+.3f"))
            table.add_section()
        return table

    def __str__(self) -> str:
        return _printed(self)


def compare(before: Evaluation, after: Evaluation, names: tuple[str, str] = ("A", "B"), *, seed: int = 0) -> Comparison:
    """The paired differences of two evaluations' scores, with their intervals.

    Raises:
        ValueError: they have no task in common, or no unit of one.
    """
    shared = [name for name in before.tasks if name in after.tasks]
    if not shared:
        raise ValueError(f"no task in common: {', '.join(before.tasks)} and {', '.join(after.tasks)}")
    found: dict[str, dict[str, dict[str, Score]]] = {}
    values: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    units: dict[str, int] = {}
    remarks = _remarks(
        *({key: run[key] for key in sorted(run) if key not in _OF_NO_MATTER} for run in (before.run, after.run))
    )
    for name in shared:
        old, new = before.tasks[name], after.tasks[name]
        remarks += [f"{name}: {remark}" for remark in _remarks(vars(old.task), vars(new.task))]
        remarks += [f"{name}: {remark}" for remark in _remarks(old.asked, new.asked)]
        both = old.tallies.comparable(new.tallies)
        if [run.answers for run in both] != [old.tallies.answers, new.tallies.answers]:
            remarks.append(
                f"{name}: only what both answered, {both[0].answers} of {old.tallies.answers} and "
                f"{new.tallies.answers} counts"
            )
        found[name] = differences(old.task, *both, seed=seed)
        first, second = (scored(old.task, run, seed=seed) for run in both)
        values[name] = {
            group: {key: (score.value, second[group][key].value) for key, score in row.items()}
            for group, row in first.items()
        }
        units[name] = len(both[0].units)
    return Comparison(names, values, found, units, remarks)


def _remarks(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} differs: {old.get(name)!r} and {new.get(name)!r}" for name in names]


def _task_parts(result: TaskResult) -> Iterator[RenderableType]:
    """A table of the scores, what they are out of, and what was wrong."""
    parts = (result.data.get(name) for name in ("source", "config", "split"))
    source = ", ".join(str(part) for part in parts if part)
    if result.scores:
        yield _table(result.task.name, result)
        yield Text(
            f"{spec(result.task.name, vars(result.task))}, {result.questions} questions in "
            f"{len(result.tallies.units)} units, from {source}; at most {result.max_new_tokens} new tokens; the first:"
        )
        yield Text(result.prompt, style="dim")
    if result.faults:
        of = result.questions + len(result.faults)
        yield Text(f"{len(result.faults)} of {of} could not be asked and count for nothing:", style="red")
        yield Text("\n".join(f"  {id}: {fault}" for id, fault in list(result.faults.items())[:_SHOWN]), style="red")
        if len(result.faults) > _SHOWN:
            yield Text(f"  ... all are in the faults of {result.task.name} in results.json", style="red")


def _table(title: str, result: TaskResult) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("n", justify="right")
    for heading in ("score", "value", f"{LEVEL:.0%} interval"):
        table.add_column(heading)
    for group, row in result.scores.items():
        for name, score in row.items():
            cells = (group, str(result.n(group) or "")) if name == next(iter(row)) else ("", "")
            table.add_row(*cells, name, f"{score.value:.3f}", _interval(score, ".3f"))
        table.add_section()
    return table


def _interval(score: Score, form: str) -> str:
    """The bounds; a dash where all draws agree, which says that there were no others, not that there are none."""
    return "-" if score.low == score.high else f"{score.low:{form}} to {score.high:{form}}"


def _printed(shown: RenderableType) -> str:
    text = StringIO()
    Console(file=text, width=160).print(shown)
    return text.getvalue().rstrip()
