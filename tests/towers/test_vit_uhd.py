"""ViT-UHD: whole outputs against slow loops, alone or packed, under every attention; nothing waits, nothing loops."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mllm_vision.tap import listen
from mllm_vision.tokens import AttentionReceived
from mllm_vision.towers import ViTUHDConfig, ViTUHDImageProcessor, ViTUHDModel
from mllm_vision.towers.vit_uhd import from_authors
from mllm_vision.towers.vit_uhd.packing import token_places, window_index
from tests.towers.reference import HEADS, SIDE, random_weights, slow_tower

GRIDS = [(8, 16), (16, 8), (8, 8)]
FAKE = "fake_flash_of_towers"


def fake_flash(module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, **kwargs):
    """Stands in for flash attention, which needs a GPU: one call for the pack, whose images are kept apart."""
    lengths = cu_seq_lens_q.diff().tolist()
    assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    assert kwargs.pop("max_length_q") == kwargs.pop("max_length_k") == max(lengths)
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    out = [sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)[0] for q, k, v in parts]
    return torch.cat(out, dim=1), None


AttentionInterface.register(FAKE, fake_flash)


def pixels(grids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(height * width for height, width in grids), 3, SIDE, SIDE, generator=generator)


def sizes(grids, side=SIDE):
    """In pixels."""
    return [(height * side, width * side) for height, width in grids]


def tower(mergers=(0, 2), **settings):
    """A tiny tower with weights that make every part matter."""
    theirs = from_authors(random_weights(mergers=mergers), heads=HEADS)
    model = ViTUHDModel(ViTUHDConfig(**theirs.config.to_dict() | settings)).eval()
    model.load_state_dict(theirs.weights, strict=not settings)
    return model


def changed_pack(model):
    with torch.no_grad():
        return model(pixels(GRIDS), sizes(GRIDS)).last_hidden_state[0]


@pytest.mark.parametrize("counts_patches", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("mergers", [(), (2,), (1, 2), (0, 1, 3)])
def test_tower_is_the_slow_loop(mergers, adaptive, counts_patches):
    grids = [(8, 8), (8, 16)]
    weights = random_weights(mergers=mergers, adaptive=adaptive)
    theirs = from_authors(weights, heads=HEADS)
    theirs.config.rotary_units = "patches" if counts_patches else "tokens"
    model = ViTUHDModel(theirs.config).eval()
    model.load_state_dict(theirs.weights)
    with torch.no_grad():
        out = model(pixels(grids), sizes(grids))
    step = 2 ** len(mergers)
    assert out.grid_hw.tolist() == [[height // step, width // step] for height, width in grids]
    expected = slow_tower(weights, pixels(grids), grids, mergers, counts_patches=counts_patches)
    torch.testing.assert_close(out.last_hidden_state[0], expected, atol=1e-4, rtol=1e-4)  # deep sums in another order


def test_tower_without_rotary_positions_is_the_slow_loop_without():
    out = changed_pack(tower(mergers=(1,), rotary_theta=None))
    expected = slow_tower(random_weights(mergers=(1,)), pixels(GRIDS), GRIDS, (1,), theta=None)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)  # deep sums in another order


def test_norms_before_and_after_the_layers_are_optional():
    model = tower(mergers=(), pre_norm=True, post_norm=False)
    with torch.no_grad():
        model.pre_layernorm.weight.fill_(0.5)
        out = model(pixels(GRIDS), sizes(GRIDS), output_hidden_states=True)
    # before the first layer: mean 0 and variance 1/4 in every token
    first = out.hidden_states[0][0]
    torch.testing.assert_close(first.mean(-1), torch.zeros(len(first)), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.var(-1, correction=0), torch.full((len(first),), 0.25), atol=1e-4, rtol=0)
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1])


def test_windows_by_eye():
    # 2 x 4:  0 1 2 3     and 4 x 2, which begins at 8:   8  9
    #         4 5 6 7                                    10 11
    #                                                    12 13
    #                                                    14 15
    windows = window_index([(2, 4), (4, 2)], torch.device("cpu"))
    assert windows.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    image, row, column = token_places([(1, 2), (2, 1)], torch.device("cpu"))
    assert [image.tolist(), row.tolist(), column.tolist()] == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager", FAKE])
def test_an_image_gives_the_same_alone_or_packed(attention):
    model = tower()
    model.config._attn_implementation = attention
    packed = changed_pack(model)
    lengths = [height * width for height, width in GRIDS]
    for grid, own, out in zip(
        GRIDS, pixels(GRIDS).split(lengths), packed.split([n // 16 for n in lengths]), strict=True
    ):
        with torch.no_grad():
            alone = model(own, sizes([grid])).last_hidden_state[0]
        torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-4)  # matrix products of other sizes


@pytest.mark.parametrize("attention", ["eager", FAKE])
def test_every_attention_gives_the_same(attention):
    model = tower()
    expected = changed_pack(model)
    model.config._attn_implementation = attention
    torch.testing.assert_close(changed_pack(model), expected, atol=1e-5, rtol=1e-4)  # sums in another order


def test_sizes_as_a_tensor_or_a_list():
    model, given = tower(), sizes(GRIDS)
    with torch.no_grad():
        listed, tensor = (model(pixels(GRIDS), g).last_hidden_state for g in (given, torch.tensor(given)))
    assert torch.equal(listed, tensor)


def test_hidden_states_and_attentions_of_every_layer():
    model = tower()
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        out = model(pixels(GRIDS), sizes(GRIDS), output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in out.hidden_states] == [(1, n, 32) for n in (320, 80, 80, 20, 20)]
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    maps = [[weights.shape[-1] for weights in layer] for layer in out.attentions]
    assert maps == [[128, 128, 64], [32, 32, 16], [32, 32, 16], [8, 8, 4]]
    for weights in out.attentions[1]:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("attention", ["sdpa", "eager", FAKE])
def test_the_tap_hears_the_attention_of_every_image(attention):
    model, request = tower(), AttentionReceived(1)
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        maps = model(pixels(GRIDS), sizes(GRIDS), output_attentions=True).attentions[1]
        model.config._attn_implementation = attention
        with listen(model, [request]) as recording:
            model(pixels(GRIDS), sizes(GRIDS))
    assert len(recording[request]) == 3
    for received, weights in zip(recording[request], maps, strict=True):
        torch.testing.assert_close(received, weights.mean(1).sum(1), atol=1e-5, rtol=1e-4)


def test_nothing_is_read_back_from_the_device():
    # Tensors on the meta device have no values, so that reading one is an error.
    model = tower().to("meta")
    out = model(pixels(GRIDS).to("meta"), sizes(GRIDS))
    assert out.last_hidden_state.shape == (1, 20, 32)
    assert out.grid_hw.tolist() == [[2, 4], [4, 2], [2, 2]]


class OperationCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def test_nothing_loops_over_images_but_attention_without_flash():
    model = tower()
    model.config._attn_implementation = FAKE
    AttentionInterface.register(FAKE, lambda module, query, *args, **kwargs: (query.transpose(1, 2), None))
    try:
        counts = []
        for images in (2, 5):
            with OperationCounter() as counter, torch.no_grad():
                model(pixels([(4, 4)] * images), sizes([(4, 4)] * images))
            counts.append(counter.calls)
    finally:
        AttentionInterface.register(FAKE, fake_flash)
    assert counts[0] == counts[1]


def test_cost_grows_with_the_number_of_images_and_no_faster():
    model, flops = tower(), []
    for images in (1, 2, 6):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(pixels([(8, 8)] * images), sizes([(8, 8)] * images))
        flops.append(counter.get_total_flops())
    assert flops == [flops[0], 2 * flops[0], 6 * flops[0]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_weight(checkpointing):
    model, grids = tower(mergers=(0, 3)).train(), [(4, 8), (8, 8)]
    if checkpointing:
        model.gradient_checkpointing_enable()
    patches = pixels(grids)
    model(patches, sizes(grids)).last_hidden_state.pow(3).sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []
    again = tower(mergers=(0, 3))
    again(patches, sizes(grids)).last_hidden_state.pow(3).sum().backward()
    for weight, same in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, same.grad)


def test_a_fresh_adaptive_merger_is_an_average_that_can_learn():
    fresh = ViTUHDModel(tower(merger="adaptive").config).eval()
    average = ViTUHDModel(tower(merger="average").config).eval()
    average.load_state_dict({name: weight for name, weight in fresh.state_dict().items() if ".merger." not in name})
    torch.testing.assert_close(changed_pack(fresh), changed_pack(average))
    fresh(pixels(GRIDS), sizes(GRIDS)).last_hidden_state.pow(3).sum().backward()
    assert all(fresh.layers[layer].merger.score.weight.grad.any() for layer in (0, 2))


def test_bf16_and_autocast_stay_close():
    expected = changed_pack(tower())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = changed_pack(tower())
    for out in (changed_pack(tower().bfloat16()), autocast):
        # bf16 keeps 8 bits, of which four layers and a softmax over windows lose some: 0.025 when this was written
        assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_saved_tower_and_processor_load_through_the_auto_classes(tmp_path):
    model = tower(rotary_units="patches")
    model.save_pretrained(tmp_path)
    ViTUHDImageProcessor.for_tower(model.config, max_pixels=4000, min_pixels=400).save_pretrained(tmp_path)
    torch.save(changed_pack(model), tmp_path / "expected.pt")
    code = (
        "import sys, torch, mllm_vision\n"
        "from transformers import AutoConfig, AutoImageProcessor, AutoModel\n"
        "from tests.towers.test_vit_uhd import changed_pack\n"
        "folder = sys.argv[1]\n"
        "processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)\n"
        "assert (type(model).__name__, type(processor).__name__) == ('ViTUHDModel', 'ViTUHDImageProcessor')\n"
        "assert model.config.to_dict() == AutoConfig.from_pretrained(folder).to_dict()\n"
        "assert (processor.patch_size, processor.merge_size, processor.max_pixels) == (5, 4, 4000)\n"
        "assert torch.equal(changed_pack(model), torch.load(folder + '/expected.pt'))\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True)


@pytest.mark.parametrize("first", ["AutoImageProcessor", "ProcessorMixin"])
def test_the_processor_is_registered_whatever_is_imported_first(first, tmp_path):
    ViTUHDImageProcessor().save_pretrained(tmp_path)
    code = (
        f"import sys, mllm_vision; from transformers import {first}\n"
        "from transformers import AutoImageProcessor\n"
        "assert type(AutoImageProcessor.from_pretrained(sys.argv[1])).__name__ == 'ViTUHDImageProcessor'\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("patches", "given", "message"),
    [
        (32, [(20, 30)], r"multiples of 20 pixels \(5 for a patch, 2 for each merger\), got 20 x 30"),
        (0, [(0, 20)], "got 0 x 20"),
        (16, [], "at least one image"),
        (15, [(20, 20)], r"must be \(16, 3, 5, 5\) .* got \(15, 3, 5, 5\)"),
    ],
)
def test_packs_that_cannot_be(patches, given, message):
    with pytest.raises(ValueError, match=message):
        tower()(torch.zeros(patches, 3, SIDE, SIDE), given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(hidden_size=30), "multiple of num_attention_heads, got 30 and 4"),
        (dict(hidden_size=24), "multiple of 4 channels, got 6"),
        (dict(patch_size=0), "patch_size must be 1 or more"),
        (dict(position_grid=(4,)), "rows and columns"),
        (dict(position_grid=(4, 0)), "rows and columns"),
        (dict(merger_layers=(2, 1)), r"rise and be in 0\.\.3, got \(2, 1\)"),
        (dict(merger_layers=(1, 1)), r"got \(1, 1\)"),
        (dict(merger_layers=(4,)), r"got \(4,\)"),
        (dict(merger="max"), "one of average, adaptive, got 'max'"),
        (dict(rotary_units="pixels"), "one of patches, tokens"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    tiny = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=4, merger_layers=())
    with pytest.raises(ValueError, match=message):
        ViTUHDConfig(**tiny | settings)
