"""The stages of a recipe: what each learns from which data, and which weights may change meanwhile."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, get_type_hints

from transformers import TrainingArguments

from mllm_vision.host import PARTS
from mllm_vision.recipes.data import DataSource
from mllm_vision.recipes.lora import LoraSpec
from mllm_vision.scenes.questions import FAMILIES
from mllm_vision.settings import Settings, require_type

_SET_BY_RECIPE = ("output_dir", "seed", "data_seed", "remove_unused_columns")
_FROM_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
MODEL, BASE, TENSORBOARD, FEATURES, ANSWERS = "model", "base", "tensorboard", "features", "asked"
"""Folders of a run beside those of its stages: what it makes, what it began with, logs, the cache of tower features,
and what `mllm_vision.recipes.study` asked."""
_OWN_FOLDERS = (MODEL, BASE, TENSORBOARD, FEATURES, ANSWERS)


@dataclass(kw_only=True)
class Stage(Settings):
    """What every stage has.

    Args:
        objective: What is learnt; every kind of stage has its own.
        name: Of its folder in the recipe's output.
        trains: Parts of the host (`PARTS`) or names of its submodules whose weights are trained in full. Weights of
            plugged-in methods always are; all else is frozen.
        lora: Low-rank adapters beside frozen weights; only in the last stage, whose result is an adapter folder.
        learning_rates: By part, where it is not ``arguments.learning_rate``.
        layer_decay: By part, what a layer's rate is multiplied by for every layer above it.
        arguments: Fields of `transformers.TrainingArguments`.

    Raises:
        ValueError: settings that contradict each other, before anything is loaded.
    """

    objective: str
    name: str
    trains: list[str] = field(default_factory=list)
    lora: LoraSpec | None = None
    learning_rates: dict[str, float] = field(default_factory=dict)
    layer_decay: dict[str, float] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w-]*", self.name) or self.name in _OWN_FOLDERS:
            raise ValueError(
                "name is that of a folder, and must be of letters, digits, - and _ and none of "
                f"{', '.join(_OWN_FOLDERS)}, got {self.name!r}"
            )
        where = f"stages.{self.name}"
        known = _training_arguments()
        if unknown := sorted(set(self.arguments) - set(known)):
            raise ValueError(
                f"{where}.arguments: unknown key {', '.join(unknown)}; valid keys are {', '.join(sorted(known))}"
            )
        for name, value in self.arguments.items():
            require_type(f"{where}.arguments.{name}", value, known[name])
            if name in _FROM_ONE and value < 1:
                raise ValueError(f"{where}.arguments.{name} must be at least 1, got {value}")
        if self.arguments.get("max_steps") == 0:
            raise ValueError(f"{where}.arguments.max_steps must be at least 1, or -1 to count epochs, got 0")
        for name, rate in {"learning_rate": self.arguments.get("learning_rate", 0), **self.learning_rates}.items():
            if not 0 <= rate < float("inf"):
                raise ValueError(f"{where}: the rate {name} must be 0 or more, got {rate}")
        for part, factor in self.layer_decay.items():
            if not 0 < factor <= 1:
                raise ValueError(f"{where}.layer_decay of the {part} must be in (0, 1], got {factor}")
        for kind in ("learning_rates", "layer_decay"):
            if unknown := sorted(set(getattr(self, kind)) - set(PARTS)):
                raise ValueError(f"{where}.{kind}: unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")


@dataclass(kw_only=True)
class ScenesStage(Stage):
    """What stages on drawn scenes have, which are without end, so that the stage says how many steps it takes.

    Args:
        first_scene: Index of the first training scene. Stages with ranges apart see different pictures.
    """

    first_scene: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_steps(self, "scenes have no epochs")


@dataclass(kw_only=True)
class FilesStage(Stage):
    """What stages on stored pictures have, which are seen again in every epoch.

    Args:
        cache_tower: Whether the frozen tower sees every picture once, its features kept on disk.
    """

    cache_tower: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_tower and ("tower" in self.trains or (self.lora is not None and "tower" in self.lora.parts)):
            raise ValueError(f"stages.{self.name}.cache_tower needs a frozen tower, but the stage trains it")


@dataclass(kw_only=True)
class PatchWordsStage(ScenesStage):
    """The words of what lies under each patch of drawn scenes, said by the tower through the projector.

    Args:
        logit_scale: What the product of a feature and the embedding of a word is multiplied by. Word embeddings of a
            new model have a length of 0.02 * sqrt(256) = 0.3: a feature that is the sum of its words scores 10 at 100.
            In a trained model both have grown; 1 leaves its features as long as they are.
    """

    objective: Literal["patch_words"] = "patch_words"
    logit_scale: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_plain_training(self)


@dataclass(kw_only=True)
class ObjectWordsStage(FilesStage):
    """The nouns of what lies under each patch of composed photographs, said by the tower through the projector.

    Args:
        photos: Folder that `mllm-vision photos` wrote.
    """

    objective: Literal["object_words"] = "object_words"
    photos: str

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_plain_training(self)
        if others := sorted(set(self.trains) - {"tower", "projector"}):
            raise ValueError(
                f"stages.{self.name}.trains: words of patches teach tower and projector, got {', '.join(others)}"
            )


@dataclass(kw_only=True)
class AnswersStage(ScenesStage):
    """Questions about drawn scenes and captions, many to a picture.

    Args:
        turns: Questions a picture, by family or "caption".
        branches: Whether the questions about a picture are branches of one sequence, each of which sees the picture
            and itself, or turns of a conversation, as methods need that leave other tokens than placeholders.
    """

    objective: Literal["answers"] = "answers"
    turns: dict[str, float]
    branches: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [*FAMILIES, "caption"]
        if unknown := sorted(set(self.turns) - set(known)):
            raise ValueError(
                f"stages.{self.name}.turns: unknown family {', '.join(unknown)}; there are {', '.join(known)}"
            )


@dataclass(kw_only=True)
class ConversationsStage(FilesStage):
    """Conversations about pictures: the answers are learnt.

    Args:
        data: Where rows come from, mixed by their weights.
        validation: Rows whose loss is told during training (``arguments.eval_strategy``), never learnt.
        max_length: Tokens of a row, its visual tokens included; a longer one is a bad row.
        bad_rows: Whether a row that cannot be used ends the run or is reported and left out.
        pack: Whether the rows of a batch stand behind one another in one sequence, without padding between.
        group_by_modality: Whether batches are made of rows of like length, with pictures or without.
    """

    objective: Literal["conversations"] = "conversations"
    data: list[DataSource]
    validation: list[DataSource] = field(default_factory=list)
    max_length: int = 2048
    bad_rows: Literal["fail", "skip"] = "fail"
    pack: bool = False
    group_by_modality: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"stages.{self.name}"
        if not self.data:
            raise ValueError(f"{where}.data must name a source of rows at least, got none")
        if self.max_length < 1:
            raise ValueError(f"{where}.max_length must be at least 1, got {self.max_length}")
        for name, sources in (("data", self.data), ("validation", self.validation)):
            streamed = {source.streaming for source in sources}
            if len(streamed) > 1:
                raise ValueError(f"{where}.{name}: either all sources are streamed or none")
            if True in streamed and self.cache_tower:
                raise ValueError(f"{where}.cache_tower needs all rows at hand, but its {name} is streamed")
        if any(source.streaming for source in self.data):
            _require_steps(self, "streamed data has no length")
            if self.group_by_modality:
                raise ValueError(f"{where}.group_by_modality needs all rows at hand, but its data is streamed")
        evaluates = self.arguments.get("eval_strategy", "no") != "no"
        if evaluates != bool(self.validation):
            raise ValueError(
                f"{where}: validation rows and arguments.eval_strategy need one another, got "
                + ("eval_strategy alone" if evaluates else "validation alone")
            )
        if self.pack and self.group_by_modality:
            raise ValueError(f"{where}: pack leaves no padding for group_by_modality to save; choose one")


_KINDS: tuple[type[Stage], ...] = (PatchWordsStage, ObjectWordsStage, AnswersStage, ConversationsStage)
STAGES = {kind.defaults()["objective"]: kind for kind in _KINDS}
"""The kinds of stages, by their objective."""


@cache
def _training_arguments() -> dict[str, Any]:
    """The types of the training arguments that a recipe may set, by name."""
    hints = get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in fields(TrainingArguments) if f.init and f.name not in _SET_BY_RECIPE}


def _require_plain_training(stage: Stage) -> None:
    """Raise where what is no host, but parts of one, is to learn by LoRA or with rates by part."""
    if stage.lora is not None:
        raise ValueError(f"stages.{stage.name}: LoRA needs answers to learn from, got objective {stage.objective}")
    if stage.learning_rates or stage.layer_decay:
        raise ValueError(f"stages.{stage.name}: words of patches are learnt with one rate; leave out rates by part")


def _require_steps(stage: Stage, why: str) -> None:
    if stage.arguments.get("max_steps", 0) < 1:
        raise ValueError(f"stages.{stage.name}.arguments needs max_steps of at least 1: {why}")
