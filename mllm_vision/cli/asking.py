"""Commands that answer questions, and the one that says what methods there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

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
    check_picture,
    plugged,
)


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
    methods = plugged(reduce, keep, settings)
    if picture is not None:
        check_picture(picture, overwrite)
    check_device(device)

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


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results and the pictures.")] = Path("mllm-vision-demo"),
    n: Annotated[int, typer.Option(min=1, help="Number of questions.")] = 96,
    model: Annotated[
        str | None, typer.Option(help='Trained on such pictures; else "tiny-llava-scenes", with --real "dino-smollm2".')
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option(metavar="PHOTOS", help="Ask about the test photographs that `mllm-vision photos` wrote there."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Ask a small trained model about held-out pictures, with all visual tokens and with fewer."""
    from rich.console import Console

    from mllm_vision.demo import run_demo, table

    console = Console()
    with console.status("starting") as status:
        results = run_demo(out, model=model, photos=real, n=n, overwrite=overwrite, say=status.update)
    console.print(table(results))
    typer.echo(f"What was kept: {out}")


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
