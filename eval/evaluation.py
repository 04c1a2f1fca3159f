"""Ask a model the questions of benchmarks, and say what its answers are worth."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, ProcessorMixin

from mllm_vision.eval.answers import Decoding, answer, prompt_for
from mllm_vision.eval.environment import environment
from mllm_vision.eval.journal import Journal, check_folder
from mllm_vision.eval.report import Evaluation, TaskResult
from mllm_vision.eval.scores import Tallies, scored
from mllm_vision.eval.task import Example, Questions, Task, parse_tasks
from mllm_vision.slots import restored

log = logging.getLogger(__name__)

RESULTS = "results.json"

Record = dict[str, Any]


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    tasks: str | Task | Sequence[str | Task],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    decoding: Decoding | None = None,
    system: str | None = None,
    data: str | Path | Mapping[str, str | Path] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    name: str | None = None,
    progress: bool = False,
    seed: int = 0,
    **generate: Any,
) -> Evaluation:
    """Scores of a model on benchmarks. In each of several processes (`accelerate launch`), the same scores.

    Args:
        model: A supported host with or without methods, on its device; or anything that `generate` works on alike.
        processor: Its stock processor.
        tasks: ``"pope,scenes:questions=100"``, a task, or several of either; see `list_tasks`.
        limit: At most so many questions of each task, drawn by ``seed`` in whole units; None is all of them.
        batch_size: Questions answered together, in each process.
        decoding: None is greedy search.
        system: What every prompt begins with; None leaves that to the chat template.
        data: Folder with a folder of each task's data, named as the task, or a mapping from tasks to folders; None is
            the hub.
        out: Folder that keeps answers as they come and the results; a run into the same folder goes on where the last
            one was cut off.
        overwrite: Whether earlier answers in ``out`` are thrown away.
        name: Of the model, for the report.
        progress: Whether to show bars.
        seed: Of ``limit`` and of the intervals' draws.
        generate: Passed on to `generate`.

    Raises:
        ValueError: an unknown task, no data, no question that can be asked, or answers of other settings in ``out``.
        OSError: ``out`` cannot be written to.
    """
    asked = parse_tasks([tasks] if isinstance(tasks, Task) else tasks)
    decoding = decoding or Decoding()
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit must be 1 or more, got {batch_size} and {limit}")
    state = PartialState()
    folders = {task.name: data_folder(task, data) for task in asked}
    with state.main_process_first():
        loaded = {task.name: _limited(task.load(folders[task.name]), limit, seed) for task in asked}
    folder = None if out is None else Path(out)
    if folder is not None:
        check_folder(folder, sum(len(questions.examples) for questions in loaded.values()))

    results = {}
    described = _described(model, name, decoding, system, generate)
    with _evaluating(model):
        for task in asked:
            questions = loaded[task.name]
            run = _Run(model, processor, task, batch_size, decoding, system, generate, state, progress)
            journal = None if folder is None else Journal(folder, task.name, _settings(task, described))
            start = time.monotonic()
            records = run.records(questions.examples, journal, overwrite)
            results[task.name] = _result(task, questions, records, decoding, seed, time.monotonic() - start)
    evaluation = Evaluation(
        run={**described, "batch_size": batch_size, "processes": state.num_processes, "limit": limit, "seed": seed},
        tasks=results,
        environment=environment(),
    )
    if folder is not None and state.is_main_process:
        evaluation.save(folder / RESULTS)
    return evaluation


@dataclasses.dataclass(frozen=True)
class _Run:
    """One model, one task."""

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
        """The answer of every example, by id and in order: those on disk, and those that are still to be given."""
        done: dict[str, Record] = {}
        if journal is not None:
            if overwrite and self.state.is_main_process:
                journal.clear()
            self.state.wait_for_everyone()
            done = self._done(journal, {example.id: example for example in examples})
            self.state.wait_for_everyone()  # nobody writes while another still reads
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
                    "choose another folder or overwrite it"
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
        """A record of each example: with its answer, or with what is wrong with its picture."""
        records: dict[str, Record] = {}
        pictures: dict[str, list[Image.Image]] = {}
        for example in examples:
            records[example.id] = {"id": example.id, "prompt": self._prompt(example), "target": example.target}
            try:
                pictures[example.id] = [load() for load in example.images]
            except (ValueError, OSError) as error:
                records[example.id]["error"] = str(error)
        fine = list(pictures)
        answers = self._answers([records[id]["prompt"] for id in fine], [pictures[id] for id in fine], fine)
        for id, said in zip(fine, answers, strict=True):
            records[id]["answer"] = said
        return list(records.values())

    def _answers(self, prompts: list[str], pictures: list[list[Image.Image]], ids: list[str]) -> list[str]:
        if not ids:
            return []
        most = self.task.max_new_tokens
        try:
            return answer(
                self.model,
                self.processor,
                prompts,
                pictures,
                [f"{self.task.name}/{id}" for id in ids],
                max_new_tokens=most,
                decoding=self.decoding,
                **self.generate,
            )
        except torch.OutOfMemoryError:
            if len(ids) == 1:
                raise
            log.warning("%d questions at once are too many for the memory here; asking half of them", len(ids))
        half = len(ids) // 2
        parts = [slice(None, half), slice(half, None)]
        return [said for part in parts for said in self._answers(prompts[part], pictures[part], ids[part])]

    def _prompt(self, example: Example) -> str:
        return prompt_for(self.processor, example.question, len(example.images), self.system)


def _result(
    task: Task, questions: Questions, records: Mapping[str, Record], decoding: Decoding, seed: int, seconds: float
) -> TaskResult:
    answered = [(e, records[e.id]["answer"]) for e in questions.examples if "answer" in records[e.id]]
    faults = questions.faults | {id: record["error"] for id, record in records.items() if "error" in record}
    if not answered:
        raise ValueError(f"no question of {task.name} could be asked; the first: {next(iter(faults.values()))}")
    tallies = Tallies.of(task, answered)
    return TaskResult(
        task=task,
        data=questions.provenance,
        prompt=records[answered[0][0].id]["prompt"],
        max_new_tokens=decoding.max_new_tokens or task.max_new_tokens,
        questions=len(answered),
        faults=faults,
        seconds=seconds,
        scores=scored(task, tallies, seed=seed),
        tallies=tallies,
    )


def _limited(questions: Questions, limit: int | None, seed: int) -> Questions:
    """At most ``limit`` questions: whole units, in their own order; one unit even if it is larger."""
    if limit is None or len(questions.examples) <= limit:
        return questions
    size: dict[str, int] = {}
    for example in questions.examples:
        size[example.unit] = size.get(example.unit, 0) + 1
    drawn: set[str] = set()
    n = 0
    for unit in random.Random(f"limit-{seed}").sample(list(size), len(size)):
        if drawn and n + size[unit] > limit:
            continue
        drawn.add(unit)
        n += size[unit]
    return dataclasses.replace(questions, examples=[e for e in questions.examples if e.unit in drawn])


def data_folder(task: Task, data: str | Path | Mapping[str, str | Path] | None) -> Path | None:
    """Where ``data``, as `evaluate` takes it, has the data of a task; None for the hub."""
    if isinstance(data, Mapping):
        return Path(data[task.name]) if task.name in data else None
    return None if data is None or not task.reads_data else Path(data) / task.name


def _described(
    model: PreTrainedModel, name: str | None, decoding: Decoding, system: str | None, generate: Mapping[str, Any]
) -> dict[str, Any]:
    """The model and how it answers, as JSON holds it."""
    plugged = restored(getattr(model.config, "mllm_vision", None))
    source = model.config.name_or_path
    stated = model.generation_config.to_diff_dict()
    return {
        "model": name or (Path(source).name if Path(source).exists() else source),
        "methods": [method.to_dict() for method in plugged],
        "dtype": str(model.dtype).removeprefix("torch."),
        "decoding": decoding.to_dict(),
        **({} if system is None else {"system": system}),
        "generation_config": {k: v for k, v in stated.items() if k != "transformers_version" and k[0] != "_"},
        "generate": {key: _word(value) for key, value in generate.items()},
    }


def _word(value: Any) -> Any:
    """A value as JSON holds it; of anything but plain values, the name."""
    if isinstance(value, (str, int, float, bool, list, dict, type(None))):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _settings(task: Task, described: dict[str, Any]) -> dict[str, Any]:
    """All that has a say in the answers to a task."""
    options = {name: value for name, value in vars(task).items() if name not in task.resumable}
    return {**described, "options": options, "max_new_tokens": task.max_new_tokens}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
