"""Cells: the U-Net of 2015 from the command line, instance labels, the weighted loss, what is scored and written."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import call_here, call_quietly, refused
from keras import ops

import augment
import data
import dilatedUnet
from network import losses, unet
from score import evaluation, scores, segments
from train import run as training
from train.feed import pixel_weights

TINY = "--filters 2 --depth 2 --window 60 --precision float32 --steps_per_epoch 2 --epochs 2 --lr 1e-3"


def discs(shape=(64, 80), sections=8, radius=9):
    """Bright discs on a dark ground, two of them touching, numbered with gaps; they drift from frame to frame."""
    rows, columns = np.indices(shape)
    images, labels = np.full((sections, *shape), 60, np.uint8), np.zeros((sections, *shape), np.uint16)
    for i in range(sections):
        for number, (row, column) in {3: (20, 20 + i), 4: (20, 38 + i), 9: (48, 50 - i)}.items():
            inside = (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
            images[i][inside], labels[i][inside] = 180, number
    noise = np.random.default_rng(0).integers(0, 20, images.shape)
    return (images + noise).astype(np.uint8), labels


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A sequence in the layout of the Cell Tracking Challenge: 01/tNNN.tif, 01_ST/SEG/man_segNNN.tif."""
    folder = tmp_path_factory.mktemp("cells")
    images, labels = discs()
    for place, name, stack in (("01", "t", images), ("01_ST/SEG", "man_seg", labels)):
        (folder / place).mkdir(parents=True)
        for i, section in enumerate(stack):
            tifffile.imwrite(folder / place / f"{name}{i:03d}.tif", section, compression="zlib")
    return folder


def command(frames, words=""):
    files = f"--image_path {frames / '01'} --mask_path {frames / '01_ST/SEG'} --instances --arch unet2015"
    return f"{files} {TINY} --protocol holdout --inner_sections 1 {words}".split()


@pytest.fixture(scope="module")
def done(frames, tmp_path_factory):
    """Folder of a finished run on the cells, `r` and `w/cells`."""
    folder = tmp_path_factory.mktemp("run")
    call_quietly(folder, command(frames, "--run_dir r --weight_path w/cells"))
    return folder


def parsed(words):
    return dilatedUnet.parse(words.split())


def test_a_window_whose_output_is_larger_than_the_sections_is_answered_with_the_largest_that_fits(frames, refuses):
    """Sections of 64 px; with two levels an output lacks 20 px on each side."""
    for window, side in (("120", 80), ("108", 68)):
        flags = command(frames, f"--depth 2 --filters 2 --window {window}")
        refuses(f"--window: its output, of {side} px, must fit into the sections", *flags)
        refuses(f"so at most 104. Received: {window}", *flags)


def test_the_architecture_brings_the_papers_recipe_unless_a_flag_says_otherwise():
    args = parsed("--arch unet2015")
    assert (args.filters, args.depth, args.padding, args.dropout) == ((64,), 4, "valid", 0.5)
    assert (args.optimizer, args.momentum, args.batch_size, args.window) == ("sgd", 0.99, 1, 572)
    assert (args.loss, args.w0, args.sigma, args.augment) == ("weighted", 10.0, 5.0, "all")
    assert parsed("--arch unet2015 --optimizer adam").momentum == 0
    assert (parsed("--arch unet2015 --padding same").window, parsed("--arch unet2015 --w0 0").w0) == (512, 0)
    old = parsed("")
    assert (old.filters, old.dropout, old.window, old.loss) == ((44, 88, 176), 0.3, 512, "bce_dice")
    assert (old.optimizer, old.momentum, old.batch_size, old.clr_mode) == ("rmsprop", 0, 3, "triangular")


def test_the_window_may_be_larger_than_the_section_by_what_the_network_loses_and_others_are_refused(frames):
    """As 572 px for sections of 512 px: the context is mirrored, and the output lies within the section."""
    args = dilatedUnet.parse(command(frames, "--window 104"))
    (batch,) = next(training.feed_of(args, training.load(args)).training(0))
    assert batch["image"].shape[1] >= 104
    rule = "must be a multiple of 4 and at least 44. Received: 62; nearest: "
    for window, words in ((62, rule), (108, "must fit into the sections")):
        refused(words, training.load, dilatedUnet.parse(command(frames, f"--window {window}")))


