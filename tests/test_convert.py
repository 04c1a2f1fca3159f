"""The engine of conversions: files, LoRA, whole folders or none; and the command."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

from mllm_vision import convert as engine
from mllm_vision.cli import app
from tests.authors import VOCABULARY, config_of_theirs, names_of_theirs, stock, write_checkpoint, write_tower


@pytest.fixture(scope="module")
def reference():
    return stock()


@pytest.fixture(scope="module")
def written(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    config = config_of_theirs(reference, write_tower(folder / "clip", reference))
    return write_checkpoint(folder / "original", config, names_of_theirs(reference, tower=False))


@pytest.fixture
def source(written, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(written, tmp_path / "original")


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def error_of(result):
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


def test_the_command_writes_a_model_and_says_so(source, tmp_path, reference):
    result = run("llava", source, tmp_path / "deep" / "out")
    assert result.exit_code == 0, result.output
    parameters = sum(weight.numel() for weight in reference.parameters())
    assert result.stdout == (
        f"llava, mlp2x_gelu projector; {parameters:,} parameters in float32: {tmp_path / 'deep' / 'out'}\n"
    )
    files = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= files
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_command_passes_its_options_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(engine, "convert", lambda *args, **kwargs: calls.append((args, kwargs)) or "done")
    run("llava-sp", "src", tmp_path, "--base", "vicuna", "--tower", "clip", "--overwrite")
    assert calls == [(("llava-sp", "src", tmp_path), {"base": "vicuna", "tower": "clip", "overwrite": True})]


def test_errors_are_one_line(source, tmp_path):
    assert "unknown layout 'lava'; there are llava, llava-sp, llava-uhd" in error_of(
        run("lava", source, tmp_path / "out")
    )
    assert "'no/such-model' is no folder here" in error_of(run("llava", "no/such-model", tmp_path / "out"))
    assert "give a folder or a hub id" in error_of(run("llava", tmp_path / "nothing", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json, so it is no checkpoint" in error_of(
        run("llava", tmp_path / "empty", tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused(source, tmp_path):
    shard = source / "pytorch_model-00002-of-00002.bin"
    torch.save({"model.norm.weight": Malicious(tmp_path / "ran")}, shard)
    error = error_of(run("llava", source, tmp_path / "out"))
    assert f"{shard} is refused: it is damaged, or holds more than tensors and could run code" in error
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["pytorch_model-00002-of-00002.bin", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 cut off"])
def test_damaged_files_are_refused(source, tmp_path, file, content):
    (source / file).write_bytes(content)
    assert f"{file} is refused: it is damaged" in error_of(run("llava", source, tmp_path / "out"))


def test_other_things_than_tensors_are_refused(source, tmp_path):
    torch.save({"epoch": 3}, source / "pytorch_model-00002-of-00002.bin")
    assert "must hold tensors by name" in error_of(run("llava", source, tmp_path / "out"))


def test_files_that_are_missing_are_named(source, tmp_path):
    shard = source / "pytorch_model-00002-of-00002.bin"
    shard.unlink()
    assert f"{shard} is missing; get the whole checkpoint" in error_of(run("llava", source, tmp_path / "out"))
    (source / "pytorch_model.bin.index.json").unlink()
    error = error_of(run("llava", source, tmp_path / "out"))
    assert "has no weights: expected one of model.safetensors.index.json, model.safetensors, pytorch_model.bin" in error


def test_a_tokenizer_that_is_missing_is_named(source, tmp_path):
    (source / "tokenizer.model").unlink()
    error = error_of(run("llava", source, tmp_path / "out"))
    assert "original has no tokenizer: expected tokenizer.json or tokenizer.model" in error


def test_pickles_of_the_old_format_are_read(source, tmp_path, reference):
    for shard in source.glob("*.bin"):
        torch.save(torch.load(shard), shard, _use_new_zipfile_serialization=False)
    engine.convert("llava", str(source), tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert_close(model.lm_head.weight[:VOCABULARY], reference.lm_head.weight[:VOCABULARY], rtol=0, atol=0)


def test_a_folder_with_something_in_it_is_kept(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    engine.convert("llava", str(source), out)  # an empty one is filled
    (out / "mine.txt").write_text("x")
    assert "out is not empty; choose another folder" in error_of(run("llava", source, out))
    assert run("llava", source, out, "--overwrite").exit_code == 0
    assert not (out / "mine.txt").exists() and (out / "config.json").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    error = error_of(run("llava", source, tmp_path / "other", "--overwrite"))
    assert "holds something other than a model and is not removed" in error
    assert "is not empty" in error_of(run("llava", source, source / "config.json"))


def test_a_failure_leaves_what_was_there(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    engine.convert("llava", str(source), out)
    before = {path: path.read_bytes() for path in out.iterdir()}

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr("transformers.LlavaProcessor.save_pretrained", fail)
    for target in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="the disk is full"):
            engine.convert("llava", str(source), target, overwrite=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "out"]


def test_a_base_without_lora_is_refused(source, tmp_path):
    error = error_of(run("llava", source, tmp_path / "out", "--base", source))
    assert "a base belongs to a LoRA" in error and "it has no adapter_config.json" in error


def test_a_hub_id_is_downloaded(source, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    engine.convert("llava", "liuhaotian/llava-v1.5-7b", tmp_path / "out")
    assert asked == [("liuhaotian/llava-v1.5-7b", ["*.json", "*.model", "*.safetensors", "*.bin"])]


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": ""}
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")


@pytest.fixture
def lora(source, tmp_path):
    """A LoRA on one matrix of a base that is a whole LLaVA, with a projector of its own."""
    folder = tmp_path / "lora"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | {"base_model_name_or_path": str(source)}))
    save_file({A: torch.eye(48)[:2], B: torch.eye(48)[:, :2].contiguous()}, folder / "adapter_model.safetensors")
    torch.save({"base_model.model.model.mm_projector.0.bias": torch.ones(48)}, folder / "non_lora_trainables.bin")
    return folder


def test_a_lora_on_a_whole_model_changes_what_it_trained(lora, tmp_path, reference):
    (lora / "adapter_model.safetensors").rename(lora / "kept")
    torch.save(load_file(lora / "kept"), lora / "adapter_model.bin")
    engine.convert("llava", str(lora), tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    expected = reference.state_dict()
    expected["model.multi_modal_projector.linear_1.bias"] = torch.ones(48)
    key = "model.language_model.layers.0.self_attn.q_proj.weight"
    expected[key] = expected[key] + 2 * torch.diag(torch.tensor([1.0] * 2 + [0.0] * 46))
    for name, weight in model.state_dict().items():
        rows = VOCABULARY if len(weight) == 384 else len(weight)
        assert_close(weight[:rows], expected[name][:rows])


def test_the_base_may_be_elsewhere_and_must_be_somewhere(lora, source, tmp_path):
    settings = LORA | {"base_model_name_or_path": "/root/vicuna"}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    error = error_of(run("llava", lora, tmp_path / "out"))
    assert "'/root/vicuna' is no folder here" in error and "--base DIR" in error
    assert run("llava", lora, tmp_path / "out", "--base", source).exit_code == 0


def test_the_base_may_be_named_by_config_json_alone(lora, source, tmp_path):
    (lora / "adapter_config.json").write_text(json.dumps(LORA))
    config = json.loads((lora / "config.json").read_text()) | {"_name_or_path": str(source)}
    (lora / "config.json").write_text(json.dumps(config))
    assert run("llava", lora, tmp_path / "out").exit_code == 0


def test_a_lora_with_a_tokenizer_of_its_own_keeps_it(lora, source, tmp_path):
    shutil.copy(source / "tokenizer.model", lora)
    (lora / "added_tokens.json").write_text(json.dumps({"<im_patch>": VOCABULARY}))
    engine.convert("llava", str(lora), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<im_patch>", "<image>"]) == [VOCABULARY, VOCABULARY + 1]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({A: torch.ones(2, 48)}, f"the keys of the LoRA and its base do not fit: 1 missing ({B})"),
        (
            {key.replace("layers.0", "layers.7"): torch.ones(2, 48) for key in (A, B)},
            "1 missing (model.layers.7.self_attn.q_proj.weight)",
        ),
        ({A: torch.ones(2, 48), B: torch.ones(48, 2), "lora_magnitude": torch.ones(2)}, "1 surplus (lora_magnitude)"),
    ],
)
def test_lora_keys_that_do_not_fit_are_named(lora, tmp_path, weights, message):
    save_file(weights, lora / "adapter_model.safetensors")
    assert message in error_of(run("llava", lora, tmp_path / "out"))


@pytest.mark.parametrize("odd", [{"peft_type": "IA3"}, {"use_dora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_other_adapters_than_plain_lora_are_refused(lora, source, tmp_path, odd):
    (lora / "adapter_config.json").write_text(json.dumps(LORA | {"base_model_name_or_path": str(source)} | odd))
    assert "expected a plain LoRA, got" in error_of(run("llava", lora, tmp_path / "out"))


def test_lora_needs_what_was_trained_beside_it(lora, tmp_path):
    (lora / "non_lora_trainables.bin").unlink()
    assert "lora has no non_lora_trainables.bin" in error_of(run("llava", lora, tmp_path / "out"))


def test_the_checkpoint_itself_is_not_replaced(tmp_path):
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is the checkpoint itself"):
        engine.convert("llava", str(tmp_path), tmp_path, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(FileExistsError, match="is a link or the current folder"):
        engine.convert("llava", "elsewhere", tmp_path / "link", overwrite=True)
    assert (tmp_path / "processor_config.json").exists()
