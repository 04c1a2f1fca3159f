"""The mechanism under the decoding strategies: what the loop sees, what acts after the contrast, what is refused.

Shapes: B prompts, T new tokens, V tokens of the vocabulary.
"""

import copy
import logging
import threading

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import mllm_vision as mv
from mllm_vision.contrast import contrasted
from mllm_vision.decoding import DamroConfig, TextOnlyConfig, VCDConfig, damro, text_only, vcd
from mllm_vision.reducers import DownsampleConfig, HiPruneConfig, RandomConfig
from mllm_vision.slots import stored
from tests.decoding.by_hand import contrastive_prompts, decoded_by_hand, scores_by_hand
from tests.hosts import HOSTS
from tests.projectors.test_on_hosts import POOLING, added_by_hand
from tests.test_hosts import GREEDY, Collector, kept_patches, mixed_rows, prune_by_hand, question, traces, with_lora

HOST = {host.name: host for host in HOSTS}
LLAVA = HOST["llava-clip"]
CONFIG = DamroConfig(topk=4, alpha=1.0)
SCORES = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
STEPS = 6


def test_contrasted_by_eye():
    full, other = torch.tensor([[2.0, 1.0, 0.0, -3.0]]), torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    # log(0.1) = -2.3: only the last token is less than a tenth as likely as the first.
    assert contrasted(full, other, 2.0, 0.1).tolist() == [[0.0, 3.0, 0.0, -torch.inf]]
    assert contrasted(full, other, 0.5, 0.3).tolist() == [[1.5, 1.5, -torch.inf, -torch.inf]]
    assert contrasted(full, other, 1.0, 0.0).tolist() == [[1.0, 2.0, 0.0, -6.0]]
    assert torch.equal(contrasted(full, other, 0, 0), full)
    half = torch.tensor([[0.0, -0.5, -1.0]]).log1p()  # probabilities of 1 to a half to nothing: the half stays
    assert torch.equal(contrasted(half, torch.zeros(1, 3), 0, 0.5), half)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl"])
@torch.no_grad()
def test_processors_and_warpers_act_after_the_contrast(name):
    host = HOST[name]
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    model = mv.apply(host.model(), CONFIG)
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.4}
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=STEPS, **SCORES, **settings)
    length = inputs["input_ids"].shape[1]
    _, expected = decoded_by_hand(host, stock, inputs, CONFIG, STEPS, forced=out.sequences[:, length:])
    padding = (inputs["attention_mask"] != 0).int().argmax(dim=1)
    processors = [
        RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=padding),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.8),
    ]
    for step, scores in enumerate(out.scores):
        warped = expected[:, step]
        for processor in processors:
            warped = processor(out.sequences[:, : length + step], warped)
        assert_close(scores, warped, rtol=1e-5, atol=1e-4)
        assert scores.isinf().sum() > expected[:, step].isinf().sum()


