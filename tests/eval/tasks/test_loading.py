"""Benchmarks read from a folder, from a datasets directory and from the hub; what is broken is said and left out."""

import json

import datasets
import numpy as np
import pytest

from mllm_vision.eval.choices import key
from mllm_vision.eval.data import rows
from mllm_vision.eval.task import parse_tasks, task_class
from tests.eval.tasks.local import BENCHMARKS, COLOURS, FOLDERS, rows_of, write_folder

TABLES = [task for task in BENCHMARKS if task not in FOLDERS]

# Of the first example of each benchmark's rows.
FIRST = {
    "ai2d": ("0", {"letter": "C", "options": ["root", "stem", "leaf", "flower"]}, ("all",), "images/square.png"),
    "chair": ("7", ["kite", "person"], ("all",), "7"),
    "chartqa": ("0", "200", ("overall", "human"), "images/square.png"),
    "docvqa": ("501", ["J. Smith", "Smith"], ("all",), "abcd0001/1"),
    "gqa": ("100", "yes", ("all", "verify"), "n1"),
    "mmbench": (
        "1/0",
        {"letter": "B", "options": ["a bird", "a kite", "a plane", "a cloud"]},
        ("all", "finegrained_perception (instance-level)"),
        "1",
    ),
    "mme": ("existence/000001.jpg/0", "yes", ("existence",), "existence/existence/000001.jpg"),
    "photos": (
        "test-000000-0",
        {"family": "existence", "answer": "yes"},
        ("existence_random", "existence_popular", "existence_adversarial"),
        "images/beach.png",
    ),
    "pope": ("random/1", "yes", ("random",), "COCO_val2014_000000000001"),
    "scienceqa": ("0", {"letter": "B", "options": ["water", "ice"]}, ("all", "natural science"), "0"),
    "seed": (
        "11",
        {"letter": "A", "options": ["A beach", "A street", "A kitchen", "A forest"]},
        ("all", "scene understanding"),
        "100_1",
    ),
    "textvqa": ("1", ["main st"] * 6 + ["main street"] * 4, ("all",), "a1"),
    "vizwiz": (
        "VizWiz_val_00000001.jpg",
        ["blue kite"] * 5 + ["Kite"] * 5,
        ("all", "other"),
        "VizWiz_val_00000001.jpg",
    ),
    "vqav2": ("1000", ["yes"] * 10, ("all", "yes/no"), "1"),
}
# How many examples share a unit, in the order of the units.
UNITS = {
    "ai2d": [2, 1],
    "chair": [1, 1, 1, 1],
    "chartqa": [2, 1, 1],
    "docvqa": [2, 1],
    "gqa": [2, 1],
    "mmbench": [4, 2],
    "mme": [2, 2, 2, 2],
    "photos": [7, 5],
    "pope": [6],
    "scienceqa": [1, 1, 1],
    "seed": [2, 1],
    "textvqa": [2, 1],
    "vizwiz": [1, 1, 1],
    "vqav2": [2, 1],
}
# A column without which a row asks nothing, and a value that is of no use.
BROKEN = {
    "ai2d": ("options", []),
    "chartqa": ("type", "machine"),
    "docvqa": ("answers", []),
    "gqa": ("answer", None),
    "mmbench": ("answer", "D"),
    "mme": ("category", "smell"),
    "pope": ("answer", "maybe"),
    "scienceqa": ("choices", []),
    "seed": ("answer", ""),
    "textvqa": ("answers", None),
    "vizwiz": ("answers", []),
    "vqav2": ("answers", None),
}


