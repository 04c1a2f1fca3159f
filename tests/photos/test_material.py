"""What the tables say, and what is found in folders by them."""

import logging
import random
import shutil
from importlib.resources import files

import pytest
import yaml
from PIL import Image

from mllm_vision.photos import SPLITS, Asker, Material, compose
from mllm_vision.photos.material import load_vocabulary
from tests.photos.conftest import BACKGROUNDS, SIDE, names

BACKGROUND_TABLE = yaml.safe_load((files("mllm_vision.photos") / "backgrounds.yaml").read_text())


def test_a_cutout_has_one_noun_and_one_split():
    assert len(names()) == len(set(names())) == 250


def test_every_noun_is_learnt_from_training_cutouts_and_has_a_theme():
    vocabulary = load_vocabulary()
    assert all(by_split["train"] for by_split in vocabulary.cutouts.values())
    themed = {noun for nouns in vocabulary.themes.values() for noun in nouns}
    assert themed == set(vocabulary.cutouts)


def test_a_background_is_in_one_split_and_shows_known_nouns():
    listed = [name for key in (*SPLITS, "left_out") for name in BACKGROUND_TABLE[key]]
    assert len(listed) == len(set(listed))
    assert set(BACKGROUND_TABLE["shows"]) <= set(listed)
    assert {noun for nouns in BACKGROUND_TABLE["shows"].values() for noun in nouns} <= set(load_vocabulary().cutouts)


def test_kin_go_both_ways_but_not_between_the_kinds():
    vocabulary = load_vocabulary()
    assert vocabulary.kin("bird") == {"chicken", "duck", "penguin"}
    assert vocabulary.kin("duck") == {"bird"}
    assert vocabulary.kin("dog") == set()


@pytest.mark.parametrize(("noun", "plural"), [("dog", "dogs"), ("mouse", "mice"), ("sheep", "sheep"), ("bus", "buses")])
def test_plurals(noun, plural):
    assert load_vocabulary().plural(noun) == plural


def test_no_noun_that_ends_unlike_others_lacks_its_plural():
    vocabulary = load_vocabulary()
    for noun in vocabulary.cutouts:
        if noun.endswith(("s", "x", "z", "ch", "sh", "o", "y", "f")) and not noun.endswith(("ey", "ay", "oy", "oo")):
            assert vocabulary.plural(noun) != f"{noun}s", noun


def test_pools_hold_what_the_folder_holds(material):
    flat = {split: [name for held in material.pools[split].values() for name in held] for split in SPLITS}
    assert sorted(name for held in flat.values() for name in held) == sorted(names())
    assert set(material.pools["test"]) < set(material.pools["train"])
    assert {name: weight for name, weight in material.weights.items() if name in ("bird", "dog", "apple")} == {
        "bird": 4,
        "dog": 1,
        "apple": 3,
    }


def test_versions_of_a_background_stay_together(material):
    by_split = {split: [one.name for one in found] for split, found in material.backgrounds.items()}
    assert by_split == {
        "train": ["FallenLeaf", "Kay", "summer_1am"],
        "validation": ["ColdRipple"],
        "test": ["Kite", "Path"],
    }
    kay = material.backgrounds["train"][1]
    assert [path.name for path in kay.paths] == ["wide.png", "tall.png"]
    assert [one.shows for one in material.backgrounds["test"]] == [("bird",), ("tree",)]


def test_links_previews_and_what_is_left_out_are_no_backgrounds(cutouts, backgrounds, tmp_path):
    shutil.copytree(backgrounds, tmp_path / "given")
    images = tmp_path / "given" / "Path" / "contents" / "images"
    for link in ("small.jpg", "wider.jpg"):
        (images / link).symlink_to("wide.jpg")
    for name in (
        "Path/contents/screenshot.png",
        "Autumn/contents/images/wide.jpg",
        "pixels-l.webp",
        "usr/share/SafeLanding/wide.jpg",
    ):
        path = tmp_path / "given" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 200)).save(path)
    (images / "readme.txt").write_text("no picture")
    found = Material(cutouts, [tmp_path / "given"], SIDE).backgrounds
    assert sum(len(one.paths) for split in SPLITS for one in found[split]) == len(BACKGROUNDS)
    assert [one.name for one in found["test"]] == ["Kite", "Path"]


