"""What photographs are composed of: cut-out photographs whose noun is known, and backgrounds.

Which files hold what is in the two tables beside this module, `cutouts.yaml` and `backgrounds.yaml`; the pictures come
from folders of the user's. No cut-out and no background is in two splits.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

SPLITS = ("train", "validation", "test")
LEAST_NOUNS = 16  # of each split: five in a picture, their kin and what the background shows leave enough to ask for

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_HELD_OUT_BUCKETS = {0: "test", 1: "validation"}  # of 10, for backgrounds that the table does not list
_FAINT = 16  # alpha up to this is the fringe of a cut-out, which its box leaves out

logger = logging.getLogger(__name__)


class Vocabulary:
    """The nouns, what is likely to be together, and which nouns may not be told apart.

    Attributes:
        cutouts: By noun, by split, names of cut-outs: paths below the folder of cut-outs, without suffix.
        themes: By theme, nouns.
    """

    def __init__(self, table: dict[str, Any]):
        self.cutouts: dict[str, dict[str, list[str]]] = {
            noun: {split: entry.get(split, []) for split in SPLITS} for noun, entry in table["nouns"].items()
        }
        self.themes: dict[str, list[str]] = table["themes"]
        self._plurals = {noun: entry["plural"] for noun, entry in table["nouns"].items() if "plural" in entry}
        self._kinds: dict[str, list[str]] = table["kinds"]

    def plural(self, noun: str) -> str:
        return self._plurals.get(noun, noun + "s")

    def kin(self, noun: str) -> set[str]:
        """Hypernyms and hyponyms of a noun: a duck may be called a bird."""
        return {kind for kind, members in self._kinds.items() if noun in members} | set(self._kinds.get(noun, ()))


@cache
def load_vocabulary() -> Vocabulary:
    """The vocabulary of `cutouts.yaml`."""
    return Vocabulary(_table("cutouts"))


@dataclass(frozen=True)
class Background:
    """A background: pictures (crops, versions of one) that belong to one split, and nouns that they show themselves."""

    name: str
    paths: tuple[Path, ...]
    shows: tuple[str, ...] = ()


class Material:
    """Cut-outs and backgrounds of two folders; pictures are read once, when they are first needed, and kept.

    Args:
        cutouts: Folder that holds the cut-outs as PNG with transparency, under the names of `cutouts.yaml`.
        backgrounds: Folders of pictures; all below one subfolder are one background.
        side: Width and height of the photographs to compose, in pixels.

    Attributes:
        pools: By split, by noun, names of the cut-outs that are there.
        backgrounds: By split.

    Raises:
        NotADirectoryError: a folder is missing.
        ValueError: too few cut-outs that are known, or no background for some split.
    """

    def __init__(self, cutouts: str | Path, backgrounds: Sequence[str | Path], side: int):
        self.side, self._folder = side, Path(cutouts)
        for folder in (self._folder, *map(Path, backgrounds)):
            if not folder.is_dir():
                raise NotADirectoryError(f"{folder} is no folder; give one of cut-outs and one or more of backgrounds")
        self.vocabulary = load_vocabulary()
        self.pools = self._find_cutouts()
        self.backgrounds = _find_backgrounds([Path(folder) for folder in backgrounds])
        self._cutouts: dict[str, Image.Image] = {}
        self._backdrops: dict[Path, Image.Image] = {}

    @cached_property
    def weights(self) -> dict[str, int]:
        """How likely a noun is in a picture: by its cut-outs in training, so that some nouns are popular."""
        return {noun: min(len(names), 4) for noun, names in self.pools["train"].items()}

    def cutout(self, name: str) -> Image.Image:
        """A cut-out, RGBA, without its margin, at most half of `side` long, which is more than any is pasted."""
        if name not in self._cutouts:
            image = Image.open(self._folder / f"{name}.png").convert("RGBA")
            box = image.getchannel("A").point(lambda alpha: 255 * (alpha > _FAINT)).getbbox()
            if box is None:
                raise ValueError(f"the cut-out {name} is transparent all over; install its package anew")
            image = image.crop(box)
            image.thumbnail((self.side // 2, self.side // 2), Image.Resampling.LANCZOS)
            self._cutouts[name] = image
        return self._cutouts[name]

    def backdrop(self, path: Path) -> Image.Image:
        """A background, RGB, its shorter side once to twice `side` pixels."""
        if path not in self._backdrops:
            opened = Image.open(path)
            opened.draft("RGB", (4 * self.side, 4 * self.side))  # a JPEG is decoded no larger than that takes
            image = opened.convert("RGB")
            short = max(self.side, min(*image.size, 2 * self.side))
            width, height = (round(length * short / min(image.size)) for length in image.size)
            self._backdrops[path] = image.resize((width, height), Image.Resampling.LANCZOS)
        return self._backdrops[path]

    def _find_cutouts(self) -> dict[str, dict[str, tuple[str, ...]]]:
        pools: dict[str, dict[str, tuple[str, ...]]] = {split: {} for split in SPLITS}
        missing = []
        for noun, by_split in self.vocabulary.cutouts.items():
            for split, names in by_split.items():
                there = tuple(name for name in names if (self._folder / f"{name}.png").is_file())
                missing += [name for name in names if name not in there]
                # What no training picture shows has no name to the model, so it is nothing to ask for either.
                if there and (split == "train" or noun in pools["train"]):
                    pools[split][noun] = there
        few = {split: len(pool) for split, pool in pools.items() if len(pool) < LEAST_NOUNS}
        if few:
            found = ", ".join(f"{n} in {split}" for split, n in few.items())
            raise ValueError(
                f"{self._folder} has cut-outs of too few nouns ({found}; {LEAST_NOUNS} are needed); it must be the "
                f"folder of Tux Paint's stamps, with {', '.join(missing[:5])} and {max(0, len(missing) - 5)} more "
                "as PNG files"
            )
        if missing:
            logger.warning("%d cut-outs are not in %s: %s", len(missing), self._folder, ", ".join(missing))
        return pools


def _find_backgrounds(folders: Sequence[Path]) -> dict[str, list[Background]]:
    table = _table("backgrounds")
    listed = {name: split for split in SPLITS for name in table[split]}
    paths: dict[str, list[Path]] = {}
    seen = set()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            # Packages hold links from many sizes to one file, and a small preview.
            if path.suffix.lower() not in _SUFFIXES or path.stem == "screenshot" or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            parts = path.relative_to(folder).with_suffix("").parts
            name = next((part for part in parts if part in listed or part in table["left_out"]), parts[0])
            if name not in table["left_out"]:
                paths.setdefault(name, []).append(path)
    backgrounds: dict[str, list[Background]] = {split: [] for split in SPLITS}
    for name in sorted(paths):
        split = listed.get(name) or _split_of(name)
        backgrounds[split].append(Background(name, tuple(paths[name]), tuple(table["shows"].get(name, ()))))
    if empty := [split for split in SPLITS if not backgrounds[split]]:
        raise ValueError(
            f"no background for {' and '.join(empty)} among the {len(paths)} in {', '.join(map(str, folders))}; a "
            "split has backgrounds of its own, so give a folder with more pictures, or several folders"
        )
    return backgrounds


def _split_of(name: str) -> str:
    return _HELD_OUT_BUCKETS.get(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 10, "train")


def _table(name: str) -> dict[str, Any]:
    return yaml.safe_load((files("mllm_vision.photos") / f"{name}.yaml").read_text(encoding="utf-8"))
