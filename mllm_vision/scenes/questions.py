"""Questions about a scene, with the right answer, and the caption that lists what is in it.

Five families: existence (yes or no), count, colour, relation (yes or no) and reading. Negatives of existence are of the
three kinds of POPE (Li et al., 2023): a `random` absent shape, the `popular` one that is most frequent in the training
scenes, and the `adversarial` one that co-occurs most with what is in the picture.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mllm_vision.scenes.draw import SHAPES, Scene, Thing, sample_scene

NEGATIVES = ("random", "popular", "adversarial")

_EXISTENCE = ("is there a {} in the picture?", "do you see a {}?", "does the picture show a {}?")
_COUNT = ("how many {} are there?", "how many {} do you see?")
_COLOUR = ("what color is the {}?", "what is the color of the {}?")
_RELATION = ("is the {} {} the {}?",)
_READING = ("what is written in the picture?", "what does the text say?", "what is printed?")
CAPTION_PROMPTS = ("describe the picture.", "what is in the picture?", "list the things in the picture.")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_PLURAL = {"cross": "crosses"}
_STATISTICS_SCENES = 3000


@dataclass(frozen=True)
class Question:
    """A question and its right answer.

    `kind` tells members of a family apart: for existence "present" or the kind of negative, else the family's name.
    """

    family: str
    kind: str
    text: str
    answer: str


@functools.cache
def shape_statistics() -> tuple[np.ndarray, np.ndarray]:
    """How many training scenes show each shape, (8,), and each pair of shapes, (8, 8); in the order of `SHAPES`."""
    presence = np.zeros((_STATISTICS_SCENES, len(SHAPES)), int)
    for i in range(_STATISTICS_SCENES):
        for thing in sample_scene("train", i).things:
            presence[i, SHAPES.index(thing.shape)] = 1
    return presence.sum(0), presence.T @ presence


def absent_shape(scene: Scene, negative: str, rng: random.Random) -> str:
    """A shape that is not in the scene: one of POPE's `NEGATIVES`, or "absent".

    "absent" is for training: shapes are asked for in vain about as often as they are there, so that the name of a shape
    says nothing about the answer and only the picture does.
    """
    present = sorted({SHAPES.index(thing.shape) for thing in scene.things})
    absent = [i for i in range(len(SHAPES)) if i not in present]
    frequency, together = shape_statistics()
    if negative == "absent":
        return SHAPES[rng.choices(absent, [frequency[i] for i in absent])[0]]
    if negative == "random":
        return SHAPES[rng.choice(absent)]
    if negative == "popular":
        return SHAPES[max(absent, key=lambda i: frequency[i])]
    if negative == "adversarial":
        return SHAPES[max(absent, key=lambda i: together[i, present].sum())]
    raise ValueError(f"negative must be one of absent, {', '.join(NEGATIVES)}, got {negative!r}")


def existence_question(scene: Scene, rng: random.Random, kind: str | None = None) -> Question:
    """Ask for a shape that is there (`kind` "present") or is not ("absent" or one of `NEGATIVES`); None: even odds."""
    kind = kind or rng.choice(("present", "absent"))
    shape = rng.choice(scene.things).shape if kind == "present" else absent_shape(scene, kind, rng)
    answer = "yes" if kind == "present" else "no"
    return Question("existence", kind, rng.choice(_EXISTENCE).format(shape), answer)


def count_question(scene: Scene, rng: random.Random) -> Question:
    """Ask how many of one shape, or, one time in three, how many shapes of any kind."""
    if rng.random() < 1 / 3:
        noun, count = "shapes", len(scene.things)
    else:
        # Evenly over the shapes that are there, not over the things: else "1" is rarer than it is in the picture.
        shape = rng.choice(sorted({thing.shape for thing in scene.things}))
        noun, count = _PLURAL.get(shape, shape + "s"), scene.shape_count(shape)
    return Question("count", "count", rng.choice(_COUNT).format(noun), str(count))


def colour_question(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the colour of a shape that is there once; None if no shape is."""
    unique = scene.unique_things()
    if not unique:
        return None
    thing = rng.choice(unique)
    return Question("colour", "colour", rng.choice(_COLOUR).format(thing.shape), thing.colour)


def relation_question(scene: Scene, rng: random.Random) -> Question | None:
    """Ask whether one thing lies left of, right of, above or below another; None if no pair is clear enough."""
    unique = scene.unique_things()
    pairs = [(a, b, relation) for a in unique for b in unique if a != b for relation in relations(a, b, scene.side)]
    if not pairs:
        return None
    a, b, relation = rng.choice(pairs)
    answer = rng.choice(("yes", "no"))
    asked = relation if answer == "yes" else _OPPOSITE[relation]
    return Question("relation", "relation", rng.choice(_RELATION).format(a.shape, asked, b.shape), answer)


def reading_question(scene: Scene, rng: random.Random) -> Question | None:
    """Ask what is printed; None if nothing is."""
    return Question("reading", "reading", rng.choice(_READING), scene.text.text) if scene.text else None


FAMILIES: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "existence": existence_question,
    "count": count_question,
    "colour": colour_question,
    "relation": relation_question,
    "reading": reading_question,
}


def relations(a: Thing, b: Thing, side: int) -> list[str]:
    """The relations of `a` to `b` that hold by a margin of a fifth of the picture between the centres."""
    margin = side / 5
    holds = {
        "left of": b.x - a.x > margin,
        "right of": a.x - b.x > margin,
        "above": b.y - a.y > margin,
        "below": a.y - b.y > margin,
    }
    return [relation for relation, true in holds.items() if true]


def caption(scene: Scene) -> str:
    """List the things in reading order, then the printed text: "a large red striped star, a small blue moon"."""
    parts = []
    for thing in scene.things:
        texture = "" if thing.texture == "plain" else f" {thing.texture}"
        parts.append(f"a {thing.size} {thing.colour}{texture} {thing.shape}")
    if scene.text:
        parts.append(f"the text {scene.text.text}")
    return ", ".join(parts)


def caption_question(scene: Scene, rng: random.Random) -> Question:
    return Question("caption", "caption", rng.choice(CAPTION_PROMPTS), caption(scene))
