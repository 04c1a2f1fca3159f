"""The order of rows in an epoch: those with pictures apart from those without, rows of like length together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from mllm_vision.recipes.data.rows import TrainingRows

_SORTED = 50
"""Steps whose rows are sorted by length together: far fewer than an epoch has, so that the order stays random."""


class ModalityLengthSampler(Sampler[int]):
    """Yields row indices so that each batch has one modality and similar lengths, reshuffled every epoch.

    All processes draw the same order, in which every row comes once. Rows left over from full steps come last, so that
    at most one of the last batches mixes modalities.

    Args:
        batch_size: Rows of a process in a step.
        processes: How many processes deal the batches out among them; the rows of one step are alike, too.
        seed: Of the order, with the epoch.

    Raises:
        ValueError: a batch or a run without anyone in it.
    """

    def __init__(self, rows: TrainingRows, batch_size: int, *, processes: int = 1, seed: int = 0):
        if batch_size < 1 or processes < 1:
            raise ValueError(f"batch_size and processes must be at least 1, got {batch_size} and {processes}")
        self.batch_size, self.step, self.seed, self.epoch = batch_size, batch_size * processes, seed, 0
        pictures, self.lengths = rows.sizes().T
        self.kinds = [kind for kind in (np.flatnonzero(pictures > 0), np.flatnonzero(pictures == 0)) if len(kind)]

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass in the order of another epoch; the loaders of accelerate call it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng([self.seed, self.epoch])
        steps, full, short = [], [], []
        for kind in self.kinds:
            drawn = draw.permutation(kind)
            in_steps = len(drawn) - len(drawn) % self.step
            for begin in range(0, in_steps, self.step * _SORTED):
                chunk = drawn[begin : min(begin + self.step * _SORTED, in_steps)]
                chunk = chunk[np.argsort(-self.lengths[chunk], kind="stable")]
                steps += np.split(chunk, len(chunk) // self.step)
            rest = drawn[in_steps:]
            in_batches = len(rest) - len(rest) % self.batch_size
            full.append(rest[:in_batches])
            short.append(rest[in_batches:])
        order = [steps[i] for i in draw.permutation(len(steps))]
        yield from np.concatenate([*order, *full, *short]).tolist()
