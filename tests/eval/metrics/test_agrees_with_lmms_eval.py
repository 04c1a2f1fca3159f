"""The same answers through lmms-eval's own functions; where the two differ on purpose, the case that shows it."""

import random
import string

import pytest

from mllm_vision.eval.metrics.chair import CLASSES, chair_scores, chair_tally, mentions
from mllm_vision.eval.metrics.mme import COGNITION, PERCEPTION, mme_scores, mme_tally, read
from mllm_vision.eval.metrics.text import anls, exact_match, relaxed_match
from mllm_vision.eval.metrics.vqa import (
    lmms_vqa_accuracy,
    normalise,
    normalise_textvqa,
    textvqa_accuracy,
    vizwiz_accuracy,
    vqa_accuracy,
)
from mllm_vision.eval.metrics.yes_no import PARSERS, yes_no_scores, yes_no_tally
from tests.eval.metrics.answers import ODD, random_answers

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

ANSWERS = ODD + random_answers(300)


def of_lmms_eval(module):
    """A module of lmms-eval, or a skip of the tests that need it: some need more than lmms-eval installs."""
    return pytest.importorskip(
        f"lmms_eval.{module}", reason=f"lmms_eval.{module} lacks a package", exc_type=ImportError
    )


@pytest.fixture
def references():
    """Ten references an answer: up to five are the answer in another dress."""
    rng = random.Random(0)
    dresses = [str, str.upper, lambda text: f"the {text}."]
    return [
        [rng.choice(dresses)(answer) for _ in range(alike)] + rng.sample(ANSWERS, 10 - alike)
        for answer, alike in ((answer, rng.randint(0, 5)) for answer in ANSWERS)
    ]


def summed(tallies):
    return {name: sum(tally[name] for tally in tallies) for name in tallies[0]}


def pope_both(answers, truths):
    """POPE's scores by lmms-eval and by this package."""
    pope = of_lmms_eval("tasks.pope.utils")
    results = [
        pope.pope_process_results({"answer": truth, "question_id": i}, [answer])["pope_accuracy"]
        for i, (truth, answer) in enumerate(zip(truths, answers, strict=True))
    ]
    theirs = {
        "accuracy": pope.pope_aggregate_accuracy(results),
        "precision": pope.pope_aggregate_precision(results),
        "recall": pope.pope_aggregate_recall(results),
        "f1": pope.pope_aggregate_f1_score(results),
        "yes_ratio": pope.pope_aggregate_yes_ratio(results),
    }
    said = [PARSERS["lmms"](answer) for answer in answers]
    return theirs, yes_no_scores(summed([yes_no_tally(*pair) for pair in zip(truths, said, strict=True)]))


def test_pope():
    rng = random.Random(0)
    answers = [rng.choice(["yes", "No", " YES\n", "no"]) for _ in range(300)]
    theirs, ours = pope_both(answers, [rng.choice(["yes", "no"]) for _ in answers])
    share_of_questions, share_of_answers = theirs.pop("yes_ratio"), ours.pop("yes_ratio")
    assert theirs == pytest.approx(ours)
    assert share_of_answers != share_of_questions


def test_pope_differs_in_recall_and_yes_ratio():
    truths = ["yes", "yes", "yes", "no"]
    theirs, ours = pope_both(["yes", "no", "Yes.", "no"], truths)
    assert theirs == pytest.approx({"accuracy": 0.5, "precision": 1, "recall": 1 / 2, "f1": 2 / 3, "yes_ratio": 3 / 4})
    assert ours == pytest.approx({"accuracy": 0.5, "precision": 1, "recall": 1 / 3, "f1": 1 / 2, "yes_ratio": 1 / 4})


def test_pope_accuracy_and_precision_of_any_answer():
    rng = random.Random(0)
    theirs, ours = pope_both(ANSWERS, [rng.choice(["yes", "no"]) for _ in ANSWERS])
    assert (theirs["accuracy"], theirs["precision"]) == pytest.approx((ours["accuracy"], ours["precision"]))


