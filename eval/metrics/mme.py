"""MME: two yes/no questions an image; accuracy over questions and, as accuracy_plus, over images.

Paper: MME, arXiv 2306.13394. Code: its eval_tool/calculation.py; lmms-eval 0.7.1, tasks/mme (MIT).

Differs: answers are read as lmms-eval does. The authors' tool neither strips spaces and full stops nor takes y and n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_vision.eval.metrics.ratio import ratio

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read(answer: str) -> str | None:
    """The word "yes" or "no" among the first four characters, without full stops, or a lone y or n; else None."""
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def mme_tally(truths: Sequence[str], said: Sequence[str | None]) -> dict[str, float]:
    """Counts of one image: n questions, right ones, images (1), both (1 if both are right).

    Args:
        truths: "yes" or "no" of its two questions.
        said: What `read` made of the two answers, in the same order.
    """
    if (len(truths), len(said)) != (2, 2):
        raise ValueError(f"MME asks two questions an image, got {len(truths)} truths and {len(said)} answers")
    right = sum(truth == answer for truth, answer in zip(truths, said, strict=True))
    return {"n": 2, "right": right, "images": 1, "both": float(right == 2)}


def mme_scores(sums: Mapping[str, Any]) -> dict[str, Any]:
    """accuracy and accuracy_plus of one category, each in 0..100; MME reports sums of them over categories."""
    return {
        "accuracy": 100 * ratio(sums["right"], sums["n"]),
        "accuracy_plus": 100 * ratio(sums["both"], sums["images"]),
    }
