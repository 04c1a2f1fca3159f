"""Fitting a prompt to its images: ids, mask, labels and positions change together, here and nowhere else.

Shapes: B prompts of L columns before and M columns after; image i has S_i placeholders before and n_i tokens after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""Label of what nothing is learnt from; torch's and transformers' losses leave it out."""
PAD_VALUES = {"attention_mask": 0, "labels": IGNORED, "position_ids": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
"""What a padded column holds in every tensor that runs along the prompt; ids take the model's pad id."""


@dataclass(frozen=True)
class Fit:
    """How the fitted columns follow from the caller's.

    Args:
        columns: (B, M), the caller's column behind each fitted one, -1 for padding.
    """

    columns: Tensor

    @property
    def padded(self) -> Tensor:
        """(B, M) bool: padding."""
        return self.columns < 0

    def keeps(self, length: int) -> bool:
        """Whether prompts of L = ``length`` columns stay as they are."""
        return bool(self.columns.shape[1] == length and (self.columns == torch.arange(length).to(self.columns)).all())

    def apply(self, along_prompt: Tensor, pad_value: int) -> Tensor:
        """A tensor (..., B, L) that runs along the prompt, fitted: (..., B, M)."""
        index = self.columns.clamp(min=0).to(along_prompt.device)
        index = index.expand(*along_prompt.shape[:-2], *index.shape)
        rows = along_prompt.expand(*along_prompt.shape[:-2], index.shape[-2], -1)
        return rows.gather(-1, index).masked_fill(self.padded.to(along_prompt.device), pad_value)


def fit_columns(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_token_id: int,
    sizes: Sequence[int],
    slots: Sequence[Tensor],
    added: int = 0,
) -> Fit:
    """The columns of prompts whose placeholders are fitted to their images.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), or None for prompts without padding.
        image_token_id: Id of the placeholder.
        sizes: S_i, placeholders that the processor wrote for each image, in the order of the prompts.
        slots: n_i ascending placeholders of image i, each in 0..S_i - 1, that its tokens stand on; a placeholder that
            carries several tokens is named as often.
        added: Placeholders that a processor may have written besides, to be told of in an error.

    Padding is trimmed to the longest fitted prompt and stays on its side: right where the caller padded right, left
    otherwise.

    Raises:
        ValueError: the prompts hold more or fewer placeholders than the images need.
    """
    marked = input_ids == image_token_id
    in_rows = marked.sum(1).tolist()
    if sum(in_rows) != sum(sizes):
        room = (
            f", or {added} more for each tile if the processor's num_additional_image_tokens says so" if added else ""
        )
        raise ValueError(
            f"the prompts hold {sum(in_rows)} image placeholders (by prompt: {in_rows}), but the {len(sizes)} images "
            f"need {sum(sizes)} (by image: {list(sizes)}){room}; pass one image for each <image> mark, and let the "
            "model's own processor expand the marks"
        )
    repeats = (~marked).long()
    if slots:
        per_slot = [torch.bincount(on.to(marked.device), minlength=size) for on, size in zip(slots, sizes, strict=True)]
        repeats[marked] = torch.cat(per_slot)
    if attention_mask is not None:
        repeats *= _inside(attention_mask.bool())
    pads_right = attention_mask is not None and bool((attention_mask[:, -1] == 0).any())
    rows = [torch.arange(len(row), device=row.device).repeat_interleave(row) for row in repeats]
    width = max(len(row) for row in rows)
    columns = torch.full((len(rows), width), -1, device=input_ids.device)
    for fitted, row in zip(columns, rows, strict=True):
        fitted[slice(None, len(row)) if pads_right else slice(width - len(row), None)] = row
    return Fit(columns)


def _inside(mask: Tensor) -> Tensor:
    """(B, L) bool: columns between the first and the last unmasked one."""
    seen = mask.long().cumsum(1)
    ahead = mask.long().flip(1).cumsum(1).flip(1)
    return (seen > 0) & (ahead > 0)
