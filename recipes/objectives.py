"""What the stages of a recipe learn from drawn scenes: the words under each patch, and answers to questions.

Shapes: B pictures, N patches, D width of the language model, T tokens of a sequence.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from mllm_vision.placeholders import IGNORED
from mllm_vision.recipes.data import RowEncoder
from mllm_vision.recipes.tiny_model import BACKGROUND, CENTRE, REST
from mllm_vision.scenes.draw import COLOURS, SHAPES, SIZES, TEXTS, TEXTURES, Scene, label_patches, render, sample_scene
from mllm_vision.scenes.questions import FAMILIES, Question, caption_question

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
HITS = (*WORD_GROUPS, "text")
"""What is counted of the words said of patches; "text" is the nouns of patches under printed text alone."""
SUMMARY = (*NOUNS[1:], *COLOURS)
_MOST = 3  # the summary of a picture tells one, two and three or more of a kind apart


class PatchWordScenes(Dataset):
    """Pictures with the words that belong to each patch and the centre of the thing it lies on."""

    def __init__(
        self, split: str, first_scene: int, length: int, side: int, patch: int, text_scale: float = 1.0
    ) -> None:
        self.split, self.first_scene, self.length, self.side, self.patch = split, first_scene, length, side, patch
        self.text_scale = text_scale

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        scene = sample_scene(self.split, self.first_scene + i, side=self.side, text_scale=self.text_scale)
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
    with the word embeddings of the language model; so visual tokens start out as words it already knows. In a tower
    with CLS, the last layer, which the host does not read, learns through it what the whole picture holds, as CLIP's
    does. All pictures of a batch are of one size.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, logit_scale: float) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.embeddings = model.get_input_embeddings()
        self.feature_layer = model.config.vision_feature_layer
        self.centre_head = nn.Linear(model.config.text_config.hidden_size, 2)
        width = model.config.vision_config.hidden_size
        has_cls = model.config.vision_feature_select_strategy == "default"  # which leaves it out
        self.summary_head = nn.Linear(width, len(SUMMARY) * _MOST) if has_cls else None
        self.word_ids = {
            group: torch.tensor([_single_token(processor, word) for word in words])
            for group, words in WORD_GROUPS.items()
        }
        # Most patches are background, and one in a hundred is the middle of something.
        self.class_weights = {
            "noun": torch.tensor([0.25] + [1.0] * (len(NOUNS) - 1)),
            "middle": torch.tensor([0.5, 4.0]),
        }

    def forward(self, centres: torch.Tensor, summary: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the loss and `hits` (B, HITS, 2): per picture how many patches are right, of how many."""
        words = {group: inputs.pop(group) for group in WORD_GROUPS}
        out = self.tower(**inputs, output_hidden_states=True)
        states, loss = out.hidden_states[self.feature_layer], torch.zeros((), device=centres.device)
        if self.summary_head is not None:
            told = self.summary_head(out.pooler_output)
            states, loss = states[:, 1:], functional.binary_cross_entropy_with_logits(told, summary.flatten(1)) * 4
        features = self.projector(states).reshape(*centres.shape[:2], -1)  # (B, N, D), also of a pack (1, B * N, C)
        on_thing = ~centres.isnan().any(-1)
        loss = loss + functional.l1_loss(self.centre_head(features)[on_thing], centres[on_thing]) * 4
        counts = {}
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
            right = logits.argmax(-1) == words[group]
            counts[group] = torch.stack([right & counted, counted], -1).sum(1)
            if group == "noun":
                printed = words[group] >= NOUNS.index(TEXTS[0])
                counts["text"] = torch.stack([right & printed, printed], -1).sum(1)
        return {"loss": loss, "hits": torch.stack([counts[name] for name in HITS], 1)}


class PatchWordCollator:
    def __init__(self, processor: ProcessorMixin) -> None:
        self.image_processor = processor.image_processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = self.image_processor([row["image"] for row in rows], return_tensors="pt")
        targets = {key: torch.as_tensor(np.stack([row[key] for row in rows])) for key in rows[0] if key != "image"}
        return {**targets, **images}  # the Trainer counts a batch by its first tensor, and pixels may be one pack


