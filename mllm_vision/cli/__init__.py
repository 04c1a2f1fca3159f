"""The command line. Every command imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import logging
from typing import Any

import typer
from typer.core import TyperGroup

from mllm_vision.cli.asking import ask, demo, methods
from mllm_vision.cli.making import assemble, convert, merge, photos, recipe, recipes, scenes, study, train
from mllm_vision.cli.measuring import bench, overhead
from mllm_vision.cli.scoring import evaluate, sweep, tasks, tune


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
    help="Token reducers, projectors and more for stock LLaVA-style models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.command("eval")(evaluate)
for command in (
    ask,
    methods,
    demo,
    sweep,
    tune,
    tasks,
    bench,
    overhead,
    train,
    recipes,
    study,
    merge,
    convert,
    assemble,
    scenes,
    photos,
):
    app.command()(command)
app.add_typer(recipe, name="recipe")


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mllm_vision").setLevel(logging.INFO)
    app()
