"""Every reducer at every budget on one benchmark, with and without a decoding strategy: what is lost, what is saved.

A point is a method at a budget with a decoding strategy, or with none ("plain"). If the method or the strategy is
random, a point is the mean over seeds, whose tallies are averaged unit by unit. Every point is compared, paired by
question, with all tokens under plain decoding, and a point with a strategy also with the same point under plain
decoding. Times to the first token are medians over single questions; on each, the points take turns, so that other load
on the machine affects all alike.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

import mllm_vision as mv
from mllm_vision.encoding import encode_images, image_inputs
from mllm_vision.eval.answers import inputs_for, prompt_for
from mllm_vision.eval.environment import environment
from mllm_vision.eval.evaluation import data_folder, evaluate
from mllm_vision.eval.measurement import clock_of, measure_steps, spread
from mllm_vision.eval.report import TaskResult
from mllm_vision.eval.scores import LEVEL, RESAMPLES, seeds_against
from mllm_vision.eval.task import Example, Task
from mllm_vision.registry import MethodConfig, config_class, methods, parse_methods
from mllm_vision.settings import parse_spec, spec

RESULTS, PICTURE, ANSWERS = "sweep.json", "sweep.png", "answers"
ALL_TOKENS = "all tokens"
WARMUPS, DECODED = 2, 2
DASHES = ("-", "--", ":")
"""Of lines in the picture, one for each way of decoding."""


@dataclass(frozen=True)
class Point:
    """A method at a budget under a way of decoding.

    Args:
        method: As it was asked for, "hiprune" or "hiprune:alpha=0.2".
        keep: The budget; None for all tokens.
        runs: The methods of each run, one for each seed; a plain run of all tokens has none.
        decoding: A strategy, as it was asked for; None is plain.
    """

    method: str
    keep: float | int | None
    runs: list[list[MethodConfig]]
    decoding: str | None = None


def plan(
    model: PreTrainedModel,
    names: Sequence[str],
    keeps: Sequence[float | int],
    seeds: int,
    strategies: Sequence[str] = (),
) -> list[Point]:
    """All tokens, then every method at every budget; then all of that with every strategy.

    Args:
        names: Of reducers, with settings other than ``keep``; none: all that this model can use.
        strategies: Of decoding, beside plain.

    Raises:
        ValueError: an unknown method, a reducer without a budget, a strategy that is none, or a method that the model
            cannot use.
    """
    chosen = list(names) or [row.name for row in methods() if "keep" in row.fields and _usable(model, row.name)]
    for name in chosen:
        bare, settings = parse_spec(name)
        if "keep" not in config_class(bare).defaults() or "keep" in settings:
            raise ValueError(f"a sweep sets the keep of each method itself, which does not go with {name!r}")
    for name in strategies:
        parse_methods(name, "decoding")
    points = []
    for strategy in (None, *strategies):
        decoding = [] if strategy is None else [_stored(strategy)]
        points.append(Point(ALL_TOKENS, None, _runs(decoding, seeds), strategy))
        for name in chosen:
            for keep in keeps:
                runs = _runs([_stored(name) | {"keep": keep}, *decoding], seeds)
                points.append(Point(name, keep, runs, strategy))
    for point in points:
        with mv.using(model, *point.runs[0]):
            pass  # what the model cannot give is found out now
    return points


def _stored(name: str) -> dict[str, Any]:
    """A method as `config.json` stores it, with the settings that were asked for alone."""
    bare, settings = parse_spec(name)
    return {"type": bare} | settings


def _runs(stored: Sequence[dict[str, Any]], seeds: int) -> list[list[MethodConfig]]:
    """The methods once, or once for each seed where one of them draws at random and no seed was asked for."""
    drawn = ["seed" in config_class(one["type"]).defaults() and "seed" not in one for one in stored]
    return [
        [MethodConfig.from_dict(one | ({"seed": seed} if d else {})) for one, d in zip(stored, drawn, strict=True)]
        for seed in range(seeds if any(drawn) else 1)
    ]


def _usable(model: PreTrainedModel, name: str) -> bool:
    try:
        with mv.using(model, MethodConfig.from_dict({"type": name, "keep": 0.5})):
            return True
    except ValueError:
        return False


def sweep(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    task: Task,
    points: Sequence[Point],
    out: str | Path,
    *,
    name: str | None = None,
    repeats: int = 15,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Ask a benchmark's questions with every point, measure what each costs, and write both into ``out``.

    A sweep into a folder where an earlier one was cut off goes on there.

    Args:
        points: Of `plan`, all tokens first, and every point of a strategy behind the plain one.
        repeats: Questions that a time is the median of.
        say: Is told what is being done.
        options: As for `evaluate`: limit, batch_size, data, decoding, system, seed.

    Returns:
        What the JSON file holds and `report` and `draw` show: ``environment``, ``run``, ``task`` and ``points``, with
        the ``differences`` of each to all tokens, and of those with a strategy to the same point without, ``to_plain``.
    """
    out = Path(out)
    seed = options.get("seed", 0)
    results: list[list[TaskResult]] = []
    for point in points:
        say(f"{task.name}: {label(point)}")
        found = []
        for configs in point.runs:
            with mv.using(model, *configs):
                folder = out / ANSWERS / _file_name(configs)
                evaluation = evaluate(model, processor, task, out=folder, overwrite=overwrite, name=name, **options)
                found.append(evaluation.tasks[task.name])
        results.append(found)
    say("measuring times")
    examples = task.load(data_folder(task, options.get("data"))).examples
    times = _first_token_times(model, processor, examples, points, repeats, options.get("system"))
    tallies = [[result.tallies for result in found] for found in results]
    plain = {
        (point.method, point.keep): mine for point, mine in zip(points, tallies, strict=True) if not point.decoding
    }
    written: list[dict[str, Any]] = [
        {
            "method": point.method,
            "keep": point.keep,
            "decoding": point.decoding,
            "tokens": tokens,
            "first_token_ms": milliseconds,
            "seeds": [result.headline.value for result in found],
            **seeds_against(task, mine, tallies[0], seed=seed),
        }
        for point, found, mine, (tokens, milliseconds) in zip(points, results, tallies, times, strict=True)
    ]
    for point, mine, values in zip(points, tallies, written, strict=True):
        if point.decoding is not None:
            against = seeds_against(task, mine, plain[point.method, point.keep], seed=seed)
            values["to_plain"] = against["differences"]
    record = {
        "environment": environment(),
        "run": {key: value for key, value in evaluation.run.items() if key != "methods"},
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "seed": seed},
        "task": {"name": task.name, "options": vars(task), "headline": task.headline, "repeats": repeats},
        "points": written,
    }
    (out / RESULTS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _first_token_times(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    points: Sequence[Point],
    repeats: int,
    system: str | None,
) -> list[tuple[float, dict[str, float]]]:
    """Of each point, the median number of visual tokens, and the milliseconds to the first token."""
    clock = clock_of(model.device)

    def run(point: Point, inputs: BatchFeature) -> tuple[float, int]:
        with mv.using(model, *point.runs[0]), torch.inference_mode():
            encoded = encode_images(model, model.vision_slots, image_inputs(model, inputs))
            tokens = sum(len(image.features) for image in encoded)
            return 1e3 * measure_steps(model, inputs, DECODED, clock).first_token, tokens

    turns: list[list[tuple[float, int]]] = []
    for inputs in _inputs(processor, examples, WARMUPS + repeats, system):
        turns.append([run(point, inputs.to(model.device, model.dtype)) for point in points])
    counted = turns[WARMUPS:] or turns
    if not counted:
        raise ValueError("a sweep measures what pictures cost, and no question here has one that can be read")
    found = []
    for column in zip(*counted, strict=True):
        times, kept = zip(*column, strict=True)
        ratios = [time / turn[0][0] for time, turn in zip(times, counted, strict=True)]
        found.append((statistics.median(kept), {**spread(times), "ratio": statistics.median(ratios)}))
    return found


def _inputs(
    processor: ProcessorMixin, examples: Sequence[Example], most: int, system: str | None
) -> Iterator[BatchFeature]:
    """Questions with pictures, spread over the task; what cannot be read has been reported and is passed over."""
    for example in examples[:: max(1, len(examples) // most)][:most]:
        with suppress(ValueError, OSError):
            pictures = [load() for load in example.images]
            if pictures:
                prompt = prompt_for(processor, example.question, len(pictures), system)
                yield inputs_for(processor, [prompt], [pictures])


def label(point: Point) -> str:
    """A point, in words."""
    budget = "" if point.keep is None else f", {_budget(point.keep)}"
    return point.method + budget + (f", {point.decoding}" if point.decoding else "")


def _budget(keep: float | int) -> str:
    return str(keep) if isinstance(keep, int) else str(Fraction(keep).limit_denominator(100))


def _file_name(configs: Sequence[MethodConfig]) -> str:
    stored = [config.to_dict() for config in configs]
    names = [spec(config.pop("type"), config).replace(":", "-").replace("/", "-") for config in stored]
    return "+".join(names) or ALL_TOKENS.replace(" ", "-")


def report(record: dict[str, Any]) -> RenderableType:
    """The points as a table: tokens, time to the first token, the task's headline and what it lost."""
    group, headline = record["task"]["headline"]
    points = record["points"]
    contrasted = any(point["decoding"] for point in points)
    title = f"{record['run']['model']}, {record['task']['name']}: {group}, {headline}; {LEVEL:.0%} intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (*["decoding"] * contrasted, "method", "keep"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens", "TTFT ms", "ratio", headline, "difference", *["to plain"] * contrasted):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, point in enumerate(points):
        following = points[i + 1] if i + 1 < len(points) else {}
        table.add_row(
            *[point["decoding"] or "plain"] * contrasted,
            point["method"],
            "" if point["keep"] is None else _budget(point["keep"]),
            f"{point['tokens']:g}",
            f"{point['first_token_ms']['median']:.1f}",
            f"{point['first_token_ms']['ratio']:.2f}",
            f"{point['scores'][group][headline]['value']:.3f}",
            "" if i == 0 else _difference(point["differences"][group][headline]),
            *[_difference(point["to_plain"][group][headline]) if point["decoding"] else ""] * contrasted,
            end_section=any(point[key] != following.get(key) for key in ("method", "decoding")),
        )
    return table


def _difference(lost: dict[str, float]) -> str:
    return f"{lost['value']:+.3f} ({lost['low']:+.3f}, {lost['high']:+.3f})"


def draw(record: dict[str, Any], path: str | Path) -> None:
    """Write a picture of a sweep: the task's headline against visual tokens, and against time to the first token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    group, headline = record["task"]["headline"]
    everything = record["points"][0]["scores"][group][headline]["value"]
    curves: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for point in record["points"]:
        curves.setdefault((point["method"], point["decoding"]), []).append(point)
    methods = list(dict.fromkeys(method for method, _ in curves))
    decodings = list(dict.fromkeys(decoding for _, decoding in curves))
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    places: tuple[Callable[[dict[str, Any]], float], ...] = (
        lambda point: point["tokens"],
        lambda point: point["first_token_ms"]["median"],
    )
    for axes, place in zip(panels, places, strict=True):
        for (method, decoding), points in curves.items():
            scores = [point["scores"][group][headline] for point in points]
            values = [score["value"] for score in scores]
            label = method if decoding is None else f"{method}, {decoding}"
            if method == ALL_TOKENS:
                fill = "full" if decoding is None else "none"
                star = {"marker": "*", "ms": 12, "color": "black", "linestyle": "none", "fillstyle": fill}
                axes.plot([place(point) for point in points], values, label=label, **star)
                continue
            bars = (
                [score["value"] - score["low"] for score in scores],
                [score["high"] - score["value"] for score in scores],
            )
            line = {
                "color": f"C{methods.index(method) - 1}",
                "linestyle": DASHES[decodings.index(decoding) % len(DASHES)],
            }
            axes.errorbar([place(p) for p in points], values, bars, marker="o", ms=4, capsize=2, label=label, **line)
        axes.axhline(everything, color="black", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    tokens, times = panels
    tokens.set_xlabel("visual tokens")
    tokens.set_ylabel(f"{group}, {headline}")
    times.set_xlabel("time to the first token, ms")
    tokens.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{record['run']['model']}, {record['task']['name']}; bars: {LEVEL:.0%} intervals", fontsize=11)
    figure.savefig(path, dpi=150)
