"""Evaluation on scenes, checked with a model that is told what to say, and the scores of the trained checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import mllm_vision.scenes
from mllm_vision.eval.scenes import answer_questions, evaluate_scenes, sample_questions, yes_no_scores
from mllm_vision.recipes.publish import model_card
from mllm_vision.recipes.tiny_model import build_processor
from mllm_vision.scenes import FAMILIES, NEGATIVES

CHECKPOINT = Path(mllm_vision.scenes.__file__).parents[1] / "checkpoints" / "tiny-llava-scenes"


class Oracle:
    """Answers in the order asked, from a list; counts what it is given."""

    device, dtype, training = torch.device("cpu"), torch.float32, False

    def __init__(self, processor, answers):
        self.processor, self.answers, self.batches = processor, list(answers), []

    def eval(self):
        return self

    def train(self, mode):
        return self

    def generate(self, input_ids, attention_mask, pixel_values, max_new_tokens, do_sample):
        assert not do_sample
        self.batches.append(len(input_ids))
        said = [self.answers.pop(0) for _ in input_ids]
        tokenizer = self.processor.tokenizer
        new = tokenizer(said, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, new["input_ids"]], 1)


@pytest.fixture(scope="module")
def processor():
    return build_processor(140, 14)


def test_a_model_that_is_always_right_scores_one(processor):
    asked = [pair for family in FAMILIES for pair in sample_questions("test", family, 10)]
    scores = evaluate_scenes(Oracle(processor, [q.answer for _, q in asked]), processor, n_per_family=10, batch_size=4)
    assert list(scores) == [*(f"existence_{kind}" for kind in NEGATIVES), "count", "colour", "relation", "reading"]
    for family, score in scores.items():
        assert (score["n"], score["accuracy"]) == (10, 1)
        if family.startswith("existence"):
            assert (score["f1"], score["yes_ratio"]) == (1, 0.5)


def test_negatives_are_scored_apart_and_share_their_positives(processor):
    asked = sample_questions("test", "existence", 10)
    assert [q.kind for _, q in asked] == ["present", *NEGATIVES] * 5
    # Fooled by adversarial negatives only.
    answers = ["yes" if q.kind in ("present", "adversarial") else "no" for _, q in asked]
    scores = evaluate_scenes(Oracle(processor, answers), processor, n_per_family=10, families=["existence"])
    assert scores["existence_random"]["f1"] == scores["existence_popular"]["f1"] == 1
    assert scores["existence_adversarial"] == pytest.approx(
        {"n": 10, "accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1}
    )


def test_questions_are_the_same_every_time_and_batches_are_full(processor):
    asked = sample_questions("test", "colour", 5)
    assert asked == sample_questions("test", "colour", 5) == sample_questions("test", "colour", 9)[:5]
    assert asked != sample_questions("test", "colour", 5, seed=1)
    oracle = Oracle(processor, ["Red."] * 5)
    assert answer_questions(oracle, processor, asked, batch_size=2) == ["red"] * 5
    assert oracle.batches == [2, 2, 1]


def test_yes_no_scores_against_counting_by_hand():
    truths = ["yes", "yes", "yes", "no", "no"]
    answers = ["yes", "no", "maybe", "yes", "no"]
    # One hit; said yes twice; three are yes.
    assert yes_no_scores(truths, answers) == pytest.approx(
        {"n": 5, "accuracy": 0.4, "precision": 0.5, "recall": 1 / 3, "f1": 0.4, "yes_ratio": 0.4}
    )
    assert yes_no_scores(["no"], ["no"])["f1"] == 0


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(ValueError, match="family must be one of existence, count, colour, relation, reading"):
        sample_questions("test", "color", 1)


def test_the_checkpoint_scores_what_its_card_says():
    stated = json.loads((CHECKPOINT / "scores.json").read_text())["scores"]
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT)
    measured = evaluate_scenes(model, AutoProcessor.from_pretrained(CHECKPOINT), n_per_family=60)
    for family, score in measured.items():
        # The sample is the first 60 of the card's 500: three standard errors of an accuracy at n = 60.
        spread = 3 * (max(stated[family]["accuracy"] * (1 - stated[family]["accuracy"]), 0.02) / 60) ** 0.5
        assert score["accuracy"] == pytest.approx(stated[family]["accuracy"], abs=spread), family


def test_the_checkpoint_answers_the_same_alone_and_in_a_batch():
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT)
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    asked = [sample_questions("test", family, 2)[0] for family in FAMILIES]
    together = answer_questions(model, processor, asked)
    assert together == answer_questions(model, processor, asked, batch_size=1)


def test_the_card_of_the_checkpoint_is_made_from_its_scores():
    facts = json.loads((CHECKPOINT / "scores.json").read_text())
    assert (CHECKPOINT / "README.md").read_text() == model_card(facts)
