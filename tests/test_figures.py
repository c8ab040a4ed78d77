"""What the figures show is what they were given; files are whole, small and replaced as a whole."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import tifffile
from conftest import ROOT, call_here, cases
from PIL import Image

import figures

HISTORY = {
    "epoch": np.arange(1, 7),
    "loss": [1.5, 0.9, 0.5, 0.3, 0.2, 0.1],
    "val_loss": [1.6, 1.0, 0.6, 0.4, 0.5, 0.7],
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
    "panel": lambda path: figures.panel(noisy((64, 64)), disc(), disc() * 0.8, path),
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
    assert DRAWINGS[name](path) == path
    assert sorted(os.listdir(tmp_path)) == ["picture", "reader"]
    assert (tmp_path / "reader").read_bytes() == b"old", "who has the old file open keeps it whole"
    assert path.stat().st_size < 400_000
    picture = pixels(path)
    assert picture.std() > 5
    if name != "animation":
        assert 880 <= picture.shape[1] <= 1440, "a README shows it at 900 px"
        for edge in (picture[0], picture[:, 0]):
            assert (edge == 255).all(), "on white"
    assert DRAWINGS[name](tmp_path / "again").read_bytes() == path.read_bytes()


# -- curves -----------------------------------------------------------------------------------------------------
def test_curves_hold_the_history_against_epochs_from_one_and_ring_the_kept_weights(draw):
    loss, dice, rate = draw("curves", HISTORY).axes
    for axes, name in ((loss, "loss"), (dice, "dice")):
        for label, column in (("training", name), ("validation", f"val_{name}")):
            line = lines(axes)[label]
            np.testing.assert_array_equal(line.get_xydata(), np.transpose([HISTORY["epoch"], HISTORY[column]]))
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), HISTORY["lr"])
    assert [axes.get_ylabel() for axes in (loss, dice, rate)] == ["loss", "Dice", "learning rate"]
    np.testing.assert_array_equal(lines(loss)["best: 0.4 in epoch 4"].get_xydata(), [[4, 0.4]])
    assert all(len(set(kind)) == len(figures.STYLES) for kind in zip(*figures.STYLES, strict=True))


@cases(
    "history, rows, first",
    ({"loss": [1.0]}, ["loss"], ["training"]),
    ({"dice": [0.5], "learning_rate": [0.1]}, ["Dice", "learning rate"], ["training"]),
    ({"loss": [2.0, 1.0], "val_loss": [None, None], "dice": [0.5, 0.6]}, ["loss", "Dice"], ["training"]),
    ({"loss": [1.0, None], "val_loss": ["", "0.5"], "s": [1, 1]}, ["loss"], ["training", "validation", "best"]),
)
def test_curves_show_what_there_is(history, rows, first, draw):
    figure = draw("curves", history)
    assert [axes.get_ylabel() for axes in figure.axes] == rows
    assert [label.split(":")[0] for label in lines(figure.axes[0])] == first
    ticks = figure.axes[-1].get_xticks()
    np.testing.assert_array_equal(ticks, np.round(ticks))


def test_losses_that_span_a_decade_are_read_on_a_logarithmic_axis(draw):
    histories = (HISTORY, {"loss": [1.0, 0.5]}, {"loss": [5.0, -0.1]})
    assert [draw("curves", one).axes[0].get_yscale() for one in histories] == ["log", "linear", "linear"]


@pytest.mark.parametrize("history", [{}, {"loss": []}, {"loss": [float("nan")], "epoch": [0]}, {"other": [1.0]}])
def test_a_history_without_a_single_number_is_refused(history):
    with pytest.raises(ValueError, match=r"history must hold a loss, Dice or rate of an epoch\. Received: \["):
        figures.curves(history, "nowhere")


def test_the_learning_rate_is_drawn_against_updates_from_one_with_the_recorded_ones_as_dots(draw):
    rates = [3e-3, 2e-3, 1e-3, 0.0]
    (axes,) = draw("learning_rate", rates, label="triangular", recorded=([2, 4], [2e-3, 0.0])).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), np.transpose([[1, 2, 3, 4], rates]))
    assert (axes.get_title(loc="left"), axes.get_ylim()[0]) == ("triangular", 0)
    dots = lines(axes)["recorded at the end of an epoch"]
    np.testing.assert_array_equal(dots.get_xydata(), [[2, 2e-3], [4, 0.0]])
    assert not dots.get_clip_on(), "the lowest is not cut off"


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
    three, four, same = (
        (line.get_color(), line._unscaled_dash_pattern, line.get_marker())
        for line in (lines(training)["3"], lines(training)["4"], lines(validation)["4"])
    )
    assert three != four == same
    pairs = draw("factor", dict.fromkeys("abcd", PANELS["training loss"])).axes[0].get_gridspec()
    assert (pairs.nrows, pairs.ncols) == (2, 2)


def test_a_nameless_level_has_no_legend_and_its_shade_may_reach_below_zero_on_a_logarithmic_axis(draw):
    (axes,) = draw("factor", {"loss": {"": ([1, 2, 3], [5.0, 0.5, 0.1], [1.0, 0.6, 0.3])}}, xlabel="sections").axes
    assert axes.get_legend() is None
    assert (axes.get_xlabel(), axes.get_yscale()) == ("sections", "log")
    with pytest.raises(ValueError, match=r"panels must hold at least one level\. Received: \['loss'\]"):
        figures.factor({"loss": {}}, "nowhere")


@pytest.mark.parametrize(("higher", "value", "threshold"), [(True, "0.9", 0.5), (False, "0.1", 0)])
def test_score_curves_name_and_ring_the_best_threshold(higher, value, threshold, draw):
    (axes,) = draw("score_curves", [0.0, 0.5, 1.0], {"S": [0.1, 0.9, 0.2]}, higher_is_better=higher).axes
    np.testing.assert_array_equal(lines(axes)[f"S: best {value} at {threshold}"].get_ydata(), [0.1, 0.9, 0.2])
    (ring,) = [line for line in axes.lines if line.get_fillstyle() == "none"]
    np.testing.assert_array_equal(ring.get_xydata(), [[threshold, float(value)]])
    assert axes.get_ylabel() == f"{'score, higher' if higher else 'error, lower'} is better"


# -- pictures ---------------------------------------------------------------------------------------------------
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


def test_a_panel_shows_section_labels_and_prediction_in_this_order_with_the_interior_white(draw):
    section, truth = noisy((32, 48), np.float32), disc(48)[:32]
    section[5, 5] = 1e6  # a hot pixel does not darken the rest
    figure = draw("panel", section, truth * 255, truth * 0.5)
    shown = [axes.images[0] for axes in figure.axes]
    for image, expected in zip(shown, (section, truth * 255, truth * 0.5), strict=True):
        np.testing.assert_array_equal(image.get_array(), expected)
        assert image.cmap.name == "gray"
    assert [image.get_clim() for image in shown[1:]] == [(0, 255), (0, 1)]
    assert 245 < shown[0].get_clim()[1] < 256
    assert [axes.get_title() for axes in figure.axes] == ["section", "labels", "predicted interior probability"]


def test_a_panel_without_truth_has_two_columns_and_with_a_stack_a_row_per_section(draw):
    figure = draw("panel", noisy((3, 32, 32)), None, np.zeros((3, 32, 32)), titles=["raw", "ours"])
    assert [axes.get_title() for axes in figure.axes] == ["raw", "ours", "", "", "", ""]


def test_instances_are_coloured_neighbours_differ_and_none_has_the_white_of_the_background(draw):
    labels = np.arange(12).reshape(1, 12)[:, [0, 7, 3, 1, 2, 5, 4, 11, 9, 6, 8, 10]]
    weight_map = draw("weight_map", labels + 1.0, image=labels, labels=labels)
    for figure in (draw("panel", labels * 7, labels, labels), weight_map):
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


# -- house ------------------------------------------------------------------------------------------------------
def test_figures_import_nothing_heavy_and_leave_matplotlib_s_global_state_alone(tmp_path):
    heavy = ["keras", "tensorflow", "jax", "torch", "scipy", "matplotlib", "PIL"]
    probe = (
        f"import sys, figures; print([name for name in {heavy} if name in sys.modules]);"
        "import matplotlib; before = matplotlib.rcParams.copy();"
        "figures.curves({'loss': [1.0, 0.5]}, sys.argv[1]);"
        "figures.panel([[0, 1], [1, 0]], None, [[0, 1], [1, 0]], sys.argv[1]);"
        "print(before == matplotlib.rcParams.copy(), 'matplotlib.pyplot' in sys.modules)"
    )
    run = [sys.executable, "-W", "error", "-c", probe, str(tmp_path / "picture.png")]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "True", "False"]


# -- the command line -------------------------------------------------------------------------------------------

START = ROOT / "results" / "start"
SETTINGS = {"lr": 1e-5, "max_lr": 1e-2, "step_size": 20, "clr_gamma": 0.99, "steps_per_epoch": 10}


@pytest.fixture
def run(capsys):
    """Calls the command line in this process: exit code, stdout, stderr."""
    return lambda *words: call_here(capsys, *words, main=figures.main)


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that are saved while a test runs."""
    found, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: found.append(figure) or save(figure, path))
    return found


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


