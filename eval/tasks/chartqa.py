"""ChartQA: questions about charts, half written by people, half made from people's summaries.

Paper: ChartQA: a benchmark for question answering about charts with visual and logical reasoning, arXiv 2203.10244.
Data: lmms-lab/ChartQA, test: 2,500 questions, 1,250 of either kind.
Prompt: lmms-eval's for LLaVA-style models; LLaVA-1.5 was not evaluated on it.

Differs: see `relaxed_match` on white space, nan and inf.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.metrics.text import relaxed_match
from mllm_vision.eval.task import Example, Sums, Tally, Task

__all__ = ["ChartQA"]

OVERALL = "overall"
_KINDS = {"human_test": "human", "augmented_test": "augmented"}


@dataclass(kw_only=True)
class ChartQA(Task, name="chartqa", paper="arXiv 2203.10244"):
    """Questions about charts, overall and by who wrote them."""

    data = HubData("lmms-lab/ChartQA", split="test")
    columns = "question, answer, type (human_test or augmented_test), image"
    headline = (OVERALL, "relaxed_accuracy")

    def examples(self, row: Row) -> Iterable[Example]:
        yield Example(
            id=str(row.number),
            question=f"{row.text('question')}\nAnswer the question with a single word.",
            images=[row.picture()],
            target=row.text("answer"),
            groups=(OVERALL, _KINDS[row["type"]]),
            unit=row.fingerprint(),
        )

    def tally(self, target: str, answer: str) -> Tally:
        return {"n": 1, "right": float(relaxed_match(answer, target))}

    def scores(self, sums: Sums) -> dict[str, Any]:
        return {"relaxed_accuracy": ratio(sums["right"], sums["n"])}
