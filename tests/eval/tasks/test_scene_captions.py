"""Captions of drawn scenes: what a caption that is right, wrong or silent counts for."""

import pytest

from mllm_vision.eval.scores import Tallies, scored
from mllm_vision.eval.tasks.scene_captions import SceneCaptions
from mllm_vision.scenes import sample_scene
from mllm_vision.scenes.questions import caption


def scores_of(task, answer):
    examples = task.load().examples
    found = scored(task, Tallies.of(task, [(example, answer(example)) for example in examples]))
    return {name: score.value for name, score in found["all"].items()}


def test_the_generators_own_captions_are_right():
    scenes = [sample_scene("test", i) for i in range(20)]
    captions = iter([caption(scene) for scene in scenes])
    found = scores_of(SceneCaptions(scenes=20), lambda example: next(captions))
    assert (found["chair_s"], found["chair_i"], found["recall"]) == (0, 0, 1)
    assert found["objects"] == sum(len(scene.things) for scene in scenes) / 20


def test_shapes_that_are_not_there_are_told_in_singular_and_plural():
    task = SceneCaptions()
    counts = task.tally(["cross", "star"], "Two Crosses, a ring, some moons, a starfish and spring.")
    assert counts == {
        "n": 1,
        "words": 10,
        "captions": 1,
        "hallucinated_captions": 1,
        "mentions": 3,
        "hallucinated_mentions": 2,
        "present": 2,
        "recalled": 1,
    }
    assert task.tally(["star"], "")["mentions"] == 0
    assert task.tally(["star"], "a star, a star")["hallucinated_captions"] == 0


def test_requests_are_the_same_every_time_and_fewer_are_the_first_of_more():
    first, more = (SceneCaptions(scenes=n).load().examples for n in (5, 9))
    assert [(e.id, e.question, e.target) for e in first] == [(e.id, e.question, e.target) for e in more[:5]]
    other = SceneCaptions(scenes=9, seed=1).load().examples
    assert [e.question for e in other] != [e.question for e in more]
    assert [e.target for e in other] == [e.target for e in more]
    validation = SceneCaptions(scenes=9, split="validation").load().examples
    assert [e.target for e in validation] != [e.target for e in more]


def test_no_scenes_are_refused():
    with pytest.raises(ValueError, match="scenes must be 1 or more, got 0"):
        SceneCaptions(scenes=0)