def test_an_unpadded_network_sees_context_around_the_crop_mirrored_at_the_border():
    stack = np.random.default_rng(0).integers(0, 255, (1, 40, 40), dtype=np.uint8)
    none = augment.RECIPES["none"]
    options = {"seed": 0, "epoch": 0, "indices": range(4), "sections": (0,)}
    small = augment.batch(stack, stack, none, window=16, **options)
    large = augment.batch(stack, stack, none, window=16, context=12, **options)
    assert large["image"].shape == (4, 40, 40)
    np.testing.assert_array_equal(large["image"][:, 12:-12, 12:-12], small["image"])
    padded = np.pad(stack[0], 12, mode="reflect")
    drawn = [augment.draw(none, index=i, seed=0, epoch=0, sections=(0,), shape=(40, 40), window=16) for i in range(4)]
    for one, image in zip(drawn, large["image"], strict=True):
        row, column = one.origin
        np.testing.assert_array_equal(image, padded[row : row + 40, column : column + 40])


def prepared(frames, words=""):
    args = dilatedUnet.parse(command(frames, words))
    return args, training.load(args)


def test_each_pixel_of_a_training_section_has_its_weight_and_touching_cells_are_apart(frames):
    args, stacks = prepared(frames, "--w0 7 --sigma 3")
    weights, train = pixel_weights(stacks, args.w0, args.sigma), list(stacks.split.train)
    apart = [losses.separate(stacks.cells.sections[i]) for i in train]
    interior = np.stack([section > 0 for section in apart])
    np.testing.assert_array_equal(stacks.masks.sections[train], interior)
    balance = losses.class_weights(interior.sum(), interior.size)
    plain = losses.border_weights(apart[0], w0=7, sigma=3)
    expected = np.where(apart[0] > 0, balance[1], balance[0] + plain - 1)
    np.testing.assert_allclose(weights[train[0]], expected, rtol=1e-6)
    touching = (stacks.cells.sections[0] > 0) & (apart[0] == 0)
    assert touching.any()
    assert (weights[0][touching] > 4).all(), "the border between touching cells is background, and heavy"
    _, stacks = prepared(frames)
    before = pixel_weights(stacks, 10, 5)
    for stack in (stacks.masks, stacks.cells):
        stack.sections[list(stacks.split.held_out)] = 1
    after = pixel_weights(stacks, 10, 5)
    np.testing.assert_array_equal(before, after)
    assert not after[list(stacks.split.held_out)].any()


def test_a_region_without_labels_weighs_nothing_and_makes_no_border(frames, tmp_path):
    (tmp_path / "SEG").mkdir()
    for i, section in enumerate(discs()[1]):
        section[:, 28:34] = 65535  # through the touching cells of most frames, and beside them in the others
        tifffile.imwrite(tmp_path / "SEG" / f"man_seg{i:03d}.tif", section)
    _, whole = prepared(frames)
    _, stacks = prepared(frames, f"--mask_path {tmp_path / 'SEG'} --ignore_label 65535")
    unlabelled = np.zeros(stacks.masks.sections.shape, bool)
    unlabelled[..., 28:34] = True
    assert ((stacks.masks.sections == -1) == unlabelled).all()
    assert ((stacks.cells.sections == -1) == unlabelled).all()
    assert (stacks.masks.sections >= whole.masks.sections)[~unlabelled].all(), "no cell is eroded beside the region"
    weights = pixel_weights(stacks, 10, 5)
    assert not weights[unlabelled].any()
    train = list(stacks.split.train)
    interior, count = weights[train][stacks.masks.sections[train] == 1], (~unlabelled[train]).sum()
    assert interior.sum() == pytest.approx(count / 2, rel=1e-4), "a class weighs half of what is labelled"


