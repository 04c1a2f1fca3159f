"""What holds for every host: off is stock, a batch is its images, pruned is the stock model on a shorter prompt.

Shapes: B prompts of L columns before and M after pruning, D channels of the language model.
"""

from __future__ import annotations

import inspect
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import mllm_vision as mv
from mllm_vision.reducers import CLSTopKConfig, DownsampleConfig, HiPruneConfig, PoolConfig, RandomConfig
from tests.hosts import HOSTS, Host, first_block, picture

PRUNERS = (HiPruneConfig(keep=9, alpha=0.5), RandomConfig(keep=9, seed=3), CLSTopKConfig(keep=0.3))
METHODS = (*PRUNERS, PoolConfig(keep=9), DownsampleConfig(keep=0.3))
WEIGHTS = "model.safetensors"
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def on_every_host(methods):
    """Sweep the methods over the hosts that can give what they need."""
    cases = [(h, m) for h in HOSTS for m in methods if h.has_cls or not isinstance(m, CLSTopKConfig)]
    return pytest.mark.parametrize(("host", "method"), cases, ids=[f"{h.name}-{m.type}" for h, m in cases])


@pytest.fixture
def method():
    return PRUNERS[0]


def question(seed: int = 1, width: int = 84, height: int = 84):
    return "{} How many red squares are there?", [picture(seed, width, height)]


def mixed_rows():
    """Prompts of one image, of none and of two; four shapes of images."""
    two = [picture(3, 60, 150), picture(4, 130, 56)]
    return question(1), ("Is grass green?", []), ("Compare {} and {} please.", two), question(5, 140, 130)


def keep_everything(host: Host) -> HiPruneConfig:
    inputs = host.inputs(question())
    return HiPruneConfig(keep=1000 if "image_sizes" in inputs or "image_grid_thw" in inputs else 36)


def image_inputs(inputs):
    return {name: inputs[name] for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in inputs}


