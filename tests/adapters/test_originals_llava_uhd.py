"""LLaVA-UHD v3 as its training writes it, converted: logits, prompts, golden tokens of the tower, the refusals."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import gelu, layer_norm, linear
from torch.testing import assert_close
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

import mllm_vision as mv
from mllm_vision import convert as engine
from mllm_vision.adapters.originals.llava_uhd import read_tower
from mllm_vision.cli import app
from mllm_vision.original import Original
from mllm_vision.projectors import PatchMergerConfig
from mllm_vision.reducers import RandomConfig
from mllm_vision.towers import ViTUHDImageProcessor, ViTUHDModel, ViTUHDProcessor
from tests.authors import GOLDEN, write_weights
from tests.hosts import picture
from tests.towers.reference import HEADS, SIDE, WIDTH, random_weights, slow_tower

TOWER = "model.vision_tower.vision_tower."
MERGERS = (1, 3)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}{% endfor %}"
)
VOCABULARY = 256 + len(SPECIAL)
ROWS = 320  # <image> makes 260
BOUNDS = {"min_pixels": 20 * 20, "max_pixels": 80 * 80}
UNREAD = (".zero_init_fc.weight", ".attn_layer.2.bias")
LAYER = {  # of theirs, with the rows of one of three matrices that are one
    "layer_norm1": ("norm0", None),
    "self_attn.q_proj": ("wqkv", 0),
    "self_attn.k_proj": ("wqkv", 1),
    "self_attn.v_proj": ("wqkv", 2),
    "self_attn.out_proj": ("wo", None),
    "layer_norm2": ("norm1", None),
    "mlp.fc1": ("mlp.fc0", None),
    "mlp.fc2": ("mlp.fc1", None),
}


def tokenizer():
    """A token a byte, and the special ones of Qwen, whose template reads no images."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="right")
    made.add_special_tokens({"additional_special_tokens": SPECIAL, "pad_token": SPECIAL[0], "eos_token": SPECIAL[2]})
    made.chat_template = TEXT_ONLY
    return made


def language_model(kind="qwen2", *, tied=False):
    """A random plain language model, as the training starts from."""
    config, model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    torch.manual_seed(0)
    made = model(
        config(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            rms_norm_eps=1e-5,
            eos_token_id=258,
            tie_word_embeddings=tied,
            **({"head_dim": 16} if kind == "qwen3" else {}),
        )
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=1.2 / max(1, parameter[0].numel()) ** 0.5)
    return made.eval()


def projector(kind="mlp", width=WIDTH):
    """The weights of a projector as the authors name them."""
    beside = {"proj.0": (48, width), "proj.2": (48, 48)}
    if kind == "merger":
        beside = {"nl": (width,), "mlp.0": (4 * width, 4 * width), "mlp.2": (48, 4 * width)}
    generator, weights = torch.Generator().manual_seed(1), {}
    for name, size in beside.items():
        weights[f"{name}.weight"] = torch.randn(size, generator=generator) / size[-1] ** 0.5
        weights[f"{name}.bias"] = torch.randn(size[0], generator=generator)
    return weights


def projected(tokens, grids, kind):
    """The tokens of each image for the language model, from those of the tower."""
    weights, seen = projector(kind), []
    for tile in tokens.split([height * width for height, width in grids]):
        (height, width), layers = grids[len(seen)], ("proj.0", "proj.2")
        if kind == "merger":
            tile = layer_norm(tile, (WIDTH,), weights["nl.weight"], weights["nl.bias"], eps=1e-6)
            corners = [y * width + x for y in range(0, height, 2) for x in range(0, width, 2)]
            tile = torch.stack([tile[[c, c + 1, c + width, c + width + 1]].flatten() for c in corners])
            layers = ("mlp.0", "mlp.2")
        first, second = ([weights[f"{layer}.{part}"] for part in ("weight", "bias")] for layer in layers)
        seen.append(linear(gelu(linear(tile, *first)), *second))
    return seen


def weights_of_theirs(language, kind="mlp"):
    weights = dict(language.state_dict())
    if language.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    weights |= {f"model.mm_projector.{name}": weight for name, weight in projector(kind).items()}
    return weights | {TOWER + name: weight for name, weight in random_weights(mergers=MERGERS).items()}


