"""Every word that a benchmark's questions are asked with, frozen: a number is worth what its prompt is worth."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mllm_vision.eval import list_tasks
from mllm_vision.eval.answers import prompt_for
from mllm_vision.eval.task import parse_tasks
from tests.eval.tasks.local import write_folder

PROMPTS = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
OURS = [task.name for task in list_tasks() if task.__module__.startswith("mllm_vision.eval.tasks.")]

# That of llava-hf/llava-1.5-7b-hf.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class Processor:
    """As much of a processor as a prompt needs."""

    chat_template = TEMPLATE
    tokenizer = SimpleNamespace(bos_token=None)

    def apply_chat_template(self, messages, add_generation_prompt):
        return render_jinja_template(
            conversations=[messages], chat_template=TEMPLATE, add_generation_prompt=add_generation_prompt
        )[0][0]


def asked(spec, folder):
    """By id, the question and the prompt of every example of a task with its options, on the hand-written rows."""
    [task] = parse_tasks(spec)
    found = task.load(write_folder(folder, task.name) if task.reads_data else None)
    assert found.faults == {}
    return {
        example.id: {
            "question": example.question,
            "prompt": prompt_for(Processor(), example.question, len(example.images)),
        }
        for example in found.examples
    }


@pytest.mark.parametrize("spec", PROMPTS)
def test_the_prompts_are_as_frozen(spec, tmp_path):
    assert asked(spec, tmp_path / "data") == PROMPTS[spec]


@pytest.mark.parametrize("name", OURS)
def test_every_task_has_frozen_prompts(name):
    assert name in {spec.partition(":")[0] for spec in PROMPTS}
