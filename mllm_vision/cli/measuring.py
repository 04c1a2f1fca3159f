"""Commands that measure time and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm_vision.cli.options import (
    Device,
    Dtype,
    Overwrite,
    check_device,
    check_picture,
)


def bench(
    model: Annotated[str | None, typer.Argument(help='A hub id, a folder, or "tiny-llava-scenes".')] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead of a model, a published geometry with random weights, as llava-1.5-7b.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the shape's language model to run; else all.")] = None,
    plug: Annotated[
        list[str] | None,
        typer.Option(help="Methods to measure, as hiprune:keep=192 or spatial_tokens+pool:keep=1/3; repeatable."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Methods to compare with; else the model as it is.")] = None,
    batch: Annotated[str, typer.Option(help="Prompts answered together, as 1,4.")] = "1",
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs a ratio is the median of.")] = 7,
    new_tokens: Annotated[int, typer.Option(min=2, help="Length of an answer.")] = 16,
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="Width and height of the pictures, as 1008 1008.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on the processor; else as torch likes.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and pictures.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, as bench.png.")] = None,
    device: Device = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help='Of the weights; "auto" is bfloat16 on a GPU, else float32.')
    ] = Dtype.auto,
    overwrite: Overwrite = False,
) -> None:
    """Measure what methods cost and save: time of every step of an answer, memory, and what the FLOPs promise."""
    from dataclasses import replace

    import torch
    from rich.console import Console

    from mllm_vision.eval.bench import BenchSource, Checkpoint
    from mllm_vision.eval.bench import bench as measured
    from mllm_vision.eval.bench_report import draw, report
    from mllm_vision.eval.shapes import published_shape
    from mllm_vision.registry import parse_methods

    if (model is None) == (shape is None):
        raise typer.BadParameter("give either a model or --shape NAME")
    if layers is not None and shape is None:
        raise typer.BadParameter("--layers cuts a --shape; a trained model is measured whole")
    if not all(part.strip().isdigit() for part in batch.split(",")):
        raise typer.BadParameter(f"--batch takes numbers, as 1,4, got {batch!r}")
    if out is not None and out.exists() and not overwrite:
        raise typer.BadParameter(f"{out} exists; add --overwrite to replace it")
    if plot is not None:
        check_picture(plot, overwrite)
        if find_spec("matplotlib") is None:
            raise typer.BadParameter('--plot draws with matplotlib, which is not there: pip install "mllm-vision[viz]"')
    check_device(device)
    source: BenchSource
    if shape is None:
        source = Checkpoint(str(model))
    else:
        source = published_shape(shape) if layers is None else published_shape(shape).cut(layers)
    if size is not None:
        source = replace(source, picture=size)
    baseline = "all tokens" if against is None else against
    candidates = {baseline: [] if against is None else parse_methods(against)}
    candidates |= {line: parse_methods(line) for line in plug or []}
    console = Console()
    with console.status("measuring, some minutes"):
        result = measured(
            source,
            candidates,
            batches=[int(part) for part in batch.split(",")],
            repeats=repeats,
            new_tokens=new_tokens,
            device=device,
            dtype=None if dtype is Dtype.auto else getattr(torch, dtype.value),
            seed=seed,
            threads=threads,
        )
    report(result, console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw(result, plot)


def overhead(
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs a ratio is the median of.")] = 7,
    contrast: Annotated[bool, typer.Option("--contrast", help="Instead of pruning, contrastive decoding.")] = False,
    tower: Annotated[bool, typer.Option("--tower", help="Instead of pruning, a tower that merges tokens.")] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="With --tower, layers of the language model to run; else 2.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help='With --tower, "cpu" or "cuda"; else a GPU if there is one.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure what pruning, contrastive decoding or merging costs beside what it does, as ratios to going without."""
    from functools import partial

    from mllm_vision.eval import contrast_cost, tower_cost
    from mllm_vision.eval import overhead as costs

    if contrast and tower:
        raise typer.BadParameter("--contrast and --tower are two measurements; give one of them")
    settings: dict[str, Any] = {
        name: value for name, value in (("layers", layers), ("device", device)) if value is not None
    }
    if settings and not tower:
        raise typer.BadParameter(f"--{next(iter(settings))} is a setting of --tower")
    if device is not None:
        check_device(device)
    measured: Callable[..., dict[str, Any]] = costs.measure
    if contrast or tower:
        measured = contrast_cost.measure if contrast else tower_cost.measure
    costs.run(partial(measured, **settings), repeats, out, overwrite)
