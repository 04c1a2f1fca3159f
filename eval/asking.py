"""Asking: the answers to a task's questions, in batches, over processes, taken up where an earlier run was cut off."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, ProcessorMixin

from mllm_vision.eval.answers import Decoding, answer, inputs_for, prompt_for
from mllm_vision.eval.journal import Journal
from mllm_vision.eval.task import Example, Task

log = logging.getLogger(__name__)

Record = dict[str, Any]
"""What is written down of a question: ``id``, ``prompt``, ``target``, and ``answer`` or ``error``."""

# What reading a question's data raises where they are wrong; anything else is wrong with the program.
_WRONG_DATA = (ValueError, OSError, TypeError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class Asking:
    """One model, one task.

    Args:
        model: On its device.
        processor: Its own.
        task: Whose questions are asked.
        batch_size: Questions answered together, in each process.
        decoding: How answers are drawn.
        system: What every prompt begins with; None leaves that to the chat template.
        generate: Passed on to `generate`.
        state: Of the processes.
        progress: Whether to show a bar.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    task: Task
    batch_size: int
    decoding: Decoding
    system: str | None
    generate: dict[str, Any]
    state: PartialState
    progress: bool

    def records(self, examples: Sequence[Example], journal: Journal | None, overwrite: bool) -> dict[str, Record]:
        """A record of every example, by id and in order: those on disk, and those that are still to be answered."""
        done: dict[str, Record] = {}
        if journal is not None:
            if overwrite and self.state.is_main_process:
                journal.clear()
            self.state.wait_for_everyone()
            here = self._done(journal, {example.id: example for example in examples})
            for there in gather_object([here]):  # machines that share no folder know different answers
                done |= there
            journal.mend(self.state.process_index)
        left = [example for example in examples if example.id not in done]
        if 0 < len(done) < len(examples):
            log.info("%s: %d of %d answers are there already", self.task.name, len(done), len(examples))
        mine: list[Record] = []
        for records in self._answered(left[self.state.process_index :: self.state.num_processes]):
            mine += records
            if journal is not None:
                journal.append(records, self.state.process_index)
        done.update((record["id"], record) for record in gather_object(mine))
        in_order = {example.id: done[example.id] for example in examples}
        if journal is not None and self.state.is_main_process:
            journal.finish(in_order.values())
        self.state.wait_for_everyone()
        return in_order

    def _done(self, journal: Journal, examples: Mapping[str, Example]) -> dict[str, Record]:
        found = {id: record for id, record in journal.read().items() if id in examples and "answer" in record}
        for id, record in found.items():
            if record["prompt"] != self._prompt(examples[id]):
                raise ValueError(
                    f"{journal.folder} has an answer to question {id} of {self.task.name}, but to another prompt; "
                    "choose another folder, or --overwrite"
                )
        return found

    def _answered(self, examples: Sequence[Example]) -> Iterator[list[Record]]:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            disable=not (self.progress and self.state.is_main_process),
        )
        share = "" if self.state.num_processes == 1 else f" (process 1 of {self.state.num_processes})"
        with bar:
            shown = bar.add_task(self.task.name + share, total=len(examples), rate="")
            for start in range(0, len(examples), self.batch_size):
                began = time.monotonic()
                batch = examples[start : start + self.batch_size]
                yield self._batch(batch)
                bar.update(shown, advance=len(batch), rate=f"{len(batch) / (time.monotonic() - began):.1f}/s")

    def _batch(self, examples: Sequence[Example]) -> list[Record]:
        """A record of each example: with its answer, or with what is wrong with its data."""
        records: dict[str, Record] = {}
        pictures: dict[str, list[Image.Image]] = {}
        for example in examples:
            records[example.id] = {"id": example.id, "target": example.target}
            try:
                records[example.id]["prompt"] = self._prompt(example)
                pictures[example.id] = [load() for load in example.images]
            except _WRONG_DATA as error:
                records[example.id]["error"] = str(error) or repr(error)
        fine = list(pictures)
        if fine:
            outcomes = self._outcomes([records[id]["prompt"] for id in fine], [pictures[id] for id in fine], fine)
            for id, outcome in zip(fine, outcomes, strict=True):
                records[id] |= outcome
        return list(records.values())

    def _outcomes(self, prompts: list[str], pictures: list[list[Image.Image]], ids: list[str]) -> list[Record]:
        """The answer or the error of each question. A batch that cannot be had whole is halved."""
        try:
            inputs = inputs_for(self.processor, prompts, pictures)
        except _WRONG_DATA as error:
            if len(ids) == 1:
                return [{"error": str(error) or repr(error)}]
            return self._halves(prompts, pictures, ids)
        try:
            said = answer(
                self.model,
                self.processor,
                inputs,
                [f"{self.task.name}/{id}" for id in ids],
                max_new_tokens=self.task.max_new_tokens,
                decoding=self.decoding,
                **self.generate,
            )
            return [{"answer": text} for text in said]
        except torch.OutOfMemoryError:
            if len(ids) == 1:
                raise
            log.warning("%d questions at once are too many for the memory here; asking half of them", len(ids))
        return self._halves(prompts, pictures, ids)  # outside the except, which would hold on to the memory

    def _halves(self, prompts: list[str], pictures: list[list[Image.Image]], ids: list[str]) -> list[Record]:
        half = len(ids) // 2
        parts = (slice(None, half), slice(half, None))
        return [outcome for part in parts for outcome in self._outcomes(prompts[part], pictures[part], ids[part])]

    def _prompt(self, example: Example) -> str:
        return prompt_for(self.processor, example.question, len(example.images), self.system)
