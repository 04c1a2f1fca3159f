"""The model of lmms-eval: on its own with a stand-in for lmms-eval's base class, and whole where lmms-eval is there."""

import importlib
import json
import os
import random
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

import mllm_vision as mv
from mllm_vision.eval.answers import Decoding
from mllm_vision.prompts import question_parts, write_prompt
from mllm_vision.reducers import DownsampleConfig, HiPruneConfig
from mllm_vision.scenes import FAMILIES, render, sample_scene

MODEL = "tiny-llava-scenes"
TASKS = Path(__file__).parent / "lmms_tasks"
HIPRUNE = "hiprune:keep=33:alpha=0.2"
HERE = find_spec("lmms_eval") is not None


class StandIn:
    """What `MllmVision` inherits from lmms-eval's base class."""

    def __init__(self):
        self.task_dict = {}

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size


@pytest.fixture
def lmms(monkeypatch):
    """The plug-in, on lmms-eval's own base class where it is installed."""
    if not HERE:
        contents = {"lmms_eval.api.model": {"lmms": StandIn}, "lmms_eval.api.instance": {"Instance": object}}
        for name in ("lmms_eval", "lmms_eval.api", *contents):
            module = ModuleType(name)
            vars(module).update(contents.get(name, {}))
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "mllm_vision.eval.lmms", raising=False)
    yield importlib.import_module("mllm_vision.eval.lmms")
    if not HERE:
        del sys.modules["mllm_vision.eval.lmms"]


@cache
def asked(scenes=1):
    """Pictures, question and answer: what can be asked about each of some scenes, about none, about two at once."""
    rng, drawn = random.Random(0), [sample_scene("test", index) for index in range(3, scenes + 4)]
    about = [(scene, question) for scene in drawn[:-1] for ask in FAMILIES.values() if (question := ask(scene, rng))]
    single = [([render(scene)], question.text, question.answer) for scene, question in about]
    both = [render(scene) for scene in drawn[:2]]
    return [*single[:2], ([], "what is printed?", "stop"), (both, "how many stars are there?", "2"), *single[2:]]


@cache
def answers_one_by_one(reduce=None, *, scenes=1, max_new_tokens=6, **generate):
    """Of the model itself, greedily, without lmms-eval and without batches."""
    model, processor = mv.load(MODEL, *([HiPruneConfig(keep=33, alpha=0.2)] if reduce == HIPRUNE else []))
    answers = []
    for pictures, text, _ in asked(scenes):
        prompt = write_prompt(processor, question_parts(text, len(pictures)))
        inputs = processor(images=pictures or None, text=prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **generate)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new, skip_special_tokens=True)
    return answers


def request(settings, document):
    """As lmms-eval makes it for a chat model: (context, messages of a document, settings, document, task, split)."""
    return SimpleNamespace(args=("unused", messages, settings, document, "scenes", "test"))


def messages(document):
    pictures, text, _ = document
    content = [{"type": "image", "url": picture} for picture in pictures] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def test_methods_are_plugged_in_as_written(lmms):
    model = lmms.MllmVision(MODEL, reduce=f"downsample:keep=1/2+{HIPRUNE}", device="cpu").model
    assert model.vision_slots.methods == [DownsampleConfig(keep=0.5), HiPruneConfig(keep=33, alpha=0.2)]


@pytest.mark.parametrize("batch_size", [1, "4"])
@pytest.mark.parametrize("reduce", [None, HIPRUNE])
def test_requests_are_answered_in_order_whatever_shares_a_batch(lmms, batch_size, reduce):
    model = lmms.MllmVision(MODEL, reduce=reduce, device="cpu", batch_size=batch_size)
    model.task_dict = {"scenes": {"test": asked()}}
    long, short = ({"max_new_tokens": n, "temperature": 0.0, "until": ["\n\n"]} for n in (6, 1))
    requests = [request(long if i % 3 else short, i) for i in range(len(asked()))]
    whole, begun = answers_one_by_one(reduce), answers_one_by_one(reduce, max_new_tokens=1)
    assert whole != begun
    assert model.generate_until(requests) == [whole[i] if i % 3 else begun[i] for i in range(len(whole))]


def test_a_stop_string_of_the_task_ends_an_answer(lmms):
    model = lmms.MllmVision(MODEL, device="cpu", batch_size=20)
    model.task_dict = {"scenes": {"test": asked()}}
    settings = {"max_new_tokens": 6, "do_sample": False, "until": "o"}
    expected = [answer.split("o")[0] for answer in answers_one_by_one()]
    assert expected != answers_one_by_one()
    assert model.generate_until([request(settings, i) for i in range(len(asked()))]) == expected


def test_generate_gets_the_other_settings_of_a_task(lmms):
    model = lmms.MllmVision(MODEL, device="cpu", batch_size=20)
    model.task_dict = {"scenes": {"test": asked()}}
    settings = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 4}
    expected = [answer.strip() for answer in answers_one_by_one(min_new_tokens=4)]
    assert expected != answers_one_by_one()
    assert model.generate_until([request(settings, i) for i in range(len(asked()))]) == expected


