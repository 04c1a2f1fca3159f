"""A question about images, written as the prompt that a model expects."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

IMAGE_MARK = "<image>"
"""Where an image stands in a question. A question without marks has its images first."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Of models whose language model has none: images ahead of the text of a message, "USER: ... ASSISTANT:" around it."""


def question_parts(question: str, images: int) -> list[dict[str, str]]:
    """The question as the content of a chat message: its text and its images, in order.

    Args:
        question: Text, with one `IMAGE_MARK` for each image or none at all.
        images: How many images there are.

    Raises:
        ValueError: the question is empty, or its marks are not as many as the images.
    """
    texts = [text.strip() for text in question.split(IMAGE_MARK)]
    marks = len(texts) - 1
    if not any(texts):
        raise ValueError("the question is empty; ask something about the image")
    if marks == 0:
        texts = [""] * images + texts
    elif marks != images:
        raise ValueError(
            f"the question has {marks} {IMAGE_MARK} marks for {images} images; write one mark for each image "
            "or none, to have the images first"
        )
    parts = []
    for i, text in enumerate(texts):
        parts += [{"type": "image"}] * (i > 0)
        parts += [{"type": "text", "text": text}] * bool(text)
    return parts


def write_prompt(processor: ProcessorMixin, parts: list[dict[str, str]], system: str | None = None) -> str:
    """The prompt that asks for an answer to `question_parts`: by the processor's chat template, else as LLaVA-1.5's.

    Args:
        system: What the conversation begins with; None leaves that to the template.

    Raises:
        ValueError: the template has no place for ``system``.
    """
    if processor.chat_template:
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        if system is not None and system not in prompt:
            raise ValueError("the chat template of this model has no place for a system prompt; leave it out")
        return _without_bos(processor.tokenizer, prompt)
    written = [part["text"] if part["type"] == "text" else f"{processor.image_token}\n" for part in parts]
    return f"{'' if system is None else system + ' '}USER: {''.join(written)} ASSISTANT:"


def _without_bos(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt without the BOS token that a template wrote, where the tokenizer writes one of its own."""
    bos = tokenizer.bos_token
    if bos and prompt.startswith(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        return prompt.removeprefix(bos)
    return prompt
