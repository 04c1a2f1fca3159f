"""Adapter folders: what PEFT writes of a LoRA, and which base with which methods it belongs on.

Beside PEFT's files there is `BASE_FILE`. There is no `config.json`, by which transformers would take the folder for a
whole model instead of looking for the base that PEFT's file names.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME, find_adapter_config_file

from mllm_vision.host import PARTS, SLOTS, adapter_of_type, find_host, inside, without_peft
from mllm_vision.registry import MethodConfig
from mllm_vision.slots import replacing, restored
from mllm_vision.slotted import SlottedModel

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

BASE_FILE = "mllm_vision_base.json"
ASSEMBLED = "assemble:"
"""How a base is named that is in no folder: by what it is assembled of, see `mllm_vision.assembly`."""
VERSION = 1
"""Version of `BASE_FILE`."""

SAMPLED_WEIGHTS, SAMPLED_VALUES = 32, 8
"""How many weights of each part, and values of each weight, are stored to recognise the base."""
TOLERANCE = 2**-7
"""Relative difference that rounding a value to bfloat16 once or twice stays below."""
TINY = 1e-7
"""Difference that rounding to float16 makes in the smallest of values."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on.

    Args:
        model_type: Of the stock host.
        methods: What was plugged into it, as `config.json` stores it; None for a stock model.
        weights: `SAMPLED_VALUES` of some frozen weights, by the names that they have in the host, with their shapes.
        name: A folder, a hub id, or what it is assembled of (`ASSEMBLED`).
    """

    model_type: str
    methods: dict[str, Any] | None
    weights: dict[str, dict[str, Any]]
    name: str = ""

    @classmethod
    def of(cls, host: PreTrainedModel, trained: Collection[str]) -> Base:
        """That of an adapter which is about to be trained on ``host``.

        Args:
            trained: Names of the submodules that are trained themselves, and whose weights the adapter will have.
        """
        adapter = adapter_of_type(host.config.model_type)
        by_part: dict[str, list[str]] = {part: [] for part in PARTS}
        weights = dict(_readable(host))
        for name in weights:
            if not any(inside(name, module) for module in (*trained, SLOTS)):
                by_part[adapter.part_of(name)].append(name)
        # In the order of a hash of their names: at a fixed stride, one kind of weight could be missed in every layer.
        chosen = [sorted(names, key=lambda n: zlib.crc32(n.encode()))[:SAMPLED_WEIGHTS] for names in by_part.values()]
        sampled: dict[str, dict[str, Any]] = {
            name: {"shape": list(weights[name].shape), "values": _sample(weights[name])}
            for names in chosen
            for name in names
        }
        return cls(adapter.model_type, getattr(host.config, "mllm_vision", None), sampled)

    @classmethod
    def read(cls, folder: Path) -> Base:
        """The base that an adapter folder names.

        Raises:
            ValueError: the folder does not say, or a later version of this library wrote it.
        """
        path = folder / BASE_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} is an adapter without {BASE_FILE}, which says what it was trained on; load its base "
                "yourself, plug in its methods, and call PeftModel.from_pretrained on that"
            )
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["version"] > VERSION:
            raise ValueError(f"{path} is of version {stored['version']}, this mllm_vision reads {VERSION}")
        del stored["version"]
        return cls(**stored)

    def plugged(self, methods: Sequence[MethodConfig]) -> list[MethodConfig]:
        """The adapter's methods, with ``methods`` in place of those without weights."""
        return replacing(restored(self.methods), methods) if methods else restored(self.methods)

    def check_config(self, config: PreTrainedConfig, methods: Sequence[MethodConfig]) -> None:
        """Raise ValueError where a model with this config and these methods cannot be the base, weights unseen."""
        got = adapter_of_type(config.model_type).model_type
        if got != self.model_type:
            raise ValueError(f"the adapter was trained on {self.name}, a model of type {self.model_type}, got {got}")
        trained = [method for method in restored(self.methods) if method.needs_weights]
        given = [method for method in methods if method.needs_weights]
        if trained != given:
            raise ValueError(
                f"the adapter was trained on {self.name} with {_listed(trained)}, got a model with {_listed(given)}; "
                "plug in the same, or leave out `methods` where the adapter is loaded"
            )

    def check(self, host: PreTrainedModel) -> None:
        """Raise ValueError where ``host`` is another model; weights that are quantised are not compared."""
        slots = host.vision_slots.methods if isinstance(host, SlottedModel) else []
        self.check_config(host.config, slots)
        given = dict(_readable(host))
        quantised = {without_peft(name) for name, weight in host.named_parameters() if not weight.is_floating_point()}
        seen = {
            name: expected
            for name, expected in self.weights.items()
            if name not in quantised and not (name in given and _elsewhere(given[name]))
        }
        model = host.name_or_path or type(host).__name__
        for name, expected in seen.items():
            shape = list(given[name].shape) if name in given else None
            if shape != expected["shape"]:
                found = "has no such weight" if shape is None else f"has {shape}"
                raise ValueError(
                    f"the adapter was trained on {self.name}, whose {name} is {expected['shape']}, and the model "
                    f"given, {model}, {found}; load {self.name}"
                )
        for name, expected in seen.items():
            values = torch.tensor([_sample(given[name]), expected["values"]])
            if ((values[0] - values[1]).abs() > TOLERANCE * values.abs().amax(0) + TINY).any():
                raise ValueError(
                    f"the adapter was trained on {self.name}, and the model given, {model}, is another one or has "
                    f"been trained further: {name} has other values; load {self.name}"
                )


