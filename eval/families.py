"""Benchmarks whose questions come in families, each scored separately."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.metrics.yes_no import yes_no_scores, yes_no_tally
from mllm_vision.eval.task import Sums, Tally, Task

OVERALL = "mean of families"
"""The group of what all families come to."""


@dataclass(kw_only=True)
class FamilyTask(Task):
    """A benchmark of families.

    Args:
        questions: Of each family.
        families: Names of families joined by "/", or "all".

    A group of scores is a family, or a family and a kind of its questions as "existence_random"; a target has the
    ``family`` and the ``answer``.

    Attributes:
        known: The families that there are.
        spelled: Other spellings of an answer.

    Raises:
        ValueError: fewer than one question, or a family that there is not; the message lists those there are.
    """

    known: ClassVar[Iterable[str]]
    spelled: ClassVar[Mapping[str, str]] = MappingProxyType({})

    questions: int = 500
    families: str = "all"

    headline = (OVERALL, "accuracy")
    resumable = ("questions", "families")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.questions < 1:
            raise ValueError(f"questions must be 1 or more, got {self.questions}")
        if unknown := set(self.asked_for) - set(self.known):
            raise ValueError(f"families must be of {', '.join(self.known)}, got {', '.join(sorted(unknown))}")

    @property
    def asked_for(self) -> list[str]:
        """The families."""
        return list(self.known) if self.families == "all" else self.families.split("/")

    def tally(self, target: dict[str, str], answer: str) -> Tally:
        said = answer.strip().lower().removesuffix(".")
        if target["family"] == "existence":
            return yes_no_tally(target["answer"], said if said in ("yes", "no") else None)
        return {"n": 1, "right": float(self.spelled.get(said, said) == target["answer"])}

    def scores(self, sums: Sums) -> dict[str, Any]:
        return yes_no_scores(sums) if "said_yes" in sums else {"accuracy": ratio(sums["right"], sums["n"])}

    def summary(self, groups: Mapping[str, Sums]) -> dict[str, dict[str, Any]]:
        by_family: dict[str, list[Any]] = {}
        for group, sums in groups.items():
            by_family.setdefault(group.partition("_")[0], []).append(ratio(sums["right"], sums["n"]))
        families = [np.mean(accuracies, axis=0) for accuracies in by_family.values()]
        return {OVERALL: {"accuracy": np.mean(families, axis=0)}}
