"""The objects of a JSON array or of JSON lines, one after another: a file of gigabytes is never in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST = 1 << 24
"""Characters of the longest object; a file that is broken in its middle is not read to its end for nothing."""

_CHUNK = 1 << 18
_BETWEEN = " \t\r\n,[]\ufeff"


def json_objects(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a file in their order; in lines or in an array makes no difference.

    Raises:
        ValueError: what stands there is no object, or ends nowhere.
    """
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8") as file:
        held, begun = "", 0  # `begun`: characters of the file ahead of those held
        while True:
            try:
                chunk = file.read(_CHUNK)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not text in UTF-8: {error}; save it as that") from None
            held += chunk
            at = 0
            while at < len(held):
                if held[at] in _BETWEEN:
                    at += 1
                    continue
                try:
                    row, end = decoder.raw_decode(held, at)
                except json.JSONDecodeError as error:
                    if chunk and len(held) - at < LONGEST:
                        break
                    raise ValueError(
                        f"{path} is no JSON array of objects and no JSON lines: {error.msg} at character "
                        f"{begun + error.pos}; mend the file"
                    ) from None
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path} has {json.dumps(row)[:40]} at character {begun + at} where a row, an object, must be"
                    )
                yield row
                at = end
            held, begun = held[at:], begun + at
            if not chunk:
                return
