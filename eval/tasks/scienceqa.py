"""ScienceQA-IMG: questions from school books, those of its test split that have an image.

Paper: Learn to explain: multimodal reasoning via thought chains for science question answering, arXiv 2209.09513.
Data: lmms-lab/ScienceQA, config ScienceQA-IMG, test: 2,017 questions.
Prompt: LLaVA-1.5's, of the question file of its evaluation (CQM-A) with --single-pred-prompt: context if there is
one, question, options, the request for a letter.

Differs: LLaVA-1.5's script also finds "The answer is B.", lmms-eval reads no option texts; see `read_letter`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mllm_vision.eval.choices import MultipleChoice, ask, key
from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.task import ALL, Example

__all__ = ["ScienceQA"]


@dataclass(kw_only=True)
class ScienceQA(MultipleChoice, name="scienceqa", paper="arXiv 2209.09513"):
    """Science questions with an image, in all and by subject."""

    data = HubData("lmms-lab/ScienceQA", split="test", config="ScienceQA-IMG")
    columns = "question, choices (texts), answer (index), image; hint, subject if there"

    def examples(self, row: Row) -> Iterable[Example]:
        hint, options = row.get("hint"), row.texts("choices")
        context = f"Context: {hint}\n" if hint else ""
        yield Example(
            id=str(row.number),
            question=ask(context + row.text("question"), options),
            images=[row.picture()],
            target=key(options, row["answer"]),
            groups=(ALL, row.text("subject")) if row.get("subject") else (ALL,),
            unit=str(row.number),
        )