class AnswerScenes(Dataset):
    """Pictures with several questions each, sampled afresh for every item.

    Args:
        turns: How many questions of each family (`FAMILIES` or "caption") to ask about a picture; a family that cannot
            be asked about it is left out. 0.25 asks about one picture in four.
    """

    def __init__(
        self,
        split: str,
        first_scene: int,
        length: int,
        side: int,
        turns: dict[str, float],
        text_scale: float = 1.0,
    ) -> None:
        self.split, self.first_scene, self.length, self.side, self.turns = split, first_scene, length, side, turns
        self.text_scale = text_scale

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        scene = sample_scene(self.split, self.first_scene + i, side=self.side, text_scale=self.text_scale)
        rng = random.Random(f"turns-{self.split}-{self.first_scene + i}")
        asked: dict[str, Question] = {}  # by text: a question asked twice teaches nothing more
        for family, count in self.turns.items():
            ask = caption_question if family == "caption" else FAMILIES[family]
            for question in (ask(scene, rng) for _ in range(int(count) + (rng.random() < count % 1))):
                if question:
                    asked[question.text] = question
        return {"image": render(scene), "questions": list(asked.values())}


class AnswerConversations(Dataset):
    """The same pictures and questions as conversations: one turn a question, which sees those before it."""

    def __init__(self, scenes: AnswerScenes, encoder: RowEncoder) -> None:
        self.scenes, self.encoder = scenes, encoder

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.scenes[i]
        messages: list[dict[str, Any]] = []
        for question in row["questions"]:
            asked = [{"type": "text", "text": question.text}]
            messages += [
                {"role": "user", "content": asked if messages else [{"type": "image"}, *asked]},
                {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
            ]
        encoded = self.encoder.encode(*self.encoder.render(messages), [row["image"]])
        return {**encoded, "row_id": f"{self.scenes.split}:{self.scenes.first_scene + i}"}


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
        images = picture_inputs(self.processor, [row["image"] for row in rows])
        counts = (images.pop("input_ids") == self.processor.image_token_id).sum(1).tolist()
        packed = [self._pack(row["questions"], n + self.added) for row, n in zip(rows, counts, strict=True)]
        longest = max(len(ids) for ids, *_ in packed)

        def pad(column: int, value: int) -> torch.Tensor:
            return torch.tensor([row[column] + [value] * (longest - len(row[column])) for row in packed])

        branch = pad(3, -1)  # (B, T)
        same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
        return {
            "input_ids": pad(0, tokenizer.pad_token_id),
            "labels": pad(1, IGNORED),
            "position_ids": pad(2, 0),
            "attention_mask": (same & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None],  # (B, 1, T, T)
            **images,
        }

    def _pack(self, questions: list[Question], n: int) -> tuple[list[int], ...]:
        tokenizer = self.processor.tokenizer
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


def picture_inputs(processor: ProcessorMixin, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """What the model needs of pictures, and as `input_ids` a row for each with its visual tokens."""
    marks = [processor.image_token] * len(images)
    inputs = processor(images=list(images), text=marks, padding=True, return_tensors="pt")
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def token_side(processor: ProcessorMixin, side: int) -> int:
    """Side in pixels of the square of a scene of `side` pixels that becomes one visual token."""
    return side // tokens_a_side(processor, side)


def tokens_a_side(processor: ProcessorMixin, side: int) -> int:
    """How many visual tokens a square picture of `side` pixels has in a row."""
    encoded = picture_inputs(processor, [Image.new("RGB", (side, side))])
    return math.isqrt(int((encoded["input_ids"] == processor.image_token_id).sum()))


def _single_token(processor: ProcessorMixin, word: str) -> int:
    ids = processor.tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"the tokenizer must know {word!r} as one token to label patches with it, got {len(ids)} tokens"
        )
    return ids[0]