# Data set, config and split on the hub; longest answer.
SOURCES = {
    "ai2d": ("lmms-lab/ai2d", None, "test", 16),
    "chartqa": ("lmms-lab/ChartQA", None, "test", 16),
    "docvqa": ("lmms-lab/DocVQA", "DocVQA", "validation", 32),
    "gqa": ("lmms-lab/GQA", "testdev_balanced_instructions", "testdev", 16),
    "mmbench": ("lmms-lab/MMBench", "en", "dev", 16),
    "mme": ("lmms-lab/MME", None, "test", 16),
    "pope": ("lmms-lab/POPE", None, "test", 16),
    "scienceqa": ("lmms-lab/ScienceQA", "ScienceQA-IMG", "test", 16),
    "seed": ("lmms-lab/SEED-Bench", None, "test", 16),
    "textvqa": ("lmms-lab/textvqa", None, "validation", 16),
    "vizwiz": ("lmms-lab/VizWiz-VQA", None, "val", 16),
    "vqav2": ("lmms-lab/VQAv2", None, "validation", 16),
}


def made(task):
    """A task with options that suit the hand-written rows."""
    return parse_tasks("chair:images=4" if task == "chair" else task)[0]


def columns(example):
    return example.id, example.question, example.target, example.groups


def units(examples):
    """How many examples share a unit, in the order of the units."""
    shared = {}
    for example in examples:
        shared[example.unit] = shared.get(example.unit, 0) + 1
    return list(shared.values())


def pixels(examples):
    return [np.asarray(load()).tolist() for example in examples for load in example.images]


@pytest.mark.parametrize("task", TABLES)
def test_where_questions_come_from_and_how_long_answers_may_be(task):
    data = task_class(task).data
    assert (data.dataset, data.config, data.split, task_class(task).max_new_tokens) == SOURCES[task]


def test_chair_has_no_data_set_on_the_hub_and_long_answers():
    assert (task_class("chair").data, task_class("chair").max_new_tokens) == (None, 512)


@pytest.mark.parametrize("task", BENCHMARKS)
def test_a_folder_is_read(task, tmp_path):
    found = made(task).load(write_folder(tmp_path / task, task))
    first = found.examples[0]
    assert found.faults == {}
    assert (first.id, first.target, first.groups, first.unit) == FIRST[task]
    assert units(found.examples) == UNITS[task]
    assert json.loads(json.dumps(first.target)) == first.target
    assert {len(example.images) for example in found.examples} == {1}
    assert first.images[0]().mode == "RGB"


def test_each_question_has_its_own_picture(tmp_path):
    examples = made("mme").load(write_folder(tmp_path / "mme", "mme")).examples
    names = ["beach", "beach", "street", "street", "square", "square", "code", "code"]
    assert [example.images[0]().getpixel((0, 0)) for example in examples] == [COLOURS[name] for name in names]


@pytest.mark.parametrize("task", TABLES)
def test_a_datasets_directory_is_read_alike(task, tmp_path):
    folder = write_folder(tmp_path / "folder", task)
    rows = [
        row | {"image": [f"{folder}/images/{x}" for x in row["image"]]}
        if isinstance(row["image"], list)
        else row | {"image": f"{folder}/images/{row['image']}"}
        for row in rows_of(task)
    ]
    image = datasets.List(datasets.Image()) if task == "seed" else datasets.Image()
    datasets.Dataset.from_list(rows).cast_column("image", image).save_to_disk(tmp_path / "saved")

    here, there = made(task).load(folder).examples, made(task).load(tmp_path / "saved").examples
    assert [columns(example) for example in there] == [columns(example) for example in here]
    assert units(there) == UNITS[task]
    assert pixels(there) == pixels(here)


def test_gqa_joins_its_images_from_another_config(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "folder", "gqa")
    questions = [{k: v for k, v in row.items() if k != "image"} for row in rows_of("gqa")]
    questions.append(questions[0] | {"id": "103", "imageId": "n9"})
    pictures = [
        {"id": "n2", "image": f"{folder}/images/street.png"},
        {"id": "n1", "image": f"{folder}/images/beach.png"},
    ]
    tables = {
        "testdev_balanced_instructions": datasets.Dataset.from_list(questions),
        "testdev_balanced_images": datasets.Dataset.from_list(pictures).cast_column("image", datasets.Image()),
    }

    def load_dataset(dataset, config, *, split, revision):
        assert (dataset, split, revision) == ("lmms-lab/GQA", "testdev", "main")
        return tables[config]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = task_class("gqa")().load()
    assert [example.id for example in found.examples] == ["100", "101", "102"]
    colours = [example.images[0]().getpixel((0, 0)) for example in found.examples]
    assert colours == [COLOURS["beach"], COLOURS["beach"], COLOURS["street"]]
    assert found.faults == {"row 3": "ValueError: lmms-lab/GQA has no picture 'n9'"}


