"""Questions, checked against the record of what was pasted by a second, slower reading of both."""

import random
import re
from collections import Counter

import pytest

from mllm_vision.photos import NEGATIVES, Pasted, Photo, compose
from mllm_vision.photos.compose import sample_nouns
from mllm_vision.photos.questions import NUMBERS, with_article


@pytest.fixture(scope="module")
def photos(material):
    return [compose(material, split, index)[0] for split in ("train", "test") for index in range(80)]


@pytest.fixture(scope="module")
def singular(material):
    """By every form in which a noun is said, the noun."""
    vocabulary = material.vocabulary
    return {form: noun for noun in vocabulary.cutouts for form in (noun, vocabulary.plural(noun))}


def made(*things, side=120, shown=()):
    """A photograph of (noun, x, y)."""
    pasted = (Pasted(noun, noun, (x - 5, y - 5, x + 5, y + 5), 1.0) for noun, x, y in things)
    return Photo("test", 0, side, "Path", shown, tuple(pasted))


def answer_slowly(photo, text, singular):
    """Answer a question from its words alone."""
    forms = "|".join(sorted(singular, key=len, reverse=True))
    named = [singular[form] for form in re.findall(rf"\b({forms})\b", text)]
    there = [thing for thing in photo.objects if thing.noun == named[0]]
    if re.match("How many|Count", text):
        return ["none", "one", "two", "three", "four", "five"][len(there)]
    if len(named) == 2:
        (a,), (b,) = there, [thing for thing in photo.objects if thing.noun == named[1]]
        axis, words = (0, ("left", "right")) if " left or right " in text else (1, ("above", "below"))
        apart = (a.box[axis] + a.box[axis + 2] - b.box[axis] - b.box[axis + 2]) / 2
        assert abs(apart) > photo.side / 5, "too close to tell"
        return words[apart > 0]
    if re.match("Where|In which", text):
        (thing,) = there
        x, y = (thing.box[0] + thing.box[2]) / photo.side - 1, (thing.box[1] + thing.box[3]) / photo.side - 1
        assert min(abs(x), abs(y)) >= 1 / 6, "too near the middle to tell"
        return f"{'bottom' if y > 0 else 'top'} {'right' if x > 0 else 'left'}"
    assert re.match(r"(Is there|Do you see|Does the picture show) an? ", text), text
    return "yes" if there else "no"


@pytest.mark.parametrize("way", ["conversation", "examination"])
def test_answers_are_right(way, photos, asker, singular):
    asked = Counter()
    for photo in photos:
        for question in getattr(asker, way)(photo, random.Random(photo.name)):
            assert question.answer == answer_slowly(photo, question.text, singular), question
            asked[question.family, question.answer] += 1
    assert {family for family, _ in asked} == {"existence", "count", "position"}
    assert {answer for _, answer in asked} >= {"left", "right", "above", "below", "one", "two", "three", "four"}
    assert {answer for _, answer in asked} >= {"top left", "top right", "bottom left", "bottom right", "yes", "no"}


def test_conversations_ask_for_as_much_that_is_there_as_is_not(photos, asker):
    orders = set()
    for photo in photos:
        questions = asker.conversation(photo, random.Random(photo.name))
        answers = [question.answer for question in questions if question.family == "existence"]
        assert answers.count("yes") == answers.count("no") == min(2, len(photo.counts))
        assert len({question.text for question in questions}) == len(questions) <= 8
        orders.add(tuple(question.family for question in questions[:3]))
    assert len(orders) > 10


def test_training_asks_in_vain_about_as_often_for_a_noun_as_it_is_there(material, asker):
    answers = {"yes": Counter(), "no": Counter()}
    singular = {with_article(noun): noun for noun in material.vocabulary.cutouts}
    for index in range(1500):
        photo = Photo("train", index, 112, "", (), _unplaced(material, index))
        for question in asker.conversation(photo, random.Random(index)):
            if question.family == "existence":
                noun = singular[re.search(r"\b(an? .*?)(?: in the picture)?\?", question.text)[1]]
                answers[question.answer][noun] += 1
    popular = [noun for noun, _ in answers["yes"].most_common(5)]
    rare = [noun for noun, _ in answers["yes"].most_common()[-60:]]
    for nouns in (popular, rare):
        yes, no = (sum(answers[answer][noun] for noun in nouns) for answer in ("yes", "no"))
        assert 0.4 < yes / (yes + no) < 0.6


