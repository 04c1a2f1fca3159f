"""What the stages of a recipe learn from drawn scenes: the words under each patch, and answers to questions.

Shapes: B pictures, N patches, D width of the language model, T tokens of a sequence.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from mllm_vision.recipes.tiny_model import BACKGROUND, CENTRE, REST
from mllm_vision.scenes.draw import COLOURS, SHAPES, SIZES, TEXTS, TEXTURES, Scene, label_patches, render, sample_scene
from mllm_vision.scenes.questions import FAMILIES, Question, caption_question

IGNORED = -100
NOUNS = (BACKGROUND, *SHAPES, *TEXTS)
# A patch has one word of each group; only NOUNS and MIDDLE speak about patches that carry nothing.
MIDDLE = (REST, CENTRE)
WORD_GROUPS: dict[str, tuple[str, ...]] = {
    "noun": NOUNS,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
    "middle": MIDDLE,
}
SUMMARY = (*NOUNS[1:], *COLOURS)
_MOST = 3  # the summary of a picture tells one, two and three or more of a kind apart


class PatchWordScenes(Dataset):
    """Pictures with the words that belong to each patch and the centre of the thing it lies on."""

    def __init__(self, split: str, first_scene: int, length: int, side: int, patch: int) -> None:
        self.split, self.first_scene, self.length, self.side, self.patch = split, first_scene, length, side, patch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        scene = sample_scene(self.split, self.first_scene + i, side=self.side)
        return {"image": render(scene), **patch_words(scene, self.patch)}


def patch_words(scene: Scene, patch: int) -> dict[str, np.ndarray]:
    """The targets of a picture: per group an index (N,) into its words, `centres` (N, 2), `summary` (things, 3)."""
    owner = label_patches(scene, patch).ravel()
    grid = scene.side // patch
    targets = {group: np.full(owner.shape, IGNORED) for group in WORD_GROUPS}
    targets["noun"][:] = targets["middle"][:] = 0
    centres = np.full((owner.size, 2), np.nan, np.float32)
    summary = np.zeros(len(SUMMARY), int)
    for i, thing in enumerate(scene.things):
        for group, word in [
            ("noun", thing.shape),
            ("colour", thing.colour),
            ("size", thing.size),
            ("texture", thing.texture),
        ]:
            targets[group][owner == i] = WORD_GROUPS[group].index(word)
        targets["middle"][min(thing.y // patch, grid - 1) * grid + min(thing.x // patch, grid - 1)] = 1
        centres[owner == i] = thing.x / scene.side, thing.y / scene.side
        summary[[SUMMARY.index(thing.shape), SUMMARY.index(thing.colour)]] += 1
    if scene.text:
        targets["noun"][owner == len(scene.things)] = NOUNS.index(scene.text.text)
        summary[SUMMARY.index(scene.text.text)] += 1
    return {
        **targets,
        "centres": centres,
        "summary": (summary[:, None] > np.arange(_MOST)).astype(np.float32),
    }


class PatchWords(nn.Module):
    """Teaches a tower to say what lies under each patch in the words of the language model.

    The stand-in for CLIP's pretraining. The projected feature of a patch, at the layer that the host reads, is compared
    with the word embeddings of the language model; so visual tokens start out as words it already knows. The last
    layer, which the host does not read, learns through CLS what the whole picture holds, as CLIP's does.
    """

    # Word embeddings start at a length of 0.02 * sqrt(256) = 0.3: a feature that is the sum of its words scores 10.
    logit_scale = 100.0

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.embeddings = model.get_input_embeddings()
        self.feature_layer = model.config.vision_feature_layer
        self.centre_head = nn.Linear(model.config.text_config.hidden_size, 2)
        self.summary_head = nn.Linear(model.config.vision_config.hidden_size, len(SUMMARY) * _MOST)
        self.word_ids = {
            group: torch.tensor([_single_token(processor, word) for word in words])
            for group, words in WORD_GROUPS.items()
        }
        # Most patches are background, and one in a hundred is the middle of something.
        self.class_weights = {
            "noun": torch.tensor([0.25] + [1.0] * (len(NOUNS) - 1)),
            "middle": torch.tensor([0.5, 4.0]),
        }

    def forward(
        self, pixel_values: torch.Tensor, centres: torch.Tensor, summary: torch.Tensor, **words: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns the loss and `hits` (B, groups, 2): per picture and group how many patches are right, of how many."""
        out = self.tower(pixel_values, output_hidden_states=True)
        features = self.projector(out.hidden_states[self.feature_layer][:, 1:])  # (B, N, D)
        loss = functional.binary_cross_entropy_with_logits(self.summary_head(out.pooler_output), summary.flatten(1)) * 4
        on_thing = ~centres.isnan().any(-1)
        loss = loss + functional.l1_loss(self.centre_head(features)[on_thing], centres[on_thing]) * 4
        hits = []
        for group, ids in self.word_ids.items():
            logits = features @ self.embeddings(ids.to(features.device)).T * self.logit_scale  # (B, N, words)
            weight = self.class_weights.get(group)
            loss = loss + functional.cross_entropy(
                logits.flatten(0, 1),
                words[group].flatten(),
                weight=weight if weight is None else weight.to(features.device),
                ignore_index=IGNORED,
            )
            # A patch of background is right too easily to be counted.
            counted = words[group] > 0 if group in self.class_weights else words[group] != IGNORED
            hits.append(torch.stack([(logits.argmax(-1) == words[group]) & counted, counted], -1).sum(1))
        return {"loss": loss, "hits": torch.stack(hits, 1)}


