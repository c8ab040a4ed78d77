"""What the figures show is what they were given; files are whole, small and replaced as a whole."""

import os
from itertools import pairwise

import numpy as np
import pytest
import tifffile
from conftest import call_here, cases, python
from PIL import Image

import figures

HISTORY = {
    "epoch": np.array([1, 2, 3, 5, 6, 8]),
    "loss": [1.5, 0.9, 0.5, 0.3, 0.2, 0.1],
    "val_loss": [1.6, 1.0, 0.6, 0.4, 0.4, 0.7],
    "dice": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95],
    "val_dice": [0.4, 0.5, 0.6, 0.7, 0.8, 0.85],
    "lr": [1e-5, 1e-4, 1e-3, 1e-2, 1e-3, 1e-4],
}
PANELS = {
    "training loss": {"3": ([1, 2, 3], [0.9, 0.5, 0.3], [0.1, 0.0, 0.1]), "4": ([1, 2], [0.8, 0.4], [0.0, 0.2])},
    "validation loss": {"4": ([1, 2], [0.9, 0.6], [0.1, 0.1])},
}
COLOURS = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)


def noisy(shape, dtype=np.uint8):
    return np.random.default_rng(3).integers(0, 256, shape).astype(dtype)


def disc(side=64, radius=20):
    rows, columns = np.mgrid[:side, :side] - side // 2
    return (rows**2 + columns**2 < radius**2).astype(np.uint8)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


@pytest.fixture
def draw(monkeypatch):
    """Calls a function of `figures`, and returns the matplotlib figure that it would have saved."""
    kept = []
    for save in ("_save", "_save_pictures"):
        monkeypatch.setattr(figures, save, lambda figure, path, **_: kept.append(figure))

    def call(name, *words, **options):
        getattr(figures, name)(*words, "nowhere", **options)
        return kept.pop()

    return call


DRAWINGS = {
    "curves": lambda path: figures.curves(HISTORY, path),
    "learning_rate": lambda path: figures.learning_rate(np.linspace(1e-5, 1e-2, 500), path, label="triangular"),
    "lr_find": lambda path: figures.lr_find(np.geomspace(1e-6, 1, 50), np.linspace(2, 1, 50), (1e-4, 1e-2), path),
    "factor": lambda path: figures.factor(PANELS, path, title="Depth (QUICK)"),
    "preview": lambda path: figures.preview(noisy((8, 64, 64)), np.stack([disc()] * 8), path),
    "panel": lambda path: figures.panel(noisy((64, 64)), disc(), disc() * 0.8, path, titles="abc"),
    "score_curves": lambda path: figures.score_curves([0.0, 0.5, 1.0], {"V_rand": [0.1, 0.9, 0.2]}, path),
    "sheet": lambda path: figures.sheet({"a": disc() * 255, "b": COLOURS}, path, legend={"split": ("#0072B2", "/")}),
    "weight_map": lambda path: figures.weight_map(disc() * 10.0 + 1, path, image=noisy((64, 64)), labels=disc()),
    "animation": lambda path: figures.animation(noisy((3, 64, 64)), [disc()] * 3, path),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_small_not_blank_on_white_and_replaces_the_old_file_with_the_same_bytes(name, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "reader")
    assert (DRAWINGS[name](path), sorted(os.listdir(tmp_path))) == (path, ["picture", "reader"])
    assert (tmp_path / "reader").read_bytes() == b"old", "who has the old file open keeps it whole"
    assert path.stat().st_size < 400_000
    picture = pixels(path)
    assert picture.std() > 5
    if name != "animation":
        assert 880 <= picture.shape[1] <= 1440, "a README shows it at 900 px"
        for edge in (picture[0], picture[:, 0]):
            assert (edge == 255).all(), "on white"
    assert DRAWINGS[name](tmp_path / "again").read_bytes() == path.read_bytes()


def test_marks_keep_their_colours_in_a_picture_full_of_grays(tmp_path):
    picture = np.repeat(noisy((300, 300))[..., None], 3, axis=-1) * 0.75 + 50
    picture[100:104, 50:250] = marks = (204, 60, 150)
    figures.sheet({"errors": picture.astype(np.uint8), "raw": noisy((300, 300))}, tmp_path / "sheet.png")
    assert np.abs(pixels(tmp_path / "sheet.png").astype(int) - marks).max(axis=-1).min() <= 5


def test_a_single_cell_looks_alike_whatever_its_number(draw):
    cell = disc().astype(np.int32)
    _, truth, prediction = draw("panel", noisy((64, 64)), cell * 23, cell, titles="abc").axes
    shown = [axes.images[0].get_array() for axes in (truth, prediction)]
    np.testing.assert_array_equal(*shown)


def test_curves_hold_the_history_against_epochs_from_one_and_ring_the_kept_weights(draw):
    loss, dice, rate = draw("curves", HISTORY).axes
    for axes, name in ((loss, "loss"), (dice, "dice")):
        for label, column in (("training", name), ("validation", f"val_{name}")):
            line = lines(axes)[label]
            np.testing.assert_array_equal(line.get_xydata(), np.transpose([HISTORY["epoch"], HISTORY[column]]))
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), HISTORY["lr"])
    assert [axes.get_ylabel() for axes in (loss, dice, rate)] == ["loss", "Dice", "learning rate"]
    np.testing.assert_array_equal(lines(loss)["best: 0.4 in epoch 5"].get_xydata(), [[5, 0.4]])
    assert all(len(set(kind)) == len(figures.STYLES) for kind in zip(*figures.STYLES, strict=True))
    histories = (HISTORY, {"loss": [1.0, 0.5]}, {"loss": [5.0, -0.1]})
    assert [draw("curves", one).axes[0].get_yscale() for one in histories] == ["log", "linear", "linear"]


