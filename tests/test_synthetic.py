"""The painted stack: repeatable, of any size, with labels that fit what is painted."""

import numpy as np
import pytest
from conftest import refused

from data import load_pair, resolve, synthetic
from files.synthetic import paint


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 7), (64, 64), (97, 130)])
def test_any_size_and_count(size):
    for sections in (1, 4):
        gray, interior = paint(sections, size, 0)
        assert gray.shape == interior.shape == (sections, *size)
        assert gray.dtype == interior.dtype == np.uint8
        assert interior.max() <= 1
    for wrong in ({"sections": 0}, {"size": (0, 5)}, {"seed": -1}):
        refused("must be >= 1", synthetic, **{"sections": 1, "size": (8, 8)} | wrong)


def test_interior_is_about_78_percent_the_same_numbers_give_the_same_bytes_and_others_give_others():
    for seed in range(6):
        assert paint(2, (256, 256), seed)[1].mean() == pytest.approx(0.78, abs=0.06)
    first, again, other = (np.stack(paint(3, (72, 64), seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_sections_look_like_membranes_that_darkness_alone_does_not_find_change_slowly_and_have_noise_of_their_own():
    gray, interior = paint(2, (256, 256), 1)
    inside, membrane = gray[interior == 1], gray[interior == 0]
    assert inside.mean() - membrane.mean() > 40
    best = max(np.mean((gray > level) == interior) for level in range(0, 256, 4))
    assert 0.8 < best < 0.93  # always interior gives 0.78; organelles and noise keep a threshold from solving it
    labels = paint(12, (192, 192), 2)[1]
    near = np.mean(labels[1:] == labels[:-1])
    far = np.mean(labels[8:] == labels[:-8])
    assert near > far + 0.07
    gray = paint(2, (128, 128), 3)[0].astype(float)
    fine = gray[:, :, 1:] - gray[:, :, :-1]
    assert abs(np.corrcoef(fine[0].ravel(), fine[1].ravel())[0, 1]) < 0.3


def test_stack_is_named_and_read_only_and_the_test_stack_is_another(monkeypatch):
    monkeypatch.setattr("data.synthetic.__defaults__", (2, (64, 64), 0))
    images, masks, messages = load_pair("synthetic", "synthetic")
    assert images.voxel_nm == (50.0, 4.0, 4.0)
    assert images.sections.shape == masks.sections.shape == (2, 64, 64)
    assert masks.sections.any()
    assert any("1 = interior" in line for line in messages)
    with pytest.raises(ValueError, match="read-only"):
        resolve("synthetic", "image").sections[0] = 0
    assert (resolve("synthetic", "test").sections != images.sections).any()
    expected = synthetic(2, (64, 64), 1_000_003)[1].sections
    np.testing.assert_array_equal(resolve("synthetic", "test_mask").sections, expected)
