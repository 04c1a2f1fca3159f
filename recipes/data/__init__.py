"""Conversations with pictures as rows to train on: where they come from, labels on answers, batches."""

from mllm_vision.recipes.data.collator import ChatCollator
from mllm_vision.recipes.data.conversation import BadRow
from mllm_vision.recipes.data.encoding import RowEncoder
from mllm_vision.recipes.data.rows import StreamedRows, TrainingRows, training_rows
from mllm_vision.recipes.data.sampler import ModalityLengthSampler
from mllm_vision.recipes.data.sources import DataSource

__all__ = [
    "BadRow",
    "ChatCollator",
    "DataSource",
    "ModalityLengthSampler",
    "RowEncoder",
    "StreamedRows",
    "TrainingRows",
    "training_rows",
]
