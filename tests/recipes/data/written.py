"""What the tests of data share: processors that have a chat template, a few pictures, rows written as files."""

import json
from copy import deepcopy
from pathlib import Path

from transformers import ProcessorMixin

from tests.hosts import Host, picture

OPEN_ENDED = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Pictures first, and no token at the end of an answer."""

IN_TAGS = (
    "{% for m in messages %}[{{ m['role'] }}]\n"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
"""Pictures where they stand, an end token and a line break behind every turn."""


def processor_of(host: Host, template: str | None = None) -> ProcessorMixin:
    """A copy of a host's processor with a chat template: the one given, else one of its family's kind."""
    processor = deepcopy(host.processor)
    processor.chat_template = template or (IN_TAGS if "vision_start" in host.image_mark else OPEN_ENDED)
    return processor


def said(*texts: str) -> list[dict[str, str]]:
    """Turns of LLaVA-1.5's data, the first by a human."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write(folder: Path, rows: list, name: str = "rows.json") -> str:
    """A JSON array, or JSON lines, with three pictures `0.png` to `2.png` of different sizes beside it."""
    for number, size in enumerate([(84, 84), (120, 60), (60, 130)]):
        picture(number, *size).save(folder / f"{number}.png")
    lines = "\n".join(map(json.dumps, rows))
    (folder / name).write_text(lines if name.endswith("l") else json.dumps(rows, indent=1), encoding="utf-8")
    return str(folder / name)


ROWS = [
    {"id": 7, "image": "0.png", "conversations": said("<image>\nWhat is it?", "a red circle", "Sure?", "yes, it is")},
    {"id": "two", "image": ["1.png", "2.png"], "conversations": said("Compare <image> and <image>.", "Both are blue.")},
    {"conversations": said("Hello", "Hi there.")},
]
"""Several turns; several pictures; text alone. Ids are a number, a string, and missing."""

ANSWERS = [["a red circle", "yes, it is"], ["Both are blue."], ["Hi there."]]
