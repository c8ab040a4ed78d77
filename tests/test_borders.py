"""False borders: found, learned from labels, taken away; the file that keeps what was learned."""

import numpy as np
import pytest
from conftest import cases
from scipy.ndimage import gaussian_filter

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


@pytest.fixture(scope="module")
def merger():
    return borders.Merger.learned([borders.examples(borders.cut(*each), truth) for *each, truth in smeared(6, seed=0)])


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
    probability, sections, truth = zip(*smeared(3, seed=9), strict=True)
    found = [borders.merged(borders.cut(*each), [merger]) for each in zip(probability, sections, strict=True)]
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
    np.testing.assert_array_equal(borders.merged(borders.cut(even, even), [merger]), 1)
    np.testing.assert_array_equal(borders.merged(borders.cut(0 * even, even), [merger]), 0)
    features, joined = merger.features, merger.joined
    assert borders.Merger.learned([(features[~joined], joined[~joined])]) is None
    assert borders.Merger.learned([(features[:0], joined[:0])]) is None


def test_the_file_gives_the_same_map_again(merger, tmp_path):
    cut = borders.cut(*smeared(1, seed=5)[0][:2])
    borders.save(tmp_path / "x.borders.npz", merger)
    again = borders.load(tmp_path / "x.borders.npz")
    expected, found = (borders.merged(cut, [each]) for each in (merger, again))
    np.testing.assert_array_equal(found, expected)


@cases(
    "change, words",
    ({"features": np.zeros((9, 3), np.float32)}, "features must be"),
    ({"features": np.full((9, borders.FEATURES), np.nan, np.float32)}, "must be finite"),
    ({"joined": np.zeros(9, bool)}, "joined must be bool, of both kinds"),
    ({"joined": np.arange(9)}, "joined must be bool"),
    ({"joined": np.array([None] * 9)}, "allow_pickle"),
    ({"joined": None}, "joined"),
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
