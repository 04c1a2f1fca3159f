"""MMBench: one question on one ability, right only if it is right under every rotation of its options.

Paper: MMBench: is your multi-modal model an all-around player?, arXiv 2307.06281, section 4 (circular evaluation).
Data: lmms-lab/MMBench, config en, dev: 1,164 questions, which the release repeats with options in another order, 4,329
rows in all. Rows numbered from a million on are those repetitions: they are left out and rotations made of the rest.
Prompt: LLaVA-1.5's (model_vqa_mmbench.py --single-pred-prompt): hint if there is one, question, options, the request
for a letter.

Differs: the release (July 2023) rotates only the first three of four options of 53 questions; here every question has
as many rotations as options. The official evaluation asks a language model what letter an answer means
that it cannot read; here such an answer is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from mllm_vision.eval.choices import MultipleChoice, ask, key
from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.metrics.choice import rotations
from mllm_vision.eval.task import ALL, Example, Tally

__all__ = ["MMBench"]

_REPETITIONS = 10**6
_LETTERS = "ABCDE"


@dataclass(kw_only=True)
class MMBench(MultipleChoice, name="mmbench", paper="arXiv 2307.06281"):
    """Questions by ability (the second of MMBench's three levels) and in all.

    Args:
        circular: Whether each question is asked under every rotation of its options; else once, as it stands.
    """

    circular: bool = True

    data = HubData("lmms-lab/MMBench", split="dev", config="en")
    columns = "index, question, A, B, C, D (as many as there are), answer (letter), image; hint, L2-category if there"

    def examples(self, row: Row) -> Iterable[Example]:
        index = int(row["index"])
        if index >= _REPETITIONS:
            return
        hint, question = row.get("hint"), row.text("question")
        given = [str(option) for option in takewhile(_is_there, (row.get(letter) for letter in _LETTERS))]
        right = _LETTERS.index(key(given, row["answer"])["letter"])
        for turn, (options, place) in enumerate(rotations(given, right)[: None if self.circular else 1]):
            yield Example(
                id=f"{index}/{turn}",
                question=ask(f"{hint}\n{question}" if _is_there(hint) else question, options),
                images=[row.picture()],
                target=key(options, place),
                groups=(ALL, row.text("L2-category")) if row.get("L2-category") else (ALL,),
                unit=str(index),
            )

    def tally_unit(self, answered: Sequence[tuple[Any, str]]) -> Tally:
        return {"n": 1, "right": float(all(self.tally(target, answer)["right"] for target, answer in answered))}


def _is_there(value: Any) -> bool:
    """Whether a cell of the table that MMBench was released as holds something: an empty one was read as nan."""
    return str(value).lower() not in ("", "nan", "none")