def test_unlisted_backgrounds_have_the_split_of_their_name_in_whatever_company(cutouts, backgrounds, tmp_path):
    for i in range(30):
        (tmp_path / f"trip{i}").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / f"trip{i}" / "a.png")
        Image.new("RGB", (4, 4)).save(tmp_path / f"trip{i}" / "b.png")

    def splits(*folders):
        found = Material(cutouts, folders, SIDE).backgrounds
        return {one.name: split for split in SPLITS for one in found[split] if one.name.startswith("trip")}

    alone = splits(tmp_path)
    assert len(alone) == 30
    assert set(alone.values()) == set(SPLITS)
    shutil.rmtree(tmp_path / "trip7")
    assert splits(backgrounds, tmp_path) == {name: split for name, split in alone.items() if name != "trip7"}


def test_pictures_are_read_without_margins_and_at_a_useful_size(material):
    assert material.cutout(names()[0]).size == (50, 30)
    (kay,) = (one for one in material.backgrounds["train"] if one.name == "Kay")
    assert [material.backdrop(path).size for path in kay.paths] == [(240, 130), (130, 240)]
    (summer,) = (one for one in material.backgrounds["train"] if one.name == "summer_1am")
    assert material.backdrop(summer.paths[0]).size == (2 * SIDE, 2 * SIDE)


def test_small_backgrounds_are_enlarged(cutouts, backgrounds, tmp_path):
    shutil.copytree(backgrounds, tmp_path / "given")
    path = tmp_path / "given" / "Grey.png"
    Image.new("RGB", (56, 28)).save(path)
    assert Material(cutouts, [tmp_path / "given"], SIDE).backdrop(path).size == (2 * SIDE, SIDE)


def test_missing_folders_and_empty_ones_are_refused(cutouts, backgrounds, tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere is no folder"):
        Material(cutouts, [backgrounds, tmp_path / "nowhere"], SIDE)
    with pytest.raises(
        ValueError, match=r"too few nouns \(0 in train, 0 in validation, 0 in test; 16 are needed\).*747"
    ):
        Material(tmp_path, [backgrounds], SIDE)
    with pytest.raises(ValueError, match="no background for train and validation and test among the 0"):
        Material(cutouts, [tmp_path], SIDE)


def test_what_is_missing_is_said_and_what_cannot_be_learnt_is_not_asked(cutouts, backgrounds, tmp_path, caplog):
    shutil.copytree(cutouts, tmp_path / "some")
    missing = ["animals/mammals/dogs/dingo", "food/fruit/apple_red"]
    for name in missing:
        (tmp_path / "some" / f"{name}.png").unlink()
    with caplog.at_level(logging.WARNING):
        pools = Material(tmp_path / "some", [backgrounds], SIDE).pools
    assert "2 cut-outs are not in" in caplog.text
    assert all(name in caplog.text for name in missing)
    assert "dog" not in pools["test"]
    assert "apple" in pools["train"]
    assert "apple" not in pools["test"]


def test_a_split_needs_enough_nouns_to_ask_for(cutouts, backgrounds, tmp_path):
    pools = Material(cutouts, [backgrounds], SIDE).pools
    for nouns, enough in ((16, True), (15, False)):
        folder = tmp_path / str(nouns)
        for noun in [noun for noun in pools["test"] if noun in pools["validation"]][:nouns]:
            for name in (name for split in SPLITS for name in pools[split][noun]):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(cutouts / f"{name}.png", folder / f"{name}.png")
        if enough:
            material = Material(folder, [backgrounds], SIDE)
            asker = Asker(material)
            for index in range(50):
                photo, _ = compose(material, "test", index)
                assert len(asker.examination(photo, random.Random(index))) >= 5
                assert asker.conversation(photo, random.Random(index))
        else:
            with pytest.raises(ValueError, match=r"too few nouns \(15 in train, 15 in validation, 15 in test; 16 are"):
                Material(folder, [backgrounds], SIDE)


def test_a_transparent_cutout_is_refused(cutouts, backgrounds, tmp_path):
    shutil.copytree(cutouts, tmp_path / "some")
    Image.new("RGBA", (9, 9)).save(tmp_path / "some" / f"{names()[0]}.png")
    with pytest.raises(ValueError, match="is transparent all over"):
        Material(tmp_path / "some", [backgrounds], SIDE).cutout(names()[0])
