"""The transformers Trainer with what recipes need besides: rates by part, a stop at a loss that is no number, a log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import is_optimizer_factory

from mllm_vision.eval.evaluation import evaluate
from mllm_vision.eval.task import Task
from mllm_vision.host import PARTS, find_host, without_peft
from mllm_vision.recipes.data import ModalityLengthSampler
from mllm_vision.recipes.parameters import parameter_groups, transformer_layers
from mllm_vision.recipes.stages import Stage


def rows_a_step(arguments: TrainingArguments) -> int:
    """Rows that all processes learn from between two changes of the weights."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def steps_of(trainer: Trainer) -> int:
    """How often the weights of a stage change."""
    arguments = trainer.args
    if arguments.max_steps > 0:
        return arguments.max_steps
    return math.ceil(arguments.num_train_epochs * math.ceil(len(trainer.train_dataset) / rows_a_step(arguments)))


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the classes of the transformer layers of a host, tower and language model, wrapped by PEFT or not."""
    host = find_host(model)
    layers = {name for part in PARTS for name in transformer_layers(host, part)}
    return sorted({type(module).__name__ for name, module in host.named_modules() if without_peft(name) in layers})


class RecipeTrainer(Trainer):
    """A Trainer of one stage.

    Args:
        stage: Whose learning rates, by part, the parameters get.
        sampler: The order of the training rows, None for the Trainer's own.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, stage: Stage, sampler: ModalityLengthSampler | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage, self.sampler = stage, sampler
        if sampler is not None:
            self.add_callback(EpochsOf(sampler))
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            # Unasked, accelerate looks for what the tower's class names, text layers among it, and finds no such layer.
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or layer_classes(self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and (self.stage.learning_rates or self.stage.layer_decay):
            optimised = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, optimised)
            if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & set(options):
                raise ValueError(f"optim {self.args.optim!r} has groups of its own; leave out rates by part")
            groups = parameter_groups(
                optimised,
                self.args.learning_rate,
                self.args.weight_decay,
                learning_rates=self.stage.learning_rates,
                layer_decay=self.stage.layer_decay,
            )
            groups.sort(key=lambda group: group["lr"] != self.args.learning_rate)  # the rate of the first is logged
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the stock one.

        Raises:
            FloatingPointError: the loss is no number, in this process or another; the message names step and rows. No
                weight has taken it in.
        """
        row_ids = inputs.pop("row_ids", [])  # for whoever reads an error, not for the model
        loss = super().training_step(model, inputs, num_items_in_batch)
        broken = ~torch.isfinite(loss)
        # All processes stop at once: one that went on would learn from the gradients of the broken one, and save them.
        if self.accelerator.reduce(broken.float(), reduction="sum"):
            told = gather_object([(loss.item(), row_ids)] if broken else [])
            values = ", ".join(str(value) for value, _ in told)
            rows = ", ".join(row for _, rows in told for row in rows)
            raise FloatingPointError(
                f"the loss of step {self.state.global_step + 1} is {values}"
                + (f"; its rows are {rows}" if rows else "")
            )
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop("row_ids", None)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The stock one takes a step too many where a run resumes from the checkpoint of its last.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As the stock one, which is asked ahead of every change of the weights.

        Raises:
            FloatingPointError: a norm that is no number, unless float16's scaler, which leaves such a step out, is on.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            raise FloatingPointError(
                f"the loss of step {self.state.global_step + 1} is finite, but the norm of its gradient is {norm}; "
                "lower the learning rate, or train in float32 or with arguments.bf16"
            )
        return norm

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process writes its state next, which says that the checkpoint is whole: others must be done by then.
        self.accelerator.wait_for_everyone()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not isinstance(self.model, PreTrainedModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # transformers 5 renames keys on saving, and the stock Trainer compares the saved names with the live ones: it
        # would find nothing of the model, warn, and go on with the weights the run began with.
        held = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        dtype = held.pop() if len(held) == 1 else torch.float32  # frozen weights in half, trained ones in full
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=dtype)
        self.model.load_state_dict(saved.state_dict())


class AskingTrainer(RecipeTrainer):
    """A trainer whose evaluation also asks questions about held-out pictures and scores the generated answers."""

    def __init__(self, *args: Any, task: Task, **kwargs: Any) -> None:
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


class EpochsOf(TrainerCallback):
    """Calls `set_epoch` of a sampler, which nobody else does where several processes resume within an epoch."""

    def __init__(self, sampler: ModalityLengthSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class JSONLog(TrainerCallback):
    """Writes everything a run logs as JSON lines; a resumed run drops the lines logged after its checkpoint.

    Every checkpoint logs the loss up to it, so that a resumed run averages over the same steps as an unbroken one.

    Args:
        file: Where to.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            lines = self.file.read_text(encoding="utf-8").splitlines(True) if self.file.exists() else []
            known = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
            kept = [line for line, row in known if row["step"] <= state.global_step and "train_runtime" not in row]
            written = self.file.with_name(f".{self.file.name}")
            written.write_text("".join(kept), encoding="utf-8")
            written.replace(self.file)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= control.should_save

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log |= control.should_save

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
