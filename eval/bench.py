"""What a method saves: time of every step of an answer, tokens a second, memory, beside what the FLOPs promise.

    mllm-vision bench --shape llava-1.5-7b --layers 2 --plug hiprune:keep=192

Encoding (images to image tokens), prefill (the language model's first pass over the fitted prompt, up to the first new
token), both as a user waits for them (TTFT), and each further token are measured apart, with the cache on. Baseline
and candidate take turns in one process, and a ratio is formed of neighbours, so that a busy machine disturbs both. On a
GPU, time is that of its events and memory that of its allocator; else the clock's and the resident set of a process of
its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.utils.logging import disable_progress_bar

import mllm_vision as mv
from mllm_vision.encoding import encode_images, image_inputs
from mllm_vision.eval.environment import environment
from mllm_vision.eval.flops import counting_flops
from mllm_vision.eval.measurement import (
    Clock,
    Steps,
    available_memory,
    clock_of,
    in_fresh_process,
    in_turn,
    measure_steps,
    peak_memory,
    spread,
    torch_threads,
)
from mllm_vision.eval.shapes import MakeInputs, Shape, random_pictures, sharing_weights
from mllm_vision.prompts import question_parts, write_prompt
from mllm_vision.registry import MethodConfig

QUESTION = "What is in this picture? Answer in detail."
STEPS = tuple(field.name for field in fields(Steps))


@dataclass(frozen=True)
class Checkpoint:
    """A trained model to measure.

    Args:
        name: As for `mv.load`.
        picture: (width, height) of the pictures to show it.
    """

    name: str
    picture: tuple[int, int] = (672, 672)

    def load(self, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[PreTrainedModel, MakeInputs]:
        """The model, and what makes its inputs."""
        model, processor = mv.load(self.name, dtype=dtype, device_map=device)
        return model, partial(self._inputs, model, processor, seed)

    def _inputs(self, model: PreTrainedModel, processor: ProcessorMixin, seed: int, batch: int) -> BatchFeature:
        text = write_prompt(processor, question_parts(QUESTION, 1))
        pictures = random_pictures(batch, self.picture, seed)
        inputs = processor(images=pictures, text=[text] * batch, return_tensors="pt")
        return inputs.to(model.device, model.dtype)


BenchSource = Shape | Checkpoint
Candidates = Mapping[str, Sequence[MethodConfig]]


def bench(
    source: BenchSource,
    candidates: Candidates,
    *,
    batches: Sequence[int] = (1,),
    repeats: int = 7,
    new_tokens: int = 16,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure every candidate against the first.

    Args:
        source: The model.
        candidates: Methods by name; the first is the baseline, `[]` is the stock model.
        batches: Prompts answered together, with one image each.
        repeats: Pairs of runs a ratio is the median of; one more warms up.
        new_tokens: Length of an answer.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one.
        dtype: Of the weights; None is bfloat16 on a GPU, else float32.
        seed: Of random weights and pictures.
        threads: Of torch; None leaves them.

    Returns:
        What `report` and `draw` show, as JSON holds it: ``environment``, ``settings`` and ``rows``, one for each batch
        and candidate. Of a row, ``seconds`` has the median, min and max of each step, ``tokens_per_second`` counts new
        tokens of the whole batch after the first, ``added_parameters`` are those of the methods, ``memory`` is in MB
        (None where the system does not tell), ``flops`` is by step, ``ratios`` are to the baseline, and ``over_flops``
        is the ratio of times over that of FLOPs: 1 where time fell as the FLOPs say.

    Raises:
        ValueError: nothing to measure, an unknown device, or a model that is too large for it.
    """
    if not candidates or min(batches, default=0) < 1 or repeats < 1 or new_tokens < 2:
        raise ValueError(
            "bench needs a candidate or more, batches and repeats of 1 or more and new_tokens of 2 or more, got "
            f"{len(candidates)} candidates, batches {list(batches)}, {repeats} repeats and {new_tokens} new tokens"
        )
    place = find_device(device)
    run = _Run(
        source=source,
        candidates=candidates,
        device=place,
        dtype=dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32),
        seed=seed,
        threads=threads or torch.get_num_threads(),
        new_tokens=new_tokens,
        repeats=repeats,
    )
    with torch_threads(run.threads), torch.inference_mode():
        # Processes of their own, before this one holds the model, too.
        resident = [{} if place.type == "cuda" else run.resident(batch) for batch in batches]
        model, make_inputs = source.load(place, run.dtype, seed)
        models = {name: mv.apply(sharing_weights(model), *methods) for name, methods in candidates.items()}
        rows = [
            row
            for batch, memory in zip(batches, resident, strict=True)
            for row in run.rows(models, make_inputs(batch), batch, memory)
        ]
        settings = {**run.settings(model), "batches": list(batches)}
        return {"environment": environment(), "settings": settings, "rows": rows}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What all measurements of one `bench` share."""

    source: BenchSource
    candidates: Candidates
    device: torch.device
    dtype: torch.dtype
    seed: int
    threads: int
    new_tokens: int
    repeats: int
    warmups: int = 1

    def settings(self, model: PreTrainedModel) -> dict[str, Any]:
        """All that a time depends on, as JSON holds it."""
        shape = self.source if isinstance(self.source, Shape) else None
        return {
            "model": self.source.name,
            "weights": "trained" if shape is None else "random",
            "layers": model.config.get_text_config().num_hidden_layers,
            "layers_published": None if shape is None else shape.depth,
            "picture": list(self.source.picture),
            "baseline": next(iter(self.candidates)),
            "repeats": self.repeats,
            "warmups": self.warmups,
            "new_tokens": self.new_tokens,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "seed": self.seed,
            "threads": self.threads,
        }

    def rows(
        self,
        models: Mapping[str, PreTrainedModel],
        inputs: BatchFeature,
        batch: int,
        resident: Mapping[str, dict[str, float]],
    ) -> list[dict[str, Any]]:
        """One row for each candidate, whose model shares all stock weights with those of the others."""
        sizes: dict[str, dict[str, Any]] = {}
        for name, model in models.items():  # a run of each, which warms up, too
            tokens, length = prompt_lengths(model, inputs)
            with counting_flops() as clock:
                flops = asdict(measure_steps(model, inputs, self.new_tokens, clock))
            added = sum(parameter.numel() for parameter in model.vision_slots.parameters())
            sizes[name] = {
                "visual_tokens": tokens,
                "prompt_tokens": length,
                "added_parameters": added,
                "flops": flops,
            }
        pairs = self.pairs(models, inputs)
        rows: list[dict[str, Any]] = []
        for name, methods in self.candidates.items():
            seconds = {step: spread([getattr(ours, step) for _, ours in pairs[name]]) for step in STEPS}
            row = {
                "name": name,
                "methods": [method.to_dict() for method in methods],
                "batch": batch,
                **sizes[name],
                "seconds": seconds,
                "tokens_per_second": batch / seconds["decode"]["median"],
                "memory": self.allocated(models[name], inputs) if self.device.type == "cuda" else resident.get(name),
                "ratios": None,
                "over_flops": None,
            }
            if rows:
                row |= _against(rows[0], row, pairs[name])
            rows.append(row)
        return rows

    def pairs(
        self, models: Mapping[str, PreTrainedModel], inputs: BatchFeature
    ) -> dict[str, list[tuple[Steps, Steps]]]:
        """By candidate, the baseline's steps and its own of each turn; the baseline itself has those of all turns."""
        clock = clock_of(self.device)
        runs = [partial(measure_steps, model, inputs, self.new_tokens, clock) for model in models.values()]
        names = list(self.candidates)
        pairs: dict[str, list[tuple[Steps, Steps]]] = {names[0]: []}
        for name, run in zip(names[1:], runs[1:], strict=True):
            turns = in_turn([runs[0], run], self.repeats, warmups=self.warmups)
            pairs[name] = [(theirs, ours) for theirs, ours in turns]
            pairs[names[0]] += [(theirs, theirs) for theirs, _ in turns]
        if len(names) == 1:
            turns = in_turn(runs, self.repeats, warmups=self.warmups)
            pairs[names[0]] = [(alone, alone) for (alone,) in turns]
        return pairs

    def allocated(self, model: PreTrainedModel, inputs: BatchFeature) -> dict[str, float]:
        """MB of the GPU that are allocated before an answer, and at most during it."""
        torch.cuda.reset_peak_memory_stats(self.device)
        loaded = torch.cuda.memory_allocated(self.device)
        measure_steps(model, inputs, self.new_tokens, clock_of(self.device))
        return {"loaded": loaded / 1e6, "peak": torch.cuda.max_memory_allocated(self.device) / 1e6}

    def resident(self, batch: int) -> dict[str, dict[str, float]]:
        """MB by candidate, each in a process of its own; nothing where the system does not tell."""
        if available_memory(self.device) is None:
            return {}
        return {name: in_fresh_process(self.resident_here, methods, batch) for name, methods in self.candidates.items()}

    def resident_here(self, methods: Sequence[MethodConfig], batch: int) -> dict[str, float]:
        """MB of this process before an answer, and at most during it."""
        disable_progress_bar()  # the one who waits sees that of the model he measures
        with torch_threads(self.threads), torch.inference_mode():
            model, make_inputs = self.source.load(self.device, self.dtype, self.seed)
            mv.apply(model, *methods)
            loaded, peak = peak_memory(partial(measure_steps, model, make_inputs(batch), self.new_tokens, Clock()))
        return {"loaded": loaded, "peak": peak}


