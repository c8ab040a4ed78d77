"""False borders: found, learned from labels, taken away; the file that keeps what was learned."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import cases
from scipy.ndimage import gaussian_filter
from threadpoolctl import threadpool_info, threadpool_limits

import data
from data import DataError
from predict import borders
from score import scores


def smeared(count, seed):
    """(probability, section, truth) of painted sections, in whose predictions dark smears split cells."""
    images, masks = data.synthetic(count, (192, 192), seed=seed)
    random, truth = np.random.default_rng(seed), (masks.sections > 0).astype(np.int8)
    probability = gaussian_filter(truth.astype(np.float32), (0, 1, 1))
    for section in probability:
        for row in random.integers(10, 180, 4):
            section[row : row + 3] *= 0.1
    return list(zip(probability, images.sections, truth, strict=True))


def learned(*stacks):
    return borders.Merger.learned([[(borders.cut(*seen), truth) for *seen, truth in stack] for stack in stacks])


def maps(stack, merger):
    return list(borders.maps((borders.cut(*seen) for *seen, _ in stack), [merger]))


@pytest.fixture(scope="module")
def merger():
    return learned(smeared(6, seed=0))


def test_borders_are_named_once_with_the_pixels_on_both_sides():
    labels = np.array([[1, 1, 2], [1, 3, 2], [3, 3, 2]], np.int32)
    pairs, pixels = borders.borders_of(labels)
    assert pairs.tolist() == [[1, 2], [1, 3], [2, 3]]
    assert [sorted(map(sorted, each.tolist())) for each in pixels] == [
        [[1, 2]],
        [[1, 4], [3, 4], [3, 6]],
        [[4, 5], [7, 8]],
    ]
    assert len(borders.borders_of(np.ones((4, 4), np.int32))[1]) == 0


def test_a_passage_through_a_gap_in_a_membrane_is_a_border_and_a_narrow_cell_has_a_superpixel():
    probability = np.ones((64, 64), np.float32)
    probability[31:33] = 0
    probability[31:33, 30:36] = 0.99  # the gap: as bright as the cells
    probability[2:9, 2:9] = 0
    probability[4:7, 4:7] = 1  # a cell of 3 px
    labels = borders.superpixels(probability)
    assert labels.min() == 1
    assert len({labels[20, 40], labels[50, 40], labels[5, 5]}) == 3


def test_what_was_learned_mends_splits_of_sections_that_it_has_not_seen(merger):
    stack = smeared(3, seed=9)
    (probability, _, truth), found = zip(*stack, strict=True), maps(stack, merger)
    assert all(each.dtype == np.float32 and 0 <= each.min() < 0.2 and each.max() == 1 for each in found)
    plain, mended = (scores.v_rand(each, truth).value for each in (probability, found))
    assert mended > plain + 0.02
    assert mended > 0.97


def test_only_borders_with_labels_on_both_sides_are_learned_from():
    *seen, truth = smeared(1, seed=3)[0]
    cut = borders.cut(*seen)
    features, joined = borders.examples(cut, truth)
    assert features.shape == (len(joined), borders.FEATURES)
    assert 0 < joined.sum() < len(joined)
    assert np.isfinite(features).all()
    half = truth.copy()
    half[:, :96] = -1
    assert 0 < len(borders.examples(cut, half)[1]) < len(joined)
    assert len(borders.examples(cut, np.full_like(truth, -1))[1]) == 0


def test_a_section_without_borders_is_one_segment_and_borders_all_alike_teach_nothing(merger):
    even = np.full((32, 32), 0.9, np.float32)
    one, none = maps([(even, even, None), (0 * even, even, None)], merger)
    assert (one == 1).all()
    assert (none == 0).all()
    *seen, truth = smeared(1, seed=3)[0]
    assert learned([(*seen, np.ones_like(truth))]) is None
    assert learned([(even, even, even > 0)]) is None


def doubtful(seed, sections=7):
    """(probability, section, truth): of the lines between cells some are faint, and true or false; none looks which.

    What is faint in one section may be clear, or gone, in the next.
    """
    random = np.random.default_rng(seed)
    true, truth = random.integers(0, 2, (4, 7)), np.ones((192, 192), np.int8)
    truth[46::48] = truth[47::48] = 0
    for row, column in np.argwhere(true):
        truth[48 * row : 48 * row + 48, 24 * column + 22 : 24 * column + 24] = 0
    for _ in range(sections):
        probability = (truth > 0).astype(np.float32)
        for row, column in np.argwhere(random.integers(0, 2, (4, 7))):
            probability[48 * row : 48 * row + 46, 24 * column + 22 : 24 * column + 24] = 0.3
        probability = np.clip(probability + random.normal(0, 0.03, truth.shape), 0, 1).astype(np.float32)
        yield probability, 255 * probability, truth


def test_the_neighbours_tell_which_of_two_borders_that_look_alike_is_false():
    merger, stack = learned(*(list(doubtful(seed)) for seed in range(4))), list(doubtful(9))
    alone, beside = [maps([one], merger)[0] for one in stack], maps(stack, merger)
    truth = [one[-1] for one in stack]
    without, together = (scores.v_rand(found, truth).value for found in (alone, beside))
    assert together > without + 0.04
    np.testing.assert_array_equal(beside[-1], maps(stack[-2:], merger)[-1])  # nothing further away counts
    never = borders.Merger(merger.features, merger.joined)
    np.testing.assert_array_equal(alone[0], maps(stack[:1], never)[0])


def test_both_sides_of_a_border_are_compared_segment_by_segment():
    labels = np.repeat(np.int32([[1, 1, 2, 2]]), 4, axis=0)
    cut = borders.Cut(labels, *borders.borders_of(labels), np.empty((1, 0), np.float32))
    apart, half = labels, np.repeat(np.int32([[1, 1, 1, 2]]), 4, axis=0)
    same, least = np.ones_like(labels), len(borders.JOINED_AT)
    for segments, expected in ((apart, 0), (half, 0.5), (same, 1)):
        assert borders.shared(cut, [[segments] * least]).tolist() == [[expected] * 2 * least]
    assert borders.shared(cut, [[apart] * least, [half] * least]).tolist() == [[0] * least + [0.5] * least]
    assert np.isnan(borders.shared(cut, [])).all()
    joined, not_joined = (borders.segments_of(cut, np.float32([false]))[0] for false in (0.6, 0.4))
    assert (len(np.unique(joined)), len(np.unique(not_joined))) == (1, 2)


def test_the_file_gives_the_same_map_again(merger, tmp_path):
    """Also that of an earlier version, which knew nothing of neighbours."""
    stack = smeared(2, seed=5)
    for one in (merger, borders.Merger(merger.features, merger.joined)):
        borders.save(tmp_path / "x.borders.npz", one)
        again = borders.load(tmp_path / "x.borders.npz")
        np.testing.assert_array_equal(maps(stack, again), maps(stack, one))
        assert (again.beside is None) == (one.evidence is None)


@cases(
    "change, words",
    ({"features": np.zeros((9, 3), np.float32)}, "features must be"),
    ({"features": np.full((9, borders.FEATURES), np.nan, np.float32)}, "must be finite"),
    ({"joined": np.zeros(9, bool)}, "joined must be bool, of both kinds"),
    ({"joined": np.arange(9)}, "joined must be bool"),
    ({"joined": np.array([None] * 9)}, "allow_pickle"),
    ({"joined": None}, "joined"),
    ({"evidence": np.zeros((9, 1), np.float32)}, "evidence must be float32"),
    ({"evidence": np.full((9, borders.EVIDENCE), np.inf, np.float32)}, "evidence must not be infinite"),
)
def test_a_broken_or_hostile_file_is_refused_in_a_sentence(change, words, tmp_path):
    arrays = {"features": np.zeros((9, borders.FEATURES), np.float32), "joined": np.arange(9) > 4} | change
    np.savez(tmp_path / "x.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(DataError, match=f"--weight_path: .* is broken: .*{words}"):
        borders.load(tmp_path / "x.npz")


def test_a_file_that_would_unpack_to_more_than_the_largest_is_refused_unread(merger, tmp_path, monkeypatch):
    borders.save(tmp_path / "x.borders.npz", merger)
    monkeypatch.setattr(borders, "LARGEST", 1000)
    with pytest.raises(DataError, match="is broken: it holds more than 1000 bytes"):
        borders.load(tmp_path / "x.borders.npz")


def test_what_is_unseen_is_learned_from_other_sections_alone_in_every_reading(monkeypatch):
    """The features of a border here are the number of its section."""
    cuts = [[borders.Cut(None, None, [], np.full((2, 1), i, np.float32)) for i in range(6)] for _ in "ab"]
    parts = [[(cut.features, np.array([True, False])) for cut in reading] for reading in cuts]
    learned_from = []
    monkeypatch.setattr(borders, "_forests", lambda features, joined, count: {*features.ravel()})

    def mean(forests, features):
        learned_from.append((features[0, 0], forests))
        return features[:, 0]

    monkeypatch.setattr(borders, "_mean", mean)
    found = borders.unseen(cuts, parts)
    assert [[one.tolist() for one in reading] for reading in found] == [[[i, i] for i in range(6)]] * 2
    assert len(learned_from) == 12
    assert all(section not in others and len(others) >= 4 for section, others in learned_from)


def test_a_second_reading_of_the_same_sections_is_learned_from_with_evidence_of_its_own(merger):
    first, second = smeared(6, seed=0), smeared(6, seed=0)
    second = [(np.float32(0.5 + 0.6 * (probability - 0.5)), *seen) for probability, *seen in second]
    both = borders.Merger.learned(
        *([[(borders.cut(*seen), truth) for *seen, truth in stack]] for stack in (first, second))
    )
    count = len(merger.joined)
    assert np.array_equal(both.features[:count], merger.features)
    assert len(both.joined) > 1.5 * count
    assert both.evidence.shape == (len(both.joined), borders.EVIDENCE)
    assert not np.array_equal(both.features[count:], both.features[:count])


def test_forests_run_on_one_thread_for_on_a_busy_machine_several_wait_for_each_other(merger, monkeypatch):
    from sklearn.ensemble import HistGradientBoostingClassifier as Forest

    def threads():
        return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "openmp"]

    seen = []
    for name in ("fit", "predict_proba"):
        kept = getattr(Forest, name)

        def watched(*words, kept=kept):
            seen.extend(threads())
            return kept(*words)

        monkeypatch.setattr(Forest, name, watched)
    with threadpool_limits(2, "openmp"):
        maps(smeared(2, seed=1), borders.Merger(merger.features, merger.joined))
        assert set(threads()) == {2}
    assert set(seen) == {1}


def test_of_several_mergers_the_mean_counts():
    def merger(false):
        def judge(cut, look, neighbours):
            seen.append((look, list(neighbours)))
            return np.full(len(cut.pairs), false)

        return SimpleNamespace(look=lambda cut: false, judge=judge)

    labels, seen = np.repeat(np.int32([[1, 1, 2, 2]]), 4, axis=0), []
    cut = borders.Cut(labels, *borders.borders_of(labels), None)
    for one in borders.maps([cut, cut], [merger(0.2), merger(0.6)]):
        np.testing.assert_allclose(one, [[1, 0.4, 0.4, 1]] * 4, rtol=1e-6)
    assert seen == [(0.2, [0.2]), (0.6, [0.6])] * 2, "each by what it looked at itself"
