"""An adapter of less rank has the best approximation of every update, and nothing else of it changes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import mllm_vision as mv
from mllm_vision.eval.evaluation import fingerprint
from mllm_vision.recipes.adapter_rank import reduce_rank
from mllm_vision.recipes.train import train
from tests.hosts import HOSTS
from tests.recipes.runs import write_recipe
from tests.recipes.test_merging import trained
from tests.test_hosts import mixed_rows

LLAVA = HOSTS[0]
SPREAD = {"init_lora_weights": False}
"""Both matrices random, so that an update has all of its rank."""


def updates(model):
    """What LoRA adds to each weight."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


def logits(model):
    with torch.no_grad():
        return model(**LLAVA.inputs(*mixed_rows())).logits


def best(update, rank):
    """The nearest matrix of that rank."""
    u, s, v = torch.linalg.svd(update.double())
    return (u[:, :rank] * s[:rank] @ v[:rank]).float(), s.square()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_each_update_is_the_best_of_its_rank(checkpoint, tmp_path, options):
    model = trained(mv.load(checkpoint(LLAVA))[0], tmp_path / "two", checkpoint(LLAVA), options=SPREAD | options)
    kept = reduce_rank(tmp_path / "two", tmp_path / "one", 1)
    small, _ = mv.load(tmp_path / "one")
    expected = {name: best(update, 1) for name, update in updates(model).items()}
    for name, update in updates(small).items():
        assert_close(update, expected[name][0])
    squares = torch.stack([squares[:2] for _, squares in expected.values()]).sum(0)
    assert kept == pytest.approx((squares[0] / squares.sum()).item())
    assert 0.3 < kept < 0.95
    config = small.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (1, 1, False)


def test_nothing_changes_at_the_rank_there_is_or_above(checkpoint, tmp_path):
    model = trained(mv.load(checkpoint(LLAVA))[0], tmp_path / "two", checkpoint(LLAVA), options=SPREAD)
    for rank in (2, 100):
        assert reduce_rank(tmp_path / "two", tmp_path / str(rank), rank) == pytest.approx(1)
        assert_close(logits(mv.load(tmp_path / str(rank))[0]), logits(model), rtol=0, atol=1e-5)
        with pytest.raises(FileExistsError, match="is not empty"):
            reduce_rank(tmp_path / "two", tmp_path / str(rank), rank)


def test_what_is_trained_in_full_stays_and_all_is_stored_in_half(checkpoint, tmp_path):
    model = trained(mv.load(checkpoint(LLAVA))[0], tmp_path / "two", checkpoint(LLAVA), options=SPREAD)
    reduce_rank(tmp_path / "two", tmp_path / "half", dtype=torch.float16)
    whole, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "half"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(weight.half(), half[name]) for name, weight in whole.items())
    assert any("multi_modal_projector" in name for name in half)
    loaded, _ = mv.load(tmp_path / "half")
    assert_close(logits(loaded), logits(model), rtol=0, atol=1e-2)


def test_an_adapter_that_has_learnt_nothing(checkpoint, tmp_path):
    model, _ = mv.load(checkpoint(LLAVA))
    trained(model, tmp_path / "two", checkpoint(LLAVA))
    weights = load_file(tmp_path / "two" / "adapter_model.safetensors")
    save_file(
        {name: weight * ("lora_B" not in name) for name, weight in weights.items()},
        tmp_path / "two" / "adapter_model.safetensors",
    )
    assert reduce_rank(tmp_path / "two", tmp_path / "one", 1) == 1.0
    assert all(w.isfinite().all() for w in load_file(tmp_path / "one" / "adapter_model.safetensors").values())


@pytest.mark.parametrize(
    ("options", "rank", "said"),
    [
        ({"use_dora": True}, 1, "plain LoRA alone.*use_dora=True"),
        ({"rank_pattern": {"q_proj": 1}}, 1, "rank_pattern="),
        ({"init_lora_weights": "pissa"}, 1, "init_lora_weights='pissa'"),
        ({}, 0, "rank must be 1 or more, got 0"),
    ],
    ids=["dora", "pattern", "pissa", "zero"],
)
def test_what_cannot_be_cut_down_is_refused_and_nothing_is_written(checkpoint, tmp_path, options, rank, said):
    trained(mv.load(checkpoint(LLAVA))[0], tmp_path / "two", checkpoint(LLAVA), options=options)
    with pytest.raises(ValueError, match=said):
        reduce_rank(tmp_path / "two", tmp_path / "one", rank)
    assert not (tmp_path / "one").exists()


def test_a_recipe_hands_out_less_than_it_trained(tmp_path):
    output, cut = tmp_path / "out", ["publish_rank=1", "publish_dtype=float16", "task=scenes:questions=4:side=70"]
    folder = train(write_recipe(tmp_path), [f"output={output}", *cut])
    weights = load_file(folder / "adapter_model.safetensors")
    assert {len(weight) for name, weight in weights.items() if "lora_A" in name} == {1}
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert {len(w) for n, w in load_file(output / "lora" / "adapter_model.safetensors").items() if "lora_A" in n} == {4}
    assert not (folder / "stage.json").exists()
    facts = json.loads((folder / "scores.json").read_text())
    assert facts["rank"]["published"] == 1
    assert 0 < facts["rank"]["kept"] < 1
    assert facts["scores"]
    assert "LoRA of rank 1, " in (folder / "README.md").read_text()
    assert fingerprint(mv.load(folder)[0]) != fingerprint(mv.load(output / "lora")[0])
