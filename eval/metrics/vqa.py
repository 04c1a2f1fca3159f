"""VQAv2, TextVQA, VizWiz: how many of the references an answer agrees with, after both are normalised.

Paper: VQA, arXiv 1505.00468: the mean over the leave-one-out subsets of the references of min(1, matches / 3).
Code: github.com/GT-Vision-Lab/VQA @ a013f00, vqaEval.py (BSD-2-Clause); for TextVQA github.com/facebookresearch/mmf
@ 2dc099a, m4c_evaluators.py (BSD-3-Clause).

Public evaluators differ in what they normalise, and so have a function each:

    vqa_accuracy       the challenge code: answer and references, if the references are not all the same text
    lmms_vqa_accuracy  lmms-eval 0.7.1 on VQAv2: answer and references, always
    textvqa_accuracy   MMF on TextVQA, lmms-eval on TextVQA and VizWiz: always, by `normalise_textvqa`
    vizwiz_accuracy    VizWiz's own script: the answer, always; the references, never
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_NUMBERS: dict[str, str] = _TABLE["numbers"]
_CONTRACTIONS = {spelling: word for word, spellings in _TABLE["contractions"].items() for spelling in spellings}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalise(answer: str) -> str:
    """Lower case without articles and punctuation, number words as digits, contractions with their apostrophe.

    A mark vanishes if it stands beside a space anywhere in the text, or if a comma parts two digits anywhere; else a
    space replaces it. Full stops vanish but before a digit.
    """
    text = _on_one_line(answer)
    joined = re.search(r"\d,\d", text) is not None
    marks = str.maketrans({p: "" if joined or f"{p} " in text or f" {p}" in text else " " for p in _PUNCTUATION})
    # The challenge code hands `sub` a flag where it takes a count, re.UNICODE: no more than 32 full stops vanish.
    text = re.sub(r"\.(?!\d)", "", text.translate(marks), count=32)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_textvqa(answer: str) -> str:
    """As `normalise`, but "," and "?" vanish first of all and "'s" becomes a word of its own."""
    return normalise(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def leave_one_out(answer: str, references: Sequence[str]) -> float:
    """The mean over the subsets that lack one reference of min(1, matches / 3); texts match if they are equal.

    Raises:
        ValueError: no references.
    """
    if not references:
        raise ValueError("an answer needs references to match, got none; a test split without answers has no score")
    n, matches = len(references), sum(reference == answer for reference in references)
    without_a_match, without_another = min(1, (matches - 1) / 3), min(1, matches / 3)
    return (matches * without_a_match + (n - matches) * without_another) / n


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy in 0..1 as the VQA challenge has it: texts are compared as they are if all references are the same."""
    answer, references = _on_one_line(answer), [_on_one_line(reference) for reference in references]
    if len(set(references)) > 1:
        answer, references = normalise(answer), [normalise(reference) for reference in references]
    return leave_one_out(answer, references)


def lmms_vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy in 0..1 with answer and references always normalised: "Yes." matches ten times "yes".

    Differs: lmms-eval's pattern of a comma between digits also finds several in a row, as in 1,,2.
    """
    return leave_one_out(normalise(answer), [normalise(reference) for reference in references])


def textvqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy in 0..1 with answer and references normalised by `normalise_textvqa`."""
    return leave_one_out(normalise_textvqa(answer), [normalise_textvqa(reference) for reference in references])


def vizwiz_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy in 0..1 with the answer normalised and the references as the data set has them."""
    return leave_one_out(normalise(answer), references)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
