"""Tasks are found by their files, named in a line, and extended from outside."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from mllm_vision.eval import list_tasks, task
from mllm_vision.eval.task import Task, parse_tasks
from mllm_vision.eval.tasks.pope import POPE
from mllm_vision.eval.tasks.scenes import Scenes
from mllm_vision.registry import package_modules

NAMES = ["ai2d", "chair", "chartqa", "docvqa", "gqa", "mmbench", "mme"]
NAMES += ["photos", "pope", "scene_captions", "scenes", "scienceqa", "seed", "textvqa", "vizwiz", "vqav2"]


def test_every_file_of_the_folder_is_listed():
    assert [row.name for row in list_tasks()] == NAMES
    assert {row.__module__ for row in list_tasks()} == {m.__name__ for m in package_modules("mllm_vision.eval.tasks")}


@pytest.mark.parametrize("row", list_tasks(), ids=lambda row: row.name)
def test_every_task_says_where_it_comes_from_and_documents_its_options(row):
    assert row.paper
    assert row.max_new_tokens > 0
    assert row.data is not None or row.name in ("chair", "photos", "scenes", "scene_captions")
    documented = row.__doc__.partition("Args:")[2]
    assert all(f"{option}:" in documented for option in row.defaults())
    assert "required" not in row.defaults().values()
    assert set(row.resumable) <= set(row.defaults())


def test_tasks_are_read_from_a_line():
    assert parse_tasks("pope:parser=damro,scenes:questions=10:families=count") == [
        POPE(parser="damro"),
        Scenes(questions=10, families="count"),
    ]
    assert parse_tasks(["pope", Scenes(seed=1)]) == [POPE(), Scenes(seed=1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("popes", "unknown task 'popes'; the tasks are ai2d, chair"),
        ("pope,pope", "pope is asked for twice"),
        ("", "give a task or several, as pope,gqa, got ''; the tasks are ai2d"),
        (":x=1", "a name must come first"),
        ("pope:parse=lmms", "POPE has no field parse; its fields are parser"),
        ("gqa:x=1", "GQA has no field x"),
        ("pope:parser=other", "parser must be one of"),
        ("scenes:questions=many", "questions must be of type int, got 'many'"),
    ],
)
def test_a_line_that_names_no_task_is_answered_with_what_is_wrong(line, message):
    with pytest.raises(ValueError, match=message):
        parse_tasks(line)


def test_a_third_party_task_is_found_through_its_entry_point(monkeypatch):
    point = EntryPoint("theirs", "tests.third_party_task", task.ENTRY_POINT_GROUP)
    monkeypatch.setattr(task, "entry_points", lambda group: [point] if group == task.ENTRY_POINT_GROUP else [])
    monkeypatch.setattr(task, "_TASKS", dict(task._TASKS))
    task._discover.cache_clear()
    assert "theirs" in {row.name for row in list_tasks()}
    assert parse_tasks("theirs")[0].max_new_tokens == 3
    task._discover.cache_clear()


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tasks are called 'pope'"):

        @dataclass(kw_only=True)
        class Impostor(Task, name="pope"):
            pass


def test_a_task_without_a_name_is_refused():
    class Nameless(Scenes):
        name = ""

    with pytest.raises(ValueError, match=r"Nameless has no name; give it one: class ...\(Task, name=...\)"):
        parse_tasks([Nameless()])
