"""VQAv2: open questions about photographs, each answered by ten people.

Paper: Making the V in VQA matter, arXiv 1612.00837; the accuracy is that of VQA, arXiv 1505.00468.
Data: lmms-lab/VQAv2, validation: 214,354 questions about 40,504 images of COCO val2014. Published numbers are often of
test-dev, whose answers are with the challenge's server alone.
Prompt: LLaVA-1.5's.

Differs: public evaluators normalise differently, and the option ``reading`` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.metrics.vqa import lmms_vqa_accuracy, normalise_textvqa, vqa_accuracy
from mllm_vision.eval.task import ALL, SHORT_ANSWER, Example, Sums, Tally, Task

__all__ = ["VQAv2"]


@dataclass(kw_only=True)
class VQAv2(Task, name="vqav2", paper="arXiv 1612.00837"):
    """Open questions, in all and by type of answer: yes/no, number, other.

    Args:
        reading: "challenge" normalises the answer as LLaVA-1.5's script does before it is handed in, then scores it as
            the challenge does; "lmms" is lmms-eval's.
    """

    reading: Literal["challenge", "lmms"] = "challenge"

    data = HubData("lmms-lab/VQAv2", split="validation")
    columns = 'question_id, image_id, question, answer_type, answers ([{"answer": ...}, ...]), image'
    resumable = ("reading",)

    def examples(self, row: Row) -> Iterable[Example]:
        answers = [given["answer"] for given in row["answers"] or ()]
        if not answers:
            raise ValueError("there are no answers to compare with; a test split without answers has no score")
        yield Example(
            id=str(row["question_id"]),
            question=f"{row.text('question')}\n{SHORT_ANSWER}",
            images=[row.picture()],
            target=answers,
            groups=(ALL, row.text("answer_type")),
            unit=str(row["image_id"]),
        )

    def tally(self, target: list[str], answer: str) -> Tally:
        if self.reading == "lmms":
            return {"n": 1, "agreement": lmms_vqa_accuracy(answer, target)}
        return {"n": 1, "agreement": vqa_accuracy(normalise_textvqa(answer), target)}

    def scores(self, sums: Sums) -> dict[str, Any]:
        return {"accuracy": ratio(sums["agreement"], sums["n"])}
