"""What a benchmark is: where its questions come from, how each is asked, what an answer counts for, how counts score.

A task is one file in `eval/tasks/`, or a module that a third party names in the entry-point group
``mllm_vision.tasks``. Nothing else lists it.

An answer becomes a *tally*, counts that add up ({"n": 1, "right": 1}); sums of tallies become scores. Because every
score is a function of sums, its interval comes from drawing the summands anew (`mllm_vision.eval.scores`).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from mllm_vision.eval.data import HubData, Row, rows
from mllm_vision.registry import package_modules
from mllm_vision.settings import Settings, parse_spec

ENTRY_POINT_GROUP = "mllm_vision.tasks"
ALL = "all"
"""The group of a task that has no others."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
"""How LLaVA-1.5's evaluation ends a question."""

Tally = dict[str, float]
Sums = Mapping[str, Any]

_TASKS: dict[str, type[Task]] = {}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question, as the model is asked it.

    Args:
        id: Told apart by it within the task; the same in every run.
        question: All of the text, instruction included; ``<image>`` marks say where images stand, none: before it.
        images: Each a function that loads the picture.
        target: What the answer is held against, as JSON holds it.
        groups: The sets of answers that it is scored in.
        unit: What it is drawn with when an interval is estimated: questions about one image stand or fall together.
    """

    id: str
    question: str
    images: Sequence[Callable[[], Image.Image]]
    target: Any
    groups: tuple[str, ...] = (ALL,)
    unit: str


@dataclass(frozen=True)
class Questions:
    """What `Task.load` found.

    Args:
        examples: What can be asked.
        faults: By id, what is wrong with each row that cannot be.
        provenance: Where they come from.
    """

    examples: list[Example]
    faults: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


class Task(Settings, ABC):
    """Base of a benchmark: a keyword-only dataclass of its options.

    Attributes:
        name: By which it is asked for.
        paper: Its source.
        data: Its data set on the hub; None if it has none.
        max_new_tokens: Longest answer.
        columns: Of its data set, and so of a local copy, in words.
        reads_data: Whether there are data to read; not where a task makes its own.
        headline: (group, score) of the one number to quote.
        lower_is_better: Names of scores that count faults.
        resumable: Options in which a run may differ from the one whose answers it goes on with: those that choose
            questions or say what answers count for.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str]
    data: ClassVar[HubData | None] = None
    columns: ClassVar[str] = ""
    reads_data: ClassVar[bool] = True
    max_new_tokens: ClassVar[int] = 16
    headline: ClassVar[tuple[str, str]] = (ALL, "accuracy")
    lower_is_better: ClassVar[tuple[str, ...]] = ()
    resumable: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, name: str | None = None, paper: str = "", **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name, cls.paper = name, paper
            known = _TASKS.setdefault(name, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"two tasks are called {name!r}: {known.__module__} and {cls.__module__}")
            _TASKS[name] = cls

    @abstractmethod
    def examples(self, row: Row) -> Iterable[Example]:
        """The questions of a row of the data set."""

    @abstractmethod
    def tally(self, target: Any, answer: str) -> Tally:
        """What one answer counts for, ``n`` among it."""

    @abstractmethod
    def scores(self, sums: Sums) -> dict[str, Any]:
        """Scores from sums of tallies: each sum a number, or an array of them for as many results."""

    def tally_unit(self, answered: Sequence[tuple[Any, str]]) -> Tally:
        """What the (target, answer) pairs of one unit in one group count for: their tallies added up."""
        total: Counter[str] = Counter()
        for target, answer in answered:
            total.update(self.tally(target, answer))
        return dict(total)

    def summary(self, groups: Mapping[str, Sums]) -> dict[str, dict[str, Any]]:
        """Scores of further groups, from the sums of all groups."""
        return {}

    def rows(self, data: Path | None) -> tuple[Iterable[Row], dict[str, Any]]:
        """The rows of the data set and where they come from; ``data`` as for `load`."""
        if data is None and self.data is None:
            raise ValueError(f"{self.name} has no data set on the hub; give the folder of a local copy (--data)")
        return rows(self.data, data)

    def load(self, data: Path | None = None) -> Questions:
        """Every question, from a local copy in the folder ``data`` or from the hub.

        Raises:
            ValueError: there are no questions there, or none that can be asked; the message says what is wrong.
        """
        found, provenance = self.rows(data)
        examples: dict[str, Example] = {}
        faults: dict[str, str] = {}
        for number, row in enumerate(found):
            try:
                for example in self.examples(row):
                    if example.id in examples:
                        faults[f"row {number}"] = f"the id {example.id!r} is that of an earlier row"
                    else:
                        examples[example.id] = example
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                faults[f"row {number}"] = f"{type(error).__name__}: {error}"
        if not examples:
            first = next(iter(faults.values()), "there are no rows")
            raise ValueError(f"{self.name}: no question can be read from {provenance['source']}; {first}")
        return Questions(list(examples.values()), faults, provenance)


def list_tasks() -> list[type[Task]]:
    """Every task that is installed, by name."""
    _discover()
    return [_TASKS[name] for name in sorted(_TASKS)]


def parse_tasks(specs: str | Sequence[str | Task]) -> list[Task]:
    """Tasks from their names and options, as ``"pope,scenes:questions=100"``.

    Raises:
        ValueError: a task that nobody knows, or one that is asked for twice; the message lists those that exist.
    """
    named: dict[str, Task] = {}
    given = [part for part in specs.split(",") if part.strip()] if isinstance(specs, str) else specs
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"give a task or several, as pope,gqa, got {specs!r}; the tasks are {_names()}")
    for spec in given:
        if not isinstance(spec, str | Task):
            raise ValueError(f"a task is a name with options or an instance, as POPE(), got {spec!r}")
        task = spec if isinstance(spec, Task) else _parse_task(spec)
        if not task.name:
            raise ValueError(f"{type(task).__name__} has no name; give it one: class ...(Task, name=...)")
        if task.name in named:
            raise ValueError(f"{task.name} is asked for twice; a run holds one result of each task")
        named[task.name] = task
    return list(named.values())


def task_class(name: str) -> type[Task]:
    """The class of the task called ``name``.

    Raises:
        ValueError: nobody knows that name; the message lists the names that exist.
    """
    _discover()
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks are {_names()}")
    return _TASKS[name]


def _names() -> str:
    _discover()
    return ", ".join(sorted(_TASKS))


def _parse_task(spec: str) -> Task:
    name, options = parse_spec(spec)
    return task_class(name)(**options)


@functools.cache
def _discover() -> None:
    package_modules("mllm_vision.eval.tasks")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        point.load()