def test_normalising():
    processor = of_lmms_eval("tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor()
    words = [*processor.CONTRACTIONS, *processor.NUMBER_MAP, *processor.ARTICLES]
    for answer in [*ANSWERS, *words]:
        flat = answer.replace("\n", " ").replace("\t", " ").strip()
        assert normalise_textvqa(answer) == processor(answer), answer
        if answer != "1,,2":
            steps = processor.process_digit_article(processor.process_punctuation(flat))
            assert normalise(answer) == steps, answer


def test_vqav2(references):
    utils = of_lmms_eval("tasks.vqav2.utils")

    def theirs(answer, texts):
        doc = {"question_id": 0, "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(texts)]}
        return utils.vqav2_process_results_val(doc, [answer])["exact_match"]

    ours = [lmms_vqa_accuracy(answer, texts) for answer, texts in zip(ANSWERS, references, strict=True)]
    assert ours == pytest.approx([theirs(*pair) for pair in zip(ANSWERS, references, strict=True)])
    assert {round(value, 1) for value in ours} == {0, 0.3, 0.6, 0.9, 1}
    # The challenge code normalises nothing where all references are the same.
    assert (theirs("Yes.", ["yes"] * 10), vqa_accuracy("Yes.", ["yes"] * 10)) == (1, 0)
    # It also sees a number in "1,2" and not in "1,,2".
    assert (theirs("1,,2", ["12"] * 9 + ["x"]), vqa_accuracy("1,,2", ["12"] * 9 + ["x"])) == (1, 0)


@pytest.mark.parametrize("task", ["textvqa", "vizwiz_vqa"])
def test_textvqa_and_vizwiz(task, references):
    process = getattr(of_lmms_eval(f"tasks.{task}.utils"), f"{task}_process_results")

    def theirs(answer, texts):
        return process({"question_id": 0, "answers": list(texts)}, [answer])["exact_match"]

    ours = [textvqa_accuracy(answer, texts) for answer, texts in zip(ANSWERS, references, strict=True)]
    assert ours == pytest.approx([theirs(*pair) for pair in zip(ANSWERS, references, strict=True)])
    # VizWiz's own script leaves the references as they are.
    assert (theirs("2 cats", ["two cats"] * 10), vizwiz_accuracy("2 cats", ["two cats"] * 10)) == (1, 0)


def test_gqa():
    theirs = of_lmms_eval("api.metrics").exact_match_hf_evaluate

    def matched(answer, reference):
        options = {"ignore_case": True, "ignore_punctuation": True}
        return bool(theirs(predictions=[answer], references=[reference], **options)["exact_match"])

    def leaves_space(text):
        plain = text.translate(str.maketrans("", "", string.punctuation))
        return plain != plain.strip()

    rng = random.Random(0)
    # Theirs keeps surrounding spaces, and goes through numpy, which drops a final NUL.
    answers = [answer for answer in ANSWERS if not leaves_space(answer) and "\x00" not in answer]
    pairs = [(answer, rng.choice([f"{answer}!".upper(), rng.choice(answers)])) for answer in answers]
    ours = [exact_match(*pair) for pair in pairs]
    assert ours == [matched(*pair) for pair in pairs]
    assert len(ours) > 200 and 50 < sum(ours) < len(ours) - 50
    assert (matched("red .", "red"), exact_match("red .", "red")) == (False, True)


def test_chartqa():
    theirs = of_lmms_eval("tasks.chartqa.utils").relaxed_correctness
    rng = random.Random(0)
    forms = [rng.choice(["{:.2f}", "{:.1f}%", "-{:.0f}"]).format for _ in range(300)]
    numbers = [(form(20 * rng.uniform(0.9, 1.1)), form(20)) for form in forms] + [("0.0", "0"), ("0", "0"), ("1", "0%")]
    answers = [answer.strip() for answer in ANSWERS if answer.strip() not in {"nan", "-inf", "1e400"}]
    pairs = numbers + [(answer, answer.upper()) for answer in answers]
    pairs += [(answer, rng.choice(numbers)[1]) for answer in answers]
    ours = [relaxed_match(*pair) for pair in pairs]
    assert ours == [theirs(*pair) for pair in pairs]
    assert 50 < sum(ours[:300]) < 250
    assert (theirs("yes ", "yes"), relaxed_match("yes ", "yes")) == (False, True)
    assert (theirs("NaN", "nan"), relaxed_match("NaN", "nan")) == (False, True)


def test_docvqa():
    theirs = of_lmms_eval("api.metrics").anls
    rng = random.Random(0)
    answers = [answer for answer in ANSWERS if len(answer) < 200]

    def folded(text):
        return " ".join(text.lower().split())

    scores = []
    for answer in answers:
        texts = [rng.choice([answer.upper(), answer[1:], "yes no", rng.choice(answers)]) for _ in range(3)]
        scores.append(anls(answer, texts))
        ready = [folded(text) for text in texts]
        assert scores[-1] == pytest.approx(theirs(ready, [folded(answer)])["anls"]), (answer, texts)
    assert 0 in scores and 1 in scores and len(set(scores)) > 10
    # Theirs divides by a length that counts the spaces it has just ignored.
    assert (theirs(["ab"], ["c      b"])["anls"], anls("c      b", ["ab"])) == (pytest.approx(0.75), 0)


def test_mme():
    utils = of_lmms_eval("tasks.mme.utils")
    assert utils.eval_type_dict == {"Perception": list(PERCEPTION), "Cognition": list(COGNITION)}
    assert [read(answer) or "other" for answer in ANSWERS] == [utils.parse_pred_ans(answer) for answer in ANSWERS]

    rng = random.Random(0)
    results, tallies = [], []
    for image in range(200):
        answers = [rng.choice(["Yes", "No.", "y", rng.choice(ANSWERS)]) for _ in range(2)]
        docs = [{"question_id": image, "category": "count", "answer": truth} for truth in ("Yes", "No")]
        for doc, answer in zip(docs, answers, strict=True):
            results.append(utils.mme_process_results(doc, [answer])["mme_perception_score"])
        tallies.append(mme_tally(["yes", "no"], [read(answer) for answer in answers]))
    scores = mme_scores(summed(tallies))
    assert utils.mme_aggregate_results(results) == pytest.approx(scores["accuracy"] + scores["accuracy_plus"])


def test_chair_words():
    utils = of_lmms_eval("tasks.coco_cap_chair.utils")
    words = {word.strip().lower(): name for word, name in utils.INVERSE_SYNONYM_DICT.items()}
    assert set(words.values()) == set(CLASSES)
    # Three words are never read as one, by theirs neither, and no singular here is "glas".
    out_of_reach = {"stove top oven", "wine glas"}
    assert {word: mentions(word) for word in words.keys() - out_of_reach} == {
        word: [words[word]] for word in words.keys() - out_of_reach
    }
    singular = {pair: term for pair, term in utils.DOUBLE_WORD_DICT.items() if pair not in out_of_reach}
    assert {pair: mentions(pair) for pair in singular} == {
        pair: [words[term]] if term in words else [] for pair, term in singular.items()
    }


def test_chair_scores():
    utils = of_lmms_eval("tasks.coco_cap_chair.utils")
    rng = random.Random(0)
    names = ["person", "dog", "cat", "car", "chair"]
    captions = [(rng.choices(names, k=rng.randint(0, 4)), set(rng.sample(names, 3))) for _ in range(300)]
    results = [{"pred": mentioned, "answer": present} for mentioned, present in captions]
    ours = chair_scores(summed([chair_tally(*caption) for caption in captions]))
    theirs = {name: getattr(utils, f"coco_cap_chair_aggregate_results_{name}")(results) for name in ours}
    assert {name: 100 * value for name, value in ours.items()} == pytest.approx(theirs)
