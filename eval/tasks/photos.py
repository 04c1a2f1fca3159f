"""Photographs composed from real cut-outs, with known objects, counts and positions; not a VQA benchmark.

Three families of questions: whether a thing is there, with POPE's three kinds of negatives; how many there are; where
one lies, beside another or in the picture. No cut-out and no background is one of training.

Differs: existence counts an answer only if it is "yes" or "no", in whatever case and with or without a full stop, as
`scenes` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mllm_vision.eval.data import Row, file_rows, records
from mllm_vision.eval.families import FamilyTask
from mllm_vision.eval.task import Example
from mllm_vision.photos.export import QUESTION_FOLDER
from mllm_vision.photos.questions import FAMILIES, NEGATIVES, NUMBERS

__all__ = ["Photos"]


@dataclass(kw_only=True)
class Photos(FamilyTask, name="photos", paper="composed by mllm_vision.photos"):
    """Questions about composed photographs, by family.

    Args:
        questions: Of each family and kind: existence with each kind of negative and as many positives, count, and each
            of the two kinds of position.
        families: Names of families joined by "/", or "all".
        split: Of the photographs.
    """

    known = FAMILIES
    spelled = MappingProxyType({str(number): word for number, word in enumerate(NUMBERS)})

    split: Literal["validation", "test"] = "test"

    columns = (
        "id, image, question, answer, family and kind, in questions/test.jsonl and questions/validation.jsonl, as "
        "`mllm-vision photos DIR/photos` writes them"
    )
    max_new_tokens = 8

    def rows(self, data: Path | None) -> tuple[Iterable[Row], dict[str, Any]]:
        if data is None:
            return super().rows(data)
        file = data / QUESTION_FOLDER / f"{self.split}.jsonl"
        if not file.is_file():
            raise ValueError(f"there is no {file}; `mllm-vision photos {data}` writes it")
        others = set(FAMILIES) - set(self.asked_for)  # a row of no known family stays, to be reported
        found = [values for values in records(file) if values.get("family") not in others]
        asked, taken = [], Counter[str]()
        for values in found:
            kind = str(values.get("kind"))
            taken[kind] += 1
            if taken[kind] <= self.questions:
                asked.append(values)
        return file_rows(data, [file], asked)

    def examples(self, row: Row) -> Iterable[Example]:
        family, kind, answer = row.text("family"), row.text("kind"), row.text("answer")
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
        if family == "existence" and answer not in ("yes", "no"):
            raise ValueError(f"the answer must be yes or no, got {answer!r}")
        negatives = NEGATIVES if kind == "present" else (kind,)
        groups = {"existence": [f"existence_{kind}" for kind in negatives], "position": [f"position_{kind}"]}
        yield Example(
            id=row.text("id"),
            question=row.text("question"),
            images=[row.picture()],
            target={"family": family, "answer": answer},
            groups=tuple(groups.get(family, [family])),
            unit=row.fingerprint(),
        )
