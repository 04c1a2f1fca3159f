"""The public verbs: load, apply, remove, using, inspect_tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from mllm_vision.auto import slotted_config
from mllm_vision.encoding import encode_images, image_inputs
from mllm_vision.host import adapter_for, adapter_of_type, find_host
from mllm_vision.registry import MethodConfig
from mllm_vision.slots import Slots, replacing, restored, stored
from mllm_vision.slotted import SlottedModel, require_weights, slotted_model, spare_slots
from mllm_vision.tokens import Roles

if TYPE_CHECKING:
    from mllm_vision.adapter_folder import Base

Model = TypeVar("Model", bound=nn.Module)

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""Folder of the trained models that come with the library."""
NOT_HERE = (
    "the adapter was trained on {}, which is not to be had here; say with base= where it is, or in a shell join them "
    "by `mllm-vision merge --base`"
)


def load(
    name_or_path: str | Path, *methods: MethodConfig, base: str | Path | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model with methods plugged in, and its stock processor.

    Of an adapter, its base with the adapter's methods, and the adapter on it: a `PeftModel`.

    Args:
        name_or_path: A hub id, a folder, or the name of a checkpoint that comes with the library
            ("tiny-llava-scenes"); of a model, or of an adapter that `mllm_vision.adapter_folder` wrote.
        methods: Configs of the methods, applied in this order; none leaves the checkpoint as it is.
        base: Of an adapter, the model that it was trained on, if that is not where the adapter says.
        kwargs: As for `AutoModelForImageTextToText.from_pretrained`: dtype, device_map, quantization_config, ...

    Raises:
        ValueError: a host nobody supports, a method that asks for what the host cannot give, or an adapter whose base
            is not to be had or of another kind; no weight is read then. Or a base that is not the adapter's.
        RuntimeError: the checkpoint lacks weights.
    """
    from mllm_vision.adapter_folder import ASSEMBLED, Base, adapter_folder, attach

    source = source_of(name_or_path)
    hub: dict[str, Any] = {
        k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in kwargs
    }
    folder, trained_on = adapter_folder(source, **hub), None
    if folder is not None:
        trained_on = Base.read(folder)
        source, methods = source_of(base or trained_on.name), (*trained_on.plugged(methods),)
        for name in ("revision", "subfolder"):  # which are the adapter's
            hub.pop(name, None)
            kwargs.pop(name, None)
    elif base is not None:
        raise ValueError(f"a base belongs to an adapter, and {source} is none")
    if str(source).startswith(ASSEMBLED):
        from mllm_vision.assembly import assemble_again

        try:
            model, processor = assemble_again(str(source), **kwargs)
        except OSError as error:
            raise ValueError(NOT_HERE.format(source)) from error
    else:
        model, processor = _read(source, methods, trained_on, hub, kwargs)
    if methods:
        _apply(model, methods, trained=folder is not None)
    return (model if folder is None else attach(model, folder)), processor


def _read(
    source: str | Path,
    methods: Sequence[MethodConfig],
    trained_on: Base | None,
    hub: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of a checkpoint, all of whose weights are there, and its processor.

    Args:
        methods: What it is to take, and what its config is checked for before a weight is read.
        trained_on: What the adapter asks for that is to be attached, if one is.
    """
    try:
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(source, **hub)
    except OSError as error:
        if trained_on is None:
            raise
        raise ValueError(NOT_HERE.format(source)) from error
    adapter = adapter_for(config)
    with torch.device("meta"):
        slots = Slots(replacing(restored(getattr(config, "mllm_vision", None)), methods), config)
    if trained_on is not None:
        trained_on.check_config(config, slots.methods)
    processor = adapter.load_processor(source, **hub)
    model, info = AutoModelForImageTextToText.from_pretrained(source, config=config, output_loading_info=True, **kwargs)
    require_weights(info)
    return model, processor


def source_of(name_or_path: str | Path) -> str | Path:
    """Where to load from: the folder of a checkpoint that comes with the library, or what was asked for."""
    bundled = {folder.name: folder for folder in CHECKPOINTS.iterdir()}  # by name alone, which "." is not
    return bundled.get(str(name_or_path), name_or_path)


def apply(model: Model, *methods: MethodConfig) -> Model:
    """Plug methods into a live model, in place of those it has. Touches this instance only; `remove` undoes it.

    A method with weights stays, with them, until another of its kind takes its place or `remove` takes it out.

    Args:
        model: A supported host: of a stock class or with slots, quantised, dispatched over devices, or wrapped by PEFT.
        methods: Configs of the methods, applied in this order.

    Returns:
        `model` itself.

    Raises:
        ValueError: a host nobody supports, or a method that asks for what the host cannot give; the model is unchanged.
    """
    _apply(find_host(model), methods)
    return model


def _apply(host: PreTrainedModel, methods: Sequence[MethodConfig], *, trained: bool = False) -> None:
    held = host.vision_slots if isinstance(host, SlottedModel) else None
    slots = Slots(replacing([] if held is None else held.methods, methods), host.config, keep=held)
    slots.match(host, held, trained=trained)
    _plug(host, slots.train(host.training))


def remove(model: Model) -> Model:
    """Take every method out again: the model is an instance of its stock class, bit for bit as it was.

    Returns:
        `model` itself.

    Raises:
        ValueError: the model was loaded from a checkpoint that has no projector but that of a method; it is unchanged.
    """
    host = find_host(model)
    if isinstance(host, SlottedModel):
        adapter = adapter_of_type(host.config.model_type)
        host.plug(Slots([], host.config))
        del host.vision_slots
        del host.config.mllm_vision
        spare_slots(host.config, False)
        host.config.__class__ = adapter.stock_config
        _change_class(host, adapter.stock_model)
    return model


@contextmanager
def using(model: Model, *methods: MethodConfig) -> Iterator[Model]:
    """`apply` for the length of a block; afterwards the model has the methods it had before."""
    host = find_host(model)
    before = host.vision_slots if isinstance(host, SlottedModel) else None
    apply(model, *methods)
    try:
        yield model
    finally:
        if before is None:
            remove(model)
        else:
            _plug(host, before.train(host.training))


@dataclass(frozen=True)
class KeptTokens:
    """What was kept of one tile of an image (an image has one tile unless its host cuts it into several).

    Args:
        image: Number of the image in the batch.
        tile: Number of the tile in the image.
        grid: (H, W), patches of the tile as the tower saw it.
        patch_index: (N,) row-major patches of the tile that the tokens sit on, in the order of the prompt.
        patch_count: (N,) patches folded into each token.
        roles: for each token the name of the role a method gave it, or None where the methods name no roles.
        added: how many tokens, which sit on no patch, a projector added to those of the tile.
    """

    image: int
    tile: int
    grid: tuple[int, int]
    patch_index: Tensor
    patch_count: Tensor
    roles: list[str] | None
    added: int


@torch.no_grad()
def inspect_tokens(model: nn.Module, **inputs: Any) -> list[KeptTokens]:
    """Which tokens of the images in ``inputs`` go into the prompt, one entry a tile.

    Args:
        model: A supported host, with or without methods.
        inputs: What the processor made; text inputs are ignored.

    Raises:
        ValueError: there is no image in ``inputs``.
    """
    host = find_host(model)
    adapter = adapter_for(host.config)
    images = image_inputs(host, inputs)
    if adapter.image_inputs[0] not in images:
        raise ValueError(f"there is no image in the inputs: {adapter.image_inputs[0]} is missing")
    slots = host.vision_slots if isinstance(host, SlottedModel) else Slots([], host.config)
    kept = []
    for number, image in enumerate(encode_images(host, slots, images)):
        tokens = image.on_patches
        size = tokens.grid[0] * tokens.grid[1]
        index, count = tokens.patch_index[0], tokens.patch_count[0]
        named = next(((key, patches[0]) for key, patches in tokens.evidence.items() if isinstance(key, Roles)), None)
        for tile in range(tokens.tiles):
            inside = index // size == tile
            roles = None if named is None else [named[0].names[role] for role in named[1][index[inside]].tolist()]
            kept.append(KeptTokens(number, tile, tokens.grid, index[inside] % size, count[inside], roles, slots.added))
    return kept


def _plug(host: PreTrainedModel, slots: Slots) -> None:
    """Give ``host`` these slots, and the class and config that hold them if it is of a stock class."""
    if not isinstance(host, SlottedModel):
        adapter = adapter_of_type(host.config.model_type)
        if type(host) is not adapter.stock_model:
            raise ValueError(
                f"methods plug into an instance of {adapter.model_name} itself, got its subclass {type(host).__name__};"
                " apply them before anything that changes the class (FSDP)"
            )
        _change_class(host, slotted_model(adapter))
        host.config.__class__ = slotted_config(adapter)
    host.plug(slots)
    host.config.mllm_vision = stored(slots.methods)
    spare_slots(host.config, True)


def _change_class(host: PreTrainedModel, cls: type) -> None:
    """Give ``host`` another class; a device hook of accelerate, which holds on to the old forward, is put on anew."""
    hook = getattr(host, "_hf_hook", None)
    if hook is None and "forward" in vars(host):
        raise ValueError("this model's forward has been replaced (by accelerator.prepare?); apply methods before that")
    if hook is not None:
        remove_hook_from_module(host)
        del host.forward
    host.__class__ = cls
    if hook is not None:
        add_hook_to_module(host, hook)
