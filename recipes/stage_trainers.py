"""The trainer of a stage: its model, its rows, and what is looked at on held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, singledispatch
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, ProcessorMixin, TrainingArguments

from mllm_vision.eval.tasks.scenes import Scenes
from mllm_vision.host import adapter_for, find_host, without_peft
from mllm_vision.recipes.cached_tower import cached_rows, cached_tower
from mllm_vision.recipes.data import ChatCollator, ModalityLengthSampler, RowEncoder, StreamedRows, training_rows
from mllm_vision.recipes.disk import bytes_in, bytes_to_save
from mllm_vision.recipes.object_words import PATCHES, ObjectWords, PhotoPatches, nouns_of, photo_patch_batch
from mllm_vision.recipes.objectives import (
    HITS,
    AnswerCollator,
    AnswerConversations,
    AnswerScenes,
    PatchWordCollator,
    PatchWords,
    PatchWordScenes,
    token_side,
)
from mllm_vision.recipes.recipe import Recipe
from mllm_vision.recipes.row_identity import identity_of
from mllm_vision.recipes.stages import (
    FEATURES,
    AnswersStage,
    ConversationsStage,
    FilesStage,
    ObjectWordsStage,
    PatchWordsStage,
    Stage,
)
from mllm_vision.recipes.trainer import AskingTrainer, RecipeTrainer, rows_a_step
from mllm_vision.slotted import SlottedModel

_HELD_OUT = 160  # validation scenes looked at during training
_ASKED = 60  # questions a family during training


@singledispatch
def trainer_for(
    stage: Stage, plan: Recipe, model: PreTrainedModel, processor: ProcessorMixin, arguments: TrainingArguments
) -> RecipeTrainer:
    """The trainer of a stage.

    Args:
        model: With the weights that the stage trains, and no others, asking for gradients; wrapped by PEFT or not.
    """
    raise TypeError(f"there is no trainer for a {type(stage).__name__}")


@trainer_for.register
def patch_words_trainer(
    stage: PatchWordsStage,
    plan: Recipe,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    arguments: TrainingArguments,
) -> RecipeTrainer:
    scenes: dict[str, Any] = {
        "side": plan.side,
        "text_scale": plan.text_scale,
        "patch": token_side(processor, plan.side),
    }
    arguments.label_names = ["summary"]
    return RecipeTrainer(
        PatchWords(model, processor, stage.logit_scale),
        arguments,
        stage=stage,
        data_collator=PatchWordCollator(processor),
        train_dataset=PatchWordScenes("train", stage.first_scene, _scenes(arguments), **scenes),
        eval_dataset=PatchWordScenes("validation", 0, _HELD_OUT, **scenes),
        compute_metrics=partial(_share_right, HITS),
    )


@trainer_for.register
def object_words_trainer(
    stage: ObjectWordsStage,
    plan: Recipe,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    arguments: TrainingArguments,
) -> RecipeTrainer:
    nouns = nouns_of(stage.photos)
    rows = PhotoPatches(stage.photos, "train", nouns, processor)
    held_out = PhotoPatches(stage.photos, "validation", nouns, processor, _HELD_OUT)
    arguments.label_names = ["nouns"]
    return RecipeTrainer(
        ObjectWords(model, processor, nouns),
        arguments,
        stage=stage,
        data_collator=photo_patch_batch,
        train_dataset=_cached(stage, rows, plan, model, arguments),
        eval_dataset=_cached(stage, held_out, plan, model, arguments),
        compute_metrics=partial(_share_right, PATCHES),
    )


@trainer_for.register
def answers_trainer(
    stage: AnswersStage, plan: Recipe, model: PreTrainedModel, processor: ProcessorMixin, arguments: TrainingArguments
) -> RecipeTrainer:
    scenes: dict[str, Any] = {"side": plan.side, "text_scale": plan.text_scale, "turns": stage.turns}
    rows: list[Any] = [
        AnswerScenes("train", stage.first_scene, _scenes(arguments), **scenes),
        AnswerScenes("validation", 0, _HELD_OUT, **scenes),
    ]
    if not stage.branches:
        encoder = RowEncoder(processor, processor.tokenizer.model_max_length)
        rows = [AnswerConversations(pictures, encoder) for pictures in rows]
    arguments.prediction_loss_only = True
    return AskingTrainer(
        model,
        arguments,
        stage=stage,
        data_collator=AnswerCollator(processor, _added(model)) if stage.branches else ChatCollator(processor),
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=processor,
        task=Scenes(questions=_ASKED, split="validation", side=plan.side, text_scale=plan.text_scale),
    )


@trainer_for.register
def conversations_trainer(
    stage: ConversationsStage,
    plan: Recipe,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    arguments: TrainingArguments,
) -> RecipeTrainer:
    options: dict[str, Any] = {"max_length": stage.max_length, "bad_rows": stage.bad_rows, "seed": plan.seed}
    rows = training_rows(stage.data, processor, **options)
    held_out = training_rows(stage.validation, processor, **options) if stage.validation else None
    sampler = None
    if isinstance(rows, StreamedRows):
        # Else the first process reads for all, and joins their rows, which are not padded alike, to hand them out.
        arguments.accelerator_config.dispatch_batches = False
    elif stage.group_by_modality:
        sampler = ModalityLengthSampler(
            rows, arguments.train_batch_size, processes=arguments.world_size, seed=plan.seed
        )
    blank = arguments.world_size > 1 or not _language_learns(model)
    arguments.prediction_loss_only = True
    return RecipeTrainer(
        model,
        arguments,
        stage=stage,
        sampler=sampler,
        data_collator=ChatCollator(processor, pack=stage.pack, dtype=find_host(model).dtype, blank_image=blank),
        train_dataset=_cached(stage, rows, plan, model, arguments),
        eval_dataset=None if held_out is None else _cached(stage, held_out, plan, model, arguments),
        processing_class=processor,
    )


def _scenes(arguments: TrainingArguments) -> int:
    """As many training scenes as the steps of a stage need: scenes are without end, and none is seen twice."""
    return arguments.max_steps * rows_a_step(arguments)


def _cached(stage: FilesStage, rows: Any, plan: Recipe, model: PreTrainedModel, arguments: TrainingArguments) -> Any:
    """``rows``, with features of the tower in place of pictures where the stage wants it; all stages share them."""
    if not stage.cache_tower:
        return rows
    saves = bytes_to_save(model, arguments, max(arguments.max_steps, 1)) - bytes_in(Path(arguments.output_dir))
    return cached_rows(rows, model, Path(plan.output) / FEATURES, arguments, identity_of(rows), besides=saves)


def cached_features_allowed(stage: Stage, model: nn.Module) -> AbstractContextManager[None]:
    """`cached_tower` for a stage whose rows have features in place of pictures; nothing for others."""
    return cached_tower(model) if isinstance(stage, FilesStage) and stage.cache_tower else nullcontext()


def _language_learns(model: nn.Module) -> bool:
    """Whether a row without a picture has anything to teach."""
    host = find_host(model)
    adapter = adapter_for(host.config)
    learning = [without_peft(name) for name, parameter in host.named_parameters() if parameter.requires_grad]
    return any(adapter.part_of(name) == "language" for name in learning)


def _added(model: PreTrainedModel) -> int:
    host = find_host(model)
    return host.vision_slots.added if isinstance(host, SlottedModel) else 0


def _share_right(groups: Sequence[str], prediction: EvalPrediction) -> dict[str, float]:
    right, of = np.moveaxis(np.asarray(prediction.predictions).sum(0), -1, 0)
    return {group: float(right[i] / max(of[i], 1)) for i, group in enumerate(groups)}
