"""Local copies of the benchmarks: hand-written rows with the columns of the hub's data sets, and tiny pictures."""

import json
import shutil
from pathlib import Path

from PIL import Image

ROWS = Path(__file__).parent / "rows"
BENCHMARKS = sorted(path.stem for path in ROWS.iterdir())
FOLDERS = [path.name for path in ROWS.iterdir() if path.is_dir()]
COLOURS = {"beach": (250, 220, 150), "street": (90, 90, 100), "square": (255, 255, 255), "code": (10, 20, 30)}


def rows_of(task):
    """The rows of a benchmark that is one table."""
    return [json.loads(line) for line in (ROWS / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def write_folder(folder, task, rows=None):
    """A folder with the rows of a benchmark (or those given) as JSONL, and with the pictures they name."""
    draw_pictures(folder / "images", task)
    if task in FOLDERS:
        shutil.copytree(ROWS / task, folder, dirs_exist_ok=True)
    else:
        lines = [json.dumps(row) for row in (rows_of(task) if rows is None else rows)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def draw_pictures(folder, task):
    """Every picture, of one colour each."""
    folder.mkdir(parents=True)
    if task == "chair":
        for i in (7, 42, 99, 391):
            Image.new("RGB", (4, 4), (i % 256, 0, 0)).save(folder / f"COCO_val2014_{i:012}.jpg")
    for name, colour in COLOURS.items():
        Image.new("RGB", (6, 4), colour).save(folder / f"{name}.png")
