"""What answers to the benchmarks count for, odd ones too, and the scores of small sets worked out by hand."""

import math

import pytest

from mllm_vision.eval.metrics.mme import COGNITION, PERCEPTION
from mllm_vision.eval.scores import Tallies, scored
from mllm_vision.eval.task import list_tasks, parse_tasks
from tests.eval.tasks.local import BENCHMARKS, rows_of, write_folder

LETTERED = {"letter": "A", "options": ["yes", "no"]}
ODD = ["Yes.", "yes, it is", "No, not visible", "", "x" * 10_000, "🙂", "да"]
# A truth, an answer that is right, and what each of ODD is worth.
WORTH = {
    "ai2d": (LETTERED, "A", [0, 0, 0, 0, 0, 0, 0]),
    "chartqa": ("Yes", "yes", [0, 0, 0, 0, 0, 0, 0]),
    "docvqa": (["yes"], "YES", [0.75, 0, 0, 0, 0, 0, 0]),
    "gqa": ("yes", "Yes", [1, 0, 0, 0, 0, 0, 0]),
    "mmbench": (LETTERED, "A. yes", [0, 0, 0, 0, 0, 0, 0]),
    "mme": ("yes", "Yes", [1, 1, 0, 0, 0, 0, 0]),
    "photos": ({"family": "existence", "answer": "yes"}, "Yes", [1, 0, 0, 0, 0, 0, 0]),
    "pope": ("yes", "Yes", [1, 1, 0, 1, 1, 1, 1]),  # whatever holds no "no" is a yes
    "pope:parser=lmms": ("yes", "Yes", [0, 0, 0, 0, 0, 0, 0]),
    "pope:parser=damro": ("yes", "Yes", [1, 1, 0, 0, 0, 0, 0]),
    "scienceqa": (LETTERED, "a", [0, 0, 0, 0, 0, 0, 0]),
    "seed": (LETTERED, "Yes", [0, 0, 0, 0, 0, 0, 0]),
    "textvqa": (["yes"] * 10, "Yes", [1, 0, 0, 0, 0, 0, 0]),
    "vizwiz": (["yes"] * 10, "Yes", [1, 0, 0, 0, 0, 0, 0]),
    "vizwiz:reading=lmms": (["Yes"] * 10, "Yes", [1, 0, 0, 0, 0, 0, 0]),
    "vqav2": (["yes"] * 10, "Yes", [1, 0, 0, 0, 0, 0, 0]),
    "vqav2:reading=lmms": (["Yes"] * 10, "Yes", [1, 0, 0, 0, 0, 0, 0]),
}


def worth(task, target, answer):
    """What an answer adds to the score, out of 1."""
    tally = task.tally(target, answer)
    assert tally["n"] == 1
    return next(tally[count] for count in ("right", "agreement", "similarity") if count in tally)


def scores(spec, folder, answers, rows=None):
    """Scores by group and name, and n by group, when those questions are answered that ``answers`` has."""
    [task] = parse_tasks(spec)
    examples = task.load(write_folder(folder, task.name, rows)).examples
    assert set(answers) <= {example.id for example in examples}
    answered = [(example, answers[example.id]) for example in examples if example.id in answers]
    tallies = Tallies.of(task, answered)
    found = scored(task, tallies)
    n = {group: int(counts["n"].sum()) for group, counts in tallies.groups.items()}
    return {group: {name: score.value for name, score in row.items()} for group, row in found.items()}, n


@pytest.mark.parametrize("spec", WORTH)
def test_odd_answers(spec):
    [task] = parse_tasks(spec)
    target, right, odd = WORTH[spec]
    assert worth(task, target, right) == 1
    assert [worth(task, target, answer) for answer in ODD] == odd


def test_every_benchmark_meets_odd_answers():
    assert {spec.partition(":")[0] for spec in WORTH} | {"chair"} == set(BENCHMARKS)


@pytest.mark.parametrize("answer", ODD)
def test_odd_captions_mention_nothing(answer):
    [task] = parse_tasks("chair")
    assert task.tally(["person"], answer) == {
        "n": 1,
        "words": len(answer.split()),
        "captions": 1,
        "hallucinated_captions": 0,
        "mentions": 0,
        "hallucinated_mentions": 0,
        "present": 1,
        "recalled": 0,
    }


def test_pope_scores_each_split(tmp_path):
    answers = {
        "random/1": "Yes",
        "random/2": "Yes",
        "popular/1": "No",
        "popular/2": "No, there is not.",
        "adversarial/1": "Yes, there is.",
        "adversarial/2": "No",
    }
    found, n = scores("pope", tmp_path / "pope", answers)
    names = ["accuracy", "precision", "recall", "f1", "yes_ratio"]
    assert {group: [row[name] for name in names] for group, row in found.items()} == {
        "random": [1 / 2, 1 / 2, 1, pytest.approx(2 / 3), 1],
        "popular": [1 / 2, 0, 0, 0, 0],
        "adversarial": [1, 1, 1, 1, 1 / 2],
    }
    assert n == {"random": 2, "popular": 2, "adversarial": 2}


