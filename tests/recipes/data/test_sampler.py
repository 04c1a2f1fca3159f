import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader

from mllm_vision.recipes.data import ModalityLengthSampler
from mllm_vision.recipes.data import sampler as module


class Sized:
    """Rows of which only the sizes matter."""

    def __init__(self, pictures, lengths=None):
        lengths = np.arange(len(pictures)) if lengths is None else lengths
        self._sizes = np.stack([pictures, lengths], 1)

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, i):
        return i

    def sizes(self):
        return self._sizes


def _mixed(rows=203, seed=0):
    draw = np.random.default_rng(seed)
    return Sized(draw.integers(0, 3, rows), draw.integers(5, 900, rows))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_every_row_comes_once_and_batches_are_of_one_kind(batch_size, processes):
    rows = _mixed()
    sampler = ModalityLengthSampler(rows, batch_size, processes=processes)
    order = list(sampler)
    assert sorted(order) == list(range(203)) and len(sampler) == 203
    shows = rows.sizes()[:, 0] > 0
    batches = [order[i : i + batch_size] for i in range(0, 203, batch_size)]
    kinds = [set(shows[batch]) for batch in batches]
    assert sum(len(kind) == 2 for kind in kinds[-2:]) <= 1
    assert all(len(kind) == 1 for kind in kinds[:-2])
    steps = [order[i : i + batch_size * processes] for i in range(0, 203, batch_size * processes)]
    mixed = [i for i, step in enumerate(steps) if len(set(shows[step])) == 2]
    assert not mixed or min(mixed) >= len(steps) - 3  # only where rows were left over


def test_rows_of_like_length_are_together():
    rows = Sized(np.ones(400, int), np.random.default_rng(0).permutation(400))
    lengths = rows.sizes()[:, 1]
    steps = lengths[list(ModalityLengthSampler(rows, 8))].reshape(50, 8)
    assert np.ptp(steps, axis=1).tolist() == [7] * 50  # sorted as a whole
    assert not (np.diff(steps[:, 0]) < 0).all()  # but not begun with the longest


def test_no_more_rows_are_sorted_together_than_said(monkeypatch):
    monkeypatch.setattr(module, "_SORTED", 2)
    rows = Sized(np.ones(400, int), np.arange(400))
    spread = np.ptp(np.array(list(ModalityLengthSampler(rows, 4))).reshape(100, 4), axis=1)
    assert spread.mean() > 40  # of 8 drawn at random the longest 4 lie far apart


def test_the_order_follows_seed_and_epoch_alone():
    rows = _mixed()

    def order(seed=0, epoch=0):
        sampler = ModalityLengthSampler(rows, 4, processes=2, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order() == order()
    assert len({tuple(order()), tuple(order(epoch=1)), tuple(order(seed=1))}) == 3
    assert order(0, 1) != order(1, 0)
    sampler = ModalityLengthSampler(rows, 4, processes=2)
    assert list(sampler) == list(sampler)  # only `set_epoch` goes on


@pytest.mark.parametrize("kind", [0, 1])
def test_data_of_one_kind_are_sampled(kind):
    assert sorted(ModalityLengthSampler(Sized(np.full(5, kind)), 2, processes=4)) == list(range(5))


def test_processes_share_the_batches_of_one_order():
    rows = _mixed(64)
    dealt = []
    for process in range(2):
        batches = BatchSampler(ModalityLengthSampler(rows, 4, processes=2), 4, drop_last=False)
        dealt.append(list(BatchSamplerShard(batches, num_processes=2, process_index=process)))
    order = list(ModalityLengthSampler(rows, 4, processes=2))
    assert [i for pair in zip(*dealt, strict=True) for batch in pair for i in batch] == order


@pytest.mark.parametrize("processes", [1, 2])
def test_loaders_of_accelerate_tell_it_the_epoch(processes):
    rows = _mixed(64)
    sampler = ModalityLengthSampler(rows, 4, processes=processes)
    loader = prepare_data_loader(DataLoader(rows, 4, sampler=sampler), num_processes=processes, process_index=0)
    first = [batch.tolist() for batch in loader]
    loader.set_epoch(1)
    assert sampler.epoch == 1
    assert [batch.tolist() for batch in loader] != first


@pytest.mark.parametrize(("batch_size", "processes"), [(0, 1), (1, 0)])
def test_a_batch_without_rows_is_refused(batch_size, processes):
    with pytest.raises(ValueError, match=f"must be at least 1, got {batch_size} and {processes}"):
        ModalityLengthSampler(_mixed(), batch_size, processes=processes)
