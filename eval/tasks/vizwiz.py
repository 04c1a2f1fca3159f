"""VizWiz-VQA: blind people's questions about photographs that they took; some cannot be answered.

Paper: VizWiz grand challenge: answering visual questions from blind people, arXiv 1802.08218.
Data: lmms-lab/VizWiz-VQA, val: 4,319 questions, one an image. LLaVA-1.5's number is of test-dev, whose answers are
with the challenge's server alone.
Prompt: LLaVA-1.5's, of the question file of its evaluation.

Differs: public evaluators normalise differently, and the option ``reading`` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.metrics.vqa import normalise_textvqa, textvqa_accuracy, vizwiz_accuracy
from mllm_vision.eval.task import ALL, SHORT_ANSWER, Example, Sums, Tally, Task

__all__ = ["VizWiz"]

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


@dataclass(kw_only=True)
class VizWiz(Task, name="vizwiz", paper="arXiv 1802.08218"):
    """Blind people's questions, in all and by category of answer.

    Args:
        reading: "challenge" normalises the answer as LLaVA-1.5's script does before it is handed in, then scores it as
            the challenge does; "lmms" is lmms-eval's.
    """

    reading: Literal["challenge", "lmms"] = "challenge"

    data = HubData("lmms-lab/VizWiz-VQA", split="val")
    columns = "question_id, question, answers (texts), image; category if there"
    resumable = ("reading",)

    def examples(self, row: Row) -> Iterable[Example]:
        yield Example(
            id=str(row["question_id"]),
            question="\n".join([row.text("question").capitalize(), UNANSWERABLE, SHORT_ANSWER]),
            images=[row.picture()],
            target=row.texts("answers"),
            groups=(ALL, row.text("category")) if row.get("category") else (ALL,),
            unit=str(row["question_id"]),
        )

    def tally(self, target: list[str], answer: str) -> Tally:
        if self.reading == "lmms":
            return {"n": 1, "agreement": textvqa_accuracy(answer, target)}
        return {"n": 1, "agreement": vizwiz_accuracy(normalise_textvqa(answer), target)}

    def scores(self, sums: Sums) -> dict[str, Any]:
        return {"accuracy": ratio(sums["agreement"], sums["n"])}