def config_of_theirs(language, tower, **changes):
    """`config.json` as their training writes it, with the sizes of the language model."""
    text = language.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("vocab_size", "max_position_embeddings", "rms_norm_eps", "eos_token_id", "tie_word_embeddings")
    own = {"qwen2": "LlavaQwenForCausalLM", "qwen3": "LlavaQwen3ForCausalLM"}
    return (
        {name: getattr(text, name) for name in names}
        | ({"head_dim": text.head_dim} if text.model_type == "qwen3" else {})
        | {
            "architectures": [own[text.model_type]],
            "attention_dropout": 0.0,
            "bos_token_id": 256,
            "hidden_act": "silu",
            "image_aspect_ratio": "square",
            "initializer_range": 0.02,
            "max_window_layers": 28,
            "mm_hidden_size": WIDTH,
            "mm_patch_merge_type": "flat",
            "mm_projector_type": "mlp",
            "mm_tunable_parts": "mm_vision_tower,mm_language_model,mm_mlp_adapter",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": str(tower),
            "model_mode": "uhd_v2_5",
            "model_type": f"llava_{text.model_type}".replace("qwen2", "qwen"),
            "rope_scaling": {"factor": 2.0, "type": "linear"},  # which their class sets to None
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tokenizer_padding_side": "right",
            "torch_dtype": str(language.dtype).removeprefix("torch."),
            "transformers_version": "4.51.0",
            "use_cache": False,
            "use_mm_proj": True,
            "use_sliding_window": False,
        }
        | changes
    )


def tower_config(**changes):
    """`config.json` of a tower by itself."""
    return {
        "architectures": ["MoonVitPretrainedModel"],
        "hidden_size": WIDTH,
        "init_pos_emb_height": 6,
        "init_pos_emb_width": 5,
        "merger_layer_index": list(MERGERS),
        "merging_method": "m_pooling",
        "model_type": "moonvit",
        "num_attention_heads": HEADS,
        "patch_size": SIDE,
        "use_rope2d": True,
    } | changes


def written(folder, language, kind="bin", *, change=lambda weights: None, **changes):
    """A whole checkpoint, and beside it the tower that the training began with."""
    weights = weights_of_theirs(language, changes.get("mm_projector_type", "mlp"))
    change(weights)
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps(tower_config()))
    config = config_of_theirs(language, folder / "tower", **changes)
    source = write_weights(folder / "original", config, weights, kind=kind)
    tokenizer().save_pretrained(source)
    return source


def alone(folder, weights, kind="safetensors", **changes):
    return write_weights(folder / "original", tower_config(**changes), weights, kind=kind)


def converted(source, **options):
    out = source.parent / "converted"
    engine.convert("llava-uhd", str(source), out, **options)
    return AutoModelForImageTextToText.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)


def run(*arguments):
    return CliRunner().invoke(app, ["convert", "llava-uhd", *map(str, arguments)])


PICTURES = ((1, 40, 40), (2, 80, 40))  # seed, width, height: 2 x 2 and 2 x 4 tokens of 20 pixels
PROMPT = "<|im_start|>user\n<image>\nWhat is it?<image> And that?<|im_end|>\n"