@pytest.mark.parametrize("task", TABLES)
def test_a_broken_row_is_a_fault_and_costs_no_other(task, tmp_path):
    column, useless = BROKEN[task]
    fine = rows_of(task)
    broken = [
        {name: value for name, value in fine[0].items() if name != column},
        fine[0] | {column: useless},
        fine[0] | {"image": ["gone.png"] if task == "seed" else "gone.png"},
        fine[0] | {"question": None},
        {name: value for name, value in fine[0].items() if name != "image"},
    ]
    if task == "mmbench":  # two options are given: D is none of them
        broken[1] = fine[2] | {column: useless}
    found = made(task).load(write_folder(tmp_path / task, task, [*broken, *fine]))
    assert list(found.faults) == [f"row {i}" for i in range(5)]
    assert column in found.faults["row 0"]
    assert "gone.png" in found.faults["row 2"]
    assert [example.question for example in found.examples] == [
        example.question for example in made(task).load(write_folder(tmp_path / "fine", task)).examples
    ]


@pytest.mark.parametrize("task", TABLES)
def test_a_folder_of_something_else_is_an_error_that_says_so(task, tmp_path):
    folder = write_folder(tmp_path / "wrong", task, [{"a": 1}, {"a": 2}])
    with pytest.raises(ValueError, match=rf"{task}: no question can be read from folder wrong; ValueError: .*column"):
        made(task).load(folder)


@pytest.mark.parametrize("options", [[], ["root"], [str(i) for i in range(27)]])
def test_a_question_needs_2_to_26_options(options):
    with pytest.raises(ValueError, match=f"a question needs 2 to 26 options, got {len(options)}"):
        key(options, 0)


@pytest.mark.parametrize("right", [2, -1, "C", "a", "", "AB", None])
def test_the_right_option_is_one_of_the_options(right):
    with pytest.raises(ValueError, match=f"the right option must be one of A, B or its index, got {right!r}"):
        key(["root", "stem"], right)


def test_a_list_of_pictures_is_read_by_number(tmp_path):
    folder = write_folder(tmp_path / "folder", "seed", rows_of("seed")[3:])
    files = [f"{folder}/images/street.png", f"{folder}/images/square.png"]
    table = datasets.Dataset.from_list([{"id": 1, "image": files}])
    table.cast_column("image", datasets.List(datasets.Image())).save_to_disk(tmp_path / "saved")
    for source in (folder, tmp_path / "saved"):
        [row] = rows(None, source)[0]
        colours = [row.picture("image", number)().getpixel((0, 0)) for number in (0, 1)]
        assert colours == [COLOURS["street"], COLOURS["square"]]
        with pytest.raises(ValueError, match="image"):
            row.picture("image", 2)()


def test_pictures_that_are_the_same_have_one_fingerprint(tmp_path):
    files = [str(write_folder(tmp_path / name, "ai2d") / "images" / "beach.png") for name in ("a", "b")]
    files.append(str(tmp_path / "a" / "images" / "code.png"))
    table = datasets.Dataset.from_list([{"id": 1, "image": file} for file in files])
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    first, second, other = (row.fingerprint() for row in rows(None, tmp_path / "saved")[0])
    assert first == second != other


def test_an_id_twice_is_a_fault(tmp_path):
    rows = rows_of("vqav2")
    found = made("vqav2").load(write_folder(tmp_path / "vqav2", "vqav2", [rows[0], rows[0]]))
    assert len(found.examples) == 1
    assert found.faults == {"row 1": "the id '1000' is that of an earlier row"}


