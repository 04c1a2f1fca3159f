"""Rows of a benchmark's data set: from the hub, from a `datasets` directory, or from JSONL files and an image folder.

A local copy has the columns of the data set on the hub. In a folder with JSONL (or JSON) files, pictures are named by
their path in the folder or in its ``images/``; a row that does not say otherwise has as ``file`` the name of its file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mllm_vision.images import load_image

if TYPE_CHECKING:
    import datasets

IMAGE_FOLDER = "images"


@dataclass(frozen=True)
class HubData:
    """A data set on the hub.

    Args:
        dataset: Its id.
        split: Of its splits.
        config: Of its configs.
        revision: Commit, tag or branch; what a branch stood for is in the report.
        images: Where the pictures are, if in another data set: that one, its column with their names, and the column of
            this one that names a row's picture.
    """

    dataset: str
    split: str
    config: str | None = None
    revision: str = "main"
    images: tuple[HubData, str, str] | None = None


DAMAGED = "\0damaged"
"""Column of a line that could not be read, with the reason."""

Encoded = Callable[[], "Path | bytes"]
"""Where a picture is or what is in its file, looked up when it is needed."""


class Row:
    """A row without its pictures, which are loaded when they are needed.

    Args:
        values: By column, pictures left out.
        find: From a column and a number to the picture, a ValueError if there cannot be one; None if there are none.
        number: Of the row in its data set.
    """

    def __init__(self, values: dict[str, Any], find: Callable[[str, int], Encoded] | None = None, number: int = 0):
        self._values, self._find, self.number = values, find or _no_picture, number

    def __getitem__(self, column: str) -> Any:
        if DAMAGED in self._values:
            raise ValueError(self._values[DAMAGED])
        if column not in self._values:
            raise ValueError(f"there is no column {column!r}; there are {', '.join(self._values)}")
        return self._values[column]

    def __contains__(self, column: str) -> bool:
        return column in self._values

    def get(self, column: str, default: Any = None) -> Any:
        """The value, or ``default`` where there is no such column."""
        return self._values.get(column, default)

    def text(self, column: str) -> str:
        """The value, which must be text."""
        value = self[column]
        if not isinstance(value, str):
            raise ValueError(f"{column} must be text, got {value!r}")
        return value

    def texts(self, column: str) -> list[str]:
        """The value, which must be texts, one at least: the answers of a test split are often left out."""
        values = self[column]
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{column} must be texts, one at least, got {values!r}")
        return values

    def picture(self, column: str = "image", number: int = 0) -> Callable[[], Image.Image]:
        """A function that loads a picture, the ``number``-th where the column holds a list of them."""
        return partial(_load, self._find(column, number))

    def fingerprint(self, column: str = "image") -> str:
        """What rows with the same picture share: the name of its file, or else a digest of what is in it."""
        encoded = self._find(column, 0)()
        if isinstance(encoded, bytes):
            return hashlib.sha256(encoded).hexdigest()[:16]
        return f"{encoded.parent.name}/{encoded.name}"


def rows(hub: HubData | None, folder: Path | None) -> tuple[Iterable[Row], dict[str, Any]]:
    """The rows of a data set and where they come from.

    Args:
        hub: Used if there is no ``folder``.
        folder: A local copy.

    Raises:
        ValueError: the folder holds no data set.
        ConnectionError: the hub cannot be reached and the data set is not in the cache.
    """
    if folder is None:
        if hub is None:
            raise ValueError("neither a data set on the hub nor a folder is given")
        return _hub_rows(hub)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; a local copy is a datasets directory or JSONL files with images/")
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if hub is None or hub.split not in splits:
            raise ValueError(f"{folder} has the splits {', '.join(splits)}; give the folder of one of them")
        folder = folder / hub.split
    if (folder / "dataset_info.json").is_file():
        import datasets

        table = datasets.load_from_disk(folder)
        return _table_rows(table, _from_cell(table)), _local(folder, [folder / "state.json"], len(table))
    files = sorted(folder.glob("*.jsonl")) or sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} holds neither dataset_info.json (a datasets directory) nor JSONL files")
    return file_rows(folder, files, [record for path in files for record in records(path)])


def file_rows(
    folder: Path, files: Sequence[Path], values: Sequence[dict[str, Any]]
) -> tuple[Iterable[Row], dict[str, Any]]:
    """Rows with pictures in a folder, and where they come from: the ``files`` that the values were read from."""
    found = [Row(value, partial(_from_file, folder, value), number) for number, value in enumerate(values)]
    return found, _local(folder, files, len(found))


def _local(folder: Path, files: Sequence[Path], n: int) -> dict[str, Any]:
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return {"source": f"folder {folder.name}", "sha256": digest, "rows": n}


def records(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL or JSON file, with ``file`` and, for a line that is broken, `DAMAGED`.

    Raises:
        ValueError: it is no JSON at all.
    """
    text = path.read_text(encoding="utf-8")
    try:
        # POPE's own files are called .json and hold JSONL. A line ends at \n only, not at what else Unicode has.
        values = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else list(map(_record, filter(str.strip, text.split("\n"))))
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    other = {DAMAGED: "the line is no JSON object"}
    return [{"file": path.stem, **(value if isinstance(value, dict) else other)} for value in values]


