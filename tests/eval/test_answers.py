"""Answers do not depend on what stands beside a question; sampling is fair and repeatable."""

import pytest
import torch

import mllm_vision as mv
from mllm_vision.eval.answers import Decoding, RowNoise, answer, head_on_one_block, inputs_for, prompt_for
from mllm_vision.eval.tasks.scenes import Scenes


@pytest.fixture(scope="module")
def loaded():
    return mv.load("tiny-llava-scenes")


@pytest.fixture(scope="module")
def examples():
    return [
        e for family in ("count", "colour", "reading") for e in Scenes(questions=4, families=family).load().examples
    ]


def ask(loaded, examples, batch_size, **options):
    model, processor = loaded
    said = {}
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        prompts = [prompt_for(processor, example.question, 1) for example in batch]
        pictures = [[load() for load in example.images] for example in batch]
        ids = [example.id for example in batch]
        inputs = inputs_for(processor, prompts, pictures)
        said |= dict(zip(ids, answer(model, processor, inputs, ids, max_new_tokens=6, **options), strict=True))
    return said


@pytest.mark.parametrize("decoding", [None, Decoding(temperature=1.5, seed=3), Decoding(temperature=2.0, top_p=0.9)])
def test_the_same_in_any_batch_and_any_order(loaded, examples, decoding):
    alone = ask(loaded, examples, 1, decoding=decoding)
    assert ask(loaded, examples, 5, decoding=decoding) == alone
    assert ask(loaded, examples[::-1], 12, decoding=decoding) == alone


def test_greedy_answers_are_those_of_generate(loaded, examples):
    model, processor = loaded
    (said,) = ask(loaded, examples[:1], 1).values()
    inputs = processor(
        images=[examples[0].images[0]()], text=prompt_for(processor, examples[0].question, 1), return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert said == processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_another_seed_samples_other_answers(loaded, examples):
    first, again, other = (ask(loaded, examples, 12, decoding=Decoding(temperature=3.0, seed=s)) for s in (0, 0, 1))
    assert first == again != other


def test_sampling_at_a_low_temperature_and_from_one_token_is_greedy(loaded, examples):
    greedy = ask(loaded, examples, 12)
    assert ask(loaded, examples, 12, decoding=Decoding(temperature=1e-3)) == greedy
    assert ask(loaded, examples, 12, decoding=Decoding(temperature=5.0, top_k=1)) == greedy


def test_draws_are_those_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    n = 4000
    noise = RowNoise(0, [str(i) for i in range(n)])
    drawn = noise(torch.zeros(n, 1, dtype=torch.long), logits.expand(n, -1)).argmax(1)
    share = torch.bincount(drawn, minlength=4) / n
    expected = logits.softmax(0)
    error = (expected * (1 - expected) / n).sqrt()
    assert ((share - expected).abs() < 4 * error).all()


def test_beams_are_those_of_generate(loaded, examples):
    model, processor = loaded
    said = ask(loaded, examples[:3], 3, decoding=Decoding(num_beams=3))
    inputs = processor(
        images=[example.images[0]() for example in examples[:3]],
        text=[prompt_for(processor, example.question, 1) for example in examples[:3]],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=3)
    new = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert list(said.values()) == [text.strip() for text in new]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1), "temperature must be 0"),
        (dict(top_p=0.9), "top_p and top_k are for sampling; give a temperature above 0, too"),
        (dict(temperature=1, top_p=0.0), r"top_p must be in \(0, 1\], got 0"),
        (dict(temperature=1, top_k=-1), "top_k must be 0 or more and num_beams 1 or more, got -1 and 1"),
        (dict(temperature=1, num_beams=2), "give either num_beams or a temperature"),
        (dict(max_new_tokens=0), "max_new_tokens must be 1 or more, got 0"),
        (dict(temprature=1), "Decoding has no field temprature; its fields are max_new_tokens, temperature"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


def test_the_head_gets_one_block_of_memory_and_nothing_stays_behind(loaded):
    model, _ = loaded
    head, seen = model.get_output_embeddings(), []
    states = torch.randn(2, 5, model.config.text_config.hidden_size)[:, -1:]
    assert not states.is_contiguous()
    with torch.no_grad(), head_on_one_block(model):
        watched = head.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
        torch.testing.assert_close(head(states), states @ head.weight.T)
        watched.remove()
    assert seen[0].is_contiguous()
    assert not head._forward_pre_hooks