MME_ANSWERS = {
    "existence/000001.jpg/0": "Yes",
    "existence/000001.jpg/1": "No",
    "existence/000002.jpg/2": "Yes",
    "existence/000002.jpg/3": "Yes",  # wrong
    "artwork/000003.jpg/4": "Yes",
    "artwork/000003.jpg/5": "yes.",  # wrong
    "code_reasoning/0004.png/6": "y",
    "code_reasoning/0004.png/7": "No, it prints 3.",
}


def test_mme_adds_accuracies_of_questions_and_of_images(tmp_path):
    found, n = scores("mme", tmp_path / "mme", MME_ANSWERS)
    assert found == {
        "existence": {"accuracy": 75, "accuracy_plus": 50},
        "artwork": {"accuracy": 50, "accuracy_plus": 0},
        "code_reasoning": {"accuracy": 100, "accuracy_plus": 100},
        "perception": {"score": 75 + 50 + 50 + 0},
        "cognition": {"score": 200},
    }
    assert n == {"existence": 4, "artwork": 2, "code_reasoning": 2}


def test_mme_leaves_an_image_with_one_question_out_of_accuracy_plus(tmp_path):
    answers = {id: said for id, said in MME_ANSWERS.items() if id != "existence/000002.jpg/3"}
    found, n = scores("mme", tmp_path / "mme", answers)
    assert found["existence"] == {"accuracy": 100, "accuracy_plus": 100}  # 3 of 3 questions, 1 of 1 images
    assert n["existence"] == 3


def test_mme_reaches_2000_and_800(tmp_path):
    pair = rows_of("mme")[:2]
    rows = [row | {"category": name, "question_id": name} for name in (*PERCEPTION, *COGNITION) for row in pair]
    answers = {f"{row['question_id']}/{i}": row["answer"] for i, row in enumerate(rows)}
    found, n = scores("mme", tmp_path / "mme", answers, rows)
    assert (found["perception"], found["cognition"]) == ({"score": 2000}, {"score": 800})
    assert list(n) == [*PERCEPTION, *COGNITION]


def test_vqav2_scores_all_and_each_type_of_answer(tmp_path):
    # "3" is given twice: 1/3 for the two people who gave it, 2/3 for the other eight; "The Red" is red, too.
    found, n = scores("vqav2", tmp_path / "vqav2", {"1000": "Yes", "1001": "3", "2000": "Red."})
    assert found == {
        "all": {"accuracy": pytest.approx((1 + 0.6 + 1) / 3)},
        "yes/no": {"accuracy": 1},
        "number": {"accuracy": pytest.approx(0.6)},
        "other": {"accuracy": 1},
    }
    assert n == {"all": 3, "yes/no": 1, "number": 1, "other": 1}


def test_vqav2_readings_differ_where_all_people_agree_on_a_mark():
    challenge, lmms = parse_tasks(["vqav2"])[0], parse_tasks(["vqav2:reading=lmms"])[0]
    target = ["t-shirt"] * 10
    assert (worth(challenge, target, "T-shirt"), worth(lmms, target, "T-shirt")) == (0, 1)


def test_vizwiz_readings_differ_in_the_apostrophe_of_an_answer():
    challenge, lmms = parse_tasks(["vizwiz"])[0], parse_tasks(["vizwiz:reading=lmms"])[0]
    target = ["mother's day"] * 10  # which is handed in as "mother 's day"
    assert (worth(challenge, target, "Mother's day"), worth(lmms, target, "Mother's day")) == (0, 1)


@pytest.mark.parametrize(("spec", "kite"), [("vizwiz", 0), ("vizwiz:reading=lmms", 1)])
def test_vizwiz_readings_differ_in_the_case_of_references(spec, kite, tmp_path):
    answers = {
        "VizWiz_val_00000001.jpg": "Kite",
        "VizWiz_val_00000002.jpg": "Unanswerable",
        "VizWiz_val_00000003.jpg": "No",
    }
    found, n = scores(spec, tmp_path / "vizwiz", answers)
    assert found == {
        "all": {"accuracy": pytest.approx((kite + 1 + 0) / 3)},
        "other": {"accuracy": kite},
        "unanswerable": {"accuracy": 1},
        "yes/no": {"accuracy": 0},
    }
    assert n == {"all": 3, "other": 1, "unanswerable": 1, "yes/no": 1}


def test_textvqa(tmp_path):
    found, n = scores("textvqa", tmp_path / "textvqa", {"1": "Main St", "2": "42", "3": "Nothing."})
    assert found == {"all": {"accuracy": pytest.approx((1 + 1 + 0.6) / 3)}}
    assert n == {"all": 3}


def test_gqa_scores_all_and_each_structure(tmp_path):
    found, n = scores("gqa", tmp_path / "gqa", {"100": "Yes.", "101": "Kite", "102": "sign"})
    assert found == {
        "all": {"accuracy": pytest.approx(2 / 3)},
        "verify": {"accuracy": 1},
        "query": {"accuracy": 1 / 2},
    }
    assert n == {"all": 3, "verify": 1, "query": 2}


