"""Floating-point operations of a pass, counted from the matrix products, convolutions and attention that it runs.

A multiplication with its addition is 2. Causal attention counts its whole map, as a kernel without a causal shortcut
computes it. Element-wise work (norms, activations, softmax, choosing tokens) is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_vision.eval.measurement import Clock

aten = torch.ops.aten
ATTENTION_KERNELS = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
"""What `scaled_dot_product_attention` runs; where it runs none of them, it is matrix products."""


class FlopClock(Clock):
    """Tells FLOPs instead of seconds: those that `counter` has seen."""

    def __init__(self, counter: FlopCounterMode):
        self.counter = counter

    def read(self) -> int:
        return self.counter.get_total_flops()


@contextmanager
def counting_flops() -> Iterator[FlopClock]:
    """Counts what runs inside the block."""
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(ATTENTION_KERNELS, attention_flops)) as counter:
        yield FlopClock(counter)


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of queries (B, h, N, d) over keys (B, k, M, d) and values (B, k, M, v), by shape; k divides h."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])