@torch.no_grad()
def test_what_comes_back_is_of_the_prompts_alone():
    inputs, stock = LLAVA.inputs(*mixed_rows()), LLAVA.model()
    model = mv.apply(LLAVA.model(), CONFIG)
    shown = {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    out = model.generate(**inputs, **GREEDY, **SCORES, **shown)
    assert_close(out.logits[0], stock(**inputs).logits[:, -1])  # before the contrast
    assert_close(torch.stack(out.scores).argmax(-1).T, out.sequences[:, -8:])
    assert {len(layer) for step in (*out.hidden_states, *out.attentions) for layer in step} == {4}
    assert list(out) == ["sequences", "scores", "logits", "attentions", "hidden_states"]  # no cache, which has both


@torch.no_grad()
def test_a_streamer_sees_the_prompt_and_each_token(host, model):
    inputs, streamer = host.inputs(question()), Collector()
    mv.apply(model, CONFIG, HiPruneConfig(keep=9))
    (out,) = model.generate(**inputs, **GREEDY, streamer=streamer).tolist()
    assert streamer.shown == [inputs["input_ids"][0].tolist(), *([token] for token in out[-8:])]
    assert streamer.ended
    streamer = Collector()
    mv.apply(model, HiPruneConfig(keep=9))
    call = {"streamer": streamer, "custom_generate": damro(topk=4, alpha=1.0)}
    assert model.generate(**inputs, **GREEDY, **call)[0].tolist() == out
    assert streamer.shown[1:] == [[token] for token in out[-8:]]


@pytest.mark.parametrize("plugged_in", [True, False])
@torch.no_grad()
def test_stopping_strings_stop(plugged_in):
    inputs, tokenizer = LLAVA.inputs(question()), LLAVA.processor.tokenizer
    model = mv.apply(LLAVA.model(), *([CONFIG] if plugged_in else []))
    call = {} if plugged_in else {"custom_generate": damro(topk=4, alpha=1.0)}
    new = model.generate(**inputs, **GREEDY, **call)[0, -8:].tolist()
    at = next(i for i in range(1, 8) if tokenizer.decode(new[i]).strip() and new[i] not in new[:i])
    stopped = model.generate(
        **inputs, **GREEDY, **call, stop_strings=[tokenizer.decode(new[i]) for i in (at,)], tokenizer=tokenizer
    )
    assert stopped[0, inputs["input_ids"].shape[1] :].tolist() == new[: at + 1]


@pytest.mark.parametrize("method", [HiPruneConfig(keep=9, alpha=0.5), RandomConfig(keep=3)], ids=lambda m: m.type)
@pytest.mark.parametrize("host", [h for h in HOSTS if "two" not in h.name], ids=lambda h: h.name)
@torch.no_grad()
def test_a_pruned_prompt_is_contrasted_with_outliers_among_all_patches(host, method):
    """Also where a pruned prompt is shorter than its contrastive one."""
    inputs, stock, config = host.inputs(*mixed_rows()), host.model(), DamroConfig(topk=6, alpha=1.0)
    model = mv.apply(host.model(), method, config)
    kept = kept_patches(model, inputs)
    tokens, scores = decoded_by_hand(host, stock, inputs, config, 4, kept=kept)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, **SCORES)
    length = inputs["input_ids"].shape[1]
    assert out.sequences.tolist() == [
        [*ids, *row] for ids, row in zip(inputs["input_ids"].tolist(), tokens, strict=True)
    ]
    assert_close(torch.stack(out.scores, dim=1), scores, rtol=1e-5, atol=1e-4)
    limited = model.generate(**inputs, max_length=length + 4, do_sample=False)
    assert limited.tolist() == out.sequences.tolist()


@torch.no_grad()
def test_tokens_that_a_projector_adds_are_not_in_the_contrastive_prompt(host, model):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    mv.apply(model, POOLING, HiPruneConfig(keep=9), CONFIG)
    added = added_by_hand(stock, model.vision_slots.projector, inputs)
    tokens, scores = decoded_by_hand(host, stock, inputs, CONFIG, 4, kept=kept_patches(model, inputs), added=added)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, **SCORES)
    assert out.sequences[:, -4:].tolist() == tokens
    assert_close(torch.stack(out.scores, dim=1), scores, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_placeholders_for_added_tokens_change_nothing():
    model, inputs = mv.apply(LLAVA.model(), POOLING, CONFIG), LLAVA.inputs(*mixed_rows())
    processor = copy.deepcopy(LLAVA.processor)
    processor.num_additional_image_tokens += POOLING.scales
    text = [prompt.replace("{}", LLAVA.image_mark) for prompt, _ in mixed_rows()]
    images = [image for _, row in mixed_rows() for image in row]
    longer = processor(images=images, text=text, padding=True, return_tensors="pt")
    assert longer["input_ids"].shape[1] == inputs["input_ids"].shape[1] + 2 * POOLING.scales
    expected, out = (model.generate(**given, **GREEDY) for given in (inputs, longer))
    assert out[:, -8:].tolist() == expected[:, -8:].tolist()
    assert out[:, :-8].tolist() == longer["input_ids"].tolist()


@torch.no_grad()
def test_a_noised_image_is_pruned_as_the_image_is():
    inputs, stock, config = LLAVA.inputs(question(1), question(2)), LLAVA.model(), VCDConfig(steps=900)
    model = mv.apply(LLAVA.model(), RandomConfig(keep=7), config)
    kept = kept_patches(model, inputs)
    full = prune_by_hand(LLAVA, stock, inputs, kept)
    noised = contrastive_prompts(LLAVA, stock, inputs, config, kept)
    expected = [scores_by_hand(stock, f[1:], c, config, 4)[0] for f, c in zip(full, noised, strict=True)]
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:].tolist() == expected


