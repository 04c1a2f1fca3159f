"""Align a projector with word embeddings: each patch of a composed photograph learns the noun of what it shows.

A cheap beginning for a fresh projector between a frozen tower and a frozen language model: each patch on a thing learns
to be the word for it among the language model's own embeddings, which costs a pass through the tower alone. Captions
then teach how several such tokens are said together.

Shapes: B pictures, N patches, D width of the language model, K words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from mllm_vision.host import adapter_for, inside
from mllm_vision.images import load_image
from mllm_vision.photos.export import IMAGE_FOLDER, OBJECTS
from mllm_vision.placeholders import IGNORED
from mllm_vision.recipes.objectives import picture_inputs, tokens_a_side

BACKGROUND = "background"
PATCHES = ("thing", BACKGROUND)
"""Kinds of patches whose words are counted apart."""
_CORE = 0.7
"""Share of an object's box, in width and height about its middle, whose patches are taken to show it."""
_LOGIT_SCALE = 20.0  # of cosines, before their softmax


class PhotoPatches(Dataset):
    """Composed photographs with the noun that belongs to each patch.

    Args:
        folder: What `mllm_vision.photos.export_photos` wrote.
        split: Of the photographs.
        nouns: The words; the first is for patches on no object.
        processor: That of a host with as many visual tokens as patches.
        limit: At most so many photographs, the first ones; None is all.

    Raises:
        ValueError: the folder has no photographs of this split.
    """

    def __init__(
        self, folder: str | Path, split: str, nouns: Sequence[str], processor: ProcessorMixin, limit: int | None = None
    ):
        self.folder, self.nouns, self.processor = Path(folder), list(nouns), processor
        self.rows = _photographs(self.folder, split)[:limit]
        self.grid = tokens_a_side(processor, self.rows[0]["side"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        image = load_image(self.folder / IMAGE_FOLDER / f"{row['id']}.jpg")
        images = picture_inputs(self.processor, [image])
        del images["input_ids"]
        return {"row_id": row["id"], "nouns": patch_nouns(row, self.nouns, self.grid)[None], **images}


def nouns_of(folder: str | Path) -> list[str]:
    """`BACKGROUND`, then every noun of the training photographs, in alphabetical order."""
    rows = _photographs(Path(folder), "train")
    return [BACKGROUND, *sorted({thing["noun"] for row in rows for thing in row["objects"]})]


def _photographs(folder: Path, split: str) -> list[dict[str, Any]]:
    """What was pasted where, a row a photograph of the split."""
    with (folder / OBJECTS).open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["split"] == split]
    if not rows:
        raise ValueError(f"{folder} has no photographs of the split {split!r}; `mllm-vision photos` writes them")
    return rows


def patch_nouns(row: dict[str, Any], nouns: Sequence[str], grid: int) -> Tensor:
    """(N,): for each patch the index of the noun under its centre, 0 outside all boxes, `IGNORED` where it is unsure.

    Unsure are the rims of boxes, overlaps, and nouns that are not among ``nouns``.

    Args:
        row: A line of the objects of photographs: ``side``, and ``objects`` with ``noun`` and ``box`` in pixels.
    """
    centres = (torch.arange(grid) + 0.5) * row["side"] / grid
    y, x = centres[:, None], centres[None, :]
    owners, within = torch.zeros(grid, grid, dtype=torch.long), torch.zeros(grid, grid, dtype=torch.long)
    sure = torch.zeros(grid, grid, dtype=torch.bool)
    for thing in row["objects"]:
        left, top, right, bottom = thing["box"]
        middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
        off_x, off_y = (x - middle_x).abs() * 2 / (right - left), (y - middle_y).abs() * 2 / (bottom - top)
        core = (off_x < _CORE) & (off_y < _CORE)
        if thing["noun"] in nouns:
            owners[core] = nouns.index(thing["noun"])
            sure |= core
        within += (off_x < 1) & (off_y < 1)
    owners[(within > 1) | ((within == 1) & ~sure)] = IGNORED
    return owners.flatten()


def photo_patch_batch(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of `PhotoPatches` as a batch: ``nouns`` (B, N), what the model needs of pictures, and ``row_ids``."""
    tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0] if name != "row_id"}
    return {**tensors, "row_ids": [row["row_id"] for row in rows]}


class ObjectWords(nn.Module):
    """Compares each visual token with the language model's embeddings of nouns.

    A noun is the mean embedding of its tokens, tokenized with a leading space. The loss is cross-entropy over cosine
    similarities, plus the squared distance to the right noun over its squared norm, so that visual tokens get the norm
    of words. Background, most of every image, has a weight of 0.1.

    Args:
        model: A host with as many visual tokens as patches.
        nouns: K words, the first for the background.
    """

    words: Tensor  # (K, D)
    weight: Tensor  # (K,)

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, nouns: Sequence[str]):
        super().__init__()
        adapter = adapter_for(model.config)
        # What is trained is all that a checkpoint needs; the language model may share weights with its head, besides.
        self.tower, self._model = adapter.tower(model), (model,)
        if not inside(adapter.projector_name, adapter.tower_name):
            self.projector = adapter.projector(model)
        ids = [processor.tokenizer(f" {noun}", add_special_tokens=False)["input_ids"] for noun in nouns]
        embeddings = model.get_input_embeddings().weight.detach()
        words = torch.stack([embeddings[word].mean(0) for word in ids])
        weight = torch.ones(len(nouns))
        weight[0] = 0.1
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, nouns: Tensor, **images: Tensor) -> dict[str, Tensor]:
        """The loss, and ``hits`` (B, PATCHES, 2): per picture how many patches are right, of how many."""
        (model,) = self._model
        features = torch.stack(list(model.get_image_features(**images).pooler_output))  # (B, N, D)
        told, words = features.flatten(0, 1).float(), self.words.float()
        scores = functional.normalize(told, dim=-1) @ functional.normalize(words, dim=-1).T * _LOGIT_SCALE
        targets, known = nouns.flatten(), nouns.flatten() != IGNORED
        loss = functional.cross_entropy(scores, targets, weight=self.weight, ignore_index=IGNORED)
        right_word = words[targets[known]]
        distance = (told[known] - right_word).square().sum(-1) / right_word.square().sum(-1)
        weight = self.weight[targets[known]]
        loss = loss + (distance * weight).sum() / weight.sum()
        right = scores.argmax(-1).view_as(nouns) == nouns
        kinds = (nouns > 0, nouns == 0)
        return {"loss": loss, "hits": torch.stack([torch.stack([right & k, k], -1).sum(1) for k in kinds], 1)}
