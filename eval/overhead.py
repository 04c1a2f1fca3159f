"""What pruning costs beside what it saves: encoding time, encoding memory and prefill time, over the stock model's.

    mllm-vision overhead --out overhead.json

Stock and pruned runs take turns in one process, and a ratio is formed of neighbours, so that a busy machine disturbs
both. Weights are random on purpose: what the tokens hold changes neither time nor memory, and nothing is downloaded.

Encoding is tower, projector and reduction, in float32 at CLIP-L/14-336 geometry, over `get_image_features` under sdpa.
Prefill goes from encoded images to the first logits through a language model of LLaVA-1.5's proportions: choosing the
tokens, fitting the prompt, running the language model; over a stock model whose prompt simply has that many. Its
tower is a toy, whose time counts against us, and its projector answers from memory.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mllm_vision as mv
from mllm_vision.encoding import encode_images
from mllm_vision.eval import shapes
from mllm_vision.eval.environment import environment
from mllm_vision.eval.measurement import in_fresh_process, paired, peak_memory, spread, torch_threads
from mllm_vision.reducers import HiPruneConfig
from mllm_vision.slotted import SlottedModel

SHAPE = shapes.published_shape("llava-1.5-7b")
TOWER: dict[str, Any] = SHAPE.config["vision_config"]
LANGUAGE: dict[str, Any] = SHAPE.config["text_config"] | {"num_hidden_layers": 2, "vocab_size": 1024}
"""2 of its 32 layers, which are alike, and a small vocabulary: small enough for a small machine."""

# What stands in for the half of the model that is not measured.
_TOY_TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
_TOY_LANGUAGE = dict(intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=16)

TARGETS = {"encoding time": 1.05, "encoding peak memory": 1.10, "prefill time": 1.15}

IMAGE_ID = 3
"""A placeholder that is in the small vocabulary, too."""


def measure(
    *,
    repeats: int = 7,
    keeps: Sequence[int] = (192, 64),
    batches: Sequence[int] = (1, 4),
    tower: dict[str, Any] = TOWER,
    language: dict[str, Any] = LANGUAGE,
    threads: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Every ratio of this module, with where and how it was measured.

    Args:
        repeats: Pairs of runs a ratio is the median of; of memory, which hardly varies, one pair.
        keeps: Tokens to keep; encoding is measured at the first.
        batches: Images encoded together.
        tower: Fields of the vision config.
        language: Fields of the text config.
        threads: Of torch.
        seed: Of weights and images.

    Returns:
        What `report` shows: ``environment``, ``settings`` and ``rows``, each with ``name``, ``case``, ``unit``, medians
        ``stock`` and ``ours``, ``ratio`` (median, min, max, pairs) and ``target``, None where a row is for information.
    """
    with torch_threads(threads), torch.inference_mode():
        rows = [row for batch in batches for row in encoding_memory(tower, language, batch, keeps[0], threads, seed)]
        rows += encoding_time(tower, language, batches, keeps[0], repeats, seed)
        rows += prefill_time(tower, language, keeps, repeats, seed)
        settings = {"repeats": repeats, "seed": seed, "dtype": "float32", "weights": "random"}
        return {
            "environment": environment(),
            "settings": {**settings, "method": HiPruneConfig.type, "tower": tower, "language": language},
            "rows": rows,
        }


