"""Measure a model on held-out drawn scenes: greedy answers, exact match, and POPE's scores for existence."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from mllm_vision.scenes.draw import Scene, render, sample_scene
from mllm_vision.scenes.questions import FAMILIES, NEGATIVES, Question, existence_question


def sample_questions(
    split: str, family: str, n: int, *, side: int = 140, seed: int = 0
) -> list[tuple[Scene, Question]]:
    """`n` questions of a family, one a scene, the same for the same arguments.

    For existence, `n` is the number of questions of each kind of negative with its positives, as in POPE: every second
    scene is asked for a shape that is there (those questions are shared by the three kinds), the others for one absent
    shape of each kind. So there are 2 n questions in all.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    asked: list[tuple[Scene, Question]] = []
    scenes, index = 0, 0
    while scenes < n:
        scene = sample_scene(split, index, side=side)
        rng = random.Random(f"ask-{seed}-{split}-{family}-{index}")
        if family == "existence":
            kinds = ("present",) if scenes % 2 == 0 else NEGATIVES
            questions = [existence_question(scene, rng, kind) for kind in kinds]
        else:
            question = FAMILIES[family](scene, rng)
            questions = [question] if question else []
        asked += [(scene, question) for question in questions]
        scenes += bool(questions)
        index += 1
    return asked


def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Sequence[tuple[Scene, Question]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 6,
) -> list[str]:
    """The model's greedy answers, lower-cased and without a final full stop."""
    answers: list[str] = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
                add_generation_prompt=True,
            )
            for _, question in batch
        ]
        inputs = processor(
            images=[render(scene) for scene, _ in batch],
            text=prompts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device, model.dtype)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += [
            text.strip().lower().removesuffix(".") for text in processor.batch_decode(new, skip_special_tokens=True)
        ]
    return answers


def evaluate_scenes(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    split: str = "test",
    n_per_family: int = 200,
    batch_size: int = 32,
    families: Sequence[str] = tuple(FAMILIES),
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Scores by family; existence as `existence_random`, `existence_popular` and `existence_adversarial`.

    The model is asked through `generate` with stock inputs, so a pruned one is measured like a stock one.

    Args:
        n_per_family: Questions per family, and per kind of negative (half of them positives).

    Returns:
        Per family `n` and `accuracy` (share of exact matches); for existence also `precision`, `recall`, `f1` and
        `yes_ratio` of the predictions. An answer that is neither yes nor no is wrong and counts as not yes.
    """
    scores: dict[str, dict[str, float]] = {}
    side = processor.image_processor.crop_size["height"]
    was_training = model.training
    model.eval()
    for family in families:
        asked = sample_questions(split, family, n_per_family, side=side, seed=seed)
        answers = answer_questions(model, processor, asked, batch_size=batch_size)
        pairs = [(question, answer) for (_, question), answer in zip(asked, answers, strict=True)]
        if family == "existence":
            for kind in NEGATIVES:
                of_kind = [(q, answer) for q, answer in pairs if q.kind in ("present", kind)]
                scores[f"existence_{kind}"] = yes_no_scores([q.answer for q, _ in of_kind], [a for _, a in of_kind])
        else:
            right = sum(question.answer == answer for question, answer in pairs)
            scores[family] = {"n": len(pairs), "accuracy": right / len(pairs)}
    model.train(was_training)
    return scores


def yes_no_scores(truths: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """POPE's accuracy, precision, recall, F1 and yes-ratio of the predictions; 0 where a ratio has no denominator."""
    pairs: list[tuple[str, str]] = list(zip(truths, answers, strict=True))
    hits = sum(truth == "yes" and answer == "yes" for truth, answer in pairs)
    said_yes = sum(answer == "yes" for _, answer in pairs)
    is_yes = sum(truth == "yes" for truth, _ in pairs)
    result: dict[str, Any] = {
        "n": len(pairs),
        "accuracy": sum(truth == answer for truth, answer in pairs) / len(pairs),
        "precision": hits / said_yes if said_yes else 0.0,
        "recall": hits / is_yes if is_yes else 0.0,
        "f1": 2 * hits / (said_yes + is_yes) if said_yes + is_yes else 0.0,
        "yes_ratio": said_yes / len(pairs),
    }
    return result
