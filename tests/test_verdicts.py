"""Intervals against scipy, verdicts at their edges, and how often each verdict is wrong by chance: by simulation."""

import numpy as np
import pytest
from conftest import cases
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from studies import rows, verdicts
from studies.verdicts import Sample

CASES = 2000
MOST = CASES * verdicts.LEVEL + 2 * (CASES * verdicts.LEVEL * (1 - verdicts.LEVEL)) ** 0.5  # of 5 %, two deviations up
FINITE = st.floats(-1, 1).map(lambda value: round(value, 6))


@given(st.lists(st.tuples(FINITE, FINITE), min_size=3, max_size=20), st.floats(0.01, 1))
def test_the_statistics_of_paired_differences_are_scipy_s(pairs, margin):
    ours = {(i, 0): a for i, (a, _) in enumerate(pairs)}
    base = {(i, 0): b for i, (_, b) in enumerate(pairs)}
    found = verdicts.paired(ours, base)
    differences = [a - b for a, b in pairs]
    assert found.mean == pytest.approx(sum(differences) / len(pairs), abs=1e-12)
    if np.std(differences) > 1e-6:
        expected = stats.ttest_rel(list(ours.values()), list(base.values()))
        assert found.interval() == pytest.approx(tuple(expected.confidence_interval(0.95)), abs=1e-9)
        assert found.p_zero() == pytest.approx(expected.pvalue, abs=1e-9)
        sides = ((-margin, "greater"), (margin, "less"))
        beyond = max(stats.ttest_1samp(differences, at, alternative=side).pvalue for at, side in sides)
        assert found.p_beyond(margin) == pytest.approx(min(1, 2 * beyond), abs=1e-9)


def test_what_both_have_is_paired_a_folds_seeds_are_one_value_and_under_three_have_no_verdict():
    ours, base = {(0, 0): 3.0, (1, 0): 5.0, (0, 1): 9.0}, {(1, 0): 1.0, (0, 0): 1.0, (7, 7): 0.0}
    assert verdicts.paired(ours, base) == Sample((2.0, 4.0), "seeds")
    assert verdicts.paired(ours, base | {(0, 1): 1.0}) == Sample((3.0, 8.0), "folds")
    for few in (Sample((5.0,) * count) for count in range(3)):
        many = Sample((0.1, 0.11, 0.12))
        assert verdicts.holds([few, many]) == ["too few runs", "confirmed"]
        assert verdicts.no_difference([(few, 10), (many, 10)]) == ["too few runs", "confirmed"]


def sample(low, high):
    """Three values whose 95 % interval is from low to high."""
    half = (high - low) / 2
    away = half * 3**0.5 / stats.t.ppf(0.975, 2)
    return Sample(tuple((low + high) / 2 + away * k for k in (-1, 0, 1)))


@cases(
    "low, high, equal, holds",
    (-0.004, 0.004, "confirmed", "within noise"),
    (-0.0026, 0.0051, "undecided", "within noise"),  # narrower than the margin on both sides, and yet not within it
    (-0.001, 0.008, "undecided", "within noise"),
    (-0.006, 0.006, "undecided", "within noise"),
    (0.001, 0.004, "confirmed", "confirmed"),  # there is a difference, of which none that matters
    (0.001, 0.006, "refuted", "confirmed"),
    (-0.9, -0.1, "refuted", "not confirmed"),
    (0.0, 0.0, "confirmed", "within noise"),
)
def test_no_difference_is_a_whole_interval_within_the_margin_and_a_statement_one_above_zero(low, high, equal, holds):
    assert verdicts.no_difference([(sample(low, high), 0.005)]) == [equal]
    assert verdicts.holds([sample(low, high)]) == [holds]


def test_what_holds_alone_may_be_noise_among_others_of_its_table():
    just, nothing = sample(0.01, 0.6), sample(-1, 1)
    assert verdicts.holds([just]) == ["confirmed"]
    assert verdicts.holds([just, nothing, nothing]) == ["within noise"] * 3
    assert verdicts.no_difference([(just, 0.1), (nothing, 0.1)]) == ["undecided"] * 2