def test_scienceqa_scores_all_and_each_subject(tmp_path):
    answers = {"0": "B", "1": "A. Paris", "2": "that the string is red"}
    found, n = scores("scienceqa", tmp_path / "scienceqa", answers)
    assert found == {
        "all": {"accuracy": pytest.approx(2 / 3)},
        "natural science": {"accuracy": 1 / 2},
        "social science": {"accuracy": 1},
    }
    assert n == {"all": 3, "natural science": 2, "social science": 1}


SKY, ATTRIBUTE = "finegrained_perception (instance-level)", "attribute_reasoning"


def test_mmbench_counts_a_question_right_only_under_every_rotation(tmp_path):
    # The kite moves from B to A, D, C; the bus from A to B, and the second "A" means the bicycle.
    answers = {"1/0": "B", "1/1": "A", "1/2": "D", "1/3": "C. a kite", "2/0": "A", "2/1": "A"}
    found, n = scores("mmbench", tmp_path / "mmbench", answers)
    assert found == {"all": {"accuracy": 1 / 2}, SKY: {"accuracy": 1}, ATTRIBUTE: {"accuracy": 0}}
    assert n == {"all": 2, SKY: 1, ATTRIBUTE: 1}


def test_mmbench_without_rotations(tmp_path):
    found, n = scores("mmbench:circular=false", tmp_path / "mmbench", {"1/0": "C", "2/0": "A"})
    assert found == {"all": {"accuracy": 1 / 2}, SKY: {"accuracy": 0}, ATTRIBUTE: {"accuracy": 1}}
    assert n == {"all": 2, SKY: 1, ATTRIBUTE: 1}


def test_seed_scores_all_and_each_dimension(tmp_path):
    found, n = scores("seed", tmp_path / "seed", {"11": "A", "12": "B", "13": "D. White"})
    assert found == {
        "all": {"accuracy": pytest.approx(2 / 3)},
        "scene understanding": {"accuracy": 1},
        "instance counting": {"accuracy": 0},
        "instance attributes": {"accuracy": 1},
    }
    assert n == {"all": 3, "scene understanding": 1, "instance counting": 1, "instance attributes": 1}


def test_ai2d(tmp_path):
    found, n = scores("ai2d", tmp_path / "ai2d", {"0": "C", "1": "Rabbit", "2": "rabbit"})
    assert found == {"all": {"accuracy": pytest.approx(2 / 3)}}
    assert n == {"all": 3}


def test_docvqa(tmp_path):
    # One comma is missing of 11 characters; of "$12.50", two of 6.
    found, n = scores("docvqa", tmp_path / "docvqa", {"501": "smith", "502": "May 4 1971", "503": "12.5"})
    assert found == {"all": {"anls": pytest.approx((1 + 10 / 11 + 4 / 6) / 3)}}
    assert n == {"all": 3}


def test_chartqa_scores_either_kind_and_overall(tmp_path):
    # 190 is within 5 % of 200, 0.36 of 35 %.
    found, n = scores("chartqa", tmp_path / "chartqa", {"0": "190", "1": "No", "2": "0.36", "3": "oman"})
    assert found == {
        "overall": {"relaxed_accuracy": 3 / 4},
        "human": {"relaxed_accuracy": 1 / 2},
        "augmented": {"relaxed_accuracy": 1},
    }
    assert n == {"overall": 4, "human": 2, "augmented": 2}


def test_chair(tmp_path):
    answers = {
        "7": "A woman with a kite beside a chair.",  # no chair there; both that are there
        "42": "A bus.",  # a bench, too
        "99": "",  # a chair
        "391": "A cat and another cat.",  # nothing
    }
    found, n = scores("chair:images=4", tmp_path / "chair", answers)
    rates = {"chair_s": 2 / 4, "chair_i": 3 / 6, "recall": pytest.approx(3 / 5)}
    assert found == {"all": {**rates, "objects": 6 / 4, "words": (8 + 2 + 0 + 5) / 4}}
    assert n == {"all": 4}


def test_the_score_to_quote_is_among_the_scores(tmp_path):
    for cls in list_tasks():
        if cls.name not in BENCHMARKS:
            continue
        task = parse_tasks("chair:images=4" if cls.name == "chair" else cls.name)[0]
        examples = task.load(write_folder(tmp_path / cls.name, cls.name)).examples
        found = scored(task, Tallies.of(task, [(example, "A") for example in examples]))
        group, name = task.headline
        assert math.isfinite(found[group][name].value)


def test_options_that_only_score_change_no_question(tmp_path):
    for spec in ("pope:parser=lmms", "vqav2:reading=lmms", "vizwiz:reading=lmms"):
        [task], [plain] = parse_tasks(spec), parse_tasks(spec.partition(":")[0])
        folder = write_folder(tmp_path / task.name, task.name)
        assert set(task.changed()) == set(task.resumable)
        asked = [[(e.id, e.question, e.target) for e in each.load(folder).examples] for each in (task, plain)]
        assert asked[0] == asked[1]
