"""A row of a data set as one conversation: whose turn it is, what is said, which pictures are shown, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_vision.images import load_image, upright_rgb
from mllm_vision.prompts import IMAGE_MARK

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PICTURE_KEYS = ("image", "bytes", "path", "url")


class BadRow(ValueError):
    """A row that nothing can be learnt from as it stands.

    Args:
        row_id: Its id, or the path of its file and its number.
        reason: What is wrong with it. None where torch raises a worker's error again in the main process; `row_id` is
            then the worker's traceback, which ends with the message.
    """

    def __init__(self, row_id: str, reason: str | None = None):
        super().__init__(row_id.rpartition("BadRow: ")[2].strip() if reason is None else f"row {row_id}: {reason}")


@dataclass(frozen=True)
class Conversation:
    """One row.

    Args:
        messages: As a chat template takes them; every content is a list of parts.
        pictures: Path, URL, encoded bytes or picture of every image part, in their order.
    """

    messages: list[dict[str, Any]]
    pictures: list[Any]


def from_conversations(row: Mapping[str, Any]) -> Conversation:
    """A row with "conversations" (`from`, `value`) and "image", as LLaVA-1.5's data have it.

    Raises:
        ValueError: the row has another format; the message says what is wrong.
    """
    messages = [
        {"role": _role(turn.get("from")), "content": _split(_text(turn.get("value")))}
        for turn in _turns(row, "conversations")
    ]
    return _checked(messages, _listed(row.get("image")))


def from_messages(row: Mapping[str, Any]) -> Conversation:
    """A row with "messages" (`role`, `content`) whose pictures stand in their parts, in "images" or in "image".

    Raises:
        ValueError: the row has another format; the message says what is wrong.
    """
    listed = _listed(row["images"] if row.get("images") is not None else row.get("image"))
    own: list[Any] = []
    messages = []
    for turn in _turns(row, "messages"):
        content = turn.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = []
            for part in content:
                kind, picture = _part(part)
                parts.append(kind)
                own += [] if picture is None else [picture]
        else:
            parts = _split(_text(content))
        messages.append({"role": _role(turn.get("role")), "content": parts})
    if own and listed:
        raise ValueError("pictures stand both in the parts of messages and in a column; leave one of the two out")
    return _checked(messages, own or listed)


def size(row: Mapping[str, Any]) -> tuple[int, int]:
    """The number of images and of characters in a row of either format; (0, 0) for a broken row."""
    texts, marks = [], 0
    turns = row.get("conversations") or row.get("messages")
    for turn in turns if isinstance(turns, list) else []:
        content = (turn.get("value") or turn.get("content")) if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, Mapping):
                marks += part.get("type") == "image"
                part = part.get("text")
            texts += [part] if isinstance(part, str) else []
    return marks + sum(text.count(IMAGE_MARK) for text in texts), sum(map(len, texts))


def open_picture(source: Any, folder: Path) -> Image.Image:
    """The picture that a row names, RGB and upright.

    Args:
        folder: Where relative paths begin.

    Raises:
        ValueError: there is none, or none that can be read.
        PermissionError: its file may not be read.
    """
    if isinstance(source, Image.Image):
        return upright_rgb(source)
    if isinstance(source, bytes):
        return load_image(source)
    if isinstance(source, str) and "://" in source:
        from datasets import Image as ImageFeature

        try:
            return upright_rgb(ImageFeature().decode_example({"path": source, "bytes": None}), source)
        except Exception as error:  # of whichever client speaks the address's protocol
            raise ValueError(f"{source} cannot be read ({error}); check the address") from error
    if isinstance(source, str | Path):
        return load_image(folder / source)
    raise ValueError(f"a picture must be a path, bytes or a picture, got {type(source).__name__}")


def _turns(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"{column!r} must be a list of turns, got {_shown(turns)}")
    return turns


def _role(speaker: Any) -> str:
    if speaker not in SPEAKERS:
        raise ValueError(f"a turn is by {_shown(speaker)}; it must be by one of {', '.join(SPEAKERS)}")
    return SPEAKERS[speaker]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a turn must be text, got {_shown(value)}")
    return value


def _split(text: str) -> list[dict[str, str]]:
    """Text with marks as parts. Line breaks beside a mark go: how a picture is set off is for the template to say."""
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(text.strip().split(IMAGE_MARK)):
        parts += [{"type": "image"}] * (i > 0)
        piece = piece.strip("\n") if IMAGE_MARK in text else piece
        piece = piece.lstrip() if i == 1 and len(parts) == 1 else piece
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return parts


def _part(part: Any) -> tuple[dict[str, str], Any]:
    """A part as a template takes it, and its own picture, None without one. Arrow fills keys that are absent."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"))}, None
    if kind == "image":
        pictures = [part[key] for key in _PICTURE_KEYS if part.get(key) is not None]
        return {"type": "image"}, _source(pictures[0]) if pictures else None
    raise ValueError(f"a part must be of type text or image, got {_shown(part)}")


def _listed(value: Any) -> list[Any]:
    """The pictures of a column: none, one or a list."""
    if value is None or value == "":
        return []
    return [_source(item) for item in (value if isinstance(value, list | tuple) else [value])]


def _source(value: Any) -> Any:
    """A path, URL, bytes or picture, out of the mapping that `datasets` and others wrap it in."""
    if not isinstance(value, Mapping):
        return value
    found = [value[key] for key in ("bytes", "path", "url") if value.get(key) is not None]
    if not found:
        raise ValueError(f"a picture must have bytes or a path, got {_shown(value)}")
    return found[0]


def _checked(messages: list[dict[str, Any]], pictures: list[Any]) -> Conversation:
    roles = [message["role"] for message in messages]
    said = roles[1:] if roles[0] == "system" else roles
    if said != ["user", "assistant"] * (len(said) // 2) or not said:
        raise ValueError(f"turns must be questions and answers in turn and end with an answer, got {', '.join(roles)}")
    marks = 0
    for message in messages:
        kinds = [part["type"] for part in message["content"]]
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        if message["role"] != "user" and "image" in kinds:
            raise ValueError(f"a picture stands in a turn by the {message['role']}; pictures are shown by the user")
        if message["role"] == "assistant" and not "".join(texts).strip():
            raise ValueError("an answer is empty")
        if not kinds:
            raise ValueError(f"a turn by the {message['role']} is empty")
        marks += kinds.count("image")
    if marks != len(pictures):
        where = f"no {IMAGE_MARK} mark" if not marks else f"{marks} {IMAGE_MARK} mark{'s' * (marks > 1)}"
        raise ValueError(
            f"there is {where} for {len(pictures)} picture{'s' * (len(pictures) != 1)}; write one for each"
        )
    return Conversation(messages, pictures)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
