"""The end of a run: what is said of a prediction that is worth nothing."""

from types import SimpleNamespace

import numpy as np
from conftest import refused

from predict import borders
from train import finish


def test_a_degenerate_prediction_is_told_from_a_good_one():
    truth = np.ones((2, 10, 10), np.uint8)
    truth[:, ::5] = 0
    noise = np.random.default_rng(0).normal(0, 0.05, truth.shape)
    assert "is constant (0.700)" in finish.degenerate(np.full(truth.shape, 0.7, np.float32), truth)
    always = finish.degenerate(np.float32(0.7 + noise), truth)
    assert always == "Dice 0.889 is no better than 'always interior', which scores 0.889"
    assert "no better" in finish.degenerate(np.float32(0.2 + noise), truth)
    assert finish.degenerate(np.float32(0.8 * truth + 0.1), truth) is None


def test_what_is_not_labelled_does_not_count_where_a_prediction_is_called_worthless():
    truth = np.ones((2, 10, 10), np.int8)
    truth[:, ::5], truth[..., 5:] = 0, -1
    found = np.where(truth < 0, np.random.default_rng(0).random(truth.shape), 0.7).astype(np.float32)
    assert "is constant (0.700)" in finish.degenerate(found, truth)
    assert finish.degenerate(np.where(truth < 0, 0, 0.8 * truth + 0.1), truth) is None


def test_borders_are_learned_from_training_sections_and_their_threshold_by_those_of_the_others(monkeypatch):
    seen, used = [], []

    def learned(*readings):
        seen.append([[number for run in reading for number, _ in run] for reading in readings])
        return len(seen)

    monkeypatch.setattr(borders.Merger, "learned", learned)
    monkeypatch.setattr(
        finish, "maps_of", lambda near, _, trial: used.append((near, trial)) or zip(near, near, strict=True)
    )
    monkeypatch.setattr(finish.scores, "best_threshold", lambda maps, truth: (maps, len(truth)))
    stacks = SimpleNamespace(masks=SimpleNamespace(sections=np.ones((8, 4, 4), np.int8)))
    stacks.split = SimpleNamespace(train=(0, 1, 2, 3, 4))
    found = finish.learn_borders(stacks, [0, 4], lambda i: i, lambda i: 10 + i)
    assert seen == [[[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]], [[1, 2, 3], [11, 12, 13]]]
    assert used == [([0, 1, 3, 4], 2)], "no section that is held out judges them either"
    assert found == (1, ([0, 4], 2))


def test_a_prediction_that_is_not_finite_is_refused_and_few_sections_are_spread_evenly():
    good = np.ones((4, 4), np.float32)
    assert finish.finite(good, 3) is good
    refused("section 3 is not finite", finish.finite, good * np.nan, 3)
    assert (finish.some(range(10)), finish.some((4, 5))) == ([0, 1, 3, 5, 6, 8], [4, 5])


def test_the_noise_of_a_section_is_its_own_the_same_every_time_and_of_the_size_of_its_contrast():
    section = np.random.default_rng(0).normal(100, 20, (64, 64)).astype(np.float32)
    once, again, other = (finish.noisy(section, i, 0.4) - section for i in (3, 3, 4))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert abs(once.std() / (0.4 * section.std()) - 1) < 0.05
    assert finish.noisy(section, 3, 1.2).dtype == np.float32
    assert np.array_equal(finish.noisy(np.full((8, 8), 7, np.float32), 0, 1.2), np.full((8, 8), 7, np.float32))
    half = finish.noisy((section * 100).astype(np.float16), 3, 0.4)  # whose sums are beyond what 16 bits hold
    assert abs((half - section * 100).std() / (40 * section.std()) - 1) < 0.05


def test_cells_are_cut_by_training_sections_that_hold_some_or_else_by_the_middle():
    """Without a background `predict --segment` would fill sections with cells."""
    cells = np.zeros((4, 32, 32), np.int32)
    cells[:2, 4:12, 4:12], cells[:2, 20:28, 20:28] = 1, 2
    of = lambda labels: SimpleNamespace(cells=SimpleNamespace(sections=labels), split=SimpleNamespace(train=(0, 1, 2)))  # noqa: E731
    found = finish.choose(of(cells), [3], lambda i: np.float32(cells[i] > 0))
    assert found == finish.choose(of(cells), [0, 1], lambda i: np.float32(cells[i] > 0))
    assert found["smallest_cell_px"] == 6
    assert finish.choose(of(cells * 0), [3], lambda i: None) == {"threshold": 0.5, "background": 0.5}
