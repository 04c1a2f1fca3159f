"""The training entry point: run the stages of a recipe with the transformers Trainer and write the final model.

A run can be killed and started again at any time: finished stages are kept, an unfinished one goes on from its latest
checkpoint. A finished run is never overwritten unasked.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    EvalPrediction,
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import mllm_vision as mv
from mllm_vision.eval.evaluation import evaluate
from mllm_vision.eval.tasks.scenes import Scenes
from mllm_vision.recipes.objectives import (
    HITS,
    AnswerCollator,
    AnswerScenes,
    PatchWordCollator,
    PatchWords,
    PatchWordScenes,
    token_side,
)
from mllm_vision.recipes.publish import STAGE_RECORD, publish
from mllm_vision.recipes.recipe import Recipe, Stage, load_recipe
from mllm_vision.recipes.tiny_model import build_model, build_processor
from mllm_vision.recipes.uhd_tower import UHDTowerSpec, with_uhd_tower
from mllm_vision.registry import MethodConfig
from mllm_vision.slotted import SlottedModel

_HELD_OUT = 160  # validation scenes looked at during training
_ASKED = 60  # questions a family during training
_RECORD = "recipe.yaml"


def train(recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Path:
    """Run a recipe, or go on with it where it stopped.

    Args:
        recipe: Name of a recipe of the library, or the path of a YAML file.
        overrides: `key=value` pairs, see `load_recipe`.

    Returns:
        The folder `<output>/model` with model, tokenizer and processor, ready for `from_pretrained`.

    Raises:
        FileExistsError: The output holds a finished run, a run of another recipe, or something that is no run.
    """
    plan = load_recipe(recipe, overrides)
    output = Path(plan.output)
    final = output / "model"
    _claim(plan, output)
    set_seed(plan.seed)
    stages: list[Path] = []
    for stage in plan.stages:
        done = output / stage.name
        if not done.is_dir():
            model, processor = _load(plan, stages[-1] if stages else None)
            _run_stage(plan, stage, model, processor, done)
        stages.append(done)
    publish(plan, Path(recipe).stem, stages, final)
    return final


def _claim(plan: Recipe, output: Path) -> None:
    """Make `output` ours: create it, go on with the same recipe in it, or refuse."""
    record = output / _RECORD
    wanted = yaml.safe_dump({**dataclasses.asdict(plan), "overwrite": False}, sort_keys=False)
    if output.exists() and any(output.iterdir()):
        if not record.is_file():
            raise FileExistsError(f"{output} is not empty and holds no training run; choose another output")
        if plan.overwrite:
            shutil.rmtree(output)
        elif (output / "model").exists():
            raise FileExistsError(f"{output} holds a finished run; pass overwrite=true to replace it")
        elif record.read_text(encoding="utf-8") != wanted:
            raise FileExistsError(f"{output} holds an unfinished run of another recipe; pass overwrite=true to drop it")
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(wanted, encoding="utf-8")


def _load(plan: Recipe, previous: Path | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    if previous is not None:
        return AutoModelForImageTextToText.from_pretrained(previous), AutoProcessor.from_pretrained(previous)
    methods = [MethodConfig.from_dict(method) for method in plan.methods]
    if isinstance(plan.model, str):
        return mv.load(plan.model, *methods)
    if isinstance(plan.model, UHDTowerSpec):
        model, processor = with_uhd_tower(plan.model, plan.side)
    else:
        processor = build_processor(plan.model.vision["image_size"], plan.model.vision["patch_size"])
        model = build_model(plan.model.vision, plan.model.text, processor)
    return (mv.apply(model, *methods) if methods else model), processor


def _run_stage(plan: Recipe, stage: Stage, model: PreTrainedModel, processor: ProcessorMixin, done: Path) -> None:
    """Train one stage and leave its model in `done`, which appears only when all of it is written."""
    checkpoints = done.with_name(f"{stage.name}.checkpoints")
    arguments = TrainingArguments(
        **{
            "report_to": "none",
            "eval_strategy": "steps",
            "per_device_eval_batch_size": 32,
            "save_total_limit": 1,
            "remove_unused_columns": False,
            "disable_tqdm": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            **stage.arguments,
        },
        output_dir=str(checkpoints),
        seed=plan.seed,
    )
    _freeze_all_but(model, stage.trains)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    length = arguments.max_steps * batch  # scenes without end: no picture is seen twice
    trainer = _OBJECTIVES[stage.objective](plan, stage, model, processor, arguments, length)
    latest = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=latest)
    record = {
        "name": stage.name,
        "steps": trainer.state.global_step,
        "pictures": length,
        "seconds": None if latest else round(time.monotonic() - started),  # a resumed run has no one wall time
        "curve": _held_out_curve(trainer.state.log_history),
    }

    partial = done.with_name(f"{stage.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.requires_grad_(True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / STAGE_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.rename(done)
    shutil.rmtree(checkpoints)


def _patch_words_trainer(
    plan: Recipe,
    stage: Stage,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    arguments: TrainingArguments,
    length: int,
) -> Trainer:
    scenes: dict[str, Any] = {
        "side": plan.side,
        "text_scale": plan.text_scale,
        "patch": token_side(processor, plan.side),
    }
    arguments.label_names = ["summary"]
    return Trainer(
        PatchWords(model, processor, stage.logit_scale),
        arguments,
        data_collator=PatchWordCollator(processor),
        train_dataset=PatchWordScenes("train", stage.first_scene, length, **scenes),
        eval_dataset=PatchWordScenes("validation", 0, _HELD_OUT, **scenes),
        compute_metrics=_patch_word_accuracy,
    )


def _answers_trainer(
    plan: Recipe,
    stage: Stage,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    arguments: TrainingArguments,
    length: int,
) -> Trainer:
    scenes: dict[str, Any] = {"side": plan.side, "text_scale": plan.text_scale, "turns": stage.turns}
    arguments.prediction_loss_only = True
    return AnswerTrainer(
        model,
        arguments,
        data_collator=AnswerCollator(processor, model.vision_slots.added if isinstance(model, SlottedModel) else 0),
        train_dataset=AnswerScenes("train", stage.first_scene, length, **scenes),
        eval_dataset=AnswerScenes("validation", 0, _HELD_OUT, **scenes),
        processing_class=processor,
        task=Scenes(questions=_ASKED, split="validation", side=plan.side, text_scale=plan.text_scale),
    )


_OBJECTIVES = {"patch_words": _patch_words_trainer, "answers": _answers_trainer}


class AnswerTrainer(Trainer):
    """A Trainer whose evaluation also asks questions about held-out scenes and scores the generated answers."""

    def __init__(self, *args: Any, task: Scenes, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.task = task

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        asked = evaluate(self.model, self.processing_class, self.task, batch_size=32)
        scores = asked.tasks[self.task.name].values()
        answered = {
            f"eval_{family}": score["f1" if family.startswith("existence") else "accuracy"]
            for family, score in scores.items()
        }
        self.log(answered)
        return {**metrics, **answered}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # transformers 5 renames keys on saving, and the stock Trainer compares the saved names with the live ones: it
        # would find nothing of the model, warn, and go on with the weights the run began with.
        saved = type(self.model).from_pretrained(resume_from_checkpoint)
        self.model.load_state_dict(saved.state_dict())


def _patch_word_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    right, of = np.moveaxis(np.asarray(prediction.predictions).sum(0), -1, 0)
    return {group: float(right[i] / max(of[i], 1)) for i, group in enumerate(HITS)}


def _held_out_curve(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """What evaluation logged, one row a step, without the timings."""
    rows: dict[float, dict[str, float]] = {}
    for entry in log_history:
        scores = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
        if scores:
            rows.setdefault(entry["step"], {"step": entry["step"]}).update(scores)
    timings = ("runtime", "samples_per_second", "steps_per_second")
    return [{key: value for key, value in row.items() if key not in timings} for row in rows.values()]


def _freeze_all_but(model: torch.nn.Module, names: list[str]) -> None:
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    if isinstance(model, SlottedModel):
        model.vision_slots.requires_grad_(True)