def test_the_first_stop_string_cuts_and_a_blank_line_does_not(lmms):
    text = "Yes.\n\nIt is red. USER: and this?"
    assert lmms.cut(text, ["\n\n"]) == lmms.cut(text, None) == lmms.cut(text, []) == lmms.cut(text, "") == text
    assert lmms.cut(text, ["USER:", "\n\n", "red"]) == lmms.cut(text, ["red", "USER:"]) == "Yes.\n\nIt is "


@pytest.mark.parametrize(
    ("settings", "decoding", "others"),
    [
        (
            {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
            {"max_new_tokens": 128},
            {},
        ),
        ({"until": ["\n\n"]}, {}, {}),
        ({"top_p": 0, "top_k": 5, "temperature": 0}, {}, {}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5}, {}),
        ({"temperature": 0.7, "do_sample": False}, {}, {}),
        ({"temperature": 0, "do_sample": True}, {}, {}),
        ({"do_sample": True, "top_p": None}, {"temperature": 1.0}, {}),
        ({"num_beams": 3, "repetition_penalty": 1.2}, {"num_beams": 3}, {"repetition_penalty": 1.2}),
    ],
)
def test_settings_of_a_task_become_a_decoding(lmms, settings, decoding, others):
    before = dict(settings)
    assert lmms.decoding_of(settings) == (Decoding(**decoding, seed=torch.initial_seed()), others)
    assert settings == before


def test_a_setting_for_other_models_is_left_out_and_said(lmms, caplog):
    _, others = lmms.decoding_of({"image_aspect_ratio": "original", "max_new_tokens": 2, "until": []})
    assert (others, caplog.messages) == ({}, ["generate has no argument image_aspect_ratio; ignored"])


def test_samples_follow_the_seed_and_not_the_batch_and_a_repeated_question_is_drawn_anew(lmms):
    model = lmms.MllmVision(MODEL, device="cpu")
    model.task_dict = {"scenes": {"test": asked()[:2]}}
    requests = [request({"max_new_tokens": 6, "temperature": 3.0}, document) for document in (0, 1, 0, 0)]
    drawn = {}
    for seed, batch_size in ((1, 1), (1, 4), (2, 4)):
        torch.manual_seed(seed)
        model.batch_size = batch_size
        drawn[seed, batch_size] = model.generate_until(requests)
    assert drawn[1, 1] == drawn[1, 4] != drawn[2, 4]
    assert len(set(drawn[1, 1])) == 4


def test_a_message_keeps_its_order_and_its_images_are_read(lmms, tmp_path):
    red, blue = Image.new("RGBA", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    blue.save(tmp_path / "blue.png")
    images, file = [], str(tmp_path / "blue.png")
    text, first, second = (
        {"type": "text", "text": "Is "},
        {"type": "image", "url": red},
        {"type": "image", "url": file},
    )
    turn = lmms.turn_of({"role": "assistant", "content": [first, text, second]}, images)
    assert turn == {"role": "assistant", "content": [{"type": "image"}, text, {"type": "image"}]}
    assert [(image.mode, image.getpixel((0, 0))) for image in images] == [("RGB", (255, 0, 0)), ("RGB", (0, 0, 255))]
    marked = {"role": "user", "content": [first, second, {"type": "text", "text": "Is <image> in <image>?"}]}
    assert lmms.turn_of(marked, [red])["content"] == question_parts("Is <image> in <image>?", 2)


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_a_video_or_a_sound_is_refused(lmms, kind):
    with pytest.raises(ValueError, match=f"takes images and text, got {kind}; choose a task of images"):
        lmms.turn_of({"role": "user", "content": [{"type": kind, "url": "x.mp4"}]}, [])


def test_turns_follow_the_chat_template_and_without_one_there_is_one(lmms):
    model = lmms.MllmVision(MODEL, device="cpu")
    turns = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant", "user")]
    assert model.prompt(turns) == model.processor.apply_chat_template(turns, add_generation_prompt=True)
    assert model.prompt(turns[1:2]) == model.processor.apply_chat_template(turns[1:2], add_generation_prompt=True)
    model.processor.chat_template = None
    assert model.prompt(turns[:1]) == "USER: user ASSISTANT:"
    with pytest.raises(ValueError, match="takes one turn of a user, got user, assistant, user"):
        model.prompt(turns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"colour": "red", "max_batch_size": 8},
            "mllm_vision has no colour, max_batch_size; its arguments are pretrained, ",
        ),
        ({"batch_size": "auto"}, "batch_size must be a whole number of 1 or more, got 'auto'"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"device": "cpu", "device_map": "auto"}, "got device=cpu and device_map=auto; leave one of them out"),
        ({"reduce": "hiprunes:keep=3"}, "unknown method 'hiprunes'"),
        ({"decode": HIPRUNE}, "hiprune is a method of kind reducer, not decoding"),
    ],
)
def test_a_wrong_argument_is_refused_before_the_model_is_loaded(lmms, arguments, message, monkeypatch):
    monkeypatch.setattr(mv, "load", None)
    with pytest.raises(ValueError, match=message):
        lmms.MllmVision(MODEL, **arguments)


