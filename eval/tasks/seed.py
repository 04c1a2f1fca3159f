"""SEED-Bench: multiple choice on nine dimensions of understanding, the part about images.

Paper: SEED-Bench: benchmarking multimodal LLMs with generative comprehension, arXiv 2307.16125.
Data: lmms-lab/SEED-Bench, test: 17,990 questions, of which 14,233 about images; those about videos are left out.
Prompt: LLaVA-1.5's: question, four options, the request for a letter.

Differs: LLaVA-1.5's script takes nothing but the letter itself, lmms-eval the first character of whatever was said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mllm_vision.eval.choices import MultipleChoice, ask, key
from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.task import ALL, Example

__all__ = ["SEED"]

_DIMENSIONS = {
    1: "scene understanding",
    2: "instance identity",
    3: "instance attributes",
    4: "instance location",
    5: "instance counting",
    6: "spatial relation",
    7: "instance interaction",
    8: "visual reasoning",
    9: "text recognition",
}


@dataclass(kw_only=True)
class SEED(MultipleChoice, name="seed", paper="arXiv 2307.16125"):
    """Questions about images, in all and by dimension."""

    data = HubData("lmms-lab/SEED-Bench", split="test")
    columns = (
        "question_id, data_id, data_type (image), question_type_id, question, choice_a to choice_d, answer "
        "(letter), image"
    )

    def examples(self, row: Row) -> Iterable[Example]:
        if row["data_type"] != "image":
            return
        options = [row.text(f"choice_{letter}") for letter in "abcd"]
        yield Example(
            id=str(row["question_id"]),
            question=ask(row.text("question"), options),
            images=[row.picture()],
            target=key(options, row["answer"]),
            groups=(ALL, _DIMENSIONS[int(row["question_type_id"])]),
            unit=str(row["data_id"]),
        )
