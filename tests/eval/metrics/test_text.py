"""Exact match, relaxed match and ANLS, against their definitions written out."""

import random
import string
import time
from functools import cache

import pytest

from mllm_vision.eval.metrics.text import anls, edit_distance, exact_match, relaxed_match
from tests.eval.metrics.answers import ODD, random_answers

TEXTS = ODD + random_answers(300)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("Yes.", "yes", True),
        (" t-shirt ", "T shirt", False),
        ("t-shirt", "tshirt", True),
        ("red .", "red", True),
        ("the red", "red", False),
        ("", "!", True),
        ("über", "ÜBER", True),
    ],
)
def test_exact_match(answer, reference, same):
    assert exact_match(answer, reference) is same


def test_exact_match_against_the_rule_written_out():
    def plain(text):
        return "".join(c for c in text.lower() if c not in string.punctuation).strip()

    rng = random.Random(0)
    pairs = [(text, rng.choice([text.upper() + "!", rng.choice(TEXTS)])) for text in TEXTS]
    assert [exact_match(*pair) for pair in pairs] == [plain(left) == plain(right) for left, right in pairs]


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("94.9", "100", False),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("0.42", "42%", True),
        ("42", "42%", False),
        ("42 ", "42", True),
        ("0", "0", True),
        ("0.0", "0", False),
        ("0.01", "0", False),
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("1,000", "1000", False),
        ("1,000", "1,000", True),
        ("nan", "NaN", True),
        ("inf", "inf", True),
        ("nan", "1", False),
        ("1e400", "5", False),
        ("%", "%", True),
        ("", "", True),
        ("", "1", False),
    ],
)
def test_relaxed_match(answer, target, right):
    assert relaxed_match(answer, target) is right


def test_relaxed_match_of_numbers_against_the_definition():
    rng = random.Random(0)
    verdicts = []
    for _ in range(300):
        target = rng.choice([-1, 1]) * rng.uniform(0.1, 1000)
        number = target * rng.uniform(0.9, 1.1)
        answer, wanted = rng.choice([(f"{number!r}", f"{target!r}"), (f"{number!r}%", f"{target!r}%")])
        verdicts.append(relaxed_match(answer, wanted))
        assert verdicts[-1] == (abs(number / target - 1) < 0.05)
    assert {*verdicts} == {True, False}


def test_relaxed_match_survives_odd_answers():
    for text in TEXTS:
        assert relaxed_match(text, "word") is False
        assert relaxed_match(text, text) is True


def distance_by_definition(left, right):
    @cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        replaced = distance(i - 1, j - 1) + (left[i - 1] != right[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, replaced)

    return distance(len(left), len(right))


def test_edit_distance_by_hand_and_by_definition():
    assert (edit_distance("kitten", "sitting"), edit_distance("", "abc"), edit_distance("ab", "ba")) == (3, 3, 2)
    rng = random.Random(0)
    for _ in range(300):
        left, right = ("".join(rng.choice("abя🙂") for _ in range(rng.randint(0, 8))) for _ in range(2))
        assert edit_distance(left, right) == distance_by_definition(left, right), (left, right)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Hello  World", ["hello world"], 1),
        ("helo", ["hello"], 0.8),
        ("ab", ["abcd"], 0.5),
        ("ab", ["abcde"], 0),
        ("cat", ["dog", "cart"], 0.75),
        ("", [""], 1),
        ("", ["a"], 0),
        ("\n", ["", "a"], 1),
        ("x" * 10_000, ["x"], 0),
    ],
)
def test_anls(answer, references, score):
    assert anls(answer, references) == pytest.approx(score)


def test_anls_against_the_definition():
    rng = random.Random(0)
    scores = []
    for answer in [text for text in TEXTS if len(text) < 100]:
        references = [
            rng.choice([answer.upper(), answer[1:], answer[::-1], "yes no"]) for _ in range(rng.randint(1, 3))
        ]
        best = 0.0
        for reference in references:
            left, right = (" ".join(text.lower().split()) for text in (answer, reference))
            longest = max(len(left), len(right))
            likeness = 1 - distance_by_definition(left, right) / longest if longest else 1.0
            best = max(best, likeness if likeness >= 0.5 else 0.0)
        scores.append(anls(answer, references))
        assert scores[-1] == pytest.approx(best), (answer, references)
    assert 0 in scores and 1 in scores and len(set(scores)) > 10


def test_a_long_answer_costs_nothing_beside_a_short_reference():
    start = time.process_time()
    assert anls("word " * 2_000, ["a short reference", "another"] * 10) == 0
    assert time.process_time() - start < 0.2


def test_without_references_there_is_no_anls():
    with pytest.raises(ValueError, match="needs a reference to compare with, got none"):
        anls("yes", [])
