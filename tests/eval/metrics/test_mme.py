"""MME: what is read of an answer, and both accuracies."""

import numpy as np
import pytest

from mllm_vision.eval.metrics.mme import COGNITION, PERCEPTION, mme_scores, mme_tally, read
from tests.eval.metrics.answers import ODD, random_answers


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Yes", "yes"),
        ("No.", "no"),
        ("Y", "yes"),
        ("n.", "no"),
        ("yes, it is", "yes"),
        ("No, not visible", "no"),
        ("...no", "no"),
        ("    no", "no"),
        ("Oh yes", None),
        ("a no", "no"),
        ("is no", None),
        ("yeno", "no"),
        ("ye", None),
        ("", None),
        (".", None),
    ],
)
def test_read(answer, verdict):
    assert read(answer) == verdict


def read_slowly(answer):
    text = "".join(character for character in answer.lower().strip() if character != ".")
    if text == "yes" or text == "no":
        return text
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    for word in ("yes", "no"):
        for start in range(4):
            if start + len(word) <= 4 and text[start : start + len(word)] == word:
                return word
    return None


def test_read_against_the_rule_written_out():
    for answer in ODD + random_answers(300):
        assert read(answer) == read_slowly(answer), answer


def test_fourteen_categories():
    assert (len(PERCEPTION), len(COGNITION), len({*PERCEPTION, *COGNITION})) == (10, 4, 14)
    assert PERCEPTION[0] == "existence" and PERCEPTION[-1] == "OCR" and COGNITION[-1] == "code_reasoning"


def test_tally_and_scores_of_three_images():
    tallies = [
        mme_tally(["yes", "no"], ["yes", "no"]),
        mme_tally(["yes", "no"], ["yes", None]),
        mme_tally(["yes", "no"], ["no", "yes"]),
    ]
    assert tallies == [
        {"n": 2, "right": 2, "images": 1, "both": 1},
        {"n": 2, "right": 1, "images": 1, "both": 0},
        {"n": 2, "right": 0, "images": 1, "both": 0},
    ]
    sums = {name: sum(tally[name] for tally in tallies) for name in tallies[0]}
    assert mme_scores(sums) == pytest.approx({"accuracy": 50, "accuracy_plus": 100 / 3})
    arrays = mme_scores({name: np.array([value, 0]) for name, value in sums.items()})
    assert {name: value.tolist() for name, value in arrays.items()} == {
        "accuracy": [50, 0],
        "accuracy_plus": [pytest.approx(100 / 3), 0],
    }


def test_an_image_has_two_questions():
    with pytest.raises(ValueError, match="two questions an image, got 1 truths and 2 answers"):
        mme_tally(["yes"], ["yes", "no"])
