"""Intervals against scipy, verdicts at their edges, and statements about histories on made-up histories."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from studies import verdicts
from studies.verdicts import Interval

FINITE = st.floats(-1, 1).map(lambda value: round(value, 6))


@given(st.lists(st.tuples(FINITE, FINITE), min_size=3, max_size=20))
def test_the_interval_of_paired_differences_is_scipy_s(pairs):
    ours = {(i, 0): a for i, (a, _) in enumerate(pairs)}
    base = {(i, 0): b for i, (_, b) in enumerate(pairs)}
    found = verdicts.interval(verdicts.paired(ours, base))
    differences = [a - b for a, b in pairs]
    assert found.count == len(pairs)
    assert found.mean == pytest.approx(sum(differences) / len(pairs), abs=1e-12)
    if len(set(differences)) > 1 and stats.tstd(differences) > 1e-9:
        expected = stats.ttest_rel(list(ours.values()), list(base.values())).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_only_what_both_have_is_paired():
    ours, base = {(0, 0): 3.0, (1, 0): 5.0, (0, 1): 9.0}, {(1, 0): 1.0, (0, 0): 1.0, (7, 7): 0.0}
    assert verdicts.paired(ours, base) == [2.0, 4.0]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_values_have_no_interval_and_no_verdict(count):
    found = verdicts.interval([5.0] * count)
    assert math.isnan(found.low)
    assert verdicts.holds(found) == verdicts.no_difference(found, 10) == "too few runs"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.004, 0.004, "confirmed"),
        (-0.001, 0.008, "confirmed"),
        (-0.006, 0.006, "undecided"),
        (-0.005, 0.005, "undecided"),
        (0.0001, 0.0002, "refuted"),
        (-0.9, -0.1, "refuted"),
        (0.0, 0.0, "confirmed"),
    ],
)
def test_no_difference_is_confirmed_by_a_narrow_interval_around_0_only(low, high, verdict):
    assert verdicts.no_difference(Interval(3, (low + high) / 2, low, high), margin=0.005) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, "confirmed"), (-0.2, -0.1, "not confirmed"), (-0.1, 0.2, "within noise"), (0.0, 0.2, "within noise")],
)
def test_a_statement_holds_where_the_whole_interval_is_positive(low, high, verdict):
    assert verdicts.holds(Interval(3, 0.0, low, high)) == verdict


def test_the_pooled_deviation_is_within_the_groups_not_between_them():
    assert verdicts.pooled_deviation([[1.0, 3.0], [101.0, 103.0], []]) == (pytest.approx(math.sqrt(2)), 2)
    assert verdicts.pooled_deviation([[1.0, 2.0, 3.0], [7.0]]) == (pytest.approx(1.0), 2)
    assert verdicts.pooled_deviation([[1.0], []])[1] == 0


def test_the_tolerance_covers_a_further_run_95_times_in_100():
    """By simulation: three runs, a published one, the deviation pooled over four rows."""
    import numpy as np

    rng = np.random.default_rng(0)
    inside, trials = 0, 4000
    for runs in rng.normal(0.1, 0.02, (trials, 4, 4)):
        deviation, freedom = verdicts.pooled_deviation(runs[:, :3].tolist())
        allowed = verdicts.tolerance(deviation, freedom, 3, stated=9, rounding=0)
        inside += abs(runs[0, :3].mean() - runs[0, 3]) <= allowed
    assert 0.94 < inside / trials < 0.96


def test_the_tolerance_is_the_stated_one_until_there_is_a_spread_and_never_below_the_rounding():
    assert verdicts.tolerance(0.001, 2, 2, stated=0.03, rounding=0.0005) == 0.03
    assert verdicts.tolerance(0.0, 8, 3, stated=0.03, rounding=0.0005) == 0.0005
    assert verdicts.tolerance(1.0, 8, 3, stated=0.03, rounding=0.0005) > 2


# Histories of eight epochs: a quarter is two of them.
FALLS = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
FLAT = [8.0, 5.0, 4.0, 4.0, 4.0, 4.0, 3.95, 3.95]
RISES = [8.0, 4.0, 2.0, 1.0, 1.5, 2.0, 3.0, 4.0]
SPIKE = [8.0, 4.0, 2.0, 20.0, 2.0, 2.0, 2.0, 2.0]
ROUGH = [8.0, 6.0, 5.0, 4.0, 2.0, 5.0, 1.0, 4.0]


def test_what_a_history_does_in_numbers():
    assert verdicts.quarter(FALLS, 0) == 7.5
    assert verdicts.late(FALLS) == 1.5
    assert verdicts.fall(FALLS) == pytest.approx(1 - 1.5 / 5.5)
    assert verdicts.fall(FLAT) == pytest.approx(1 - 3.95 / 4)
    assert verdicts.rise(RISES) == pytest.approx(2.5)
    assert verdicts.rise(FALLS) == pytest.approx(0.5), "above its lowest, the last epoch"
    assert verdicts.overshoot(SPIKE) == pytest.approx(9.0)
    assert verdicts.overshoot(FALLS) == 0
    assert verdicts.reduction(FALLS) == pytest.approx(1 - 1.5 / 8)
    assert verdicts.roughness(ROUGH) == pytest.approx((3 + 4 + 3) / 3 / 3)
    assert verdicts.roughness([1.0] * 8) == 0
    with pytest.raises(ValueError, match=r"at least 4 epochs to be judged\. Received: 3"):
        verdicts.late([1.0, 2.0, 3.0])


def scaled(series, by):
    return [value * by for value in series]


def run(loss, val_loss):
    return {"loss": loss, "val_loss": val_loss}


AS_THE_STUDY_SAW = {
    "depth": {"3": run(FALLS, FLAT), "4": run(FALLS, scaled(FALLS, 1.1))},
    "augmentation": {"raw": run(scaled(FALLS, 0.5), RISES), "augmented": run(FALLS, FALLS)},
    "lr": {"1e-5": run(FLAT, FLAT), "1e-4": run(FALLS, FALLS), "1e-3": run(FALLS, SPIKE)},
    "optimizer": {
        "SGD": run([5.0] * 8, [5.0] * 8),
        "Adam": run(scaled(FALLS, 0.5), ROUGH),
        "Adamax": run(FALLS, FALLS),
    },
}
THE_CONTRARY = {
    "depth": {"3": run(FALLS, FALLS), "4": run(FALLS, FLAT)},
    "augmentation": {"raw": run(scaled(FALLS, 2), [*FALLS[:6], 1.0, 1.0]), "augmented": run(FALLS, RISES)},
    "lr": {"1e-5": run(scaled(FALLS, 0.5), scaled(FALLS, 0.5)), "1e-4": run(FALLS, SPIKE), "1e-3": run(FALLS, FALLS)},
    "optimizer": {
        "SGD": run(scaled(FALLS, 0.5), FALLS),
        "Adam": run(FALLS, [*FALLS[:6], 1.0, 1.0]),
        "Adamax": run(FALLS, ROUGH),
    },
}


def over_seeds(levels):
    """Three seeds that differ in scale, which no statement about shape depends on, and little."""
    return {
        level: {
            (seed, 0): {key: scaled(column, 1 + 0.001 * seed) for key, column in history.items()} for seed in range(3)
        }
        for level, history in levels.items()
    }


@pytest.mark.parametrize("factor", verdicts.CONCLUSIONS)
def test_histories_as_the_study_saw_them_confirm_each_conclusion_and_the_contrary_none(factor):
    for conclusion in verdicts.CONCLUSIONS[factor]:
        verdict, found = conclusion.judge(over_seeds(AS_THE_STUDY_SAW[factor]))
        assert (verdict, found.count) == ("confirmed", 3), conclusion.words
        verdict, _ = conclusion.judge(over_seeds(THE_CONTRARY[factor]))
        assert verdict == "not confirmed", conclusion.words


@pytest.mark.parametrize("factor", verdicts.CONCLUSIONS)
def test_a_conclusion_without_runs_of_all_its_levels_is_not_judged(factor):
    for conclusion in verdicts.CONCLUSIONS[factor]:
        histories = over_seeds(AS_THE_STUDY_SAW[factor])
        del histories[conclusion.levels[0]]
        assert conclusion.judge(histories)[0] == "too few runs"
        assert conclusion.judge({})[0] == "too few runs"


def test_seeds_that_contradict_each_other_are_noise():
    conclusion = next(c for c in verdicts.CONCLUSIONS["depth"] if "ends with the lower" in c.words)
    histories = {
        "3": {(seed, 0): run(FALLS, FALLS) for seed in range(3)},
        "4": {(seed, 0): run(FALLS, scaled(FALLS, factor)) for seed, factor in enumerate((0.9, 1.0, 1.1))},
    }
    assert conclusion.judge(histories)[0] == "within noise"


def test_every_conclusion_says_how_it_is_computed():
    from studies import reproduce

    for factor, conclusions in verdicts.CONCLUSIONS.items():
        for conclusion in conclusions:
            assert conclusion.rule
            assert set(conclusion.levels) <= set(reproduce.FACTORS[factor].levels)