def encoding_time(
    tower: dict[str, Any], language: dict[str, Any], batches: Sequence[int], keep: int, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Images to image tokens, one row a batch size."""
    stock = build_model(tower, language | _TOY_LANGUAGE, seed)
    pruned = mv.apply(shapes.sharing_weights(stock), HiPruneConfig(keep=keep))
    rows = []
    for batch in batches:
        pixels = random_images(tower, batch)
        pairs = paired(partial(encode, stock, pixels), partial(encode, pruned, pixels), repeats)
        rows.append(ratio_row("encoding time", f"batch {batch}, keep {keep}", "s", pairs))
    return rows


def encoding_memory(
    tower: dict[str, Any], language: dict[str, Any], batch: int, keep: int, threads: int, seed: int
) -> list[dict[str, Any]]:
    """Peak resident set of a process that encodes ``batch`` images, as a whole and above the loaded model."""
    peaks = [
        in_fresh_process(_encoding_peak, tower, language | _TOY_LANGUAGE, batch, method, threads, seed)
        for method in (None, HiPruneConfig(keep=keep))
    ]
    case = f"batch {batch}, keep {keep}"
    whole, above = [tuple(peak for _, peak in peaks)], [tuple(peak - loaded for loaded, peak in peaks)]
    return [
        ratio_row("encoding peak memory", case, "MB", whole),
        ratio_row("encoding peak memory above the loaded model", case, "MB", above),
    ]


def prefill_time(
    tower: dict[str, Any], language: dict[str, Any], keeps: Sequence[int], repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Encoded images to first logits, two rows a budget: over a stock prompt of that many tokens, and of all."""
    stock = build_model(tower | _TOY_TOWER, language, seed)
    pixels = random_images(tower, 1)
    everything = torch.randn(1, (tower["image_size"] // tower["patch_size"]) ** 2, language["hidden_size"])
    stock.model.multi_modal_projector = _FromMemory(everything)
    pruned = shapes.sharing_weights(stock)
    rows = []
    for keep in keeps:
        mv.apply(pruned, HiPruneConfig(keep=keep))
        kept = encode(pruned, pixels)[0].features
        ours = partial(first_logits, pruned, shapes.prompt(stock.config, everything.shape[1]), pixel_values=pixels)
        for case, features in ((f"{keep} tokens", kept), (f"{keep} over all {everything.shape[1]}", everything[0])):
            pairs = paired(
                partial(first_logits, stock, shapes.prompt(stock.config, len(features)), encoded=features),
                ours,
                repeats,
            )
            rows.append(
                ratio_row("prefill time" if features is kept else "prefill time over all tokens", case, "s", pairs)
            )
    return rows


def build_model(tower: dict[str, Any], language: dict[str, Any], seed: int) -> PreTrainedModel:
    """A stock model with random weights."""
    fields = {"vision_config": TOWER | tower, "text_config": language, "image_token_index": IMAGE_ID}
    return shapes.build_model(AutoConfig.for_model(**SHAPE.config | fields), seed)


def random_images(tower: dict[str, Any], batch: int) -> Tensor:
    """Pixels (B, 3, H, W)."""
    return torch.randn(batch, 3, tower["image_size"], tower["image_size"])


def encode(model: PreTrainedModel, pixels: Tensor) -> Any:
    """Image tokens, of a stock model by its own method, of a model with methods through them."""
    if isinstance(model, SlottedModel):
        return encode_images(model, model.vision_slots, {"pixel_values": pixels})
    return model.get_image_features(pixel_values=pixels)


def first_logits(model: PreTrainedModel, ids: Tensor, *, encoded: Tensor | None = None, **images: Any) -> Tensor:
    """Logits (1, 1, V) after a prompt whose image is ``encoded`` (N, D) already or still to be."""
    if encoded is not None:
        images["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=[encoded])}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, **images).logits


class _FromMemory(nn.Module):
    """A projector whose answer is known."""

    answer: Tensor

    def __init__(self, answer: Tensor):
        super().__init__()
        self.register_buffer("answer", answer)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.answer


def _encoding_peak(
    tower: dict[str, Any], language: dict[str, Any], batch: int, method: Any, threads: int, seed: int
) -> tuple[float, float]:
    model = build_model(tower, language, seed)
    if method is not None:
        mv.apply(model, method)
    pixels = random_images(tower, batch)
    with torch_threads(threads), torch.inference_mode():
        return peak_memory(lambda: [encode(model, pixels) for _ in range(2)])


def ratio_row(
    name: str, case: str, unit: str, pairs: Sequence[tuple[float, float]], target: float | None = None
) -> dict[str, Any]:
    """A row of `report`, of pairs (stock, ours)."""
    stock, ours = zip(*pairs, strict=True)
    ratios = [b / a for a, b in pairs]
    return {
        "name": name,
        "case": case,
        "unit": unit,
        "stock": statistics.median(stock),
        "ours": statistics.median(ours),
        "ratio": {**spread(ratios), "pairs": len(pairs)},
        "target": TARGETS.get(name, target),
    }


def report(result: dict[str, Any], console: Console) -> None:
    """Show what `measure` found as a table."""
    where, settings = result["environment"], result["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    table = Table(
        title=f"ours over the other, random weights, {settings['dtype']}, {settings.get('device', 'cpu')}",
        caption=f"{where['hardware']['cpu']}, {where['hardware']['threads']} threads; {versions}",
    )
    for heading in ("", "case", "stock", "ours", "ratio", "min to max", "target"):
        table.add_column(heading, justify="left" if heading in ("", "case") else "right")
    for row in result["rows"]:
        ratio, target = row["ratio"], row["target"]
        met = "" if target is None or ratio["median"] <= target else "[red]"
        table.add_row(
            row["name"],
            row["case"],
            *(f"{row[side]:.4g} {row['unit']}" for side in ("stock", "ours")),
            f"{met}{ratio['median']:.3f}",
            f"{ratio['min']:.3f} to {ratio['max']:.3f}",
            "" if target is None else f"{target:.2f}",
        )
    console.print(table)


def run(measured: Callable[..., dict[str, Any]], repeats: int, out: Path | None, overwrite: bool) -> None:
    """Measure, show the rows as a table and, where asked, write them.

    Args:
        measured: `measure`, or what gives rows like it.
        repeats: Pairs of runs a ratio is the median of.
        out: JSON file to write.
        overwrite: Replace it if it exists.

    Raises:
        FileExistsError: it exists.
    """
    if out is not None and out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; add --overwrite to replace it")
    console = Console()
    with console.status("measuring, some minutes ..."):
        result = measured(repeats=repeats)
    report(result, console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
