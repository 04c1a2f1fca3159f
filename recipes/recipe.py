"""A recipe: the YAML of a training run, read strictly. Contradictions are errors before anything is loaded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from mllm_vision.assembly import AssemblySpec
from mllm_vision.eval.task import parse_tasks
from mllm_vision.host import PARTS
from mllm_vision.recipes.adapter_rank import require_plain
from mllm_vision.recipes.quantisation import Quantisation
from mllm_vision.recipes.stages import (
    STAGES,
    AnswersStage,
    ConversationsStage,
    ObjectWordsStage,
    PatchWordsStage,
    Stage,
)
from mllm_vision.recipes.tiny_model import NewModelSpec
from mllm_vision.recipes.uhd_tower import UHDTowerSpec
from mllm_vision.registry import MethodConfig
from mllm_vision.scenes.draw import REFERENCE_SIDE
from mllm_vision.settings import Settings

RECIPES = Path(__file__).parent
LAUNCH = RECIPES / "accelerate"
"""Folder of the configurations for `accelerate launch`."""
Dtype = Literal["float32", "bfloat16", "float16"]
_SUFFIXES = (".yaml", ".yml")


@dataclass(kw_only=True)
class Recipe(Settings):
    """A training run.

    Args:
        output: Folder of checkpoints, finished stages and the final model.
        model: What the run begins with: a folder, a hub id or "tiny-llava-scenes", as it is or with its tower as a
            ViT-UHD; a tower and a language model to join; or the sizes of a new model.
        stages: One after the other.
        methods: What is plugged into the model, as `config.json` stores it; their weights are trained in every stage.
        dtype: Of the weights. Mixed precision, of float32 weights, is ``bf16`` among the arguments of a stage.
        quantize: Precision of the language model's frozen weights, for LoRA: 4-bit "nf4" or "int8".
        attention: Implementation of attention, as for `from_pretrained`; None is the default.
        publish_dtype: Of the weights as written at the end, of an adapter or a whole model; None is ``dtype``.
        publish_rank: Of an adapter as written at the end, whose updates are cut down to it; None is that of training.
        task: A benchmark that the final model is scored on, as "scenes:questions=500".
        data: Folder of the benchmark's data, as for `mllm-vision eval`; None is the hub.
        side: Width and height in pixels of drawn scenes and, for a ViT-UHD, of pictures.
        text_scale: Of drawn scenes, as in `sample_scene`.
        about: What the model is, for the model card: Markdown.
        card: Entries at the head of the model card, as ``license``.
        note: What a reader of the model card must know about the run; printed there as it stands.
        overwrite: Drop what an earlier run left in `output`.

    Raises:
        ValueError: settings that contradict each other, before anything is loaded.
    """

    output: str
    seed: int
    model: str | NewModelSpec | UHDTowerSpec | AssemblySpec
    stages: list[Stage]
    methods: list[dict[str, Any]] = field(default_factory=list)
    dtype: Dtype = "float32"
    quantize: Quantisation | None = None
    attention: str | None = None
    publish_dtype: Dtype | None = None
    publish_rank: int | None = None
    task: str | None = None
    data: str | None = None
    side: int = REFERENCE_SIDE
    text_scale: float = 1.0
    about: str = ""
    card: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output = str(Path(self.output).expanduser())
        if not self.stages:
            raise ValueError("a recipe needs at least one stage")
        if self.task is not None and len(parse_tasks(self.task)) != 1:
            raise ValueError(f"task must be one benchmark, got {self.task!r}")
        plugged = [MethodConfig.from_dict(method) for method in self.methods]
        names = [stage.name for stage in self.stages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"stages: two are called {', '.join(twice)}")
        reduced = any(method.kind == "reducer" for method in plugged)
        for stage in self.stages:
            where = f"stages.{stage.name}"
            if not stage.trains and stage.lora is None and not any(method.needs_weights for method in plugged):
                raise ValueError(f"{where} trains nothing: name parts in trains, give it lora, or plug in weights")
            if stage.lora is not None and stage is not self.stages[-1]:
                raise ValueError(f"{where}: LoRA is for the last stage, whose result is an adapter; merge it to go on")
            if both := sorted(set(stage.trains) & set(stage.lora.parts if stage.lora else ())):
                raise ValueError(
                    f"{where}: the {', '.join(both)} is both in trains and a target of lora; take it out of either"
                )
            masked = getattr(stage, "pack", False) or getattr(stage, "branches", False)
            if masked and "flash" in (self.attention or ""):
                raise ValueError(
                    f"{where}: pack and branches need masks that flash attention does not take; set attention: sdpa"
                )
            if isinstance(stage, PatchWordsStage | ObjectWordsStage) and plugged:
                raise ValueError(f"{where}: words of patches are learnt by the stock host; drop methods, or this stage")
            if isinstance(stage, ConversationsStage) and stage.pack and plugged:
                raise ValueError(f"{where}.pack: prompts that methods change cannot be packed; drop either")
            if isinstance(stage, AnswersStage) and stage.branches and reduced:
                raise ValueError(f"{where}.branches: prompts that reducers change cannot branch; set it to false")
            self._check_rates(stage, any(method.needs_weights for method in plugged))
        if self.publish_rank is not None:
            self._check_rank(self.publish_rank)
        if self.quantize is not None:
            self._check_quantised()

    def _check_rates(self, stage: Stage, methods_learn: bool) -> None:
        """Raise where a frozen part has a rate; unchecked if `trains` names submodules, whose part the model knows."""
        learning = {*stage.trains, *(stage.lora.parts if stage.lora else ()), *(["projector"] * methods_learn)}
        for kind in ("learning_rates", "layer_decay"):
            if learning <= set(PARTS) and (idle := sorted(set(getattr(stage, kind)) - learning)):
                raise ValueError(
                    f"stages.{stage.name}.{kind}: {', '.join(idle)} does not learn in this stage; name it in trains, "
                    "give it lora, or leave its rate out"
                )

    def _check_rank(self, rank: int) -> None:
        lora = self.stages[-1].lora
        if lora is None:
            raise ValueError("publish_rank: the last stage has no lora whose rank could be reduced; drop it")
        if not 1 <= rank <= lora.r:
            raise ValueError(f"publish_rank must be in 1..{lora.r}, got {rank}")
        require_plain({"init_lora_weights": True} | lora.options)

    def _check_quantised(self) -> None:
        if isinstance(self.model, NewModelSpec):
            raise ValueError("quantize: a new model has no weights to be frozen and quantised")
        for stage in self.stages:
            if frozen := [name for name in stage.trains if name not in ("tower", "projector")]:
                raise ValueError(
                    f"stages.{stage.name}.trains: quantised weights cannot be trained, got {', '.join(frozen)}; "
                    "give the language model lora"
                )
            if stage.lora is None:
                raise ValueError(
                    f"stages.{stage.name}: a quantised model learns by LoRA; give the stage lora, or drop quantize"
                )

    @property
    def base(self) -> str | None:
        """The checkpoint to go on from, None for a new or an assembled model."""
        if isinstance(self.model, UHDTowerSpec):
            return self.model.base
        return self.model if isinstance(self.model, str) else None


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_file(recipe: str | Path) -> Path:
    """The YAML file of a recipe, by its name or its path.

    Raises:
        FileNotFoundError: there is none; the message lists those there are.
    """
    path = Path(recipe) if Path(recipe).suffix in _SUFFIXES else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {str(recipe)!r}; there are {', '.join(recipe_names())}, or a YAML file")
    return path


def recipe_title(recipe: str) -> str:
    """What a recipe of the library is for: the first sentence of its header."""
    lines = recipe_file(recipe).read_text(encoding="utf-8").partition("\n#\n")[0].splitlines()
    return " ".join(line.lstrip("# ") for line in lines)


def copy_recipe(recipe: str, folder: str | Path) -> Path:
    """Copy a recipe of the library, or one of its launch configurations for accelerate, to ``folder``.

    Raises:
        FileNotFoundError: neither is called ``recipe``.
        FileExistsError: there is a file of its name already, or ``folder`` is one.
    """
    launch = LAUNCH / f"{recipe}.yaml"
    source = launch if launch.is_file() else recipe_file(recipe)
    target = Path(folder) / source.name
    if target.exists():
        raise FileExistsError(f"{target} exists; move it away first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise FileExistsError(f"{folder} is a file; give a folder to copy to") from None
    return Path(shutil.copyfile(source, target))


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A name from `recipe_names()` or the path of a YAML file.
        overrides: `key=value` with a dotted key and a YAML value; a stage is addressed by its name, a source of data
            by its number: `stages.tower.arguments.max_steps=10`, `stages.answers.data.0.path=mine.json`.

    Raises:
        FileNotFoundError: an unknown recipe.
        ValueError: an unknown key, a value of the wrong type, or a contradiction.
    """
    path = recipe_file(recipe)
    raw = read_yaml(path)
    for override in overrides:
        _override(raw, override)
    return built(Recipe, raw, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, read as recipes are.

    Raises:
        ValueError: the file is no YAML, has a key twice, or is no mapping.
    """
    try:
        raw = _unshared(_read(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}; mend the file") from error
    _require_mapping(raw, str(path))
    return raw


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, which YAML 1.1 takes for a string, and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if isinstance(key, str) and keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = dict(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(text: str) -> Any:
    return yaml.load(text, _Loader)


def _unshared(value: Any) -> Any:
    """A copy in which what YAML anchors share stands several times, so that an override changes one of them."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"an override must look like key=value, got {override!r}")
    try:
        wanted = _read(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}: {value!r} is no YAML: {error}") from error
    *path, last = key.split(".")
    node: Any = raw
    for i, part in enumerate(path):
        if isinstance(node, list):
            names = _names(node)
            if part not in names:
                what = "stage" if path[:i] == ["stages"] else "item"
                raise ValueError(f"{key}: no {what} {part!r}; there are {', '.join(names)}")
            node = node[names.index(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:  # a mapping that the recipe leaves out, as learning_rates; read strictly later
                node[part] = {}
            node = node[part]
    if not isinstance(node, dict):
        raise ValueError(f"{key}: {'.'.join(path)} has no key {last!r}; override it whole, or one of its items")
    node[last] = wanted


def _names(items: list[Any]) -> list[str]:
    """What an override calls the items of a list: stages by their names, sources of data by their numbers."""
    return [
        str(item["name"]) if isinstance(item, dict) and {"name", "objective"} <= set(item) else str(i)
        for i, item in enumerate(items)
    ]


def _require_mapping(raw: Any, where: str) -> None:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be a mapping of keys to values, got {type(raw).__name__}")


def built(kind: type[Settings], raw: Any, where: str) -> Any:
    """Settings of a kind from a mapping, with the settings that they are made of."""
    _require_mapping(raw, where)
    hints = get_type_hints(kind)
    valid = list(kind.defaults())
    if unknown := sorted(set(raw) - set(valid)):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; valid keys are {', '.join(valid)}")
    if missing := kind.missing(raw):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    try:
        return kind(**{name: _value(hints[name], value, name) for name, value in raw.items()})
    except ValueError as error:
        said = str(error)  # a stage names itself already
        raise ValueError(said if said.startswith(where) else f"{where}: {said}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value, or the settings that a mapping stands for where a field holds settings."""
    if get_origin(hint) is list and isinstance(value, list):
        (each,) = get_args(hint)
        return [_value(each, item, where) for item in value]
    if hint is Stage:
        return _stage(value)
    kinds = [kind for kind in (get_args(hint) or (hint,)) if isinstance(kind, type) and issubclass(kind, Settings)]
    if not kinds or not isinstance(value, dict):
        return value
    best = max(kinds, key=lambda kind: len(set(value) & set(kind.defaults())))
    return built(best, value, where)


def _stage(raw: Any) -> Stage:
    if not isinstance(raw, dict) or raw.get("objective") not in STAGES:
        got = repr(raw.get("objective")) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"a stage's objective must be one of {', '.join(STAGES)}, got {got}")
    return built(STAGES[raw["objective"]], raw, f"stages.{raw.get('name', '?')}")
