"""CHAIR: what counts as a mention, the ground truth of COCO's files, and the scores."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from mllm_vision.eval.metrics import chair
from mllm_vision.eval.metrics.chair import CLASSES, chair_scores, chair_tally, ground_truth, mentions, plurals
from tests.eval.metrics.answers import ODD, random_answers

TABLE = yaml.safe_load(Path(chair.__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("caption", "classes"),
    [
        ("A man rides a horse.", ["person", "horse"]),
        ("Two dogs and a DOG", ["dog", "dog"]),
        ("Nothing to see here", []),
        ("the man's hat", ["person"]),
        ("a baby zebra beside its mother", ["zebra", "person"]),
        ("a baby", ["person"]),
        ("an adult bear cub", ["bear"]),
        ("two baby elephants", ["elephant"]),
        ("a baby animal", []),
        ("a passenger jet and a passenger", ["airplane", "person"]),
        ("a train on the train tracks", ["train"]),
        ("the home plate on the table", ["dining table"]),
        ("a toilet seat", ["toilet"]),
        ("the seat of the toilet", ["toilet"]),
        ("the seat of a car", ["chair", "car"]),
        ("hot dogs", ["hot dog"]),
        ("it is hot, dogs lie about", ["dog"]),
        ("a hot-dog stand", []),
        ("a teddy bear with a bow tie", ["teddy bear", "tie"]),
        ("a bear in a tie", ["bear", "tie"]),
        ("wine glasses and traffic lights at stop signs", ["wine glass", "traffic light", "stop sign"]),
        ("a motor bike, a cheesecake and an iPhone", ["motorcycle", "cake", "cell phone"]),
        ("sports balls", ["sports ball"]),
        ("a laptop computer on a dining table", ["laptop", "dining table"]),
        ("a baby-sitter", []),
        ("man/woman (cat)\ndog", ["person", "person", "cat", "dog"]),
        ("cats🙂dogs", ["cat", "dog"]),
    ],
)
def test_mentions(caption, classes):
    assert mentions(caption) == classes


def test_plurals_of_the_vocabulary():
    named = {
        "person": "people persons men women children kids babies ladies policemen thieves grandchildren gentlemen",
        "sheep": "sheep lambs ewes",
        "cow": "oxen calves cattle buffaloes buffalos",
        "bird": "geese ostriches finches turkeys flamingos",
        "dog": "puppies doggies huskies",
        "cat": "tabbies kittens",
        "mouse": "mice",
        "knife": "knives pocketknives",
        "bus": "buses busses minibuses trolleys",
        "skis": "ski skis",
        "couch": "couches",
        "bench": "benches pews",
        "sandwich": "sandwiches",
        "toothbrush": "toothbrushes",
        "truck": "lorries trucks",
        "boat": "ferries dinghies canoes",
        "giraffe": "giraffes",
        "scissors": "scissors",
        "vase": "vases",
    }
    for name, words in named.items():
        assert {word: mentions(word) for word in words.split()} == {word: [name] for word in words.split()}
    assert (plurals("bus"), plurals("lady"), plurals("boy"), plurals("limo")) == (
        ["buses"],
        ["ladies"],
        ["boys"],
        ["limos", "limoes"],
    )


def test_every_term_and_its_plural_names_its_class():
    for name, others in TABLE["classes"].items():
        for term in (name, *others):
            if term.count(" ") < 2:  # "stove top oven" is in the authors' list, but they join no more than two words
                head, _, last = term.rpartition(" ")
                for spelling in (term, *(f"{head} {plural}".strip() for plural in plurals(last))):
                    assert mentions(spelling) == [name], spelling
    assert len(CLASSES) == 80
    assert CLASSES[:3] == ("person", "bicycle", "car") and CLASSES[-1] == "toothbrush"


def mentions_slowly(caption):
    """The authors' steps, one by one: singulars, double words, toilet seats, synonyms."""
    singular = dict(TABLE["irregular"])
    doubles = {"toilet seat": "toilet", "home plate": "home plate", "train track": "train track"}
    for name, others in TABLE["classes"].items():
        for term in (name, *others):
            doubles |= {term: term} if len(term.split()) == 2 else {}
    for first, lasts in TABLE["qualifiers"].items():
        for last in lasts:
            doubles[f"{first} {last}"] = last
    terms = [term for name, others in TABLE["classes"].items() for term in (name, *others)]
    known = {word for term in [*terms, *doubles] for word in term.split()}
    for word in sorted(known):
        for plural in plurals(word):
            singular.setdefault(plural, word)
    words = []
    for token in re.findall(r"[a-z]+|[^a-z ]", caption.lower()):
        words.append(token if token in known else singular.get(token, token))
    joined, i = [], 0
    while i < len(words):
        if " ".join(words[i : i + 2]) in doubles:
            joined.append(doubles[" ".join(words[i : i + 2])])
            i += 2
        else:
            joined.append(words[i])
            i += 1
    if "toilet" in joined and "seat" in joined:
        joined = [word for word in joined if word != "seat"]
    found = []
    for word in joined:
        found += [name for name, others in TABLE["classes"].items() if word == name or word in others]
    return found