def test_animate_takes_the_challenges_files_of_a_folder_and_with_test_the_test_stack(tmp_path, run):
    gray = {"train-volume.tif": 0, "train-labels.tif": 255, "test-volume.tif": 0, "test-labels.tif": 0}
    for name, value in gray.items():
        write_stack(tmp_path / name, np.full((2, 32, 32), value, np.uint8))
    half = write_stack(tmp_path / "prediction.tif", np.full((2, 32, 32), 0.5, np.float32))
    one_bit = write_stack(tmp_path / "mask.tif", np.ones((2, 32, 32), bool))
    cases = {(tmp_path,): 255, (tmp_path, "--test"): 0, (half, "--test"): 128, (one_bit,): 255}
    for words, expected in cases.items():
        gif = tmp_path / "picture.gif"
        assert run("animate", "--image_path", tmp_path, "--mask_path", *words, "--output", gif)[0] == 0
        assert abs(int(pixels(gif)[128, -1, 0]) - expected) <= 9


def test_curves_of_a_run_folder_are_those_of_its_history(tmp_path, run, drawn):
    for typed in (START, START / "history.csv"):
        assert run("curves", typed, "--output", tmp_path / "curves.png")[0] == 0
        loss, dice, rate = drawn.pop().axes
        assert [list(lines(axes)) for axes in (loss, dice)] == [["training"], ["training"]]
        np.testing.assert_array_equal(loss.lines[0].get_xdata(), [1, 2, 3, 4, 5])
        assert loss.lines[0].get_ydata()[-1] == 0.30285629630088806
        assert rate.lines[0].get_ydata()[-1] == 1e-5


