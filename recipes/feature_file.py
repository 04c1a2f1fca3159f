"""Features of pictures and the rows that they belong to, on disk: written by one process, read by number by any.

Shapes: N positions of the tower, C channels, L layers, as in `mllm_vision.recipes.cached_tower`.
"""

from __future__ import annotations

import io
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROWS, _ENDS = "rows.pt", "ends.npy"


@dataclass(frozen=True)
class FeatureFile:
    """Features of pictures, one behind the other, and beside them a line for each: the digest of its pixels.

    A line is written when the features are on disk, so that a killed run loses nothing but its last batch. Reading
    writes nothing; `repaired` and `append` are for one process alone.

    Args:
        folder: Where both files are.
        shape: (N, L * C).
    """

    folder: Path
    shape: tuple[int, int]

    def repaired(self) -> dict[str, int]:
        """Cut off what a killed run left half written; the number of each picture by its digest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in (self._features, self._digests):
            file.touch()
        lines = self._digests.read_text(encoding="ascii").splitlines(keepends=True)
        whole = min(sum(line.endswith("\n") for line in lines), self._features.stat().st_size // self.size)
        os.truncate(self._features, whole * self.size)
        os.truncate(self._digests, sum(map(len, lines[:whole])))
        return {line.strip(): number for number, line in enumerate(lines[:whole])}

    def append(self, digests: list[str], features: Tensor) -> None:
        """Put the features (B, N, L * C) of B pictures behind those that are there.

        Raises:
            ValueError: they are not of this shape, or do not fit into float16.
        """
        if features.shape[1:] != self.shape:
            raise ValueError(
                f"the tower made {tuple(features.shape[1:])} features of a picture, its config says {self.shape}; make "
                "the pictures as large as its image_size"
            )
        half = features.to(torch.float16)
        if not half.isfinite().all():
            raise ValueError("the tower's features are too large for float16; train without the cache")
        for file, content in (
            (self._features, half.cpu().numpy().tobytes()),
            (self._digests, "".join(f"{digest}\n" for digest in digests).encode()),
        ):
            with file.open("ab") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())

    def read(self, numbers: list[int]) -> Tensor:
        """The features (n, N, L * C) of pictures by their numbers."""
        count = prod(self.shape)
        found = [np.fromfile(self._features, np.float16, count, offset=number * self.size) for number in numbers]
        return torch.from_numpy(np.stack(found)).view(-1, *self.shape)

    @property
    def size(self) -> int:
        """Bytes of a picture's features."""
        return 2 * prod(self.shape)

    @property
    def _features(self) -> Path:
        return self.folder / "features.float16"

    @property
    def _digests(self) -> Path:
        return self.folder / "pictures.txt"


class RowFile:
    """The rows that `write_rows` wrote, read by number; 8 bytes of memory a row.

    Args:
        folder: They are in.
    """

    def __init__(self, folder: Path):
        self._rows, self._ends = folder / _ROWS, np.load(folder / _ENDS)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} rows, got number {number}")
        begin = self._ends[number - 1] if number else 0
        with self._rows.open("rb") as file:
            file.seek(begin)
            return torch.load(io.BytesIO(file.read(self._ends[number] - begin)), weights_only=True)


def write_rows(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows, dicts of tensors, texts and numbers, into a folder that is there, one behind the other."""
    ends = array("q")
    with (folder / _ROWS).open("wb") as file:
        for row in rows:
            written = io.BytesIO()
            torch.save(row, written)
            file.write(written.getbuffer())
            ends.append(file.tell())
    np.save(folder / _ENDS, np.array(ends, dtype=np.int64))
