"""Options that several commands share, and what they have to be."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mllm_vision.registry import MethodConfig

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


def plugged(
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


def check_picture(picture: Path, overwrite: bool) -> None:
    from PIL import Image

    known = Image.registered_extensions()
    if picture.suffix.lower() not in known or known[picture.suffix.lower()] not in Image.SAVE:
        raise typer.BadParameter(f"{picture}: pictures of type {picture.suffix!r} cannot be written; use .png")
    if picture.exists() and not overwrite:
        raise typer.BadParameter(f"{picture} exists; add --overwrite to replace it")


def check_device(device: str) -> None:
    import torch

    there = ["cpu"]
    if torch.accelerator.is_available():
        there += [f"{torch.accelerator.current_accelerator()}:{i}" for i in range(torch.accelerator.device_count())]
    types = {torch.device(name).type for name in there}
    if device != "auto" and device not in types | set(there):
        raise typer.BadParameter(f"there is no device {device!r} here; there are auto, {', '.join(there)}")
