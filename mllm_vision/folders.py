"""Folders that are written: nothing is lost in them unasked, and each is there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""One of which every folder of a model has, or of a tower."""


def check_empty(out: Path, overwrite: bool, marks: Collection[str] = PROCESSORS, holds: str = "a model") -> None:
    """Raise FileExistsError where ``out`` has something in it that may not be replaced.

    Args:
        overwrite: Whether what we wrote there earlier may be.
        marks: Files one of which is in everything that we write there.
        holds: What that is, for the message.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out} is not empty; choose another folder, or replace it with overwrite")
    if out.is_symlink() or out.resolve() == Path.cwd():
        raise FileExistsError(f"{out} is a link or the current folder and is not removed; name the folder to replace")
    if not any((out / file).is_file() for file in marks):
        raise FileExistsError(f"{out} holds something other than {holds} and is not removed")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when the block ends, and nothing when it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        yield folder
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
