"""What holds for every decoding strategy on every host: one forward pass a step gives what two give by hand.

Shapes: B prompts of L columns, T new tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad
from torch.testing import assert_close

import mllm_vision as mv
from mllm_vision.contrast import OneCall
from mllm_vision.decoding import DamroConfig
from tests.decoding.by_hand import STRATEGIES, decoded_by_hand
from tests.hosts import HOSTS, first_block
from tests.test_hosts import GREEDY, MODES, mixed_rows, question, traces

STEPS = 6
SCORES = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": STEPS}

on_every_host = pytest.mark.parametrize(
    ("host", "config"),
    [(host, config) for host in HOSTS for config in STRATEGIES],
    ids=[f"{host.name}-{config.type}" for host in HOSTS for config in STRATEGIES],
)


def new_tokens(out, inputs):
    return getattr(out, "sequences", out)[:, inputs["input_ids"].shape[1] :].tolist()


@on_every_host
@torch.no_grad()
def test_decodes_as_two_forward_passes_a_step(host, model, config):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    tokens, scores = decoded_by_hand(host, stock, inputs, config, STEPS)
    plain = new_tokens(stock.generate(**inputs, max_new_tokens=STEPS, do_sample=False), inputs)
    assert tokens != plain  # else nothing would be shown

    mv.apply(model, config)
    out = model.generate(**inputs, **SCORES, do_sample=False)
    assert out.sequences[:, : inputs["input_ids"].shape[1]].tolist() == inputs["input_ids"].tolist()
    assert new_tokens(out, inputs) == tokens
    # Differences of logits that the weights (1 + alpha) and alpha have spread.
    assert_close(torch.stack(out.scores, dim=1), scores, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_without_a_mask_padding_is_told_by_its_ids(host, model):
    inputs, config = host.inputs(*mixed_rows()), STRATEGIES[0]
    unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
    once = model.generate(**unmasked, **SCORES, do_sample=False, custom_generate=OneCall(config))
    mv.apply(model, config)
    expected = model.generate(**inputs, **SCORES, do_sample=False)
    for out in (once, model.generate(**unmasked, **SCORES, do_sample=False)):
        assert out.sequences.tolist() == expected.sequences.tolist()
        assert_close(torch.stack(out.scores), torch.stack(expected.scores))


@torch.no_grad()
def test_more_padding_than_the_batch_needs_changes_nothing(host, model):
    inputs, config = host.inputs(*mixed_rows()), STRATEGIES[0]
    length = inputs["input_ids"].shape[1]
    wider = {n: pad(v, (5, 0)) if v.shape == inputs["input_ids"].shape else v for n, v in inputs.items()}
    once = model.generate(**wider, **SCORES, do_sample=False, custom_generate=OneCall(config))
    mv.apply(model, config)
    expected = model.generate(**inputs, **SCORES, do_sample=False)
    for out in (once, model.generate(**wider, **SCORES, do_sample=False)):
        assert out.sequences[:, : 5 + length].tolist() == wider["input_ids"].tolist()
        assert new_tokens(out, wider) == new_tokens(expected, inputs)
        assert_close(torch.stack(out.scores), torch.stack(expected.scores), rtol=1e-5, atol=1e-4)


@on_every_host
@torch.no_grad()
def test_one_call_does_the_same_and_leaves_nothing(host, model, config):
    inputs = host.inputs(*mixed_rows())
    plain = model.generate(**inputs, **SCORES, do_sample=False)
    before = traces(model)
    out = model.generate(**inputs, **SCORES, do_sample=False, custom_generate=OneCall(config))
    assert traces(model) == before
    assert model.generate(**inputs, **SCORES, do_sample=False).sequences.tolist() == plain.sequences.tolist()

    for methods in ([config], [], [DamroConfig(topk=1)]):
        mv.apply(model, *methods)
        call = {} if methods == [config] else {"custom_generate": OneCall(config)}
        again = model.generate(**inputs, **SCORES, do_sample=False, **call)
        assert again.sequences.tolist() == out.sequences.tolist()
        assert_close(torch.stack(again.scores), torch.stack(out.scores))


@on_every_host
@torch.no_grad()
def test_a_batch_is_its_prompts(host, model, config):
    rows = mixed_rows()
    batch = host.inputs(*rows)
    mv.apply(model, config)
    out = model.generate(**batch, **SCORES, do_sample=False)
    for i, row in enumerate(rows):
        alone = host.inputs(row)
        one = model.generate(**alone, **SCORES, do_sample=False)
        assert new_tokens(one, alone) == new_tokens(out, batch)[i : i + 1]
        assert_close(torch.cat(one.scores), torch.stack([score[i] for score in out.scores]), rtol=1e-5, atol=1e-4)


PLAIN_MODES = {name: mode for name, mode in MODES.items() if "num_beams" not in mode}


@pytest.mark.parametrize("mode", PLAIN_MODES)
@pytest.mark.parametrize("config", [DamroConfig(alpha=0, beta=0, topk=4)], ids=["damro"])
@torch.no_grad()
def test_no_contrast_and_no_cut_is_plain_generation(host, model, config, mode):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    mv.apply(model, config)
    torch.manual_seed(0)
    expected = stock.generate(**inputs, max_new_tokens=6, **PLAIN_MODES[mode])
    torch.manual_seed(0)
    assert model.generate(**inputs, max_new_tokens=6, **PLAIN_MODES[mode]).tolist() == expected.tolist()


@pytest.mark.parametrize("mode", ["static-cache", "no-cache", "chunks"])
@torch.no_grad()
def test_caches_do_not_change_the_answer(host, model, mode):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, STRATEGIES[0])
    expected = model.generate(**inputs, **SCORES, do_sample=False)
    asked = {"prefill_chunk_size": 7} if mode == "chunks" else MODES[mode]
    out = model.generate(**inputs, **SCORES, **{"do_sample": False, **asked})
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert_close(torch.stack(out.scores), torch.stack(expected.scores), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_step_is_one_forward_pass_and_the_tower_sees_an_image_once(host, model):
    inputs, tower = host.inputs(*mixed_rows()), []
    widths = []
    mv.apply(model, STRATEGIES[0])
    model.model.language_model.register_forward_hook(lambda *a: widths.append(tuple(a[-1].last_hidden_state.shape[:2])))
    first_block(model).register_forward_hook(lambda *_: tower.append(1))
    model.generate(**inputs, **GREEDY)
    assert widths == [(8, inputs["input_ids"].shape[1])] + [(8, 1)] * 7
    assert len(tower) == 1


@torch.no_grad()
def test_a_model_that_decodes_by_contrast_is_stock_in_forward(host, model):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    mv.apply(model, STRATEGIES[0])
    assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)


@torch.no_grad()
def test_samples_of_a_prompt_are_contrasted_each(host, model):
    """Two answers to each prompt: every one along its own tokens is what two forward passes a step score."""
    inputs, stock, config = host.inputs(*mixed_rows()), host.model(), STRATEGIES[0]
    mv.apply(model, config)
    torch.manual_seed(0)
    settings = {"do_sample": True, "num_return_sequences": 2, "top_k": 0}
    out = model.generate(**inputs, **SCORES, **settings)
    new = torch.tensor(new_tokens(out, inputs)).view(4, 2, STEPS)
    assert len({tuple(row) for row in new.flatten(0, 1).tolist()}) > 4
    scores = torch.stack(out.scores, dim=1).view(4, 2, STEPS, -1)
    for copy in range(2):
        _, expected = decoded_by_hand(host, stock, inputs, config, STEPS, forced=new[:, copy])
        assert_close(scores[:, copy], expected, rtol=1e-5, atol=1e-4)
    torch.manual_seed(0)
    once = host.model().generate(**inputs, **SCORES, **settings, custom_generate=OneCall(config))
    assert once.sequences.tolist() == out.sequences.tolist()


@on_every_host
@torch.no_grad()
def test_the_decoding_is_saved_with_the_model(host, model, config, tmp_path):
    inputs = host.inputs(question())
    expected = mv.apply(model, config).generate(**inputs, **GREEDY)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.vision_slots.methods == [config]
    assert loaded.generate(**inputs, **GREEDY).tolist() == expected.tolist()
