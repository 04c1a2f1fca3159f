"""The attention tap: against whole maps, in chunks, and without a trace afterwards."""

import threading

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from mllm_vision import tap
from mllm_vision.tap import attention_from_first, attention_received, listen
from mllm_vision.tokens import AttentionFromCLS, AttentionReceived


def maps(query, key, scaling):
    return (query @ key.transpose(-1, -2) * scaling).softmax(-1)


def states(batch=2, heads=3, length=17, channels=8):
    return torch.randn(2, batch, heads, length, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("elements", [1, 300, 1 << 22])
def test_received_equals_the_whole_map_in_chunks_of_any_size(monkeypatch, elements):
    query, key = states()
    monkeypatch.setattr(tap, "MAP_ELEMENTS", elements)
    torch.testing.assert_close(attention_received(query, key, 0.5), maps(query, key, 0.5).sum(2).mean(1))


def test_from_first_is_the_cls_row():
    query, key = states()
    torch.testing.assert_close(attention_from_first(query, key, 0.5), maps(query, key, 0.5)[:, :, 0].mean(1))


@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_is_honoured(boolean):
    query, key = states()
    mask = torch.ones(2, 1, 17, 17, dtype=torch.bool)
    mask[..., 12:] = False
    given = mask if boolean else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    received = attention_received(query, key, 0.5, given)
    torch.testing.assert_close(received[:, :12], maps(query, key[:, :, :12], 0.5).sum(2).mean(1))
    assert not received[:, 12:].any()


def test_no_map_of_a_large_grid_is_held(monkeypatch):
    held = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, *a, **k: held.append(x.numel()) or softmax(x, *a, **k))
    query, key = states(batch=1, heads=4, length=4200, channels=4)
    attention_received(query, key, 0.5)
    assert max(held) <= tap.MAP_ELEMENTS < 4 * 4200 * 4200
    assert sum(held) == 4 * 4200 * 4200


def test_scores_are_float32_whatever_the_tower_computes_in():
    query, key = states().bfloat16()
    received = attention_received(query, key, 0.5)
    assert received.dtype == torch.float32
    torch.testing.assert_close(received, maps(query.float(), key.float(), 0.5).sum(2).mean(1))


@pytest.fixture
def tower():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        initializer_range=0.5,
    )
    return CLIPVisionModel(config).eval()


PIXELS = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
REQUESTS = (AttentionReceived(1), AttentionFromCLS(1), AttentionReceived(3))


def heard(tower, requests=REQUESTS):
    with listen(tower, requests) as recording, torch.no_grad():
        out = tower(PIXELS).last_hidden_state
    return {request: torch.cat(recording[request]) for request in requests}, out


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_tower_is_heard_under_every_implementation(tower, attention):
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        expected = tower(PIXELS, output_attentions=True)
    tower.set_attn_implementation(attention)
    with torch.no_grad():
        untapped = tower(PIXELS).last_hidden_state
    evidence, out = heard(tower)
    assert torch.equal(out, untapped)
    torch.testing.assert_close(evidence[AttentionReceived(1)], expected.attentions[1].mean(1).sum(1))
    torch.testing.assert_close(evidence[AttentionFromCLS(1)], expected.attentions[1].mean(1)[:, 0])
    torch.testing.assert_close(evidence[AttentionReceived(3)], expected.attentions[3].mean(1).sum(1))
    assert tower.config._attn_implementation == attention


def test_only_layers_that_were_asked_for_are_computed(tower, monkeypatch):
    calls = []
    monkeypatch.setattr(tap, "attention_received", lambda *a: calls.append(1) or attention_received(*a))
    heard(tower, [AttentionReceived(2)])
    assert len(calls) == 1
    assert heard(tower, [])[0] == {}


def test_the_implementation_is_restored_after_an_error(tower):
    with pytest.raises(KeyError), listen(tower, REQUESTS):
        raise KeyError
    assert tower.config._attn_implementation == "sdpa"


def test_packed_sequences_are_heard_one_by_one():
    query, key = states(batch=1)
    bounds = torch.tensor([0, 5, 17], dtype=torch.int32)
    parts = [
        attention_received(q, k, 0.5)
        for q, k in zip(tap._segments(query, bounds), tap._segments(key, bounds), strict=True)
    ]
    torch.testing.assert_close(parts[0], maps(query[:, :, :5], key[:, :, :5], 0.5).sum(2).mean(1))
    torch.testing.assert_close(parts[1], maps(query[:, :, 5:], key[:, :, 5:], 0.5).sum(2).mean(1))


def test_threads_do_not_hear_each_other(tower):
    """Two threads listen to one tower at once; each hears its own forward pass and the tower ends as it was."""
    alone = heard(tower)[0]
    results, barrier = {}, threading.Barrier(2)

    def run(name):
        with listen(tower, REQUESTS) as recording, torch.no_grad():
            barrier.wait()
            tower(PIXELS)
            barrier.wait()
        results[name] = {request: torch.cat(recording[request]) for request in REQUESTS}

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":
        for request in REQUESTS:
            assert torch.equal(results[name][request], alone[request])
    assert tower.config._attn_implementation == "sdpa"