@torch.no_grad()
def test_outliers_of_a_smaller_image_are_its_own(host, model):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, DownsampleConfig(keep=0.3), CONFIG)
    both = model.generate(**inputs, max_new_tokens=4, do_sample=False, **SCORES)
    mv.apply(model, DownsampleConfig(keep=0.3))
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False, **SCORES)
    assert_close(both.logits[0], plain.logits[0])
    shown = [0, 2, 3]
    assert not torch.equal(both.scores[0][shown], plain.scores[0][shown])
    assert_close(both.scores[0][1], plain.scores[0][1])


@pytest.mark.parametrize("plugged_in", [True, False])
@pytest.mark.parametrize("strategy", [damro, vcd, text_only], ids=lambda s: s.__name__)
@torch.no_grad()
def test_prompts_without_an_image_are_decoded_plainly_and_one_line_says_so(plugged_in, strategy, caplog):
    inputs, stock = LLAVA.inputs(("Is grass green?", []), ("How many red squares?", [])), LLAVA.model()
    config = strategy().config
    model = mv.apply(LLAVA.model(), config) if plugged_in else LLAVA.model()
    call = {} if plugged_in else {"custom_generate": strategy()}
    logging.getLogger("mllm_vision.contrast").warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        outs = [model.generate(**inputs, **GREEDY, **call).tolist() for _ in range(2)]
    assert outs == [stock.generate(**inputs, **GREEDY).tolist()] * 2
    said = [record.getMessage() for record in caplog.records if record.name == "mllm_vision.contrast"]
    assert said == [f"{config.type}: prompts without an image are decoded plainly"]


@torch.no_grad()
def test_a_prompt_without_an_image_among_others_is_told_of(caplog):
    logging.getLogger("mllm_vision.contrast").warning_once.cache_clear()
    model, inputs = mv.apply(LLAVA.model(), CONFIG), LLAVA.inputs(question())
    with caplog.at_level(logging.WARNING, "mllm_vision.contrast"):
        model.generate(**inputs, max_new_tokens=1)
        assert not caplog.records
        model.generate(**LLAVA.inputs(*mixed_rows()), max_new_tokens=1)
    assert [record.getMessage() for record in caplog.records] == ["damro: prompts without an image are decoded plainly"]


@torch.no_grad()
def test_a_video_is_no_image():
    host = HOST["qwen2.5-vl"]
    inputs, stock = host.inputs(question()), host.model()
    marks = inputs["input_ids"] == stock.config.image_token_id
    video = {
        "input_ids": inputs["input_ids"].masked_fill(marks, stock.config.video_token_id),
        "attention_mask": inputs["attention_mask"],
        "mm_token_type_ids": 2 * marks.int(),
        "pixel_values_videos": inputs["pixel_values"],
        "video_grid_thw": inputs["image_grid_thw"],
    }
    expected, model = stock.generate(**video, **GREEDY), mv.apply(host.model(), CONFIG)
    assert not torch.equal(model.generate(**inputs, **GREEDY)[:, -8:], expected[:, -8:])
    assert torch.equal(model.generate(**video, **GREEDY), expected)
    for model in (host.model(), mv.apply(host.model())):
        assert torch.equal(model.generate(**video, **GREEDY, custom_generate=damro(topk=4, alpha=1.0)), expected)


