"""Intervals and paired differences, against the bootstrap written out slowly and against known answers."""

from dataclasses import dataclass

import numpy as np
import pytest

from mllm_vision.eval import scores
from mllm_vision.eval.metrics.ratio import ratio
from mllm_vision.eval.metrics.yes_no import yes_no_scores, yes_no_tally
from mllm_vision.eval.scores import RESAMPLES, Score, Tallies, differences, scored
from mllm_vision.eval.task import Example, Task


@dataclass(kw_only=True)
class Polled(Task):
    """Yes or no, in two splits; a summary adds their accuracies up."""

    def examples(self, row):
        raise NotImplementedError

    def tally(self, target, answer):
        return yes_no_tally(target, answer)

    def scores(self, sums):
        return yes_no_scores(sums)

    def summary(self, groups):
        return {"sum": {"accuracy": sum(ratio(sums["right"], sums["n"]) for sums in groups.values())}}


def answered(n, *, accuracy=0.7, questions=1, seed=0):
    """n units of so many questions, in the group "odd" or "even"; answers right by chance."""
    rng = np.random.default_rng(seed)
    pairs = []
    for unit in range(n):
        for question in range(questions):
            truth = str(rng.choice(["yes", "no"]))
            wrong = {"yes": "no", "no": "yes"}[truth]
            groups = ("odd",) if unit % 2 else ("even",)
            example = Example(
                id=f"{unit}/{question}", question="?", images=[], target=truth, groups=groups, unit=f"u{unit}"
            )
            pairs.append((example, truth if rng.random() < accuracy else wrong))
    return pairs


def slowly(pairs, group, score, draws):
    """The middle 95 % of a score over resampled units: loops over the units themselves."""
    units = sorted({example.unit for example, _ in pairs}, key=lambda unit: int(unit[1:]))
    found = []
    for weights in draws:
        drawn = [unit for unit, times in zip(units, weights, strict=True) for _ in range(int(times))]
        sums = dict.fromkeys(("n", "right", "hits", "said_yes", "is_yes"), 0.0)
        for unit in drawn:
            for example, answer in pairs:
                if example.unit == unit and group in example.groups:
                    for name, count in yes_no_tally(example.target, answer).items():
                        sums[name] += count
        found.append(yes_no_scores(sums)[score])
    return np.percentile(found, [2.5, 97.5])


def test_intervals_are_those_of_the_bootstrap_written_out(monkeypatch):
    monkeypatch.setattr(scores, "RESAMPLES", 40)
    pairs = answered(14, questions=2)
    found = scored(Polled(), Tallies.of(Polled(), pairs), seed=3)
    (draws,) = list(scores._draws(14, 3))
    for group in ("even", "odd"):
        for name in ("accuracy", "precision", "f1"):
            score = found[group][name]
            assert (score.low, score.high) == pytest.approx(slowly(pairs, group, name, draws)), (group, name)


def test_draws_that_do_not_fit_at_once_are_the_same(monkeypatch):
    tallies = Tallies.of(Polled(), answered(20))
    whole = scored(Polled(), tallies)
    monkeypatch.setattr(scores, "_CELLS", 20 * 7)  # 7 rows at a time
    assert scored(Polled(), tallies) == whole


def test_the_interval_of_a_share_is_about_that_of_the_binomial():
    pairs = answered(2000, accuracy=0.7)
    found = scored(Polled(), Tallies.of(Polled(), pairs))
    share = np.mean([example.target == answer for example, answer in pairs if "odd" in example.groups])
    error = 1.96 * (share * (1 - share) / 1000) ** 0.5
    score = found["odd"]["accuracy"]
    assert score.value == pytest.approx(share)
    assert (score.low, score.high) == pytest.approx((share - error, share + error), abs=error / 10)


def test_questions_of_one_unit_are_no_independent_evidence():
    """Ten copies of each answer: n is ten times as large, the interval as wide as without them."""
    pairs = answered(200)
    copies = [
        (Example(id=f"{e.id}/{i}", question="?", images=[], target=e.target, groups=e.groups, unit=e.unit), answer)
        for e, answer in pairs
        for i in range(10)
    ]
    once, often = (scored(Polled(), Tallies.of(Polled(), p))["odd"]["accuracy"] for p in (pairs, copies))
    assert often == once


