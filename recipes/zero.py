"""What DeepSpeed's ZeRO-3, which takes weights apart over the processes, needs besides what the Trainer does for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


@contextmanager
def whole_weights() -> Iterator[None]:
    """Have models built and read as they are in one process.

    From the first `TrainingArguments` or Trainer on, transformers takes apart whatever is loaded in a run with ZeRO-3,
    whatever zero3_init_flag says. Methods, LoRA and the check of a base need whole weights, models on the meta device
    cannot be taken apart, and what is asked questions at the end of a run is not trained.
    """
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