def embeddings_by_hand(language, kind):
    """What the language model reads for `PROMPT` and `PICTURES`, piece by piece, under the names of the authors."""
    pixels, grids = [], []
    for seed, width, height in PICTURES:
        levels = torch.tensor(np.asarray(picture(seed, width, height)).astype(np.float32)) / 127.5 - 1
        rows, columns = range(0, height, SIDE), range(0, width, SIDE)
        pixels += [levels[y : y + SIDE, x : x + SIDE].permute(2, 0, 1) for y in rows for x in columns]
        grids.append((len(rows), len(columns)))
    tokens = slow_tower(random_weights(mergers=MERGERS), torch.stack(pixels), grids, MERGERS)
    first, second = projected(tokens, [(rows // 4, columns // 4) for rows, columns in grids], kind)
    embed, of = language.get_input_embeddings(), tokenizer()
    pieces = [embed(torch.tensor(of(text).input_ids)) for text in PROMPT.split("<image>")]
    return torch.cat([pieces[0], first, pieces[1], second, pieces[2]])[None]


def asked(processor):
    images = [picture(*each) for each in PICTURES]
    return processor(images=images, text=PROMPT, return_tensors="pt", images_kwargs=BOUNDS)


@torch.no_grad()
@pytest.mark.parametrize(
    ("text", "tied", "kind"), [("qwen2", False, "bin"), ("qwen2", True, "safetensors"), ("qwen3", False, "bin")]
)
def test_logits_are_those_of_tower_projector_and_language_model_by_hand(tmp_path, text, tied, kind):
    language = language_model(text, tied=tied)
    model, processor = converted(written(tmp_path, language, kind))
    assert type(model) is LlavaForConditionalGeneration and type(model.model.vision_tower) is ViTUHDModel
    inputs = asked(processor)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 12
    expected = language(inputs_embeds=embeddings_by_hand(language, "mlp")).logits
    logits = model(**inputs).logits
    assert logits.shape == (1, expected.shape[1], ROWS)
    # float32 sums in another order, through six layers: 1e-5 apart when this was written
    assert_close(logits[..., :VOCABULARY], expected, atol=1e-4, rtol=1e-4)
    answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (1, inputs["input_ids"].shape[1] + 3)


@torch.no_grad()
def test_a_merger_takes_the_place_of_the_projector(tmp_path):
    language = language_model()
    model, processor = converted(written(tmp_path, language, mm_projector_type="merger"))
    assert type(model).__name__ == "SlottedLlavaForConditionalGeneration"
    assert model.vision_slots.methods == [PatchMergerConfig(size=2)]
    stored = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert stored["model_type"] == "mllm_vision_llava" and stored["dtype"] == "float32"
    inputs = asked(processor)
    expected = language(inputs_embeds=embeddings_by_hand(language, "merger")).logits
    assert_close(model(**inputs).logits[..., :VOCABULARY], expected, atol=1e-4, rtol=1e-4)  # as above
    answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (1, inputs["input_ids"].shape[1] + 3)
    mv.apply(model, *model.vision_slots.methods, RandomConfig(keep=1))
    assert model(**inputs).logits.shape[1] == expected.shape[1] - 1


def test_every_weight_of_the_tower_is_where_it_belongs(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "mllm_vision"):
        model, _ = converted(written(tmp_path, language_model()))
    theirs = random_weights(mergers=MERGERS)
    expected = {
        "patch_embedding.weight": theirs["patch_embed.proj.weight"].flatten(1),
        "patch_embedding.bias": theirs["patch_embed.proj.bias"],
        "position_embedding": theirs["patch_embed.pos_emb.weight"],
        "post_layernorm.weight": theirs["encoder.final_layernorm.weight"],
        "post_layernorm.bias": theirs["encoder.final_layernorm.bias"],
    }
    for layer in range(4):
        block = f"encoder.blocks.{layer}"
        for part in ("weight", "bias"):
            for ours, (name, third) in LAYER.items():
                weight = theirs[f"{block}.{name}.{part}"]
                expected[f"layers.{layer}.{ours}.{part}"] = weight if third is None else weight.chunk(3)[third]
    for layer in MERGERS:
        merger = f"encoder.blocks.{layer}.merger.attn_layer"
        for ours, name in (("hidden.weight", "0.weight"), ("hidden.bias", "0.bias"), ("score.weight", "2.weight")):
            expected[f"layers.{layer}.merger.{ours}"] = theirs[f"{merger}.{name}"]
    state = model.model.vision_tower.state_dict()
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(state[name], weight), name
    config = model.config.vision_config
    assert (config.merger, config.merger_layers, config.rotary_units) == ("adaptive", MERGERS, "tokens")
    (record,) = caplog.records
    assert record.getMessage().startswith("left out 4 weights that have no effect: ")
    assert all(f"encoder.blocks.{layer}.merger.zero_init_fc.weight" in record.getMessage() for layer in MERGERS)


def test_the_command_says_what_it_found_and_the_settings_are_theirs(tmp_path):
    source = written(tmp_path, language_model())
    result = run(source, tmp_path / "converted")
    assert result.exit_code == 0, result.output
    model, processor = mv.load(tmp_path / "converted")
    parameters = sum(weight.numel() for weight in model.parameters())
    assert result.stdout == (
        "llava, mlp projector; ViT-UHD of 4 layers and 4 heads, adaptive mergers after layers 1, 3; "
        f"{parameters:,} parameters in float32: {tmp_path / 'converted'}\n"
    )
    text, plain = model.config.text_config.to_dict(), language_model().config.to_dict()
    changed = {"vocab_size": ROWS, "pad_token_id": 256, "bos_token_id": 256, "use_cache": True}
    apart = {"dtype", "architectures", "transformers_version", "_name_or_path"}
    assert {n: v for n, v in text.items() if n not in apart} == {
        n: v for n, v in (plain | changed).items() if n not in apart
    }
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-1, "full")
    assert model.generation_config.eos_token_id == 258
    assert type(processor) is ViTUHDProcessor
    images = processor.image_processor
    assert (images.patch_size, images.merge_size) == (SIDE, 4)
    assert (images.min_pixels, images.max_pixels) == (512**2, 1560**2)


def test_tied_matrices_are_one_and_counted_once(tmp_path):
    language = language_model(tied=True)
    source = written(tmp_path, language, change=lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))
    model, _ = converted(source)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "converted" / "model.safetensors")
    said = run(source, tmp_path / "converted", "--overwrite").stdout
    assert f"{sum(weight.numel() for weight in model.parameters()):,} parameters" in said


