"""Folders of made-up cut-outs and backgrounds, under the names that the tables know."""

import colorsys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mllm_vision.photos import SPLITS, Asker, Material
from mllm_vision.photos.material import load_vocabulary

SIDE = 112
# A listed photograph for each split, one that shows a tree, and one in two versions.
BACKGROUNDS = {
    "FallenLeaf/contents/images/wide.jpg": (200, 130),
    "Kay/contents/images/wide.png": (240, 130),
    "Kay/contents/images_dark/tall.png": (130, 240),
    "summer_1am.webp": (300, 300),
    "ColdRipple.jpg": (200, 150),
    "Path/contents/images/wide.jpg": (260, 150),
    "Kite/contents/images/wide.jpg": (260, 150),
}


def colour_of(place, total):
    """Colours of full saturation, which no grey background has."""
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(place / total, 1, 0.75))


def names():
    table = load_vocabulary().cutouts
    return [name for by_split in table.values() for split in SPLITS for name in by_split[split]]


COLOURS = {name: colour_of(place, len(names())) for place, name in enumerate(names())}


def draw_cutouts(folder: Path) -> Path:
    """A cut-out for each name: a filled ellipse of one colour, with a transparent margin."""
    for place, (name, colour) in enumerate(COLOURS.items()):
        image = Image.new("RGBA", (60, 40 + place % 20))
        ImageDraw.Draw(image).ellipse([5, 5, 54, 34 + place % 20], fill=(*colour, 255))
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, compress_level=0)
    return folder


def draw_backgrounds(folder: Path) -> Path:
    """Backgrounds from black to grey."""
    for name, size in BACKGROUNDS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").point(lambda level: level // 2).resize(size).convert("RGB").save(path)
    return folder


@pytest.fixture(scope="session")
def cutouts(tmp_path_factory):
    return draw_cutouts(tmp_path_factory.mktemp("cutouts"))


@pytest.fixture(scope="session")
def backgrounds(tmp_path_factory):
    return draw_backgrounds(tmp_path_factory.mktemp("backgrounds"))


@pytest.fixture(scope="session")
def material(cutouts, backgrounds):
    return Material(cutouts, [backgrounds], SIDE)


@pytest.fixture(scope="session")
def asker(material):
    return Asker(material)
