"""The README's Python blocks run, in order, as one script; its tables, and those of docs/results.md, are those of the
result files."""

import json
import re
import shlex
from fractions import Fraction
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from typer.testing import CliRunner

import mllm_vision as mv
from mllm_vision.cli import app

README = Path(__file__).parent.parent / "README.md"
DOCUMENTS = (README, README.parent / "docs" / "results.md")


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {}
    exec("\n".join(blocks), names)
    assert names["answer"].strip()
    assert len(names["again"].vision_slots.methods) == 1
    assert "(10, 10)" in capsys.readouterr().out


def test_the_block_of_training_runs(tmp_path, monkeypatch):
    """Its commands as they stand, with fewer pictures, steps and questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    section = README.read_text(encoding="utf-8").partition("## Train\n")[2]
    block = section.partition("```bash\n")[2].partition("```")[0]
    for large, small in {
        "--n 2000": "--n 16",
        "tiny_conversations.yaml": "tiny_conversations.yaml stages.projector.arguments.max_steps=2",
        "questions=100": "questions=2",
    }.items():
        assert large in block
        block = block.replace(large, small)
    printed = []
    for line in block.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "mllm-vision"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        printed.append(done.output)
    assert "colour" in printed[-1]
    model, _ = mv.load("runs/merged")
    start, _ = mv.load("tiny-llava-scenes")
    differ = [not torch.equal(new, old) for new, old in zip(model.parameters(), start.parameters(), strict=True)]
    assert any(differ) and not all(differ)


RESULTS = README.parent / "eval" / "results"
CARD = README.parent / "mllm_vision" / "checkpoints" / "tiny-llava-scenes" / "scores.json"


def told():
    return "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def demo_rows():
    result = read(RESULTS / "demo.json")
    for row in result["methods"]:
        times = (f"{row[name]:.1f}" for name in ("encode_ms", "prefill_ms", "decode_ms"))
        yield f"| {row['name']} | {row['tokens']} | {' | '.join(times)} | {row['right']} of {result['settings']['n']} |"


def overhead_rows(name="overhead"):
    for row in read(RESULTS / f"{name}.json")["rows"]:
        ratio, target = row["ratio"], row["target"]
        spread = f"{ratio['min']:.3f} to {ratio['max']:.3f}" if ratio["pairs"] > 1 else ""
        yield f"| {row['name']} | {row['case']} | {ratio['median']:.3f} | {spread} | {target or ''} |"


def contrast_rows():
    return overhead_rows("contrast_cost")


def tower_rows():
    for row in read(RESULTS / "tower_cost.json")["rows"]:
        ratio = row["ratio"]
        form = "d" if row["name"] == "visual tokens" else ".1f"
        values = (f"{row[side]:{form}} {row['unit']}".strip() for side in ("stock", "ours"))
        spread = f"{ratio['min']:.2f} to {ratio['max']:.2f}" if ratio["pairs"] > 1 else ""
        yield f"| {row['name']} | {row['case']} | {' | '.join(values)} | {ratio['median']:.2f} | {spread} |"


def score_rows():
    for family, score in read(CARD)["scores"].items():
        f1 = f"{score['f1']:.3f}" if "f1" in score else ""
        yield f"| {family.replace('_', ', ')} | {score['n']} | {score['accuracy']:.3f} | {f1} |"


def bench_rows():
    for row in read(RESULTS / "bench.json")["rows"]:
        cells = bench_cells(row)
        yield f"| {row['name']} | {row['visual_tokens']} | {' | '.join(cells)} | {row['memory']['peak'] / 1e3:.2f} |"


def bench_cells(row):
    """Milliseconds of each step, and over those of all tokens the ratio of times and, in brackets, that of FLOPs."""
    cells = [f"{1e3 * row['seconds'][step]['median']:.0f}" for step in ("encode", "prefill", "first_token", "decode")]
    if row["ratios"] is None:
        return cells
    return [f"{c}: {r['median']:.2f} ({r['flops']:.2f})" for c, r in zip(cells, row["ratios"].values(), strict=True)]


def projector_rows():
    for row in read(RESULTS / "bench_spatial_tokens.json")["rows"]:
        added = f"{row['added_parameters'] / 1e9:.2f}" if row["added_parameters"] else ""
        yield f"| {row['name']} | {row['visual_tokens']} | {added} | {' | '.join(bench_cells(row))} |"


def with_interval(score, form):
    return f"{score['value']:{form}} ({score['low']:{form}}, {score['high']:{form}})"


def study_rows(name):
    """Before training, then each arm: of each seed and of all, and the difference to the first arm."""
    record = read(RESULTS / f"{name}.json")
    group, name = record["task"]["headline"]
    yield f"| before | {with_interval(record['before'][group][name], '.3f')} | | |"
    for i, (arm, row) in enumerate(record["arms"].items()):
        seeds = ", ".join(f"{value:.3f}" for value in row["seeds"])
        difference = with_interval(row["differences"][group][name], "+.3f") if i else ""
        yield f"| {arm} | {with_interval(row['scores'][group][name], '.3f')} | {seeds} | {difference} |"


def study_family_rows(name):
    arms = list(read(RESULTS / f"{name}.json")["arms"].items())[1:]
    families = {"existence_adversarial": "f1", **dict.fromkeys(("count", "colour", "relation", "reading"), "accuracy")}
    for arm, row in arms:
        yield f"| {arm} | {' | '.join(with_interval(row['differences'][f][n], '+.3f') for f, n in families.items())} |"


def reading_rows(name):
    """What each arm of a study costs, what it reads, and the difference to the first arm."""
    record = read(RESULTS / f"{name}.json")
    yield f"| before | | | | {with_interval(record['before']['reading']['accuracy'], '.3f')} | |"
    for i, (arm, row) in enumerate(record["arms"].items()):
        cost = f"{row['visual_tokens']} | {row['flops']['first_token'] / 1e9:.2f} | {row['parameters'] / 1e6:.2f}"
        difference = with_interval(row["differences"]["reading"]["accuracy"], "+.3f") if i else ""
        yield f"| {arm} | {cost} | {with_interval(row['scores']['reading']['accuracy'], '.3f')} | {difference} |"


def contrasted_rows(task, group, *names):
    """What each strategy scores with the setting that was chosen for it, and the differences to plain decoding."""
    cutoff = read(RESULTS / f"damro_{task}_cutoff.json")["temperatures"]
    for temperature, parts in read(RESULTS / f"damro_{task}.json")["temperatures"].items():
        rows = [*parts["tested"].values(), *list(cutoff[temperature]["tested"].values())[1:]]
        for row in rows:
            scores = [with_interval(row["scores"][group][name], ".3f") for name in names]
            difference = with_interval(row["differences"][group][names[0]], "+.3f") if row["methods"] != "plain" else ""
            yield f"| {temperature} | {row['methods']} | {scores[0]} | {' | '.join([difference, *scores[1:]])} |"


def sweep_rows():
    """A method a row, a budget a column: what is lost of the mean of families, with its interval."""
    points = read(RESULTS / "sweep.json")["points"]
    for method in dict.fromkeys(point["method"] for point in points[1:]):
        lost = [p["differences"]["mean of families"]["accuracy"] for p in points if p["method"] == method]
        yield f"| {method} | {' | '.join(with_interval(score, '+.3f') for score in lost)} |"


PHOTO_FAMILIES = {
    **dict.fromkeys(("existence_random", "existence_popular", "existence_adversarial"), "f1"),
    **dict.fromkeys(("count", "position_quarter", "position_relation"), "accuracy"),
    "mean of families": "accuracy",
}


def photo_learning_rows():
    """What each stage of dino_smollm2 answers, and the adapter that comes along."""
    for stage in ("base", "words", "captions", "adapter"):
        scores = read(RESULTS / "dino_smollm2" / f"{stage}.json")["tasks"]["photos"]["scores"]
        cells = (with_interval(scores[family][name], ".3f") for family, name in PHOTO_FAMILIES.items())
        yield f"| {stage} | {' | '.join(cells)} |"


def photo_rows():
    """F1 of existence under plain decoding, what is lost of it, what DAMRO changes, and the headline."""
    record = read(RESULTS / "dino_smollm2" / "sweep.json")
    (existence, f1), (group, name) = ("existence_random", "f1"), record["task"]["headline"]
    plain = [point for point in record["points"] if point["decoding"] is None]
    contrasted = [point for point in record["points"] if point["decoding"] is not None]
    for point, other in zip(plain, contrasted, strict=True):
        keep = "" if point["keep"] is None else f" {Fraction(point['keep']).limit_denominator(9)}"
        cells = [
            with_interval(point["scores"][existence][f1], ".3f"),
            "" if point["keep"] is None else with_interval(point["differences"][existence][f1], "+.3f"),
            with_interval(other["to_plain"][existence][f1], "+.3f"),
            with_interval(point["scores"][group][name], ".3f"),
        ]
        yield f"| {point['method']}{keep} | {point['tokens']:g} | {' | '.join(cells)} |"


def training_cost_rows():
    """Time and memory of a step of training, over the first arm's."""
    record = read(RESULTS / "pruning_in_training.json")
    for arm, cost in record["cost"].items():
        if not record["arms"][arm]["plug"]:  # which is trained as another arm is
            ratio = cost["ratio"]
            times = f"{ratio['median']:.2f} | {ratio['min']:.2f} to {ratio['max']:.2f}"
            yield f"| {arm} | {cost['seconds']:.2f} | {times} | {cost['megabytes']:.0f} |"