@cases(
    "history, rows, first",
    ({"loss": [1.0]}, ["loss"], ["training"]),
    ({"dice": [0.5], "learning_rate": [0.1]}, ["Dice", "learning rate"], ["training"]),
    ({"loss": [2.0, 1.0], "val_loss": [None, None], "dice": [0.5, 0.6]}, ["loss", "Dice"], ["training"]),
    ({"loss": [1.0, None], "val_loss": [None, 0.5], "s": [1, 1]}, ["loss"], ["training", "validation", "best"]),
)
def test_curves_show_what_there_is(history, rows, first, draw):
    figure = draw("curves", history)
    assert [axes.get_ylabel() for axes in figure.axes] == rows
    assert [label.split(":")[0] for label in lines(figure.axes[0])] == first
    ticks = figure.axes[-1].get_xticks()
    np.testing.assert_array_equal(ticks, np.round(ticks))


@pytest.mark.parametrize("history", [{}, {"loss": []}, {"loss": [float("nan")], "epoch": [0]}, {"other": [1.0]}])
def test_a_history_without_a_single_number_is_refused(history):
    with pytest.raises(ValueError, match=r"history must hold a loss, Dice or rate of an epoch\. Received: \["):
        figures.curves(history, "nowhere")


def test_the_learning_rate_is_drawn_against_updates_from_one(draw):
    rates = [3e-3, 2e-3, 1e-3, 0.0]
    (axes,) = draw("learning_rate", rates, label="triangular").axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), np.transpose([[1, 2, 3, 4], rates]))
    assert (axes.get_title(loc="left"), axes.get_ylim()[0]) == ("triangular", 0)


def test_the_range_test_shows_the_way_down_and_the_suggestion_but_not_the_divergence(draw):
    losses = [2.0, 1.9, 1.5, 1.0, 0.8, 0.9, 5.0, 1e6, np.nan]
    (axes,) = draw("lr_find", np.geomspace(1e-5, 1e-1, 9), losses, (1e-4, 1e-2)).axes
    np.testing.assert_array_equal(lines(axes)["loss"].get_ydata(), losses)
    assert axes.get_xscale() == "log"
    low, high = axes.get_ylim()
    assert low < 0.8
    assert 2.0 < high < 3.0
    span = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    np.testing.assert_allclose([span.x0, span.x1], [1e-4, 1e-2])


