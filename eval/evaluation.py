"""Ask a model the questions of benchmarks, and say what its answers are worth."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from mllm_vision.eval.answers import Decoding
from mllm_vision.eval.asking import Asking, Record
from mllm_vision.eval.environment import environment
from mllm_vision.eval.journal import Journal, check_folder, difference
from mllm_vision.eval.report import RESULTS, Evaluation, TaskResult
from mllm_vision.eval.scores import Tallies, scored
from mllm_vision.eval.task import Questions, Task, parse_tasks
from mllm_vision.slots import restored

NOT_IN_ANSWERS = ("batch_size", "processes", "limit", "seed")
"""What a run states and its answers do not depend on."""


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
        limit: At most so many questions of each task, drawn by ``seed`` in whole units (an image with all that is asked
            about it), one unit at least; None is all of them.
        batch_size: Questions answered together, in each process. In float32 it has no say in the answers, in half
            precision only by rounding.
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
        ValueError: an unknown task, no data, no question that can be asked, answers of other settings in ``out``, or
            an argument for `generate` that is a matter of ``decoding``.
        OSError: ``out`` cannot be written to.
    """
    asked = parse_tasks([tasks] if isinstance(tasks, Task) else tasks)
    if not isinstance(decoding, Decoding | None):
        raise ValueError(f"decoding must be a Decoding, as Decoding(temperature=1.0), got {decoding!r}")
    decoding = decoding or Decoding()
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit must be 1 or more, got {batch_size} and {limit}")
    if owned := sorted({*vars(decoding), "do_sample", "logits_processor"} & set(generate)):
        raise ValueError(f"{', '.join(owned)} cannot be passed on; say how to answer by decoding=Decoding(...)")
    state = PartialState(cpu=model.device.type == "cpu")
    folders = {task.name: data_folder(task, data) for task in asked}
    with state.main_process_first():
        loaded = {task.name: _limited(task.load(folders[task.name]), limit, seed) for task in asked}
    described = _described(model, name, decoding, system, generate)
    run = {**described, "batch_size": batch_size, "processes": state.num_processes, "limit": limit, "seed": seed}
    folder = None if out is None else Path(out)
    earlier: dict[str, Any] = {}
    if folder is not None:
        check_folder(folder, sum(len(questions.examples) for questions in loaded.values()))
        if not overwrite:
            earlier = _earlier(folder / RESULTS, described)

    evaluation = Evaluation(run, {}, environment())
    with _evaluating(model):
        for task in asked:
            questions = loaded[task.name]
            asking = Asking(model, processor, task, batch_size, decoding, system, generate, state, progress)
            journal = None if folder is None else Journal(folder, task.name, _settings(task, described))
            start = time.monotonic()
            records = asking.records(questions.examples, journal, overwrite)
            evaluation.tasks[task.name] = _result(task, questions, records, decoding, seed, time.monotonic() - start)
            if folder is not None and state.is_main_process:
                evaluation.save(folder / RESULTS, earlier)
    if not any(result.questions for result in evaluation.tasks.values()):
        (first, *_) = (fault for result in evaluation.tasks.values() for fault in result.faults.values())
        raise ValueError(f"no question of {', '.join(evaluation.tasks)} could be asked; the first: {first}")
    return evaluation


def _earlier(file: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """The results that a run into the same folder finds there, by task, as JSON holds them."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        run = {name: value for name, value in found["run"].items() if name not in NOT_IN_ANSWERS}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is not what an evaluation writes; choose another folder, or --overwrite") from None
    if changes := difference(run, described):
        raise ValueError(f"{file} has results of another run: {changes}; choose another folder, or --overwrite")
    return found["tasks"]


def _result(
    task: Task, questions: Questions, records: Mapping[str, Record], decoding: Decoding, seed: int, seconds: float
) -> TaskResult:
    answered = [(e, records[e.id]["answer"]) for e in questions.examples if "answer" in records[e.id]]
    faults = questions.faults | {id: record["error"] for id, record in records.items() if "error" in record}
    tallies = Tallies.of(task, answered)
    return TaskResult(
        task=task,
        data=questions.provenance,
        prompt=records[answered[0][0].id]["prompt"] if answered else "",
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
            break  # to go on to smaller units would draw those more often
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
    return {
        "model": name or (Path(source).name if Path(source).exists() else source) or type(model).__name__,
        "weights": fingerprint(model),
        "methods": [method.to_dict() for method in plugged],
        "dtype": str(model.dtype).removeprefix("torch."),
        "decoding": decoding.to_dict(),
        "system": system,
        "generation_config": _stated(model.generation_config),
        "generate": {key: _written(key, value) for key, value in generate.items()},
    }


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of a few values of every weight, to tell a model from what training makes of it."""
    digest = hashlib.sha256()
    for key, weight in model.named_parameters():
        digest.update(f"{key}{tuple(weight.shape)}{weight.dtype}".encode())
        if not weight.is_meta:
            values = weight.detach().flatten()
            digest.update(values[:: max(1, len(values) // 16)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _stated(config: GenerationConfig) -> dict[str, Any]:
    stated = config.to_diff_dict()
    return {name: value for name, value in stated.items() if name != "transformers_version" and name[0] != "_"}


def _written(name: str, value: Any) -> Any:
    """An argument of `generate`, as JSON holds it."""
    if isinstance(value, GenerationConfig):
        return _stated(value)
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        if (words := getattr(value, "__qualname__", None)) is not None:
            return words
    raise ValueError(f"{name} cannot be written down, got {value!r}; the report has to say how answers were drawn")


def _settings(task: Task, described: dict[str, Any]) -> dict[str, Any]:
    """All that has a say in the answers to a task."""
    options = {name: value for name, value in vars(task).items() if name not in task.resumable}
    return {**described, "options": options, "max_new_tokens": task.max_new_tokens}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """All of ``model`` in evaluation mode; afterwards each part is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
