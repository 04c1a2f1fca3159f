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
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_vision.host import adapter_for, find_host
from mllm_vision.slotted import SlottedModel

PICTURES = "pixel_values"
SAVED_WITH = {"architectures", "dtype", "transformers_version"}
"""What a config has once it was saved, and says nothing about what the tower sees."""


class CachedRows(Dataset):
    """The rows of another data set with features in place of pictures, which are opened no more.

    What else a row has is held in memory, some kilobytes each.
    """

    def __init__(self, rows: Any, kept: list[tuple[dict[str, Any], list[int]]], features: FeatureFile):
        self.rows, self.kept, self.features = rows, kept, features

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, numbers = self.kept[index]
        return {**row, PICTURES: self.features.read(numbers)} if numbers else dict(row)

    def sizes(self) -> np.ndarray:
        """As the data set tells them, for a sampler."""
        return self.rows.sizes()

    @property
    def skipped(self) -> int:
        """How many rows the data set found broken."""
        return self.rows.skipped


@dataclass
class FeatureFile:
    """Features of pictures, one behind the other, and beside them a line for each: the digest of its pixels.

    A line is written when the features are on disk, so that a killed run loses nothing but its last batch.

    Args:
        folder: Where both files are; it is made.
        shape: (N, L * C).
        numbers: The number of each picture by its digest; what is on disk is found here.
    """

    folder: Path
    shape: tuple[int, int]
    numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in (self._features, self._digests):
            file.touch()
        lines = self._digests.read_text(encoding="ascii").splitlines(keepends=True)
        whole = min(sum(line.endswith("\n") for line in lines), self._features.stat().st_size // self._size)
        self.numbers = {line.strip(): number for number, line in enumerate(lines[:whole])}
        os.truncate(self._features, whole * self._size)
        self._digests.write_text("".join(lines[:whole]), encoding="ascii")

    def append(self, digests: list[str], features: Tensor) -> None:
        """Put the features (B, N, L * C) of B pictures behind those that are there.

        Raises:
            ValueError: they are not of this shape, or do not fit into float16.
        """
        if features.shape[1:] != self.shape:
            raise ValueError(
                f"the tower made {tuple(features.shape[1:])} features of a picture, its config says {self.shape}; make "
                "the pictures as large as its image_size"
            )
        half = features.to(torch.float16)
        if not half.isfinite().all():
            raise ValueError("the tower's features are too large for float16; train without the cache")
        for file, content in (
            (self._features, half.cpu().numpy().tobytes()),
            (self._digests, "".join(f"{digest}\n" for digest in digests).encode()),
        ):
            with file.open("ab") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        self.numbers |= {digest: len(self.numbers) + i for i, digest in enumerate(digests)}

    def read(self, numbers: list[int]) -> Tensor:
        """The features (n, N, L * C) of pictures by their numbers."""
        count = prod(self.shape)
        found = [np.fromfile(self._features, np.float16, count, offset=number * self._size) for number in numbers]
        return torch.from_numpy(np.stack(found)).view(-1, *self.shape)

    @property
    def _size(self) -> int:
        return 2 * prod(self.shape)

    @property
    def _features(self) -> Path:
        return self.folder / "features.float16"

    @property
    def _digests(self) -> Path:
        return self.folder / "pictures.txt"


def cached_rows(rows: Any, model: nn.Module, folder: str | Path, *, batch_size: int = 32) -> CachedRows:
    """``rows`` with features of the model's tower in place of pictures; those that are not in the cache are made now.

    Several data sets may share a folder: a picture is known by its pixels, as the processor made them, and its features
    lie under the digest of the tower, so that another tower, layer or size of pictures never finds them. In distributed
    training the first process of each machine fills the cache, and the others wait.

    Args:
        rows: A data set of rows by number, with the pictures (n, 3, H, W) of a row under `PICTURES`, if it has any.
            Each is opened once.
        model: A supported host, or what wraps one.
        folder: Of the cache.
        batch_size: Pictures that go through the tower together.

    Raises:
        ValueError: the model cannot train on features, see `cached_tower`, or they do not fit into float16.
    """
    host, shape = _cacheable(model)
    with PartialState().local_main_process_first():
        features = FeatureFile(Path(folder) / tower_digest(host), shape)
        found: list[tuple[dict[str, Any], list[str]]] = []
        waiting: dict[str, Tensor] = {}
        for index in range(len(rows)):
            row = dict(rows[index])
            pictures = row.pop(PICTURES, ())
            digests = [hashlib.sha1(picture.numpy().tobytes()).hexdigest() for picture in pictures]
            found.append((row, digests))
            by_digest = zip(digests, pictures, strict=True)
            waiting |= {digest: picture for digest, picture in by_digest if digest not in features.numbers}
            if len(waiting) >= batch_size or (waiting and index == len(rows) - 1):
                features.append(list(waiting), tower_features(host, torch.stack(list(waiting.values()))))
                waiting = {}
    return CachedRows(
        rows, [(row, [features.numbers[digest] for digest in digests]) for row, digests in found], features
    )


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
