"""Decoding strategies that contrast the answer with that to a prompt of less. See `mllm_vision.methods()`.

A config plugs in by `apply`; the function of the same name makes it a `custom_generate` for one call of `generate`.
"""

from typing import Any

from mllm_vision.registry import exported, package_modules

# At once rather than on first use: each function is called as its file, and would be hidden behind it.
globals().update({name: getattr(module, name) for module in package_modules(__name__) for name in module.__all__})


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return exported(__name__, name)
