"""Which windows a run sees: functions of seed, epoch and index; the montages of 2017; the grid of validation."""

import numpy as np
import pytest
import tifffile
from conftest import HOLDOUT, TINY

import augment
import data
import dilatedUnet
from train import feed as feeds
from train import run as training


@pytest.fixture
def fed(small):
    """The feed of a command line, from these images or the small ones, which are their own masks."""

    def feed(words="", images=None):
        args = dilatedUnet.parse([*TINY.split(), *words.split()])
        images = tifffile.imread(small / "images.tif") if images is None else images
        stack = data.Stack(images, None, [], "")
        split = training.split_of(args, len(images))
        return training.feed_of(args, feeds.Stacks(stack, stack, None, split, data.Normalisation(128.0, 40.0)))

    return feed


def test_validation_windows_cover_the_inner_sections_and_are_always_the_same(fed):
    feed = fed(f"{HOLDOUT} --batch_size 4")
    validation = feed.validation()
    batches = validation(1)
    assert validation(2) is batches
    shown = np.concatenate([batch["image"] for batch in batches])
    assert [len(batch["key"]) for batch in batches] == [4, 4, 4]  # 2 sections x 2 x 3 windows of 32 px
    for section in feed.split.inner:
        assert any((window == feed.images[section, -32:, -32:]).all() for window in shown)
    places = [(5, 0, 0), (5, 0, 24), (5, 0, 48), (5, 32, 0), (5, 32, 24), (5, 32, 48)]
    assert feeds.grid((64, 80), 32, (5,)) == places
    assert fed("--protocol holdout --inner_sections 0").validation() is None


def test_few_windows_of_many_are_from_all_over_the_sections(fed):
    columns, rows = np.meshgrid(np.arange(8), np.arange(8))
    images = np.broadcast_to(np.kron(8 * rows + columns, np.ones((16, 16))).astype(np.uint8), (10, 128, 128))
    batches = fed("--protocol holdout --window 16 --inner_sections 4", images).validation()(1)
    seen = [int(window[0, 0]) for batch in batches for window in batch["image"]]
    assert len(seen) == feeds.MOST_WINDOWS
    assert {place % 8 for place in seen} == {place // 8 for place in seen} == set(range(8))


def test_the_preview_shows_what_an_unpadded_network_sees(fed):
    words = "--arch unet2015 --depth 1 --filters 2 --window 44 --loss bce --protocol holdout --inner_sections 0"
    feed, norm = fed(words), data.Normalisation(128.0, 40.0)
    assert feed.context > 0
    images, masks = feed.preview(norm, 2)
    arrays = feed.crops(feed.source("train"), feed.recipe, 0, range(2))
    how = {"window": 44, "mean": norm.mean, "std": norm.std}
    image, mask = map(np.asarray, augment.warp(arrays, feed.recipe, **how))
    np.testing.assert_array_equal(masks, mask.astype(masks.dtype))
    assert np.abs(images - np.clip(image[..., 0] * 42.5 + 127.5, 0, 255)).max() <= 1


def test_the_published_protocol_cuts_windows_from_two_montages_of_all_sections(fed):
    images = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None, None], (30, 24, 32))
    feed = fed("--window 16 --batch_size 64", images)
    (shown, *_), (validated, *_) = (feed.source(role) for role in ("train", "validate"))
    assert (shown.shape, validated.shape) == ((1, 6 * 24, 5 * 32), (1, 5 * 24, 6 * 32))
    for montage in (shown, validated):
        assert np.bincount(montage.ravel()).tolist() == [24 * 32] * 30
    assert shown[0, ::24, ::32].ravel().tolist() != validated[0, ::24, ::32].ravel().tolist()
    windows = next(feed.training(0))[0]["image"]
    assert len({section for window in windows for section in np.unique(window)}) > 20
    assert any(len(np.unique(window)) > 1 for window in windows), "windows run across the seams"
    validation = feed.validation()
    first, again, second = ([batch["image"] for batch in validation(epoch)] for epoch in (1, 1, 2))
    assert sum(map(len, first)) == 30
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, second, strict=True)), "other windows after every epoch"
    for count, shape in ((30, (6, 5)), (12, (4, 3)), (9, (3, 3)), (7, (7, 1)), (1, (1, 1))):
        assert feeds.montage_shape(count) == shape, "as square as the count allows"


def test_a_batch_is_a_function_of_seed_epoch_and_index(fed):
    def first(words, epoch):
        return next(fed(f"--augment all {words}").training(epoch))[0]

    def alike(one, two):
        return all(np.array_equal(one[key], two[key]) for key in one)

    assert alike(first("--seed 3", 5), first("--seed 3", 5))
    assert not alike(first("--seed 3", 5), first("--seed 4", 5))
    assert not alike(first("--seed 3", 5), first("--seed 3", 6))
