"""The model card: its code runs as it stands, on a model and on an adapter."""

import ast
import re

import pytest
from peft import PeftModel

import mllm_vision as mv
from mllm_vision.adapter_folder import save_adapter
from mllm_vision.recipes.lora import LoraSpec, with_lora
from mllm_vision.recipes.publish import model_card

FACTS = {
    "recipe": "tiny_lora",
    "command": "mllm-vision train tiny_lora",
    "seed": 0,
    "about": "",
    "card": {},
    "note": "",
    "base": None,
    "methods": [],
    "rank": None,
    "parameters": 8_800_000,
    "stages": [{"name": "answers", "seconds": 60, "curve": []}],
    "scores": {},
    "hardware": {"threads": 2, "cpu": "a processor", "gpus": []},
    "versions": {"torch": "2"},
}


@pytest.mark.parametrize("adapter", [False, True])
def test_the_code_on_a_card_loads_the_folder_and_imports_no_more_than_that_takes(adapter, tmp_path):
    model, processor = mv.load("tiny-llava-scenes")
    if adapter:
        save_adapter(with_lora(model, LoraSpec(r=2, alpha=4)), tmp_path, "tiny-llava-scenes")
    else:
        model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", model_card({**FACTS, "adapter": adapter}), re.DOTALL)
    names = {"folder": tmp_path}
    exec(code, names)
    assert isinstance(names["model"], PeftModel if adapter else type(model))
    assert type(names["processor"]) is type(processor)
    nodes = list(ast.walk(ast.parse(code)))
    imported = {i.asname or i.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for i in n.names}
    assert imported == {n.id for n in nodes if isinstance(n, ast.Name)} & imported
