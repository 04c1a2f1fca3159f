"""MME: two yes/no questions an image, one to be affirmed and one to be denied, in fourteen categories.

Paper: MME: a comprehensive evaluation benchmark for multimodal large language models, arXiv 2306.13394.
Data: lmms-lab/MME, test: 2,374 questions about 1,187 images.
Prompt: LLaVA-1.5's, of the question file of its evaluation: "Please answer yes or no." makes way for its own request.

Differs: an image one of whose questions could not be asked has no part in accuracy_plus. See
`mllm_vision.eval.metrics.mme` on how answers are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.metrics.mme import COGNITION, PERCEPTION, mme_scores, mme_tally, read
from mllm_vision.eval.task import SHORT_ANSWER, Example, Sums, Tally, Task

__all__ = ["MME"]

_TOTALS = {"perception": PERCEPTION, "cognition": COGNITION}


@dataclass(kw_only=True)
class MME(Task, name="mme", paper="arXiv 2306.13394"):
    """Yes/no questions by category, with the sums over the categories of perception and of cognition.

    The two sums, of at most 2,000 and 800, are of the categories that were asked.
    """

    data = HubData("lmms-lab/MME", split="test")
    columns = "question_id (the same for both questions of an image), category, question, answer (Yes or No), image"
    headline = ("perception", "score")

    def examples(self, row: Row) -> Iterable[Example]:
        category, truth = row["category"], row.text("answer").strip().lower()
        if category not in (*PERCEPTION, *COGNITION):
            raise ValueError(f"category must be one of {', '.join((*PERCEPTION, *COGNITION))}, got {category!r}")
        if truth not in ("yes", "no"):
            raise ValueError(f"answer must be yes or no, got {truth!r}")
        asked = row.text("question").strip().removesuffix("Please answer yes or no.").strip()
        yield Example(
            id=f"{row['question_id']}/{row.number}",
            question=f"{asked}\n{SHORT_ANSWER}",
            images=[row.picture()],
            target=truth,
            groups=(category,),
            unit=f"{category}/{row['question_id']}",
        )

    def tally(self, target: str, answer: str) -> Tally:
        return {"n": 1, "right": float(read(answer) == target), "images": 0, "both": 0}

    def tally_unit(self, answered: Sequence[tuple[str, str]]) -> Tally:
        if len(answered) != 2:
            return super().tally_unit(answered)
        truths, said = zip(*answered, strict=True)
        return mme_tally(truths, [read(answer) for answer in said])

    def scores(self, sums: Sums) -> dict[str, Any]:
        return mme_scores(sums)

    def summary(self, groups: Mapping[str, Sums]) -> dict[str, dict[str, Any]]:
        totals = {}
        for name, categories in _TOTALS.items():
            if asked := [mme_scores(groups[category]) for category in categories if category in groups]:
                totals[name] = {"score": sum(scores["accuracy"] + scores["accuracy_plus"] for scores in asked)}
        return totals
