"""Runs of a recipe in processes of their own: several that work together, or one that is killed."""

import multiprocessing
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from mllm_vision.recipes.train import train

# A server that has imported all this once forks every process: Python and PyTorch take seconds to start.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["mllm_vision.recipes.train", "bitsandbytes", "datasets"])


@dataclass
class Ended:
    """How a process ended: its exit code, -9 where it was killed, and what it raised."""

    code: int
    error: str


def run(recipe, overrides, processes=1, prepare=None, environment=None, seconds=240):
    """Train in new processes, as `torchrun` starts them; how each of them ended.

    As under `torchrun`, what is left is killed when one has failed, a little later.

    Args:
        prepare: A function of a module, called with the number of the process ahead of training.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        said = [Path(folder) / str(rank) for rank in range(processes)]
        started = []
        for rank in range(processes):
            shared = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            told = {**shared, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
            told = {name: str(value) for name, value in {**told, **(environment or {})}.items()}
            args = (recipe, overrides, prepare, rank, told, said[rank], torch.get_num_threads())
            started.append(_FORKS.Process(target=_train, args=args))
            started[-1].start()
        multiprocessing.connection.wait([process.sentinel for process in started], seconds)
        for process in started:
            failed = any(other.exitcode for other in started)
            process.join(10 if failed else seconds)
            if process.is_alive():
                process.kill()
                process.join()
        return [
            Ended(process.exitcode, file.read_text() if file.exists() else "")
            for process, file in zip(started, said, strict=True)
        ]


def _train(recipe, overrides, prepare, rank, environment, said, threads):
    os.environ.update(environment)
    torch.set_num_threads(threads)  # sums are taken in another order by another number of them
    if prepare is not None:
        prepare(rank)
    try:
        train(recipe, overrides)
    except Exception as error:
        said.write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error
