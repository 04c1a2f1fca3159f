"""Where rows come from: LLaVA-1.5's JSON, or chat messages in anything that `datasets` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mllm_vision.recipes.data.conversation import Conversation, from_conversations, from_messages, size
from mllm_vision.recipes.data.json_objects import json_objects
from mllm_vision.settings import Settings

if TYPE_CHECKING:
    import datasets

_JSON = (".json", ".jsonl")
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
_EMPTY = "{} has no rows; leave it out"
_READ_AHEAD = 16  # rows of a stream


@dataclass(kw_only=True)
class DataSource(Settings):
    """A data set of conversations.

    Args:
        format: "conversations": LLaVA-1.5's `from` and `value`. "messages": `role` and `content`.
        path: A JSON array or JSON lines. For messages also a Parquet or Arrow file, or what `datasets` reads: a folder,
            a hub id.
        images: Folder that relative names of pictures begin in. Default: the folder of `path`.
        split: Of a folder or a hub id.
        name: Configuration of a hub id.
        streaming: Read as it is trained on, nothing stored. The order is then shuffled only among a thousand rows.
        weight: How often a row is seen in a pass: 2 twice, 0.5 every other row. Of a stream, whose length nobody knows:
            the odds that the next row comes from it.
        limit: Only as many first rows.

    Raises:
        ValueError: a weight or a limit that leaves nothing, conversations that are no JSON file.
    """

    format: Literal["conversations", "messages"]
    path: str
    images: str | None = None
    split: str = "train"
    name: str | None = None
    streaming: bool = False
    weight: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight must be above 0, got {self.weight}; leave out a source that is not wanted")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}; leave out a source that is not wanted")
        if self.format == "conversations" and Path(self.path).suffix not in _JSON:
            raise ValueError(f"conversations must be a .json or .jsonl file, got {self.path}; use format messages")

    def require_files(self) -> None:
        """Raise where a file or a folder of this machine that it names is not there.

        Raises:
            FileNotFoundError: says which.
        """
        path = Path(self.path)
        if path.suffix in (*_JSON, *_BUILDERS) and not path.is_file():
            raise FileNotFoundError(f"{self.path} is no file; check the path")
        if self.images is not None and not Path(self.images).is_dir():
            raise FileNotFoundError(f"{self.images}, images of {self.path}, is no folder; check the path")

    @property
    def folder(self) -> Path:
        """Where relative names of pictures begin."""
        if self.images is not None:
            return Path(self.images)
        path = Path(self.path)
        return path if path.is_dir() else path.parent if path.is_file() else Path()

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """One of its rows, read.

        Raises:
            ValueError: it is broken; says how.
        """
        return (from_conversations if self.format == "conversations" else from_messages)(row)

    def row_id(self, row: Mapping[str, Any], number: int) -> str:
        """The id that a row has, else its file and its number."""
        return f"{self.path}:{number}" if row.get("id") in (None, "") else str(row["id"])


class Table:
    """Rows of a source by their number, memory-mapped.

    Raises:
        FileNotFoundError, ValueError: there is no such data set or no such split.
    """

    def __init__(self, source: DataSource):
        import datasets

        self.source, self._is_json = source, _is_json(source)
        if self._is_json:
            path = Path(source.path).resolve()
            stat = path.stat()
            written = {"path": str(path), "size": stat.st_size, "changed": stat.st_mtime_ns}  # what a copy is known by
            features = datasets.Features({"json": datasets.Value("large_string")})
            if next(json_objects(path), None) is None:
                raise ValueError(_EMPTY.format(source.path))
            try:
                table = datasets.Dataset.from_generator(_json_column, features=features, gen_kwargs=written)
            except datasets.exceptions.DatasetGenerationError as error:
                raise error.__cause__ or error from None  # what is wrong with the file, and where
        else:
            table = _opened(source)
        self._table = table if source.limit is None else table.select(range(min(source.limit, len(table))))
        self._features = _undecoded(self._table.features)
        self._raw = self._table.with_format("arrow")
        if not len(self._raw):
            raise ValueError(_EMPTY.format(source.path))

    def __len__(self) -> int:
        return len(self._raw)

    def row(self, number: int) -> dict[str, Any]:
        """A row as it was written; pictures stay encoded."""
        return self._read(self._features, self._raw[number].to_pylist()[0])

    @cached_property
    def sizes(self) -> np.ndarray:
        """(rows, 2) pictures and characters of every row, without opening a picture."""
        column = "json" if self._is_json else "messages"
        features = _undecoded({column: self._features[column]} if column in self._features else {})
        if not features:
            return np.zeros((len(self), 2), dtype=np.int64)
        rows = self._raw.select_columns([column])
        return np.array([size(self._read(features, r)) for t in rows.iter(_READ_AHEAD) for r in t.to_pylist()])

    def _read(self, features: datasets.Features, row: dict[str, Any]) -> dict[str, Any]:
        return json.loads(row["json"]) if self._is_json else features.decode_example(row)


def stream(source: DataSource) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a source with their numbers, from its first, never all of them in memory.

    Raises:
        FileNotFoundError, ValueError: there is no such data set or no such split.
    """
    for number, row in enumerate(json_objects(source.path) if _is_json(source) else _streamed(source)):
        if number == source.limit:
            return
        yield number, row


def _streamed(source: DataSource) -> Iterator[dict[str, Any]]:
    table = _opened(source)
    if table.features is not None:
        table = table.decode(False)
    # By batches, because row by row `datasets` would deal its files out among the workers of a loader.
    for batch in table.iter(_READ_AHEAD):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _is_json(source: DataSource) -> bool:
    path = Path(source.path)
    if path.suffix in _JSON and not path.is_file():
        raise FileNotFoundError(f"{source.path} is no file; check the path")
    return path.suffix in _JSON


def _json_column(path: str, size: int, changed: int) -> Iterator[dict[str, str]]:
    """Rows as text: types that differ from row to row, which no table holds, are left as they are."""
    for row in json_objects(path):
        yield {"json": json.dumps(row, ensure_ascii=False)}


def _opened(source: DataSource) -> Any:
    """The `datasets.Dataset`, or `IterableDataset` of a source that streams."""
    import datasets

    path = Path(source.path)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        table = datasets.load_from_disk(source.path)
        if isinstance(table, datasets.DatasetDict):
            if source.split not in table:
                raise ValueError(f"{source.path} has no split {source.split!r}; it has {', '.join(table)}")
            table = table[source.split]
        return table.to_iterable_dataset() if source.streaming else table
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"{source.path} is no file; check the path")
        builder, files = _BUILDERS[path.suffix], source.path
        return datasets.load_dataset(builder, data_files=files, split="train", streaming=source.streaming)
    if path.is_file():
        known = ", ".join([*_JSON, *_BUILDERS])
        raise ValueError(f"{source.path} is none of {known}; save its rows as one of these")
    return datasets.load_dataset(source.path, source.name, split=source.split, streaming=source.streaming)


def _undecoded(features: Mapping[str, Any]) -> datasets.Features:
    """The same columns, pictures left as bytes or path, so that a truncated one is the fault of its row alone."""
    import datasets

    def plain(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List | datasets.LargeList):
            return type(feature)(plain(feature.feature))
        return {key: plain(value) for key, value in feature.items()} if isinstance(feature, dict) else feature

    return datasets.Features({name: plain(feature) for name, feature in features.items()})
