"""Training on features from disk is training on pictures, but for float16."""

import errno
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, TrainingArguments

import mllm_vision as mv
from mllm_vision.recipes import cached_tower as cache
from mllm_vision.recipes import disk
from mllm_vision.recipes.cached_tower import cached_tower, tower_digest
from mllm_vision.recipes.row_identity import Identity
from mllm_vision.reducers import DownsampleConfig, HiPruneConfig, PoolConfig
from tests.hosts import HOSTS, picture

(CLIP, FULL, DINO, SIGLIP) = HOSTS[:4]
TILED = (CLIP, FULL, DINO, SIGLIP)


class Rows:
    """Rows as the training data has them: 0 and 2 show one picture, 1 two (one of them that of 0), 3 none."""

    skipped = 1

    def __init__(self, host):
        self.host, self.opened = host, []

    def __len__(self):
        return 4

    def sizes(self):
        return [7]

    def __getitem__(self, index):
        self.opened.append(index)
        shown = [[picture(0)], [picture(1), picture(0)], [picture(2)], []][index]
        prompt = "{}" * len(shown) + ("What is left?", "How many?", "Is there a circle?", "Describe")[index]
        inputs = self.host.inputs((prompt, shown))
        row = {name: value if name == "pixel_values" else value[0] for name, value in inputs.items()}
        return {**row, "labels": row["input_ids"].clone(), "row_id": str(index)}


def cached_rows(rows, model, folder, digest="rows", **options):
    arguments = TrainingArguments(str(folder / "checkpoints"), use_cpu=True)
    return cache.cached_rows(rows, model, folder, arguments, Identity(digest, pictures=3), **options)


def same(row, other):
    return row.keys() == other.keys() and all(
        torch.equal(v, other[k]) if torch.is_tensor(v) else v == other[k] for k, v in row.items()
    )


def pictures_of(folder):
    return [line for file in folder.rglob("pictures.txt") for line in file.read_text().splitlines()]


def frozen(host):
    model = host.model().train()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def batch_of(rows, *numbers):
    """Two rows of one length, or a single one."""
    (row,) = (rows[number] for number in numbers)
    return {k: v if k == "pixel_values" else v[None] for k, v in row.items() if k != "row_id"}


def trained(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    if "pixel_values" in batch:
        loss.backward()
    gradients = [p.grad.clone() for p in model.model.multi_modal_projector.parameters() if p.grad is not None]
    return loss.detach(), gradients


@pytest.mark.parametrize("host", TILED, ids=lambda host: host.name)
def test_losses_and_gradients_are_those_of_pictures(tmp_path, host):
    model, rows = frozen(host), Rows(host)
    expected = [trained(model, batch_of(rows, i)) for i in range(4)]
    rows.opened.clear()
    stand_in = cached_rows(rows, model, tmp_path, batch_size=2)
    assert rows.opened == [0, 1, 2, 3] and len(stand_in) == 4
    assert len(pictures_of(tmp_path)) == 3  # three pictures, one of them in two rows
    with cached_tower(model):
        found = [trained(model, batch_of(stand_in, i)) for i in range(4)]
    assert rows.opened == [0, 1, 2, 3]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)  # float16 has 11 bits
    assert stand_in[0]["row_id"] == "0" and stand_in.sizes() == [7] and stand_in.skipped == 1
    assert "pixel_values" not in stand_in[3]
    shape = (37 if host.has_cls else 36, 64 if host is FULL else 32)
    assert stand_in[1]["pixel_values"].shape == (2, *shape) and stand_in[1]["pixel_values"].dtype == torch.float16
    assert torch.equal(stand_in[1]["pixel_values"][1], stand_in[0]["pixel_values"][0])
    with pytest.raises(IndexError, match="there are 4 rows, got number -1"):
        stand_in[-1]


@torch.no_grad()
def test_pictures_go_through_the_tower_and_checkpoints_hold_it(tmp_path):
    model = frozen(DINO).eval()
    inputs = DINO.inputs(("{}What?", [picture(5)]))
    expected = model(**inputs).logits
    with cached_tower(model):
        assert torch.equal(model(**inputs).logits, expected)
        model.save_pretrained(tmp_path)
    assert "forward" not in vars(model.model.vision_tower)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, expected)
    assert tower_digest(again) == tower_digest(model)


