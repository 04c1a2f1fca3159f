"""An adapter and its base as a plain folder: the same logits, without PEFT."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_vision as mv
from mllm_vision.adapter_folder import save_adapter
from mllm_vision.host import adapter_for
from mllm_vision.projectors import PatchMergerConfig, SpatialTokensConfig
from mllm_vision.recipes.lora import LoraSpec, with_lora
from mllm_vision.recipes.merging import merge
from mllm_vision.recipes.quantisation import quantised
from mllm_vision.reducers import HiPruneConfig
from tests.hosts import HOSTS
from tests.test_cli import error_of, run
from tests.test_hosts import mixed_rows

LLAVA = HOSTS[0]
PRUNED = (HiPruneConfig(keep=1 / 3),)
METHODS = {"stock": (), "spatial-tokens": (SpatialTokensConfig(channels=8, scales=3), *PRUNED)}
KINDS = {"plain": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def trained(base, folder, name, target="language", trains=("projector",), options=None):
    """A model with an adapter whose weights are random, which is saved in ``folder``."""
    lora = with_lora(base, LoraSpec(target=target, r=2, alpha=4, options=options or {}), trains).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(lora, folder, name)
    return lora


def same(host, lora, folder):
    """Assert that the model in ``folder`` has the logits of ``lora``, to 1e-4 in float32."""
    merged, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    inputs = host.inputs(*mixed_rows())
    with torch.no_grad():
        assert_close(merged(**inputs).logits, lora(**inputs).logits, rtol=0, atol=1e-4)
    return merged


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_merged_has_the_logits_of_unmerged(host, checkpoint, tmp_path, methods):
    base, _ = mv.load(checkpoint(host), *methods)
    lora = trained(base, tmp_path / "adapter", checkpoint(host), ["language", "tower"])
    assert merge(tmp_path / "adapter", tmp_path / "merged") == tmp_path / "merged"
    merged = same(host, lora, tmp_path / "merged")
    assert type(merged) is type(mv.api.find_host(lora))
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
    assert mv.load(tmp_path / "merged")[1].tokenizer.get_vocab() == host.processor.tokenizer.get_vocab()


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_kind_of_lora_is_merged(checkpoint, tmp_path, options):
    lora = trained(mv.load(checkpoint(LLAVA))[0], tmp_path / "adapter", checkpoint(LLAVA), "all", (), options)
    merge(tmp_path / "adapter", tmp_path / "merged")
    same(LLAVA, lora, tmp_path / "merged")


def test_a_projector_in_the_stock_ones_place_is_merged_with_its_weights(checkpoint, tmp_path):
    base, _ = mv.load(checkpoint(LLAVA), PatchMergerConfig())
    lora = trained(base, tmp_path / "adapter", checkpoint(LLAVA))
    merge(tmp_path / "adapter", tmp_path / "merged")
    same(LLAVA, lora, tmp_path / "merged")


def test_the_base_may_have_moved(checkpoint, tmp_path):
    lora = trained(mv.load(checkpoint(LLAVA))[0], tmp_path / "adapter", tmp_path / "gone")
    with pytest.raises(ValueError, match=r"was trained on .*gone, which is not to be had here; .* merge --base"):
        mv.load(tmp_path / "adapter")
    result = run("merge", tmp_path / "adapter", tmp_path / "merged", "--base", checkpoint(LLAVA))
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "merged")
    same(LLAVA, lora, tmp_path / "merged")
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_token == "<image>"
    assert "is not empty" in error_of(run("merge", tmp_path / "adapter", tmp_path / "merged"))
    again = run(
        "merge",
        tmp_path / "adapter",
        tmp_path / "merged",
        "--base",
        checkpoint(LLAVA),
        "--dtype",
        "bfloat16",
        "--overwrite",
    )
    assert again.exit_code == 0, again.output
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_an_adapter_that_comes_along_is_merged_by_its_name(checkpoint, tmp_path, monkeypatch):
    lora = trained(mv.load(checkpoint(LLAVA))[0], tmp_path / "bundled" / "mine", checkpoint(LLAVA))
    monkeypatch.setattr(mv.api, "CHECKPOINTS", tmp_path / "bundled")
    merge("mine", tmp_path / "merged")
    same(LLAVA, lora, tmp_path / "merged")


def test_what_is_no_adapter_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is no adapter"):
        merge(checkpoint(LLAVA), tmp_path / "merged")
    with pytest.raises(ValueError, match="a base belongs to an adapter"):
        mv.load(checkpoint(LLAVA), base=checkpoint(LLAVA))
    LLAVA.save(tmp_path / "base")
    trained(LLAVA.model(), tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(FileExistsError, match="is what is merged"):
        merge(tmp_path / "adapter", tmp_path / "base", overwrite=True)


def test_an_adapter_of_a_4_bit_base_goes_onto_the_base_in_full(checkpoint, tmp_path):
    four_bit = quantised("nf4", adapter_for(LLAVA.model().config), torch.float32)
    base, _ = mv.load(checkpoint(LLAVA), quantization_config=four_bit)
    trained(base, tmp_path / "adapter", checkpoint(LLAVA))
    merge(tmp_path / "adapter", tmp_path / "merged")
    same(LLAVA, mv.load(tmp_path / "adapter")[0], tmp_path / "merged")
    base, processor = mv.load(checkpoint(LLAVA), quantization_config=four_bit)
    base.save_pretrained(tmp_path / "stored"), processor.save_pretrained(tmp_path / "stored")
    with pytest.raises(ValueError, match="stored quantised, which nothing can be added to"):
        merge(tmp_path / "adapter", tmp_path / "other", base=tmp_path / "stored")
    assert not (tmp_path / "other").exists()