def test_the_dtype_goes_by_either_name(lmms):
    for name in ("dtype", "torch_dtype"):
        assert str(lmms.MllmVision(MODEL, device="cpu", **{name: "bfloat16"}).model.dtype) == "torch.bfloat16"


def test_a_device_goes_before_that_of_the_process(lmms, monkeypatch):
    alone = SimpleNamespace(process_index=0, num_processes=1, device="meta", free_memory=lambda: None)
    monkeypatch.setattr(lmms, "Accelerator", lambda: alone)
    for name in ("device", "device_map"):
        assert str(lmms.MllmVision(MODEL, **{name: "cpu"}).device) == "cpu"


def test_each_of_several_processes_loads_on_its_own_device(lmms, monkeypatch):
    second = SimpleNamespace(process_index=1, num_processes=2, device="cpu", free_memory=lambda: None)
    monkeypatch.setattr(lmms, "Accelerator", lambda: second)
    model = lmms.MllmVision(MODEL)
    assert (model.rank, model.world_size, str(model.device), model.accelerator) == (1, 2, "cpu", second)
    with pytest.raises(ValueError, match="each of several processes has its own device; leave out device"):
        lmms.MllmVision(MODEL, device="cpu")


def test_what_it_cannot_do_is_said(lmms):
    model = lmms.MllmVision(MODEL, device="cpu")
    with pytest.raises(
        NotImplementedError, match=r"scores no given answers .* choose a task of output_type generate_until"
    ):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="does not answer in rounds"):
        model.generate_until_multi_round([])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where lmms-eval is run: pictures, and the questions that lmms_tasks/scenes.yaml reads."""
    folder = tmp_path_factory.mktemp("lmms")
    lines = []
    for i, (pictures, text, answer) in enumerate(asked(3)):
        names = [f"{i}-{j}.png" for j in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            picture.save(folder / name)
        lines.append(json.dumps({"images": names, "question": text, "answer": answer}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def run(folder, *command):
    """A module's command line in ``folder``, on CPU and offline. lmms-eval ends with 0 even when it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, cwd=folder, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0 and "Error during evaluation" not in done.stdout, done.stdout + done.stderr


def logged(folder):
    """The answers in the log of samples, in the order of the questions, and the score."""
    (samples,) = folder.glob("*/*_samples_scenes.jsonl")
    (results,) = folder.glob("*/*_results.json")
    found = {sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, samples.open())}
    answers = [found[i] if isinstance(found[i], str) else found[i][0] for i in range(len(found))]
    return answers, json.loads(results.read_text())["results"]["scenes"]["right,none"]


def expected(reduce=None):
    answers = [answer.strip() for answer in answers_one_by_one(reduce, scenes=3)]
    right = [said.removesuffix(".") == answer for said, (*_, answer) in zip(answers, asked(3), strict=True)]
    return answers, pytest.approx(sum(right) / len(right))


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="needs lmms-eval 0.7.3 or later")
def test_lmms_eval_runs_a_task_with_and_without_pruning_in_batches_of_one_and_eight(folder):
    runs = [(reduce, batch_size) for reduce in ("", f",reduce={HIPRUNE}") for batch_size in (1, 8)]
    config = [
        {
            "model": "mllm_vision",
            "model_args": f"pretrained={MODEL}{reduce}",
            "tasks": "scenes",
            "include_path": str(TASKS),
            "batch_size": batch_size,
            "output_path": f"run-{i}",
            "log_samples": True,
        }
        for i, (reduce, batch_size) in enumerate(runs)
    ]
    (folder / "runs.yaml").write_text(yaml.safe_dump(config))
    run(folder, "lmms_eval", "--config", "runs.yaml")
    stock, pruned = expected(), expected(HIPRUNE)
    assert stock != pruned
    assert [logged(folder / f"run-{i}") for i in range(4)] == [stock, stock, pruned, pruned]


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="needs lmms-eval 0.7.3 or later")
def test_lmms_eval_shares_a_task_among_processes(folder):
    command = f"--model mllm_vision --model_args pretrained={MODEL},reduce={HIPRUNE} --tasks scenes --batch_size 4"
    where = ["--include_path", str(TASKS), "--output_path", "shared", "--log_samples"]
    run(folder, "torch.distributed.run", "--nproc_per_node", "2", "-m", "lmms_eval", *command.split(), *where)
    assert logged(folder / "shared") == expected(HIPRUNE)
