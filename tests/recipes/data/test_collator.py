import pytest
import torch

import mllm_vision as mv
from mllm_vision.projectors.spatial_tokens import SpatialTokensConfig
from mllm_vision.recipes.data import ChatCollator, DataSource, training_rows
from mllm_vision.reducers.hiprune import HiPruneConfig
from tests.hosts import HOSTS
from tests.recipes.data.written import ROWS, processor_of, write

PACKED = [host for host in HOSTS if "vision_start" not in host.image_mark]
METHODS = {"stock": [], "hiprune": [HiPruneConfig(keep=1 / 3)], "spatial tokens": [SpatialTokensConfig()]}


def _rows(host, tmp_path):
    source = DataSource(format="conversations", path=write(tmp_path, ROWS))
    rows = training_rows([source], processor_of(host), max_length=400)
    return [rows[i] for i in range(len(rows))]


def _loss(model, collator, rows):
    batch = collator(rows)
    assert batch.pop("row_ids") == [row["row_id"] for row in rows]
    return model(**batch).loss


def _one_by_one(model, collator, rows):
    """The mean over all labels, of rows that were each a batch."""
    counts = torch.tensor([int((row["labels"] != -100).sum()) for row in rows])
    losses = torch.stack([_loss(model, collator, [row]) for row in rows])
    return (losses * counts).sum() / counts.sum()


@pytest.mark.parametrize("methods", METHODS)
@torch.no_grad()
def test_a_batch_has_the_loss_of_its_rows(host, model, methods, tmp_path):
    if methods == "spatial tokens" and host.name == "llava-next":
        pytest.skip("its tiles have fewer patches than there are spatial tokens to a side")
    mv.apply(model, *METHODS[methods])
    collator, rows = ChatCollator(processor_of(host)), _rows(host, tmp_path)
    torch.testing.assert_close(_loss(model, collator, rows), _one_by_one(model, collator, rows))
    torch.testing.assert_close(_loss(model, collator, rows[::-1]), _loss(model, collator, rows))


def test_rows_are_padded_to_the_right(tmp_path):
    host = HOSTS[0]
    rows = _rows(host, tmp_path)
    batch = ChatCollator(processor_of(host))(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        for name, fill in (
            ("input_ids", host.processor.tokenizer.pad_token_id),
            ("attention_mask", 0),
            ("labels", -100),
        ):
            expected = torch.cat([row[name], torch.full((longest - length,), fill)])
            assert torch.equal(batch[name][i], expected)
    assert torch.equal(batch["pixel_values"], torch.cat([rows[0]["pixel_values"], rows[1]["pixel_values"]]))
    assert list(batch) == ["input_ids", "attention_mask", "pixel_values", "labels", "row_ids"]


def test_pictures_of_several_shapes_are_padded_behind(tmp_path):
    host = next(host for host in HOSTS if host.name == "llava-next")
    rows = _rows(host, tmp_path)
    one, two = rows[0]["pixel_values"], rows[1]["pixel_values"]
    assert one.shape[:2] == (1, 5) and two.shape[:2] == (2, 3)
    pixels = ChatCollator(processor_of(host))(rows)["pixel_values"]
    assert torch.equal(pixels[:1], one)
    assert torch.equal(pixels[1:, :3], two)
    assert not pixels[1:, 3:].any()


def test_without_a_pad_token_rows_are_padded_with_the_end_token(tmp_path):
    processor = processor_of(HOSTS[0])
    processor.tokenizer.pad_token = None
    batch = ChatCollator(processor)(_rows(HOSTS[0], tmp_path))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.eos_token_id).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("host", PACKED, ids=lambda host: host.name)
@torch.no_grad()
def test_packed_rows_have_the_loss_of_rows_alone(host, attention, tmp_path):
    model, processor, rows = host.model(), processor_of(host), _rows(host, tmp_path)
    model.set_attn_implementation(attention)
    alone = _one_by_one(model, ChatCollator(processor), rows)
    torch.testing.assert_close(_loss(model, ChatCollator(processor, pack=True), rows), alone)
    torch.testing.assert_close(_loss(model, ChatCollator(processor, pack=True), rows[::-1]), alone)


