"""Questions with lettered options: how they are put, and what an answer counts for."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from mllm_vision.eval.metrics.choice import read_letter
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.task import LETTER_ANSWER, Sums, Tally, Task


def ask(question: str, options: Sequence[str]) -> str:
    """The question, a line for each option ("A. a cat"), and the request for a letter."""
    lettered = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question, *lettered, LETTER_ANSWER])


def key(options: Sequence[str], right: int | str) -> dict[str, Any]:
    """What an answer is held against: the right letter, and the options, whose texts answers may repeat.

    Args:
        right: Index or letter of the right option.

    Raises:
        ValueError: there is no such option, or there are fewer than two or more than letters.
    """
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"a question needs 2 to {len(ascii_uppercase)} options, got {len(options)}")
    letters = list(ascii_uppercase[: len(options)])
    letter = letters[right] if isinstance(right, int) and 0 <= right < len(options) else right
    if letter not in letters:
        raise ValueError(f"the right option must be one of {', '.join(letters)} or its index, got {right!r}")
    return {"letter": letter, "options": list(options)}


class MultipleChoice(Task):
    """Base of a benchmark whose questions have lettered options and `key` as their target."""

    def tally(self, target: dict[str, Any], answer: str) -> Tally:
        return {"n": 1, "right": float(read_letter(answer, target["options"]) == target["letter"])}

    def scores(self, sums: Sums) -> dict[str, Any]:
        return {"accuracy": ratio(sums["right"], sums["n"])}
