"""Scores with intervals, and differences of two runs, by drawing the units of a benchmark anew.

The percentile bootstrap: units (an image with its questions, a question with its rotations) are drawn with replacement,
sums of their tallies are scored, and the middle 95 % of the results are the interval. Two runs over the same units are
compared under the same draws, so that what is hard for both does not widen the interval of the difference. Where every
answer is right, or none, the interval has no width: the sample then says nothing about how rare the exception is.

Shapes: U units, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mllm_vision.eval.task import Example, Task

RESAMPLES = 2000
LEVEL = 0.95
_CELLS = 2**24
"""Draws held at once: R x U is cut along R."""

Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Score:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Tallies:
    """What every unit counts for.

    Args:
        units: Their names, U of them.
        groups: By group and by count, (U,): 0 for a unit that is not in the group.
    """

    units: list[str]
    groups: dict[str, dict[str, np.ndarray]]

    @classmethod
    def of(cls, task: Task, answered: Sequence[tuple[Example, str]]) -> Tallies:
        """The tallies of examples with their answers."""
        by_unit: dict[str, dict[str, list[tuple[Any, str]]]] = {}
        for example, answer in answered:
            for group in example.groups:
                by_unit.setdefault(example.unit, {}).setdefault(group, []).append((example.target, answer))
        columns: dict[str, dict[str, np.ndarray]] = {}
        for place, groups in enumerate(by_unit.values()):
            for group, pairs in groups.items():
                for count, number in task.tally_unit(pairs).items():
                    counts = columns.setdefault(group, {})
                    counts.setdefault(count, np.zeros(len(by_unit)))[place] = number
        return cls(list(by_unit), columns)

    @property
    def answers(self) -> int:
        """n of all groups together."""
        return int(sum(counts["n"].sum() for counts in self.groups.values()))

    def comparable(self, other: Tallies) -> tuple[Tallies, Tallies]:
        """Both, cut to what they can be compared on: a unit in a group of which both answered equally many questions.

        Raises:
            ValueError: there is no such unit.
        """
        theirs = set(other.units)
        common = [unit for unit in self.units if unit in theirs]
        mine, others = self.only(common), other.only(common)
        groups = [group for group in mine.groups if group in others.groups]
        alike = {group: mine.groups[group]["n"] == others.groups[group]["n"] for group in groups}
        asked = {group: alike[group] & (mine.groups[group]["n"] > 0) for group in groups}
        if not any(cells.any() for cells in asked.values()):
            raise ValueError("the two have no answered question in common")
        units = [unit for unit, used in zip(common, np.any(list(asked.values()), axis=0), strict=True) if used]
        return mine._cut(asked).only(units), others._cut(asked).only(units)

    def _cut(self, asked: Mapping[str, np.ndarray]) -> Tallies:
        """With nothing counted but where ``asked`` (U,) says so, and without the groups of which nothing is left."""
        left = {group: cells for group, cells in asked.items() if cells.any()}
        return Tallies(self.units, {g: {name: v * left[g] for name, v in self.groups[g].items()} for g in left})

    def only(self, units: Sequence[str]) -> Tallies:
        """Of these units alone, in this order."""
        place = {unit: i for i, unit in enumerate(self.units)}
        rows = [place[unit] for unit in units]
        return Tallies(
            list(units), {group: {n: v[rows] for n, v in counts.items()} for group, counts in self.groups.items()}
        )

    @classmethod
    def mean(cls, runs: Sequence[Tallies]) -> Tallies:
        """The mean of several runs over the same units."""
        first, *others = runs
        if any(set(run.units) != set(first.units) for run in others):
            raise ValueError("runs over different units have no mean; give each the same questions")
        same_order = [first, *(run.only(first.units) for run in others)]
        return cls(
            first.units,
            {
                group: {name: np.mean([run.groups[group][name] for run in same_order], axis=0) for name in counts}
                for group, counts in first.groups.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "units": self.units,
            "groups": {g: {name: v.tolist() for name, v in counts.items()} for g, counts in self.groups.items()},
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Tallies:
        """What `to_dict` made."""
        groups = {g: {name: np.array(v) for name, v in counts.items()} for g, counts in stored["groups"].items()}
        return cls(stored["units"], groups)


def scored(task: Task, tallies: Tallies, *, seed: int = 0) -> dict[str, dict[str, Score]]:
    """Every score of every group, with its interval.

    Args:
        seed: Of the draws.
    """
    if not tallies.units:
        return {}
    values = _scores(task, tallies, np.ones((1, len(tallies.units))))
    draws = _resampled(lambda weights: _scores(task, tallies, weights), len(tallies.units), seed)
    return _with_intervals(values, draws)


def differences(task: Task, before: Tallies, after: Tallies, *, seed: int = 0) -> dict[str, dict[str, Score]]:
    """Scores after less scores before, of `comparable` tallies under the same draws."""

    def difference(weights: np.ndarray) -> Scores:
        old, new = _scores(task, before, weights), _scores(task, after, weights)
        return {group: {name: new[group][name] - scores[name] for name in scores} for group, scores in old.items()}

    n = len(before.units)
    return _with_intervals(difference(np.ones((1, n))), _resampled(difference, n, seed))


def seeds_against(
    task: Task, runs: Sequence[Tallies], baseline: Sequence[Tallies], *, seed: int = 0
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """``scores`` of runs that differ by chance, together, and their ``differences`` to a baseline's, for JSON.

    The tallies of the runs are averaged unit by unit, so the intervals are about the questions, not about the seeds.
    """
    mean, theirs = Tallies.mean(runs), Tallies.mean(baseline)
    found = {
        "scores": scored(task, mean, seed=seed),
        "differences": differences(task, *theirs.comparable(mean), seed=seed),
    }
    return {
        kind: {group: {name: asdict(score) for name, score in row.items()} for group, row in groups.items()}
        for kind, groups in found.items()
    }


def _scores(task: Task, tallies: Tallies, weights: np.ndarray) -> Scores:
    """Scores under weights (R, U), each (R,)."""
    sums: dict[str, Mapping[str, Any]] = {
        group: _drawn({name: weights @ column for name, column in counts.items()})
        for group, counts in tallies.groups.items()
    }
    return {group: task.scores(counts) for group, counts in sums.items()} | task.summary(sums)


def _drawn(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums without those of draws in which nobody of the group is: they say nothing, not zero."""
    nobody = sums["n"] == 0
    return {name: np.where(nobody, np.nan, sum) for name, sum in sums.items()} if nobody.any() else sums


def _resampled(score: Callable[[np.ndarray], Scores], units: int, seed: int) -> Scores:
    parts = [score(weights) for weights in _draws(units, seed)]
    return {
        group: {name: np.concatenate([part[group][name] for part in parts]) for name in scores}
        for group, scores in parts[0].items()
    }


def _draws(units: int, seed: int) -> Iterator[np.ndarray]:
    """How often each unit is drawn, (r, U), until there are R rows."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _CELLS // units)
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        yield generator.multinomial(units, np.full(units, 1 / units), size=rows).astype(float)


def _with_intervals(values: Scores, draws: Scores) -> dict[str, dict[str, Score]]:
    tails = [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]
    return {
        group: {
            name: Score(float(value[0]), *map(float, np.nanpercentile(draws[group][name], tails)))
            for name, value in scores.items()
        }
        for group, scores in values.items()
    }
