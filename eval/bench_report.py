"""What `bench` found: as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = {"encode": "encode", "prefill": "prefill", "first_token": "TTFT", "decode": "token"}
"""What the steps of an answer are called in a table."""

COLOURS = {"encode": "#4477aa", "prefill": "#ee9944", "decode": "#66a182"}


def title(result: dict[str, Any]) -> str:
    """What was measured, on what."""
    settings, hardware = result["settings"], result["environment"]["hardware"]
    layers, published = settings["layers"], settings["layers_published"]
    cut = f", {layers} of {published} language layers" if published not in (None, layers) else ""
    gpu = torch.device(settings["device"])
    where = hardware["gpus"][gpu.index or 0] if gpu.type == "cuda" else f"threads: {settings['threads']}"
    return f"{settings['model']}{cut}, {settings['weights']} weights, {settings['dtype']}, {where}"


def report(result: dict[str, Any], console: Console) -> None:
    """Show what `bench` found: of each candidate its costs and, step by step, its ratios to the baseline."""
    settings, where = result["settings"], result["environment"]
    for batch in settings["batches"]:
        console.print(f"[bold]{title(result)}, batch {batch}[/bold]", highlight=False)
        for row in result["rows"]:
            if row["batch"] == batch:
                console.print(f"\n{escape(row['name'])}: {_costs(row)}", highlight=False)
                console.print(_table(row))
        console.print()
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    width, height = settings["picture"]
    console.print(
        f"Medians of {settings['repeats']} pairs; ratio: time over that of {escape(settings['baseline'])}; FLOPs: the "
        "same of FLOPs; over FLOPs: 1 where time fell as they say. TTFT: images to the first new token; token: each of "
        f"{settings['new_tokens'] - 1} further ones. Pictures of {width} x {height} pixels.\n"
        f"{where['hardware']['cpu']}; {versions}",
        style="dim",
        highlight=False,
    )


def _costs(row: dict[str, Any]) -> str:
    """What there is one figure of."""
    memory = row["memory"]
    peak = "memory not measured"
    if memory is not None:
        above = (memory["peak"] - memory["loaded"]) / 1e3
        peak = f"{memory['peak'] / 1e3:.2f} GB at most ({above:.2f} above the model)"
    added = f"{row['added_parameters'] / 1e9:.3f} G parameters more, " if row["added_parameters"] else ""
    return f"{row['visual_tokens']} visual tokens, {added}{row['tokens_per_second']:.1f} tokens/s, {peak}"


def _table(row: dict[str, Any]) -> Table:
    """A line for each step."""
    headings = ["", "ms", "min to max"]
    headings += [] if row["ratios"] is None else ["ratio", "min to max", "FLOPs", "over FLOPs"]
    table = Table(box=None, padding=(0, 0, 0, 2), header_style="dim")
    for heading in headings:
        width = {"": 7, "min to max": 15}.get(heading, 6)  # alike in the tables of all candidates
        table.add_column(heading, justify="right" if heading else "left", min_width=width, no_wrap=True)
    for step, name in STEPS.items():
        seconds = row["seconds"][step]
        cells = [milliseconds(seconds["median"]), " to ".join(milliseconds(seconds[end]) for end in ("min", "max"))]
        if row["ratios"] is not None:
            ratio = row["ratios"][step]
            cells += [f"{ratio['median']:.3f}", f"{ratio['min']:.3f} to {ratio['max']:.3f}", f"{ratio['flops']:.3f}"]
            cells.append(f"{row['over_flops'][step]:.2f}")
        table.add_row(name, *cells)
    return table


def milliseconds(seconds: float) -> str:
    """With three digits or more."""
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 99.95 else f"{ms:#.3g}"


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
        text = milliseconds(row["seconds"][whole]["median"]) + " ms"
        axes.annotate(text, (max(end, high), place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.25)  # for the figures
    axes.set_xlim(left=0)
    measured = "ms; figure and line: the whole as measured, its min to max" if len(steps) > 1 else "ms"
    axes.set_xlabel(measured, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if len(steps) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=len(steps), loc="lower right", bbox_to_anchor=(1, 1))