def test_a_factor_shows_the_mean_and_the_spread_of_every_level_alike_in_every_panel(draw):
    figure = draw("factor", PANELS, xlabel="epoch", title="Depth (QUICK)")
    training, validation = figure.axes
    assert figure.get_suptitle() == "Depth (QUICK)"
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(PANELS)
    np.testing.assert_array_equal(lines(training)["3"].get_xydata(), [[1, 0.9], [2, 0.5], [3, 0.3]])
    shade = training.collections[0].get_paths()[0].vertices
    assert {(1, 0.8), (1, 1.0), (2, 0.5), (3, 0.2)} <= {(x, round(y, 6)) for x, y in shade}
    drawn = (lines(training)["3"], lines(training)["4"], lines(validation)["4"])
    three, four, same = ((one.get_color(), one._unscaled_dash_pattern, one.get_marker()) for one in drawn)
    assert three != four == same
    (axes,) = draw("factor", {"loss": {"": ([1, 2, 3], [5.0, 0.5, 0.1], [1.0, 0.6, 0.3])}}, xlabel="sections").axes
    assert axes.get_legend() is None
    assert (axes.get_xlabel(), axes.get_yscale()) == ("sections", "log")


@pytest.mark.parametrize(("higher", "value", "threshold"), [(True, "0.9", 0.5), (False, "0.1", 0)])
def test_score_curves_name_and_ring_the_best_threshold(higher, value, threshold, draw):
    (axes,) = draw("score_curves", [0.0, 0.5, 1.0], {"S": [0.1, 0.9, 0.2]}, higher_is_better=higher).axes
    np.testing.assert_array_equal(lines(axes)[f"S: best {value} at {threshold}"].get_ydata(), [0.1, 0.9, 0.2])
    (ring,) = [line for line in axes.lines if line.get_fillstyle() == "none"]
    np.testing.assert_array_equal(ring.get_xydata(), [[threshold, float(value)]])
    assert axes.get_ylabel() == f"{'score, higher' if higher else 'error, lower'} is better"


def test_a_preview_outlines_the_mask_in_its_window_and_nothing_where_the_mask_is_constant(tmp_path):
    masks = np.stack([disc(), np.ones_like(disc())])
    picture = pixels(figures.preview(np.full((2, 64, 64), 100.0), masks, tmp_path / "preview.png"))
    orange = picture[..., 0].astype(int) - picture[..., 2] > 60  # also where the line's edge mixes with gray
    left, right = np.array_split(orange, 2, axis=1)
    assert not right.any()
    rows, columns = np.nonzero(left)
    distances = np.hypot(rows - left.shape[0] / 2, columns - left.shape[1] / 2) / left.shape[0] * 64
    assert distances.size > 100
    assert np.abs(distances - 20).max() < 2, "the outline lies on the mask's border"


def test_a_preview_shows_which_window_was_made_brighter(draw):
    window = noisy((32, 32)).astype(float)
    one, other = draw("preview", np.stack([window, window + 300]), np.stack([disc(32, 9)] * 2)).axes
    assert one.images[0].get_clim() == other.images[0].get_clim()
    assert one.images[0].get_clim()[1] > 540


def test_a_preview_has_all_windows_and_grays_what_is_not_labelled(draw):
    masks = np.stack([disc(32, 9)] * 5).astype(np.int8)
    masks[4, :8] = -1
    shown = [axes.images for axes in draw("preview", noisy((5, 32, 32)), masks).axes]
    assert [len(images) for images in shown] == [1, 1, 1, 1, 2, 0, 0, 0]
    np.testing.assert_array_equal(~np.ma.getmaskarray(shown[4][1].get_array()), masks[4] < 0)
    truth = draw("panel", noisy((32, 32)), masks[4], disc(32, 9), titles="abc").axes[1].images[0]
    np.testing.assert_array_equal(truth.get_array(), np.where(masks[4] < 0, 0.5, masks[4]))


