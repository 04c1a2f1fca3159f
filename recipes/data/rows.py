"""Rows of one or many sources as tensors, made when they are asked for: by number, or as a stream."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import ProcessorMixin

from mllm_vision.recipes.data.conversation import BadRow, size
from mllm_vision.recipes.data.encoding import RowEncoder
from mllm_vision.recipes.data.sources import DataSource, Table, stream

logger = logging.getLogger(__name__)

PICTURE_LENGTH = 576
"""Tokens that a picture counts for when rows of like length are put together: LLaVA-1.5's."""

_CHARACTERS = 4  # of a token, about
_SHUFFLED = 1000  # rows of a stream held at a time, pictures encoded
_WORKERS = 256  # most processes of one loader


def training_rows(
    sources: Sequence[DataSource],
    processor: ProcessorMixin,
    *,
    max_length: int,
    bad_rows: Literal["fail", "skip"] = "fail",
    seed: int = 0,
) -> TrainingRows | StreamedRows:
    """The rows of all sources, each a dict of tensors with its `row_id`, tokenised when it is asked for.

    Args:
        max_length: Most tokens of a row, placeholders included; a longer one is broken, never cut.
        bad_rows: Whether a broken row is an error, `BadRow`, or logged and left out.
        seed: Of the order in which streams are read; all else has none.

    Raises:
        ValueError: no source, streams together with tables, another value of ``bad_rows``, a data set without rows.
        FileNotFoundError: there is no such data set.
    """
    if bad_rows not in ("fail", "skip"):
        raise ValueError(f"bad_rows must be 'fail' or 'skip', got {bad_rows!r}")
    if not sources:
        raise ValueError("there is no source of data; name one")
    streams = {source.streaming for source in sources}
    if len(streams) > 1:
        raise ValueError("some sources are streamed and some are not; set streaming alike for all of them")
    encoder = RowEncoder(processor, max_length)
    if streams == {True}:
        return StreamedRows(sources, encoder, bad_rows == "skip", seed)
    return TrainingRows([Table(source) for source in sources], encoder, bad_rows == "skip")


class TrainingRows(Dataset):
    """Rows by number: those of the first table, as often as its weight says, then those of the next.

    A skipped row is replaced by the next good one of the same kind, with images or without.
    """

    def __init__(self, tables: Sequence[Table], encoder: RowEncoder, skip: bool):
        self.tables, self.encoder, self.skip = tables, encoder, skip
        self._rows = [_weighted(len(table), table.source.weight) for table in tables]
        self._ends = np.cumsum([len(rows) for rows in self._rows])
        # Shared among the workers of a loader, each of which finds its own.
        self._broken = [torch.zeros(len(table), dtype=torch.bool).share_memory_() for table in tables]
        if not len(self):
            raise ValueError("the weights of all sources leave no row; raise them")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        for number in chain([index], self._stand_ins(index) if self.skip else []):
            table, row = self._place(number)
            if self._broken[table][row]:
                continue
            try:
                return _encoded(self.encoder, self.tables[table].source, row, self.tables[table].row(row))
            except BadRow as error:
                if not self.skip:
                    raise
                self._broken[table][row] = True
                logger.warning("%s; skipped", error)
        raise ValueError("there is no good row left in the data; see the log for what is wrong with them")

    @property
    def skipped(self) -> int:
        """How many rows were found broken so far, each counted once, by this process and the workers of its loader."""
        return sum(int(broken.sum()) for broken in self._broken)

    def sizes(self) -> np.ndarray:
        """(rows, 2): pictures, and about as many tokens as the row has; no row is tokenised, no picture opened."""
        sizes = np.concatenate([table.sizes[rows] for table, rows in zip(self.tables, self._rows, strict=True)])
        return np.stack([sizes[:, 0], sizes[:, 0] * PICTURE_LENGTH + sizes[:, 1] // _CHARACTERS], axis=1)

    def _place(self, index: int) -> tuple[int, int]:
        """Which table a row is of, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} rows, got number {index}")
        table = int(np.searchsorted(self._ends, index, side="right"))
        return table, int(self._rows[table][index - self._ends[table]])

    def _stand_ins(self, index: int) -> Iterator[int]:
        others = [*range(index + 1, len(self)), *range(index)]
        shows = self._shows(index)
        yield from (i for i in others if self._shows(i) == shows)
        yield from (i for i in others if self._shows(i) != shows)

    def _shows(self, index: int) -> bool:
        table, row = self._place(index)
        return size(self.tables[table].row(row))[0] > 0


class StreamedRows(IterableDataset):
    """Rows in the order of their streams, shuffled as far as a buffer reaches, another way in every epoch.

    Sources are drawn by their weights until all are at their end. The workers of a loader share the rows among them.
    """

    def __init__(self, sources: Sequence[DataSource], encoder: RowEncoder, skip: bool, seed: int):
        self.sources, self.encoder, self.skip, self.seed = sources, encoder, skip, seed
        self.epoch = 0
        self._skipped = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass in the order of another epoch."""
        self.epoch = epoch

    @property
    def skipped(self) -> int:
        """How many broken rows were left out so far, by this process and the workers of its loader."""
        return int(self._skipped.sum())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for number, (source, row_number, row) in enumerate(self._mixed()):
            if number % workers != worker:
                continue
            try:
                yield _encoded(self.encoder, source, row_number, row)
            except BadRow as error:
                if not self.skip:
                    raise
                self._skipped[worker] += 1
                logger.warning("%s; skipped", error)

    def _mixed(self) -> Iterator[tuple[DataSource, int, dict[str, Any]]]:
        """Every row of every stream once, with its source and its number there."""
        draw = random.Random(f"mixture-{self.seed}-{self.epoch}")
        open_streams = [
            (source, _shuffled(stream(source), f"{i}-{self.seed}-{self.epoch}"))
            for i, source in enumerate(self.sources)
        ]
        while open_streams:
            at = draw.choices(range(len(open_streams)), [source.weight for source, _ in open_streams])[0]
            source, rows = open_streams[at]
            if (found := next(rows, None)) is None:
                del open_streams[at]
            else:
                yield source, *found


def _encoded(encoder: RowEncoder, source: DataSource, number: int, row: dict[str, Any]) -> dict[str, Tensor | str]:
    row_id = source.row_id(row, number)
    try:
        return {**encoder(source.conversation(row), source.folder), "row_id": row_id}
    except (ValueError, PermissionError) as error:
        raise BadRow(row_id, str(error)) from error


def _weighted(rows: int, weight: float) -> np.ndarray:
    """Row indices of one pass: all rows int(weight) times, then an evenly spaced share for the fraction."""
    whole, share = divmod(weight, 1)
    part = np.arange(round(rows * share)) * rows // max(1, round(rows * share))
    return np.concatenate([np.tile(np.arange(rows), int(whole)), part])


def _shuffled(rows: Iterator[Any], seed: str) -> Iterator[Any]:
    """Every row in the order of draws from a buffer."""
    draw = random.Random(seed)
    held: list[Any] = []
    for row in rows:
        if len(held) < _SHUFFLED:
            held.append(row)
            continue
        at = draw.randrange(_SHUFFLED)
        held[at], row = row, held[at]
        yield row
    draw.shuffle(held)
    yield from held
