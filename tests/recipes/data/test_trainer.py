"""What the Trainer of transformers makes of rows, collator and sampler."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mllm_vision.recipes.data import ChatCollator, DataSource, ModalityLengthSampler, training_rows
from tests.hosts import HOSTS
from tests.recipes.data.written import processor_of, said, write


class _Recording(Trainer):
    """Plugs the sampler in, and keeps the ids of the rows that each step saw."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def _get_train_sampler(self, train_dataset=None):
        return ModalityLengthSampler(self.train_dataset, self._train_batch_size, seed=self.args.seed)

    def compute_loss(self, model, inputs, **kwargs):
        self.seen.append(inputs.pop("row_ids"))
        return super().compute_loss(model, inputs, **kwargs)


def _trainer(tmp_path, streaming=False, **arguments):
    host = HOSTS[0]
    shown = [{"id": f"p{i}", "image": "0.png", "conversations": said("<image>What?", "a dog")} for i in range(4)]
    text = [{"id": f"t{i}", "conversations": said("Say", "word")} for i in range(4)]
    path = write(tmp_path, shown + text)
    source = DataSource(format="conversations", path=path, streaming=streaming)
    rows = training_rows([source], processor_of(host), max_length=200)
    settings = {"per_device_train_batch_size": 2, "remove_unused_columns": False, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(tmp_path / "run", **settings, save_strategy="no", disable_tqdm=True, **arguments)
    collator = ChatCollator(processor_of(host))
    return _Recording(host.model(), arguments, data_collator=collator, train_dataset=rows)


def test_epochs_have_every_row_in_batches_of_one_kind(tmp_path):
    trainer = _trainer(tmp_path, num_train_epochs=2)
    assert torch.tensor(trainer.train().training_loss).isfinite()
    assert all(len({row_id[0] for row_id in step}) == 1 for step in trainer.seen)
    epochs = [[row_id for step in trainer.seen[i : i + 4] for row_id in step] for i in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"{kind}{i}" for kind in "pt" for i in range(4))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_trained_on_in_another_order_in_every_epoch(tmp_path, workers):
    trainer = _trainer(tmp_path, streaming=True, max_steps=8, dataloader_num_workers=workers)
    trainer.train()
    epochs = [[row_id for step in trainer.seen[i : i + 4] for row_id in step] for i in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"{kind}{i}" for kind in "pt" for i in range(4))
    assert epochs[0] != epochs[1]
