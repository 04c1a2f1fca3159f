"""Short answers compared as text: exact match (GQA), relaxed match (ChartQA), ANLS (DocVQA, InfoVQA)."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, reference: str) -> bool:
    """Equal without regard to case, ASCII punctuation and surrounding white space.

    GQA's own script compares the strings as they are; lmms-eval ignores case and punctuation, not the spaces.
    """
    left, right = (text.lower().translate(_NO_PUNCTUATION).strip() for text in (answer, reference))
    return left == right


def relaxed_match(answer: str, target: str) -> bool:
    """Within 5 % of a number, "%" dividing by 100; else equal without regard to case and surrounding white space.

    Paper: ChartQA, arXiv 2203.10244, section 5.1. Code: github.com/google-research/pix2struct, metrics.py (Apache-2.0).
    As there, a target of 0 is compared as text: of zero there are no 5 %.

    Differs: surrounding white space is ignored; nan and inf are words, so that an answer "NaN" can be right.
    """
    answer, target = answer.strip(), target.strip()
    number, wanted = _number(answer), _number(target)
    if number is None or not wanted:
        return answer.lower() == target.lower()
    return abs(number - wanted) / abs(wanted) <= 0.05


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def anls(answer: str, references: Sequence[str]) -> float:
    """1 - edit distance / length of the longer text, of the best reference; 0 where that is below 0.5.

    Paper: Scene text visual question answering, arXiv 1905.13648, section 5. Case and runs of white space are ignored.

    Differs: lmms-eval and the script of DocVQA divide by the length before white space is folded, which favours answers
    with spaces to spare.

    Raises:
        ValueError: no references.
    """
    if not references:
        raise ValueError("ANLS needs a reference to compare with, got none; a test split without answers has no score")
    folded = " ".join(answer.lower().split())
    return max(_similarity(folded, " ".join(reference.lower().split())) for reference in references)


def _similarity(left: str, right: str) -> float:
    longer = max(len(left), len(right))
    # The distance is at least the difference of the lengths: no need to compute what will be 0.
    if abs(len(left) - len(right)) > longer / 2:
        return 0.0
    similarity = 1 - edit_distance(left, right) / max(longer, 1)
    return similarity if similarity >= 0.5 else 0.0


def edit_distance(left: str, right: str) -> int:
    """Fewest insertions, deletions and replacements of a character that turn one text into the other."""
    row = list(range(len(right) + 1))
    for i, character in enumerate(left, 1):
        above, row = row, [i]
        for j, other in enumerate(right):
            row.append(above[j] if character == other else 1 + min(above[j], above[j + 1], row[j]))
    return row[-1]