def test_a_run_that_was_stopped_has_the_rates_of_the_updates_it_made():
    settings = SETTINGS | {"clr_mode": "cosine"}
    planned, made = (
        figures.scheduled_rates({"epochs": 7, "settings": settings} | more) for more in ({}, {"final": {"update": 6}})
    )
    assert (len(planned), planned[-1]) == (70, pytest.approx(1e-5))
    np.testing.assert_array_equal(made, planned[:6])


def test_the_learning_rate_of_a_run_goes_through_what_its_history_recorded(tmp_path, run, drawn):
    for typed in (START, START / "run.json"):
        assert run("learning_rate", typed, "--output", tmp_path / "rate.png")[0] == 0
        (axes,) = drawn.pop().axes
        assert axes.get_title(loc="left") == "cosine, 1e-05 to 0.0015"
        rates = lines(axes)["schedule"].get_ydata()
        updates, recorded = lines(axes)["recorded at the end of an epoch"].get_data()
        np.testing.assert_array_equal(updates, [100, 200, 300, 400, 500])
        np.testing.assert_allclose(rates[updates.astype(int) - 1], recorded, rtol=1e-12)
    shutil.copy(START / "run.json", tmp_path / "record.json")
    (tmp_path / "history.csv").write_text("update,learning_rate\n1,7\n")  # of another run
    assert run("learning_rate", tmp_path / "record.json", "--output", tmp_path / "rate.png")[0] == 0
    assert list(lines(drawn[0].axes[0])) == ["schedule"]


