"""POPE: is the object there? Three public ways to read the answer, and the scores.

Paper: Evaluating object hallucination in large vision-language models, arXiv 2305.10355.
Code: github.com/haotian-liu/LLaVA @ 4241f08, eval_pope.py (Apache-2.0); lmms-eval 0.7.1, tasks/pope (MIT);
github.com/coder-gx/DAMRO @ ed68d51, eval_pope.py (no licence file).

Differs: lmms-eval leaves unread answers out of recall, where here they count as missed, and its yes_ratio is that of
the questions, where here it is that of the answers, as in POPE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mllm_vision.eval.metrics.ratio import ratio


def read_llava(answer: str) -> str:
    """The word "no" if one of those before the first full stop is No, no or not, else "yes"; only spaces part words."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read_lmms(answer: str) -> str | None:
    """The answer if it is yes or no and nothing else, whatever its case; "Yes." is unread."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else None


def read_damro(answer: str) -> str:
    """Which of the two occur anywhere, also inside a word (no in know): "yes", "no", "both" or "neither".

    DAMRO looks for the true word alone: "both" is right and "neither" wrong whatever the truth.
    """
    text = answer.lower()
    yes, no = "yes" in text, "no" in text
    return ("both" if no else "yes") if yes else ("no" if no else "neither")


PARSERS: dict[str, Callable[[str], str | None]] = {"llava": read_llava, "lmms": read_lmms, "damro": read_damro}

_OPPOSITE = {"yes": "no", "no": "yes"}


def yes_no_tally(truth: str, said: str | None) -> dict[str, float]:
    """Counts of one answer: n, right, hits (true positives), said_yes, is_yes.

    Args:
        truth: "yes" or "no".
        said: What a parser read. None is wrong and no yes, "both" stands for the truth, "neither" for its opposite.

    Raises:
        ValueError: another word.
    """
    if truth not in _OPPOSITE:
        raise ValueError(f"the truth of a yes/no question must be yes or no in lower case, got {truth!r}")
    if said not in {"yes", "no", "both", "neither", None}:
        raise ValueError(f"an answer must be read by one of {', '.join(PARSERS)} before it is counted, got {said!r}")
    said = {"both": truth, "neither": _OPPOSITE[truth]}.get(said or "", said)
    return {
        "n": 1,
        "right": float(said == truth),
        "hits": float(said == truth == "yes"),
        "said_yes": float(said == "yes"),
        "is_yes": float(truth == "yes"),
    }


def yes_no_scores(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Shares in 0..1: accuracy, precision, recall, f1 and yes_ratio, the share of answers that are yes."""
    return {
        "accuracy": ratio(sums["right"], sums["n"]),
        "precision": ratio(sums["hits"], sums["said_yes"]),
        "recall": ratio(sums["hits"], sums["is_yes"]),
        "f1": ratio(2 * sums["hits"], sums["said_yes"] + sums["is_yes"]),
        "yes_ratio": ratio(sums["said_yes"], sums["n"]),
    }
