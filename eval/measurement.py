"""How a cost is measured: runs in turn for time, a process of its own for memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc/self")


def paired(
    baseline: Callable[[], object], candidate: Callable[[], object], repeats: int, *, warmups: int = 1
) -> list[tuple[float, float]]:
    """Seconds of both, called in turn ``repeats`` times after ``warmups`` turns that do not count."""
    seconds = [(_seconds(baseline), _seconds(candidate)) for _ in range(warmups + repeats)]
    return seconds[warmups:]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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
    lines = dict(line.split(":", 1) for line in (_PROC / "status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e6


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