def test_a_panel_shows_section_labels_and_prediction_in_this_order_with_the_interior_white(draw):
    section, truth = noisy((32, 48), np.float32), disc(48)[:32]
    section[5, 5] = 1e6  # a hot pixel does not darken the rest
    figure = draw("panel", section, truth * 255, truth * 0.5, titles=("section", "labels", "ours"))
    shown = [axes.images[0] for axes in figure.axes]
    for image, expected in zip(shown, (section, truth * 255, truth * 0.5), strict=True):
        np.testing.assert_array_equal(image.get_array(), expected)
        assert image.cmap.name == "gray"
    assert [image.get_clim() for image in shown[1:]] == [(0, 255), (0, 1)]
    assert 245 < shown[0].get_clim()[1] < 256
    assert [axes.get_title() for axes in figure.axes] == ["section", "labels", "ours"]


def test_instances_are_coloured_neighbours_differ_and_none_has_the_white_of_the_background(draw):
    labels = np.arange(12).reshape(1, 12)[:, [0, 7, 3, 1, 2, 5, 4, 11, 9, 6, 8, 10]]
    weight_map = draw("weight_map", labels + 1.0, image=labels, labels=labels)
    for figure in (draw("panel", labels * 7, labels, labels, titles="abc"), weight_map):
        shown = figure.axes[1].images[0].get_array()[0]
        order = [tuple(shown[place]) for place in np.argsort(labels[0])]
        assert order[0] == (1, 1, 1)
        assert order[0] not in order[1:]
        assert all(one != other for one, other in pairwise(order))
    np.testing.assert_array_equal(weight_map.axes[2].images[0].get_array(), labels + 1)
    assert weight_map.axes[3].get_ylim() == pytest.approx((1, 12)), "the colour bar"


def test_an_animation_runs_through_the_stack_sections_left_masks_right(tmp_path):
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    sections = [np.full((64, 64), 100 * (i + 1), np.uint16) for i in range(4)]
    masks = [np.roll(ramp, 16 * i, axis=1) for i in range(4)]
    with Image.open(figures.animation(sections, masks, tmp_path / "train.gif")) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (4, (516, 256), 0)
        for index in range(4):
            gif.seek(index)
            frame = np.asarray(gif.convert("L")).astype(float)
            assert frame[:, :256].std() == 0
            assert abs(frame[0, 0] - 85 * index) < 9
            assert (frame[:, 256:260] == 255).all()
            assert np.abs(frame[::4, 260::4] - masks[index] * 255).max() < 9


def test_figures_leave_matplotlib_s_global_state_alone(tmp_path):
    probe = (
        "import sys, figures, matplotlib, numpy as np; before = matplotlib.rcParams.copy();"
        "figures.curves({'loss': [1.0, 0.5]}, sys.argv[1]);"
        "figures.sheet({'a': np.eye(2)}, sys.argv[1]);"
        "print(before == matplotlib.rcParams.copy(), 'matplotlib.pyplot' in sys.modules)"
    )
    assert python("-W", "error", "-c", probe, tmp_path / "picture.png").stdout.split() == ["True", "False"]


@pytest.fixture
def run(capsys):
    """Calls the command line in this process: exit code, stdout, stderr."""
    return lambda *words: call_here(capsys, *words, main=figures.main)


def write_stack(path, sections):
    tifffile.imwrite(path, sections, photometric="minisblack")
    return path


def test_animate_shows_every_nth_section_beside_its_mask(small, tmp_path, run):
    gif = tmp_path / "train.gif"
    stacks = ("--image_path", small / "images.tif", "--mask_path", small / "labels.tif")
    code, out, err = run("animate", *stacks, "--output", gif, "--every", 3)
    assert (code, err) == (0, "")
    assert out.startswith(f"{gif}: ")
    with Image.open(gif) as image:
        assert (image.n_frames, image.size) == (4, (644, 256))
        for index, mask in enumerate(tifffile.imread(small / "labels.tif")[::3]):
            image.seek(index)
            np.testing.assert_array_equal(np.asarray(image.convert("L"))[2::4, 326::4], mask)


