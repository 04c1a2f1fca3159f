"""VQA accuracy: normalising and the leave-one-out mean, against the challenge code written out."""

import random
import re
from pathlib import Path

import pytest
import yaml

from mllm_vision.eval.metrics import vqa
from mllm_vision.eval.metrics.vqa import (
    leave_one_out,
    lmms_vqa_accuracy,
    normalise,
    normalise_textvqa,
    textvqa_accuracy,
    vizwiz_accuracy,
    vqa_accuracy,
)
from tests.eval.metrics.answers import ODD, random_answers

TABLE = yaml.safe_load(Path(vqa.__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
RED = ["red"] * 3 + ["dark red"] * 7


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("a an the", ""),
        ("dont", "don't"),
        ("Couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("red/blue", "red blue"),
        ("red/ blue/green", "red bluegreen"),
        ("red (blue(green", "red bluegreen"),
        ("well-lit", "well lit"),
        ("1,000 well-lit", "1000 welllit"),
        ("1,,2", "1 2"),
        ("3.5", "3.5"),
        ("3. 5", "3 5"),
        ("v.2 p.m.", "v.2 pm"),
        ("yes!", "yes"),
        ("\nyes,\tit is", "yes it is"),
        ("it's", "it's"),
        ("." * 40, "." * 8),
        ("", ""),
        ("ÜBER 🙂", "über 🙂"),
    ],
)
def test_normalise(answer, normal):
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("answer", "normal"),
    [("the dog's", "dog 's"), ("1,000 well-lit", "1000 well lit"), ("really?yes", "reallyyes"), ("Two, three", "2 3")],
)
def test_normalise_textvqa(answer, normal):
    assert normalise_textvqa(answer) == normal


def challenge(text):
    """The steps of the VQA challenge code, one by one, with the table of this package."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]:
        near_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if near_space or re.search(r"(\d)(\,)(\d)", text) else " ")
    kept, dropped = "", 0
    for i, character in enumerate(out):
        if character == "." and dropped < 32 and not (i + 1 < len(out) and re.match(r"\d", out[i + 1])):
            dropped += 1
        else:
            kept += character
    words = []
    for word in kept.lower().split():
        word = TABLE["numbers"].get(word, word)
        if word not in ("a", "an", "the"):
            words.append(next((right for right, wrong in TABLE["contractions"].items() if word in wrong), word))
    return " ".join(words)


def subsets(answer, references):
    scores = []
    for i in range(len(references)):
        others = references[:i] + references[i + 1 :]
        scores.append(min(1.0, others.count(answer) / 3))
    return sum(scores) / len(scores)


def test_normalise_against_the_steps_written_out():
    for answer in ODD + random_answers(300):
        assert normalise(answer) == challenge(answer), answer
        plain = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
        assert normalise_textvqa(answer) == challenge(plain), answer


def test_accuracies_against_the_definition():
    rng = random.Random(1)
    some = ODD[:20] + random_answers(60)
    seen = set()
    for answer in some * 4:
        pool = [answer, answer.upper(), *rng.sample(some, 4)][: rng.randint(1, 6)]
        references = [rng.choice(pool) for _ in range(rng.choice([1, 2, 9, 10]))]
        flat = [text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *references)]
        if len(set(flat[1:])) > 1:
            flat = [challenge(text) for text in flat]
        accuracy = vqa_accuracy(answer, references)
        seen.add(round(accuracy, 2))
        assert accuracy == pytest.approx(subsets(flat[0], flat[1:]))
        normal = [challenge(text) for text in references]
        assert lmms_vqa_accuracy(answer, references) == pytest.approx(subsets(challenge(answer), normal))
        assert vizwiz_accuracy(answer, references) == pytest.approx(subsets(challenge(answer), references))
        both = [normalise_textvqa(text) for text in references]
        assert textvqa_accuracy(answer, references) == pytest.approx(subsets(normalise_textvqa(answer), both))
    assert len(seen) > 6


def test_leave_one_out_of_ten():
    # 3 of 10 match: 7 subsets hold all three (1), 3 subsets hold two (2/3)
    assert leave_one_out("red", RED) == pytest.approx(0.9)
    assert leave_one_out("dark red", RED) == 1
    assert leave_one_out("blue", RED) == 0
    assert leave_one_out("red", ["red"]) == 0
    assert [leave_one_out("x", ["x"] * k + ["y"] * (10 - k)) for k in range(5)] == pytest.approx([0, 0.3, 0.6, 0.9, 1])


def test_public_readings_differ_where_they_are_said_to():
    alike, mixed = ["yes"] * 10, ["yes"] * 9 + ["a cat"]
    assert (vqa_accuracy("Yes.", alike), lmms_vqa_accuracy("Yes.", alike)) == (0, 1)
    assert (vqa_accuracy("Yes.", mixed), lmms_vqa_accuracy("Yes.", mixed)) == (1, 1)
    assert (vizwiz_accuracy("the two cats", ["two cats"] * 10), vqa_accuracy("2 cats", ["two cats"] * 10)) == (0, 0)
    assert (textvqa_accuracy("the two cats", ["two cats"] * 10), vizwiz_accuracy("cats", ["cats"] * 10)) == (1, 1)
    assert (textvqa_accuracy("tom 's", ["tom's"] * 9 + ["x"]), vqa_accuracy("tom 's", ["tom's"] * 9 + ["x"])) == (1, 0)


def test_without_references_there_is_no_accuracy():
    for accuracy in (vqa_accuracy, lmms_vqa_accuracy, textvqa_accuracy, vizwiz_accuracy):
        with pytest.raises(ValueError, match="needs references to match, got none"):
            accuracy("yes", [])
