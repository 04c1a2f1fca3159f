"""Small checkpoints laid out exactly as the LLaVA and LLaVA-SP repositories write theirs, renamed by hand here."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
)

GOLDEN = Path(__file__).parent / "golden"
SENTENCES = (
    "What is left of the red circle?",
    "How many blue squares are in the picture?",
    "Is there a small green triangle? Answer yes or no.",
    "USER: Describe what both pictures have in common. ASSISTANT: They are drawn.",
)
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56]]  # (width, height), as theirs


@cache
def sentence_pieces(*by_hand: str) -> bytes:
    """A `tokenizer.model` like Llama's, with pieces defined ``by_hand``."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=model,
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=list(by_hand),
        minloglevel=2,
    )
    return model.getvalue()


VOCABULARY = 350
ROWS = 384  # <image> and <pad> make 352


def stock(kind: str = "llava", image_size: int = 56, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random stock model as the converter shall give it back: "llava", "llava_next", or "mistral"."""
    torch.manual_seed(0)
    text = MistralConfig if kind == "mistral" else LlamaConfig
    config, model = (
        (LlavaNextConfig, LlavaNextForConditionalGeneration)
        if kind != "llava"
        else (LlavaConfig, LlavaForConditionalGeneration)
    )
    sizes = {"intermediate_size": 64, "num_attention_heads": 4}
    made = model(
        config(
            vision_config=CLIPVisionConfig(
                hidden_size=32, num_hidden_layers=3, image_size=image_size, patch_size=14, **sizes
            ),
            text_config=text(
                hidden_size=48,
                num_hidden_layers=2,
                num_key_value_heads=2,
                vocab_size=ROWS,
                max_position_embeddings=4096,
                rope_parameters={"rope_type": "default", "rope_theta": 5e5},
                rms_norm_eps=1e-5,
                pad_token_id=351,
                **sizes,
            ),
            image_token_index=350,
            **({} if kind == "llava" else {"image_grid_pinpoints": [[h, w] for w, h in PINPOINTS]}),
        )
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=1.2 / max(1, parameter[0].numel()) ** 0.5)
    return made.to(dtype).eval()


def names_of_theirs(model: PreTrainedModel, *, tower: bool) -> dict[str, Tensor]:
    """The weights of a stock model under the names of the original repository; the tower is a part or is not."""
    weights = {}
    for name, weight in model.state_dict().items():
        if name.startswith("model.language_model."):
            name = "model." + name.removeprefix("model.language_model.")
        elif name.startswith("model.vision_tower."):
            if not tower:
                continue
            name = "model.vision_tower.vision_tower.vision_model." + name.removeprefix("model.vision_tower.")
        elif name.startswith("model.multi_modal_projector."):
            _, _, layer, kind = name.split(".")
            name = f"model.mm_projector.{ {'linear_1': 0, 'linear_2': 2}[layer] }.{kind}"
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            weight = weight[:VOCABULARY]
        weights[name] = weight.clone()
    return weights


def config_of_theirs(model: PreTrainedModel, tower: Path, **changes) -> dict:
    """`config.json` as liuhaotian/llava-v1.5-7b has it, with the sizes of ``model``."""
    text = model.config.text_config
    return {
        "_name_or_path": "llava-v1.5-7b",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_length": 4096,
        "max_position_embeddings": 4096,
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "model_type": "llava",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": VOCABULARY,
    } | changes


def write_tower(folder: Path, model: PreTrainedModel) -> Path:
    """A CLIP checkpoint as openai's: both towers, one file of pickled tensors, sizes of pictures as bare numbers."""
    folder.mkdir()
    vision = model.config.vision_config
    (folder / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": vision.to_dict(), "text_config": {}, "projection_dim": 8})
    )
    weights = {f"vision_model.{name}": weight for name, weight in model.model.vision_tower.state_dict().items()}
    weights |= {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.tensor(4.6)}
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(weights, folder / "pytorch_model.bin")
    pictures = {
        "crop_size": vision.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": vision.image_size,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


def write_checkpoint(folder: Path, config: dict, weights: dict[str, Tensor], *, kind: str = "bin") -> Path:
    """Weights and `config.json` as below, and `tokenizer.model`."""
    write_weights(folder, config, weights, kind=kind)
    (folder / "tokenizer.model").write_bytes(sentence_pieces())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    return folder


def write_weights(folder: Path, config: dict, weights: dict[str, Tensor], *, kind: str = "bin") -> Path:
    """Two shards of pickled tensors with their index, or one safetensors file; `config.json`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    if kind == "safetensors":
        save_file(weights, folder / "model.safetensors")
        return folder
    shards = [dict(list(weights.items())[::2]) | buffer, dict(list(weights.items())[1::2])]
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, folder / name)
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of a golden case, the weights under the names of a checkpoint's shards, and the tensors."""
    folder = GOLDEN / name
    weights = load_file(folder / "weights.safetensors")
    return {f"model.{key}": weight for key, weight in weights.items()}, load_file(folder / "case.safetensors")


def ids_of_theirs(prompt: str, image: int) -> list[int]:
    """A prompt as the repository tokenises it: the text between images by itself, each stretch with its own space."""
    pieces = SentencePieceProcessor(model_proto=sentence_pieces())
    ids = [pieces.bos_id()]
    for i, text in enumerate(prompt.split("<image>")):
        ids += [image] * (i > 0)
        ids += pieces.encode(text)
    return ids