def test_the_step_minimises_the_weighted_cross_entropy_of_the_cropped_mask(frames):
    """The compiled model's loss is that of its own logits, computed by hand in numpy."""
    args, stacks = prepared(frames, "--augment none")
    trainee = training.make_trainee(args, training.course_of(args), stacks.normalisation, "float32")
    (batch,) = next(training.feed_of(args, stacks).training(0))
    found = trainee.test_on_batch(batch, return_dict=True)
    side, lost = training.output_side(args)
    assert (side, lost) == (20, 20)
    mask, weights = (batch[name][:, lost:-lost, lost:-lost] for name in ("mask", "weights"))
    image = stacks.normalisation(batch["image"])[..., None]
    logits = ops.convert_to_numpy(unet.with_logits(trainee.network)(image, training=False)[1])
    likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.where(mask > 0, likelihood[..., 1], likelihood[..., 0])
    assert float(found["loss"]) == pytest.approx(float(-(weights * chosen).mean()), rel=1e-4)


@pytest.mark.jax
def test_membranes_are_weighted_through_their_components_for_the_network_of_2017_too(small, capsys, tmp_path):
    files = ("--image_path", small / "images.tif", "--mask_path", small / "labels.tif")
    flags = "--filters 2,3 --window 32 --loss weighted --w0 3 --precision float32 --epochs 1 --steps_per_epoch 2"
    done = call_here(capsys, *files, *flags.split(), "--protocol", "holdout", "--run_dir", tmp_path / "r")
    assert done.code == 0, done.err
    assert (tmp_path / "r/weights.png").exists()
    record = json.loads((tmp_path / "r/run.json").read_text())
    assert record["held_out"]["v_rand"] > 0
    assert "arch" not in record["network"]


@pytest.mark.slow
def test_a_run_on_cells_scores_held_out_frames_and_predicts_labels(done, frames, capsys, monkeypatch):
    monkeypatch.chdir(done)
    record = json.loads(Path("r/run.json").read_text())
    assert record["network"] == {
        **{"arch": "unet2015", "filters": 2, "levels": 2, "padding": "valid", "batch_norm": False},
        **{"dropout": 0.5, "classes": 2},
    }
    assert (record["held_out"]["sections"], record["held_out"]["cells"]) == ([6, 7], 6)
    assert 0 <= record["held_out"]["seg"] <= record["held_out"]["mean_iou"] <= 1
    for name in ("weights.png", "held_out.png", "curves.png"):
        assert Path("r", name).exists(), name
    weights = json.loads(Path("w/cells.json").read_text())
    assert weights["smallest_cell_px"] == np.pi * 81 // 10
    assert weights["background"] in (0.3, 0.5)
    call = ("predict", "--weight_path", "w/cells", "--image_path", frames / "01", "--output", "labels.tif", "--segment")
    assert call_here(capsys, *call, "--precision", "float32").code == 0
    labels = tifffile.imread("labels.tif")
    assert (labels.shape, labels.dtype) == ((8, 64, 80), np.uint16)
    scored = ("evaluate", "--instances", "--prediction", "labels.tif", "--mask_path", frames / "01_ST/SEG")
    scored = call_here(capsys, *scored, "--sections", "6-7", "--json", "s.json")
    assert scored.code == 0, scored.err
    assert json.loads(Path("s.json").read_text())["seg"] == pytest.approx(record["held_out"]["seg"])


def test_frames_without_a_mask_are_left_out(frames, tmp_path):
    (tmp_path / "SEG").mkdir()
    for i in (1, 4):
        source = frames / f"01_ST/SEG/man_seg{i:03d}.tif"
        (tmp_path / "SEG" / source.name).write_bytes(source.read_bytes())
    images, masks, messages = data.load_pair(frames / "01", tmp_path / "SEG", instances=True)
    assert images.names == ["t001", "t004"]
    np.testing.assert_array_equal(images.sections, discs()[0][[1, 4]])
    np.testing.assert_array_equal(masks.sections, discs()[1][[1, 4]])
    assert "pairs: 2 of 8 frames are labelled, the others are left out" in messages
    images, _, messages = data.load_pair(frames / "01", frames / "01_ST/SEG/man_seg004.tif", instances=True)
    assert images.names == ["t004"]
    assert "pairs: by number, t004 with man_seg004" in messages
    for folder, source in (("dated", frames / "01"), ("dated_SEG", tmp_path / "SEG")):  # a number before the frame's
        (tmp_path / folder).mkdir()
        for path in source.iterdir():
            (tmp_path / folder / f"2017_{path.name}").write_bytes(path.read_bytes())
    images, _, _ = data.load_pair(tmp_path / "dated", tmp_path / "dated_SEG", instances=True)
    assert images.names == ["2017_t001", "2017_t004"]


