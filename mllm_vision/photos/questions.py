"""Questions about a composed photograph, with the right answer, and the caption that lists what is in it.

Three families: existence (yes or no), count (a number word) and position (of which half or quarter). Negatives of
existence are of the three kinds of POPE (Li et al., 2023): a `random` absent noun, one of the three `popular` ones that
are most frequent in training, and one of the three `adversarial` ones that co-occur most with what is in the picture.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

from mllm_vision.photos.compose import Pasted, Photo, sample_nouns
from mllm_vision.photos.material import Material

FAMILIES = ("existence", "count", "position")
NEGATIVES = ("random", "popular", "adversarial")
NUMBERS = ("no", "one", "two", "three", "four", "five")
CAPTION_PROMPTS = (
    "Describe the picture.",
    "What is in the picture?",
    "List the things in the picture.",
    "What do you see?",
    "Name what the picture shows.",
)

_EXISTENCE = ("Is there {} in the picture?", "Do you see {}?", "Does the picture show {}?")
_COUNT = ("How many {} are there?", "How many {} do you see?", "Count the {}.")
_QUARTER = ("Where is the {}?", "In which part of the picture is the {}?")
_MOST_LIKELY = 3  # POPE asks for the first three of the popular and the adversarial ranking
_STATISTICS_PHOTOS = 3000


@dataclass(frozen=True)
class Question:
    """A question and its right answer.

    `kind` tells members of a family apart: for existence "present" or the kind of negative, for position "relation"
    or "quarter".
    """

    family: str
    kind: str
    text: str
    answer: str


class Asker:
    """Asks about photographs; knows how often nouns occur, alone and together, in training.

    Args:
        material: What the photographs are composed of.
    """

    def __init__(self, material: Material):
        self._vocabulary, self._pools = material.vocabulary, material.pools
        self._frequency: Counter[str] = Counter()
        self._together: Counter[tuple[str, str]] = Counter()
        rng = random.Random("photos-statistics")
        for _ in range(_STATISTICS_PHOTOS):
            nouns = sorted(set(sample_nouns(material, "train", rng.choice(material.backgrounds["train"]), rng)))
            self._frequency.update(nouns)
            self._together.update(combinations(nouns, 2))

    def absent_noun(self, photo: Photo, negative: str, rng: random.Random) -> str:
        """A noun that is not in the photograph: one of POPE's `NEGATIVES`, or "absent".

        "absent" is for training: absent nouns are drawn about as often as nouns are present, so that the noun alone
        does not predict the answer.

        Raises:
            ValueError: there is no such kind of negative.
        """
        present = set(photo.counts)
        doubtful = present | set(photo.shown) | {kin for noun in present for kin in self._vocabulary.kin(noun)}
        absent = sorted(set(self._pools[photo.split]) - doubtful)
        if negative == "absent":
            return rng.choices(absent, [1 + self._frequency[noun] for noun in absent])[0]
        if negative == "random":
            return rng.choice(absent)
        if negative == "popular":
            ranked = sorted(absent, key=lambda noun: -self._frequency[noun])
        elif negative == "adversarial":
            ranked = sorted(absent, key=lambda noun: -sum(self._pair(noun, other) for other in present))
        else:
            raise ValueError(f"negative must be one of absent, {', '.join(NEGATIVES)}, got {negative!r}")
        return rng.choice(ranked[:_MOST_LIKELY])

    def counts(self, photo: Photo, rng: random.Random) -> list[Question]:
        """Ask how many there are of each noun; one of which there are several comes first where there is one."""
        nouns = sorted(photo.counts)
        rng.shuffle(nouns)
        nouns.sort(key=lambda noun: photo.counts[noun] == 1)
        asked = ((rng.choice(_COUNT).format(self._vocabulary.plural(noun)), photo.counts[noun]) for noun in nouns)
        return [Question("count", "count", text, NUMBERS[n]) for text, n in asked]

    def relations(self, photo: Photo, rng: random.Random) -> list[Question]:
        """Ask on which side of another a single object lies, of all pairs that lie clearly apart, in random order."""
        questions = []
        for pair in combinations(photo.single_objects(), 2):
            a, b = rng.sample(pair, 2)
            for axis, (before, after) in enumerate((("left", "right"), ("above", "below"))):
                apart = a.centre[axis] - b.centre[axis]
                if abs(apart) > photo.side / 5:
                    of = "left or right of" if axis == 0 else "above or below"
                    text = f"Is the {a.noun} {of} the {b.noun}?"
                    questions.append(Question("position", "relation", text, before if apart < 0 else after))
        rng.shuffle(questions)
        return questions

    def quarters(self, photo: Photo, rng: random.Random) -> list[Question]:
        """Ask in which quarter of the picture a single object lies, of all that clearly lie in one, in random order."""
        questions = []
        for thing in photo.single_objects():
            if quarter := _quarter(thing, photo.side):
                questions.append(Question("position", "quarter", rng.choice(_QUARTER).format(thing.noun), quarter))
        rng.shuffle(questions)
        return questions

    def caption(self, photo: Photo) -> str:
        """List what is there from left to right, with counts: "A dog, two apples and a car."."""
        parts = [
            with_article(noun) if n == 1 else f"{NUMBERS[n]} {self._vocabulary.plural(noun)}"
            for noun, n in photo.counts.items()
        ]
        listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
        return f"{listed[0].upper()}{listed[1:]}."

    def caption_question(self, photo: Photo, rng: random.Random) -> Question:
        """Ask for the caption, in one of `CAPTION_PROMPTS`."""
        return Question("caption", "caption", rng.choice(CAPTION_PROMPTS), self.caption(photo))

    def conversation(self, photo: Photo, rng: random.Random) -> list[Question]:
        """What a model is trained on: up to eight questions of all families in random order, as many yes as no."""
        asked = sorted(photo.counts)
        questions = [_existence("present", noun, rng) for noun in rng.sample(asked, min(2, len(asked)))]
        absent: set[str] = set()
        while len(absent) < len(questions):
            absent.add(self.absent_noun(photo, "absent", rng))
        questions += [_existence("absent", noun, rng) for noun in sorted(absent)]
        questions += self.counts(photo, rng)[:2] + self.relations(photo, rng)[:1] + self.quarters(photo, rng)[:1]
        rng.shuffle(questions)
        return questions

    def examination(self, photo: Photo, rng: random.Random) -> list[Question]:
        """What a model is measured on: existence once for each kind of answer, a count, and what position allows."""
        questions = [_existence("present", rng.choice(sorted(photo.counts)), rng)]
        questions += [_existence(kind, self.absent_noun(photo, kind, rng), rng) for kind in NEGATIVES]
        return questions + self.counts(photo, rng)[:1] + self.relations(photo, rng)[:1] + self.quarters(photo, rng)[:1]

    def _pair(self, noun: str, other: str) -> int:
        return self._together[min(noun, other), max(noun, other)]


def with_article(noun: str) -> str:
    """The noun behind its "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _existence(kind: str, noun: str, rng: random.Random) -> Question:
    text = rng.choice(_EXISTENCE).format(with_article(noun))
    return Question("existence", kind, text, "yes" if kind == "present" else "no")


def _quarter(thing: Pasted, side: int) -> str | None:
    x, y = thing.centre
    if min(abs(x - side / 2), abs(y - side / 2)) < side / 12:
        return None
    return f"{'top' if y < side / 2 else 'bottom'} {'left' if x < side / 2 else 'right'}"
