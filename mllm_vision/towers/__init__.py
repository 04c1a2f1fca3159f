"""Towers: Hugging Face vision models, each a package with its config, model and image processor.

`import mllm_vision` makes them known to the Auto classes; a host takes one as its ``vision_config``.
"""

from typing import Any

from mllm_vision.registry import exported


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return exported(__name__, name)
