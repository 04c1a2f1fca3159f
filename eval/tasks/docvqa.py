"""DocVQA: what does the scanned document say?

Paper: DocVQA: a dataset for VQA on document images, arXiv 2007.00398.
Data: lmms-lab/DocVQA, config DocVQA, validation: 5,349 questions.
Prompt: lmms-eval's for LLaVA-style models; LLaVA-1.5 was not evaluated on it.

Differs: see `anls` on white space.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.metrics.text import anls
from mllm_vision.eval.task import ALL, SHORT_ANSWER, Example, Sums, Tally, Task

__all__ = ["DocVQA"]


@dataclass(kw_only=True)
class DocVQA(Task, name="docvqa", paper="arXiv 2007.00398"):
    """Questions about pages."""

    data = HubData("lmms-lab/DocVQA", split="validation", config="DocVQA")
    columns = "questionId, ucsf_document_id, ucsf_document_page_no, question, answers (texts), image"
    max_new_tokens = 32
    headline = (ALL, "anls")

    def examples(self, row: Row) -> Iterable[Example]:
        yield Example(
            id=str(row["questionId"]),
            question=f"{row.text('question')}\n{SHORT_ANSWER}",
            images=[row.picture()],
            target=row.texts("answers"),
            unit=f"{row['ucsf_document_id']}/{row['ucsf_document_page_no']}",
        )

    def tally(self, target: list[str], answer: str) -> Tally:
        return {"n": 1, "similarity": anls(answer, target)}

    def scores(self, sums: Sums) -> dict[str, Any]:
        return {"anls": ratio(sums["similarity"], sums["n"])}