def adapter_folder(name: str | Path, **hub: Any) -> Path | None:
    """The folder of an adapter, downloaded where ``name`` is a hub id; None where it is no adapter.

    Args:
        hub: How to get it, as for `from_pretrained`: revision, token, cache_dir, local_files_only, subfolder.

    Raises:
        FileNotFoundError: ``name`` can be that of a folder alone, and there is none.
    """
    if _no_hub_id(str(name)) and not Path(name).is_dir():
        raise FileNotFoundError(f"there is no folder {name}")
    config = find_adapter_config_file(str(name), **hub)
    found = partial(cached_file, str(name), _raise_exceptions_for_missing_entries=False, **hub)
    if config is None or found("config.json") is not None:  # a whole model may have an adapter in its folder
        return None
    if not Path(name).is_dir():
        for file in (ADAPTER_SAFE_WEIGHTS_NAME, BASE_FILE):
            found(file)
    return Path(config).parent


def save_adapter(
    model: PeftModel, folder: str | Path, base: str | Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter of a model from `with_lora` or `attach`.

    Args:
        base: Folder or hub id of the model that it was trained on, valid where the adapter will be loaded.
        state_dict: Gathered weights of a model that is sharded over processes (ZeRO-3, FSDP), the frozen ones or not;
            None for those of ``model``.

    Raises:
        ValueError: the model is not from `with_lora` or `attach`, so that its base is unknown.
    """
    trained_on: Base | None = getattr(model, "trained_on", None)
    if trained_on is None:
        raise ValueError("only a model from with_lora or attach can be saved as an adapter: the base must be known")
    model.peft_config[model.active_adapter].base_model_name_or_path = str(base)
    given = {} if state_dict is None else {"state_dict": state_dict}
    # With "auto", its default, PEFT asks the hub whether the vocabulary has grown, which no base's does here.
    model.save_pretrained(str(folder), save_embedding_layers=False, **given)
    stored = {"version": VERSION} | asdict(trained_on) | {"name": str(base)}
    (Path(folder) / BASE_FILE).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def attach(model: PreTrainedModel, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Put an adapter on the model that it was trained on.

    Args:
        model: The base with the adapter's methods that have weights; other reducers will do.
        folder: What `save_adapter` wrote.
        is_trainable: Whether to train it further.

    Raises:
        ValueError: another model, or other methods with weights.
        RuntimeError: weights of the adapter are missing or surplus.
    """
    from peft import PeftModel, get_peft_model_state_dict

    base = Base.read(Path(folder))
    base.check(find_host(model))
    attached = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    with safe_open(Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME, framework="pt") as file:
        differing = set(file.keys()) ^ set(get_peft_model_state_dict(attached, save_embedding_layers=False))
    if differing:
        raise RuntimeError(
            f"{folder} and its base do not fit, {len(differing)} weights: {', '.join(sorted(differing)[:5])}"
        )
    attached.trained_on = base
    return attached


def _no_hub_id(name: str) -> bool:
    """Whether it begins as a path does, or has more than the two parts of a hub id."""
    return name.startswith(("/", ".", "~")) or len(Path(name).parts) > 2


def _readable(host: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters that are not quantised and no adapter's, by the names that they have without PEFT."""
    return [
        (without_peft(name), weight)
        for name, weight in host.named_parameters()
        if weight.is_floating_point() and "lora_" not in name and ".modules_to_save." not in name
    ]


def _elsewhere(weight: Tensor) -> bool:
    """Whether a weight is elsewhere: on disk, or with the other processes."""
    return weight.is_meta or not weight.numel()


def _sample(weight: Tensor) -> list[float]:
    flat = weight.detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, SAMPLED_VALUES, dtype=torch.float64).long()
    sampled: list[float] = flat[places.to(flat.device)].float().tolist()
    return sampled


def _listed(methods: Sequence[MethodConfig]) -> str:
    return " and ".join(map(repr, methods)) or "no method that has weights"
