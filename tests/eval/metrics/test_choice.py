"""Multiple choice: which letter is read, and the rotations of the circular evaluation."""

import random
import re

import pytest

from mllm_vision.eval.metrics.choice import read_letter, rotations
from tests.eval.metrics.answers import ODD, random_answers

OPTIONS = ["a red cat", "Straße", "B", "dog"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        (" d\n", "D"),
        ("B", "B"),
        ("C. because", "C"),
        ("D) dog", "D"),
        ("A:", "A"),
        ("c. lower case", None),
        ("E", None),
        ("E. none", None),
        ("A red cat", "A"),
        ("STRASSE", "B"),
        ("Dog", "D"),
        ("the dog", None),
        ("A,", None),
        ("(A)", None),
        ("The answer is A.", None),
        ("", None),
        ("Yes.", None),
        ("🙂", None),
    ],
)
def test_read_letter(answer, letter):
    assert read_letter(answer, OPTIONS) == letter


def test_a_capital_that_is_no_letter_of_the_question_may_start_an_option():
    assert read_letter("G. Washington", ["A. Lincoln", "G. Washington"]) == "B"
    assert read_letter("A. Lincoln", ["G. Washington", "A. Lincoln"]) == "A"


def letter_slowly(answer, options):
    text, letters = answer.strip(), "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for i in range(len(options)):
        if text in (letters[i], letters[i].lower()):
            return letters[i]
    for i in range(len(options)):
        if re.search(rf"^{letters[i]}[.):]", text):
            return letters[i]
    for i, option in enumerate(options):
        if option.strip().casefold() == text.casefold():
            return letters[i]
    return None


def test_against_the_rule_written_out():
    rng = random.Random(0)
    read = []
    for answer in ODD + random_answers(300):
        options = [rng.choice([answer.upper(), "no", "dog", "A.", "x"]) for _ in range(rng.randint(0, 5))]
        marked = rng.choice(["A", "b", "C.", "D)", "F:", ""]) + answer if rng.random() < 0.5 else answer
        read.append(read_letter(marked, options))
        assert read[-1] == letter_slowly(marked, options), (marked[:30], options)
    assert {*read} >= {None, "A", "B", "C", "D"}


def test_more_options_than_letters_are_refused():
    assert read_letter("Z", ["x"] * 26) == "Z"
    with pytest.raises(ValueError, match="at most 26 options, got 27"):
        read_letter("A", ["x"] * 27)


def test_rotations_follow_the_right_option():
    assert rotations(["cat", "dog", "cow", "owl"], 1) == [
        (["cat", "dog", "cow", "owl"], 1),
        (["dog", "cow", "owl", "cat"], 0),
        (["cow", "owl", "cat", "dog"], 3),
        (["owl", "cat", "dog", "cow"], 2),
    ]
    assert rotations(["yes"], 0) == [(["yes"], 0)]
    with pytest.raises(ValueError, match=r"must be in 0\.\.1, got 2"):
        rotations(["yes", "no"], 2)
