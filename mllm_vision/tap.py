"""The attention tap: evidence from a tower's attention layers, in reduced form, under any attention implementation.

While a tap is open, the attention layers it listens to run a function of the `AttentionInterface` that first reads
queries and keys and then calls the implementation the model was using. Nothing else of the forward pass changes, and no
(heads, N, N) map outlives a chunk of its rows.

Shapes: B images, h heads, N positions of the tower (CLS and registers included), d channels a head.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mllm_vision.host import without_peft
from mllm_vision.tokens import AttentionFromCLS, Evidence

MAP_ELEMENTS = 1 << 21
"""Most elements of an attention map held at once (8 MB in float32)."""

PREFIX = "mllm_vision_tap|"

_lock = threading.Lock()
_open_taps: Counter[int] = Counter()
"""How many blocks listen to the layers of each config, by its id."""


@dataclass
class Recording:
    """What the tap has heard: for each request a tensor (B, N) a call, in the tower's own order of positions."""

    layers: dict[nn.Module, int]
    requests: Sequence[Evidence]
    heard: dict[Evidence, list[Tensor]] = field(default_factory=dict)

    def __getitem__(self, request: Evidence) -> list[Tensor]:
        if request not in self.heard:
            raise RuntimeError(
                f"the tower's layer {request.layer} did not go through the attention tap, so no {request}"
            )
        return self.heard[request]


_recording: ContextVar[Recording | None] = ContextVar("mllm_vision_recording", default=None)


@contextmanager
def listen(tower: PreTrainedModel, requests: Sequence[Evidence]) -> Iterator[Recording]:
    """Record the evidence ``requests`` of every forward pass of ``tower`` that this thread runs inside the block."""
    layers = attention_layers(tower)
    recording = Recording({layer: r.layer for r in requests for layer in layers[r.layer]}, requests)
    if not requests:
        yield recording
        return
    token = _recording.set(recording)
    try:
        with _tapped_configs({id(layer.config): layer.config for layer in recording.layers}.values()):
            yield recording
    finally:
        _recording.reset(token)


def attention_layers(tower: PreTrainedModel) -> list[list[nn.Module]]:
    """The attention modules of each layer of ``tower``: those whose class it declares as the source of its attentions.

    There is one a layer, and beside it a copy where PEFT trains the tower in full; either runs, as PEFT is told.
    """
    declared = tower._can_record_outputs["attentions"]
    source = getattr(declared, "target_class", declared)
    layers: dict[str, list[nn.Module]] = {}
    for name, module in tower.named_modules():
        if isinstance(module, source):
            layers.setdefault(without_peft(f".{name}"), []).append(module)
    return list(layers.values())


@contextmanager
def _tapped_configs(configs: Collection[Any]) -> Iterator[None]:
    """Route the attention of the layers with these ``configs`` through the tap; concurrent blocks may overlap."""
    with _lock:
        for config in configs:
            if not _open_taps[id(config)]:
                config._attn_implementation = _tap_of(config._attn_implementation)
            _open_taps[id(config)] += 1
    try:
        yield
    finally:
        with _lock:
            for config in configs:
                _open_taps[id(config)] -= 1
                if not _open_taps[id(config)]:
                    del _open_taps[id(config)]
                    config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)


def _tap_of(implementation: str) -> str:
    """Name under which the tap around ``implementation`` is registered."""
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_tapped_attention, implementation))
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _tapped_attention(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    recording = _recording.get()
    if recording is not None and module in recording.layers:
        for request in recording.requests:
            if request.layer == recording.layers[module]:
                bounds = kwargs.get("cu_seq_lens_q")  # flash attention packs several sequences into one
                with torch.no_grad():
                    heard = [
                        _reduced(request, q, k, kwargs["scaling"], attention_mask)
                        for q, k in zip(_segments(query, bounds), _segments(key, bounds), strict=True)
                    ]
                recording.heard.setdefault(request, []).extend(heard)
    # Each modeling file has an eager function of its own, which the interface takes as its default.
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    seen = _Untapped(module, implementation) if "flash" in implementation else module
    return attend(seen, query, key, value, attention_mask, **kwargs)


class _Untapped:
    """An attention layer as if no tap were open: flash attention reads in the layer's config which kernel to load."""

    def __init__(self, module: nn.Module, implementation: str):
        self.module = module
        config: Any = copy.copy(module.config)
        config._attn_implementation = implementation
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _segments(states: Tensor, bounds: Tensor | None) -> Sequence[Tensor]:
    return [states] if bounds is None else states.split(bounds.diff().tolist(), dim=2)


def _reduced(request: Evidence, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    if isinstance(request, AttentionFromCLS):
        return attention_from_first(query, key, scaling, mask, heads=request.heads)
    return attention_received(query, key, scaling, mask)


def attention_received(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Attention every position receives, mean over heads and summed over queries: (B, N), 1.0 on average.

    Computed in float32 from ``query`` and ``key`` (B, h, N, d), `MAP_ELEMENTS` of the map at a time: several images
    at once where their maps are small, some rows of one image where they are not.
    """
    batch, heads, length, _ = query.shape
    rows = max(1, min(length, MAP_ELEMENTS // (heads * key.shape[2])))
    images = max(1, MAP_ELEMENTS // (heads * key.shape[2] * rows))
    received = torch.zeros(batch, key.shape[2], device=key.device)
    for image in range(0, batch, images):
        some = slice(image, image + images)
        for row in range(0, length, rows):
            chunk = slice(row, row + rows)
            chunk_mask = None if mask is None else mask.expand(batch, -1, -1, -1)[some, :, chunk]
            weights = _attention(query[some, :, chunk], key[some], scaling, chunk_mask)
            received[some] += weights.sum((1, 2)) / heads
    return received


def attention_from_first(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, *, heads: bool = True
) -> Tensor:
    """Attention from the first position (CLS) to every position, mean over heads: (B, N), from (B, h, N, d).

    Without ``heads`` it is one softmax over the width h * d, scaled by 1 / sqrt(h * d).
    """
    first, first_mask = query[:, :, :1], None if mask is None else mask[..., :1, :]
    if not heads:
        first, key = (states.transpose(1, 2).flatten(2)[:, None] for states in (first, key))
        scaling = key.shape[-1] ** -0.5
    return _attention(first, key, scaling, first_mask).squeeze(2).mean(1)


def _attention(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    weights = query.float() @ key.float().transpose(-1, -2)
    weights *= scaling
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else weights + mask
    return weights.softmax(-1)