def prompt_lengths(model: PreTrainedModel, inputs: BatchFeature) -> tuple[int, int]:
    """Visual tokens of the first image, and columns of the fitted prompts."""
    encoded = encode_images(model, model.vision_slots, image_inputs(model, inputs))
    left_out = [image.placeholders - len(image.features) for image in encoded]
    return len(encoded[0].features), inputs["input_ids"].shape[1] - min(left_out)


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU if there is one.

    Raises:
        ValueError: it is not here, or of a kind that is not measured.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if (device.index or 0) >= there.get(device.type, 0):
        raise ValueError(
            f"time is measured on cpu and cuda, and there is no {name!r} here; use --device auto for what there is"
        )
    return device


def _against(baseline: dict[str, Any], row: dict[str, Any], pairs: Sequence[tuple[Steps, ...]]) -> dict[str, Any]:
    """The row's ratios to the baseline, of neighbours, and over the ratios of FLOPs."""
    ratios: dict[str, dict[str, Any]] = {}
    for step in STEPS:
        each = [getattr(ours, step) / getattr(theirs, step) for theirs, ours in pairs]
        ratios[step] = {**spread(each), "pairs": len(pairs), "flops": row["flops"][step] / baseline["flops"][step]}
    return {"ratios": ratios, "over_flops": {step: ratio["median"] / ratio["flops"] for step, ratio in ratios.items()}}
