"""Commands that ask benchmarks."""

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
    Keep,
    Overwrite,
    Precision,
    Reduce,
    Setting,
    check_device,
    plugged,
)


def evaluate(
    model: Annotated[str | None, typer.Argument(help='A hub id, a folder, or "tiny-llava-scenes".')] = None,
    tasks: Annotated[str, typer.Option(help="As pope,gqa or textvqa:ocr=true; see `mllm-vision tasks`.")] = "scenes",
    data: Annotated[
        Path | None, typer.Option(help="Folder with a folder of each task's data, named as the task; else the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions of each task.")] = None,
    reduce: Reduce = None,
    keep: Keep = None,
    settings: Setting = None,
    decode: Annotated[str | None, typer.Option(help="Decoding strategy to plug in, as name:field=value.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    system: Annotated[
        str | None, typer.Option(help="What every prompt begins with, as Vicuna's sentence; else the template's.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; else what the task asks for.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Above 0, answers are sampled.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability that is sampled from.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Tokens that are sampled from; 0 is all.")] = 0,
    num_beams: Annotated[int, typer.Option(min=1, help="More than 1 is beam search.")] = 1,
    seed: Annotated[int, typer.Option(help="Of samples, of --limit, and of the intervals.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for answers and results; a run that was cut off goes on there.")
    ] = None,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="No model: the paired differences of two results.json, or of their folders."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score a model on benchmarks, with all its visual tokens or with fewer."""
    from rich.console import Console

    from mllm_vision.eval import Decoding, Evaluation
    from mllm_vision.eval import compare as compared
    from mllm_vision.eval import evaluate as evaluated
    from mllm_vision.eval.journal import check_folder

    if (model is None) == (compare is None):
        raise typer.BadParameter("give either a model or --compare A.json B.json")
    console = Console()
    if compare is not None:
        before, after = compare
        comparison = compared(Evaluation.load(before), Evaluation.load(after), (str(before), str(after)), seed=seed)
        console.print(comparison)
        if out is not None:
            check_folder(out)
            (out / "comparison.json").write_text(json.dumps(comparison.to_dict(), indent=1) + "\n", encoding="utf-8")
        return
    assert model is not None
    from accelerate import PartialState

    import mllm_vision as mv
    from mllm_vision.eval.evaluation import data_folder
    from mllm_vision.eval.task import parse_tasks

    methods = plugged(reduce, keep, settings, decode)
    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        num_beams=num_beams,
        seed=seed,
    )
    asked = parse_tasks(tasks)
    check_device(device)
    for folder in filter(None, [data, *(data_folder(task, data) for task in asked)]):
        if not folder.is_dir():
            raise typer.BadParameter(f"{folder} is no folder; --data has a folder for each task, named as the task")
    if out is not None:
        check_folder(out)
    state = PartialState(cpu=device == "cpu")
    place = {"": state.device} if state.num_processes > 1 else device
    host, processor = mv.load(model, *methods, dtype=dtype.value, device_map=place)
    found = evaluated(
        host,
        processor,
        asked,
        limit=limit,
        batch_size=batch_size,
        decoding=decoding,
        system=system,
        data=data,
        out=out,
        overwrite=overwrite,
        name=model,
        progress=True,
        seed=seed,
    )
    if state.is_main_process:
        console.print(found)


def sweep(
    model: Annotated[str, typer.Argument(help='A hub id, a folder, or "tiny-llava-scenes".')] = "tiny-llava-scenes",
    task: Annotated[str, typer.Option(help="As pope or scenes:questions=100; see `mllm-vision tasks`.")] = "scenes",
    methods: Annotated[
        str, typer.Option(help="Reducers, as hiprune,random or hiprune:alpha=0.2; else all that the model can use.")
    ] = "",
    keep: Annotated[str, typer.Option(help="Budgets, as shares or tokens.")] = "1/2,1/3,1/4,1/6,1/9",
    decoding: Annotated[
        str, typer.Option(help="All of that once more with each of these strategies, as damro:alpha=0.5,vcd.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of a method that draws at random.")] = 3,
    data: Annotated[Path | None, typer.Option(help="As for eval.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Questions that a time is the median of.")] = 15,
    out: Annotated[
        Path, typer.Option(help="Folder for results and picture; a sweep that was cut off goes on there.")
    ] = Path("mllm-vision-sweep"),
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    overwrite: Overwrite = False,
) -> None:
    """Ask a benchmark with every reducer at every budget: what is lost, and what is saved."""
    from rich.console import Console

    from mllm_vision.eval import sweep as sweeping
    from mllm_vision.eval.task import parse_tasks
    from mllm_vision.settings import parse_value

    (asked,) = parse_tasks([task])
    names, strategies = ([name for name in given.split(",") if name] for given in (methods, decoding))
    keeps = [parse_value(k) for k in keep.split(",")]

    def work(host: Any, processor: Any, **shared: Any) -> dict[str, Any]:
        points = sweeping.plan(host, names, keeps, seeds, strategies)
        return sweeping.sweep(host, processor, asked, points, out, repeats=repeats, **shared)

    shared = {"overwrite": overwrite, "data": data, "limit": limit, "batch_size": batch_size}
    record = _with_model(work, model, device, dtype, out, shared)
    Console().print(sweeping.report(record))
    if find_spec("matplotlib") is None:
        typer.echo(f'Results: {out}; no picture without matplotlib: pip install "mllm-vision[viz]"')
    else:
        sweeping.draw(record, out / sweeping.PICTURE)
        typer.echo(f"Picture: {out / sweeping.PICTURE}")


def tune(
    attempt: Annotated[
        list[str], typer.Option("--try", help="Methods with settings, as hiprune:keep=33:alpha=0.2; repeat for each.")
    ],
    testing: Annotated[str, typer.Option("--test", help="Task to test on, as scenes:questions=500.")],
    choosing: Annotated[
        str,
        typer.Option("--choose", help="Another split of it to choose on, as scenes:questions=200:split=validation."),
    ],
    model: Annotated[str, typer.Argument(help='A hub id, a folder, or "tiny-llava-scenes".')] = "tiny-llava-scenes",
    score: Annotated[
        str | None, typer.Option(help="To choose by, as existence_adversarial/f1; else the task's headline.")
    ] = None,
    temperature: Annotated[str, typer.Option(help="Ways to answer, as 0,1; 0 is greedy.")] = "0",
    seeds: Annotated[int, typer.Option(min=1, help="Sampled runs of each test.")] = 3,
    data: Annotated[Path | None, typer.Option(help="As for eval.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions of each split.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 32,
    out: Annotated[Path, typer.Option(help="Folder for answers and results.")] = Path("mllm-vision-tune"),
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    overwrite: Overwrite = False,
) -> None:
    """Choose settings of methods on one split of a task and score the best of each kind on another."""
    from rich.console import Console

    from mllm_vision.eval import tune as tuning
    from mllm_vision.eval.task import parse_tasks
    from mllm_vision.registry import parse_methods

    trials = [parse_methods(line) for line in attempt]
    parts = None if score is None else score.split("/")
    if parts is not None and len(parts) != 2:
        raise typer.BadParameter(f"--score takes a group and a score, as existence_adversarial/f1, got {score!r}")
    ways: dict[str, Any] = {
        "score": None if parts is None else (parts[0], parts[1]),
        "temperatures": [float(part) for part in temperature.split(",")],
        "seeds": seeds,
    }
    (chosen_on,), (tested_on,) = parse_tasks([choosing]), parse_tasks([testing])

    def work(host: Any, processor: Any, **shared: Any) -> dict[str, Any]:
        return tuning.tune(host, processor, trials, chosen_on, tested_on, out, **ways, **shared)

    shared = {"overwrite": overwrite, "data": data, "limit": limit, "batch_size": batch_size}
    record = _with_model(work, model, device, dtype, out, shared)
    Console().print(tuning.report(record))


def tasks(name: Annotated[str | None, typer.Argument(help="Of one task, to read all about it.")] = None) -> None:
    """List every benchmark that is installed, with its data and its options, or tell all about one."""
    import inspect
    import sys

    from rich.console import Console
    from rich.table import Table

    from mllm_vision.eval import list_tasks
    from mllm_vision.eval.task import task_class

    if name is not None:
        task = task_class(name)
        about = [inspect.getdoc(sys.modules[task.__module__]), inspect.getdoc(task)]
        if task.columns:
            place = f"A local copy, --data DIR, is DIR/{task.name} with JSONL files and images/."
            about.append(f"{place} Its columns:\n{task.columns}")
        typer.echo("\n\n".join(text for text in about if text))
        return
    table = Table("task", "source", "data", "options")
    for task in list_tasks():
        hub = task.data
        data = "made anew" if not task.reads_data else "local" if hub is None else f"{hub.dataset}, {hub.split}"
        options = "\n".join(f"{name} = {default}" for name, default in task.defaults().items())
        table.add_row(task.name, task.paper, data, options, end_section=True)
    Console().print(table)


def _with_model(
    work: Callable[..., dict[str, Any]], model: str, device: str, dtype: Dtype, out: Path, shared: dict[str, Any]
) -> dict[str, Any]:
    """What ``work`` on a model finds, which is loaded once folder and device are known to be right."""
    from rich.console import Console

    import mllm_vision as mv
    from mllm_vision.eval.journal import check_folder

    check_device(device)
    check_folder(out)
    host, processor = mv.load(model, dtype=dtype.value, device_map=device)
    with Console().status("starting") as status:
        return work(host, processor, name=model, say=status.update, **shared)
