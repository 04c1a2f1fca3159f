"""The demo: one small trained model, held-out questions, and what each reducer costs and answers.

The questions are about drawn scenes, or about photographs composed of real cut-outs.

Every method gets the same questions. Times are medians over single pictures, taken in turns so that whatever else the
machine does hits all methods alike. Encode is images to image tokens; prefill the language model's first pass over the
fitted prompt, up to the first new token; decode each further token. The cache is on.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from rich.table import Table
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

import mllm_vision as mv
from mllm_vision.eval.answers import answer, inputs_for, prompt_for
from mllm_vision.eval.environment import environment
from mllm_vision.eval.families import FamilyTask
from mllm_vision.eval.measurement import Clock, Steps, measure_steps
from mllm_vision.eval.tasks.photos import Photos
from mllm_vision.eval.tasks.scenes import Scenes
from mllm_vision.pictures import SheetCell, SheetRow, contact_sheet, draw_kept, tile_pictures
from mllm_vision.reducers import CLSTopKConfig, DownsampleConfig, HiPruneConfig, PoolConfig, RandomConfig
from mllm_vision.registry import MethodConfig
from mllm_vision.scenes import FAMILIES, render, sample_scene

SCENES_MODEL, PHOTOS_MODEL = "tiny-llava-scenes", "dino-smollm2"
SPLIT: Final = "test"
SEED = 0
METHODS: dict[str, list[MethodConfig]] = {
    "all tokens": [],
    "hiprune 1/2": [HiPruneConfig(keep=1 / 2)],
    "hiprune 1/3": [HiPruneConfig(keep=1 / 3)],
    "hiprune 1/9": [HiPruneConfig(keep=1 / 9)],
    "random 1/3": [RandomConfig(keep=1 / 3, seed=SEED)],
    "pool 1/3": [PoolConfig(keep=1 / 3)],
    "cls_topk 1/3": [CLSTopKConfig(keep=1 / 3)],
    "downsample 1/3": [DownsampleConfig(keep=1 / 3)],
}

RESULTS, SHEET, PICTURES = "demo.json", "demo.png", "kept"
PICTURED = ("existence", "count", "colour", "reading", "position")
"""Families of which a question is drawn."""

WARMUPS, DECODED, ANSWERED = 2, 8, 8
BATCH = 32


@dataclass(frozen=True)
class Asked:
    """One question.

    Args:
        image: Name of its picture; questions about one picture share it.
        text, answer, family: As the data have them.
        picture: Loads or draws it.
        task: The benchmark that it is of, which knows a right answer.
    """

    image: str
    text: str
    answer: str
    family: str
    picture: Callable[[], Image.Image] = field(compare=False, repr=False)
    task: FamilyTask = field(compare=False, repr=False)

    def is_right(self, answer: str) -> bool:
        """Whether the benchmark counts this answer."""
        return bool(self.task.tally({"family": self.family, "answer": self.answer}, answer)["right"])

    def record(self) -> dict[str, str]:
        """What it is in words."""
        return {name: value for name, value in vars(self).items() if isinstance(value, str)}


@dataclass
class MethodResult:
    """One row of the demo's table.

    Args:
        name: Of the row.
        methods: The configs, as stored in `config.json`.
        tokens: Visual tokens of a picture.
        encode_ms: Images to image tokens.
        prefill_ms: First pass of the language model, up to the first new token.
        decode_ms: Each further token.
        answers: One for each question.
        right: How many of them are right.
    """

    name: str
    methods: list[dict[str, Any]]
    tokens: int
    encode_ms: float
    prefill_ms: float
    decode_ms: float
    answers: list[str]
    right: int


def run_demo(
    out: str | Path,
    *,
    model: str | Path | None = None,
    photos: str | Path | None = None,
    n: int = 96,
    rounds: int = 12,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[MethodResult]:
    """Ask ``n`` held-out questions with every method; write results, a sheet and pictures into ``out``.

    Args:
        out: A folder.
        model: A checkpoint trained on drawn scenes or on composed photographs, as for `mv.load`; None is the one that
            comes with the library.
        photos: Folder that `mllm-vision photos` wrote, to ask about its test photographs; None asks about scenes.
        n: Number of questions.
        rounds: Measurements that a time is the median of.
        overwrite: Whether to write into a folder that has something in it.
        say: Is told what is being done.

    Raises:
        FileExistsError: ``out`` has something in it and ``overwrite`` is false.
        ImportError: there is no package with the parts of the model that comes along for photographs.
        ValueError: ``n`` or ``rounds`` is less than 1, or there are no questions in ``photos``.
    """
    out = Path(out)
    model = model or (SCENES_MODEL if photos is None else PHOTOS_MODEL)
    photographed = None if photos is None else list(islice(photo_questions(photos), n))
    if min(n, rounds) < 1:
        raise ValueError(f"n and rounds must be 1 or more, got {n} and {rounds}")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; choose another folder or allow to overwrite")
    say(f"loading {model}")
    host, processor = mv.load(model, dtype=torch.float32)
    side = processor.image_processor.crop_size["height"]
    asked = list(islice(held_out_questions(side), n)) if photographed is None else photographed
    say("measuring times")
    times = measure(host, processor, asked, rounds)
    results = []
    for name, methods in METHODS.items():
        say(f"{name}: answering {len(asked)} questions")
        with mv.using(host, *methods):
            answers = answer_questions(host, processor, asked)
            (kept,) = mv.inspect_tokens(host, **inputs_of(processor, asked[0]))
        right = sum(question.is_right(answer) for question, answer in zip(asked, answers, strict=True))
        stored = [method.to_dict() for method in methods]
        results.append(MethodResult(name, stored, len(kept.patch_index), *times[name], answers, right))
    say("drawing what was kept")
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    record = {
        "environment": environment(),
        "settings": {
            "model": str(model),
            "data": "scenes" if photos is None else "photos",
            "split": SPLIT,
            "n": len(asked),
            "seed": SEED,
            "rounds": rounds,
            "dtype": "float32",
        },
        "questions": [question.record() for question in asked],
        "methods": [asdict(result) for result in results],
    }
    (out / RESULTS).write_text(json.dumps(record, indent=1), encoding="utf-8")
    draw(out, host, processor, asked, results)
    return results


def held_out_questions(side: int) -> Iterator[Asked]:
    """Test scenes of ``side`` pixels, each with one question of every family that can be asked about it."""
    task = Scenes(split=SPLIT)
    for index in count():
        scene, rng = sample_scene(SPLIT, index, side=side), random.Random(f"demo-{SEED}-{index}")
        for question in (ask(scene, rng) for ask in FAMILIES.values()):
            if question is not None:
                name = f"{SPLIT}-{index}"
                yield Asked(name, question.text, question.answer, question.family, partial(render, scene), task)


def photo_questions(folder: str | Path) -> Iterator[Asked]:
    """Questions about the test photographs of ``folder``, one of each family after the other.

    Raises:
        ValueError: there are none.
    """
    task = Photos(split=SPLIT)
    by_family: dict[str, list[Asked]] = {}
    for example in task.load(Path(folder)).examples:
        (picture,), target = example.images, example.target
        name, _, _ = example.id.rpartition("-")
        asked = Asked(name, example.question, target["answer"], target["family"], picture, task)
        by_family.setdefault(asked.family, []).append(asked)
    rng = random.Random(f"demo-{SEED}")
    for questions in by_family.values():
        rng.shuffle(questions)
    yield from chain.from_iterable(zip(*by_family.values(), strict=False))


def answer_questions(host: PreTrainedModel, processor: ProcessorMixin, asked: Sequence[Asked]) -> list[str]:
    """Greedy answers, in lower case and without a final full stop."""
    answers: list[str] = []
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        prompts = [prompt_for(processor, question.text, 1) for question in batch]
        pictures = [[question.picture()] for question in batch]
        ids = [str(start + i) for i in range(len(batch))]
        inputs = inputs_for(processor, prompts, pictures)
        answers += answer(host, processor, inputs, ids, max_new_tokens=ANSWERED)
    return [said.lower().removesuffix(".") for said in answers]


def inputs_of(processor: ProcessorMixin, asked: Asked) -> BatchFeature:
    """What the processor makes of one question."""
    return inputs_for(processor, [prompt_for(processor, asked.text, 1)], [[asked.picture()]])


def measure(
    host: PreTrainedModel, processor: ProcessorMixin, asked: Sequence[Asked], rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of encode, prefill and decode by method: medians of ``rounds``, of which each asks all methods."""
    taken: dict[str, list[Steps]] = {name: [] for name in METHODS}
    for i in range(WARMUPS + rounds):
        inputs = inputs_of(processor, asked[i % len(asked)])
        for name, methods in METHODS.items():
            with mv.using(host, *methods), torch.inference_mode():
                taken[name].append(measure_steps(host, inputs, DECODED, Clock()))
    return {name: _median_ms(steps[WARMUPS:]) for name, steps in taken.items()}


