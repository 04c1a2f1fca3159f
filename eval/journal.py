"""Answers on disk, one a line as they come, so that a run that was cut off goes on where it was.

``TASK.jsonl`` begins with the settings that the answers were given under. Each process of a run appends to a file of
its own, and a finished run leaves one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_PROBE_BYTES = 2**20
"""What must fit on the disk before work starts, besides the answers."""
_BYTES_AN_ANSWER = 1024


class Journal:
    """The answers of one task.

    Args:
        folder: Exists.
        task: Name of the files.
        settings: All that has a say in the answers, as JSON holds it.
    """

    def __init__(self, folder: Path, task: str, settings: dict[str, Any]):
        self.folder, self.task, self.settings = folder, task, json.loads(json.dumps(settings))

    def read(self) -> dict[str, dict[str, Any]]:
        """What has been written so far, by id: ``prompt``, and ``answer`` or ``error``.

        Raises:
            ValueError: the folder has answers that were given under other settings.
        """
        records: dict[str, dict[str, Any]] = {}
        for file in self._files():
            header, *lines = _whole_lines(file) or [{"settings": self.settings}]
            self._check(file, header.get("settings", {}))
            records.update((line["id"], line) for line in lines)
        return records

    def append(self, records: Iterable[dict[str, Any]], process: int) -> None:
        """Write records at the end of this process's file, and hand them to the system."""
        file = self._file(process)
        lines = [] if file.exists() else [{"task": self.task, "settings": self.settings}]
        with file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(record) + "\n" for record in [*lines, *records])

    def mend(self, process: int) -> None:
        """Cut off the line that a killed process left unfinished."""
        file = self._file(process)
        if file.exists():
            content = file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if not whole:
                file.unlink()
            elif len(whole) < len(content):
                os.truncate(file, len(whole))

    def finish(self, records: Iterable[dict[str, Any]]) -> None:
        """Put one file in the place of those of all processes: ``records``, then what else has been answered."""
        found = {record["id"]: record for record in records}
        lines = [{"task": self.task, "settings": self.settings}, *{**found, **self.read(), **found}.values()]
        partial = self.folder / f"{self.task}.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        others = [file for file in self._files() if file != self._file(0)]
        partial.replace(self._file(0))
        for file in others:
            file.unlink()

    def clear(self) -> None:
        """Remove what earlier runs wrote."""
        for file in self._files():
            file.unlink()

    def _file(self, process: int) -> Path:
        return self.folder / (f"{self.task}.jsonl" if process == 0 else f"{self.task}.process-{process}.jsonl")

    def _files(self) -> list[Path]:
        return sorted([*self.folder.glob(f"{self.task}.jsonl"), *self.folder.glob(f"{self.task}.process-*.jsonl")])

    def _check(self, file: Path, found: dict[str, Any]) -> None:
        if changes := difference(found, self.settings):
            raise ValueError(f"{file} has answers of another run: {changes}; choose another folder, or --overwrite")


def difference(found: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """In words, what settings were and are; empty where they are the same."""
    words = []
    for name in {**found, **now}:
        was, to = found.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(to, dict):
            words.append(difference(was, to, f"{prefix}{name}."))
        elif was != to:
            words.append(f"{prefix}{name} was {was!r} and is {to!r}")
    return "; ".join(filter(None, words))


def check_folder(folder: Path, answers: int = 0) -> None:
    """Make ``folder``, and see before any work that so many answers can be written there.

    Raises:
        OSError: they cannot: no permission, a file in the way, or too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder} cannot be a folder, since a file is in the way") from None
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error.strerror}); choose another folder") from error
    needed = _PROBE_BYTES + answers * _BYTES_AN_ANSWER
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free / 1e6:.0f} MB left, and {answers} answers may need {needed / 1e6:.0f} MB")
    probe = folder / f".room-{os.getpid()}"
    try:
        with probe.open("wb") as out:  # what is free on paper may still be refused: by a quota, by permissions
            out.write(bytes(_PROBE_BYTES))
            os.fsync(out.fileno())
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}); choose another folder") from error
    finally:
        with suppress(OSError):
            probe.unlink()


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # the last is empty, or was cut off
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, or choose another folder") from error