def test_pope_reads_the_files_of_its_release(tmp_path):
    folder = write_folder(tmp_path / "pope", "pope", [])
    rows = [
        {"question_id": 1, "image": "beach.png", "text": "Is there a kite in the image?", "label": "yes"},
        {"question_id": 2, "image": "beach.png", "text": "Is there a bus in the image?", "label": "no"},
    ]
    for file in folder.glob("*.jsonl"):
        file.unlink()
    (folder / "coco_pope_popular.json").write_text("\n".join(map(json.dumps, rows)))
    found = made("pope").load(folder)
    assert found.faults == {}
    assert [(e.id, e.target, e.groups, e.unit) for e in found.examples] == [
        ("popular/1", "yes", ("popular",), "beach.png"),
        ("popular/2", "no", ("popular",), "beach.png"),
    ]


def test_mmbench_without_rotations_asks_each_question_once(tmp_path):
    [task] = parse_tasks("mmbench:circular=false")
    assert [e.id for e in task.load(write_folder(tmp_path / "mmbench", "mmbench")).examples] == ["1/0", "2/0"]


@pytest.mark.parametrize("empty", ["nan", "", None, float("nan"), "None"])
def test_mmbench_knows_an_empty_cell(empty, tmp_path):
    row = rows_of("mmbench")[2] | {"C": empty, "hint": empty}
    [first, second] = made("mmbench").load(write_folder(tmp_path / "mmbench", "mmbench", [row])).examples
    assert first.question.splitlines()[:3] == ["Which is heavier?", "A. the bus", "B. the bicycle"]
    assert first.target == {"letter": "A", "options": ["the bus", "the bicycle"]}
    assert second.target == {"letter": "B", "options": ["the bicycle", "the bus"]}


def test_seed_leaves_videos_out(tmp_path):
    found = made("seed").load(write_folder(tmp_path / "seed", "seed"))
    assert [example.id for example in found.examples] == ["11", "12", "13"]


def test_chair_draws_its_images_by_seed(tmp_path):
    folder = write_folder(tmp_path / "chair", "chair")
    drawn = [[e.id for e in parse_tasks(f"chair:images=2:seed={s}")[0].load(folder).examples] for s in range(8)]
    assert len(set(map(tuple, drawn))) > 1
    assert drawn[0] == [e.id for e in parse_tasks("chair:images=2")[0].load(folder).examples]
    assert all(int(a) < int(b) for a, b in drawn)


def test_chair_needs_every_part_of_its_folder(tmp_path):
    folder = write_folder(tmp_path / "chair", "chair")
    with pytest.raises(ValueError, match=r"has 4 images, fewer than 500; ask chair:images=4"):
        task_class("chair")().load(folder)
    (folder / "images" / "COCO_val2014_000000000042.jpg").unlink()
    found = made("chair").load(folder)
    assert [example.id for example in found.examples] == ["7", "99", "391"]
    assert found.faults == {
        "row 1": "ValueError: there is no COCO_val2014_000000000042.jpg in chair or its images/",
    }
    (folder / "captions_val2014.json").unlink()
    with pytest.raises(ValueError, match=r"chair lacks captions_val2014.json; chair needs COCO val2014"):
        made("chair").load(folder)
    with pytest.raises(ValueError, match="chair has no data set on the hub; give the folder of a local copy"):
        made("chair").load()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pope:parser=best", "parser must be one of llava, lmms, damro, got 'best'"),
        ("vqav2:reading=kind", "reading must be one of 'challenge', 'lmms', got 'kind'"),
        ("textvqa:ocr=1", "ocr must be of type bool, got 1"),
        ("chair:images=0", "images must be 1 or more, got 0"),
        ("chair:caption=long", "caption must be one of 'detailed', 'short', got 'long'"),
        ("mme:circular=true", "MME has no field circular; it has none"),
    ],
)
def test_a_wrong_option_is_an_error(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_tasks(spec)