def _median_ms(steps: Sequence[Steps]) -> tuple[float, float, float]:
    encode, prefill, decode = (
        1e3 * statistics.median(getattr(step, name) for step in steps) for name in ("encode", "prefill", "decode")
    )
    return encode, prefill, decode


def pictured(asked: Sequence[Asked]) -> list[int]:
    """Numbers of the questions to draw: the first of each family in `PICTURED`, each about another picture."""
    shown: dict[str, int] = {}
    for i, question in enumerate(asked):
        new_picture = question.image not in [asked[j].image for j in shown.values()]
        if new_picture and question.family in PICTURED and question.family not in shown:
            shown[question.family] = i
    return list(shown.values())


def draw(
    out: Path,
    host: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Sequence[Asked],
    results: Sequence[MethodResult],
) -> None:
    """Write the sheet and the pictures in it, larger and with legends."""
    rows = []
    for i in pictured(asked):
        question, inputs = asked[i], inputs_of(processor, asked[i])
        (tile,) = tile_pictures(question.picture(), 0, inputs, processor.image_processor)
        cells: list[SheetCell] = []
        for result, methods in zip(results, METHODS.values(), strict=True):
            with mv.using(host, *methods):
                (kept,) = mv.inspect_tokens(host, **inputs)
            seen = tile if not cells else _resized(tile, kept.grid, cells[0].kept[0].grid)
            name = f"{question.family}-{result.name.replace(' ', '-').replace('/', '-')}.png"
            draw_kept([seen], [kept]).save(out / PICTURES / name)
            picture = draw_kept([seen], [kept], side=240, legend=False)
            cells.append(SheetCell(picture, [kept], result.answers[i], question.is_right(result.answers[i])))
        rows.append(SheetRow(question.text, question.answer, cells))
    contact_sheet([f"{result.name}\n{result.tokens} tokens" for result in results], rows).save(out / SHEET)


def _resized(tile: Image.Image, grid: tuple[int, int], stock: tuple[int, int]) -> Image.Image:
    """The tile with the detail that is left of it on ``grid`` (h, w) instead of on the ``stock`` (H, W)."""
    small = (tile.width * grid[1] // stock[1], tile.height * grid[0] // stock[0])
    return tile.resize(small, Image.Resampling.BICUBIC).resize(tile.size, Image.Resampling.BICUBIC)


def table(results: Sequence[MethodResult]) -> Table:
    """The results, one method a row."""
    n = len(results[0].answers)
    view = Table(title=f"{n} questions about held-out pictures; milliseconds are medians")
    view.add_column("method", no_wrap=True)
    for heading in ("visual tokens", "encode ms", "prefill ms", "decode ms/token", f"right of {n}"):
        view.add_column(heading, justify="right")
    for row in results:
        times = (f"{ms:.1f}" for ms in (row.encode_ms, row.prefill_ms, row.decode_ms))
        view.add_row(row.name, str(row.tokens), *times, str(row.right))
    return view
