"""Turn the last stage of a run into what is handed out: half-precision weights, scores, a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_vision.eval.environment import environment
from mllm_vision.eval.evaluation import evaluate
from mllm_vision.eval.tasks.scenes import Scenes
from mllm_vision.recipes.recipe import Recipe

SCORES = "scores.json"
STAGE_RECORD = "stage.json"


def publish(plan: Recipe, name: str, stages: list[Path], final: Path) -> None:
    """Write the model of the last of `stages` to `final`, with its scores on the test split and a card made from them.

    Args:
        name: The recipe's name, for the card.
        stages: Folders of the finished stages, in order.
        final: A folder that does not exist; it appears only when all of it is written.
    """
    processor = AutoProcessor.from_pretrained(stages[-1])
    model = AutoModelForImageTextToText.from_pretrained(stages[-1], dtype=torch.float16)
    task = Scenes(questions=plan.scored_per_family, side=plan.side, text_scale=plan.text_scale)
    facts = {
        "recipe": name,
        "seed": plan.seed,
        "note": plan.note,
        "parameters": model.num_parameters(),
        "stages": [json.loads((stage / STAGE_RECORD).read_text(encoding="utf-8")) for stage in stages],
        "split": task.split,
        "decoding": "greedy, at most 6 new tokens, exact match of the lower-cased answer",
        "scores": evaluate(model.float(), processor, task, batch_size=32).tasks[task.name].values(),
        **environment(),
    }
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.half().save_pretrained(partial)
    # Stored in half precision, computed in single: half is slow on a CPU, and the card's scores are those of single.
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = torch.float32
    model.config.save_pretrained(partial)
    processor.tokenizer.backend_tokenizer.no_padding()  # a property of the last batch that was asked, not of the model
    processor.save_pretrained(partial)
    (partial / SCORES).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
    partial.rename(final)


def model_card(facts: dict[str, Any]) -> str:
    """The model card; every number in it comes from `facts`, the content of `scores.json`."""
    parts = [_CARD.format(**facts, title=facts["recipe"].replace("_", "-"), **_run(facts))]
    parts.append("## Scores\n\nHeld-out scenes (test split), all visual tokens, " + facts["decoding"] + ".\n")
    parts.append(_table(["family", "n", "accuracy", "precision", "recall", "F1", "yes-ratio"], _score_rows(facts)))
    parts.append("\n## Learning curve\n\nValidation scenes; existence as F1, the others as accuracy.\n")
    for stage in facts["stages"]:
        parts.append(f"\nStage `{stage['name']}`:\n")
        parts.append(_curve(stage["curve"]))
    return "\n".join(parts) + "\n"


_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [tiny, synthetic]
---

# {title}

A stock LLaVA-style model of {millions:.1f} million parameters that answers short questions about drawn
scenes: is there a star, how many, of which colour, left or right of what, what is written. It is small enough for tests
and demonstrations on a laptop and good enough to show what the pruning of visual tokens costs. It knows nothing about
photographs.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)  # float16 on disk, float32 in memory
processor = AutoProcessor.from_pretrained(folder)
```

## Training

- Data: `mllm_vision.scenes`, drawn on the fly; train, validation and test share no scene (a hash of what a scene holds
  decides its split).
- Command: `mllm-vision train {recipe}`, seed {seed}.
- Hardware: {hardware_line}.
- Wall time: {time_line}.
- Versions: {version_line}.
- First stage, in place of CLIP's pretraining: every patch learns the words of what lies under it (labels of the
  generator), so its features speak the word embeddings of the language model. The scores below profit from such labels,
  which photographs do not have.
- Licence: Apache-2.0.
{note_line}"""


def _run(facts: dict[str, Any]) -> dict[str, Any]:
    hardware = facts["hardware"]
    times = [
        f"{stage['name']} {stage['seconds'] / 60:.0f} min" if stage["seconds"] else f"{stage['name']} not measured"
        for stage in facts["stages"]
    ]
    seconds = [stage["seconds"] for stage in facts["stages"]]
    total = f" = {sum(seconds) / 60:.0f} min" if all(seconds) else ""
    return {
        "millions": facts["parameters"] / 1e6,
        "hardware_line": f"{hardware['threads']} threads of {hardware['cpu']}, {hardware['gpus'] or 'no GPU'}",
        "time_line": " + ".join(times) + total,
        "note_line": f"- Note: {facts['note']}\n" if facts["note"] else "",
        "version_line": ", ".join(f"{package} {number}" for package, number in facts["versions"].items()),
    }


def _score_rows(facts: dict[str, Any]) -> list[list[str]]:
    columns = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    return [
        [family, str(score["n"]), *(f"{score[column]:.3f}" if column in score else "" for column in columns)]
        for family, score in facts["scores"].items()
    ]


def _curve(curve: list[dict[str, float]]) -> str:
    columns = list(dict.fromkeys(key for point in curve for key in point))
    return _table(columns, [[f"{point[key]:.4g}" if key in point else "" for key in columns] for point in curve])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
