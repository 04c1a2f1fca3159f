"""The commands: what they print, and the one line they end with when something is wrong."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

import mllm_vision as mv
from mllm_vision.cli import app, measuring, scoring
from mllm_vision.eval import contrast_cost, overhead, tower_cost
from mllm_vision.projectors import SpatialTokensConfig
from mllm_vision.prompts import question_parts, write_prompt
from mllm_vision.reducers import HiPruneConfig
from mllm_vision.scenes.export import CONVERSATIONS
from tests.hosts import HOSTS, picture
from tests.photos.conftest import draw_backgrounds, draw_cutouts

HOST = {host.name: host for host in HOSTS}
NOWHERE = "no/such-model"
"""A model that would be an error of its own: what is reported before it was found without reading weights."""


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result):
    """The message that the command ended with."""
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    return result.stderr


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "picture.png"
    picture(1).save(path)
    return path


@pytest.fixture
def folder(checkpoint):
    return checkpoint(HOST["llava-clip"])


def ask(model, image, *arguments, question="How many red squares?"):
    return run("ask", model, "--image", image, "--question", question, *arguments)


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    for command in (
        "ask",
        "bench",
        "methods",
        "eval",
        "sweep",
        "tasks",
        "train",
        "demo",
        "scenes",
        "photos",
        "overhead",
        "convert",
        "merge",
        "study",
        "tune",
    ):
        assert f"  {command} " in result.stdout


def test_ask_prints_what_generate_answers(folder, image):
    result = ask(folder, image, "--reduce", "hiprune", "--keep", "9", "--set", "alpha=0.5", "--max-new-tokens", "5")
    assert result.exit_code == 0, result.output
    model, processor = mv.load(folder, HiPruneConfig(keep=9, alpha=0.5))
    inputs = processor(images=[picture(1)], text="USER: <image>\nHow many red squares? ASSISTANT:", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert result.stdout.strip() == answer.strip()
    assert result.stderr.splitlines()[-1] == "9 of 36 visual tokens"


def test_ask_tells_added_tokens_from_kept_ones(folder, image, tmp_path):
    model, processor = mv.load(folder, SpatialTokensConfig(channels=4, scales=3))
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    result = ask(tmp_path, image, "--reduce", "hiprune", "--keep", "9", "--max-new-tokens", "1")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-1] == "9 of 36 visual tokens, and 3 added"


def test_ask_with_all_tokens_and_with_a_share(folder, image):
    assert "36 of 36 visual tokens" in ask(folder, image, "--max-new-tokens", "1").stderr
    shared = ask(folder, image, "--max-new-tokens", "1", "--reduce", "random", "--keep", "0.25")
    assert "9 of 36 visual tokens" in shared.stderr


def test_ask_about_two_images(folder, image):
    result = ask(folder, image, "--image", image, "--max-new-tokens", "1", question="Is <image> the same as <image>?")
    assert result.exit_code == 0, result.output
    assert "72 of 72 visual tokens" in result.stderr


def test_ask_draws_the_kept_tokens_and_overwrites_only_when_asked(folder, image, tmp_path):
    drawing = tmp_path / "new" / "kept.png"
    arguments = ("--reduce", "hiprune", "--keep", "9", "--picture", drawing, "--max-new-tokens", "1")
    result = ask(folder, image, *arguments)
    assert result.exit_code == 0, result.output
    size = Image.open(drawing).size
    drawing.write_bytes(b"mine")
    assert f"{drawing} exists; add --overwrite to replace it" in error_of(ask(NOWHERE, image, *arguments))
    assert drawing.read_bytes() == b"mine"
    assert ask(folder, image, *arguments, "--overwrite").exit_code == 0
    assert Image.open(drawing).size == size


@pytest.mark.parametrize(
    ("arguments", "question", "message"),
    [
        ((), " ", "the question is empty"),
        ((), "<image>", "the question is empty"),
        ((), "Is <image> like <image>?", "the question has 2 <image> marks for 1 images"),
        (
            ("--reduce", "prune", "--keep", 4),
            "Why?",
            "unknown method 'prune'; the methods are cls_topk, damro, downsample, hip",
        ),
        (
            ("--reduce", "hiprune", "--keep", 4, "--set", "beta=1"),
            "Why?",
            "has no field beta; its fields are keep, alpha",
        ),
        (("--reduce", "hiprune", "--keep", 4, "--set", "alpha=2"), "Why?", "alpha must be in [0, 1], got 2"),
        (
            ("--reduce", "hiprune", "--keep", 4, "--set", "alpha"),
            "Why?",
            "a setting is written field=value, got 'alpha'",
        ),
        (("--reduce", "hiprune", "--keep", 0), "Why?", "keep must be a number of tokens"),
        (("--reduce", "hiprune", "--keep", "half"), "Why?", "or a share in (0, 1), got 'half'"),
        (("--reduce", "hiprune"), "Why?", "hiprune needs keep"),
        (("--keep", 4), "Why?", "--keep and --set need --reduce"),
        (("--picture", "kept.docx"), "Why?", "pictures of type '.docx' cannot be written; use .png"),
        (("--device", "abacus"), "Why?", "there is no device 'abacus' here; there are auto, cpu"),
        (("--dtype", "int3"), "Why?", "'int3' is not one of"),
    ],
)
def test_ask_finds_errors_before_it_looks_for_the_model(image, arguments, question, message):
    assert message in error_of(ask(NOWHERE, image, *arguments, question=question))


def test_ask_says_what_is_wrong_with_an_image(tmp_path):
    assert "missing.png is no file; check the path" in error_of(ask(NOWHERE, tmp_path / "missing.png"))
    thin = tmp_path / "thin.png"
    Image.new("RGB", (1, 5000)).save(thin)
    assert "one side may be at most 200 times the other" in error_of(ask(NOWHERE, thin))


def test_ask_checks_the_method_against_the_model_before_reading_weights(folder, image, checkpoint, tmp_path):
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    too_many = ask(tmp_path, image, "--reduce", "hiprune", "--keep", 37)
    assert error_of(too_many) == "Error: keep must be in 1..36, the visual tokens of an image, got 37\n"
    no_cls = ask(checkpoint(HOST["llava-siglip"]), image, "--reduce", "cls_topk", "--keep", 4)
    assert "cls_topk needs a tower with a CLS token" in error_of(no_cls)


def test_ask_says_which_hosts_are_supported(tmp_path, image):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "model type 'bert' is not supported; supported are llava, llava_next, qwen2_5_vl" in error_of(
        ask(tmp_path, image)
    )


def test_errors_are_one_line(image):
    message = error_of(ask(NOWHERE, image))
    assert message.count("\n") == 1
    assert message.startswith("Error: ")


def test_methods_lists_every_method_with_its_fields():
    rows = json.loads(run("methods", "--json").stdout)
    assert [row["name"] for row in rows] == [row.name for row in mv.methods()]
    (hiprune,) = (row for row in rows if row["name"] == "hiprune")
    assert hiprune["paper"] == "arXiv 2508.00553"
    assert hiprune["fields"] | {"alpha": 0.1, "keep": "required"} == hiprune["fields"]
    printed = run("methods").stdout
    assert all(row["name"] in printed for row in rows)


def test_eval_decodes_as_it_was_asked_to(tmp_path):
    task = ("--tasks", "scenes:questions=3:families=colour", "--out", tmp_path)
    result = run("eval", "tiny-llava-scenes", *task, "--decode", "damro:alpha=0.5:topk=5", "--reduce", "pool:keep=1/2")
    assert result.exit_code == 0, result.output
    assert "pool:keep=0.5 + damro:alpha=0.5:topk=5, float32, greedy" in result.stdout


def test_eval_scores_a_model_and_compares_two_runs(tmp_path):
    task = ("--tasks", "scenes:questions=3:families=existence/colour")
    for folder, reduce in (("all", ()), ("few", ("--reduce", "hiprune", "--keep", "1/9"))):
        result = run("eval", "tiny-llava-scenes", *task, "--out", tmp_path / folder, *reduce)
        assert result.exit_code == 0, result.output
    assert "existence_adversarial" in result.stdout
    assert "hiprune:keep=0.1111111111111111, float32, greedy" in result.stdout
    assert len((tmp_path / "few" / "scenes.jsonl").read_text().splitlines()) == 1 + 5 + 3  # existence asks 1 + 3 + 1
    compared = run("eval", "--compare", *(tmp_path / folder / "results.json" for folder in ("all", "few")))
    assert compared.exit_code == 0, compared.output
    assert "paired bootstrap" in compared.stdout
    refused = run("eval", "tiny-llava-scenes", *task, "--out", tmp_path / "all", "--temperature", "1")
    assert "has results of another run: decoding.temperature was 0.0 and is 1.0" in error_of(refused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a model or --compare"),
        ((NOWHERE, "--compare", "a.json", "b.json"), "give either a model or --compare"),
        ((NOWHERE, "--tasks", "popes"), "unknown task 'popes'; the tasks are ai2d, chair"),
        ((NOWHERE, "--tasks", "pope:parser=mine"), "parser must be one of"),
        (
            (NOWHERE, "--tasks", "pope", "--data", "/nowhere"),
            "/nowhere is no folder; --data has a folder for each",
        ),
        ((NOWHERE, "--reduce", "hiprune"), "hiprune needs keep"),
        ((NOWHERE, "--decode", "hiprune:keep=3"), "hiprune is a method of kind reducer, not decoding"),
        ((NOWHERE, "--top-p", "0.5"), "top_p and top_k are for sampling"),
        ((NOWHERE, "--limit", "0"), "Invalid value for '--limit'"),
        ((NOWHERE, "--out", "/dev/null"), "/dev/null cannot be a folder, since a file is in the way"),
        (("--compare", "a.json", "b.json"), "a.json is no file; give the results.json of an evaluation"),
    ],
)
def test_eval_finds_errors_before_it_looks_for_the_model(arguments, message):
    assert message in error_of(run("eval", *arguments))


def test_sweep_writes_its_record_and_picture(tmp_path):
    task = ("--task", "scenes:questions=2:families=colour", "--repeats", 1, "--seeds", 2)
    result = run("sweep", *task, "--methods", "random,pool", "--keep", "1/2,9", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "all tokens" in result.stdout
    assert len(json.loads((tmp_path / "sweep.json").read_text())["points"]) == 5
    assert Image.open(tmp_path / "sweep.png").width > 1000


def test_bench_writes_what_it_measured(tmp_path):
    files = ("--out", tmp_path / "bench.json", "--plot", tmp_path / "bench.png")
    fast = ("--repeats", 1, "--new-tokens", 2, "--size", 140, 140, "--device", "cpu")
    result = run("bench", "tiny-llava-scenes", "--plug", "hiprune:keep=33", *fast, *files)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["name"], row["visual_tokens"]) for row in rows] == [("all tokens", 100), ("hiprune:keep=33", 33)]
    assert "TTFT" in result.stdout
    assert Image.open(tmp_path / "bench.png").width > 1000
    assert "bench.json exists; add --overwrite" in error_of(run("bench", NOWHERE, *files))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a model or --shape NAME"),
        ((NOWHERE, "--shape", "llava-1.5-7b"), "give either a model or --shape NAME"),
        ((NOWHERE, "--layers", 2), "--layers cuts a --shape"),
        ((NOWHERE, "--batch", "1,many"), "--batch takes numbers, as 1,4, got '1,many'"),
        ((NOWHERE, "--batch", "0"), "batches and repeats of 1 or more"),
        ((NOWHERE, "--plug", "hiprune"), "hiprune needs keep"),
        (("--shape", "llava-9"), "llava-1.5-7b"),
        (("--shape", "llava-1.5-7b", "--layers", 0), "layers"),
    ],
)
def test_bench_finds_errors_before_it_looks_for_the_model(arguments, message):
    assert message in error_of(run("bench", *arguments))


def test_tune_prints_the_best_of_each_kind(tmp_path):
    task = "scenes:questions=4:families=colour"
    splits = ("--choose", f"{task}:split=validation", "--test", task)
    tried = (
        "--try",
        "hiprune:keep=1",
        "--try",
        "hiprune:keep=99",
        "--score",
        "colour/accuracy",
        "--out",
        tmp_path / "t",
    )
    result = run("tune", *splits, *tried)
    assert result.exit_code == 0, result.output
    assert "hiprune:keep=99" in result.stdout and "hiprune:keep=1 " not in result.stdout
    wrong = error_of(run("tune", NOWHERE, *splits, "--try", "hiprune:keep=1", "--score", "colour"))
    assert "--score takes a group and a score" in wrong
    assert "unknown method 'prune'" in error_of(run("tune", NOWHERE, *splits, "--try", "prune:keep=1"))


def test_tasks_lists_every_benchmark_with_its_options():
    from mllm_vision.eval import list_tasks

    printed = run("tasks").stdout
    assert all(task.name in printed for task in list_tasks())
    assert "questions = 500" in printed


def test_tasks_tells_all_about_one():
    text = run("tasks", "pope").stdout
    for words in ("arXiv 2305.10355", "parser: Who reads the answers", "is DIR/pope with JSONL files", "question_id"):
        assert words in text
    assert "unknown task 'popes'; the tasks are ai2d" in error_of(run("tasks", "popes"))


def test_without_matplotlib_a_sweep_has_its_table_and_says_how_to_get_the_picture(tmp_path, monkeypatch):
    for module in (scoring, measuring):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    task = ("--task", "scenes:questions=2:families=colour", "--methods", "pool", "--keep", "9", "--repeats", 1)
    result = run("sweep", *task, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "all tokens" in result.stdout
    assert 'no picture without matplotlib: pip install "mllm-vision[viz]"' in result.stdout
    assert (tmp_path / "sweep.json").exists()
    assert 'pip install "mllm-vision[viz]"' in error_of(run("bench", NOWHERE, "--plot", tmp_path / "bench.png"))


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "mllm_vision", "--help"], capture_output=True, text=True, check=True)
    assert "eval" in done.stdout


def test_train_says_what_recipes_there_are():
    message = error_of(run("train", "no_such_recipe"))
    assert "no recipe 'no_such_recipe'; there are" in message
    assert "tiny_llava_scenes" in message
    assert "an override must look like key=value, got 'seed'" in error_of(run("train", "tiny_llava_scenes", "seed"))


def test_train_does_not_overwrite_unasked(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty" in error_of(run("train", "tiny_llava_scenes", f"output={tmp_path}"))


def test_scenes_are_written_in_both_formats(tmp_path):
    from datasets import load_from_disk

    arguments = ("--split", "test", "--n", 2, "--side", 84)
    assert run("scenes", tmp_path / "rows", *arguments).exit_code == 0
    assert len(load_from_disk(tmp_path / "rows")) == 2
    assert run("scenes", tmp_path / "conversations", "--format", "conversations", *arguments).exit_code == 0
    assert len(json.loads((tmp_path / "conversations" / CONVERSATIONS).read_text())) == 2
    assert "is not empty" in error_of(run("scenes", tmp_path / "rows", *arguments))
    assert "split must be one of train, validation, test" in error_of(run("scenes", tmp_path / "x", "--split", "tset"))


def test_photos_are_composed_of_two_folders_and_asked_about(tmp_path):
    cutouts, backgrounds = draw_cutouts(tmp_path / "stamps"), draw_backgrounds(tmp_path / "pictures")
    (tmp_path / "more").mkdir()
    given = ("--cutouts", cutouts, "--backgrounds", backgrounds, "--backgrounds", tmp_path / "more", "--side", 112)
    sizes = ("--train", 2, "--validation", 1, "--test", 3)
    result = run("photos", tmp_path / "data" / "photos", *given, *sizes)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "data" / "photos" / "images").iterdir())) == 6
    refused = error_of(run("photos", tmp_path / "data" / "photos", *given, *sizes))
    assert "is not empty" in refused
    assert run("photos", tmp_path / "data" / "photos", *given, *sizes, "--seed", 1, "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "data" / "photos" / "photos.json").read_text())["seed"] == 1
    assert "is no folder" in error_of(run("photos", tmp_path / "x", "--cutouts", "gone", "--backgrounds", backgrounds))
    task = ("--tasks", "photos:questions=2:families=existence", "--data", tmp_path / "data", "--out", tmp_path / "out")
    result = run("eval", "tiny-llava-scenes", *task)
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "out" / "photos.jsonl").read_text().splitlines()) == 1 + 4 * 2


def test_overhead_refuses_to_overwrite(tmp_path):
    (tmp_path / "overhead.json").write_text("{}")
    assert "exists; add --overwrite" in error_of(run("overhead", "--out", tmp_path / "overhead.json"))


def test_overhead_measures_what_was_asked_for(monkeypatch):
    measured = []
    monkeypatch.setattr(overhead, "run", lambda what, repeats, out, overwrite: measured.append((what, repeats)))
    for arguments in ((), ("--contrast",), ("--tower", "--repeats", 3), ("--tower", "--layers", 4, "--device", "cpu")):
        assert run("overhead", *arguments).exit_code == 0
    assert [(what.func, what.keywords, repeats) for what, repeats in measured] == [
        (overhead.measure, {}, 7),
        (contrast_cost.measure, {}, 7),
        (tower_cost.measure, {}, 3),
        (tower_cost.measure, {"layers": 4, "device": "cpu"}, 7),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--contrast", "--tower"), "--contrast and --tower are two measurements"),
        (("--layers", 2), "--layers is a setting of --tower"),
        (("--contrast", "--device", "cpu"), "--device is a setting of --tower"),
        (("--tower", "--device", "cuda:99"), "there is no device 'cuda:99' here"),
    ],
)
def test_overhead_finds_errors_before_it_measures(arguments, message):
    assert message in error_of(run("overhead", *arguments))


def test_question_parts_put_images_where_the_marks_are():
    image = {"type": "image"}
    assert question_parts("What?", 2) == [image, image, {"type": "text", "text": "What?"}]
    assert question_parts("Is <image> like <image>?", 2) == [
        {"type": "text", "text": "Is"},
        image,
        {"type": "text", "text": "like"},
        image,
        {"type": "text", "text": "?"},
    ]


def test_prompt_follows_the_chat_template_where_there_is_one():
    processor = HOST["qwen2.5-vl"].build_processor()
    parts = question_parts("What?", 1)
    assert write_prompt(HOST["llava-clip"].processor, parts) == "USER: <image>\nWhat? ASSISTANT:"
    processor.chat_template = "{% for part in messages[0]['content'] %}[{{ part['type'] }}]{% endfor %}"
    assert write_prompt(processor, parts) == "[image][text]"


def test_a_system_prompt_stands_first_where_there_is_a_place_for_it():
    processor = HOST["qwen2.5-vl"].build_processor()
    parts = question_parts("What?", 1)
    assert write_prompt(HOST["llava-clip"].processor, parts, "Be brief.") == "Be brief. USER: <image>\nWhat? ASSISTANT:"
    processor.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'][0].get('text') }};{% endfor %}"
    assert write_prompt(processor, parts, "Be brief.") == "system Be brief.;user None;"
    processor.chat_template = "{{ messages[-1]['role'] }}"
    with pytest.raises(ValueError, match="the chat template of this model has no place for a system prompt"):
        write_prompt(processor, parts, "Be brief.")


@pytest.mark.parametrize(("name", "written"), [("llava-clip", ""), ("qwen2.5-vl", "<s>")])
def test_a_bos_token_stands_once_whoever_writes_it(name, written):
    """The first tokenizer writes one itself, the second leaves that to the template."""
    processor = HOST[name].build_processor()
    processor.chat_template = "{{ '<s>' }}USER: What? ASSISTANT:"
    prompt = write_prompt(processor, question_parts("What?", 1))
    assert prompt == f"{written}USER: What? ASSISTANT:"
    assert processor.tokenizer(prompt).input_ids.count(processor.tokenizer.bos_token_id) == 1
