"""Rules of the layout that no linter knows."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = [path for folder in ("mllm_vision", "recipes", "eval") for path in sorted((ROOT / folder).rglob("*.py"))]
# The file that builds the tiny model from scratch and the one whose parsers have public names; then names that are no
# family's: of a checkpoint, of papers.
ALLOWED_FILES = {"recipes/tiny_model.py", "mllm_vision/assembly/joining.py", "eval/metrics/yes_no.py"}
ALLOWED = re.compile(
    r"tiny[-_]llava[-_]scenes|tiny-llava|LLaVA-style|LLaVA-1\.5|llava-1\.5-7b|llava-uhd-v3|PLLaVA|LLaVA-(SP|UHD|Align)"
)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_adapters_name_a_model_family(path):
    if str(path.relative_to(ROOT)) in ALLOWED_FILES:
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    named = [line for line in lines if re.search("llava|qwen", ALLOWED.sub("", line), flags=re.IGNORECASE)]
    assert named == []