def test_a_packed_row_sees_itself_and_what_is_ahead(tmp_path):
    rows = []
    for n in (2, 3):
        ids = torch.arange(n)
        rows.append({"input_ids": ids, "attention_mask": torch.ones(n), "labels": ids, "row_id": str(n)})
    batch = ChatCollator(processor_of(HOSTS[0]), pack=True)(rows)
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].tolist() == [[0, 1, 0, 1, 2]]
    sees = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert (batch["attention_mask"][0, 0] == 0).long().tolist() == sees
    assert batch["attention_mask"].min() == torch.finfo(torch.float32).min
    assert batch["row_ids"] == ["2", "3"]


@torch.no_grad()
def test_packing_goes_with_bfloat16(tmp_path):
    host = HOSTS[0]
    model, rows = host.model().bfloat16(), _rows(host, tmp_path)
    batch = ChatCollator(processor_of(host), pack=True, dtype=torch.bfloat16)(rows)
    assert batch["attention_mask"].dtype == torch.bfloat16
    del batch["row_ids"]
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    alone = _one_by_one(host.model(), ChatCollator(processor_of(host)), rows)
    torch.testing.assert_close(model(**batch).loss.float(), alone, rtol=1e-2, atol=0)  # of 8 bits


@torch.no_grad()
def test_methods_that_change_the_number_of_tokens_refuse_packs(tmp_path):
    model = mv.apply(HOSTS[0].model(), HiPruneConfig(keep=1 / 3))
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, length\)"):
        _loss(model, ChatCollator(processor_of(HOSTS[0]), pack=True), _rows(HOSTS[0], tmp_path))


def test_positions_in_several_dimensions_are_not_packed():
    (host,) = [host for host in HOSTS if host not in PACKED]
    with pytest.raises(ValueError, match=r"cannot be packed, because its model gives .* several dimensions"):
        ChatCollator(processor_of(host), pack=True)


@pytest.mark.parametrize("pack", [False, True])
def test_a_blank_picture_reaches_every_module_and_changes_nothing(host, pack, tmp_path):
    if pack and host not in PACKED:
        pytest.skip("its rows are not packed")
    processor, text = processor_of(host), _rows(host, tmp_path)[2:] * 2
    gradients = []
    for blank in (False, True):
        model = host.model().double()
        batch = ChatCollator(processor, pack=pack, blank_image=blank, dtype=torch.float64)(text)
        del batch["row_ids"]
        batch |= {name: value.double() for name, value in batch.items() if name == "pixel_values"}
        loss = model(**batch).loss
        loss.backward()
        gradients.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (plain, without), (loss, with_blank) = gradients
    torch.testing.assert_close(loss, plain, atol=1e-6, rtol=0)
    shown = [name for name, grad in with_blank.items() if grad is not None and without[name] is None]
    assert any("projector" in name or "merger" in name for name in shown)
    assert all(not with_blank[name].any() for name in shown)
    for name, grad in without.items():
        if grad is not None:
            torch.testing.assert_close(with_blank[name], grad, atol=1e-6, rtol=0)


def test_a_blank_picture_is_put_in_only_where_there_is_none(tmp_path):
    processor, rows = processor_of(HOSTS[0]), _rows(HOSTS[0], tmp_path)
    collator = ChatCollator(processor, blank_image=True)
    assert len(collator(rows)["pixel_values"]) == 3
    longer = {**rows[2], **{n: rows[2][n].repeat(9) for n in ("input_ids", "attention_mask", "labels")}}
    batch = collator([longer, rows[2]])
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [0, 36]  # the shorter has it
    assert len(batch["row_ids"]) == 2
    assert "pixel_values" not in ChatCollator(processor)([longer, rows[2]])
    assert "pixel_values" not in rows[2]
