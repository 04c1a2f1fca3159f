"""TextVQA: questions about what is written in photographs, each answered by ten people.

Paper: Towards VQA models that can read, arXiv 1904.08920.
Data: lmms-lab/textvqa, validation: 5,000 questions.
Prompt: LLaVA-1.5's, of the question file of its evaluation, which tells the model what an OCR system (Rosetta) read in
the image: the 58.2 and 61.3 of LLaVA-1.5 7B and 13B are with that help. lmms-eval leaves it out by default.

Differs: none in scoring; LLaVA-1.5's script and lmms-eval both normalise as MMF does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.metrics.vqa import textvqa_accuracy
from mllm_vision.eval.task import SHORT_ANSWER, Example, Sums, Tally, Task

__all__ = ["TextVQA"]


@dataclass(kw_only=True)
class TextVQA(Task, name="textvqa", paper="arXiv 1904.08920"):
    """Questions about text in images.

    Args:
        ocr: Whether the question says what an OCR system read.
    """

    ocr: bool = True

    data = HubData("lmms-lab/textvqa", split="validation")
    columns = "question_id, image_id, question, ocr_tokens (texts), answers (texts), image"

    def examples(self, row: Row) -> Iterable[Example]:
        lines = [row.text("question").capitalize()]
        if self.ocr:
            lines.append(f"Reference OCR token: {', '.join(row['ocr_tokens'])}")
        yield Example(
            id=str(row["question_id"]),
            question="\n".join([*lines, SHORT_ANSWER]),
            images=[row.picture()],
            target=row.texts("answers"),
            unit=str(row["image_id"]),
        )

    def tally(self, target: list[str], answer: str) -> Tally:
        return {"n": 1, "agreement": textvqa_accuracy(answer, target)}

    def scores(self, sums: Sums) -> dict[str, Any]:
        return {"accuracy": ratio(sums["agreement"], sums["n"])}
