"""A model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval): its tasks, answered by a host with methods.

    lmms-eval --model mllm_vision --tasks pope --batch_size 8 \\
        --model_args pretrained=tiny-llava-scenes,reduce=hiprune:keep=33:alpha=0.2

lmms-eval finds `manifest` through the entry-point group ``lmms_eval.models``. It splits ``model_args`` at commas and
each of them at its first "=", so that the settings of a method stay as they are.

Differs from the models of lmms-eval: a task that names no stop string gets a blank line from it, which would cut an
answer after its first paragraph, so a blank line never stops one (as in some of theirs); the other stop strings are
heeded; ``do_sample: false`` is greedy whatever the temperature.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from transformers import GenerationConfig

import mllm_vision as mv
from mllm_vision.eval.answers import Decoding, answer, inputs_for
from mllm_vision.images import load_image
from mllm_vision.prompts import IMAGE_MARK, question_parts, write_prompt
from mllm_vision.registry import parse_methods

logger = logging.getLogger(__name__)

ARGUMENTS = ("pretrained", "reduce", "decode", "device", "device_map", "dtype", "torch_dtype", "batch_size")
MAX_NEW_TOKENS = 1024
"""Length of an answer where a task states none."""

BLANK_LINE = "\n\n"
"""What lmms-eval makes the stop string of a task that names none: its delimiter of examples."""

Message = dict[str, Any]


def manifest() -> Any:
    """What lmms-eval registers. It asks while it is being imported, so its own names are imported here."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mllm_vision", chat_class_path=f"{__name__}.MllmVision")


class MllmVision(lmms):
    """Any host that `mv.load` knows, asked in batches through its own processor and `generate`.

    Args:
        pretrained: A hub id, a folder, or the name of a checkpoint that comes with the library.
        reduce: Reducers, as ``hiprune:keep=192``; several are joined with "+".
        decode: A decoding method, written likewise.
        device: Where the model is; by default the device of this process.
        device_map: Spreads the model over devices, as ``auto``; instead of `device`.
        dtype: Of the weights; "auto" is the checkpoint's.
        torch_dtype: Another name of `dtype`.
        batch_size: Questions answered together.

    Raises:
        ValueError: an argument of another name, a method or a number that cannot be, or devices that cannot be.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        reduce: str | None = None,
        decode: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        torch_dtype: str | None = None,
        batch_size: int | str = 1,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"mllm_vision has no {', '.join(unknown)}; its arguments are {', '.join(ARGUMENTS)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number of 1 or more, got {batch_size!r}")
        if device and device_map:
            raise ValueError(f"got device={device} and device_map={device_map}; leave one of them out")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and (device or device_map):
            raise ValueError("each of several processes has its own device; leave out device and device_map")
        self.batch_size = int(batch_size)
        methods = [
            *(parse_methods(reduce, "reducer") if reduce else []),
            *(parse_methods(decode, "decoding") if decode else []),
        ]
        where = device_map or device or str(self.accelerator.device)
        self.model, self.processor = mv.load(pretrained, *methods, dtype=torch_dtype or dtype, device_map=where)

    @property
    def device(self) -> torch.device:
        """Where inputs go; several processes count their requests there."""
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer a request, in their order; requests of the same generation arguments share batches."""
        alike: dict[str, list[int]] = defaultdict(list)
        ids, asked = [], Counter[tuple[str, str, int]]()
        for i, request in enumerate(requests):
            *_, settings, document, task, split = request.args
            alike[repr(settings)].append(i)
            ids.append(f"{task}/{split}/{document}/{asked[task, split, document]}")
            asked[task, split, document] += 1  # with --repeats a question comes again, and is to be drawn anew
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answering") as progress:
            for numbers in alike.values():
                settings = requests[numbers[0]].args[2]
                decoding, others = decoding_of(settings)
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    prompts, pictures = zip(*(self._question(requests[i]) for i in batch), strict=True)
                    texts = answer(
                        self.model,
                        self.processor,
                        inputs_for(self.processor, prompts, pictures),
                        [ids[i] for i in batch],
                        max_new_tokens=MAX_NEW_TOKENS,
                        decoding=decoding,
                        **others,
                    )
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = cut(text, settings.get("until"))
                    progress.update(len(batch))
        return answers

    def _question(self, request: Instance) -> tuple[str, list[Image.Image]]:
        """Prompt and images."""
        _, messages_of, _, document, task, split = request.args
        images: list[Image.Image] = []
        turns = [turn_of(message, images) for message in messages_of(self.task_dict[task][split][document])]
        return self.prompt(turns), images

    def prompt(self, turns: list[Message]) -> str:
        """What asks for the next turn.

        Raises:
            ValueError: several turns, or one of another role than the user's, where there is no chat template.
        """
        roles = [turn["role"] for turn in turns]
        if roles == ["user"]:
            return write_prompt(self.processor, turns[0]["content"])
        if not self.processor.chat_template:
            raise ValueError(f"without a chat template a model takes one turn of a user, got {', '.join(roles)}")
        return self.processor.apply_chat_template(turns, add_generation_prompt=True)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(_only("scores no given answers (output_type multiple_choice or loglikelihood)"))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(_only("does not answer in rounds (output_type generate_until_multi_round)"))


def _only(lack: str) -> str:
    return f"mllm_vision {lack}; choose a task of output_type generate_until"


def turn_of(message: Message, images: list[Image.Image]) -> Message:
    """A message of lmms-eval as a turn for a chat template; its images are appended to ``images``, in order.

    Raises:
        ValueError: a video or a sound, an image that cannot be read, or marks that are not as many as the images.
    """
    parts: list[dict[str, str]] = []
    for part in message["content"]:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
        elif part["type"] == "image":
            picture = part["url"]
            images.append(picture.convert("RGB") if isinstance(picture, Image.Image) else load_image(picture))
            parts.append({"type": "image"})
        else:
            raise ValueError(f"mllm_vision takes images and text, got {part['type']}; choose a task of images")
    text = "".join(part.get("text", "") for part in parts)
    if IMAGE_MARK in text:  # some tasks hand over all images first, and say in the text where they belong
        parts = question_parts(text, sum(part["type"] == "image" for part in parts))
    return {"role": message["role"], "content": parts}


def decoding_of(settings: dict[str, Any]) -> tuple[Decoding, dict[str, Any]]:
    """How a task's ``generation_kwargs`` ask for answers, and what else of them is for `generate`.

    Raises:
        ValueError: a number that cannot be, or beams of samples.
    """
    known, ours = set(vars(GenerationConfig())), {"max_new_tokens", "temperature", "top_p", "top_k", "num_beams"}
    if unknown := sorted(set(settings) - known - {"until"}):
        logger.warning("generate has no argument %s; ignored", ", ".join(unknown))
    given = {name: value for name, value in settings.items() if name in known and value is not None}
    sampled = given.pop("do_sample", given.get("temperature", 0) > 0)
    given = {"temperature": 1.0} | given if sampled else given | {"temperature": 0}
    if given["temperature"] == 0:
        given = {name: value for name, value in given.items() if name not in ("top_p", "top_k")}
    decoding = Decoding(**{name: given.pop(name) for name in ours & set(given)}, seed=torch.initial_seed())
    return decoding, given


def cut(text: str, stops: str | list[str] | None) -> str:
    """``text`` up to the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop and stop != BLANK_LINE:
            text = text.split(stop)[0]
    return text
