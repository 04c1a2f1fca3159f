"""AI2D: multiple choice about diagrams from school books.

Paper: A diagram is worth a dozen images, arXiv 1603.07396.
Data: lmms-lab/ai2d, test: 3,088 questions. Its diagrams have masked labels; lmms-eval's ai2d_no_mask is another data
set.
Prompt: lmms-eval's for LLaVA-style models; LLaVA-1.5 was not evaluated on it.

Differs: lmms-eval reads "B. a leaf" and bare letters; see `read_letter` for what else is read here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mllm_vision.eval.choices import MultipleChoice, ask, key
from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.task import Example

__all__ = ["AI2D"]


@dataclass(kw_only=True)
class AI2D(MultipleChoice, name="ai2d", paper="arXiv 1603.07396"):
    """Questions about diagrams."""

    data = HubData("lmms-lab/ai2d", split="test")
    columns = "question, options (texts), answer (index or letter of the right one), image"

    def examples(self, row: Row) -> Iterable[Example]:
        options = row.texts("options")
        yield Example(
            id=str(row.number),
            question=ask(row.text("question"), options),
            images=[row.picture()],
            target=key(options, int(row["answer"])),
            unit=row.fingerprint(),
        )