class PatchWordCollator:
    def __init__(self, processor: ProcessorMixin) -> None:
        self.image_processor = processor.image_processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = self.image_processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        targets = {key: torch.as_tensor(np.stack([row[key] for row in rows])) for key in rows[0] if key != "image"}
        return {"pixel_values": pixels, **targets}


class AnswerScenes(Dataset):
    """Pictures with several questions each, sampled afresh for every item.

    Args:
        turns: How many questions of each family (`FAMILIES` or "caption") to ask about a picture; a family that cannot
            be asked about it is left out. 0.25 asks about one picture in four.
    """

    def __init__(self, split: str, first_scene: int, length: int, side: int, turns: dict[str, float]) -> None:
        known = [*FAMILIES, "caption"]
        if unknown := sorted(set(turns) - set(known)):
            raise ValueError(f"turns names unknown families {', '.join(unknown)}; there are {', '.join(known)}")
        self.split, self.first_scene, self.length, self.side, self.turns = split, first_scene, length, side, turns

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        scene = sample_scene(self.split, self.first_scene + i, side=self.side)
        rng = random.Random(f"turns-{self.split}-{self.first_scene + i}")
        asked: dict[str, Question] = {}  # by text: a question asked twice teaches nothing more
        for family, count in self.turns.items():
            ask = caption_question if family == "caption" else FAMILIES[family]
            for question in (ask(scene, rng) for _ in range(int(count) + (rng.random() < count % 1))):
                if question:
                    asked[question.text] = question
        return {"image": render(scene), "questions": list(asked.values())}


class AnswerCollator:
    """Packs all questions about a picture into one sequence: one encoding pays for many answers.

    The prompt up to the picture stands first; every question with its answer is a branch that sees this prefix and
    itself, at the positions it would have alone. So the model is trained on exactly what it is later asked, one
    question about one picture, and no answer can be copied from another turn. The loss is on answers only.

    Args:
        added: Tokens of a picture besides those of its patches; a mask of branches cannot be fitted to them later.
    """

    def __init__(self, processor: ProcessorMixin, added: int = 0) -> None:
        self.processor, self.added = processor, added

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        packed = [self._pack(row["questions"], row["image"].size) for row in rows]
        longest = max(len(ids) for ids, *_ in packed)

        def pad(column: int, value: int) -> torch.Tensor:
            return torch.tensor([row[column] + [value] * (longest - len(row[column])) for row in packed])

        branch = pad(3, -1)  # (B, T)
        same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
        pixels = self.processor.image_processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        return {
            "pixel_values": pixels,
            "input_ids": pad(0, tokenizer.pad_token_id),
            "labels": pad(1, IGNORED),
            "position_ids": pad(2, 0),
            "attention_mask": (same & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None],  # (B, 1, T, T)
        }

    def _pack(self, questions: list[Question], size: tuple[int, int]) -> tuple[list[int], ...]:
        tokenizer = self.processor.tokenizer
        n = (size[0] // self.processor.patch_size) * (size[1] // self.processor.patch_size) + self.added
        ids = tokenizer("USER:")["input_ids"] + [self.processor.image_token_id] * n
        labels, positions, branch = [IGNORED] * len(ids), list(range(len(ids))), [0] * len(ids)
        start = len(ids)
        for i, question in enumerate(questions, 1):
            asked = tokenizer(f"{question.text} ASSISTANT:", add_special_tokens=False)["input_ids"]
            answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids += asked + answer
            labels += [IGNORED] * len(asked) + answer
            positions += range(start, start + len(asked) + len(answer))
            branch += [i] * (len(asked) + len(answer))
        return ids, labels, positions, branch


def _single_token(processor: ProcessorMixin, word: str) -> int:
    ids = processor.tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"the tokenizer must know {word!r} as one token to label patches with it, got {len(ids)} tokens"
        )
    return ids[0]
