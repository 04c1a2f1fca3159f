"""POPE: what each parser reads, and the scores against counting by hand."""

import random

import numpy as np
import pytest

from mllm_vision.eval.metrics.yes_no import PARSERS, yes_no_scores, yes_no_tally
from tests.eval.metrics.answers import ODD, random_answers

READ = {  # llava, lmms, damro
    "Yes": ("yes", "yes", "yes"),
    "yes.": ("yes", None, "yes"),
    " NO ": ("yes", "no", "no"),
    "No": ("no", "no", "no"),
    "No.": ("no", None, "no"),
    "No, not visible": ("no", None, "no"),
    "yes, it is": ("yes", None, "yes"),
    "There is not": ("no", None, "no"),
    "Sure. There is no doubt": ("yes", None, "no"),
    "yes and no": ("no", None, "both"),
    "I know": ("yes", None, "no"),
    "no\ndog": ("yes", None, "no"),
    "maybe": ("yes", None, "neither"),
    "": ("yes", None, "neither"),
}


@pytest.mark.parametrize(("answer", "read"), READ.items(), ids=[repr(answer) for answer in READ])
def test_three_parsers_read_one_answer(answer, read):
    assert tuple(parse(answer) for parse in PARSERS.values()) == read


def llava_slowly(text):
    if text.find(".") != -1:
        text = text.split(".")[0]
    words = text.replace(",", "").split(" ")
    for word in words:
        if word == "No" or word == "not" or word == "no":
            return "no"
    return "yes"


def test_parsers_against_the_public_code_written_out():
    for answer in ODD + random_answers(300):
        assert PARSERS["llava"](answer) == llava_slowly(answer), answer
        assert PARSERS["lmms"](answer) == {"yes": "yes", "no": "no"}.get(answer.lower().strip()), answer
        # DAMRO's loop: looks for the truth alone, so an answer without it counts as the other word
        for truth, other in (("yes", "no"), ("no", "yes")):
            as_counted = truth if truth in answer.lower().strip() else other
            assert yes_no_tally(truth, PARSERS["damro"](answer)) == yes_no_tally(truth, as_counted), answer


def test_tally_of_each_kind():
    names = ("n", "right", "hits", "said_yes", "is_yes")
    rows = {
        ("yes", "yes"): (1, 1, 1, 1, 1),
        ("yes", "no"): (1, 0, 0, 0, 1),
        ("no", "yes"): (1, 0, 0, 1, 0),
        ("no", "no"): (1, 1, 0, 0, 0),
        ("yes", None): (1, 0, 0, 0, 1),
        ("no", None): (1, 0, 0, 0, 0),
        ("yes", "both"): (1, 1, 1, 1, 1),
        ("no", "both"): (1, 1, 0, 0, 0),
        ("yes", "neither"): (1, 0, 0, 0, 1),
        ("no", "neither"): (1, 0, 0, 1, 0),
    }
    for case, counts in rows.items():
        assert yes_no_tally(*case) == dict(zip(names, counts, strict=True)), case


def test_words_that_are_no_verdict_are_refused():
    with pytest.raises(ValueError, match="must be yes or no in lower case, got 'Yes'"):
        yes_no_tally("Yes", "yes")
    with pytest.raises(ValueError, match="read by one of llava, lmms, damro before it is counted, got 'Yes, it is'"):
        yes_no_tally("yes", "Yes, it is")


def test_scores_worked_by_hand():
    # 4 true yes, 1 missed, 2 false yes, 3 true no
    sums = {"n": 10, "right": 7, "hits": 4, "said_yes": 6, "is_yes": 5}
    assert yes_no_scores(sums) == pytest.approx(
        {"accuracy": 0.7, "precision": 4 / 6, "recall": 0.8, "f1": 2 * (4 / 6) * 0.8 / (4 / 6 + 0.8), "yes_ratio": 0.6}
    )
    nothing = dict.fromkeys(sums, 0)
    assert yes_no_scores(nothing) == dict.fromkeys(["accuracy", "precision", "recall", "f1", "yes_ratio"], 0)


def test_scores_of_many_answers_against_a_confusion_matrix():
    rng = random.Random(0)
    pairs = [(rng.choice(["yes", "no"]), rng.choice(["yes", "no", None])) for _ in range(300)]
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    tn, positives = pairs.count(("no", "no")), sum(truth == "yes" for truth, _ in pairs)
    precision, recall = tp / (tp + fp), tp / positives
    tallies = [yes_no_tally(*pair) for pair in pairs]
    sums = {name: sum(tally[name] for tally in tallies) for name in tallies[0]}
    assert yes_no_scores(sums) == pytest.approx(
        {
            "accuracy": (tp + tn) / 300,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "yes_ratio": (tp + fp) / 300,
        }
    )


def test_scores_of_arrays_are_scores_of_each():
    columns = {"n": [10, 4, 0], "right": [7, 4, 0], "hits": [4, 0, 0], "said_yes": [6, 0, 0], "is_yes": [5, 0, 0]}
    together = yes_no_scores({name: np.array(values) for name, values in columns.items()})
    for i in range(3):
        alone = yes_no_scores({name: values[i] for name, values in columns.items()})
        assert {name: float(values[i]) for name, values in together.items()} == alone
