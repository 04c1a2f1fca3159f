"""Multiple choice: which letter an answer means, and the rotations of MMBench's circular evaluation.

Paper: MMBench, arXiv 2307.06281 (circular evaluation: right only if right under every rotation).

Differs: lmms-eval reads ScienceQA likewise but without ")", ":" and option texts, SEED by its first character, and asks
a language model where it cannot read MMBench; here what is not read is None.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase


def read_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter an answer means, None if it means none.

    In this order: a letter alone, in either case; a capital with ".", ")" or ":" behind it at the start; the text of an
    option, whatever the case. Only the letters of ``options`` count.

    Raises:
        ValueError: more than 26 options.
    """
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"letters name at most {len(ascii_uppercase)} options, got {len(options)}")
    letters, text = ascii_uppercase[: len(options)], answer.strip()
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    marked = re.match(r"([A-Z])[.):]", text)
    if marked and marked[1] in letters:
        return marked[1]
    folded = [option.strip().casefold() for option in options]
    return letters[folded.index(text.casefold())] if text.casefold() in folded else None


def rotations(options: Sequence[str], right: int) -> list[tuple[list[str], int]]:
    """Every rotation of ``options`` with the index of the right one: ABCD, BCDA, CDAB, DABC."""
    if not 0 <= right < len(options):
        raise ValueError(f"the right option must be in 0..{len(options) - 1}, got {right}")
    return [([*options[k:], *options[:k]], (right - k) % len(options)) for k in range(len(options))]
