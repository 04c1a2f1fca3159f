"""Write drawn scenes to disk: as a `datasets` directory, or as conversations with an image folder."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_vision.folders import check_empty
from mllm_vision.scenes.draw import REFERENCE_SIDE, Scene, render, sample_scene
from mllm_vision.scenes.questions import (
    FAMILIES,
    NEGATIVES,
    Question,
    caption,
    caption_question,
    existence_question,
)

CONVERSATIONS = "conversations.json"
IMAGE_FOLDER = "images"


def scene_questions(scene: Scene) -> list[Question]:
    """One question of each family that can be asked, existence once for each kind of answer; always the same ones."""
    rng = random.Random(f"export-{scene.split}-{scene.index}")
    questions: list[Question | None] = [existence_question(scene, rng, kind) for kind in ("present", *NEGATIVES)]
    questions += [ask(scene, rng) for family, ask in FAMILIES.items() if family != "existence"]
    return [question for question in questions if question]


def export_dataset(
    folder: str | Path, split: str, n: int, *, side: int = REFERENCE_SIDE, seed: int = 0, overwrite: bool = False
) -> Path:
    """Save `n` scenes as a `datasets.Dataset` directory, for `datasets.load_from_disk`.

    Columns: `image`, `scene` (its description as JSON), `content_hash`, `caption`, `questions` (a list of family, kind,
    text and answer).

    Raises:
        FileExistsError: `folder` has something in it and `overwrite` is false.
    """
    import datasets

    folder = _empty_folder(folder, overwrite)

    def rows() -> Iterator[dict[str, Any]]:
        for i in range(n):
            scene = sample_scene(split, i, side=side, seed=seed)
            yield {
                "image": render(scene),
                "scene": json.dumps(scene.to_dict()),
                "content_hash": scene.content_hash(),
                "caption": caption(scene),
                "questions": [vars(question) for question in scene_questions(scene)],
            }

    text = datasets.Value("string")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "scene": text,
            "content_hash": text,
            "caption": text,
            "questions": datasets.List(dict.fromkeys(("family", "kind", "text", "answer"), text)),
        }
    )
    datasets.Dataset.from_list(list(rows()), features=features).save_to_disk(folder)
    return folder


def export_conversations(
    folder: str | Path, split: str, n: int, *, side: int = REFERENCE_SIDE, seed: int = 0, overwrite: bool = False
) -> Path:
    """Save `n` scenes as LLaVA-style models are trained on: `conversations.json` and PNG files under `images/`.

    A conversation is the caption first and then `scene_questions`; `image` is relative to the image folder.

    Raises:
        FileExistsError: `folder` has something in it and `overwrite` is false.
    """
    folder = _empty_folder(folder, overwrite)
    (folder / IMAGE_FOLDER).mkdir(parents=True)
    conversations = []
    for i in range(n):
        scene = sample_scene(split, i, side=side, seed=seed)
        name = f"{split}-{i:06d}"
        render(scene).save(folder / IMAGE_FOLDER / f"{name}.png")
        turns = [caption_question(scene, random.Random(f"export-{name}")), *scene_questions(scene)]
        messages = []
        for turn, question in enumerate(turns):
            mark = "<image>\n" if turn == 0 else ""
            messages.append({"from": "human", "value": mark + question.text})
            messages.append({"from": "gpt", "value": question.answer})
        conversations.append({"id": name, "image": f"{name}.png", "conversations": messages})
    (folder / CONVERSATIONS).write_text(json.dumps(conversations, indent=1), encoding="utf-8")
    return folder


def _empty_folder(folder: str | Path, overwrite: bool) -> Path:
    """`folder` with nothing in it. An earlier export is removed whole, since remains of it would mix with this one."""
    folder = Path(folder)
    check_empty(folder, overwrite, (CONVERSATIONS, "dataset_info.json"), "exported scenes")
    if folder.exists():
        shutil.rmtree(folder)
    return folder
