"""What `bench` found: as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = {"encode": "encode", "prefill": "prefill", "first_token": "TTFT", "decode": "a token"}
"""What the steps of an answer are called in a table."""

COLOURS = {"encode": "#4477aa", "prefill": "#ee9944", "decode": "#66a182"}


def title(result: dict[str, Any]) -> str:
    """What was measured, on what."""
    settings, hardware = result["settings"], result["environment"]["hardware"]
    layers, published = settings["layers"], settings["layers_published"]
    cut = f", {layers} of {published} language layers" if published not in (None, layers) else ""
    gpu = torch.device(settings["device"])
    where = hardware["gpus"][gpu.index or 0] if gpu.type == "cuda" else f"{settings['threads']} threads"
    return f"{settings['model']}{cut}, {settings['weights']} weights, {settings['dtype']}, {where}"


def report(result: dict[str, Any], console: Console) -> None:
    """Show what `bench` found: a table for each batch, of a candidate its medians and then its ratios."""
    settings, where = result["settings"], result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    width, height = settings["picture"]
    for batch in settings["batches"]:
        table = Table(title=f"{title(result)}\nbatch {batch}", title_justify="left")
        table.add_column("")
        for heading in ("visual tokens", *STEPS.values(), "tokens/s", "peak memory"):
            table.add_column(heading, justify="right")
        for row in result["rows"]:
            if row["batch"] == batch:
                _add_rows(table, row)
        console.print(table)
    console.print(
        f"Medians, with min to max below; ratios are to {settings['baseline']}, of {settings['repeats']} pairs. "
        f"TTFT: images to the first new token; a token: each of {settings['new_tokens'] - 1} further ones. "
        f"Pictures of {width} x {height} pixels.\n{where['hardware']['cpu']}; {versions}",
        style="dim",
    )


def _add_rows(table: Table, row: dict[str, Any]) -> None:
    seconds, memory, ratios = row["seconds"], row["memory"], row["ratios"]
    peak = "not measured" if memory is None else f"{memory['peak'] / 1e3:.2f} GB"
    medians = (_milliseconds(seconds[step]["median"]) + " ms" for step in STEPS)
    table.add_row(row["name"], str(row["visual_tokens"]), *medians, f"{row['tokens_per_second']:.1f}", peak)
    above = "" if memory is None else f"{(memory['peak'] - memory['loaded']) / 1e3:.2f} above the model"
    spreads = (f"{_milliseconds(seconds[step]['min'])} to {_milliseconds(seconds[step]['max'])}" for step in STEPS)
    table.add_row("", "", *spreads, "", above, style="dim", end_section=ratios is None)
    if ratios is not None:
        table.add_row("  time ratio", "", *(f"{ratios[step]['median']:.3f}" for step in STEPS), "", "")
        spreads = (f"{ratios[step]['min']:.3f} to {ratios[step]['max']:.3f}" for step in STEPS)
        table.add_row("", "", *spreads, "", "", style="dim")
        table.add_row("  FLOP ratio", "", *(f"{ratios[step]['flops']:.3f}" for step in STEPS), "", "")
        over = (f"{row['over_flops'][step]:.2f}" for step in STEPS)
        table.add_row("  time over FLOPs", "", *over, "", "", end_section=True)


def _milliseconds(seconds: float) -> str:
    """To three digits."""
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def draw(result: dict[str, Any], path: str | Path) -> None:
    """Write a plot of ``result``: a row of panels for each batch, time to the first token and of each further one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = result["settings"]["batches"]
    bars = len(result["rows"]) // len(batches)
    figure = Figure(figsize=(11, (1.3 + 0.55 * bars) * len(batches) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(batches), 2, squeeze=False, width_ratios=(2, 1))
    for batch, (first, further) in zip(batches, panels, strict=True):
        rows = [row for row in result["rows"] if row["batch"] == batch]
        names = [f"{row['name']}\n{row['visual_tokens']} tokens" for row in rows]
        _bars(first, rows, names, ("encode", "prefill"))
        _bars(further, rows, [""] * len(rows), ("decode",))
        first.set_title(f"batch {batch}: time to the first token", loc="left", fontsize=10)
        further.set_title("each further token", loc="left", fontsize=10)
    figure.suptitle(title(result), fontsize=11)
    figure.savefig(path, dpi=150)


def _bars(axes: Axes, rows: Sequence[dict[str, Any]], names: Sequence[str], steps: Sequence[str]) -> None:
    """Stacked bars of medians in milliseconds, a row each, with a line from the fastest to the slowest whole."""
    places = range(len(rows))
    ends = [0.0] * len(rows)
    for step in steps:
        lengths = [1e3 * row["seconds"][step]["median"] for row in rows]
        axes.barh(places, lengths, left=ends, height=0.6, color=COLOURS[step], label=step)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    whole = "first_token" if len(steps) > 1 else steps[0]
    for place, end, row in zip(places, ends, rows, strict=True):
        low, high = (1e3 * row["seconds"][whole][bound] for bound in ("min", "max"))
        axes.plot([low, high], [place, place], color="#333333", linewidth=1)
        text = _milliseconds(row["seconds"][whole]["median"]) + " ms"
        axes.annotate(text, (max(end, high), place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if len(steps) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=len(steps), loc="lower right", bbox_to_anchor=(1, 1))
