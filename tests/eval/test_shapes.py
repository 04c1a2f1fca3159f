"""The shapes: as large as what was published, shown as many tokens, and refused where they do not fit."""

import re

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mllm_vision.eval import shapes
from mllm_vision.eval.shapes import (
    TEXT_TOKENS,
    build_model,
    make_inputs,
    parameter_count,
    published_shape,
    random_pictures,
    weight_bytes,
)
from tests.eval.toy_shapes import PLACEHOLDERS, toy_shape

# Parameters in billions and placeholders of the picture, as the models' own pages and papers give them: 576 patches of
# CLIP-L/14-336; five tiles of 576 with a newline for each of the mosaic's 48 rows; 28 pixels a side for each token; 40,
# which 1024 is 25.6 of (the paper: 655 tokens), and 28, which it is 36.6 of (1,337).
PUBLISHED = {
    "llava-1.5-7b": (7.06, 576),
    "llava-1.5-13b": (13.35, 576),
    "llava-next-7b": (7.57, 5 * 576 + 48),
    "qwen2.5-vl-3b": (3.75, 36 * 36),
    "qwen2.5-vl-7b": (8.29, 36 * 36),
    "llava-uhd-v3": (8.06, 26 * 26),
    "llava-uhd-v3-moonvit": (8.05, 37 * 37),
}
CPU = torch.device("cpu")


def test_every_shape_has_its_published_size():
    assert {name: round(parameter_count(shape.build_config()) / 1e9, 2) for name, shape in shapes.shapes().items()} == {
        name: billions for name, (billions, _) in PUBLISHED.items()
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shape_is_shown_its_published_number_of_tokens(name):
    shape = published_shape(name)
    model = build_model(shape.cut(1).build_config(), 0, "meta")
    inputs = make_inputs(model, shape.build_image_processor(), shape.picture, 0, 1)
    assert inputs["input_ids"].shape == (1, PUBLISHED[name][1] + TEXT_TOKENS)


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_stock_model_takes_the_inputs(name):
    model, inputs_for = toy_shape(name).load(CPU, torch.float32, seed=0)
    assert type(model) in AutoModelForImageTextToText._model_mapping.values()
    inputs = inputs_for(2)
    on_image = inputs["input_ids"] == 5
    assert on_image.sum(1).tolist() == [PLACEHOLDERS[name]] * 2
    assert on_image.int().diff(dim=1).abs().sum(1).tolist() == [2, 2]  # in one piece, with text on both sides
    text = inputs["input_ids"][~on_image].view(2, -1)
    assert text.shape == (2, TEXT_TOKENS) and not torch.isin(text, torch.arange(5, 9 if "qwen" in name else 6)).any()
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
    assert logits.shape == (2, 1, 96) and logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])  # two pictures


def test_weights_and_inputs_follow_from_the_seed():
    (a, inputs), (same, _), (other, others) = (toy_shape("llava-1.5-7b").load(CPU, torch.float32, s) for s in (0, 0, 1))
    assert torch.equal(a.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, other.lm_head.weight)
    assert torch.equal(inputs(1)["pixel_values"], inputs(1)["pixel_values"])
    assert not torch.equal(inputs(1)["pixel_values"], others(1)["pixel_values"])


def test_dtype_is_that_of_weights_and_pixels_only():
    model, inputs_for = toy_shape("qwen2.5-vl-3b").load(CPU, torch.bfloat16, seed=0)
    inputs = inputs_for(1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64


def test_cut_takes_layers_from_the_language_model_only():
    config = published_shape("qwen2.5-vl-7b").cut(2).build_config()
    assert config.text_config.num_hidden_layers == 2
    assert config.vision_config.depth == 32
    assert published_shape("qwen2.5-vl-7b").cut(2).depth == 28
    for layers in (0, 29):
        with pytest.raises(ValueError, match=rf"layers must be in 1\.\.28, .* got {layers}"):
            published_shape("qwen2.5-vl-7b").cut(layers)


def test_what_does_not_fit_is_refused_with_what_would():
    shape = published_shape("llava-1.5-7b")
    available = 10_000_000_000
    message = (
        "the weights of llava-1.5-7b with 32 language layers need 28.3 GB in float32, and cpu has 10.0 GB left; "
        "--layers 6 fits"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        shape.require_memory(torch.float32, available, "cpu")
    sizes = [weight_bytes(shape.cut(layers).build_config(), torch.float32) for layers in (6, 7)]
    assert sizes[0] <= 0.8 * available < sizes[1]
    with pytest.raises(ValueError, match="not even --layers 1 fits; use a smaller dtype"):
        shape.require_memory(torch.float32, 1_000_000_000, "cpu")


def test_what_fits_is_not_refused():
    shape = published_shape("llava-1.5-7b")
    shape.require_memory(torch.bfloat16, 2 * 7_063_427_072, "cuda")
    with pytest.raises(ValueError, match=r"cuda has 14\.1 GB left"):
        shape.require_memory(torch.bfloat16, 2 * 7_063_427_072 - 1, "cuda")
    shape.require_memory(torch.float32, None, "cpu")


def test_loading_asks_how_much_memory_there_is(monkeypatch):
    monkeypatch.setattr(shapes, "available_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="not even --layers 1 fits"):
        toy_shape("llava-1.5-7b").load(CPU, torch.float32, seed=0)


def test_an_unknown_shape_is_an_error_that_lists_the_known():
    with pytest.raises(
        ValueError, match=r"no shape 'llava'; there are llava-1\.5-7b, llava-1\.5-13b, llava-next-7b, q"
    ):
        published_shape("llava")


def test_pictures_differ_and_have_the_size_asked_for():
    a, b = random_pictures(2, (20, 10), seed=3)
    assert a.size == b.size == (20, 10) and a.mode == "RGB"
    assert a.tobytes() != b.tobytes()
    assert random_pictures(1, (20, 10), seed=3)[0].tobytes() == a.tobytes()
