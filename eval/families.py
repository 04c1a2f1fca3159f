"""Benchmarks whose questions come in families, each scored separately."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from mllm_vision.eval.task import Task

OVERALL = "mean of families"
"""The group of what all families come to."""


@dataclass(kw_only=True)
class FamilyTask(Task):
    """A benchmark of families.

    Args:
        questions: Of each family.
        families: Names of families joined by "/", or "all".

    Attributes:
        known: The families that there are.

    Raises:
        ValueError: fewer than one question, or a family that there is not; the message lists those there are.
    """

    known: ClassVar[Iterable[str]]

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