REFUSED = {
    "beams": ({"num_beams": 2}, r"damro decodes by greedy search or sampling, got beam search: use num_beams=1"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "sampling, got beam sample"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "sampling, got assisted generation: use num_beams=1, no assist"),
    "a cache": ({"past_key_values": DynamicCache()}, "damro keeps a cache of its own.*past_key_values: leave it out"),
    "chunks": (
        {"cache_implementation": "static", "prefill_chunk_size": 8},
        "damro cannot fill a static cache in chunks.*leave out prefill_chunk_size or cache_implementation",
    ),
}


@pytest.mark.parametrize("plugged_in", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_contrasted_is_refused(case, plugged_in):
    settings, message = REFUSED[case]
    inputs = LLAVA.inputs(question())
    model = mv.apply(LLAVA.model(), CONFIG) if plugged_in else LLAVA.model()
    call = {} if plugged_in else {"custom_generate": damro(topk=4)}
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2, **copy.deepcopy(settings), **call)


def test_an_assistant_and_paged_caches_are_refused():
    model, inputs = mv.apply(LLAVA.model(), CONFIG), LLAVA.inputs(question())
    with pytest.raises(ValueError, match="got assisted generation"):
        model.generate(**inputs, max_new_tokens=2, assistant_model=LLAVA.model())
    with pytest.raises(ValueError, match="got paged caches: use num_beams=1, no assistant and no paged cache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="paged")


def test_beams_of_a_prompt_without_an_image_are_stocks():
    model, inputs = mv.apply(LLAVA.model(), CONFIG), LLAVA.inputs(("Is grass green?", []))
    expected = LLAVA.model().generate(**inputs, max_new_tokens=4, num_beams=2)
    assert model.generate(**inputs, max_new_tokens=4, num_beams=2).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="got beam search"):  # whose loop a stock model does not leave to us
        LLAVA.model().generate(**inputs, max_new_tokens=4, num_beams=2, custom_generate=damro())


@pytest.mark.parametrize("plugged_in", [True, False])
def test_embeddings_in_place_of_ids_are_refused(plugged_in):
    model, inputs = mv.apply(LLAVA.model(), CONFIG) if plugged_in else LLAVA.model(), LLAVA.inputs(question())
    call = {"max_new_tokens": 2} | ({} if plugged_in else {"custom_generate": damro(topk=4)})
    embedded = {"inputs_embeds": torch.zeros(*inputs["input_ids"].shape, 48), "pixel_values": inputs["pixel_values"]}
    with pytest.raises(ValueError, match=r"images need input_ids, .* inputs_embeds: pass the ids alone"):
        model.generate(**embedded, **call)
    with pytest.raises(ValueError, match="got input_ids and inputs_embeds: pass the ids alone"):
        model.generate(**embedded, input_ids=inputs["input_ids"], **call)


@torch.no_grad()
def test_a_video_beside_an_image_is_refused():
    host = HOST["qwen2.5-vl"]
    inputs = host.inputs(question())
    del inputs["mm_token_type_ids"]  # with which a stock model refuses them before it calls us
    video = {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": inputs["image_grid_thw"]}
    for model in (host.model(), mv.apply(host.model())):
        with pytest.raises(ValueError, match="images and videos in one call are not supported"):
            model.generate(**inputs, **video, max_new_tokens=2, custom_generate=text_only())


@torch.no_grad()
def test_the_model_remembers_the_prompt_and_not_the_contrastive_one():
    host = HOST["qwen2.5-vl"]
    inputs, stock, model = host.inputs(question()), host.model(), mv.apply(host.model(), TextOnlyConfig())
    for each in (stock, model):
        each.generate(**inputs, max_new_tokens=1)
    assert torch.equal(model.model.rope_deltas, stock.model.rope_deltas)


@torch.no_grad()
def test_a_compiled_step_is_contrasted(monkeypatch):
    """What stock `generate` compiles on a GPU, without the compiler."""
    model, inputs = mv.apply(LLAVA.model(), CONFIG), LLAVA.inputs(question())
    expected, asked = model.generate(**inputs, **GREEDY), []
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *_: True)
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: asked.append(config) or self.__call__)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert asked == [None]


