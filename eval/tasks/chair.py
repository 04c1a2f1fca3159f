"""CHAIR: which objects does a description name that the image does not show?

Paper: Object hallucination in image captioning, arXiv 1809.02156.
Data: 500 images of COCO val2014, drawn by ``seed``. There is no such data set on the hub: a local copy is a folder with
images/, instances_val2014.json and captions_val2014.json, as COCO has them.
Prompt: that of OPERA (arXiv 2311.17911) and most that came after; DAMRO (arXiv 2410.04514) asks for a short caption.

Differs: every paper draws other images, so that only numbers of one draw compare; see `mllm_vision.eval.metrics.chair`
on how objects are found.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm_vision.eval.data import IMAGE_FOLDER, Row, file_rows
from mllm_vision.eval.metrics.chair import chair_scores, chair_tally, ground_truth, mentions
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.task import ALL, Example, Sums, Tally, Task

__all__ = ["CHAIR"]

INSTANCES, CAPTIONS = "instances_val2014.json", "captions_val2014.json"
_PROMPTS = {"detailed": "Please describe this image in detail.", "short": "Generate a short caption of this image."}


@dataclass(kw_only=True)
class CHAIR(Task, name="chair", paper="arXiv 1809.02156"):
    """Objects in descriptions that are not in the image; how many objects and words there are in a description.

    Who says little is seldom wrong: the first scores mean something only beside recall and the length.

    Args:
        images: How many.
        seed: Of the choice of images.
        caption: What is asked for: "detailed" as OPERA does, "short" as DAMRO does.
    """

    images: int = 500
    seed: int = 0
    caption: Literal["detailed", "short"] = "detailed"

    max_new_tokens = 512
    headline = (ALL, "chair_s")
    lower_is_better = ("chair_s", "chair_i")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1:
            raise ValueError(f"images must be 1 or more, got {self.images}")

    def rows(self, data: Path | None) -> tuple[Iterable[Row], dict[str, Any]]:
        if data is None:
            return super().rows(data)
        instances, captions = data / INSTANCES, data / CAPTIONS
        if missing := [path.name for path in (data / IMAGE_FOLDER, instances, captions) if not path.exists()]:
            raise ValueError(f"{data} lacks {', '.join(missing)}; chair needs COCO val2014, images and annotations")
        present = ground_truth(instances, captions)
        if self.images > len(present):
            raise ValueError(
                f"{data} has {len(present)} images, fewer than {self.images}; ask chair:images={len(present)}"
            )
        drawn = sorted(random.Random(f"chair-{self.seed}").sample(sorted(present), self.images))
        values = [{"id": id, "image": f"COCO_val2014_{id:012}.jpg", "present": sorted(present[id])} for id in drawn]
        return file_rows(data, [instances, captions], values)

    def examples(self, row: Row) -> Iterable[Example]:
        yield Example(
            id=str(row["id"]),
            question=_PROMPTS[self.caption],
            images=[row.picture()],
            target=row["present"],
            unit=str(row["id"]),
        )

    def tally(self, target: list[str], answer: str) -> Tally:
        return {"n": 1, "words": len(answer.split()), **chair_tally(mentions(answer), set(target))}

    def scores(self, sums: Sums) -> dict[str, Any]:
        lengths = {
            name: ratio(sums[count], sums["captions"]) for name, count in (("objects", "mentions"), ("words", "words"))
        }
        return {**chair_scores(sums), **lengths}