def test_mentions_against_the_steps_written_out():
    rng = random.Random(0)
    words = "a baby adult passenger bird zebras jet train tracks toilet seats seat hot dog dogs stop sign light , . bow"
    words = [
        *words.split(),
        "ties",
        "tie",
        "wine",
        "glasses",
        "home",
        "plates",
        "men",
        "mice",
        "teddy",
        "bears",
        "traffic",
    ]
    found = 0
    for _ in range(300):
        caption = " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))
        assert mentions(caption) == mentions_slowly(caption), caption
        found += len(mentions(caption))
    assert found > 500


def test_mentions_survive_odd_captions():
    for caption in ODD + random_answers(300):
        assert {*mentions(caption)} <= {"dog", "cat"}, caption
    assert mentions("dog " * 5_000) == ["dog"] * 5_000


@pytest.fixture
def coco(tmp_path):
    """An instances file and a captions file of three images."""
    images = [{"id": i} for i in (1, 2, 3)]
    instances = {
        "images": images,
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 1, "category_id": 1}],
    }
    captions = {
        "images": [*images, {"id": 4}],
        "annotations": [
            {"image_id": 1, "caption": "A puppy on a couch"},
            {"image_id": 2, "caption": "Two women"},
            {"image_id": 2, "caption": "A baby zebra"},
        ],
    }
    paths = tmp_path / "instances.json", tmp_path / "captions.json"
    for path, content in zip(paths, (instances, captions), strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_ground_truth_joins_instances_and_captions(coco):
    assert ground_truth(*coco) == {1: {"dog", "person", "couch"}, 2: {"person", "zebra"}, 3: set(), 4: set()}


def test_files_of_another_kind_are_refused(coco, tmp_path):
    instances, captions = coco
    with pytest.raises(ValueError, match=r"captions\.json must be a COCO annotation file with annotations, categories"):
        ground_truth(captions, instances)
    with pytest.raises(
        ValueError, match=r"instances\.json has annotations without caption; give the instances file first"
    ):
        ground_truth(instances, instances)
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(ValueError, match="must be a COCO annotation file"):
        ground_truth(other, captions)
    content = json.loads(instances.read_text())
    other.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "aardvark"}]}))
    with pytest.raises(ValueError, match=r"COCO's 80 categories, on which CHAIR is defined, got \['aardvark'\]"):
        ground_truth(other, captions)


def test_tallies_and_scores_by_hand():
    tallies = [
        chair_tally(["dog", "dog", "cat", "cat"], {"dog", "person"}),
        chair_tally(["person"], {"dog", "person", "car"}),
        chair_tally([], set()),
    ]
    assert tallies == [
        dict(captions=1, hallucinated_captions=1, mentions=4, hallucinated_mentions=2, present=2, recalled=1),
        dict(captions=1, hallucinated_captions=0, mentions=1, hallucinated_mentions=0, present=3, recalled=1),
        dict(captions=1, hallucinated_captions=0, mentions=0, hallucinated_mentions=0, present=0, recalled=0),
    ]
    sums = {name: sum(tally[name] for tally in tallies) for name in tallies[0]}
    assert chair_scores(sums) == pytest.approx({"chair_s": 1 / 3, "chair_i": 0.4, "recall": 0.4})
    arrays = chair_scores({name: np.array([0, value]) for name, value in sums.items()})
    assert {name: value.tolist() for name, value in arrays.items()} == {
        "chair_s": [0, pytest.approx(1 / 3)],
        "chair_i": [0, 0.4],
        "recall": [0, 0.4],
    }
