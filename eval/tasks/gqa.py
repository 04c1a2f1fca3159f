"""GQA: compositional questions about photographs, generated from scene graphs.

Paper: GQA: a new dataset for real-world visual reasoning and compositional question answering, arXiv 1902.09506.
Data: lmms-lab/GQA, testdev balanced: 12,578 questions about 398 images, which the hub has in a config of their own. In
a local copy, a row has its ``image``, too.
Prompt: LLaVA-1.5's, of the question file of its evaluation.

Differs: see `exact_match`; LLaVA-1.5's script removes a full stop at the end and ignores case, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.metrics.text import exact_match
from mllm_vision.eval.task import ALL, SHORT_ANSWER, Example, Sums, Tally, Task

__all__ = ["GQA"]

_IMAGES = HubData("lmms-lab/GQA", split="testdev", config="testdev_balanced_images")


@dataclass(kw_only=True)
class GQA(Task, name="gqa", paper="arXiv 1902.09506"):
    """Compositional questions, in all and by structure: verify, query, choose, logical, compare."""

    data = HubData(
        "lmms-lab/GQA", split="testdev", config="testdev_balanced_instructions", images=(_IMAGES, "id", "imageId")
    )
    columns = 'id, imageId, question, answer, image; types ({"structural": ...}) if there'

    def examples(self, row: Row) -> Iterable[Example]:
        structure = (row.get("types") or {}).get("structural")
        yield Example(
            id=str(row["id"]),
            question=f"{row.text('question')}\n{SHORT_ANSWER}",
            images=[row.picture()],
            target=row.text("answer"),
            groups=(ALL, structure) if structure else (ALL,),
            unit=str(row["imageId"]),
        )

    def tally(self, target: str, answer: str) -> Tally:
        return {"n": 1, "right": float(exact_match(answer, target))}

    def scores(self, sums: Sums) -> dict[str, Any]:
        return {"accuracy": ratio(sums["right"], sums["n"])}