@pytest.mark.parametrize(("folds", "seeds"), [(5, 3), (1, 3), (3, 1), (1, 5)])
def test_no_difference_is_wrongly_refuted_in_one_table_of_twenty(folds, seeds):
    """No true difference; a fold shifts all its seeds. Four comparisons a table. Taken as 15 pairs, 5 x 3 fail."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(CASES, 4, folds, 1)) * (folds > 1) + rng.normal(size=(CASES, 4, folds, seeds))
    wrong = naive = 0
    for table in values:
        found = [verdicts.independent({(s, f): v[f, s] for f in range(folds) for s in range(seeds)}) for v in table]
        wrong += "refuted" in verdicts.no_difference([(one, 1e-6) for one in found])
        naive += Sample(tuple(table[0].ravel())).p_zero() < verdicts.LEVEL
    assert wrong <= MOST
    assert (naive > 2 * MOST) == (folds > 1 and seeds > 1)


def test_the_best_of_equal_levels_is_recommended_in_one_case_of_twenty_and_holms_p_values_wrong():
    """Its lead over the second is judged, and both were chosen by the same runs."""
    for levels in (2, 3, 5):
        wrong = 0
        for scores in np.random.default_rng(4).normal(size=(CASES, levels, 3)):
            best, second = scores[np.argsort(-scores.mean(1))[:2]]
            wrong += verdicts.holds([Sample(tuple(best - second))]) == ["confirmed"]
        assert wrong <= MOST
    p = np.random.default_rng(0).uniform(size=(CASES, 5))
    assert sum(min(verdicts.holm(table)) < verdicts.LEVEL for table in p.tolist()) <= MOST


@pytest.mark.parametrize("count", [3, 5])
def test_no_difference_is_wrongly_confirmed_in_one_table_of_twenty(count):
    """The true difference is the margin. Four comparisons a table."""
    values = np.random.default_rng(2).normal(0.01, 0.002, (CASES, 4, count)).tolist()
    wrong = sum("confirmed" in verdicts.no_difference([(Sample(tuple(v)), 0.01) for v in table]) for table in values)
    assert 0 < wrong <= MOST


def test_the_tolerance_covers_a_further_run_95_times_in_100_and_noise_makes_nothing_easier():
    """Three runs, a published one, the deviation pooled over four rows; then the same with a stated ceiling."""
    runs = np.random.default_rng(0).normal(0.1, 0.02, (CASES, 4, 4))
    away = abs(runs[:, 0, :3].mean(1) - runs[:, 0, 3])
    pooled = [verdicts.pooled_deviation(four[:, :3].tolist()) for four in runs]
    allowed = [verdicts.tolerance(s, freedom, 3, stated=9) for s, freedom in pooled]
    assert 0.94 < np.mean(away <= allowed) < 0.96
    for noise in (1, 10, 100):
        capped = [verdicts.tolerance(noise * s, freedom, 3, stated=0.03) for s, freedom in pooled]
        assert max(capped) <= 0.03


def test_the_tolerance_is_the_stated_one_until_there_is_a_spread_and_never_below_the_rounding():
    assert verdicts.pooled_deviation([[1.0, 3.0], [101.0, 103.0], []]) == (pytest.approx(2**0.5), 2)
    assert verdicts.pooled_deviation([[1.0], []])[1] == 0
    assert verdicts.tolerance(0.001, 2, 2, stated=0.03) == 0.03
    assert verdicts.tolerance(0.0, 8, 3, stated=0.03) == 0.0005


FLAT_NOISE = {name: np.ones(40) for name in ("loss", "val_loss")}
AT_THE_EDGE = {  # where a flat history fulfils a statement: one that only just does not
    "SGD does not reduce the loss": {"loss": np.r_[1, np.full(39, 0.95)], "val_loss": np.ones(40)}
}


@pytest.mark.parametrize("noise", [0.02, 0.2])
@pytest.mark.parametrize("factor", verdicts.CONCLUSIONS)
def test_noise_confirms_no_conclusion_of_the_study_more_often_than_stated(factor, noise):
    """Histories of 40 epochs that are the same at all levels but for noise: nothing falls, rises or is ahead."""
    rng = np.random.default_rng(3)
    for conclusion in verdicts.CONCLUSIONS[factor]:
        truth = AT_THE_EDGE.get(conclusion.words, FLAT_NOISE)
        wrong = 0
        for _ in range(CASES):
            drawn = rng.normal(1, noise, (len(conclusion.levels), 2, 3, 40))
            histories = {
                level: {(s, 0): {k: (truth[k] * d[i, s]).tolist() for i, k in enumerate(truth)} for s in range(3)}
                for level, d in zip(conclusion.levels, drawn, strict=True)
            }
            wrong += verdicts.holds([conclusion.sample(histories)]) == ["confirmed"]
        assert wrong <= MOST, conclusion.words


FALLS = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
FLAT = [8.0, 5.0, 4.0, 4.0, 4.0, 4.0, 3.95, 3.95]
RISES = [8.0, 4.0, 2.0, 1.0, 1.5, 2.0, 3.0, 4.0]
SPIKE = [8.0, 4.0, 2.0, 20.0, 2.0, 2.0, 2.0, 2.0]
ROUGH = [8.0, 6.0, 5.0, 4.0, 2.0, 5.0, 1.0, 4.0]


def test_what_a_history_does_in_numbers():
    assert (verdicts.quarter(FALLS, 0), verdicts.late(FALLS)) == (7.5, 1.5)
    assert [verdicts.fall(FALLS), verdicts.fall(FLAT)] == pytest.approx([1 - 1.5 / 5.5, 1 - 3.95 / 4])
    assert [verdicts.rise([9.0] * 4 + [1.0, 2.0, 3.0, 4.0]), verdicts.rise(FALLS)] == pytest.approx([1.2, -1.2])
    assert [verdicts.overshoot(SPIKE), verdicts.overshoot(FALLS)] == pytest.approx([9, 0])
    assert verdicts.reduction(FALLS) == pytest.approx(1 - 1.5 / 8)
    assert [verdicts.roughness(ROUGH), verdicts.roughness(STILL)] == pytest.approx([(3 + 4 + 3) / 3 / 3, 0])


def scaled(series, by):
    return [value * by for value in series]


LOWER, HALF, STILL = [*FALLS[:6], 1.0, 1.0], scaled(FALLS, 0.5), [5.0] * 8
AS_THE_STUDY_SAW = {  # by the level: training and validation loss
    "depth": {"3": (FALLS, FLAT), "4": (FALLS, scaled(FALLS, 1.1))},
    "augmentation": {"raw": (HALF, RISES), "augmented": (FALLS, FALLS)},
    "lr": {"1e-5": (FLAT, FLAT), "1e-4": (FALLS, FALLS), "1e-3": (FALLS, SPIKE)},
    "optimizer": {"SGD": (STILL, STILL), "Adam": (HALF, RISES), "Adamax": (FALLS, FLAT)},
}
THE_CONTRARY = {
    "depth": {"3": (FALLS, FALLS), "4": (FALLS, FLAT)},
    "augmentation": {"raw": (scaled(FALLS, 2), LOWER), "augmented": (FALLS, RISES)},
    "lr": {"1e-5": (HALF, HALF), "1e-4": (FALLS, SPIKE), "1e-3": (FALLS, FALLS)},
    "optimizer": {"SGD": (HALF, FALLS), "Adam": (FALLS, LOWER), "Adamax": (FALLS, ROUGH)},
}


def over_seeds(levels):
    """Three seeds that differ in scale, which no statement about shape depends on, and little."""
    seeds = {(s, 0): 1 + 0.001 * s for s in range(3)}
    return {
        level: {key: {"loss": scaled(loss, by), "val_loss": scaled(val_loss, by)} for key, by in seeds.items()}
        for level, (loss, val_loss) in levels.items()
    }


@pytest.mark.parametrize("factor", verdicts.CONCLUSIONS)
def test_histories_as_the_study_saw_them_confirm_each_conclusion_and_the_contrary_none(factor):
    conclusions = verdicts.CONCLUSIONS[factor]
    for histories, verdict in ((AS_THE_STUDY_SAW, "confirmed"), (THE_CONTRARY, "not confirmed"), ({}, "too few runs")):
        found = [conclusion.sample(over_seeds(histories.get(factor, {}))) for conclusion in conclusions]
        assert verdicts.holds(found) == [verdict] * len(conclusions)
    for conclusion in conclusions:
        assert conclusion.rule
        assert set(conclusion.levels) <= set(rows.FACTORS[factor].levels)


@cases(
    "factor, which, levels",
    ("depth", 0, {"3": (FLAT, FLAT)}),
    ("depth", 1, {"4": (FLAT, FALLS)}),
    ("augmentation", 2, {"augmented": (FLAT, FALLS)}),
    ("lr", 0, {"1e-5": (FALLS, FLAT), "1e-4": (FALLS, FALLS)}),
)
def test_a_conclusion_of_which_only_the_validation_half_is_true_is_not_confirmed(factor, which, levels):
    assert verdicts.holds([verdicts.CONCLUSIONS[factor][which].sample(over_seeds(levels))]) != ["confirmed"]