PAIR = ("animate", "--output", "a.gif", "--image_path", "images.tif", "--mask_path")
CURVES, RATE = ("curves", "--output", "a.png"), ("learning_rate", "--output", "a.png")
REFUSED = {
    "no verb": ((), "the following arguments are required: VERB"),
    "not a gif": ((*PAIR, "images.tif", "--output", "a.png"), "--output must be a .gif file. Received: a.png"),
    "every": ((*PAIR, "images.tif", "--every", "0"), "--every must be at least 1. Received: 0"),
    "a name": ((*PAIR, "isbi2012"), "--mask_path: isbi2012 does not exist"),
    "not a TIFF": ((*PAIR, "run/run.json"), "--mask_path"),
    "cut off": ((*PAIR, "cut.tif"), "cut.tif"),
    "colours": ((*PAIR, "rgb.tif"), "rgb.tif"),
    "NaN": ((*PAIR, "nan.tif"), "NaN"),
    "labels": ((*PAIR, "cells.tif"), "must hold 0..1 or 0..255. Received: 0..999"),
    "count": ((*PAIR, "one.tif"), "(2, 32, 32). Received: (1, 32, 32)"),
    "no run": ((*CURVES, "nothing"), "nothing does not exist: give a run folder, or its history.csv"),
    "no record": ((*RATE, "empty"), "run.json does not exist: give a run folder"),
    "no numbers": ((*CURVES, "text.csv"), "text.csv must be a history: a line of column names"),
    "uneven": ((*CURVES, "uneven.csv"), "uneven.csv must be a history"),
    "binary": ((*CURVES, "images.tif"), "images.tif must be a history"),
    "other columns": ((*CURVES, "other.csv"), "must hold a loss, Dice or rate of an epoch"),
    "not JSON": ((*RATE, "text.csv"), "text.csv must be a run record"),
    "of weights": ((*RATE, "weights.json"), "weights.json must be a run record"),
    "a list": ((*RATE, "list.json"), "list.json must be a run record"),
    "no updates": ((*RATE, "none.json"), "must be 1 to 10 million. Received: 0"),
    "too many": ((*RATE, "many.json"), "must be 1 to 10 million"),
    "no cycle": ((*RATE, "still.json"), "still.json must be a run record"),
    "nested": ((*RATE, "deep.json"), "deep.json must be a run record"),
    "its input": ((*PAIR, "images.tif", "--output", "link.gif"), "--output must not be an input"),
}


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    """A folder, which is the current one, with files that cannot be drawn."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "empty"):
        (tmp_path / name).mkdir()
    stacks = {"images": noisy((2, 32, 32)), "one": noisy((1, 32, 32)), "rgb": noisy((2, 32, 32, 3))}
    stacks |= {"nan": np.full((2, 32, 32), np.nan, np.float32), "cells": np.zeros((2, 32, 32), np.uint16)}
    stacks["cells"][0, 0, 0] = 999
    for name, sections in stacks.items():
        write_stack(tmp_path / f"{name}.tif", sections)
    (tmp_path / "cut.tif").write_bytes((tmp_path / "images.tif").read_bytes()[:1500])
    texts = {"text.csv": "loss\nhigh\n", "uneven.csv": "loss,dice\n1,2\n3\n", "other.csv": "a\n1\n"}
    texts |= {"weights.json": '{"format": "weights"}', "list.json": "[]", "run/run.json": "{}"}
    for name, epochs in (("none", 0), ("many", 10**9)):
        texts[f"{name}.json"] = json.dumps({"epochs": epochs, "settings": SETTINGS | {"clr_mode": "triangular"}})
    still = SETTINGS | {"clr_mode": "triangular", "step_size": 0}
    texts |= {"still.json": json.dumps({"epochs": 1, "settings": still}), "deep.json": "[" * 10**5}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
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
