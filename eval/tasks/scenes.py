"""Drawn scenes: what the library's small models are trained and measured on, made anew for every run.

Five families of questions: whether a shape is there, with POPE's three kinds of negatives; how many there are;
of which colour; whether one lies beside another; what is printed.

Differs: existence counts an answer only if it is "yes" or "no", in whatever case and with or without a full stop.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from mllm_vision.eval.data import Row
from mllm_vision.eval.families import FamilyTask
from mllm_vision.eval.task import Example, Questions
from mllm_vision.scenes import FAMILIES, NEGATIVES, Question, Scene, render, sample_scene
from mllm_vision.scenes.draw import REFERENCE_SIDE
from mllm_vision.scenes.questions import existence_question

__all__ = ["Scenes", "sample_questions"]


@dataclass(kw_only=True)
class Scenes(FamilyTask, name="scenes", paper="drawn by mllm_vision.scenes"):
    """Questions about drawn scenes, by family.

    Args:
        questions: Of each family; of existence, with each kind of negative.
        families: Names of families joined by "/", or "all".
        split: Of the scenes.
        side: Width and height of a scene in pixels.
        text_scale: Height of printed text over its usual share of the scene, at most 1.
        seed: Of the choice of questions.
    """

    known = FAMILIES

    split: Literal["train", "validation", "test"] = "test"
    side: int = REFERENCE_SIDE
    text_scale: float = 1.0
    seed: int = 0

    max_new_tokens = 6
    reads_data = False

    def load(self, data: Path | None = None) -> Questions:
        examples = []
        for family in self.asked_for:
            asked = sample_questions(
                self.split, family, self.questions, side=self.side, text_scale=self.text_scale, seed=self.seed
            )
            examples += [example for scene, question in asked for example in self.examples(_row(scene, question))]
        drawn = {name: getattr(self, name) for name in ("split", "side", "text_scale", "seed")}
        return Questions(examples, provenance={"source": "scenes", **drawn})

    def examples(self, row: Row) -> Iterable[Example]:
        scene, question = row["scene"], row["question"]
        negatives = NEGATIVES if question.kind == "present" else (question.kind,)
        is_existence = question.family == "existence"
        yield Example(
            id=f"{question.family}-{question.kind}-{scene.index}",
            question=question.text,
            images=[partial(render, scene)],
            target={"family": question.family, "answer": question.answer},
            groups=tuple(f"existence_{kind}" for kind in negatives) if is_existence else (question.family,),
            unit=f"{scene.split}-{scene.index}",
        )


def sample_questions(
    split: str, family: str, n: int, *, side: int = REFERENCE_SIDE, text_scale: float = 1.0, seed: int = 0
) -> list[tuple[Scene, Question]]:
    """`n` questions of a family, one a scene, the same for the same arguments.

    For existence, `n` is the number of questions of each kind of negative with its positives, as in POPE: every second
    scene is asked for a shape that is there (those questions are shared by the three kinds), the others for one absent
    shape of each kind. So there are 2 n questions in all.
    """
    asked: list[tuple[Scene, Question]] = []
    scenes, index = 0, 0
    while scenes < n:
        scene = sample_scene(split, index, side=side, text_scale=text_scale)
        rng = random.Random(f"ask-{seed}-{split}-{family}-{index}")
        if family == "existence":
            kinds: Sequence[str] = ("present",) if scenes % 2 == 0 else NEGATIVES
            questions = [existence_question(scene, rng, kind) for kind in kinds]
        else:
            question = FAMILIES[family](scene, rng)
            questions = [question] if question else []
        asked += [(scene, question) for question in questions]
        scenes += bool(questions)
        index += 1
    return asked


def _row(scene: Scene, question: Question) -> Row:
    return Row({"scene": scene, "question": question})
