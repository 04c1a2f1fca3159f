"""The training entry point: run the stages of a recipe with the transformers Trainer and write the final model.

A run can be killed and started again at any time: finished stages are kept, an unfinished one goes on from its latest
checkpoint. A finished run is never overwritten unasked. Any number of processes do one run together
(`accelerate launch -m mllm_vision train ...`, or `torchrun`).
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    ProcessorMixin,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback, WandbCallback, get_reporting_integration_callbacks
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import mllm_vision as mv
from mllm_vision.adapter_folder import adapter_folder, save_adapter
from mllm_vision.api import source_of
from mllm_vision.assembly import AssemblySpec, assemble
from mllm_vision.eval.evaluation import data_folder
from mllm_vision.eval.task import parse_tasks
from mllm_vision.folders import whole_folder
from mllm_vision.host import SLOTS, adapter_for, inside
from mllm_vision.photos.export import OBJECTS
from mllm_vision.recipes.checkpoints import checkpoints_of, drop_broken, latest_checkpoint
from mllm_vision.recipes.disk import bytes_ahead, bytes_in, bytes_of, bytes_to_save, require_room
from mllm_vision.recipes.lora import lora_modules, with_lora
from mllm_vision.recipes.parameters import train_only
from mllm_vision.recipes.publish import STAGE_RECORD, publish
from mllm_vision.recipes.quantisation import quantised
from mllm_vision.recipes.recipe import Recipe, built, load_recipe, read_yaml
from mllm_vision.recipes.stage_trainers import cached_features_allowed, trainer_for
from mllm_vision.recipes.stages import BASE, MODEL, TENSORBOARD, ConversationsStage, FilesStage, ObjectWordsStage, Stage
from mllm_vision.recipes.tiny_model import NewModelSpec, build_model, build_processor
from mllm_vision.recipes.trainer import JSONLog, RecipeTrainer, rows_a_step, steps_of
from mllm_vision.recipes.uhd_tower import with_uhd_tower
from mllm_vision.recipes.zero import whole_weights
from mllm_vision.registry import MethodConfig
from mllm_vision.slots import Slots

_RECORD = "recipe.yaml"
_VERSION = 1
"""Of the record; a recipe that a person writes has none."""
_SAVED = "checkpoints and models take"
_PUBLISHED = ("publish_dtype", "publish_rank", "task", "data", "about", "card", "note", "overwrite")
"""Fields of a recipe that no weight depends on: what is done with the last stage's."""


