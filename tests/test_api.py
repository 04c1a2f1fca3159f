"""The public verbs beyond the host matrix: other ways a live model may be wrapped, and errors."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import AutoConfig, BitsAndBytesConfig, LlavaForConditionalGeneration
from transformers import CLIPVisionModel as NotAHost

import mllm_vision as mv
from mllm_vision.api import find_host
from mllm_vision.reducers import DownsampleConfig, HiPruneConfig, RandomConfig
from mllm_vision.slots import CONFIG_VERSION, restored, stored
from tests.hosts import HOSTS, picture

LLAVA = next(host for host in HOSTS if host.name == "llava-clip")
INPUTS = LLAVA.inputs(("What is {} here?", [picture(1)]), ("Is there a red circle in {}?", [picture(2)]))
GREEDY = {"max_new_tokens": 4, "do_sample": False}
HALF = HiPruneConfig(keep=0.5)


def answer(model):
    return model.generate(**INPUTS, **GREEDY)


def test_a_dispatched_model_keeps_its_device_hook():
    expected = answer(mv.apply(LLAVA.model(), HALF))
    model = LLAVA.model()
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    hook, stock = model._hf_hook, answer(model)
    assert torch.equal(answer(mv.apply(model, HALF)), expected)
    assert model(**INPUTS).logits.shape[1] == INPUTS["input_ids"].shape[1] - 18
    assert model._hf_hook is hook
    assert torch.equal(answer(mv.remove(model)), stock)
    assert model._hf_hook is hook


def test_a_model_dispatched_over_devices_and_disk_keeps_its_answers(tmp_path):
    expected = answer(mv.apply(LLAVA.model(), HALF))
    parts = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    }
    model = dispatch_model(LLAVA.model(), parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert torch.equal(answer(mv.apply(model, HALF)), expected)


def test_a_quantised_model_is_pruned(tmp_path):
    config = copy.deepcopy(LLAVA.model().config)
    for part in (config.vision_config, config.text_config):  # 4-bit kernels want multiples of 64 channels
        part.hidden_size, part.intermediate_size = 64, 128
    config.text_config.head_dim = 16
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=four_bit)
    stock = answer(model)
    mv.apply(model, HALF)
    with torch.no_grad():
        assert model(**INPUTS).logits.shape[1] == INPUTS["input_ids"].shape[1] - 18
    assert answer(model).shape[0] == len(stock)
    assert torch.equal(answer(mv.remove(model)), stock)


def test_a_replaced_forward_is_refused_rather_than_ignored():
    model = LLAVA.model()
    model.forward = model.forward
    with pytest.raises(ValueError, match=r"forward has been replaced .* apply methods before that"):
        mv.apply(model, HALF)


def test_a_subclass_is_refused():
    class Mine(LlavaForConditionalGeneration):
        pass

    model = LLAVA.model()
    model.__class__ = Mine
    with pytest.raises(ValueError, match="an instance of LlavaForConditionalGeneration itself, got its subclass Mine"):
        mv.apply(model, HALF)


def test_a_refused_method_leaves_the_model_as_it_was():
    model = mv.apply(LLAVA.model(), HALF)
    expected = answer(model)
    with pytest.raises(ValueError, match=r"keep must be in 1..36"):
        mv.apply(model, HiPruneConfig(keep=37))
    with pytest.raises(ValueError, match=r"only one method can resize the image, .* downsample, downsample"):
        mv.apply(model, DownsampleConfig(keep=9), DownsampleConfig(keep=4))
    with pytest.raises(TypeError, match=r"expected a method config such as HiPruneConfig\(keep=192\), got 'hiprune'"):
        mv.apply(model, "hiprune")
    assert torch.equal(answer(model), expected)


def test_using_restores_what_was_there_even_after_an_error():
    model = mv.apply(LLAVA.model(), HALF)

    def kept():
        return len(mv.inspect_tokens(model, **INPUTS)[0].patch_index)

    def fail():
        with mv.using(model, RandomConfig(keep=3)):
            with mv.using(model):
                assert kept() == 36
            assert kept() == 3
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.vision_slots.methods == [HALF]


def test_copies_and_pickles_keep_their_methods():
    model = mv.apply(LLAVA.model(), HALF)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = answer(model)
    for twin in twins:
        assert torch.equal(answer(twin), expected)
        mv.remove(twin)
        assert type(twin) is LlavaForConditionalGeneration
    assert torch.equal(answer(model), expected)


def test_inspect_says_what_was_kept_and_why():
    model = mv.apply(LLAVA.model(), HiPruneConfig(keep=12, alpha=0.5))
    first, second = mv.inspect_tokens(model, **INPUTS)
    assert (first.image, second.image, first.tile, first.grid) == (0, 1, 0, (6, 6))
    assert first.patch_index.tolist() == sorted(set(first.patch_index.tolist()))
    assert first.patch_count.tolist() == [1] * 12
    assert sorted(set(first.roles)) == ["anchor", "buffer", "register"]
    assert first.roles.count("anchor") == round(12 * 0.5 / 5)


def test_inspect_needs_an_image():
    with pytest.raises(ValueError, match="there is no image in the inputs: pixel_values is missing"):
        mv.inspect_tokens(LLAVA.model(), input_ids=INPUTS["input_ids"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values_videos": torch.zeros(1)}, "images and videos in one call"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(2, 50, 48)},
            "got inputs_embeds: pass the ids alone",
        ),
        ({"inputs_embeds": torch.zeros(2, 50, 48)}, "got input_ids and inputs_embeds: pass the ids alone"),
        ({"input_ids": None}, "images need input_ids, whose placeholders are fitted to them, got none"),
        ({"attention_mask": torch.ones(2, 1, 50, 50)}, r"attention_mask must be \(batch, length\)"),
    ],
)
def test_inputs_that_cannot_be_fitted_are_refused(change, message):
    model = mv.apply(LLAVA.model(), HALF)
    with pytest.raises(ValueError, match=message):
        model._fitted({**INPUTS, **change}, generating=False)


def test_nothing_supported_inside_is_an_error_that_lists_the_supported():
    tower = LLAVA.model().model.vision_tower
    assert type(tower) is NotAHost
    with pytest.raises(ValueError, match=r"CLIPVisionModel is not a supported host .* LlavaForConditionalGeneration"):
        find_host(tower)


def test_slots_of_a_later_version_are_refused():
    later = stored([HALF]) | {"version": CONFIG_VERSION + 1}
    with pytest.raises(ValueError, match=r"config\.json has slots of version 2, this mllm_vision reads 1"):
        restored(later)


def test_a_saved_config_names_its_methods(tmp_path):
    mv.apply(LLAVA.model(), HALF, RandomConfig(keep=5, seed=3)).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "mllm_vision_llava"
    assert config.mllm_vision == {
        "version": 1,
        "operations": [{"type": "hiprune", "keep": 0.5}, {"type": "random", "keep": 5, "seed": 3}],
    }


def test_load_validates_before_it_reads_a_weight(tmp_path):
    folder = LLAVA.save(tmp_path / "llava")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"keep must be in 1..36, the visual tokens of an image, got 37"):
        mv.load(folder, HiPruneConfig(keep=37))


def test_an_old_transformers_is_refused_with_the_remedy():
    script = (
        "import importlib.metadata as m; stock = m.version\n"
        "m.version = lambda name: '5.17.0' if name == 'transformers' else stock(name)\n"
        "import mllm_vision"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "mllm_vision needs transformers 5.18 or newer, found 5.17.0: pip install -U" in run.stderr


@pytest.mark.parametrize("name", [".", "..", "tiny-llava-scenes/..", ""])
def test_only_a_name_is_that_of_a_checkpoint_that_comes_along(name):
    assert mv.api.source_of(name) == name
    assert mv.api.source_of("tiny-llava-scenes") == mv.api.CHECKPOINTS / "tiny-llava-scenes"


@pytest.mark.parametrize("name", ["/no/such/folder", "./pruned", "../pruned", "~/pruned", "runs/no_such_lora/model"])
def test_a_folder_that_is_not_there_is_called_so(name):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}"):
        mv.load(name)
