"""How a cost is measured: runs in turn for time, a process of its own for memory, the steps of an answer apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from mllm_vision.encoding import encode_images, image_inputs

_PROC = Path("/proc/self")
_MEMORY = Path("/proc/meminfo")

T = TypeVar("T")


def in_turn(runs: Sequence[Callable[[], T]], repeats: int, *, warmups: int = 1) -> list[tuple[T, ...]]:
    """What ``runs`` return, called one after the other ``repeats`` times, after ``warmups`` turns that do not count."""
    return [tuple(run() for run in runs) for _ in range(warmups + repeats)][warmups:]


def paired(
    baseline: Callable[[], object], candidate: Callable[[], object], repeats: int, *, warmups: int = 1
) -> list[tuple[float, float]]:
    """Seconds of both, called in turn ``repeats`` times after ``warmups`` turns that do not count."""
    turns = in_turn([partial(seconds, baseline), partial(seconds, candidate)], repeats, warmups=warmups)
    return [(a, b) for a, b in turns]


def seconds(run: Callable[[], object]) -> float:
    """How long ``run()`` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of repeated measurements, for JSON."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Clock:
    """Seconds, as the processor's clock tells them."""

    def read(self) -> Any:
        """This moment."""
        return time.perf_counter()

    def between(self, start: Any, end: Any) -> float:
        """From one reading to another."""
        return end - start


class CudaClock(Clock):
    """Seconds, as a GPU's stream comes to the events that are put into it; reading does not hold it up."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.current_stream(device)

    def read(self) -> Any:
        return self.stream.record_event(torch.cuda.Event(enable_timing=True))

    def between(self, start: Any, end: Any) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """What tells the time of work on ``device``."""
    return CudaClock(device) if device.type == "cuda" else Clock()


@dataclass(frozen=True)
class Steps:
    """What the steps of an answer cost, in the units of a `Clock`.

    Args:
        encode: Images to image tokens.
        prefill: The language model's first pass over the fitted prompt, up to the first new token.
        first_token: What a user waits for: images to the first new token, fitting the prompt included.
        decode: Each further token.
    """

    encode: float
    prefill: float
    first_token: float
    decode: float


def measure_steps(model: PreTrainedModel, inputs: Any, new_tokens: int, clock: Clock) -> Steps:
    """Encode the images, then answer greedily with ``new_tokens``, 2 or more, and the cache on.

    Args:
        model: With slots, in which there may be nothing.
        inputs: What the processor made of images and prompts.
        new_tokens: Length of the answers.
        clock: What to measure.
    """
    images = image_inputs(model, inputs)
    start = clock.read()
    encode_images(model, model.vision_slots, images)
    encode = clock.between(start, clock.read())
    seen = _Readings(clock)
    hook = model.get_decoder().register_forward_pre_hook(seen.pass_starts)
    limits = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    try:
        start = clock.read()
        model.generate(**inputs, **limits, do_sample=False, use_cache=True, streamer=seen)
    finally:
        hook.remove()
    first, last = seen.tokens[0], seen.tokens[-1]
    return Steps(
        encode=encode,
        prefill=clock.between(seen.passes[0], first),
        first_token=clock.between(start, first),
        decode=clock.between(first, last) / (new_tokens - 1),
    )


class _Readings(BaseStreamer):
    """When the language model started on each token, and when each new token came."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.passes: list[Any] = []
        self.tokens: list[Any] = []

    def pass_starts(self, *_: Any) -> None:
        self.passes.append(self.clock.read())

    def put(self, value: Tensor) -> None:
        if self.passes:  # before, it is the prompt
            self.tokens.append(self.clock.read())

    def end(self) -> None:
        pass


def available_memory(device: torch.device) -> int | None:
    """Bytes that a model may take up on ``device``; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMORY.exists():
        return None
    return _kilobytes(_MEMORY, "MemAvailable") * 1024


def peak_memory(run: Callable[[], object]) -> tuple[float, float]:
    """Resident MB of this process before ``run()`` and at most while it ran.

    Raises:
        FileNotFoundError: not on Linux, which alone can start the peak anew.
    """
    (_PROC / "clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident("VmRSS")
    run()
    return before, _resident("VmHWM")


def _resident(field: str) -> float:
    return _kilobytes(_PROC / "status", field) * 1024 / 1e6


def _kilobytes(file: Path, field: str) -> int:
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(lines[field].split()[0])


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns in a Python process of its own, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
