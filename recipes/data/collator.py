"""Rows as a batch: padded to the right, or packed behind one another.

Shapes: B rows, padded to L columns; packed, one row of L columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin

from mllm_vision.placeholders import PAD_VALUES
from mllm_vision.recipes.data.encoding import ALONG_PROMPT, RowEncoder

_BLANK = Image.new("RGB", (56, 56), (127, 127, 127))


class ChatCollator:
    """Makes a batch of rows of `training_rows`; `row_ids` names them.

    Args:
        pack: Put all rows behind one another in one sequence instead of padding them. Each has its own positions and
            sees itself alone, by a mask (1, 1, L, L) that SDPA and eager attention take. Methods that leave a picture
            fewer or more tokens than placeholders need padded rows.
        dtype: The model's, which the mask of a pack must have: SDPA misreads float32 beside float64 and says nothing.
        blank_image: Append a blank image to a batch without images, behind an answer, where no label attends to it: in
            a distributed run every process then has gradients, if zero, for the same weights.

    Raises:
        ValueError: packing for a model whose positions have more than one dimension.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        pack: bool = False,
        blank_image: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        if pack and "mm_token_type_ids" in processor.model_input_names:
            raise ValueError(
                f"rows of {type(processor).__name__} cannot be packed, because its model gives the tokens of a picture "
                "positions in several dimensions, counted through a whole sequence; set pack to false"
            )
        self.processor, self.pack, self.blank_image, self.dtype = processor, pack, blank_image, dtype

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The inputs of a model: what runs along the prompt (B, L), pictures of all rows in one tensor."""
        tensors = [{name: value for name, value in row.items() if name != "row_id"} for row in rows]
        if self.blank_image and not any(set(row) - set(ALONG_PROMPT) for row in tensors):
            if self.pack:
                tensors.append(self._blank)
            else:
                shortest = min(range(len(rows)), key=lambda i: len(tensors[i]["input_ids"]))
                tensors[shortest] = _joined([tensors[shortest], self._blank])
        lengths = [len(row["input_ids"]) for row in tensors]
        if self.pack:
            batch = {name: v[None] if name in ALONG_PROMPT else v for name, v in _joined(tensors).items()}
            batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
            batch["attention_mask"] = _own_row(lengths, self.dtype)
        else:
            fill = {"input_ids": self._pad_id, **PAD_VALUES}
            batch = {
                name: torch.stack(
                    [pad(row[name], (0, max(lengths) - len(row[name])), value=fill[name]) for row in tensors]
                )
                if name in ALONG_PROMPT
                else _pictures([row[name] for row in tensors if name in row])
                for name in dict.fromkeys(name for row in tensors for name in row)
            }
        return {**batch, "row_ids": [row["row_id"] for row in rows]}

    @property
    def _pad_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @cached_property
    def _blank(self) -> dict[str, Tensor]:
        """A row that asks nothing about a grey picture."""
        encoder = RowEncoder(self.processor, max_length=1 << 30)
        return encoder.encode(encoder.shown_picture(), [], [_BLANK])


def _joined(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as one, behind one another."""
    names = dict.fromkeys(name for row in rows for name in row)
    parts = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: torch.cat(part) if name in ALONG_PROMPT else _pictures(part) for name, part in parts.items()}


def _pictures(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of pictures, padded to the largest in every dimension but the first, behind one another."""
    sizes = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist()
    padding = [
        [side for n, size in zip(part.shape[:0:-1], sizes[::-1], strict=True) for side in (0, size - n)]
        for part in parts
    ]
    return torch.cat([pad(part, by) for part, by in zip(parts, padding, strict=True)])


def _own_row(lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(1, 1, L, L): the additive mask, 0 within a row up to the token itself, elsewhere the minimum of ``dtype``."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sees = (row[:, None] == row) & torch.ones(len(row), len(row), dtype=torch.bool).tril()
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]