def test_new_rows_are_the_mean_of_the_old(tmp_path):
    language = language_model()
    model, processor = converted(written(tmp_path, language))
    assert processor.image_token_id == model.config.image_token_id == VOCABULARY
    expected = {
        "model.language_model.embed_tokens.weight": language.model.embed_tokens.weight,
        "lm_head.weight": language.lm_head.weight,
    }
    for name, old in expected.items():
        grown = model.state_dict()[name]
        assert torch.equal(grown[:VOCABULARY], old)
        assert_close(grown[VOCABULARY:], old.detach().mean(dim=0).expand(ROWS - VOCABULARY, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype(tmp_path, dtype):
    def change(weights):
        weights.update({name: weight.to(dtype) for name, weight in weights.items()})

    model, _ = converted(written(tmp_path, language_model(), change=change))
    assert {weight.dtype for weight in model.state_dict().values()} == {dtype}
    weights = weights_of_theirs(language_model())
    change(weights)
    for ours, theirs in (
        ("vision_tower.layers.3.merger.score", f"{TOWER}encoder.blocks.3.merger.attn_layer.2"),
        ("multi_modal_projector.linear_2", "model.mm_projector.proj.2"),
        ("language_model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj"),
    ):
        assert torch.equal(model.model.get_parameter(f"{ours}.weight"), weights[f"{theirs}.weight"])


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]},
    {"role": "assistant", "content": "That."},
    {"role": "user", "content": "Why?"},
]


