"""Drawn scenes: the same by seed, apart by split, and labelled as they are drawn."""

import numpy as np
import pytest
from PIL import Image

from mllm_vision.scenes import SPLITS, label_patches, render, sample_scene
from mllm_vision.scenes.draw import COLOURS, SHAPES, SIZES, TEXTS, Background, PrintedText, Scene, Thing

GREY = Background("plain", (150, 150, 150), (150, 150, 150), 0)


def test_the_same_seed_draws_the_same_pixels_and_another_draws_others():
    first, again, other = sample_scene("train", 5), sample_scene("train", 5), sample_scene("train", 5, seed=1)
    assert first == again
    assert render(first).tobytes() == render(again).tobytes()
    assert first != other


def test_splits_share_no_content_across_indices_and_seeds():
    contents = {
        split: {sample_scene(split, i, seed=seed).content_hash() for i in range(60) for seed in (0, 1)}
        for split in SPLITS
    }
    assert all(len(of_split) > 100 for of_split in contents.values())
    assert not contents["train"] & contents["validation"]
    assert not contents["train"] & contents["test"]
    assert not contents["validation"] & contents["test"]


def test_content_hash_ignores_places_and_sees_everything_else():
    square = Thing("square", "red", "small", "plain", 30, 30, 28)
    moved = Thing("square", "red", "small", "plain", 90, 31, 26)
    red_ring, blue_ring = (Thing("ring", colour, "large", "plain", 90, 90, 44) for colour in ("red", "blue"))
    text = PrintedText("zoo", "black", 28, 5, 100)

    def content(*things, text=None):
        return Scene("train", 0, 140, GREY, things, text).content_hash()

    assert content(square, red_ring) == content(red_ring, moved)
    assert len({content(square, red_ring), content(square, blue_ring), content(square, red_ring, text=text)}) == 3


@pytest.mark.parametrize("side", [84, 140, 210])
def test_things_lie_inside_the_picture_and_apart(side):
    for i in range(60):
        scene = sample_scene("train", i, side=side)
        assert 2 <= len(scene.things) <= 5
        boxes = [thing.box for thing in scene.things] + ([scene.text.box] if scene.text else [])
        for k, (left, top, right, bottom) in enumerate(boxes):
            assert left >= 0 <= top
            assert right <= side >= bottom
            for l2, t2, r2, b2 in boxes[:k]:
                assert left >= r2 or right <= l2 or top >= b2 or bottom <= t2
        for thing in scene.things:
            low, high = SIZES[thing.size]
            assert round(low * side / 140) <= thing.width <= round(high * side / 140)


def test_a_thing_is_drawn_in_its_colour_and_nowhere_else():
    for i in range(40):
        scene = sample_scene("train", i)
        pixels = np.asarray(render(scene)).astype(int)
        bare = np.asarray(render(Scene("train", i, scene.side, scene.background, (), None))).astype(int)
        inside = np.zeros(pixels.shape[:2], bool)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            inside[top:bottom, left:right] = True
            # Of the full tones in the box, the named colour is the most frequent (stripes and dots take up less).
            box = pixels[top:bottom, left:right].reshape(-1, 3)
            hits = {name: (box == colour).all(1).sum() for name, colour in COLOURS.items()}
            assert max(hits, key=hits.get) == thing.colour
        if scene.text:
            left, top, right, bottom = scene.text.box
            inside[top:bottom, left:right] = True
        changed = (pixels != bare).any(-1)
        assert not (changed & ~inside).any()


def test_every_shape_has_a_silhouette_of_its_own():
    masks = []
    for shape in SHAPES:
        scene = Scene("train", 0, 70, GREY, (Thing(shape, "black", "large", "plain", 35, 35, 44),), None)
        masks.append(np.asarray(render(scene))[..., 0] < 80)
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert (a & b).sum() / (a | b).sum() < 0.9


def test_labels_of_a_picture_that_can_be_checked_by_eye():
    square = Thing("square", "red", "small", "plain", 14, 14, 28)
    text = PrintedText("zoo", "black", 26, 20, 50)
    labels = label_patches(Scene("train", 0, 70, GREY, (square,), text), 14)
    # The word covers x 21..70, y 50..65: from the second column on, the fourth row in part and the fifth in part.
    assert labels[:3].tolist() == [[0, 0, -1, -1, -1], [0, 0, -1, -1, -1], [-1, -1, -1, -1, -1]]
    assert (labels[3:, 2:4] == 1).all()
    assert (labels[3:, 0] == -1).all()


def test_labels_follow_the_drawn_pixels():
    for i in range(40):
        scene = sample_scene("validation", i)
        pixels = np.asarray(render(scene))
        bare = np.asarray(render(Scene("train", i, scene.side, scene.background, (), None)))
        drawn = (pixels != bare).any(-1).reshape(10, 14, 10, 14).mean((1, 3))
        labels = label_patches(scene, 14)
        assert (labels[drawn == 0] == -1).sum() >= (drawn == 0).sum() - 6  # the box of a word has empty corners
        is_thing = (labels >= 0) & (labels < len(scene.things))
        assert (drawn[is_thing] > 0.1).all()


def test_all_texts_fit_and_all_kinds_appear():
    scenes = [sample_scene("train", i) for i in range(400)]
    assert {scene.text.text for scene in scenes if scene.text} == set(TEXTS)
    assert {thing.shape for scene in scenes for thing in scene.things} == set(SHAPES)
    assert {thing.colour for scene in scenes for thing in scene.things} == set(COLOURS)
    assert 0.35 < sum(scene.text is not None for scene in scenes) / len(scenes) < 0.55


def test_text_scale_makes_the_print_smaller_and_nothing_else():
    for i in range(60):
        scene = sample_scene("train", i, side=280, text_scale=0.5)
        for thing in scene.things:
            low, high = SIZES[thing.size]
            assert 2 * low <= thing.width <= 2 * high
        if scene.text:
            assert 27 <= scene.text.points <= 33  # as in a picture of half the side
            left, top, right, bottom = scene.text.box
            assert left >= 0 <= top and right <= 280 >= bottom
    assert sample_scene("test", 4, text_scale=1.0) == sample_scene("test", 4)


@pytest.mark.parametrize("scale", [0, -1, 1.5])
def test_a_text_scale_that_cannot_be_drawn_is_named(scale):
    with pytest.raises(ValueError, match=f"text_scale must be above 0 and at most 1.*got {scale}"):
        sample_scene("train", 0, text_scale=scale)


def test_render_gives_an_rgb_picture_of_the_asked_size():
    image = render(sample_scene("test", 0, side=98))
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (98, 98))


@pytest.mark.parametrize(("arguments", "message"), [(("dev", 0), "split must be one of train"), (("test", 0), "side")])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_scene(*arguments, side=20)
