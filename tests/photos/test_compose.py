"""Photographs, measured by the colours that were pasted."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mllm_vision.photos import SPLITS, Material, Pasted, Photo, compose
from mllm_vision.photos.compose import LEAST_VISIBLE, SCALES, sample_nouns
from tests.photos.conftest import COLOURS, SIDE


def shows(image, name, tolerance=1):
    """Where the colour of a cut-out shows."""
    return (np.abs(np.asarray(image).astype(int) - COLOURS[name]) <= tolerance).all(-1)


@pytest.mark.parametrize("split", SPLITS)
def test_a_photograph_follows_from_its_arguments(split, material, cutouts, backgrounds):
    fresh = Material(cutouts, [backgrounds], SIDE)
    compose(fresh, split, 5)
    again, image = compose(fresh, split, 3)
    photo, first = compose(material, split, 3)
    assert photo == again
    np.testing.assert_array_equal(np.asarray(image), np.asarray(first))
    assert photo != compose(material, split, 3, seed=1)[0]
    assert photo.name == f"{split}-000003"


@pytest.mark.parametrize("split", SPLITS)
def test_objects_are_of_their_split_and_as_large_and_visible_as_stated(split, material):
    names = {name for held in material.pools[split].values() for name in held}
    for index in range(60):
        photo, image = compose(material, split, index)
        assert image.size == (SIDE, SIDE)
        assert 1 <= len(photo.objects) <= 5
        assert photo.background in [one.name for one in material.backgrounds[split]]
        for thing in photo.objects:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            assert SCALES[0] * SIDE - 1 <= max(right - left, bottom - top) <= SCALES[1] * SIDE + 1
            assert LEAST_VISIBLE <= thing.visible <= 1
            assert thing.cutout in names
            assert thing.cutout in material.pools[split][thing.noun]


def test_what_shows_of_an_object_is_what_the_record_says(material):
    covered = 0
    for index in range(60):
        photo, image = compose(material, "test", index)
        layers = []
        for thing in photo.objects:
            left, top, right, bottom = thing.box
            layer = np.zeros((SIDE, SIDE), int)
            sized = material.cutout(thing.cutout).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
            layer[top:bottom, left:right] = np.asarray(sized.getchannel("A"))
            layers.append(layer)
        for place, thing in enumerate(photo.objects):
            above = np.max([np.zeros((SIDE, SIDE)), *layers[place + 1 :]], axis=0)
            hidden = above >= 128
            mask = layers[place] >= 128
            assert thing.visible == pytest.approx((mask & ~hidden).sum() / mask.sum(), abs=0.001)
            # Resampling overshoots a little along an edge.
            assert shows(image, thing.cutout, tolerance=24)[(layers[place] == 255) & (above == 0)].all()
            covered += thing.visible < 1
    assert covered > 10


def test_later_objects_lie_on_top(material):
    photo = next(p for p in (compose(material, "test", i)[0] for i in range(200)) if len(p.objects) > 1)
    assert photo.objects[-1].visible == 1
    assert any(compose(material, "test", i)[0].objects[0].visible < 1 for i in range(50))


def test_only_training_pictures_are_varied(material):
    def kept(split):
        """Share of objects in whose middle the colour is as it was drawn."""
        found = []
        for photo, image in (compose(material, split, index) for index in range(40)):
            thing = photo.objects[-1]
            x, y = map(int, thing.centre)
            found.append(shows(image, thing.cutout)[y, x])
        return np.mean(found)

    assert kept("test") == kept("validation") == 1
    assert kept("train") < 0.2


def test_training_pictures_flip_what_is_pasted(cutouts, backgrounds):
    lopsided = Image.new("RGBA", (50, 50), (255, 0, 0, 255))
    lopsided.paste((0, 0, 255, 255), (0, 0, 25, 50))
    sides = set()
    for split in ("train", "test"):
        material = Material(cutouts, [backgrounds], SIDE)
        material._cutouts = dict.fromkeys(COLOURS, lopsided)
        for index in range(20):
            photo, image = compose(material, split, index)
            thing = photo.objects[-1]
            left, top, right, bottom = thing.box
            strip = np.asarray(image)[(top + bottom) // 2, left:right]
            red = strip[:, 0] > 120
            sides.add((split, bool(red[: len(red) // 2].sum() < red[len(red) // 2 :].sum())))
    assert sides == {("train", True), ("train", False), ("test", True)}


def test_nothing_is_pasted_that_the_background_shows_or_that_another_takes_in(material):
    kinds = Counter()
    for index in range(150):
        photo, _ = compose(material, "test", index)
        nouns = set(photo.counts)
        assert not nouns & set(photo.shown)
        assert not any(nouns & material.vocabulary.kin(noun) for noun in nouns)
        kinds.update(nouns)
    assert {"bird", "tree", "chicken"} <= set(kinds)


def test_themes_and_counts_vary(material):
    background = material.backgrounds["train"][0]
    pictures = [sample_nouns(material, "train", background, random.Random(index)) for index in range(1000)]
    assert {len(nouns) for nouns in pictures} == {1, 2, 3, 4, 5}
    assert {nouns.count(noun) for nouns in pictures for noun in nouns} == {1, 2, 3, 4}
    farm = set(material.vocabulary.themes["farm"])
    company = [noun in farm for nouns in pictures if "cow" in nouns for noun in set(nouns) - {"cow"}]
    assert np.mean(company) > 3 * np.mean([noun in farm for nouns in pictures for noun in set(nouns)])


def test_an_unknown_split_is_refused(material):
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        compose(material, "dev", 0)


def test_counts_go_from_left_to_right():
    boxes = {"dog": (60, 0, 80, 20), "cat": (10, 30, 30, 50), "cow": (40, 0, 50, 10)}
    things = [Pasted(noun, noun, box, 1.0) for noun, box in boxes.items()]
    photo = Photo("test", 0, 112, "Path", (), (*things, Pasted("dog", "dog2", (32, 0, 40, 10), 1.0)))
    assert list(photo.counts.items()) == [("cat", 1), ("dog", 2), ("cow", 1)]
    assert [thing.noun for thing in photo.single_objects()] == ["cat", "cow"]
