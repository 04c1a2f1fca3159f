"""Captions of drawn scenes, with CHAIR's scores: which shapes does a caption name that the picture does not show?

Metric: `mllm_vision.eval.metrics.chair`, with the eight shapes as classes, named by a caption that says the word, in
singular or plural.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mllm_vision.eval.data import Row
from mllm_vision.eval.metrics.chair import chair_scores, chair_tally
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.task import ALL, Example, Questions, Sums, Tally, Task
from mllm_vision.scenes import render, sample_scene
from mllm_vision.scenes.draw import REFERENCE_SIDE, SHAPES
from mllm_vision.scenes.questions import CAPTION_PROMPTS

__all__ = ["SceneCaptions"]

_NAMED = re.compile(rf"\b({'|'.join(SHAPES)})(?:e?s)?\b")


@dataclass(kw_only=True)
class SceneCaptions(Task, name="scene_captions", paper="drawn by mllm_vision.scenes"):
    """Shapes in captions of drawn scenes that are not in the picture; how many shapes and words a caption has.

    Args:
        scenes: How many.
        split: Of the scenes.
        side: Width and height of a scene in pixels.
        seed: Of the wording of the request.
    """

    scenes: int = 500
    split: Literal["train", "validation", "test"] = "test"
    side: int = REFERENCE_SIDE
    seed: int = 0

    max_new_tokens = 64
    headline = (ALL, "chair_s")
    lower_is_better = ("chair_s", "chair_i")
    reads_data = False
    resumable = ("scenes",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scenes < 1:
            raise ValueError(f"scenes must be 1 or more, got {self.scenes}")

    def load(self, data: Path | None = None) -> Questions:
        drawn = (Row({"scene": sample_scene(self.split, i, side=self.side)}) for i in range(self.scenes))
        source = {"source": "scenes", "split": self.split, "side": self.side, "seed": self.seed}
        return Questions([example for row in drawn for example in self.examples(row)], provenance=source)

    def examples(self, row: Row) -> Iterable[Example]:
        scene = row["scene"]
        yield Example(
            id=f"caption-{scene.index}",
            question=random.Random(f"caption-{self.seed}-{scene.index}").choice(CAPTION_PROMPTS),
            images=[partial(render, scene)],
            target=sorted({thing.shape for thing in scene.things}),
            unit=f"{scene.split}-{scene.index}",
        )

    def tally(self, target: list[str], answer: str) -> Tally:
        named = _NAMED.findall(answer.lower())
        return {"n": 1, "words": len(answer.split()), **chair_tally(named, set(target))}

    def scores(self, sums: Sums) -> dict[str, Any]:
        lengths = {
            name: ratio(sums[count], sums["captions"]) for name, count in (("objects", "mentions"), ("words", "words"))
        }
        return {**chair_scores(sums), **lengths}