def test_a_group_is_scored_by_its_own_units_and_a_summary_by_all():
    pairs = [(example, "yes") for example, _ in answered(30)]
    found = scored(Polled(), Tallies.of(Polled(), pairs))
    for group in ("even", "odd"):
        share = np.mean([example.target == "yes" for example, _ in pairs if group in example.groups])
        assert found[group]["accuracy"].value == pytest.approx(share)
    assert found["sum"]["accuracy"].value == pytest.approx(
        found["even"]["accuracy"].value + found["odd"]["accuracy"].value
    )
    assert found["sum"]["accuracy"].low < found["sum"]["accuracy"].value < found["sum"]["accuracy"].high


def test_differences_are_paired():
    """Two runs that agree but for five answers: the difference is known far better than either score."""
    before = answered(400, accuracy=0.6)
    wrong = [i for i, (e, answer) in enumerate(before) if answer != e.target and "odd" in e.groups][:5]
    after = [(e, e.target if i in wrong else answer) for i, (e, answer) in enumerate(before)]
    old, new = (Tallies.of(Polled(), pairs) for pairs in (before, after))
    gain = differences(Polled(), old, new)["odd"]["accuracy"]
    assert gain.value == pytest.approx(5 / 200)
    assert 0 < gain.low < gain.value < gain.high < 0.06
    alone = scored(Polled(), old)["odd"]["accuracy"]
    assert gain.high - gain.low < (alone.high - alone.low) / 2
    same = differences(Polled(), old, old)
    assert {score for row in same.values() for score in row.values()} == {Score(0, 0, 0)}


def test_tallies_survive_storage_and_can_be_cut_to_some_units():
    tallies = Tallies.of(Polled(), answered(9))
    again = Tallies.from_dict(tallies.to_dict())
    assert scored(Polled(), again) == scored(Polled(), tallies)
    some = tallies.only(["u4", "u1"])
    assert some.units == ["u4", "u1"]
    assert some.groups["odd"]["n"].tolist() == [0, 1]
    assert some.groups["even"]["n"].tolist() == [1, 0]


def test_as_many_resamples_as_the_report_says():
    assert sum(len(rows) for rows in scores._draws(5, 0)) == RESAMPLES == 2000


def test_draws_without_the_group_say_nothing_of_it():
    """Three units of three hundred, all right: no draw makes a wrong answer of an absent one."""
    pairs = [
        (
            Example(
                id=f"{i}", question="?", images=[], target="yes", groups=("rare" if i < 3 else "even",), unit=f"u{i}"
            ),
            "yes",
        )
        for i in range(300)
    ]
    found = scored(Polled(), Tallies.of(Polled(), pairs))
    assert found["rare"]["accuracy"] == Score(1, 1, 1)
    assert found["sum"]["accuracy"] == Score(2, 2, 2)


def test_only_what_both_answered_is_compared():
    """Four pictures of one run could not be read, each with one of two questions: what is left is the same."""
    whole = answered(40, questions=2)
    broken = [pair for pair in whole if pair[0].id not in ("0/0", "2/0", "5/1", "7/1")]
    before, after = (Tallies.of(Polled(), pairs) for pairs in (whole, broken))
    first, second = before.comparable(after)
    assert len(first.units) == len(second.units) == 36
    assert first.answers == second.answers == 72
    for row in differences(Polled(), first, second).values():
        assert set(row.values()) == {Score(0, 0, 0)}


def test_a_summary_is_compared_over_the_groups_of_both():
    whole = answered(40)
    odd = [pair for pair in whole if "odd" in pair[0].groups]
    first, second = Tallies.of(Polled(), whole).comparable(Tallies.of(Polled(), odd))
    assert list(first.groups) == list(second.groups) == ["odd"]
    assert differences(Polled(), first, second)["sum"]["accuracy"] == Score(0, 0, 0)
    with pytest.raises(ValueError, match="the two have no answered question in common"):
        Tallies.of(Polled(), whole[:3]).comparable(Tallies.of(Polled(), whole[3:]))
