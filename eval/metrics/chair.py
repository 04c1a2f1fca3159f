"""CHAIR: objects that a caption names and the image does not show.

Paper: Object hallucination in image captioning, arXiv 1809.02156. Code: github.com/LisaAnne/Hallucination @ 6e4d33c,
utils/chair.py (BSD-2-Clause); recall as in the version of it that lmms-eval 0.7.1 carries (MIT).

Differs: singulars are looked up among the words of the vocabulary (``chair.yaml``), where the authors use pattern.en
and later versions WordNet, so that no language model or download has a say; motor bike, cheesecake and iphone count,
which the authors list with a stray space or capital and therefore never find; scores are shares in 0..1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import yaml

from mllm_vision.eval.metrics.ratio import ratio

# A hyphen joins: a baby-sitter is no baby. Marks are tokens too, since a comma parts the words of "hot, dog".
_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]")


def plurals(word: str) -> list[str]:
    """The regular plurals of an English noun; two of a noun in -o."""
    if re.search(r"([sxz]|[cs]h)$", word):
        return [word + "es"]
    if re.search(r"[^aeiou]y$", word):
        return [word[:-1] + "ies"]
    return [word + "s", word + "es"] if word.endswith("o") else [word + "s"]


def _vocabulary() -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Class of every term; term of every pair of words that is read as one; singular of every plural."""
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    classes = {term: name for name, others in table["classes"].items() for term in (name, *others)}
    pairs = {term: term for term in (*classes, *table["nothing"]) if term.count(" ") == 1}
    pairs |= {f"{first} {last}": last for first, lasts in table["qualifiers"].items() for last in lasts}
    words = {word for term in (*classes, *pairs) for word in term.split()}
    singulars = {plural: word for word in sorted(words) for plural in plurals(word)} | table["irregular"]
    return classes, pairs, singulars


_CLASSES, _PAIRS, _SINGULARS = _vocabulary()

CLASSES = tuple(dict.fromkeys(_CLASSES.values()))
"""The 80 classes by the names that COCO gives them, in its order."""


def mentions(caption: str) -> list[str]:
    """The classes that a caption mentions, in order, a class as often as it is mentioned."""
    words = [_SINGULARS.get(token, token) for token in _TOKEN.findall(caption.lower())]
    terms: list[str] = []
    i = 0
    while i < len(words):
        pair = " ".join(words[i : i + 2])
        terms.append(_PAIRS.get(pair, words[i]))
        i += 2 if pair in _PAIRS else 1
    if "toilet" in terms:
        terms = [term for term in terms if term != "seat"]  # the seat of a toilet is no chair
    return [_CLASSES[term] for term in terms if term in _CLASSES]


def ground_truth(instances_json: str | Path, captions_json: str | Path) -> dict[int, set[str]]:
    """Classes to be seen in each image: those of its instances and those that its reference captions mention.

    Args:
        instances_json: COCO's instances_val2014.json or a file like it.
        captions_json: COCO's captions_val2014.json or a file like it.

    Returns:
        A set for every image of either file, empty for one without annotations.

    Raises:
        ValueError: a file that is not of its kind.
    """
    instances = _annotations(instances_json, "category_id")
    captions = _annotations(captions_json, "caption")
    names = {category["id"]: category["name"] for category in instances["categories"]}
    if unknown := set(names.values()) - set(CLASSES):
        raise ValueError(
            f"{instances_json} must have COCO's 80 categories, on which CHAIR is defined, got {sorted(unknown)[:3]}; "
            "give COCO's own file of instances"
        )
    present: dict[int, set[str]] = {image["id"]: set() for image in (*instances["images"], *captions["images"])}
    for annotation in instances["annotations"]:
        present[annotation["image_id"]].add(names[annotation["category_id"]])
    for annotation in captions["annotations"]:
        present[annotation["image_id"]].update(mentions(annotation["caption"]))
    return present


def _annotations(path: str | Path, field: str) -> dict[str, Any]:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    needed = {"images", "annotations"} | ({"categories"} if field == "category_id" else set())
    if not isinstance(content, dict) or not needed <= set(content):
        raise ValueError(f"{path} must be a COCO annotation file with {', '.join(sorted(needed))}; download COCO's own")
    if any(field not in annotation for annotation in content["annotations"]):
        raise ValueError(f"{path} has annotations without {field}; give the instances file first, the captions second")
    return content


def chair_tally(mentioned: Sequence[str], present: AbstractSet[str]) -> dict[str, float]:
    """Counts of one caption: captions (1) and mentions, those of them hallucinated, classes present and recalled.

    Args:
        mentioned: What `mentions` found in the caption.
        present: What `ground_truth` says of its image.
    """
    hallucinated = sum(name not in present for name in mentioned)
    return {
        "captions": 1,
        "hallucinated_captions": float(hallucinated > 0),
        "mentions": len(mentioned),
        "hallucinated_mentions": hallucinated,
        "present": len(present),
        "recalled": len(present & set(mentioned)),
    }


def chair_scores(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Shares in 0..1: chair_s of the captions and chair_i of the mentions are hallucinated, recall of what is there."""
    return {
        "chair_s": ratio(sums["hallucinated_captions"], sums["captions"]),
        "chair_i": ratio(sums["hallucinated_mentions"], sums["mentions"]),
        "recall": ratio(sums["recalled"], sums["present"]),
    }
