"""The command line. Every command imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
import logging
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from mllm_vision.registry import MethodConfig


class _Commands(TyperGroup):
    """Ends with one line on stderr where the library says what is wrong with what the user asked for."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # these are RuntimeErrors and an OSError, too
            raise
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    help="Token reducers and more for stock LLaVA-style models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Reduce = Annotated[
    str | None,
    typer.Option(help="Reducer to plug in, as hiprune or hiprune:keep=1/3:alpha=0.2; several joined by +."),
]
Keep = Annotated[str | None, typer.Option(help="Tokens the reducer keeps of an image, or their share, as 192 or 1/3.")]
Setting = Annotated[list[str] | None, typer.Option("--set", help="Another field of the reducer, as alpha=0.2.")]
Device = Annotated[str, typer.Option(help='"cpu", "cuda:1", ...; "auto" takes an accelerator if there is one.')]
Precision = Annotated[Dtype, typer.Option(help='Of the weights; "auto" is that of the checkpoint.')]


class SceneFormat(str, Enum):
    datasets = "datasets"
    conversations = "conversations"


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mllm_vision").setLevel(logging.INFO)
    app()


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help='A hub id, a folder, or "tiny-llava-scenes", which comes along.')],
    image: Annotated[list[Path], typer.Option(help="Image file; repeat for several images.")],
    question: Annotated[str, typer.Option(help="May say with <image> marks where the images stand.")],
    reduce: Reduce = None,
    keep: Keep = None,
    settings: Setting = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    picture: Annotated[Path | None, typer.Option(help="Image file to draw the kept tokens into.")] = None,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    overwrite: Overwrite = False,
) -> None:
    """Answer a question about images, from as many visual tokens as you like."""
    from transformers import TextStreamer

    import mllm_vision as mv
    from mllm_vision.images import load_image
    from mllm_vision.pictures import draw_batch
    from mllm_vision.prompts import question_parts, write_prompt

    parts = question_parts(question, len(image))
    images = [load_image(path) for path in image]
    methods = _methods(reduce, keep, settings)
    if picture is not None:
        _check_picture(picture, overwrite)
    _check_device(device)

    host, processor = mv.load(model, *methods, dtype=dtype.value, device_map=device)
    inputs = processor(images=images, text=write_prompt(processor, parts), return_tensors="pt")
    inputs = inputs.to(host.device, host.dtype)
    kept = mv.inspect_tokens(host, **inputs)
    with mv.using(host):
        everything = mv.inspect_tokens(host, **inputs)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    host.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    used, of = (sum(len(tile.patch_index) for tile in tiles) for tiles in (kept, everything))
    added = sum(tile.added for tile in kept)
    typer.echo(f"{used} of {of} visual tokens{f', and {added} added' if added else ''}", err=True)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_batch(images, kept, inputs, processor.image_processor).save(picture)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List every method that is installed, with its fields and their defaults."""
    import mllm_vision as mv

    rows = mv.methods()
    if as_json:
        names = ("name", "kind", "paper", "needs_weights", "fields")
        typer.echo(json.dumps([{name: getattr(row, name) for name in names} for row in rows], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "kind", "paper", "needs weights", "fields")
    for row in rows:
        listed = "\n".join(f"{name} = {default}" for name, default in row.fields.items())
        table.add_row(row.name, row.kind, row.paper, "yes" if row.needs_weights else "no", listed, end_section=True)
    Console().print(table)


@app.command("eval")
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

    methods = _methods(reduce, keep, settings, decode)
    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        num_beams=num_beams,
        seed=seed,
    )
    asked = parse_tasks(tasks)
    _check_device(device)
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


@app.command()
def sweep(
    model: Annotated[str, typer.Argument(help='A hub id, a folder, or "tiny-llava-scenes".')] = "tiny-llava-scenes",
    task: Annotated[str, typer.Option(help="As pope or scenes:questions=100; see `mllm-vision tasks`.")] = "scenes",
    methods: Annotated[
        str, typer.Option(help="Reducers, as hiprune,random or hiprune:alpha=0.2; else all that the model can use.")
    ] = "",
    keep: Annotated[str, typer.Option(help="Budgets, as shares or tokens.")] = "1/2,1/3,1/4,1/6,1/9",
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

    import mllm_vision as mv
    from mllm_vision.eval import sweep as sweeping
    from mllm_vision.eval.journal import check_folder
    from mllm_vision.eval.task import parse_tasks
    from mllm_vision.settings import parse_value

    (asked,) = parse_tasks([task])
    _check_device(device)
    check_folder(out)
    host, processor = mv.load(model, dtype=dtype.value, device_map=device)
    points = sweeping.plan(host, [m for m in methods.split(",") if m], [parse_value(k) for k in keep.split(",")], seeds)
    console = Console()
    with console.status("starting") as status:
        record = sweeping.sweep(
            host,
            processor,
            asked,
            points,
            out,
            name=model,
            repeats=repeats,
            overwrite=overwrite,
            say=status.update,
            data=data,
            limit=limit,
            batch_size=batch_size,
        )
    console.print(sweeping.report(record))
    if find_spec("matplotlib") is None:
        typer.echo(f'Results: {out}; no picture without matplotlib: pip install "mllm-vision[viz]"')
    else:
        sweeping.draw(record, out / sweeping.PICTURE)
        typer.echo(f"Picture: {out / sweeping.PICTURE}")


@app.command()
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

    import mllm_vision as mv
    from mllm_vision.eval import tune as tuning
    from mllm_vision.eval.journal import check_folder
    from mllm_vision.eval.task import parse_tasks
    from mllm_vision.registry import parse_methods

    trials = [parse_methods(line) for line in attempt]
    parts = None if score is None else score.split("/")
    if parts is not None and len(parts) != 2:
        raise typer.BadParameter(f"--score takes a group and a score, as existence_adversarial/f1, got {score!r}")
    (chosen_on,), (tested_on,) = parse_tasks([choosing]), parse_tasks([testing])
    _check_device(device)
    check_folder(out)
    host, processor = mv.load(model, dtype=dtype.value, device_map=device)
    console = Console()
    with console.status("starting") as status:
        record = tuning.tune(
            host,
            processor,
            trials,
            chosen_on,
            tested_on,
            out,
            score=None if parts is None else (parts[0], parts[1]),
            temperatures=[float(part) for part in temperature.split(",")],
            seeds=seeds,
            name=model,
            overwrite=overwrite,
            say=status.update,
            data=data,
            limit=limit,
            batch_size=batch_size,
        )
    console.print(tuning.report(record))


@app.command()
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


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe that comes along, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as stages.tower.arguments.max_steps=10.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a training recipe, or go on with it where it stopped."""
    from mllm_vision.recipes import train as training

    folder = training.train(recipe, [*(overrides or []), *["overwrite=true"] * overwrite])
    typer.echo(folder)


