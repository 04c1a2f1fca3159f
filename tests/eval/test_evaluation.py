"""The evaluation loop: the same scores in any batch, on any number of processes, through kills and faults."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

import mllm_vision as mv
from mllm_vision.eval import Decoding, Evaluation, asking, evaluate
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.task import Example, Task
from mllm_vision.eval.tasks.scenes import Scenes
from mllm_vision.reducers import HiPruneConfig
from mllm_vision.scenes import render, sample_scene

TASK = "scenes:questions=6:families=existence/colour/reading"


@dataclass(kw_only=True)
class Local(Task):
    """Questions of a folder; two rows share an image."""

    def examples(self, row):
        yield Example(
            id=str(row["id"]), question=row["text"], images=[row.picture()], target=row["answer"], unit=row["image"]
        )

    def tally(self, target, answer):
        return {"n": 1, "right": float(answer == target)}

    def scores(self, sums):
        return {"accuracy": ratio(sums["right"], sums["n"])}


Local.name = "local"


@pytest.fixture(scope="module")
def loaded():
    return mv.load("tiny-llava-scenes")


@pytest.fixture
def local(tmp_path):
    """A folder of twelve questions about six images."""
    folder = tmp_path / "data" / "local"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(12):
        name = f"{i // 2}.png"
        render(sample_scene("test", i // 2)).save(folder / "images" / name)
        rows.append({"id": i, "text": "how many shapes are there?", "answer": "3", "image": name})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def scores(found):
    return {name: result.scores for name, result in found.tasks.items()}


def lines(file):
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def unbroken(loaded, tmp_path_factory):
    """A run from beginning to end: its folder and what it found."""
    out = tmp_path_factory.mktemp("unbroken")
    return out, evaluate(*loaded, TASK, out=out, batch_size=8)


def test_one_at_a_time_gives_the_same(loaded, unbroken):
    assert scores(evaluate(*loaded, TASK, batch_size=1)) == scores(unbroken[1])


def test_two_processes_give_the_same(unbroken, tmp_path):
    # What `accelerate launch` starts where there are GPUs; of processes on a CPU it starts one.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "mllm_vision", "eval", "tiny-llava-scenes", "--device", "cpu"]
    command += ["--tasks", TASK, "--batch-size", "3", "--out", str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=one_thread, timeout=120)
    found = Evaluation.load(tmp_path / "results.json")
    assert found.run["processes"] == 2
    assert scores(found) == scores(unbroken[1])
    assert lines(tmp_path / "scenes.jsonl")[1:] == lines(unbroken[0] / "scenes.jsonl")[1:]


def test_interrupted_at_every_batch_and_resumed_equals_unbroken(loaded, unbroken, tmp_path, monkeypatch):
    """Each time one batch is answered, then the run stops and leaves half a line behind."""
    original, file = asking.answer, tmp_path / "scenes.jsonl"
    total = unbroken[1].tasks["scenes"].questions
    for run in range(1, 1 + total // 5):
        calls = []

        def once(*args, calls=calls, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(asking, "answer", once)
        with pytest.raises(KeyboardInterrupt):
            evaluate(*loaded, TASK, out=tmp_path, batch_size=5)
        assert len(lines(file)) == 1 + 5 * run
        with file.open("a") as out:
            out.write('{"id": "colour-col')
    monkeypatch.setattr(asking, "answer", original)
    assert scores(evaluate(*loaded, TASK, out=tmp_path, batch_size=5)) == scores(unbroken[1])
    assert lines(file)[1:] == lines(unbroken[0] / "scenes.jsonl")[1:]


@pytest.mark.slow
def test_killed_at_three_random_points_and_resumed_equals_unbroken(unbroken, tmp_path):
    """The process is killed in the midst of its work (SIGKILL), three times, and started again in the same folder."""
    script = (
        "import sys, torch, mllm_vision as mv; from mllm_vision.eval import evaluate; torch.set_num_threads(1);"
        "evaluate(*mv.load('tiny-llava-scenes'), sys.argv[1], out=sys.argv[2], batch_size=1)"
    )
    command = [sys.executable, "-c", script, TASK, str(tmp_path)]
    file, total = tmp_path / "scenes.jsonl", unbroken[1].tasks["scenes"].questions
    points = sorted(random.Random(os.urandom(4)).sample(range(2, total - 2), 3))
    for point in points:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not file.exists() or len(file.read_bytes().splitlines()) <= point:
            assert process.poll() is None, f"finished before it could be killed at {point} of {points}"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "results.json").exists()
    written = len(lines(file)) - 1
    assert points[-1] <= written < total
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert scores(Evaluation.load(tmp_path / "results.json")) == scores(unbroken[1])
    assert lines(file)[1:] == lines(unbroken[0] / "scenes.jsonl")[1:]


def test_what_is_answered_is_not_asked_again(loaded, unbroken, tmp_path, monkeypatch):
    first = evaluate(*loaded, TASK, out=tmp_path, limit=7)
    asked = []
    monkeypatch.setattr(
        asking,
        "answer",
        lambda *args, _answer=asking.answer, **kw: asked.append(args[3]) or _answer(*args, **kw),
    )
    again = evaluate(*loaded, TASK, out=tmp_path)
    assert scores(again) == scores(unbroken[1])
    assert sum(map(len, asked)) == again.tasks["scenes"].questions - first.tasks["scenes"].questions


def test_a_smaller_run_leaves_the_answers_of_a_larger_one(loaded, unbroken, tmp_path):
    evaluate(*loaded, TASK, out=tmp_path)
    few = evaluate(*loaded, "scenes:questions=2:families=colour", out=tmp_path)
    assert few.tasks["scenes"].questions == 2
    by_id = {line["id"]: line for line in lines(tmp_path / "scenes.jsonl")[1:]}
    assert by_id == {line["id"]: line for line in lines(unbroken[0] / "scenes.jsonl")[1:]}


def test_other_settings_are_refused_in_the_same_folder(loaded, tmp_path):
    evaluate(*loaded, TASK, out=tmp_path, limit=3)
    model, processor = loaded
    with mv.using(model, HiPruneConfig(keep=9)):
        with pytest.raises(ValueError, match=r"results of another run: methods was \[\] and is \[\{'type': 'hiprune'"):
            evaluate(model, processor, TASK, out=tmp_path, limit=3)
        found = evaluate(model, processor, TASK, out=tmp_path, limit=3, overwrite=True)
    assert found.run["methods"] == [{"type": "hiprune", "keep": 9}]
    with pytest.raises(
        ValueError, match=r"methods was .*; decoding.temperature was 0.0 and is 1.0; decoding.seed was None and is 0"
    ):
        evaluate(model, processor, TASK, out=tmp_path, limit=3, decoding=Decoding(temperature=1.0))


def test_another_prompt_is_refused_in_the_same_folder(loaded, local, tmp_path):
    evaluate(*loaded, Local(), data=local.parent, out=tmp_path)
    rows = local / "rows.jsonl"
    rows.write_text(rows.read_text().replace("how many shapes", "how many stars", 1))
    with pytest.raises(ValueError, match="has an answer to question 0 of local, but to another prompt"):
        evaluate(*loaded, Local(), data=local.parent, out=tmp_path)


def test_bad_pictures_and_rows_are_counted_and_not_fatal(loaded, local, tmp_path):
    whole = evaluate(*loaded, Local(), data=local.parent).tasks["local"]
    image = local / "images" / "1.png"
    good = image.read_bytes()
    image.write_bytes(good[: len(good) // 2])
    (local / "images" / "4.png").unlink()
    with (local / "rows.jsonl").open("a") as rows:
        rows.write('{"id": 12, "image": "5.png"}\n{"id": 0, "text": "?", "answer": "", "image": "0.png"}\n"text"\n')
    found = evaluate(*loaded, Local(), data=local.parent, out=tmp_path / "out").tasks["local"]
    assert found.questions == 8
    assert list(found.faults) == ["row 8", "row 9", "row 12", "row 13", "row 14", "2", "3"]
    assert "there is no column 'text'; there are file, id, image" in found.faults["row 12"]
    assert "the id '0' is that of an earlier row" in found.faults["row 13"]
    assert "1.png is damaged or cut off" in found.faults["2"]
    assert "there is no 4.png in local or its images/" in found.faults["row 8"]
    kept = [i for i, unit in enumerate(whole.tallies.units) if unit not in ("1.png", "4.png")]
    assert found.tallies.groups["all"]["right"].tolist() == whole.tallies.groups["all"]["right"][kept].tolist()

    image.write_bytes(good)  # what was wrong is tried again
    again = evaluate(*loaded, Local(), data=local.parent, out=tmp_path / "out").tasks["local"]
    assert again.questions == 10
    assert "2" not in again.faults


def test_nothing_to_ask_is_an_error(loaded, local):
    for image in (local / "images").iterdir():
        image.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no question of local could be asked; the first: .*0.png is not an image"):
        evaluate(*loaded, Local(), data=local.parent)
    for image in (local / "images").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match=r"no question can be read from folder local; .*there is no 0.png in local"):
        evaluate(*loaded, Local(), data=local.parent)
    (local / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match="local: no question can be read from folder local; there are no rows"):
        evaluate(*loaded, Local(), data=local.parent)
    with pytest.raises(ValueError, match="nowhere/local is no folder; a local copy is"):
        evaluate(*loaded, Local(), data="nowhere")
    with pytest.raises(ValueError, match="local has no data set on the hub; give the folder of a local copy"):
        evaluate(*loaded, Local())


def test_a_limit_takes_whole_units_and_is_the_same_every_time(loaded, local):
    def asked(limit, seed=0):
        found = evaluate(*loaded, Local(), data={"local": local}, limit=limit, seed=seed, decoding=short).tasks["local"]
        assert found.tallies.groups["all"]["n"].tolist() == [2] * len(found.tallies.units)
        return found.tallies.units

    short = Decoding(max_new_tokens=1)
    assert len(asked(7)) == 3
    assert len(asked(1)) == 1
    assert asked(7) == asked(7) != asked(7, seed=1)
    assert asked(7) == sorted(asked(7))
    assert set(asked(3)) < set(asked(7))


def test_a_batch_that_is_too_large_for_the_memory_is_halved(loaded, unbroken, monkeypatch):
    sizes = []

    def small(model, processor, inputs, ids, _answer=asking.answer, **kwargs):
        sizes.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError
        return _answer(model, processor, inputs, ids, **kwargs)

    monkeypatch.setattr(asking, "answer", small)
    assert scores(evaluate(*loaded, TASK, batch_size=8)) == scores(unbroken[1])
    assert sizes[:7] == [8, 4, 2, 2, 4, 2, 2]

    monkeypatch.setattr(asking, "answer", lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(*loaded, TASK, limit=2)


def test_the_model_is_left_as_it_was(loaded):
    model, processor = loaded
    model.train()
    evaluate(model, processor, TASK, limit=2)
    assert model.training
    model.eval()


def test_a_picture_of_another_kind_is_asked_about_too(loaded, local):
    Image.open(local / "images" / "0.png").convert("RGBA").save(local / "images" / "0.png")
    Image.open(local / "images" / "1.png").convert("L").save(local / "images" / "1.png")
    assert evaluate(*loaded, Local(), data=local.parent).tasks["local"].faults == {}


def test_what_makes_no_sense_is_refused(loaded, tmp_path):
    with pytest.raises(ValueError, match="scenes is asked for twice"):
        evaluate(*loaded, ["scenes", Scenes()])
    with pytest.raises(ValueError, match=r"unknown task 'pop'; the tasks are .*pope.*scenes"):
        evaluate(*loaded, "pop")
    with pytest.raises(ValueError, match="batch_size and limit must be 1 or more, got 0 and None"):
        evaluate(*loaded, TASK, batch_size=0)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="a file is in the way"):
        evaluate(*loaded, TASK, out=tmp_path / "file")


def test_a_system_prompt_begins_every_prompt_and_is_reported(loaded, local, tmp_path):
    found = evaluate(*loaded, Local(), data=local.parent, out=tmp_path / "out", system="there is a red star.")
    assert found.run["system"] == "there is a red star."
    assert found.tasks["local"].prompt.startswith("SYSTEM: there is a red star. USER: <image>")
    with pytest.raises(ValueError, match=r"system was 'there is a red star.' and is None"):
        evaluate(*loaded, Local(), data=local.parent, out=tmp_path / "out")


def test_weights_that_have_changed_are_another_run(tmp_path):
    model, processor = mv.load("tiny-llava-scenes")
    evaluate(model, processor, TASK, out=tmp_path, limit=2)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight += 0.01
    with pytest.raises(
        ValueError, match=r"results of another run: weights was '\w{16}' and is '\w{16}'; choose another"
    ):
        evaluate(model, processor, TASK, out=tmp_path, limit=2)


def test_a_second_task_in_the_same_folder_joins_the_first(loaded, local, tmp_path):
    evaluate(*loaded, "scenes:questions=2:families=colour", out=tmp_path / "out")
    evaluate(*loaded, Local(), data=local.parent, out=tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(stored["tasks"]) == ["scenes", "local"]


def test_what_a_processor_cannot_take_is_a_fault_of_its_question(loaded, local, monkeypatch):
    """An empty question, marks that are not as many as the pictures, half a character, a reader that breaks."""
    rows = [json.loads(line) for line in (local / "rows.jsonl").read_text().splitlines()]
    for number, text in enumerate(("", "is <image> like <image>?", "\ud83d?")):
        rows[2 * number]["text"] = text
    (local / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(*loaded, Local(), data=local.parent, batch_size=5).tasks["local"]
    assert found.questions == 9
    assert list(found.faults) == ["0", "2", "4"]
    assert "the question is empty" in found.faults["0"]
    assert "2 <image> marks for 1 images" in found.faults["2"]


def test_a_task_that_cannot_be_asked_leaves_the_others_their_results(loaded, local):
    for image in (local / "images").iterdir():
        image.write_bytes(b"no picture")
    found = evaluate(*loaded, [Local(), "scenes:questions=2:families=colour"], data={"local": local})
    assert (found.tasks["local"].questions, len(found.tasks["local"].faults)) == (0, 12)
    assert found.tasks["local"].scores == {}
    assert found.tasks["scenes"].questions == 2
    with pytest.raises(ValueError, match="local is quoted by all, accuracy, and no such question was asked"):
        found.tasks["local"].headline  # noqa: B018
    assert "12 of 12 could not be asked" in str(found)


def test_arguments_that_are_a_matter_of_decoding_are_refused(loaded):
    for name, value in (("temperature", 0.7), ("do_sample", True), ("max_new_tokens", 4)):
        with pytest.raises(ValueError, match=rf"{name} cannot be passed on; say how to answer by decoding=Decoding"):
            evaluate(*loaded, TASK, **{name: value})
    with pytest.raises(ValueError, match=r"decoding must be a Decoding, as Decoding\(temperature=1.0\), got \{"):
        evaluate(*loaded, TASK, decoding={"temperature": 1})
    with pytest.raises(ValueError, match="stopping_criteria cannot be written down"):
        evaluate(*loaded, TASK, limit=1, stopping_criteria=[object()])


def test_a_generation_config_is_reported_by_what_it_says(loaded):
    found = evaluate(*loaded, TASK, limit=1, repetition_penalty=1.3)
    assert found.run["generate"] == {"repetition_penalty": 1.3}
    given = GenerationConfig(repetition_penalty=1.3)
    assert evaluate(*loaded, TASK, limit=1, generation_config=given).run["generate"] == {
        "generation_config": {"repetition_penalty": 1.3}
    }


def test_parts_that_are_frozen_stay_in_their_mode(loaded):
    model, processor = loaded
    model.train()
    model.model.vision_tower.eval()
    evaluate(model, processor, TASK, limit=1)
    assert not model.model.vision_tower.training
    assert model.model.language_model.training
    model.eval()


def test_machines_that_share_no_folder_go_on_together(unbroken, tmp_path):
    """Two processes, each with a folder of its own, of which each knows its own answers only."""
    (tmp_path / "run.py").write_text(
        """
import os, sys, mllm_vision as mv
from mllm_vision.eval import asking, evaluate
calls, original, (task, out, stop) = [], asking.answer, sys.argv[1:]
def answer(*args, **kwargs):
    calls.append(1)
    return os._exit(1) if len(calls) == int(stop) else original(*args, **kwargs)
asking.answer = answer
evaluate(*mv.load("tiny-llava-scenes"), task, out=out + os.environ["RANK"], batch_size=3)
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "run.py"), TASK, str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for stop, ends_well in (("2", False), ("0", True)):
        done = subprocess.run([*command, stop], capture_output=True, env=environment, timeout=120)
        assert (done.returncode == 0) == ends_well, done.stderr
    assert not (tmp_path / "out1" / "results.json").exists()
    assert scores(Evaluation.load(tmp_path / "out0" / "results.json")) == scores(unbroken[1])