@pytest.mark.parametrize(
    ("text", "system", "thought"),
    [
        ("qwen2", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", ""),
        ("qwen3", "", "<think>\n\n</think>\n\n"),
    ],
)
def test_prompts_are_theirs(tmp_path, text, system, thought):
    _, processor = converted(written(tmp_path, language_model(text)))
    turns = (
        "<|im_start|>user\n<image>\n<image>\nWhich?<|im_end|>\n"
        f"<|im_start|>assistant\n{thought}That.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    )
    assert processor.apply_chat_template(MESSAGES) == system + turns
    asked = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert asked == f"{system}{turns}<|im_start|>assistant\n{thought}"
    brief = [{"role": "system", "content": "Be brief."}, *MESSAGES[2:]]
    assert processor.apply_chat_template(brief) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    )
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.pad_token == "<|endoftext|>"


def test_a_template_that_shows_images_is_kept(tmp_path):
    source = written(tmp_path, language_model())
    theirs = tokenizer()
    theirs.chat_template = "{% for m in messages %}<image>{{ m.role }}{% endfor %}"
    theirs.save_pretrained(source)
    _, processor = converted(source)
    assert processor.apply_chat_template(MESSAGES[2:]) == "<image>user"


@torch.no_grad()
@pytest.mark.parametrize(("name", "merger"), [("pvc_avg_pooling", "average"), ("pvc_m_pooling_2images", "adaptive")])
@pytest.mark.parametrize(
    ("prefix", "kind"), [("", "safetensors"), ("vision_tower.vision_tower.", "bin"), (TOWER, "bin")]
)
def test_golden_tokens_of_a_tower_by_itself(tmp_path, name, merger, prefix, kind):
    case, weights = (load_file(GOLDEN / name / f"{part}.safetensors") for part in ("case", "weights"))
    method = {"average": "avg_pooling", "adaptive": "m_pooling"}[merger]
    sizes = {"hidden_size": 128, "patch_size": 10, "num_attention_heads": 16, "merging_method": method}
    source = alone(tmp_path, {prefix + key: weight for key, weight in weights.items()}, kind, **sizes)
    result = run(source, tmp_path / "converted")
    assert result.exit_code == 0, result.output
    tower = AutoModel.from_pretrained(tmp_path / "converted").eval()
    assert type(tower) is ViTUHDModel
    parameters = sum(weight.numel() for weight in tower.parameters())
    assert result.stdout == (
        f"ViT-UHD of 6 layers and 16 heads, {merger} mergers after layers 1, 3; {parameters:,} parameters in float32: "
        f"{tmp_path / 'converted'}\n"
    )
    out = tower(case["pixel_values"], 10 * case["grid_hws"])
    assert out.grid_hw.tolist() == case["out_grid_hws"].tolist()
    # float32 sums in another order, through six layers: 2e-6 apart when this was written
    assert_close(out.last_hidden_state[0], case["last_hidden_state"], atol=1e-5, rtol=1e-5)
    images = AutoImageProcessor.from_pretrained(tmp_path / "converted")
    assert type(images) is ViTUHDImageProcessor
    assert (images.patch_size, images.merge_size, images.max_pixels) == (10, 4, 1560**2)


def test_mergers_that_no_weight_and_no_config_tells_of_are_asked_for():
    weights = load_file(GOLDEN / "pvc_avg_pooling" / "weights.safetensors")
    stripped = {name: weight for name, weight in weights.items() if ".merger." not in name}
    assert stripped.keys() != weights.keys()
    with pytest.raises(ValueError, match=r"the weights name no mergers, .*: pass its folder with --tower"):
        read_tower(stripped, {})
    assert read_tower(stripped, {"num_attention_heads": 16}).config.merger_layers == ()


def test_a_tower_keeps_its_dtype_and_may_have_no_mergers(tmp_path):
    weights = {name: weight.half() for name, weight in random_weights().items()}
    assert "4 heads, no mergers" in run(alone(tmp_path, weights, merger_layer_index=None), tmp_path / "out").stdout
    tower = AutoModel.from_pretrained(tmp_path / "out")
    assert {weight.dtype for weight in tower.state_dict().values()} == {torch.float16}
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").merge_size == 1


def test_what_was_converted_can_be_replaced(tmp_path):
    tower = alone(tmp_path, random_weights(mergers=MERGERS))
    assert run(tower, tmp_path / "out").exit_code == 0
    assert "out is not empty; choose another folder" in run(tower, tmp_path / "out").stderr
    (tmp_path / "more").mkdir()
    assert run(written(tmp_path / "more", language_model()), tmp_path / "out", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "processor_config.json").exists()
    assert run(tower, tmp_path / "out", "--overwrite").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


@torch.no_grad()
def test_heads_are_sixteen_where_no_config_of_the_tower_is_at_hand(tmp_path):
    """The `config.json` of a whole checkpoint tells the heads of the language model: 4."""
    case, weights = (
        load_file(GOLDEN / "pvc_m_pooling_2images" / f"{part}.safetensors") for part in ("case", "weights")
    )
    weights = {TOWER + name: weight for name, weight in weights.items()}

    def change(theirs):
        for name in [name for name in theirs if name.startswith(TOWER)]:
            del theirs[name]
        theirs |= weights | {f"model.mm_projector.{name}": weight for name, weight in projector(width=128).items()}

    source = written(tmp_path, language_model(), change=change, mm_vision_tower="authors/tower-of-theirs")
    model, _ = converted(source)
    (tmp_path / "alone").mkdir()
    config = json.loads((source / "config.json").read_text())
    engine.convert("llava-uhd", str(write_weights(tmp_path / "alone" / "original", config, weights)), tmp_path / "out")
    for tower in (model.model.vision_tower, AutoModel.from_pretrained(tmp_path / "out").eval()):
        out = tower(case["pixel_values"], 10 * case["grid_hws"])
        assert_close(out.last_hidden_state[0], case["last_hidden_state"], atol=1e-5, rtol=1e-5)  # as above
    model, _ = converted(source, tower=str(tmp_path / "tower"), overwrite=True)
    assert model.config.vision_config.num_attention_heads == HEADS
    with pytest.raises(ValueError, match=r"'no/such-tower' is no folder here.*--tower DIR"):
        converted(source, tower="no/such-tower", overwrite=True)


@pytest.mark.parametrize(("kind", "part"), [("mlp", ""), ("merger", "mm_projector")])
def test_every_key_that_is_missing_is_named(tmp_path, monkeypatch, kind, part):
    source = written(tmp_path, language_model(), mm_projector_type=kind)
    weights = weights_of_theirs(language_model(), kind)
    config = json.loads((source / "config.json").read_text())
    for key in weights:
        if part not in key or key.endswith(UNREAD) or re.search(r"blocks\.[023]|layers\.0", key):  # one layer of each
            continue
        left = {name: weight for name, weight in weights.items() if name != key}
        monkeypatch.setattr(engine, "read_original", lambda *_, left=left: Original(config, left, source))
        with pytest.raises(ValueError, match=r"missing|has no") as error:
            engine.convert("llava-uhd", "original", tmp_path / "out")
        assert key.removeprefix(TOWER).removeprefix("model.") in str(error.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"model.image_newline": torch.ones(48)}), r"1 surplus \(model\.image_newline\)"),
        (
            lambda w: w.update({"model.mm_projector.norm.weight": torch.ones(48)}),
            r"surplus \(model\.mm_projector\.norm",
        ),
        (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}), r"surplus \(model\.layers\.2\.mlp"),
        (lambda w: w.update({"model.vision_tower.scale": torch.ones(1)}), r"surplus \(model\.vision_tower\.scale"),
        (lambda w: w.update({f"{TOWER}head.weight": torch.ones(1)}), r"surplus are .*head\.weight"),
        (
            lambda w: w.update({"model.mm_projector.proj.0.weight": torch.ones(48, 64)}),
            r"model\.mm_projector\.proj\.0\.weight is \(48, 64\), but .* it must be \(48, 32\)",
        ),
        (lambda w: w.update({f"{TOWER}encoder.blocks.1.wo.bias": torch.ones(3)}), r"blocks\.1\.wo\.bias has another"),
    ],
)
def test_what_has_no_place_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        converted(written(tmp_path, language_model(), change=change))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "tower"]


