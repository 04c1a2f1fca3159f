"""A conversation as the ids that a model is trained on, with labels on its answers alone.

Shapes: L tokens of a row, placeholders of pictures included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from mllm_vision.placeholders import IGNORED, PAD_VALUES
from mllm_vision.prompts import IMAGE_MARK
from mllm_vision.recipes.data.conversation import Conversation, open_picture

ALONG_PROMPT = ("input_ids", *PAD_VALUES)
"""What a processor makes that runs along the prompt; all else is of pictures."""

_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() }}:{% endif %}"
    "{% if message['role'] != 'assistant' %}{{ '' if message['role'] == 'system' else ' ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ image_token }}\n{% else %}"
    "{{ ' ' + part['text'].strip() if message['role'] == 'assistant' else part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""For processors without a template; asks as `mllm_vision.prompts.write_prompt` then does."""


class RowEncoder:
    """Makes tensors of conversations with a model's processor.

    Args:
        max_length: Most tokens of a row, placeholders included.

    Raises:
        ValueError: the tokenizer cannot say which characters a token stands for.
    """

    def __init__(self, processor: ProcessorMixin, max_length: int):
        if not processor.tokenizer.is_fast:
            raise ValueError(
                f"{type(processor.tokenizer).__name__} is a slow tokenizer, which cannot say which tokens are the "
                "answer; load the processor with its fast one"
            )
        if processor.tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos_token to close an answer with; set one")
        self.processor, self.max_length = processor, max_length
        self.ends = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}

    def __call__(self, conversation: Conversation, folder: Path) -> dict[str, Tensor]:
        """The tensors of one row: (L,) what runs along the prompt, and of its pictures what the processor makes.

        Args:
            folder: Where relative paths of pictures begin.

        Raises:
            ValueError: nothing can be learnt from this row: no picture, too long, text that holds a picture's token.
            RuntimeError: nothing can be learnt with this processor, for its template or its placeholders.
        """
        for message in conversation.messages:
            for part in message["content"]:
                if part["type"] == "text" and any(mark in part["text"] for mark in self._marks()):
                    raise ValueError(
                        f"the text of a turn by the {message['role']} holds the mark of a picture; take it out"
                    )
        text, answers = self.render(conversation.messages)
        pictures = [open_picture(source, folder) for source in conversation.pictures]
        return self.encode(text, answers, pictures)

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where in it each answer begins and ends, its end token included.

        Raises:
            ValueError: the template refuses the conversation or leaves out something of it.
            RuntimeError: the template changes what was said when more is said.
        """
        text, answers, told = "", [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, answered = self._rendered(messages[:i], True), self._rendered(messages[: i + 1], False)
            if not asked.startswith(told) or not answered.startswith(asked):
                raise RuntimeError(
                    "the chat template writes a conversation otherwise once it goes on, so that no answer can be told "
                    f"from its question: {asked[-60:]!r} is not how {answered[-120:]!r} begins; give the processor a "
                    "template that only adds"
                )
            text += asked[len(told) :]
            answer, rest = self._closed(answered[len(asked) :], message)
            answers.append((len(text), len(text) + len(answer)))
            text, told = text + answer + rest, answered
        for message in messages:
            for part in message["content"]:
                if part["type"] == "text" and part["text"].strip() not in text:
                    raise ValueError(f"the chat template leaves out what the {message['role']} says: {part['text']!r}")
        return text, answers

    def shown_picture(self) -> str:
        """The text of a turn that shows a picture and says nothing."""
        return self._rendered([{"role": "user", "content": [{"type": "image"}]}], False)

    def encode(
        self, text: str, answers: Sequence[tuple[int, int]], pictures: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """The tensors of a text with pictures; labels on the tokens of ``answers``, spans of characters.

        Raises:
            ValueError: it has more than `max_length` tokens, or a token is half question and half answer.
            RuntimeError: the processor puts in more than placeholders.
        """
        tokenizer, image = self.processor.tokenizer, self.processor.image_token_id
        # A template may write the BOS token that the tokenizer would put in once more.
        special = {"add_special_tokens": not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))}
        # How long a row may be is for `max_length`, not for the tokenizer, to say.
        plain = tokenizer(text, return_offsets_mapping=True, verbose=False, **special)
        inputs = self.processor(
            images=list(pictures) or None, text=[text], return_tensors="pt", text_kwargs={**special, "verbose": False}
        )
        row = {name: value[0] if name in ALONG_PROMPT else value for name, value in inputs.items()}
        ids = row["input_ids"]
        kept = [(i, span) for i, span in zip(plain["input_ids"], plain["offset_mapping"], strict=True) if i != image]
        own = ids != image
        if ids[own].tolist() != [i for i, _ in kept]:
            raise RuntimeError(
                f"{type(self.processor).__name__} puts more than {self.processor.image_token} in place of a picture, "
                "so that answers cannot be found again; rows of this processor cannot be labelled"
            )
        if len(ids) > self.max_length:
            raise ValueError(
                f"it has {len(ids)} tokens, more than max_length={self.max_length}; raise max_length or shorten it"
            )
        inside = torch.tensor([_inside(span, answers) for _, span in kept], dtype=torch.bool)
        labels = torch.full_like(ids, IGNORED)
        labels[own] = torch.where(inside, ids[own], IGNORED)
        return {**row, "labels": labels}

    def _rendered(self, messages: list[dict[str, Any]], asks: bool) -> str:
        settings = {"add_generation_prompt": asks}
        try:
            if self.processor.chat_template:
                return self.processor.apply_chat_template(messages, **settings)
            mark = self.processor.image_token
            return self.processor.apply_chat_template(messages, _TEMPLATE, **settings, image_token=mark)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error

    def _closed(self, answered: str, message: dict[str, Any]) -> tuple[str, str]:
        """What a template made of an answer, up to its end token, which is put in where there is none, and the rest."""
        said = "".join(part["text"] for part in message["content"]).strip()
        begin = answered.find(said)
        if begin < 0:
            raise ValueError(f"the chat template leaves out an answer or changes it: {said[:60]!r}")
        end = begin + len(said)
        closing = answered[end:]
        blank = len(closing) - len(closing.lstrip())
        token = max((e for e in self.ends if closing.startswith(e, blank)), key=len, default=None)
        if token is None:
            return answered[:end] + self.processor.tokenizer.eos_token, closing.lstrip(" ")
        end += blank + len(token)
        return answered[:end], answered[end:]

    def _marks(self) -> set[str]:
        return {IMAGE_MARK, self.processor.image_token}


def _inside(span: tuple[int, int], answers: Sequence[tuple[int, int]]) -> bool:
    """Whether a token stands in an answer. One that no character stands for (BOS) does not."""
    begin, end = span
    for first, last in answers:
        if begin < first < end or begin < last < end:
            raise ValueError(
                "a token is half question and half answer with this tokenizer; set the answer off by a space"
            )
        if first <= begin < end <= last:
            return True
    return False
