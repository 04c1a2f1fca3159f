"""A frozen tower runs once over the pictures of a data set; training takes its features from disk.

`cached_rows` fills the cache and returns the data set with features in place of pixels; inside `cached_tower` the model
takes them. Images still run through the tower, so that the model can be evaluated on others while it trains, and
checkpoints hold the whole model.

Shapes: n pictures of a row, N positions of the tower (CLS among them, where it has one), C channels, L layers that the
projector takes. Features are (n, N, L * C) in float16, whose rounding is all that differs from training without them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_vision.folders import whole_folder
from mllm_vision.host import adapter_for, find_host
from mllm_vision.recipes.disk import require_room
from mllm_vision.recipes.feature_file import FeatureFile, RowFile, write_rows
from mllm_vision.recipes.row_identity import Identity
from mllm_vision.slotted import SlottedModel

PICTURES = "pixel_values"
_SKIPPED = "skipped.txt"
_SIGN_OF_LIFE = 30.0  # seconds
SAVED_WITH = {"architectures", "dtype", "transformers_version"}
"""What a config has once it was saved, and says nothing about what the tower sees."""


class CachedRows(Dataset):
    """The rows of another data set with features in place of pictures, which are opened no more.

    What else a row has is on disk, too, as it was when the cache was filled; memory holds 8 bytes a row.
    """

    def __init__(self, rows: Any, folder: Path, features: FeatureFile):
        self.rows, self.features = rows, features
        self._kept = RowFile(folder)
        self.skipped = int((folder / _SKIPPED).read_text(encoding="ascii"))
        """How many rows the data set found broken when the cache was filled."""

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._kept[index]
        numbers = row.pop(PICTURES)
        return {**row, PICTURES: self.features.read(numbers)} if numbers else row

    def sizes(self) -> np.ndarray:
        """As the data set tells them, for a sampler."""
        return self.rows.sizes()


def cached_rows(
    rows: Any,
    model: nn.Module,
    folder: str | Path,
    arguments: TrainingArguments,
    identity: Identity,
    *,
    besides: int = 0,
    batch_size: int = 32,
) -> CachedRows:
    """``rows`` with features of the model's tower in place of pictures; those that are not in the cache are made now.

    Several data sets may share a folder: a picture is known by its pixels, as the processor made them, and its features
    lie under the digest of the tower, so that another tower, layer or size of pictures never finds them. Rows that were
    cached to their end, by their identity, are found again without opening a picture.

    In distributed training the process that writes the output fills the cache: the first of all, or that of each
    machine with ``save_on_each_node``. Others only read, and wait as long as it takes, beyond ``ddp_timeout``.

    Args:
        rows: A data set of rows by number, with the pictures (n, 3, H, W) of a row under `PICTURES`, if it has any.
        model: A supported host, or what wraps one. Its tower fills the cache on the device that is trained on.
        folder: Of the cache, which all machines see, unless each fills its own.
        arguments: Of the stage.
        identity: Of ``rows``.
        besides: Bytes that the disk needs room for beside features.
        batch_size: Pictures that go through the tower together.

    Raises:
        ValueError: the model cannot train on features, see `cached_tower`, or they do not fit into float16.
        OSError: the disk has no room for the features of pictures, before one is made. Texts, some kilobytes a row,
            are not counted.
        FileNotFoundError: another process filled a cache that this one does not see.
    """
    host, shape = _cacheable(model)
    features = FeatureFile(Path(folder) / tower_digest(host), shape)
    kept = features.folder / identity.digest
    with _all_waiting() as still_at_work:
        if arguments.should_save and not kept.is_dir():
            tower = adapter_for(host.config).tower(host)
            with whole_folder(kept) as partial, _moved(tower, arguments.device):
                write_rows(partial, _numbered(rows, host, features, identity, besides, batch_size, still_at_work))
                (partial / _SKIPPED).write_text(str(getattr(rows, "skipped", 0)), encoding="ascii")
    if not kept.is_dir():
        raise FileNotFoundError(
            f"the process that writes the output filled the cache, but here is no {kept}; put the output where all "
            "machines see it, or set save_on_each_node; rows and pictures must not change meanwhile"
        )
    return CachedRows(rows, kept, features)


def _numbered(
    rows: Any,
    host: PreTrainedModel,
    features: FeatureFile,
    identity: Identity,
    besides: int,
    batch_size: int,
    still_at_work: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    """Every row with the numbers of its pictures, whose features are in the file when the last row is out."""
    numbers = features.repaired()
    seen: set[int] = set()
    waiting: dict[str, Tensor] = {}
    room = False
    for index in range(len(rows)):
        still_at_work()
        row = dict(rows[index])
        pictures = row.pop(PICTURES, ())
        digests = [hashlib.sha1(picture.numpy().tobytes()).hexdigest() for picture in pictures]
        for digest, picture in zip(digests, pictures, strict=True):
            if digest not in numbers:
                if not room:  # once, for all that may be new
                    require_room(
                        features.folder,
                        (identity.pictures - len(seen)) * features.size + besides,
                        f"features of up to {identity.pictures - len(seen)} pictures, checkpoints and model take",
                    )
                    room = True
                numbers[digest], waiting[digest] = len(numbers), picture
            seen.add(numbers[digest])
        if len(waiting) >= batch_size:
            features.append(list(waiting), tower_features(host, torch.stack(list(waiting.values()))))
            waiting = {}
        yield {**row, PICTURES: [numbers[digest] for digest in digests]}
    if waiting:
        features.append(list(waiting), tower_features(host, torch.stack(list(waiting.values()))))


@contextmanager
def _all_waiting() -> Iterator[Callable[[], None]]:
    """Nobody goes on behind the block before all have left it.

    A process with long work in it calls the function that it gets, again and again, lest the others' waiting be taken
    for a hang: whatever they wait for together ends in `_SIGN_OF_LIFE`, far below any timeout.
    """
    device, last = PartialState().device, time.monotonic()

    def busy(at_work: bool) -> bool:
        return bool(reduce(torch.tensor(float(at_work), device=device)) > 0)

    def still_at_work() -> None:
        nonlocal last
        if time.monotonic() - last >= _SIGN_OF_LIFE:
            busy(True)
            last = time.monotonic()

    yield still_at_work
    while busy(False):
        pass


@contextmanager
def _moved(tower: nn.Module, device: torch.device) -> Iterator[None]:
    """The tower on ``device``, on which the Trainer puts a model only when its rows are there."""
    before = next(tower.parameters()).device
    if before != device:
        tower.to(device)
    try:
        yield
    finally:
        if before != device:
            tower.to(before)


@contextmanager
def cached_tower(model: nn.Module) -> Iterator[None]:
    """Inside the block, ``pixel_values`` that are features (B, N, L * C) pass through the tower unchanged.

    Images (B, 3, H, W) are encoded as usual. Only the tower's `forward` is replaced, so checkpoints hold the tower.

    Raises:
        ValueError: a tower that is trained, tiles or pictures of any size, or a method that asks the tower for evidence
            or for smaller pictures.
    """
    host, _ = _cacheable(model)
    tower, layers = adapter_for(host.config).tower(host), _layers(host)
    stock, held = tower.forward, vars(tower).get("forward")  # accelerate puts one on an instance

    def forward(pixel_values: Tensor, **kwargs: Any) -> Any:
        if pixel_values.dim() != 3:
            return stock(pixel_values, **kwargs)
        states = pixel_values.to(tower.dtype).chunk(len(layers), dim=-1)
        return BaseModelOutputWithPooling(hidden_states=dict(zip(layers, states, strict=True)))

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward
        if held is not None:
            tower.forward = held


@torch.no_grad()
def tower_features(host: PreTrainedModel, pictures: Tensor) -> Tensor:
    """(B, N, L * C): what the projector of ``host`` takes of pictures (B, 3, H, W), CLS included."""
    tower = adapter_for(host.config).tower(host)
    training = tower.training
    tower.eval()
    states = tower(pictures.to(tower.device, tower.dtype), output_hidden_states=True).hidden_states
    tower.train(training)
    return torch.cat([states[layer] for layer in _layers(host)], dim=-1)


def tower_digest(host: PreTrainedModel) -> str:
    """A name for all that features depend on but the picture: the tower's config and weights, and the layers."""
    tower = adapter_for(host.config).tower(host)
    config = tower.config.to_dict()
    config = {key: config[key] for key in config.keys() - SAVED_WITH if not key.startswith("_")}
    digest = hashlib.sha1(json.dumps([config, _layers(host)], sort_keys=True, default=str).encode())
    for name, weight in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _layers(host: PreTrainedModel) -> list[int]:
    layers = host.config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)


def _cacheable(model: nn.Module) -> tuple[PreTrainedModel, tuple[int, int]]:
    """The host in ``model`` and (N, L * C); a ValueError where features cannot take the place of its pictures."""
    host = find_host(model)
    adapter = adapter_for(host.config)
    facts = adapter.facts(host.config)
    remedy = "; train without the cache"
    if facts.grid is None or facts.image_tokens is None:
        raise ValueError(f"{adapter.model_name} cuts pictures into tiles or takes them in any size{remedy}")
    if any(parameter.requires_grad for parameter in adapter.tower(host).parameters()):
        raise ValueError(f"the tower is trained, so that its features change{remedy}, or freeze the tower")
    if isinstance(host, SlottedModel) and (host.vision_slots.requests or host.vision_slots.resize is not None):
        asking = ", ".join(method.type for method in host.vision_slots.methods)
        raise ValueError(f"a method among {asking} has to see the tower at work, or smaller pictures{remedy}")
    return host, (facts.grid[0] * facts.grid[1] + facts.has_cls, facts.width)
