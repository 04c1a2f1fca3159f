"""POPE: is there a chair in the image? Half of the questions are about objects that are not.

Paper: Evaluating object hallucination in large vision-language models, arXiv 2305.10355. The absent objects are
drawn at random, or are the most frequent ones, or those that often come with what is there; splits are not averaged.
Data: lmms-lab/POPE, test: 500 images of COCO val2014, six questions each, three splits. The release's own JSON files
work as a local copy; the file of the random split that most people have holds 2,910 of its 3,000 questions.
Prompt: LLaVA-1.5's, of the question file of its evaluation.

Differs: public evaluators read answers differently, and the option ``parser`` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mllm_vision.eval.data import HubData, Row
from mllm_vision.eval.metrics.yes_no import PARSERS, yes_no_scores, yes_no_tally
from mllm_vision.eval.task import SHORT_ANSWER, Example, Sums, Tally, Task

__all__ = ["POPE"]


@dataclass(kw_only=True)
class POPE(Task, name="pope", paper="arXiv 2305.10355"):
    """Polling-based object probing.

    Args:
        parser: Who reads the answers, of `PARSERS` in `mllm_vision.eval.metrics.yes_no`: LLaVA-1.5's evaluation (the
            default), lmms-eval ("lmms") or DAMRO ("damro").
    """

    parser: str = next(iter(PARSERS))

    data = HubData("lmms-lab/POPE", split="test")
    columns = (
        "question_id, question, answer (yes or no), category (random, popular, adversarial), image; as in "
        "POPE's own files, text and label, image, and the category at the end of the file's name"
    )
    headline = ("adversarial", "f1")
    resumable = ("parser",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parser not in PARSERS:
            raise ValueError(f"parser must be one of {', '.join(PARSERS)}, got {self.parser!r}")

    def examples(self, row: Row) -> Iterable[Example]:
        split = row["category"] if "category" in row else row["file"].rpartition("_")[2]
        image = row["image_source"] if "image_source" in row else row["image"]
        truth = row.text("label" if "label" in row else "answer").strip().lower()
        if truth not in ("yes", "no"):
            raise ValueError(f"the answer must be yes or no, got {truth!r}")
        yield Example(
            id=f"{split}/{row['question_id']}",
            question=f"{row.text('text' if 'text' in row else 'question').strip()}\n{SHORT_ANSWER}",
            images=[row.picture()],
            target=truth,
            groups=(split,),
            unit=str(image),
        )

    def tally(self, target: str, answer: str) -> Tally:
        return yes_no_tally(target, PARSERS[self.parser](answer))

    def scores(self, sums: Sums) -> dict[str, Any]:
        return yes_no_scores(sums)
