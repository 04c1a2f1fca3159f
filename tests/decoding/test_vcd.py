"""The noise of visual contrastive decoding."""

import pytest
import torch

from mllm_vision.decoding import VCDConfig, diffused, vcd
from mllm_vision.host import adapter_for
from tests.hosts import HOSTS, rows_of_pixels
from tests.test_hosts import image_inputs, mixed_rows

HOST = {host.name: host for host in HOSTS}


def noise_of(host, inputs, seed=0):
    model = host.model()
    return adapter_for(model.config).noise(model, image_inputs(inputs), seed)


@pytest.mark.parametrize("steps", [0, 500, 999])
def test_diffused_is_one_step_after_another(steps):
    generator = torch.Generator().manual_seed(0)
    pixels, noise = torch.randn(2, 3, 4, 4, generator=generator)
    signal, variance = 1.0, 0.0
    for i in range(steps + 1):
        x = -6 + 12 * i / 999
        beta = 1e-5 + (5e-3 - 1e-5) / (1 + 2.718281828459045**-x)
        signal, variance = signal * (1 - beta) ** 0.5, variance * (1 - beta) + beta
    torch.testing.assert_close(diffused(pixels, noise, steps), signal * pixels + variance**0.5 * noise)
    assert signal**2 + variance == pytest.approx(1)


def test_noise_drowns_the_image_and_keeps_its_dtype():
    pixels, noise = torch.ones(2, 4, dtype=torch.bfloat16), torch.zeros(2, 4)
    left = [float(diffused(pixels, noise, steps)[0, 0]) for steps in (0, 500, 999)]
    assert left == pytest.approx([1.0, 0.86, 0.29], abs=0.005)
    pixels, noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    expected = diffused(pixels.bfloat16().float(), noise, 500).bfloat16()  # rounded once, at the end
    torch.testing.assert_close(diffused(pixels.bfloat16(), noise, 500), expected, rtol=0, atol=0)


def test_noise_belongs_to_the_image_whatever_the_batch(host):
    rows = [row for row in mixed_rows() if row[1]]
    batch = host.inputs(*rows)
    noise = noise_of(host, batch)
    assert noise.shape == batch["pixel_values"].shape
    alone = [host.inputs(("{}", [image])) for _, images in rows for image in images]
    for part, one in zip(noise.split(rows_of_pixels(batch)), alone, strict=True):
        expected = noise_of(host, one)
        if part.dim() == 5:  # tiles that an image does not have are padding
            assert not part[:, expected.shape[1] :].any()
            part = part[:, : expected.shape[1]]
        assert torch.equal(part, expected)
        assert abs(float(expected.mean())) < 0.05
        assert float(expected.std()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(noise_of(host, batch, seed=1), noise)


def test_tiles_that_are_not_padded_get_the_same_noise():
    host = HOST["llava-next"]
    inputs = host.inputs(*mixed_rows())
    counts = [int(image.flatten(1).any(1).sum()) for image in inputs["pixel_values"]]
    assert len(set(counts)) > 1
    packed = torch.cat([image[:n] for image, n in zip(inputs["pixel_values"], counts, strict=True)])
    noise = noise_of(host, inputs)
    expected = torch.cat([image[:n] for image, n in zip(noise, counts, strict=True)])
    assert torch.equal(noise_of(host, {**inputs, "pixel_values": packed}), expected)


def test_frames_of_an_image_get_the_same_noise():
    host = HOST["qwen2.5-vl"]
    patches = noise_of(host, host.inputs(*mixed_rows())).view(-1, 3, 2, 14, 14)
    assert torch.equal(patches[:, :, 0], patches[:, :, 1])
    assert not torch.equal(patches[:, 0], patches[:, 1])


@torch.no_grad()
def test_another_seed_is_another_contrast(host, model):
    inputs = host.inputs(*mixed_rows())

    def scores(seed):
        settings = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
        return model.generate(**inputs, **settings, custom_generate=vcd(beta=0, seed=seed)).scores[0]

    first = scores(0)
    torch.manual_seed(5)  # torch's own generator is not drawn from
    assert torch.equal(scores(0), first)
    assert not torch.equal(scores(1), first)


@pytest.mark.parametrize("steps", [-1, 1000])
def test_steps_that_there_are_not_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps must be in 0\.\.999, got {steps}"):
        VCDConfig(steps=steps)


def test_the_default_is_that_of_the_authors():
    assert vars(VCDConfig()) == {"alpha": 1.0, "beta": 0.1, "steps": 500, "seed": 0}