def test_animate_takes_masks_of_every_kind(tmp_path, run):
    section = write_stack(tmp_path / "section.tif", np.zeros((2, 32, 32), np.uint8))
    half = write_stack(tmp_path / "prediction.tif", np.full((2, 32, 32), 0.5, np.float32))
    one_bit = write_stack(tmp_path / "mask.tif", np.ones((2, 32, 32), bool))
    for mask, expected in ((half, 128), (one_bit, 255), (section, 0)):
        gif = tmp_path / "picture.gif"
        assert run("animate", "--image_path", section, "--mask_path", mask, "--output", gif)[0] == 0
        assert abs(int(pixels(gif)[128, -1, 0]) - expected) <= 9


def test_animate_shows_numbers_of_cells_in_grays_that_repeat(tmp_path, run):
    """However large they are, and neighbours apart; 0 stays black."""
    cells = np.repeat(np.uint16([[0, 300, 301, 302, 303, 304, 0, 0]]), 64, 0).repeat(8, 1)
    images, masks = (write_stack(tmp_path / f"{name}.tif", np.stack([cells] * 2)) for name in ("images", "cells"))
    words = ("animate", "--image_path", images, "--mask_path", masks, "--output", tmp_path / "a.gif")
    assert "numbers of cells need --instances" in run(*words)[2]
    assert run(*words, "--instances")[0] == 0
    grays = pixels(tmp_path / "a.gif")[128, 260 + 16 :: 32, 0].astype(int)
    assert (grays[0], grays[6], grays[1]) == (0, 0, grays[5])
    assert np.diff(np.sort(grays[1:5])).min() > 40
    assert grays[1:5].min() > 60


PAIR = ("animate", "--output", "a.gif", "--image_path", "images.tif", "--mask_path")
REFUSED = {
    "no verb": ((), "the following arguments are required: verb, --image_path, --mask_path, --output"),
    "not a gif": (
        (*PAIR, "images.tif", "--output", "a.png"),
        "--output: must be a file that ends in .gif. Received: a.png",
    ),
    "every": ((*PAIR, "images.tif", "--every", "0"), "--every: must be at least 1 and at most 1048576. Received: 0"),
    "a name": ((*PAIR, "isbi2012"), "--mask_path: isbi2012 does not exist"),
    "not a TIFF": ((*PAIR, "text.csv"), "--mask_path"),
    "cut off": ((*PAIR, "cut.tif"), "cut.tif"),
    "colours": ((*PAIR, "rgb.tif"), "rgb.tif"),
    "NaN": ((*PAIR, "nan.tif"), "NaN"),
    "labels": ((*PAIR, "cells.tif"), "must hold 0..1 or 0..255. Received: 0..999"),
    "count": ((*PAIR, "one.tif"), "(2, 32, 32). Received: (1, 32, 32)"),
    "its input": ((*PAIR, "images.tif", "--output", "link.gif"), "--output must not be an input"),
}


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    """A folder, which is the current one, with files that cannot be drawn."""
    monkeypatch.chdir(tmp_path)
    stacks = {"images": noisy((2, 32, 32)), "one": noisy((1, 32, 32)), "rgb": noisy((2, 32, 32, 3))}
    stacks |= {"nan": np.full((2, 32, 32), np.nan, np.float32), "cells": np.zeros((2, 32, 32), np.uint16)}
    stacks["cells"][0, 0, 0] = 999
    for name, sections in stacks.items():
        write_stack(tmp_path / f"{name}.tif", sections)
    (tmp_path / "cut.tif").write_bytes((tmp_path / "images.tif").read_bytes()[:1500])
    (tmp_path / "text.csv").write_text("loss\nhigh\n")
    (tmp_path / "link.gif").symlink_to("images.tif")
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(name, bad_files, run):
    words, said = REFUSED[name]
    before = sorted(bad_files.rglob("*"))
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("figures.py")
    assert err.count("\n") == 1
    assert said in err
    assert sorted(bad_files.rglob("*")) == before