def train(recipe: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run a recipe, or go on with it where it stopped.

    Args:
        recipe: Name of a recipe of the library, or the path of a YAML file.
        overrides: `key=value` pairs, see `load_recipe`.

    Returns:
        The folder `<output>/model` with model, tokenizer and processor, ready for `from_pretrained` or, where the last
        stage had LoRA, an adapter on top of the model that the run began with, ready for `mllm_vision.load`.

    Raises:
        FileExistsError: The output holds a finished run, a run of another recipe, or something that is no run.
        FileNotFoundError: Data of a stage still to be trained that are not there.
        FloatingPointError: A loss that is no number.
        OSError: The output cannot be written to, or has no room for what the run will save, as far as
            `mllm_vision.recipes.disk` can tell ahead.
    """
    plan = load_recipe(recipe, overrides)
    output = Path(plan.output)
    arguments = {stage.name: training_arguments(plan, stage) for stage in plan.stages}
    first = arguments[plan.stages[0].name]
    for told in arguments.values():
        _require_reporters(told)
    _require_files(plan, output)
    if first.should_save:
        _claim(plan, output)
    set_seed(plan.seed)
    with whole_weights():
        with first.main_process_first():
            source = beginning(plan, output)
        _require_parts(plan, source)
    stages: list[Path] = []
    for stage in plan.stages:
        done = output / stage.name
        if not done.is_dir():
            base = stages[-1] if stages and not _retrains_all(plan, stage) else source
            before = stages[-1] if stages else source
            _run_stage(plan, stage, before, arguments, done, _base_name(plan, stage, base))
            gc.collect()  # a trainer and its model hold each other; the next stage needs their memory
        stages.append(done)
    command = shlex.join(["mllm-vision", "train", str(recipe), *overrides])
    with whole_weights():
        return publish(plan, Path(recipe).stem, command, stages, output / MODEL, first)


def training_arguments(plan: Recipe, stage: Stage) -> TrainingArguments:
    """What the Trainer is told in a stage."""
    return TrainingArguments(
        **{
            "report_to": "none",
            "eval_strategy": "no" if isinstance(stage, ConversationsStage) else "steps",
            "per_device_eval_batch_size": 32,
            "save_total_limit": 1,
            "remove_unused_columns": False,
            "disable_tqdm": False,
            "run_name": f"{Path(plan.output).name}-{stage.name}",
            "dataloader_pin_memory": torch.cuda.is_available(),
            # Unasked, accelerate takes no notice of `torchrun` where there are processors alone.
            "use_cpu": not torch.accelerator.is_available(),
            **stage.arguments,
        },
        output_dir=str(checkpoints_of(Path(plan.output) / stage.name)),
        seed=plan.seed,
    )


def _require_reporters(arguments: TrainingArguments) -> None:
    """Raise where ``report_to`` names an unknown or missing package; the Trainer would, but only after loading.

    Raises:
        ValueError: a name that transformers does not know; the message lists those it does.
        RuntimeError: a package that is not installed; the message names it.
    """
    for reporter in get_reporting_integration_callbacks(arguments.report_to):
        reporter()


def _require_files(plan: Recipe, output: Path) -> None:
    """Raise FileNotFoundError now, rather than when the stages ahead have been trained."""
    for stage in plan.stages:
        if (output / stage.name).is_dir():
            continue
        if isinstance(stage, ConversationsStage):
            for data in (*stage.data, *stage.validation):
                data.require_files()
        if isinstance(stage, ObjectWordsStage) and not (Path(stage.photos) / OBJECTS).is_file():
            raise FileNotFoundError(
                f"stages.{stage.name}.photos: there is no {Path(stage.photos) / OBJECTS}; `mllm-vision photos` makes it"
            )
    if plan.task is not None and plan.data is not None:
        (task,) = parse_tasks(plan.task)
        asked = data_folder(task, plan.data)
        if asked is not None and not asked.is_dir():
            raise FileNotFoundError(f"task {task.name}: there is no {asked}, where data says its questions are")


def _require_parts(plan: Recipe, source: str | Path) -> None:
    """Raise ValueError where a stage trains what the model has not, or does not go with its methods; no weight is read.

    Args:
        source: What the run begins with.
    """
    if adapter_folder(source_of(source)) is not None:
        raise ValueError(f"a run goes on from a whole model, and {source} is an adapter; `mllm-vision merge` makes one")
    config = AutoConfig.from_pretrained(source_of(source))
    with torch.device("meta"):
        host = AutoModelForImageTextToText.from_config(config)
        slots = Slots([MethodConfig.from_dict(method) for method in plan.methods], config)
    for stage in plan.stages:
        train_only(host, [name for name in stage.trains if not inside(name, SLOTS)])
        if isinstance(stage, FilesStage) and stage.cache_tower and (slots.requests or slots.resize is not None):
            asking = ", ".join(method.type for method in slots.methods)
            raise ValueError(f"stages.{stage.name}.cache_tower: a method among {asking} has to see the tower at work")
        if stage.lora is not None:
            lora_modules(host, stage.lora, [name for name in stage.trains if not inside(name, SLOTS)])


def _claim(plan: Recipe, output: Path) -> None:
    """Make `output` ours: create it, go on with the same recipe in it, or refuse."""
    record = output / _RECORD
    wanted = {"version": _VERSION, **dataclasses.asdict(plan), "overwrite": False}
    if output.is_dir() and any(output.iterdir()):
        held = _held(record)
        if held is None:
            raise FileExistsError(f"{output} is not empty and holds no training run; choose another output")
        same = all(value == getattr(plan, name) for name, value in vars(held).items() if name not in _PUBLISHED)
        if plan.overwrite or not (same or _has_learnt(output)):
            shutil.rmtree(output)
        elif (output / MODEL).exists():
            raise FileExistsError(f"{output} holds a finished run; pass overwrite=true to replace it")
        elif not same:
            raise FileExistsError(f"{output} holds an unfinished run of another recipe; pass overwrite=true to drop it")
    try:
        output.mkdir(parents=True, exist_ok=True)
        written = output / f".{_RECORD}"
        written.write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
        written.replace(record)
    except OSError as error:
        raise type(error)(f"output {output} cannot be written to: {error}; choose another output") from error


def _held(record: Path) -> Recipe | None:
    """The recipe of the run that wrote this file; None where a person keeps a recipe of that name, or something else.

    What an earlier version of this library did not know has its default.
    """
    try:
        written = read_yaml(record)
        return built(Recipe, written, str(record)) if written.pop("version", None) == _VERSION else None
    except (OSError, ValueError):
        return None


def _has_learnt(output: Path) -> bool:
    """Whether a run has come as far as to a checkpoint or the end of a stage."""
    return any(output.glob(f"*/{STAGE_RECORD}")) or any(output.glob(f"*/{PREFIX_CHECKPOINT_DIR}-*"))


def beginning(plan: Recipe, output: Path) -> str | Path:
    """The checkpoint that the first stage loads: the recipe's own, or one that is made for this run."""
    if isinstance(plan.model, str):
        return plan.model
    base = output / BASE
    if not base.is_dir():
        dtype = getattr(torch, plan.dtype)
        if isinstance(plan.model, NewModelSpec):
            processor = build_processor(plan.model.vision["image_size"], plan.model.vision["patch_size"])
            model = build_model(plan.model.vision, plan.model.text, processor)
        elif isinstance(plan.model, AssemblySpec):
            model, processor = assemble(**vars(plan.model))
        else:
            model, processor = with_uhd_tower(plan.model, plan.side)
        model = model.to(dtype)
        require_room(output, bytes_of(model), "the model that the run begins with takes")
        with whole_folder(base) as partial:
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
    return base


def _load(plan: Recipe, source: str | Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    options: dict[str, Any] = {"dtype": getattr(torch, plan.dtype)}
    if plan.attention is not None:
        options["attn_implementation"] = plan.attention
    if plan.quantize is not None:
        adapter = adapter_for(AutoConfig.from_pretrained(source_of(source)))
        options["quantization_config"] = quantised(plan.quantize, adapter, options["dtype"])
    return mv.load(source, *(MethodConfig.from_dict(method) for method in plan.methods), **options)


def prepared(
    plan: Recipe, stage: Stage, source: str | Path, arguments: TrainingArguments
) -> tuple[PreTrainedModel, nn.Module, ProcessorMixin]:
    """The model of a stage, the same as it is trained, which LoRA wraps, and its processor.

    Args:
        source: What to go on from.
    """
    set_seed(plan.seed)  # a process that resumes draws the same new weights, whatever stages ran before in this one
    model, processor = _load(plan, source)
    train_only(model, stage.trains)
    trained = model if stage.lora is None else with_lora(model, stage.lora, stage.trains)
    if arguments.bf16 or arguments.fp16:  # half holds too few digits to add small steps up; it is for the products
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model, trained, processor


def _run_stage(
    plan: Recipe, stage: Stage, source: str | Path, told: dict[str, TrainingArguments], done: Path, base: str
) -> None:
    """Train one stage and leave its model in `done`, which appears only when all of it is written.

    Args:
        source: What to go on from.
        told: The arguments of all stages, by name.
        base: What an adapter of this stage belongs on.
    """
    # Anew, by which accelerate forgets the stage before: it would refuse another precision, or DeepSpeed's settings.
    arguments = training_arguments(plan, stage)
    with whole_weights():
        model, trained, processor = prepared(plan, stage, source, arguments)
    checkpoints, partial = checkpoints_of(done), done.with_name(f"{done.name}.partial")
    if arguments.should_save:
        needed = bytes_to_save(trained, arguments, max(arguments.max_steps, 1))
        if later := plan.stages[plan.stages.index(stage) + 1 :]:
            ahead = bytes_ahead(model, [(other, told[other.name]) for other in later])
            needed = max(needed, bytes_of(model) + ahead)
        require_room(checkpoints, needed - bytes_in(checkpoints), _SAVED)
    trainer = trainer_for(stage, plan, trained, processor, arguments)
    trainer.add_callback(JSONLog(done.with_name(f"{stage.name}.log.jsonl")))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(done.parent / TENSORBOARD / stage.name)  # not among checkpoints, which go
    latest = latest_checkpoint(checkpoints)
    trainer.accelerator.wait_for_everyone()  # all have looked before one tidies up
    if arguments.should_save:
        shutil.rmtree(partial, ignore_errors=True)
        drop_broken(checkpoints)
        needed = bytes_to_save(trained, arguments, steps_of(trainer))
        require_room(checkpoints, needed - bytes_in(checkpoints), _SAVED)
    sizes = _sizes(trained)
    title = f"Stage {stage.name}: {steps_of(trainer)} steps, {sizes['trained'] / 1e6:.1f} million parameters learn"
    trainer.accelerator.print(title, file=sys.stderr)
    started = time.monotonic()
    with cached_features_allowed(stage, trained):
        trainer.train(resume_from_checkpoint=latest)
    if not trainer.state.global_step:  # of a stream whose rows were all left out, which the Trainer takes for an end
        raise ValueError(f"stages.{stage.name}: there is no good row in the data; see the log for what is wrong")
    seconds = None if latest else round(time.monotonic() - started)  # a resumed run has no one wall time
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbCallback):
            import wandb

            wandb.finish()  # else the next stage would go on in this one's run, its steps from 1 again
    _save(trainer, model, trained, processor, partial, base)
    if arguments.should_save:
        record = _record(stage, trainer, sizes, seconds)
        (partial / STAGE_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        partial.rename(done)
        shutil.rmtree(checkpoints)
    trainer.accelerator.wait_for_everyone()


def _save(
    trainer: RecipeTrainer,
    model: PreTrainedModel,
    trained: nn.Module,
    processor: ProcessorMixin,
    folder: Path,
    base: str,
) -> None:
    """Write what a stage has trained: the whole model, or what lies on top of its base. All processes take part."""
    state = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered, in the first process
    if trainer.args.should_save:
        if isinstance(trained, PeftModel):
            save_adapter(trained, folder, base, state)
        else:
            model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)


def _sizes(trained: nn.Module) -> dict[str, int]:
    """How many parameters learn and how many there are, before ZeRO-3 takes them apart and leaves none of them."""
    learning = [parameter.numel() for parameter in trained.parameters() if parameter.requires_grad]
    return {"trained": sum(learning), "parameters": sum(parameter.numel() for parameter in trained.parameters())}


def _record(stage: Stage, trainer: RecipeTrainer, sizes: dict[str, int], seconds: int | None) -> dict[str, Any]:
    """What is told of a stage, in the model card and by studies; ``seconds`` is None where it was resumed."""
    return {
        "name": stage.name,
        "steps": trainer.state.global_step,
        "rows": trainer.state.global_step * rows_a_step(trainer.args),
        "skipped": getattr(trainer.train_dataset, "skipped", 0),
        **sizes,
        "seconds": seconds,
        "curve": _held_out_curve(trainer.state.log_history),
    }


def _held_out_curve(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """What evaluation logged, one row a step, without the timings."""
    rows: dict[float, dict[str, float]] = {}
    for entry in log_history:
        scores = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
        if scores:
            rows.setdefault(entry["step"], {"step": entry["step"]}).update(scores)
    timings = ("runtime", "samples_per_second", "steps_per_second")
    return [{key: value for key, value in row.items() if key not in timings} for row in rows.values()]


def _base_name(plan: Recipe, stage: Stage, base: str | Path) -> str:
    """What an adapter calls the model under it, so that it is found from any folder."""
    # An assembled model can be made again anywhere, but for its projector, which the adapter must bring along.
    if isinstance(plan.model, AssemblySpec) and Path(base) == Path(plan.output) / BASE and "projector" in stage.trains:
        return plan.model.line
    is_folder = source_of(base) == base and Path(base).is_dir()  # and no checkpoint that comes with the library
    return str(Path(base).resolve() if is_folder else base)


def _retrains_all(plan: Recipe, stage: Stage) -> bool:
    """Whether a stage fully trains everything that earlier stages did, so that its adapter fits the original base."""
    earlier = {name for other in plan.stages[: plan.stages.index(stage)] for name in other.trains}
    return earlier <= set(stage.trains)