def prompts(inputs):
    """The ids of each row without its padding."""
    return [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def projector(model: PreTrainedModel):
    return next(m for name, m in model.named_modules() if name.endswith(("multi_modal_projector", "merger")))


def prune_by_hand(host: Host, stock: PreTrainedModel, inputs, kept, added=()) -> list[tuple[torch.Tensor, ...]]:
    """For each row its pruned prompt: kept columns (M,), embeddings (1, M, D), and positions (axes, 1, M) or None.

    Args:
        kept: The patches kept of each image, as lists.
        added: What each image begins with, (n, D), if anything.
    """
    features = stock.get_image_features(**image_inputs(inputs), return_dict=True).pooler_output
    embed, image_token = stock.get_input_embeddings(), stock.config.image_token_id
    rows, image = [], 0
    for ids in prompts(inputs):
        columns, embeddings, waiting = [], [], []
        for column, token in enumerate(ids.tolist()):
            if token != image_token:
                columns.append(column)
                embeddings.append(embed.weight[token])
                continue
            if not waiting:
                waiting = list(zip(host.placeholders(inputs, image), features[image], strict=True))
                if len(added):
                    columns += [column] * len(added[image])
                    embeddings += list(added[image])
                chosen, image = kept[image], image + 1
            patch, feature = waiting.pop(0)
            if patch is None or patch in chosen:
                columns.append(column)
                embeddings.append(feature)
        positions = None
        if "image_grid_thw" in inputs:
            types = (ids == image_token).int()[None]
            first = image - int((types[0].diff() == 1).sum())
            grids = inputs["image_grid_thw"][first:image]
            positions = stock.model.get_rope_index(ids[None], types, image_grid_thw=grids)[0][..., columns]
        rows.append((torch.tensor(columns), torch.stack(embeddings)[None], positions))
    assert image == len(features)
    return rows


def kept_patches(model: PreTrainedModel, inputs) -> list[list[int]]:
    """The patches that `inspect_tokens` reports, by image."""
    kept: list[list[int]] = []
    for tile in mv.inspect_tokens(model, **inputs):
        if tile.tile == 0:
            kept.append([])
        size = tile.grid[0] * tile.grid[1]
        kept[tile.image] += [tile.tile * size + patch for patch in tile.patch_index.tolist()]
    return kept


def logits_by_hand(stock: PreTrainedModel, embeddings, positions):
    return stock(inputs_embeds=embeddings, position_ids=positions, use_cache=False).logits


def greedy_by_hand(stock: PreTrainedModel, embeddings, positions, steps: int) -> list[int]:
    """Greedy decoding without a cache, mask or padding."""
    tokens = []
    for _ in range(steps):
        tokens.append(int(logits_by_hand(stock, embeddings, positions)[0, -1].argmax()))
        embeddings = torch.cat([embeddings, stock.get_input_embeddings().weight[tokens[-1]][None, None]], dim=1)
        if positions is not None:
            positions = torch.cat([positions, positions.max().expand(*positions.shape[:2], 1) + 1], dim=2)
    return tokens


# --- nothing plugged in -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_empty_slots_are_stock(host, model):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    mv.apply(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)
    assert model.generate(**inputs, **GREEDY).tolist() == stock.generate(**inputs, **GREEDY).tolist()


def traces(model: PreTrainedModel) -> dict[str, object]:
    """Everything about a model that a method could leave behind, but for its weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "types": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [[hook.__qualname__ for kind in hooks for hook in vars(m)[kind].values()] for m in model.modules()],
        "config": (type(model.config), model.config.to_dict(), sorted(vars(model.config))),
        "generation": model.generation_config.to_dict(),
        "attention": [m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)],
    }


@on_every_host(METHODS)
@torch.no_grad()
def test_remove_leaves_the_stock_model(host, model, method):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    logits = stock(**inputs).logits
    assert_close(model(**inputs).logits, logits, rtol=0, atol=0)
    before = traces(stock)  # after a forward pass, in which transformers installs hooks of its own
    classes = {type(module): dict(vars(type(module))) for module in stock.modules()}

    assert mv.apply(model, method) is model
    shorter = model(**inputs).logits
    assert isinstance(model, type(stock))
    assert mv.remove(model) is model

    assert shorter.shape[1] < logits.shape[1]
    assert traces(model) == before
    assert classes == {type(module): dict(vars(type(module))) for module in stock.modules()}
    assert list(model.state_dict()) == list(stock.state_dict())
    assert_close(model(**inputs).logits, logits, rtol=0, atol=0)
    assert model.generate(**inputs, **GREEDY).tolist() == stock.generate(**inputs, **GREEDY).tolist()


@torch.no_grad()
def test_other_instances_are_untouched(host, model, method):
    inputs, other = host.inputs(question()), host.model()
    expected = other(**inputs).logits
    mv.apply(model, method)
    copied = deepcopy(model)
    pruned = model(**inputs).logits
    assert_close(other(**inputs).logits, expected, rtol=0, atol=0)
    mv.remove(model)
    assert_close(copied(**inputs).logits, pruned, rtol=0, atol=0)
    assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_using_ends_with_its_block(host, model, method):
    inputs = host.inputs(question())
    logits = model(**inputs).logits
    before = traces(model)
    with mv.using(model, method):
        pruned = model(**inputs).logits
        with pytest.raises(KeyboardInterrupt), mv.using(model, RandomConfig(keep=1)):
            raise KeyboardInterrupt
        assert_close(model(**inputs).logits, pruned, rtol=0, atol=0)
    assert traces(model) == before
    assert pruned.shape[1] < logits.shape[1]


@torch.no_grad()
def test_keeping_everything_is_stock(host, model):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    mv.apply(model, keep_everything(host))
    expected = stock(**inputs).logits
    inside = inputs["attention_mask"].bool()
    assert_close(model(**inputs).logits[inside], expected[inside])


# --- pruned: the stock model on a shorter prompt ----------------------------------------------------------------------


@on_every_host(PRUNERS)
@torch.no_grad()
def test_forward_is_stock_on_the_kept_tokens(host, model, method):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    mv.apply(model, method)
    kept = kept_patches(model, inputs)
    logits = model(**inputs).logits
    rows = prune_by_hand(host, stock, inputs, kept)
    assert logits.shape[1] == max(len(columns) for columns, _, _ in rows)
    for row, (columns, embeddings, positions) in zip(logits, rows, strict=True):
        assert_close(row[-len(columns) :], logits_by_hand(stock, embeddings, positions)[0])


@on_every_host(PRUNERS)
@torch.no_grad()
def test_generate_is_stock_on_the_kept_tokens(host, model, method):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    mv.apply(model, method)
    rows = prune_by_hand(host, stock, inputs, kept_patches(model, inputs))
    out = model.generate(**inputs, **GREEDY)
    length = inputs["input_ids"].shape[1]
    assert out[:, :length].tolist() == inputs["input_ids"].tolist()
    assert out[:, length:].tolist() == [greedy_by_hand(stock, e, p, 8) for _, e, p in rows]


@on_every_host(METHODS)
@torch.no_grad()
def test_a_batch_is_its_prompts(host, model, method):
    rows = mixed_rows()
    batch = host.inputs(*rows)
    mv.apply(model, method)
    logits, out = model(**batch).logits, model.generate(**batch, **GREEDY)
    for i, row in enumerate(rows):
        alone = host.inputs(row)
        expected = model(**alone).logits[0]
        assert_close(logits[i, -len(expected) :], expected)
        new = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
        assert out[i, batch["input_ids"].shape[1] :].tolist() == new.tolist()


@on_every_host(METHODS)
@torch.no_grad()
def test_a_batch_keeps_what_each_image_keeps(host, model, method):
    rows = mixed_rows()
    mv.apply(model, method)
    together = kept_patches(model, host.inputs(*rows))
    alone = [kept for row in rows if row[1] for kept in kept_patches(model, host.inputs(row))]
    assert together == alone


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(host, model, method, side):
    inputs = host.inputs(question())
    pads = {"input_ids": model.config.get_text_config().pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    widths = (5, 0) if side == "left" else (0, 5)
    padded = {k: torch.nn.functional.pad(v, widths, value=pads[k]) if k in pads else v for k, v in inputs.items()}
    mv.apply(model, method)
    expected = model(**inputs).logits
    logits = model(**padded).logits
    inside = slice(-expected.shape[1], None) if side == "left" else slice(expected.shape[1])
    assert_close(logits[:, inside], expected)
    if side == "left":
        length, new = inputs["input_ids"].shape[1], model.generate(**inputs, **GREEDY)
        assert model.generate(**padded, **GREEDY)[:, length + 5 :].tolist() == new[:, length:].tolist()


@torch.no_grad()
def test_a_prompt_without_images_is_stock(host, model, method):
    inputs, stock = (
        host.inputs(("Is grass green?", []), ("Describe what both pictures have in common.", [])),
        host.model(),
    )
    mv.apply(model, method)
    assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)
    assert model.generate(**inputs, **GREEDY).tolist() == stock.generate(**inputs, **GREEDY).tolist()


@torch.no_grad()
def test_methods_compose(host, model):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    mv.apply(model, RandomConfig(keep=0.6), HiPruneConfig(keep=4))
    kept = kept_patches(model, inputs)
    mv.apply(model, RandomConfig(keep=0.6))
    first = kept_patches(model, inputs)
    assert [len(patches) for patches in kept] == [4] * 4
    assert all(set(few) < set(many) for few, many in zip(kept, first, strict=True))
    mv.apply(model, RandomConfig(keep=0.6), HiPruneConfig(keep=4))
    for row, (columns, embeddings, positions) in zip(
        model(**inputs).logits, prune_by_hand(host, stock, inputs, kept), strict=True
    ):
        assert_close(row[-len(columns) :], logits_by_hand(stock, embeddings, positions)[0])


@torch.no_grad()
def test_eager_and_sdpa_towers_keep_the_same(host, model, method):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, method)
    kept = kept_patches(model, inputs)
    logits = model(**inputs).logits
    model.set_attn_implementation({"vision_config": "eager"})
    assert kept_patches(model, inputs) == kept
    assert_close(model(**inputs).logits, logits)


# --- generate ---------------------------------------------------------------------------------------------------------

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "best-beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "do_sample": False},
    "beam-sampling": {"num_beams": 2, "do_sample": True},
    "static-cache": {"cache_implementation": "static", "do_sample": False},
    "no-cache": {"use_cache": False, "do_sample": False},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": False},
}


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_modes_of_generate_are_stocks(host, model, mode):
    """Nothing is dropped, so that stock answers, but everything goes the way of a pruned prompt."""
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    mv.apply(model, keep_everything(host))
    torch.manual_seed(0)
    expected = stock.generate(**inputs, max_new_tokens=6, **MODES[mode])
    torch.manual_seed(0)
    assert model.generate(**inputs, max_new_tokens=6, **MODES[mode]).tolist() == expected.tolist()


@pytest.mark.parametrize("mode", ["static-cache", "no-cache"])
@torch.no_grad()
def test_caches_do_not_change_a_pruned_answer(host, model, method, mode):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, method)
    expected = model.generate(**inputs, **GREEDY)
    assert model.generate(**inputs, **{**GREEDY, **MODES[mode]}).tolist() == expected.tolist()


@torch.no_grad()
def test_a_pruned_batch_of_beams_is_its_prompts(host, model, method):
    rows, mode = mixed_rows(), {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    batch = host.inputs(*rows)
    mv.apply(model, method)
    out = model.generate(**batch, **mode).view(len(rows), 2, -1)
    assert out[:, :, : batch["input_ids"].shape[1]].tolist() == [[ids] * 2 for ids in batch["input_ids"].tolist()]
    for i, row in enumerate(rows):
        alone = host.inputs(row)
        new = model.generate(**alone, **mode)[:, alone["input_ids"].shape[1] :]
        assert out[i, :, batch["input_ids"].shape[1] :].tolist() == new.tolist()


@torch.no_grad()
def test_sampling_is_repeated_by_its_seed(host, model, method):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, method)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model.generate(**inputs, max_new_tokens=6, do_sample=True, num_return_sequences=2).tolist())
    assert outs[0] == outs[1] != outs[2]


@torch.no_grad()
def test_generate_returns_a_dict_on_request(host, model, method):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, method)
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True, output_logits=True)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert out.sequences.tolist() == model.generate(**inputs, **GREEDY).tolist()
    assert torch.stack(out.scores, dim=1).argmax(-1).tolist() == new.tolist()
    assert_close(out.logits[0], model(**inputs).logits[:, -1])


@torch.no_grad()
def test_a_loop_of_forward_passes_goes_on_from_the_cache(host, model, method):
    inputs, cache = host.inputs(question()), DynamicCache(config=model.config.get_text_config())
    mv.apply(model, method)
    expected = model.generate(**inputs, **GREEDY)[0, -8:].tolist()
    logits, tokens = model(**inputs, past_key_values=cache).logits, []
    while len(tokens) < 8:
        tokens.append(int(logits[0, -1].argmax()))
        logits = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache).logits
    assert tokens == expected


class Collector(BaseStreamer):
    """Holds what a streamer is shown."""

    def __init__(self):
        self.shown: list[list[int]] = []
        self.ended = False

    def put(self, value):
        self.shown.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@torch.no_grad()
def test_a_streamer_sees_the_prompt_and_each_token(host, model, method):
    inputs, streamer = host.inputs(question()), Collector()
    mv.apply(model, method)
    (out,) = model.generate(**inputs, **GREEDY, streamer=streamer).tolist()
    assert streamer.shown == [inputs["input_ids"][0].tolist(), *([token] for token in out[-8:])]
    assert streamer.ended


@torch.no_grad()
def test_without_a_mask_padding_is_told_by_its_ids(host, model, method):
    """As in stock `generate`."""
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert torch.equal(stock.generate(**unmasked, **GREEDY), stock.generate(**inputs, **GREEDY))
    mv.apply(model, method)
    assert torch.equal(model.generate(**unmasked, **GREEDY), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("where", ["argument", "config"])
@torch.no_grad()
def test_max_length_leaves_as_many_new_tokens_as_stock(host, model, method, where):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    mv.apply(model, method)
    limit = {"max_length": inputs["input_ids"].shape[1] + 5}
    if where == "config":
        config = deepcopy(model.generation_config)
        config.update(**limit, do_sample=False)
        limit = {"generation_config": config}
    expected = stock.generate(**inputs, **limit)
    assert expected.shape[1] == inputs["input_ids"].shape[1] + 5
    assert model.generate(**inputs, **limit).shape == expected.shape


@pytest.mark.parametrize("shown", ["whole", "new"])
@torch.no_grad()
def test_a_second_turn_goes_on_from_the_cache(host, model, method, shown):
    """It answers as the whole conversation does from scratch, whether shown all ids or those the cache has not seen."""
    inputs = host.inputs(question(1), question(5, 140, 130))
    mv.apply(model, method)
    cache = DynamicCache(config=model.config.get_text_config())
    first = model.generate(**inputs, **GREEDY, past_key_values=cache)
    follow_up = host.processor.tokenizer(" Answer yes or no.", add_special_tokens=False)["input_ids"]
    ids = torch.cat([first, torch.tensor([follow_up] * 2)], dim=1)
    longer = ids.shape[1] - inputs["input_ids"].shape[1]
    whole = {
        name: torch.nn.functional.pad(inputs[name], (0, longer), value=int(name == "attention_mask"))
        for name in ("attention_mask", "mm_token_type_ids")
        if name in inputs
    }
    expected = model.generate(input_ids=ids, **whole, **image_inputs(inputs), **GREEDY)
    if shown == "new":
        unseen = ids.shape[1] - (first.shape[1] - 1)
        out = model.generate(
            input_ids=ids[:, -unseen:], attention_mask=whole["attention_mask"], past_key_values=cache, **GREEDY
        )
        assert out.tolist() == expected[:, -unseen - GREEDY["max_new_tokens"] :].tolist()
    else:
        out = model.generate(input_ids=ids, **whole, past_key_values=cache, **GREEDY)
        assert out.tolist() == expected.tolist()


# --- training ---------------------------------------------------------------------------------------------------------


@on_every_host(PRUNERS[:2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_are_stocks_on_the_kept_tokens(host, model, method, side):
    stock = host.model().train()
    inputs = host.inputs(*mixed_rows(), padding_side=side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.masked_fill((mask == 0) | (ids == model.config.image_token_id), -100)
    labels.scatter_(1, mask.argmax(1)[:, None], -100)  # nothing predicts the first token
    labels[:, ::4] = -100  # as a question that is not learnt
    mv.apply(model.train(), method)
    kept = kept_patches(model, inputs)

    out = model(**inputs, labels=labels)
    out.loss.backward()
    logits, targets = [], []
    for i, (columns, embeddings, positions) in enumerate(prune_by_hand(host, stock, inputs, kept)):
        logits.append(logits_by_hand(stock, embeddings, positions)[0, :-1])
        targets.append(labels[i][mask[i].bool()][columns][1:])
    expected = cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=-100)
    expected.backward()

    assert_close(out.loss, expected)
    # Sums over hundreds of columns, in another order: rounding goes with the largest entry, not with each. What should
    # be zero (the bias of a key shifts all scores of a query alike) is nothing but rounding.
    largest = max(float(p.grad.abs().max()) for p in stock.parameters() if p.grad is not None)
    for (name, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6 * largest, msg=lambda text: f"{name}: {text}")  # noqa: B023
    for module in (projector(model), model.model.language_model):
        assert all(bool(parameter.grad.abs().sum() > 0) for parameter in module.parameters())


@on_every_host(METHODS)
def test_every_method_passes_gradients_to_the_tower(host, model, method):
    inputs = host.inputs(question())
    mv.apply(model.train(), method)
    model(
        **inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    ).loss.backward()
    for module in (first_block(model), projector(model), model.model.language_model.layers[0]):
        assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# --- saving -----------------------------------------------------------------------------------------------------------


@on_every_host(METHODS)
@torch.no_grad()
def test_slots_come_back_with_the_checkpoint(host, checkpoint, method, tmp_path):
    inputs = host.inputs(*mixed_rows())
    model = mv.apply(AutoModelForImageTextToText.from_pretrained(checkpoint(host)), method)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == set(load_file(checkpoint(host) / WEIGHTS))

    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model)
    assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert loaded.generate(**inputs, **GREEDY).tolist() == model.generate(**inputs, **GREEDY).tolist()


@torch.no_grad()
def test_a_model_that_was_never_loaded_is_saved_too(host, model, method, tmp_path):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, method).save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


@torch.no_grad()
def test_remove_makes_a_slotted_checkpoint_stock_again(host, checkpoint, method, tmp_path):
    inputs, stock = host.inputs(*mixed_rows()), AutoModelForImageTextToText.from_pretrained(checkpoint(host))
    slotted = mv.apply(AutoModelForImageTextToText.from_pretrained(checkpoint(host)), method)
    slotted.save_pretrained(tmp_path / "slotted")
    mv.remove(AutoModelForImageTextToText.from_pretrained(tmp_path / "slotted")).save_pretrained(tmp_path / "stock")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock")
    assert type(again) is type(stock)
    stock.save_pretrained(tmp_path / "expected")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "stock" / name).read_text() == (tmp_path / "expected" / name).read_text()
    assert load_file(tmp_path / "stock" / WEIGHTS).keys() == load_file(tmp_path / "expected" / WEIGHTS).keys()
    assert_close(again(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)


@torch.no_grad()
def test_load_applies_to_a_stock_checkpoint(host, checkpoint, method):
    model, processor = mv.load(checkpoint(host), method)
    inputs = host.inputs(*mixed_rows())
    assert_close(model(**inputs).logits, mv.apply(host.model(), method)(**inputs).logits, rtol=0, atol=0)
    text, images = question()
    again = processor(images=images, text=[text.replace("{}", host.image_mark)], return_tensors="pt")
    expected = host.inputs((text, images))
    assert again.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(again[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("part", ["lm_head", "projector"])
def test_a_checkpoint_without_a_weight_is_refused(host, model, method, tmp_path, part):
    mv.apply(model, method).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    name = next(n for n in weights if part in n or (part == "projector" and "merger.mlp" in n))
    save_file({n: w for n, w in weights.items() if n != name}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="lm_head" if part == "lm_head" else r"multi_modal_projector|merger"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


# --- wrapped by PEFT --------------------------------------------------------------------------------------------------


def with_lora(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q|v)_proj", init_lora_weights=False)
    ).eval()


@pytest.mark.parametrize("order", ["apply-first", "lora-first"])
def test_lora_on_a_pruned_model(host, model, method, order, tmp_path):
    inputs = host.inputs(*mixed_rows())
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    stock = with_lora(host.model())
    wrapped = with_lora(mv.apply(model, method)) if order == "apply-first" else mv.apply(with_lora(model), method)

    with torch.no_grad():
        rows = prune_by_hand(host, stock.base_model.model, inputs, kept_patches(wrapped, inputs))
        out = wrapped.generate(**inputs, **GREEDY)
        new = [greedy_by_hand(stock.base_model.model, e, p, 8) for _, e, p in rows]
        assert out.tolist() == [[*ids, *t] for ids, t in zip(inputs["input_ids"].tolist(), new, strict=True)]

    wrapped(**inputs, labels=labels).loss.backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in wrapped.named_parameters() if "lora_" in name}

    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mv.apply(host.model(), method), tmp_path).eval()
    with torch.no_grad():
        assert_close(again(**inputs).logits, wrapped(**inputs).logits, rtol=0, atol=0)
        mv.remove(wrapped)
        assert_close(wrapped(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)
    assert traces(wrapped.base_model.model) == traces(stock.base_model.model)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_unsupported_host_is_named_with_those_that_are_supported():
    text_only = LlamaForCausalLM(HOSTS[0].model().config.text_config)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*LlavaForConditionalGeneration"):
        mv.apply(text_only, HiPruneConfig(keep=4))


@pytest.mark.parametrize("host", [h for h in HOSTS if not h.has_cls], ids=lambda h: h.name)
def test_a_method_that_needs_cls_is_refused_without_one(host, model, checkpoint):
    before = traces(model)
    with pytest.raises(ValueError, match="CLS"):
        mv.apply(model, CLSTopKConfig(keep=4))
    assert traces(model) == before
    with pytest.raises(ValueError, match="CLS"):
        mv.load(checkpoint(host), CLSTopKConfig(keep=4))


def test_more_tokens_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.36.*37"):
        mv.apply(HOSTS[0].model(), HiPruneConfig(keep=37))


def test_placeholders_without_an_image_are_refused(host, model, method):
    inputs = host.inputs(question(1), question(2))
    mv.apply(model, method)
    one = host.inputs(question(1))
    with pytest.raises(ValueError, match="placeholders"):
        model(**{**inputs, **image_inputs(one)})


def test_forward_keeps_its_signature(host, model, method):
    expected = inspect.signature(host.model().forward)
    assert inspect.signature(mv.apply(model, method).forward) == expected