def test_instance_labels_are_whole_numbers_and_not_taken_for_membranes_by_mistake(frames, tmp_path):
    for value, dtype, words in ((0.5, np.float32, "float"), (2**24, np.float32, "float"), (-1, np.int16, "-1")):
        tifffile.imwrite(tmp_path / "x.tif", np.full((2, 8, 8), value, dtype))
        refused(f"must hold whole numbers.*{words}", data.read_instances, tmp_path / "x.tif")
    refused("which --instances takes", data.load_pair, frames / "01", frames / "01_ST/SEG")


def test_numbers_of_cells_in_a_file_of_floats_are_read_and_scored_as_fiji_saves_them(capsys, tmp_path):
    cells = discs()[1]
    for name, dtype in (("whole.tif", np.uint32), ("floats.tif", np.float32)):
        tifffile.imwrite(tmp_path / name, cells.astype(dtype), photometric="minisblack")
    stacks = [data.read_instances(tmp_path / name) for name in ("whole.tif", "floats.tif")]
    assert stacks[0][1] == stacks[1][1]
    assert stacks[1][0].sections.dtype == np.int32
    np.testing.assert_array_equal(stacks[1][0].sections, cells)
    files = ("--prediction", tmp_path / "floats.tif", "--mask_path", tmp_path / "whole.tif")
    done = call_here(capsys, "evaluate", "--instances", *files)
    assert (done.code, "mean IoU 1.0000, SEG 1.0000" in done.out) == (0, True)


def test_the_best_settings_are_those_of_the_highest_mean_iou_by_section_and_as_a_whole():
    _, labels = discs()
    apart = np.stack([losses.separate(section) for section in labels]) > 0
    sure = np.where(apart, 0.95, 0.1).astype(np.float32)
    faint = np.where(apart, 0.95, np.where(labels > 0, 0.4, 0.1)).astype(np.float32)
    for probability in (sure, faint):
        best = scores.best_segmentation(probability, labels)
        assert best["smallest_cell_px"] == np.median([(labels[0] == n).sum() for n in (3, 4, 9)]) // 10
        options = {"min_size": best["smallest_cell_px"], "background": best["background"], "lines": False}
        found = [segments.segment(section, best["threshold"], **options) for section in probability]
        assert scores.mean_iou(found, labels) > 0.99
    assert best["background"] == 0.3, "cells reach to where the probability says so"
    _, labels = discs(sections=2)
    found = evaluation.score_instances(labels, labels, sections=[6, 7])
    assert (found["mean_iou"], found["seg"], found["cells"], found["sections"]) == (1, 1, 6, [6, 7])
    half = labels.copy()
    half[1] = 0
    found = evaluation.score_instances(half, labels)
    assert (found["seg"], [one["seg"] for one in found["per_section"]]) == (0.5, [1, 0])


@pytest.mark.parametrize(("flags", "words"), [("--report r", "goes without --report"), ("", "whole numbers")])
def test_evaluate_refuses_what_cannot_be_scored(frames, capsys, tmp_path, flags, words):
    tifffile.imwrite(tmp_path / "p.tif", np.full((8, 64, 80), 0.5, np.float32))
    files = ("--prediction", tmp_path / "p.tif", "--mask_path", frames / "01_ST/SEG")
    done = call_here(capsys, "evaluate", "--instances", *files, *flags.split())
    assert (done.code, words in done.err) == (2, True), done.err
