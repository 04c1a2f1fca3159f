"""Write composed photographs with questions: a folder to train a model from and to measure it on."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import PIL

from mllm_vision.folders import check_empty, whole_folder
from mllm_vision.photos.compose import REFERENCE_SIDE, compose
from mllm_vision.photos.material import SPLITS, Material
from mllm_vision.photos.questions import Asker, Question

MANIFEST = "photos.json"
IMAGE_FOLDER = "images"
QUESTION_FOLDER = "questions"
OBJECTS = "objects.jsonl"
JPEG_QUALITY = 90


def export_photos(
    folder: str | Path,
    cutouts: str | Path,
    backgrounds: Sequence[str | Path],
    sizes: Mapping[str, int],
    *,
    side: int = REFERENCE_SIDE,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Compose photographs into ``folder``.

    It then holds, with JPEG files under ``images/``:

    - ``captions.jsonl``: training pictures, each with one turn, a caption; rows as ``datasets`` reads chat messages.
    - ``train.jsonl``, ``validation.jsonl``: each picture with up to eight questions as turns.
    - ``questions/validation.jsonl``, ``questions/test.jsonl``: one question a row, for the benchmark ``photos``.
    - ``objects.jsonl``: what was pasted where.
    - ``photos.json``: what it was made of and how.

    Args:
        folder: New, or empty.
        cutouts: As for `Material`.
        backgrounds: As for `Material`.
        sizes: By split, how many photographs.
        side: Their width and height in pixels.
        seed: Another seed composes other photographs of the same cut-outs; the splits stay apart.
        overwrite: Replace an earlier export.

    Raises:
        FileExistsError: ``folder`` has something in it and ``overwrite`` is false, or it is no export.
        NotADirectoryError: a folder is missing.
        ValueError: the folders do not hold what is needed, or ``side`` is too small.
    """
    if side < 112:
        raise ValueError(f"side must be at least 112 pixels so that a cut-out can be recognised, got {side}")
    folder = Path(folder)
    check_empty(folder, overwrite, [MANIFEST], "composed photographs")
    material = Material(cutouts, backgrounds, side)
    with whole_folder(folder) as partial:
        _write_photos(partial, material, sizes, seed)
        manifest = {
            "sizes": dict(sizes),
            "side": side,
            "seed": seed,
            "pillow": PIL.__version__,
            "cutouts": material.pools,
            "backgrounds": {split: [one.name for one in found] for split, found in material.backgrounds.items()},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


def _write_photos(folder: Path, material: Material, sizes: Mapping[str, int], seed: int) -> None:
    """Write the pictures of all splits, what is on them, and what is said about them."""
    asker = Asker(material)
    (folder / IMAGE_FOLDER).mkdir()
    (folder / QUESTION_FOLDER).mkdir()
    with ExitStack() as stack:
        names = ("captions", "train", "validation", "questions/validation", "questions/test", "objects")
        files = {name: stack.enter_context(open(folder / f"{name}.jsonl", "w", encoding="utf-8")) for name in names}

        def write(name: str, row: dict[str, Any]) -> None:
            files[name].write(json.dumps(row) + "\n")

        for split in SPLITS:
            for index in range(sizes[split]):
                photo, image = compose(material, split, index, seed=seed)
                rng = random.Random(f"ask-{seed}-{photo.name}")
                picture = f"{IMAGE_FOLDER}/{photo.name}.jpg"
                image.save(folder / picture, quality=JPEG_QUALITY)
                write("objects", photo.to_dict())
                if split == "train":
                    write("captions", _chat(f"{photo.name}-caption", picture, [asker.caption_question(photo, rng)]))
                if split != "test":
                    write(split, _chat(photo.name, picture, asker.conversation(photo, rng)))
                if split != "train":
                    for number, question in enumerate(asker.examination(photo, rng)):
                        row = {"id": f"{photo.name}-{number}", "image": f"{photo.name}.jpg", **vars(question)}
                        row["question"] = row.pop("text")
                        write(f"questions/{split}", row)


def _chat(name: str, picture: str, questions: Sequence[Question]) -> dict[str, Any]:
    messages = []
    for turn, question in enumerate(questions):
        asked: list[dict[str, str]] = [{"type": "image"}] if turn == 0 else []
        messages.append({"role": "user", "content": [*asked, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    return {"id": name, "images": [picture], "messages": messages}
