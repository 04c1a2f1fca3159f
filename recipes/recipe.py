"""A recipe: the YAML of a training run, read strictly. Unknown keys are errors that list the known ones."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from mllm_vision.recipes.uhd_tower import UHDTowerSpec
from mllm_vision.registry import MethodConfig
from mllm_vision.scenes.draw import REFERENCE_SIDE

RECIPES = Path(__file__).parent
OBJECTIVES = ("patch_words", "answers")
_SET_BY_RECIPE = ("output_dir", "seed", "data_seed")


@dataclass(kw_only=True)
class ModelSpec:
    """Sizes of a new model: fields of `CLIPVisionConfig` and of `LlamaConfig`."""

    vision: dict[str, Any]
    text: dict[str, Any]


@dataclass(kw_only=True)
class Stage:
    """What one stage learns, from which scenes, with which parameters.

    Args:
        objective: "patch_words" (what lies under each patch) or "answers" (questions and captions).
        trains: Names of submodules whose parameters are trained; all others are frozen.
        first_scene: Index of the first training scene. Stages with ranges apart see different pictures.
        turns: For "answers": questions a picture, by family.
        logit_scale: For "patch_words": what the product of a feature and the embedding of a word is multiplied by. Word
            embeddings of a new model have a length of 0.02 * sqrt(256) = 0.3: a feature that is the sum of its words
            scores 10 at 100. In a trained model both have grown; 1 leaves its features as long as they are.
        arguments: Fields of `transformers.TrainingArguments`.
    """

    name: str
    objective: str
    trains: list[str]
    first_scene: int = 0
    turns: dict[str, float] = field(default_factory=dict)
    logit_scale: float = 100.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")


@dataclass(kw_only=True)
class Recipe:
    """A training run.

    Args:
        output: Folder of checkpoints, finished stages and the final model.
        model: Sizes of a new model, or the checkpoint to go on from: a folder or "tiny-llava-scenes", as it is or with
            its tower as a ViT-UHD.
        side: Width and height in pixels of the scenes to learn from and to be scored on.
        text_scale: As in `sample_scene`.
        methods: What is plugged into it, as `config.json` stores it; weights of methods are trained in every stage.
        scored_per_family: Test questions per family for the model card.
        note: What a reader of the model card must know about the run; printed there as it stands.
        overwrite: Drop what an earlier run left in `output`.
    """

    output: str
    seed: int
    model: ModelSpec | UHDTowerSpec | str
    stages: list[Stage]
    side: int = REFERENCE_SIDE
    text_scale: float = 1.0
    methods: list[dict[str, Any]] = field(default_factory=list)
    scored_per_family: int = 500
    note: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a recipe needs at least one stage")
        for method in self.methods:
            MethodConfig.from_dict(method)

    @property
    def base(self) -> str | None:
        """The checkpoint to go on from, None for a new model."""
        if isinstance(self.model, UHDTowerSpec):
            return self.model.base
        return self.model if isinstance(self.model, str) else None


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A name from `recipe_names()` or the path of a YAML file.
        overrides: `key=value` with a dotted key and a YAML value; a stage is addressed by its name:
            `stages.tower.arguments.max_steps=10`.
    """
    path = Path(recipe) if Path(recipe).suffix in (".yaml", ".yml") else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {recipe!r}; there are {', '.join(recipe_names())}, or name a YAML file")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    for override in overrides:
        _override(raw, override)
    fields = dict(_checked(Recipe, raw, str(path)))
    if not isinstance(fields["model"], str):
        kind = UHDTowerSpec if isinstance(fields["model"], dict) and "base" in fields["model"] else ModelSpec
        fields["model"] = kind(**_checked(kind, fields["model"], "model"))
    if not isinstance(fields["stages"], list):
        raise ValueError(f"stages must be a list, got {type(fields['stages']).__name__}")
    fields["stages"] = [Stage(**_checked(Stage, stage, "stages")) for stage in fields["stages"]]
    for stage in fields["stages"]:
        known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init and f.name not in _SET_BY_RECIPE]
        _check_keys(stage.arguments, known, f"stages.{stage.name}.arguments")
        if stage.arguments.get("max_steps", 0) < 1:
            raise ValueError(f"stages.{stage.name}.arguments needs max_steps of at least 1: scenes have no epochs")
    return Recipe(**fields)


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"an override must look like key=value, got {override!r}")
    *path, last = key.split(".")
    node: Any = raw
    for part in path:
        if isinstance(node, list):
            names = [stage["name"] for stage in node]
            if part not in names:
                raise ValueError(f"{key}: no stage {part!r}; there are {', '.join(names)}")
            node = node[names.index(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            raise ValueError(f"{key}: unknown key {part!r}; there are {', '.join(map(str, node))}")
    if not isinstance(node, dict):
        raise ValueError(f"{key}: {'.'.join(path)} has no keys to override")
    node[last] = _value(value)


def _value(text: str) -> Any:
    """A YAML value; also a number like 1e-4, which YAML 1.1 takes for a string."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _checked(kind: type, mapping: Any, where: str) -> dict[str, Any]:
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} must be a mapping of keys to values, got {type(mapping).__name__}")
    _check_keys(mapping, [f.name for f in dataclasses.fields(kind)], where)
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in mapping]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return mapping


def _check_keys(mapping: dict[str, Any], known: list[str], where: str) -> None:
    if unknown := sorted(set(mapping) - set(known)):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; valid keys are {', '.join(known)}")
