"""An adapter and its base as one plain folder, which `from_pretrained` loads without PEFT."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from mllm_vision.adapter_folder import ASSEMBLED, Base, adapter_folder
from mllm_vision.api import load, source_of
from mllm_vision.folders import check_empty, whole_folder


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    overwrite: bool = False,
) -> Path:
    """Write the model that an adapter makes of its base, with its methods and its processor.

    Every W becomes W + s B A, rounded once to ``dtype``. An adapter trained on a base in 4 or 8 bit goes onto that base
    in full precision, with which it was not trained: answers differ by what quantisation had changed.

    Args:
        adapter: Folder or hub id of the adapter, or the name of one that comes with the library.
        out: Folder to write; there is either all of it or nothing.
        base: The model that it was trained on, if that is not where the adapter says.
        dtype: Of the weights, as for `from_pretrained`; "auto" is that of the base.
        overwrite: Replace a model that is in ``out``.

    Returns:
        ``out``.

    Raises:
        ValueError: no adapter, another base than its own, one that is stored in 4 or 8 bit, or weights that are not
            finite.
        FileExistsError: there is something in ``out``.
    """
    out = Path(out)
    check_empty(out, overwrite)
    folder = adapter_folder(source_of(adapter))
    if folder is None:
        raise ValueError(f"{adapter} is no adapter: it has no adapter_config.json, or is a whole model")
    below = source_of(base or Base.read(folder).name)
    for source in (folder, below):
        if Path(source).exists() and out.resolve() == Path(source).resolve():
            raise FileExistsError(f"{out} is what is merged; choose another folder")
    config = {} if str(below).startswith(ASSEMBLED) else {"config": _full_precision(below)}
    model, processor = load(folder, base=below, dtype=dtype, **config)
    merged = model.merge_and_unload(safe_merge=True)
    with whole_folder(out) as scratch:
        merged.save_pretrained(scratch)
        processor.save_pretrained(scratch)
    return out


def _full_precision(source: str | Path) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is stored quantised, which nothing can be added to; give it in full precision")
    return config