def test_the_cache_is_found_again_by_the_same_tower_alone(tmp_path, monkeypatch):
    passes = []
    stock = cache.tower_features
    monkeypatch.setattr(cache, "tower_features", lambda host, pixels: passes.append(len(pixels)) or stock(host, pixels))
    model, training = frozen(CLIP), []
    model.model.vision_tower.register_forward_pre_hook(lambda tower, args: training.append(tower.training))
    first = cached_rows(Rows(CLIP), model, tmp_path, batch_size=8)
    assert passes == [3] and training == [False] and model.model.vision_tower.training
    unopened = SimpleNamespace(skipped=0)
    again = cached_rows(unopened, model, tmp_path)
    assert [same(again[i], first[i]) for i in range(4)] == [True] * 4 and again.skipped == first.skipped == 1
    others = cached_rows(Rows(CLIP), model, tmp_path, digest="others")
    assert passes == [3] and torch.equal(others[2]["pixel_values"], first[2]["pixel_values"])
    model.config.vision_feature_layer = -1
    cached_rows(Rows(CLIP), model, tmp_path)
    assert passes == [3, 3]
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).add_(1e-3)
    cached_rows(Rows(CLIP), model, tmp_path)
    assert passes == [3, 3, 3]


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    model, passes = frozen(CLIP), []
    stock = cache.tower_features
    monkeypatch.setattr(cache, "tower_features", lambda host, pixels: passes.append(len(pixels)) or stock(host, pixels))
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "__getitem__", lambda rows, i, get=Rows.__getitem__: get(rows, i) if i < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cached_rows(Rows(CLIP), model, tmp_path, batch_size=1)
    assert passes == [1, 1] and not list(tmp_path.rglob("rows*"))
    assert len(cached_rows(Rows(CLIP), model, tmp_path, batch_size=1)) == 4
    assert passes == [1, 1, 1] and len(pictures_of(tmp_path)) == 3


def test_a_full_disk_is_found_before_the_tower_runs(tmp_path, monkeypatch):
    model, size = frozen(CLIP), 37 * 32 * 2
    free = 3 * size + 9
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    monkeypatch.setattr(cache, "tower_features", lambda host, pixels: torch.zeros(len(pixels), 37, 32))
    with pytest.raises(OSError, match=r"features of up to 3 pictures, .* choose another output") as raised:
        cached_rows(Rows(CLIP), model, tmp_path, besides=10)
    assert raised.value.errno == errno.ENOSPC and pictures_of(tmp_path) == []
    cached_rows(Rows(CLIP), model, tmp_path, besides=9)
    free = 0  # what is there needs no room
    cached_rows(Rows(CLIP), model, tmp_path, digest="others")


def test_the_tower_is_on_the_device_that_trains_while_it_fills(tmp_path, monkeypatch):
    model = frozen(CLIP)
    tower, device, moved = model.model.vision_tower, torch.device("meta"), []
    monkeypatch.setattr(TrainingArguments, "device", device)
    monkeypatch.setattr(TrainingArguments, "should_save", True)  # which asks what finding the device finds
    monkeypatch.setattr(tower, "to", moved.append)
    tower.register_forward_pre_hook(lambda *args: moved.append("runs"))
    cached_rows(Rows(CLIP), model, tmp_path)
    assert moved == [device, "runs", torch.device("cpu")]


@pytest.mark.parametrize(
    ("steps_of_mine", "others_busy", "told"),
    [(3, [0] * 4, [1, 1, 1, 0]), (0, [1, 1, 0], [0, 0, 0]), (1, [0, 1, 0], [1, 0, 0])],
)
def test_processes_wait_for_those_at_work_by_signs_of_life(monkeypatch, steps_of_mine, others_busy, told):
    said = []

    def reduce(mine):
        said.append(mine.item())
        return mine + others_busy[len(said) - 1]

    monkeypatch.setattr(cache, "reduce", reduce)
    monkeypatch.setattr(cache, "_SIGN_OF_LIFE", 0.0)
    with cache._all_waiting() as still_at_work:
        for _ in range(steps_of_mine):
            still_at_work()
    assert said == told


def test_a_sign_of_life_is_given_no_more_often_than_needed(monkeypatch):
    said = []
    monkeypatch.setattr(cache, "reduce", lambda mine: said.append(mine.item()) or mine)
    with cache._all_waiting() as still_at_work:
        still_at_work()
        still_at_work()
    assert said == [0]


def test_a_process_that_does_not_fill_only_reads(tmp_path, monkeypatch):
    model = frozen(CLIP)
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    with pytest.raises(FileNotFoundError, match="where all machines see it, or set save_on_each_node"):
        cached_rows(Rows(CLIP), model, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_method_that_works_on_tokens_alone_may_stay(tmp_path):
    model = mv.apply(frozen(DINO), PoolConfig(keep=1 / 4))
    rows = Rows(DINO)
    expected = trained(model, batch_of(rows, 0))
    with cached_tower(model):
        found = trained(model, batch_of(cached_rows(rows, model, tmp_path), 0))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("host", "methods", "train", "message"),
    [
        (CLIP, [], True, "the tower is trained, so that its features change"),
        (CLIP, [HiPruneConfig(keep=1 / 3)], False, "among hiprune has to see the tower at work"),
        (CLIP, [DownsampleConfig(keep=1 / 4)], False, "among downsample has to see the tower at work"),
        *[(host, [], False, "cuts pictures into tiles or takes them in any size") for host in HOSTS[4:]],
    ],
)
def test_what_cannot_be_trained_on_features_is_refused(tmp_path, host, methods, train, message):
    model = mv.apply(host.model(), *methods).requires_grad_(train)
    with pytest.raises(ValueError, match=f"{message}.*train without the cache"), cached_tower(model):
        pass
    with pytest.raises(ValueError, match=message):
        cached_rows(Rows(host), model, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