def family_rows():
    """All tokens and every method at a third of them, by family."""
    points = read(RESULTS / "sweep.json")["points"]
    families = {"existence_adversarial": "f1", **dict.fromkeys(("count", "colour", "relation", "reading"), "accuracy")}
    for point in points:
        if point["keep"] in (None, 1 / 3):
            scores = [point["scores"][family][name] for family, name in families.items()]
            name = "all tokens" if point["keep"] is None else f"{point['method']} 1/3"
            yield f"| {name} | {' | '.join(with_interval(score, '.3f') for score in scores)} |"


@pytest.mark.parametrize(
    "rows",
    [
        *(demo_rows, overhead_rows, contrast_rows, tower_rows, bench_rows, score_rows, sweep_rows, family_rows),
        projector_rows,
        *(partial(rows, "spatial_tokens") for rows in (study_rows, study_family_rows)),
        *(partial(rows, "progressive_compression") for rows in (reading_rows, study_rows, study_family_rows)),
        partial(reading_rows, "progressive_compression_longer"),
        *(photo_learning_rows, photo_rows, partial(study_rows, "pruning_in_training"), training_cost_rows),
        partial(contrasted_rows, "existence", "existence_adversarial", "f1", "precision", "recall"),
        partial(contrasted_rows, "captions", "all", "chair_s", "chair_i", "recall"),
    ],
)
def test_tables_are_those_of_the_result_files(rows):
    expected = "\n".join(rows())
    assert expected in told(), f"a document should say\n{expected}"


def test_long_answers_are_those_of_the_result_file():
    _, *rows = read(RESULTS / "bench_spatial_tokens_long.json")["rows"]
    pooling, cropping = (
        [f"{row['ratios'][step]['median']:.3f} times" for step in ("encode", "decode")] for row in rows
    )
    sentence = "pooling takes {} for encoding and {} for each further token, cropping {} and {}."
    assert sentence.format(*pooling, *cropping) in told()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_what_is_linked_is_there(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        place, _, section = target.partition("#")
        if "://" in place:
            continue
        file = document.parent / place if place else document
        assert file.exists(), target
        if section:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert section in anchors, target