def _record(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return {DAMAGED: f"the line is no JSON: {error}"}


def _no_picture(column: str, number: int) -> Encoded:
    raise ValueError("the row has no pictures")


def _load(encoded: Encoded) -> Image.Image:
    return load_image(encoded())


def _from_file(folder: Path, values: dict[str, Any], column: str, number: int) -> Encoded:
    named = values.get(column)
    names = named if isinstance(named, list) else [named]
    name = names[number] if 0 <= number < len(names) else None
    if not isinstance(name, str):
        raise ValueError(f"{column} must name the file of a picture, got {named!r}")
    inside = folder / IMAGE_FOLDER / name
    path = inside if inside.is_file() else folder / name
    if not path.is_file():
        raise ValueError(f"there is no {name} in {folder.name} or its {IMAGE_FOLDER}/")
    return lambda: path


def _hub_rows(hub: HubData) -> tuple[Iterable[Row], dict[str, Any]]:
    table = _hub_table(hub)
    provenance = {
        "source": hub.dataset,
        "config": hub.config,
        "split": hub.split,
        "revision": hub.revision,
        "commit": _commit(table),
        "rows": len(table),
    }
    if hub.images is None:
        return _table_rows(table, _from_cell(table)), provenance
    other, key, names = hub.images
    pictures = _hub_table(other)
    places = {name: place for place, name in enumerate(pictures[key])}
    find, named = _from_cell(pictures), list(table[names])

    def joined(place: int, column: str, number: int) -> Encoded:
        if named[place] not in places:
            raise ValueError(f"{other.dataset} has no picture {named[place]!r}")
        return find(places[named[place]], column, number)

    return _table_rows(table, joined), provenance


def _hub_table(hub: HubData) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(hub.dataset, hub.config, split=hub.split, revision=hub.revision)
    except ConnectionError as error:
        raise ConnectionError(
            f"{hub.dataset} is not in the cache and the hub cannot be reached; give a local copy by --data ({error})"
        ) from error


def _commit(table: datasets.Dataset) -> str | None:
    """The commit that the files of a data set were read at, which their addresses name."""
    for address in table.info.download_checksums or ():
        if at := re.search(r"@([0-9a-f]{40})/", address):
            return at[1]
    return None


def _table_rows(table: datasets.Dataset, find: Callable[[int, str, int], Encoded]) -> Iterator[Row]:
    texts = table.remove_columns(_image_columns(table))
    return (Row(values, partial(find, place), place) for place, values in enumerate(texts))


def _from_cell(table: datasets.Dataset) -> Callable[[int, str, int], Encoded]:
    import datasets

    columns = _image_columns(table)
    encoded = table
    for column in columns:  # left encoded, so that a damaged picture harms no row but its own
        is_list = not isinstance(table.features[column], datasets.Image)
        image = datasets.Image(decode=False)
        encoded = encoded.cast_column(column, datasets.List(image) if is_list else image)

    def look_up(place: int, column: str, number: int) -> Path | bytes:
        cell = encoded[place][column]
        cells = cell if isinstance(cell, list) else [cell]
        if not 0 <= number < len(cells) or cells[number] is None:
            raise ValueError(f"there is no picture in {column}")
        picture = cells[number]
        return Path(picture["path"]) if picture["bytes"] is None else picture["bytes"]

    def find(place: int, column: str, number: int) -> Encoded:
        if column not in columns:
            raise ValueError(f"there is no column of pictures {column!r}; there are {', '.join(columns) or 'none'}")
        return partial(look_up, place, column, number)

    return find


def _image_columns(table: datasets.Dataset) -> list[str]:
    import datasets

    def holds_images(feature: Any) -> bool:
        return isinstance(getattr(feature, "feature", feature), datasets.Image)

    return [name for name, feature in table.features.items() if holds_images(feature)]