def test_a_model_decodes_in_one_way():
    model = mv.apply(LLAVA.model(), CONFIG)
    with pytest.raises(ValueError, match="only one method can say how to decode, and more do among damro, text_only"):
        mv.apply(model, CONFIG, TextOnlyConfig())
    assert model.vision_slots.methods == [CONFIG]


@torch.no_grad()
def test_another_custom_generate_is_the_callers_own():
    model, inputs = mv.apply(LLAVA.model(), CONFIG), LLAVA.inputs(question())
    seen = []

    def echo(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.append(set(kwargs["mm_encoder_outputs"]))
        return input_ids

    assert model.generate(**inputs, max_new_tokens=2, custom_generate=echo).tolist() == inputs["input_ids"].tolist()
    assert seen == [{"image"}]


def test_a_decoding_goes_in_and_out_with_the_reducers(tmp_path):
    methods = [HiPruneConfig(keep=9), CONFIG]
    model, inputs = mv.apply(LLAVA.model(), *methods), LLAVA.inputs(question())
    expected = model.generate(**inputs, **GREEDY).tolist()
    assert (
        model.config.mllm_vision
        == stored(methods)
        == {
            "version": 1,
            "operations": [{"type": "hiprune", "keep": 9}, {"type": "damro", "alpha": 1.0, "topk": 4}],
        }
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.generate(**inputs, **GREEDY).tolist() == expected
    with mv.using(model, TextOnlyConfig()):
        assert model.generate(**inputs, **GREEDY).tolist() != expected
    assert model.generate(**inputs, **GREEDY).tolist() == expected


def test_remove_leaves_the_stock_model():
    model, inputs, stock = LLAVA.model(), LLAVA.inputs(question()), LLAVA.model()
    plain = stock.generate(**inputs, **GREEDY).tolist()
    mv.apply(model, CONFIG)
    assert model.generate(**inputs, **GREEDY).tolist() != plain
    assert traces(mv.remove(model)) == traces(stock)
    assert model.generate(**inputs, **GREEDY).tolist() == plain


@torch.no_grad()
def test_a_model_with_lora_is_contrasted(host, model):
    inputs = host.inputs(question())
    wrapped = mv.apply(with_lora(model), CONFIG)
    expected, _ = decoded_by_hand(host, with_lora(host.model()).base_model.model, inputs, CONFIG, 4)
    assert wrapped.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:].tolist() == expected


@torch.no_grad()
def test_threads_do_not_hear_each_other():
    model = mv.apply(LLAVA.model(), CONFIG)
    inputs = {"a": LLAVA.inputs(question(1)), "b": LLAVA.inputs(question(2))}
    strategies = {"a": {}, "b": {"custom_generate": text_only(alpha=2.0)}}
    alone = {name: model.generate(**inputs[name], **GREEDY, **strategies[name]).tolist() for name in "ab"}
    results, barrier = {}, threading.Barrier(2)

    def run(name):
        barrier.wait()
        results[name] = model.generate(**inputs[name], **GREEDY, **strategies[name]).tolist()

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == alone


def test_functions_and_configs_are_found_under_the_package():
    assert mv.decoding.damro is damro
    assert mv.decoding.DamroConfig is DamroConfig
    with pytest.raises(AttributeError, match="has no attribute 'dola'; it has DamroConfig"):
        mv.decoding.dola  # noqa: B018