@app.command()
def study(
    study: Annotated[str, typer.Argument(help="Name of a study that comes along, or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a recipe in several ways with several seeds and compare, or go on with it where it stopped."""
    from rich.console import Console

    from mllm_vision.recipes.study import load_study, report, run_study

    if out is not None and out.exists() and not overwrite:
        raise typer.BadParameter(f"{out} exists; add --overwrite to replace it")
    record = run_study(load_study(study), typer.echo)
    Console().print(report(record))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results and the pictures.")] = Path("mllm-vision-demo"),
    n: Annotated[int, typer.Option(min=1, help="Number of questions.")] = 96,
    model: Annotated[str, typer.Option(help="A checkpoint trained on drawn scenes.")] = "tiny-llava-scenes",
    overwrite: Overwrite = False,
) -> None:
    """Ask a small trained model about held-out scenes, with all visual tokens and with fewer."""
    from rich.console import Console

    from mllm_vision.demo import run_demo, table

    console = Console()
    with console.status("starting") as status:
        results = run_demo(out, model=model, n=n, overwrite=overwrite, say=status.update)
    console.print(table(results))
    typer.echo(f"What was kept: {out}")


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    n: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 1000,
    form: Annotated[
        SceneFormat, typer.Option("--format", help="A datasets directory, or LLaVA-style conversations.")
    ] = (SceneFormat.datasets),
    side: Annotated[int, typer.Option(help="Width and height in pixels.")] = 140,
    seed: Annotated[int, typer.Option(help="Another seed draws other scenes.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write drawn scenes with questions and answers, to train or to measure a model on."""
    from mllm_vision.scenes import export

    write = export.export_dataset if form is SceneFormat.datasets else export.export_conversations
    typer.echo(write(out, split, n, side=side, seed=seed, overwrite=overwrite))


@app.command()
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
        _check_picture(plot, overwrite)
        if find_spec("matplotlib") is None:
            raise typer.BadParameter('--plot draws with matplotlib, which is not there: pip install "mllm-vision[viz]"')
    _check_device(device)
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


@app.command()
def overhead(
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs a ratio is the median of.")] = 7,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure what pruning costs at LLaVA-1.5's proportions, as ratios to the stock model."""
    from mllm_vision.eval import overhead as costs

    costs.main(repeats, out, overwrite)


@app.command()
def convert(
    name: Annotated[str, typer.Argument(help="Whose layout it is; an unknown name lists those that are known.")],
    source: Annotated[str, typer.Argument(metavar="SRC", help="The authors' checkpoint, a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(help="For LoRA, the model it was trained on, a folder or a hub id; else what it names."),
    ] = None,
    tower: Annotated[
        str | None, typer.Option(help="The vision tower, a folder or a hub id; else what config.json names.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a folder that from_pretrained loads of a checkpoint as its authors published it."""
    from mllm_vision.convert import convert as converted

    typer.echo(converted(name, source, out, base=base, tower=tower, overwrite=overwrite))


def _methods(
    reduce: str | None, keep: str | None, settings: list[str] | None, decode: str | None = None
) -> list[MethodConfig]:
    """The configs that ``--reduce``, ``--keep``, ``--set`` and ``--decode`` describe."""
    from mllm_vision.registry import parse_methods

    given = [*([] if keep is None else [f"keep={keep}"]), *(settings or [])]
    if given and reduce is None:
        raise typer.BadParameter("--keep and --set need --reduce, the reducer they belong to")
    if given and reduce is not None and "+" in reduce:
        raise typer.BadParameter("with several reducers, write their settings as name:keep=...+name:keep=...")
    reducers = [] if reduce is None else parse_methods(":".join([reduce, *given]), "reducer")
    return reducers + ([] if decode is None else parse_methods(decode, "decoding"))


def _check_picture(picture: Path, overwrite: bool) -> None:
    from PIL import Image

    known = Image.registered_extensions()
    if picture.suffix.lower() not in known or known[picture.suffix.lower()] not in Image.SAVE:
        raise typer.BadParameter(f"{picture}: pictures of type {picture.suffix!r} cannot be written; use .png")
    if picture.exists() and not overwrite:
        raise typer.BadParameter(f"{picture} exists; add --overwrite to replace it")


def _check_device(device: str) -> None:
    import torch

    there = ["cpu"]
    if torch.accelerator.is_available():
        there += [f"{torch.accelerator.current_accelerator()}:{i}" for i in range(torch.accelerator.device_count())]
    types = {torch.device(name).type for name in there}
    if device != "auto" and device not in types | set(there):
        raise typer.BadParameter(f"there is no device {device!r} here; there are auto, {', '.join(there)}")