def _unplaced(material, index):
    nouns = sample_nouns(material, "train", material.backgrounds["train"][0], random.Random(index))
    return tuple(Pasted(noun, noun, (0, 0, 10, 10), 1.0) for noun in nouns)


def test_examinations_ask_for_each_kind_once(photos, asker):
    for photo in photos:
        kinds = [question.kind for question in asker.examination(photo, random.Random(photo.name))]
        assert kinds[:5] == ["present", *NEGATIVES, "count"]
        assert kinds[5:] in ([], ["relation"], ["quarter"], ["relation", "quarter"])


def test_negatives_are_those_of_pope(material, asker):
    rng = random.Random("photos-statistics")
    counts, together = Counter(), Counter()
    for _ in range(3000):
        present = set(sample_nouns(material, "train", rng.choice(material.backgrounds["train"]), rng))
        counts.update(present)
        together.update((a, b) for a in present for b in present if a != b)
    photo = made(("cow", 20, 20), ("duck", 100, 20), shown=("tree",))
    absent = sorted(set(material.pools["test"]) - {"cow", "duck", "tree", "bird"})

    def asked(negative):
        return {asker.absent_noun(photo, negative, random.Random(i)) for i in range(400)}

    assert asked("random") == set(absent)
    assert asked("popular") == set(sorted(absent, key=lambda noun: -counts[noun])[:3])
    likely = sorted(absent, key=lambda noun: -(together[noun, "cow"] + together[noun, "duck"]))[:3]
    assert asked("adversarial") == set(likely)
    assert set(likely) & set(material.vocabulary.themes["farm"])
    assert asked("absent") <= set(absent)
    with pytest.raises(ValueError, match="negative must be one of absent, random, popular, adversarial, got 'rare'"):
        asker.absent_noun(photo, "rare", rng)


def test_what_is_clearly_apart_is_asked_about(asker):
    photo = made(("cow", 20, 20), ("dog", 100, 30), ("car", 62, 100), ("pig", 55, 101), ("pig", 20, 101))
    asked = {(q.text, q.answer) for seed in range(20) for q in asker.relations(photo, random.Random(seed))}
    assert asked == {
        ("Is the cow left or right of the dog?", "left"),
        ("Is the dog left or right of the cow?", "right"),
        ("Is the cow left or right of the car?", "left"),
        ("Is the car left or right of the cow?", "right"),
        ("Is the dog left or right of the car?", "right"),
        ("Is the car left or right of the dog?", "left"),
        ("Is the cow above or below the car?", "above"),
        ("Is the car above or below the cow?", "below"),
        ("Is the dog above or below the car?", "above"),
        ("Is the car above or below the dog?", "below"),
    }
    quarters = asker.quarters(photo, random.Random(0))
    assert {question.answer for question in quarters} == {"top left", "top right"}
    assert len(quarters) == 2


def test_counts_ask_first_for_what_is_there_more_than_once(asker):
    photo = made(("cow", 20, 20), ("mouse", 100, 30), ("mouse", 60, 100), ("dog", 60, 20))
    for seed in range(10):
        questions = asker.counts(photo, random.Random(seed))
        assert [question.answer for question in questions] == ["two", "one", "one"]
        assert "mice" in questions[0].text


@pytest.mark.parametrize(
    ("nouns", "caption"),
    [
        (["dog"], "A dog."),
        (["apple", "dog"], "An apple and a dog."),
        (["dog", "mouse", "mouse", "car"], "A dog, two mice and a car."),
        (["sheep", "sheep", "sheep", "light bulb"], "Three sheep and a light bulb."),
    ],
)
def test_captions_list_what_is_there_from_left_to_right(nouns, caption, asker):
    photo = made(*((noun, 10 + 20 * place, 50) for place, noun in enumerate(nouns)))
    assert asker.caption(photo) == caption
    question = asker.caption_question(photo, random.Random(0))
    assert (question.family, question.answer) == ("caption", caption)


def test_captions_of_composed_photographs_say_all_that_is_there(photos, asker, singular):
    for photo in photos:
        counted = Counter()
        for part in re.split(", | and ", asker.caption(photo).lower().removesuffix(".")):
            number, _, noun = part.partition(" ")
            counted[singular[noun]] += 1 if number in ("a", "an") else NUMBERS.index(number)
        assert counted == Counter(thing.noun for thing in photo.objects)