def test_a_head_that_contradicts_the_config_is_refused(tmp_path):
    language = language_model(tied=True)
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but lm_head\.weight is not model\.embed_tokens"):
        converted(written(tmp_path, language, change=lambda w: w.update({"lm_head.weight": torch.ones(259, 48)})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "resampler"}, "mm_projector_type 'resampler', supported are mlp, merger"),
        ({"model_type": "llava_llama"}, "model_type 'llava_llama', expected one of llava_qwen, llava_qwen3, moonvit"),
        ({"model_mode": "uhd_v1"}, "model_mode 'uhd_v1', expected 'uhd_v2_5'"),
        ({"mm_use_im_start_end": True}, "marks around an image"),
    ],
)
def test_what_the_stock_model_cannot_hold_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        converted(written(tmp_path, language_model(), **changes))


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (lambda w: w.pop("encoder.blocks.2.wo.bias"), {}, "missing are encoder.blocks.2.wo.bias, surplus are none"),
        (lambda w: w.update({"lm_head.weight": torch.ones(1)}), {}, "surplus are lm_head.weight"),
        (
            lambda w: None,
            {"merger_layer_index": [1, 2]},
            r"merger_layer_index \[1, 2\], but its weights are for \[1, 3\]",
        ),
        (lambda w: None, {"merging_method": "avg_pooling"}, "'avg_pooling', but its weights are for 'm_pooling'"),
        (lambda w: None, {"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads"),
    ],
)
def test_a_tower_by_itself_must_be_whole_and_what_its_config_says(tmp_path, change, changes, message):
    weights = random_weights(mergers=MERGERS)
    change(weights)
    with pytest.raises(ValueError, match=message):
        engine.convert("llava-uhd", str(alone(tmp_path, weights, **changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
