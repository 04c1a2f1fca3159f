"""What rows are known by without a picture being opened, so that what was made of them is found on a later start.

A picture in a file is known by the path, size and time of its last change, as build tools know theirs: one that is
replaced by another of the same size and time is taken for the same. An address of the web is taken to show what it
always did.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import ProcessorMixin

import mllm_vision as mv
from mllm_vision.photos.export import IMAGE_FOLDER
from mllm_vision.recipes.data.rows import TrainingRows
from mllm_vision.recipes.object_words import PhotoPatches


@dataclass(frozen=True)
class Identity:
    """What rows are known by.

    Args:
        digest: Of all that they depend on: text, pictures, processor, settings, the version of this library.
        pictures: How many different ones they show, at most.
    """

    digest: str
    pictures: int


@singledispatch
def identity_of(rows: Any) -> Identity:
    """What ``rows`` are known by; every text is read, no picture is opened."""
    raise TypeError(f"nobody knows what {type(rows).__name__} are known by; cache TrainingRows or PhotoPatches")


@identity_of.register
def identity_of_conversations(rows: TrainingRows) -> Identity:
    found = _Found(rows.encoder.processor)
    found.add(rows.encoder.max_length, rows.skip)
    for table in rows.tables:
        source = table.source
        found.add(source.format, source.weight, len(table))
        for number in range(len(table)):
            row = table.row(number)
            try:
                conversation = source.conversation(row)
            except ValueError as error:
                found.add(source.row_id(row, number), str(error))
                continue
            found.add(source.row_id(row, number), conversation.messages)
            found.add_pictures(conversation.pictures, source.folder)
    return found.identity()


@identity_of.register
def identity_of_photos(rows: PhotoPatches) -> Identity:
    found = _Found(rows.processor)
    found.add(rows.nouns, rows.grid, rows.rows)
    found.add_pictures((f"{row['id']}.jpg" for row in rows.rows), rows.folder / IMAGE_FOLDER)
    return found.identity()


@dataclass
class _Found:
    """What was found so far, from the processor on."""

    processor: ProcessorMixin
    _digest: Any = field(default_factory=hashlib.sha1)
    _pictures: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.add(mv.__version__)
        with TemporaryDirectory() as folder:
            self.processor.save_pretrained(folder)
            for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                self.add(file.name, file.read_bytes())

    def add(self, *facts: Any) -> None:
        self._digest.update(repr(facts).encode())

    def add_pictures(self, pictures: Iterable[Any], folder: Path) -> None:
        stamps = [hashlib.sha1(repr(_stamp(picture, folder)).encode()) for picture in pictures]
        self.add([stamp.digest() for stamp in stamps])
        self._pictures.update(stamp.digest() for stamp in stamps)

    def identity(self) -> Identity:
        return Identity(self._digest.hexdigest(), len(self._pictures))


def _stamp(picture: Any, folder: Path) -> Any:
    """Something that changes with a picture: bytes, or address, or path, size and time of a file."""
    if not isinstance(picture, str | Path) or "://" in str(picture):
        return picture
    path = (folder / picture).absolute()
    try:
        stat = path.stat()
    except (OSError, ValueError):  # a broken row: none there, or a name that no file has
        return str(path)
    return str(path), stat.st_size, stat.st_mtime_ns
