"""Questions, checked against the scene by a second, slower reading of both."""

import random
import re

import pytest

from mllm_vision.scenes import FAMILIES, NEGATIVES, caption, sample_scene
from mllm_vision.scenes.draw import SHAPES, Background, Scene, Thing
from mllm_vision.scenes.questions import absent_shape, existence_question, shape_statistics

SCENES = [sample_scene("test", i) for i in range(150)]
_SINGULAR = {shape + ("es" if shape == "cross" else "s"): shape for shape in SHAPES}


def answer_slowly(scene, text):
    """Answer a question from its words alone."""
    shapes = [thing.shape for thing in scene.things]
    words = re.findall(r"[a-z]+", text)
    if words[:2] == ["how", "many"]:
        return str(len(shapes) if words[2] == "shapes" else shapes.count(_SINGULAR[words[2]]))
    named = [word for word in words if word in SHAPES]
    if "color" in words:
        (thing,) = [thing for thing in scene.things if thing.shape == named[0]]
        return thing.colour
    if len(named) == 2:
        (a,), (b,) = ([thing for thing in scene.things if thing.shape == name] for name in named)
        direction = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
        (asked,) = [word for word in words if word in direction]
        assert abs(direction[asked]) > scene.side / 5, "too close to tell"
        return "yes" if direction[asked] > 0 else "no"
    if named:
        return "yes" if named[0] in shapes else "no"
    return scene.text.text


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(family):
    rng = random.Random(0)
    asked = [(scene, FAMILIES[family](scene, rng)) for scene in SCENES for _ in range(3)]
    asked = [(scene, question) for scene, question in asked if question]
    assert len(asked) > 100
    for scene, question in asked:
        assert question.family == family
        assert question.answer == answer_slowly(scene, question.text), question


@pytest.mark.parametrize("family", ["existence", "relation"])
def test_yes_and_no_are_equally_frequent(family):
    rng = random.Random(1)
    questions = [FAMILIES[family](scene, rng) for scene in SCENES for _ in range(5)]
    answers = [question.answer for question in questions if question]
    assert 0.44 < answers.count("yes") / len(answers) < 0.56


def test_negatives_are_those_of_pope():
    rng = random.Random(0)
    counts, together = {}, {}
    for i in range(3000):
        present = {thing.shape for thing in sample_scene("train", i).things}
        for a in present:
            counts[a] = counts.get(a, 0) + 1
            for b in present:
                together[a, b] = together.get((a, b), 0) + 1
    for scene in SCENES[:40]:
        present = {thing.shape for thing in scene.things}
        absent = [shape for shape in SHAPES if shape not in present]
        assert counts[absent_shape(scene, "popular", rng)] == max(counts[shape] for shape in absent)
        adversarial = absent_shape(scene, "adversarial", rng)
        co_occurrence = {shape: sum(together[shape, other] for other in present) for shape in absent}
        assert co_occurrence[adversarial] == max(co_occurrence.values())
        assert {absent_shape(scene, "random", rng) for _ in range(80)} == set(absent)


def test_shapes_co_occur_unevenly():
    frequency, together = shape_statistics()
    star, moon, square = (SHAPES.index(shape) for shape in ("star", "moon", "square"))
    assert together[star, moon] / frequency[moon] > 1.5 * together[star, square] / frequency[square]


def test_existence_asks_for_the_kind_it_is_told():
    rng = random.Random(0)
    for kind in ("present", "absent", *NEGATIVES):
        question = existence_question(SCENES[0], rng, kind)
        assert (question.kind, question.answer) == (kind, "yes" if kind == "present" else "no")
    with pytest.raises(ValueError, match="negative must be one of absent, random, popular, adversarial"):
        existence_question(SCENES[0], rng, "rare")


def test_a_family_that_cannot_be_asked_is_left_out():
    background = Background("plain", (150, 150, 150), (150, 150, 150), 0)
    twins = tuple(Thing("star", colour, "small", "plain", x, 30, 28) for colour, x in (("red", 30), ("blue", 90)))
    scene = Scene("train", 0, 140, background, twins, None)
    rng = random.Random(0)
    assert all(FAMILIES[family](scene, rng) is None for family in ("colour", "relation", "reading"))


def test_caption_lists_everything_in_reading_order():
    background = Background("plain", (150, 150, 150), (150, 150, 150), 0)
    star = Thing("star", "red", "large", "striped", 30, 30, 44)
    moon = Thing("moon", "blue", "small", "plain", 90, 80, 28)
    assert caption(Scene("train", 0, 140, background, (star, moon), None)) == (
        "a large red striped star, a small blue moon"
    )
    for scene in SCENES:
        assert caption(scene).count(", ") + 1 == len(scene.things) + (scene.text is not None)
        rows = [thing.y * 10 // scene.side for thing in scene.things]
        assert rows == sorted(rows)
