"""Turn the last stage of a run into what is handed out: weights or an adapter, scores, a model card."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments

import mllm_vision as mv
from mllm_vision.eval.environment import environment
from mllm_vision.eval.evaluation import evaluate
from mllm_vision.eval.task import parse_tasks
from mllm_vision.folders import whole_folder
from mllm_vision.recipes.adapter_rank import reduce_rank
from mllm_vision.recipes.recipe import Recipe

SCORES = "scores.json"
STAGE_RECORD = "stage.json"


def publish(
    plan: Recipe, name: str, command: str, stages: list[Path], final: Path, arguments: TrainingArguments
) -> Path:
    """Write the model of the last of `stages` to `final`, with its scores, if the recipe asks for any, and a card.

    Args:
        name: The recipe's name, for the card.
        command: What the run was started with, for the card.
        stages: Folders of the finished stages, in order.
        final: A folder that does not exist; it appears only when all of it is written.
        arguments: Says which of several processes writes; all of them answer questions.

    Returns:
        `final`.
    """
    records = [json.loads((stage / STAGE_RECORD).read_text(encoding="utf-8")) for stage in stages]
    is_adapter = plan.stages[-1].lora is not None
    if arguments.should_save:
        for cut_off in final.parent.glob(f".{final.name}-*"):  # by an end of the process while it wrote here
            shutil.rmtree(cut_off)
    with whole_folder(final) if arguments.should_save else nullcontext() as folder, TemporaryDirectory() as scratch:
        trained, kept = _cut_down(plan, stages[-1], Path(scratch)) if is_adapter else (stages[-1], None)
        loaded = None
        if plan.task is not None or not is_adapter:  # once: what is written as it is stored is asked questions then
            dtype = plan.dtype if is_adapter else plan.publish_dtype or plan.dtype
            loaded = mv.load(trained, dtype=getattr(torch, dtype))
        if folder is not None and is_adapter:
            shutil.copytree(trained, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STAGE_RECORD))
        elif folder is not None and loaded is not None:
            _write_model(*loaded, folder)
        scores = {} if loaded is None else _scores(plan, *loaded, arguments.device)
        if folder is not None:
            facts = _facts(plan, name, command, records, kept, scores)
            (folder / SCORES).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
    return final


def _cut_down(plan: Recipe, adapter: Path, scratch: Path) -> tuple[Path, float | None]:
    """The adapter in the rank and precision in which it is published, and how much of its updates is kept."""
    if plan.publish_rank is None and plan.publish_dtype is None:
        return adapter, None
    dtype = getattr(torch, plan.publish_dtype or plan.dtype)
    return scratch / "adapter", reduce_rank(adapter, scratch / "adapter", plan.publish_rank, dtype)


def _facts(
    plan: Recipe,
    name: str,
    command: str,
    stages: list[dict[str, Any]],
    kept: float | None,
    scores: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """What there is to know of the model: all that its card says."""
    return {
        "recipe": name,
        "command": command,
        "seed": plan.seed,
        "about": plan.about,
        "card": plan.card,
        "note": plan.note,
        "base": plan.base,
        "methods": plan.methods,
        "adapter": plan.stages[-1].lora is not None,
        "rank": None if plan.publish_rank is None else {"published": plan.publish_rank, "kept": kept},
        "parameters": stages[-1]["parameters"],
        "stages": stages,
        "task": plan.task,
        "scores": scores,
        **environment(),
    }


def _write_model(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    model.save_pretrained(folder)
    if model.dtype is torch.float16:  # on disk; in memory it is single, for half is slow on a processor
        for config in (model.config, model.config.text_config, model.config.vision_config):
            config.dtype = torch.float32
        model.config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _scores(
    plan: Recipe, model: PreTrainedModel, processor: ProcessorMixin, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Of the weights as they are published, in single precision on a processor, where half is slow."""
    if plan.task is None:
        return {}
    model = model.float() if device.type == "cpu" else model.to(device)
    (task,) = parse_tasks(plan.task)
    return evaluate(model, processor, task, batch_size=32, data=plan.data).tasks[task.name].values()


def model_card(facts: dict[str, Any]) -> str:
    """The model card; every number in it comes from `facts`, the content of `scores.json`."""
    front = {"library_name": "peft" if facts["adapter"] else "transformers", "pipeline_tag": "image-text-to-text"}
    lines = [
        f"---\n{yaml.safe_dump({**facts['card'], **front}, sort_keys=False, default_flow_style=None)}---\n",
        f"# {facts['recipe'].replace('_', '-')}\n",
        *([facts["about"]] if facts["about"] else []),
        _USE_ADAPTER if facts["adapter"] else _USE,
        "## Training\n",
        *(f"- {line}" for line in _run(facts)),
    ]
    if facts["scores"]:
        lines.append(f"\n## Scores\n\n`{facts['task']}`, all visual tokens, greedy.\n")
        lines.append(_table(["family", *_COLUMNS], _score_rows(facts)))
    if any(stage["curve"] for stage in facts["stages"]):
        lines.append("\n## Learning curve\n\nHeld-out rows; existence as F1, the other families as accuracy.\n")
    for stage in facts["stages"]:
        if stage["curve"]:
            lines.append(f"\nStage `{stage['name']}`:\n")
            lines.append(_curve(stage["curve"]))
    return "\n".join(lines) + "\n"


_USE = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```
"""
_USE_ADAPTER = """\
```python
import mllm_vision as mv

model, processor = mv.load(folder)  # the model it was trained on, its methods and this adapter
```
"""
_COLUMNS = dict.fromkeys(("n", "accuracy", "precision", "recall")) | {"F1": "f1", "yes-ratio": "yes_ratio"}


def _run(facts: dict[str, Any]) -> list[str]:
    hardware = facts["hardware"]
    seconds = {stage["name"]: stage["seconds"] for stage in facts["stages"]}
    times = [f"{name} {s / 60:.0f} min" if s is not None else f"{name} not measured" for name, s in seconds.items()]
    total = f" = {sum(seconds.values()) / 60:.0f} min" if None not in seconds.values() and len(seconds) > 1 else ""
    lines = [
        f"Command: `{facts['command']}`, seed {facts['seed']}.",
        f"Hardware: {hardware['threads']} threads of {hardware['cpu']}, {hardware['gpus'] or 'no GPU'}.",
        f"Wall time: {' + '.join(times)}{total}.",
        "Versions: " + ", ".join(f"{package} {number}" for package, number in facts["versions"].items()) + ".",
        f"Parameters: {facts['parameters'] / 1e6:.1f} million.",
    ]
    if facts["base"]:
        lines.insert(0, f"Goes on from `{facts['base']}`.")
    if facts.get("rank"):  # which cards of earlier runs have not
        lines.append("LoRA of rank {published}, which is {kept:.3f} of the updates as trained.".format(**facts["rank"]))
    if facts["methods"]:
        lines.append(f"Methods: `{json.dumps(facts['methods'])}`.")
    if facts["note"]:
        lines.append(f"Note: {facts['note']}")
    return lines


def _score_rows(facts: dict[str, Any]) -> list[list[str]]:
    def cell(value: float) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    keys = [key or heading for heading, key in _COLUMNS.items()]
    return [
        [family, *(cell(score[key]) if key in score else "" for key in keys)]
        for family, score in facts["scores"].items()
    ]


def _curve(curve: list[dict[str, float]]) -> str:
    columns = list(dict.fromkeys(key for point in curve for key in point))
    return _table(columns, [[f"{point[key]:.4g}" if key in point else "" for key in columns] for point in curve])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
