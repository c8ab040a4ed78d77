"""What the figures show is what they were given; files are whole, small and written beside their place."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import figures

HOUSE = Path(figures.__file__).parent
RNG = np.random.default_rng(3)
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


def noisy(shape, dtype=np.uint8):
    return RNG.integers(0, 256, shape).astype(dtype)


def disc(side=64, radius=20):
    rows, columns = np.mgrid[:side, :side] - side // 2
    return (rows**2 + columns**2 < radius**2).astype(np.uint8)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def orange(picture):
    """Where a picture is orange, also where the line's edge mixes with gray."""
    return picture[..., 0].astype(int) - picture[..., 2] > 60


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


DRAWINGS = {
    "curves": lambda path: figures.curves(HISTORY, path),
    "learning_rate": lambda path: figures.learning_rate(np.linspace(1e-5, 1e-2, 500), path, label="triangular"),
    "lr_find": lambda path: figures.lr_find(np.geomspace(1e-6, 1, 50), np.linspace(2, 1, 50), (1e-4, 1e-2), path),
    "factor": lambda path: figures.factor(PANELS, path, title="Depth (QUICK)"),
    "preview": lambda path: figures.preview(noisy((8, 64, 64)), np.stack([disc()] * 8), path),
    "panel": lambda path: figures.panel(noisy((64, 64)), disc(), disc() * 0.8, path),
    "score_curves": lambda path: figures.score_curves([0.0, 0.5, 1.0], {"V_rand": [0.1, 0.9, 0.2]}, path),
    "weight_map": lambda path: figures.weight_map(disc() * 10.0 + 1, path, image=noisy((64, 64)), labels=disc()),
    "animation": lambda path: figures.animation(noisy((3, 64, 64)), [disc()] * 3, path),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_returned_written_small_and_not_blank(name, tmp_path):
    path = DRAWINGS[name](tmp_path / "picture")
    assert path == tmp_path / "picture"
    assert os.listdir(tmp_path) == ["picture"]
    assert path.stat().st_size < 400_000
    picture = pixels(path)
    assert picture.std() > 5
    if name != "animation":
        assert 880 <= picture.shape[1] <= 1440, "a README shows it at 900 px"
        for edge in (picture[0], picture[:, 0]):
            assert (edge == 255).all(), "on white"


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_same_data_give_the_same_bytes_and_replace_the_old_file(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "noisy", lambda shape: np.arange(np.prod(shape)).reshape(shape) % 251)
    path = tmp_path / "picture"
    path.write_bytes(b"old")
    first = DRAWINGS[name](path).read_bytes()
    assert first != b"old"
    assert DRAWINGS[name](path).read_bytes() == first


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_place_that_cannot_be_written_is_an_oserror(name, tmp_path):
    with pytest.raises(FileNotFoundError):
        DRAWINGS[name](tmp_path / "missing" / "picture.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises((IsADirectoryError, PermissionError)):
        DRAWINGS[name](tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_failure_while_writing_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        figures._replace(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["picture.png"]


def test_who_has_the_old_file_open_keeps_it_whole(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "reader")
    DRAWINGS["learning_rate"](path)
    assert (tmp_path / "reader").read_bytes() == b"old"
    assert path.read_bytes() != b"old"


def test_a_written_picture_may_be_read_by_whoever_may_read_other_files(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    path = DRAWINGS["learning_rate"](tmp_path / "picture.png")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_curves_hold_the_history_against_epochs_from_one():
    loss, dice, rate = figures.draw_curves(HISTORY).axes
    for axes, name in ((loss, "loss"), (dice, "dice")):
        for label, column in (("training", name), ("validation", f"val_{name}")):
            line = lines(axes)[label]
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5, 6])
            np.testing.assert_array_equal(line.get_ydata(), HISTORY[column])
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), HISTORY["lr"])
    assert [axes.get_ylabel() for axes in (loss, dice, rate)] == ["loss", "Dice", "learning rate"]
    assert rate.get_xlabel() == "epoch"


def test_curves_leave_out_a_column_without_values():
    """A run without validation has no line and no legend entry for it."""
    figure = figures.draw_curves({"loss": [2.0, 1.0], "val_loss": [None, None], "dice": [0.5, 0.6]})
    assert list(lines(figure.axes[0])) == ["training"]


def test_curves_ring_the_epoch_whose_weights_are_kept():
    ring = lines(figures.draw_curves(HISTORY).axes[0])["best: 0.4 in epoch 4"]
    assert (ring.get_xdata().item(), ring.get_ydata().item()) == (4, 0.4)


def test_training_and_validation_differ_in_colour_line_and_marker():
    drawn = lines(figures.draw_curves(HISTORY).axes[0])
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in drawn.values()][:2]
    assert all(one != other for one, other in zip(*styles, strict=True))


def test_all_styles_differ_in_each_respect():
    for kind in zip(*figures.STYLES, strict=True):
        assert len(set(kind)) == len(figures.STYLES)


@pytest.mark.parametrize(
    ("history", "rows"),
    [
        ({"loss": [1.0]}, ["loss"]),
        ({"dice": [0.5], "learning_rate": [0.1]}, ["Dice", "learning rate"]),
        ({"loss": [1.0, None, float("nan")], "val_loss": ["", "0.5", "0.7"], "seconds": [1, 1, 1]}, ["loss"]),
    ],
)
def test_curves_show_what_there_is(history, rows, tmp_path):
    figure = figures.draw_curves(history)
    assert [axes.get_ylabel() for axes in figure.axes] == rows
    assert figures.curves(history, tmp_path / "curves.png").exists()
    first = figure.axes[0].lines[0]
    np.testing.assert_array_equal(first.get_xdata(), 1 + np.arange(len(first.get_ydata())))
    ticks = figure.axes[-1].get_xticks()
    np.testing.assert_array_equal(ticks, np.round(ticks))


def test_losses_that_span_a_decade_are_read_on_a_logarithmic_axis():
    wide, narrow = figures.draw_curves(HISTORY).axes[0], figures.draw_curves({"loss": [1.0, 0.5]}).axes[0]
    negative = figures.draw_curves({"loss": [5.0, -0.1]}).axes[0]
    assert [axes.get_yscale() for axes in (wide, narrow, negative)] == ["log", "linear", "linear"]


@pytest.mark.parametrize("history", [{}, {"loss": []}, {"loss": [float("nan")], "epoch": [0]}, {"other": [1.0]}])
def test_a_history_without_a_single_number_is_refused(history):
    with pytest.raises(ValueError, match=r"history must hold a loss, Dice or rate of an epoch\. Received: \["):
        figures.draw_curves(history)


def test_the_learning_rate_is_drawn_against_updates_from_one():
    rates = [1e-5, 5e-3, 1e-2, 5e-3]
    (axes,) = figures.draw_learning_rate(rates, label="triangular").axes
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), rates)
    assert axes.get_title(loc="left") == "triangular"
    assert axes.get_ylim()[0] == 0
    with pytest.raises(ValueError, match=r"rates must hold at least one update\. Received: 0"):
        figures.draw_learning_rate([])


def test_recorded_rates_are_dots_on_the_line_and_the_lowest_is_not_cut_off():
    (axes,) = figures.draw_learning_rate([3e-3, 2e-3, 1e-3, 0.0], recorded=([2, 4], [2e-3, 0.0])).axes
    dots = lines(axes)["recorded at the end of an epoch"]
    np.testing.assert_array_equal(dots.get_xydata(), [[2, 2e-3], [4, 0.0]])
    assert dots.get_linestyle() == "None"
    assert not dots.get_clip_on()
    assert figures.draw_learning_rate([1e-3]).axes[0].get_legend() is None


def test_the_range_test_shows_the_way_down_and_the_suggestion_but_not_the_divergence():
    rates = np.geomspace(1e-5, 1e-1, 9)
    losses = [2.0, 1.9, 1.5, 1.0, 0.8, 0.9, 5.0, 1e6, np.nan]
    (axes,) = figures.draw_lr_find(rates, losses, (1e-4, 1e-2)).axes
    np.testing.assert_array_equal(lines(axes)["loss"].get_ydata(), losses)
    assert axes.get_xscale() == "log"
    low, high = axes.get_ylim()
    assert low < 0.8
    assert 2.0 < high < 3.0
    span = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    np.testing.assert_allclose([span.x0, span.x1], [1e-4, 1e-2])
    assert any("0.0001 to 0.01" in text.get_text() for text in axes.get_legend().get_texts())


@pytest.mark.parametrize(("rates", "losses"), [([1, 2], [1]), ([1.0], [np.nan]), ([], [])])
def test_a_range_test_without_numbers_is_refused(rates, losses):
    with pytest.raises(ValueError, match=rf"rates and losses must .* Received: {len(rates)} rates, {len(losses)} "):
        figures.draw_lr_find(rates, losses, (1e-4, 1e-2))


def test_a_factor_shows_the_mean_and_the_spread_of_every_level():
    figure = figures.draw_factor(PANELS, xlabel="epoch", title="Depth (QUICK)")
    training, validation = figure.axes
    assert figure.get_suptitle() == "Depth (QUICK)"
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(PANELS)
    assert training.get_xlabel() == "epoch"
    np.testing.assert_array_equal(lines(training)["3"].get_ydata(), [0.9, 0.5, 0.3])
    np.testing.assert_array_equal(lines(training)["4"].get_xdata(), [1, 2])
    shade = training.collections[0].get_paths()[0].vertices
    assert {(1, 0.8), (1, 1.0), (2, 0.5), (3, 0.2)} <= {(x, round(y, 6)) for x, y in shade}
    assert [text.get_text() for text in validation.get_legend().get_texts()] == ["4"]


def test_the_levels_of_a_factor_differ_in_colour_line_and_marker_and_keep_them_in_every_panel():
    training, validation = (lines(axes) for axes in figures.draw_factor(PANELS).axes)
    three, four, same = (
        (line.get_color(), line._unscaled_dash_pattern, line.get_marker())
        for line in (training["3"], training["4"], validation["4"])
    )
    assert all(one != other for one, other in zip(three, four, strict=True))
    assert four == same


def test_a_factor_with_one_nameless_level_has_no_legend_and_one_without_levels_is_refused(tmp_path):
    panels = {"V_rand": {"": ([1, 24], [0.9, 0.95], [0.01, 0.0])}}
    (axes,) = figures.draw_factor(panels, xlabel="labelled sections").axes
    assert axes.get_legend() is None
    assert axes.get_xlabel() == "labelled sections"
    with pytest.raises(ValueError, match=r"panels must hold at least one level\. Received: \['loss'\]"):
        figures.draw_factor({"loss": {}})


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2)])
def test_four_panels_of_a_factor_stand_in_pairs(count, rows, columns):
    figure = figures.draw_factor({f"panel {i}": PANELS["training loss"] for i in range(count)})
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == (rows, columns)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"panel {i}" for i in range(count)]
    for axes in figure.axes:
        np.testing.assert_array_equal(axes.get_xticks(), np.round(axes.get_xticks()))


def test_the_shade_of_a_factor_may_reach_below_zero_on_a_logarithmic_axis(tmp_path):
    panels = {"loss": {"1e-3": ([1, 2, 3], [5.0, 0.5, 0.1], [1.0, 0.6, 0.3])}}
    assert figures.draw_factor(panels).axes[0].get_yscale() == "log"
    assert figures.factor(panels, tmp_path / "factor.png").exists()


def test_score_curves_name_the_best_threshold_of_each_score():
    scores = {"V_rand": [0.1, 0.9, 0.2], "V_info": [0.95, np.nan, 0.3], "undefined": [np.nan] * 3}
    (axes,) = figures.draw_score_curves([0.0, 0.5, 1.0], scores).axes
    drawn = lines(axes)
    np.testing.assert_array_equal(drawn["V_rand: best 0.9000 at 0.5"].get_ydata(), scores["V_rand"])
    assert "V_info: best 0.9500 at 0" in drawn
    rings = [line for line in axes.lines if line.get_fillstyle() == "none"]
    places = [(ring.get_xdata().item(), ring.get_ydata().item()) for ring in rings]
    assert places == [(0.5, 0.9), (0.0, 0.95)]


def test_a_preview_outlines_the_mask_in_its_window_and_nothing_where_the_mask_is_constant(tmp_path):
    masks = np.stack([disc(), np.ones_like(disc())])
    path = figures.preview(np.full((2, 64, 64), 100.0), masks, tmp_path / "preview.png")
    picture = pixels(path)
    left, right = np.array_split(picture, 2, axis=1)
    assert 0.003 < orange(left).mean() < 0.05
    assert not orange(right).any()
    rows, columns = np.nonzero(orange(left))
    distances = np.hypot(rows - left.shape[0] / 2, columns - left.shape[1] / 2) / left.shape[0] * 64
    assert np.abs(distances - 20).max() < 2, "the outline lies on the mask's border"


def test_a_preview_shows_which_window_was_made_brighter():
    window = noisy((32, 32)).astype(float)
    drawn = figures.draw_preview(np.stack([window, window + 300]), np.stack([disc(32, 9)] * 2)).axes
    limits = [axes.images[0].get_clim() for axes in drawn]
    assert limits[0] == limits[1]
    assert limits[0][0] < 10
    assert limits[0][1] > 540


def test_a_preview_of_windows_that_do_not_match_their_masks_is_refused():
    with pytest.raises(ValueError, match=r"one shape \(N, h, w\)\. Received: \(2, 8, 8\) and \(2, 8, 9\)"):
        figures.draw_preview(np.zeros((2, 8, 8)), np.zeros((2, 8, 9)))
    with pytest.raises(ValueError, match="one shape"):
        figures.draw_preview(np.zeros((8, 8)), np.zeros((8, 8)))


def test_a_panel_shows_section_labels_and_prediction_in_this_order():
    section, truth = noisy((32, 48)), disc(48)[:32]
    figure = figures.draw_panel(section, truth * 255, truth * 0.5)
    shown = [axes.images[0] for axes in figure.axes]
    for image, expected in zip(shown, (section, truth * 255, truth * 0.5), strict=True):
        np.testing.assert_array_equal(image.get_array(), expected)
    assert [image.get_clim() for image in shown[1:]] == [(0, 255), (0, 1)]
    assert [axes.get_title() for axes in figure.axes] == [
        "section",
        "labels",
        "predicted interior probability",
    ]


def test_a_panel_has_white_interior_and_black_membrane(tmp_path):
    half = np.zeros((40, 40))
    half[:, 20:] = 1.0
    picture = pixels(figures.panel(half, half, half, tmp_path / "panel.png"))
    truth = np.array_split(picture, 3, axis=1)[1]
    height, width = truth.shape[:2]
    assert (truth[height // 2, width // 4] < 10).all()
    assert (truth[height // 2, 3 * width // 4] > 245).all()


def test_a_panel_shows_numbered_instances_in_colours_and_masks_in_gray():
    labels = np.zeros((1, 8, 8), np.int32)
    labels[0, :3], labels[0, 5:] = 700, 30
    mask = (labels > 0).astype(np.uint8)
    for truth, coloured in ((labels, True), (mask, False), (mask * 255, False)):
        figure = figures.draw_panel(mask * 7, truth, truth)
        shown = [axes.get_images()[0] for axes in figure.axes]
        assert [image.cmap.name == "gray" for image in shown] == [True, not coloured, not coloured]


def test_a_panel_without_truth_has_two_columns_and_with_a_stack_a_row_per_section():
    figure = figures.draw_panel(noisy((3, 32, 32)), None, np.zeros((3, 32, 32)), titles=["raw", "ours"])
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes] == ["raw", "ours", "", "", "", ""]


@pytest.mark.parametrize("titles", [None, ["one"]])
def test_a_panel_of_what_does_not_belong_together_is_refused(titles):
    prediction = np.zeros((8, 9 if titles is None else 8))
    with pytest.raises(ValueError, match=r"one shape and a title for each\. Received: .*8"):
        figures.draw_panel(np.zeros((8, 8)), None, prediction, titles=titles)


def test_a_weight_map_shows_the_weights_on_a_scale_beside_image_and_instances():
    weights, labels = np.linspace(1, 12, 64 * 64).reshape(64, 64), disc().astype(int) * 7
    figure = figures.draw_weight_map(weights, image=noisy((64, 64)), labels=labels)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "instances", "weight in the loss"]
    shown = figure.axes[2].images[0]
    np.testing.assert_array_equal(shown.get_array(), weights)
    assert figure.axes[3].get_ylim() == pytest.approx((1, 12)), "the colour bar"
    instances = figure.axes[1].images[0].get_array()
    assert (instances[labels == 0] == 0).all()
    assert (instances[labels > 0] > 0).all()
    assert len(figures.draw_weight_map(weights).axes) == 2
    with pytest.raises(ValueError, match=r"one shape \(H, W\)\. Received: \[\(64, 64\), \(8, 8\)\]"):
        figures.draw_weight_map(weights, image=np.zeros((8, 8)))


def test_neighbouring_instances_differ_in_colour_and_none_has_the_background_s():
    labels = np.arange(12).reshape(1, 12)
    shown = figures.draw_weight_map(np.ones((1, 12)), labels=labels).axes[0].images[0]
    colours = [tuple(colour) for colour in shown.cmap(shown.norm(shown.get_array()))[0]]
    assert colours[0][:3] == (1, 1, 1)
    assert colours[0] not in colours[1:]
    assert all(one != other for one, other in pairwise(colours))


def test_an_animation_runs_through_the_stack_sections_left_masks_right(tmp_path):
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    sections = [np.full((64, 64), 100 * (i + 1), np.uint16) for i in range(4)]
    masks = [np.roll(ramp, 16 * i, axis=1) for i in range(4)]
    path = figures.animation(sections, masks, tmp_path / "train.gif", height=64, frame_ms=150)
    with Image.open(path) as gif:
        assert gif.n_frames == 4
        assert gif.size == (132, 64)
        assert gif.info["duration"] == 150
        assert gif.info["loop"] == 0
        for index in range(4):
            gif.seek(index)
            frame = np.asarray(gif.convert("L")).astype(float)
            assert frame[:, :64].std() == 0
            assert abs(frame[0, 0] - 85 * index) < 4
            assert (frame[:, 64:68] == 255).all()
            assert np.abs(frame[:, 68:] - masks[index] * 255).max() < 5


def test_an_animation_of_thirty_noisy_sections_stays_below_two_and_a_half_megabytes(tmp_path):
    sections = noisy((30, 512, 512))
    path = figures.animation(sections, noisy((30, 512, 512)), tmp_path / "train.gif")
    assert 300_000 < path.stat().st_size <= 2_500_000
    assert pixels(path).shape == (256, 516, 3)


def test_an_animation_of_unequal_stacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be equally many, one at least\. Received: 2 and 1"):
        figures.animation([disc()] * 2, [disc()], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"Received: 0 and 0"):
        figures.animation([], [], tmp_path / "a.gif")


def test_a_few_hot_pixels_do_not_darken_the_section():
    section = noisy((64, 64), np.float32)
    section[5, 5] = 1e6
    image = figures.draw_panel(section, None, disc()).axes[0].images[0]
    low, high = image.get_clim()
    assert 0 <= low < 10
    assert 245 < high < 256


def test_figures_leave_matplotlib_s_global_state_alone(tmp_path):
    probe = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy(); import figures;"
        "figures.curves({'loss': [1.0, 0.5]}, sys.argv[1]);"
        "figures.panel([[0, 1], [1, 0]], None, [[0, 1], [1, 0]], sys.argv[1]);"
        "print(before == matplotlib.rcParams.copy(), 'matplotlib.pyplot' in sys.modules)"
    )
    run = [sys.executable, "-W", "error", "-c", probe, str(tmp_path / "picture.png")]
    done = subprocess.run(run, cwd=HOUSE, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_importing_figures_loads_neither_matplotlib_nor_a_network_library():
    heavy = ["keras", "tensorflow", "jax", "torch", "scipy", "matplotlib", "PIL"]
    probe = f"import sys, figures; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], cwd=HOUSE, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# -- the command line -------------------------------------------------------------------------------------------

START = HOUSE / "results" / "start"
SETTINGS = {"lr": 1e-5, "max_lr": 1e-2, "step_size": 20, "clr_gamma": 0.99, "steps_per_epoch": 10}
HISTORY_CSV = "epoch,update,learning_rate,loss,dice,val_loss,val_dice\n1,10,0.005,0.5,0.8,,\n"


@pytest.fixture
def draw(capsys):
    """Calls the command line in this process: exit code, stdout, stderr."""

    def call(*words):
        capsys.readouterr()
        try:
            code = figures.main([str(word) for word in words])
        except SystemExit as stop:  # argparse's way out
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that are saved while a test runs."""
    found, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: found.append(figure) or save(figure, path))
    return found


def write_stack(path, sections):
    import tifffile

    tifffile.imwrite(path, sections, photometric="minisblack")
    return path


def write_run(folder, history=HISTORY_CSV, **record):
    folder.mkdir()
    (folder / "history.csv").write_text(history)
    (folder / "run.json").write_text(json.dumps({"epochs": 5, "settings": SETTINGS | {"clr_mode": "none"}} | record))
    return folder


def test_animate_shows_every_nth_section_beside_its_mask(small, tmp_path, draw):
    import tifffile

    gif = tmp_path / "train.gif"
    stacks = ("--image_path", small / "images.tif", "--mask_path", small / "labels.tif")
    code, out, err = draw("animate", *stacks, "--output", gif, "--side", 64, "--every", 3)
    assert (code, err) == (0, "")
    assert out.startswith(f"{gif}: ")
    labels = tifffile.imread(small / "labels.tif")[::3]
    with Image.open(gif) as image:
        assert (image.n_frames, image.size) == (4, (164, 64))
        for index, mask in enumerate(labels):
            image.seek(index)
            np.testing.assert_array_equal(np.asarray(image.convert("L"))[:, 84:], mask)


def test_animate_takes_the_challenges_files_of_a_folder_and_with_test_the_test_stack(tmp_path, draw):
    gray = {"train-volume.tif": 0, "train-labels.tif": 255, "test-volume.tif": 0, "test-labels.tif": 0}
    for name, value in gray.items():
        write_stack(tmp_path / name, np.full((2, 32, 32), value, np.uint8))
    probabilities = write_stack(tmp_path / "prediction.tif", np.full((2, 32, 32), 0.5, np.float32))
    for words, expected in (((tmp_path,), 255), ((tmp_path, "--test"), 0), ((probabilities, "--test"), 128)):
        gif = tmp_path / "picture.gif"
        assert draw("animate", "--image_path", tmp_path, "--mask_path", *words, "--output", gif)[0] == 0
        assert abs(int(pixels(gif)[128, -1, 0]) - expected) <= 4


def test_a_one_bit_mask_is_shown(tmp_path, draw):
    mask = write_stack(tmp_path / "mask.tif", np.stack([disc(), 1 - disc()]).astype(bool))
    gif = tmp_path / "picture.gif"
    assert draw("animate", "--image_path", mask, "--mask_path", mask, "--output", gif, "--side", 64)[0] == 0
    np.testing.assert_array_equal(pixels(gif)[:, 68:, 0], disc() * 255)


def test_the_challenges_files_are_those_that_the_suite_fetches():
    from files import fetching

    roles = {"image": ("--image_path", False), "mask": ("--mask_path", False)}
    roles |= {"test": ("--image_path", True), "test_mask": ("--mask_path", True)}
    assert {roles[role]: name for role, name in fetching.ISBI_ROLES.items()} == figures.CHALLENGE_FILES


def test_the_training_stack_of_isbi_2012_fits_into_two_and_a_half_megabytes(isbi, tmp_path, draw):
    gif = tmp_path / "train.gif"
    assert draw("animate", "--image_path", isbi, "--mask_path", isbi, "--output", gif)[0] == 0
    assert gif.stat().st_size <= 2_500_000
    with Image.open(gif) as image:
        assert (image.n_frames, image.size) == (30, (516, 256))


def test_curves_of_a_run_folder_are_those_of_its_history(tmp_path, draw, drawn):
    for typed in (START, START / "history.csv"):
        assert draw("curves", typed, "--output", tmp_path / f"{typed.name}.png")[0] == 0
    assert (tmp_path / "start.png").read_bytes() == (tmp_path / "history.csv.png").read_bytes()
    loss, dice, rate = drawn[0].axes
    assert [list(lines(axes)) for axes in (loss, dice)] == [["training"], ["training"]]
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), [1, 2, 3, 4, 5])
    assert loss.lines[0].get_ydata()[-1] == 0.30285629630088806
    assert rate.lines[0].get_ydata()[-1] == 1e-5


def test_curves_of_several_runs_are_compared_by_quantity(tmp_path, draw, drawn):
    validated = "epoch,loss,dice,val_loss,val_dice\n1,0.5,0.8,0.6,0.7\n2,0.4,0.9,0.5,0.8\n"
    runs = write_run(tmp_path / "plain"), write_run(tmp_path / "validated", validated)
    assert draw("curves", *runs, "--output", tmp_path / "curves.png")[0] == 0
    panels = {axes.get_title(loc="left"): lines(axes) for axes in drawn[0].axes}
    assert {title: list(found) for title, found in panels.items()} == {
        "training loss": ["plain", "validated"],
        "validation loss": ["validated"],
        "training Dice": ["plain", "validated"],
        "validation Dice": ["validated"],
    }
    np.testing.assert_array_equal(panels["training loss"]["plain"].get_xydata(), [[1, 0.5]])
    np.testing.assert_array_equal(panels["validation Dice"]["validated"].get_xydata(), [[1, 0.7], [2, 0.8]])


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path, draw, drawn):
    (tmp_path / "a").mkdir()
    runs = write_run(tmp_path / "run"), write_run(tmp_path / "a" / "run")
    assert draw("curves", *runs, "--output", tmp_path / "curves.png")[0] == 0
    assert list(lines(drawn[0].axes[0])) == [f"{tmp_path.name}/run", "a/run"]


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range", "cosine", "none"])
@pytest.mark.parametrize("epochs", [1, 7])
def test_the_rates_of_the_settings_are_those_that_train(mode, epochs):
    from train.run import course_of

    settings = SETTINGS | {"clr_mode": mode}
    rate = course_of(SimpleNamespace(**settings, epochs=epochs, batch_size=1, patience=0)).rate
    expected = [rate(update) for update in range(epochs * settings["steps_per_epoch"])]
    rates = figures.scheduled_rates({"epochs": epochs, "settings": settings})
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    stopped = {"epochs": epochs, "settings": settings, "final": {"update": 6}}
    np.testing.assert_allclose(figures.scheduled_rates(stopped), expected[:6], rtol=1e-12)


def test_the_learning_rate_of_a_run_goes_through_what_its_history_recorded(tmp_path, draw, drawn):
    for typed in (START, START / "run.json"):
        assert draw("learning_rate", typed, "--output", tmp_path / "rate.png")[0] == 0
        (axes,) = drawn.pop().axes
        assert axes.get_title(loc="left") == "cosine, from 0.0015 down to 1e-05"
        rates = lines(axes)["schedule"].get_ydata()
        updates, recorded = lines(axes)["recorded at the end of an epoch"].get_data()
        np.testing.assert_array_equal(updates, [100, 200, 300, 400, 500])
        np.testing.assert_allclose(rates[updates.astype(int) - 1], recorded, rtol=1e-12)


def test_a_record_without_its_history_gives_the_schedule_alone(tmp_path, draw, drawn):
    shutil.copy(START / "run.json", tmp_path / "record.json")
    (tmp_path / "history.csv").write_text("update,learning_rate\n1,7\n")  # of another run
    assert draw("learning_rate", tmp_path / "record.json", "--output", tmp_path / "rate.png")[0] == 0
    assert list(lines(drawn[0].axes[0])) == ["schedule"]


@pytest.mark.parametrize(
    ("mode", "words"),
    [("triangular", "triangular, 1e-05 to 0.01, half a cycle is 20 updates"), ("none", "constant, 1e-05")],
)
def test_the_schedule_is_named(mode, words, tmp_path, draw, drawn):
    run = write_run(tmp_path / "run", settings=SETTINGS | {"clr_mode": mode})
    assert draw("learning_rate", run, "--output", tmp_path / "rate.png")[0] == 0
    assert drawn[0].axes[0].get_title(loc="left") == words


PAIR = ("--image_path", "images.tif", "--mask_path")
REFUSED = {
    "no verb": ((), "the following arguments are required: VERB"),
    "not a gif": (("animate", *PAIR, "images.tif", "--output", "a.png"), "--output: must be a .gif file in an exist"),
    "no folder": (("curves", "run", "--output", "no/a.png"), "must be a .png file in an existing folder. Received: no"),
    "a folder": (("curves", "run", "--output", "folder.png"), "must be a .png file in an existing folder"),
    "side": (("animate", *PAIR, "images.tif", "--output", "a.gif", "--side", "9"), "at least 16. Received: 9"),
    "every": (("animate", *PAIR, "images.tif", "--output", "a.gif", "--every", "x"), "at least 1. Received: x"),
    "a name": (("animate", *PAIR, "isbi2012", "--output", "a.gif"), "--mask_path: isbi2012 does not exist; `python"),
    "bare folder": (("animate", *PAIR, "run", "--output", "a.gif"), "train-labels.tif does not exist"),
    "not a TIFF": (("animate", *PAIR, "run/run.json", "--output", "a.gif"), "is no TIFF file, or is damaged"),
    "cut off": (("animate", *PAIR, "cut.tif", "--output", "a.gif"), "cut.tif is no TIFF file, or is damaged"),
    "colours": (("animate", *PAIR, "rgb.tif", "--output", "a.gif"), "must hold gray sections of finite numbers. Rec"),
    "NaN": (("animate", *PAIR, "nan.tif", "--output", "a.gif"), "must hold gray sections of finite numbers. Rec"),
    "labels": (("animate", *PAIR, "cells.tif", "--output", "a.gif"), "must hold 0..1 or 0..255. Received: 0..999"),
    "count": (("animate", *PAIR, "one.tif", "--output", "a.gif"), "(2, 32, 32). Received: (1, 32, 32)"),
    "no run": (("curves", "nothing", "--output", "a.png"), "nothing does not exist: give a run folder, or its history"),
    "no record": (("learning_rate", "folder.png", "--output", "a.png"), "run.json does not exist: give a run folder"),
    "no numbers": (("curves", "text.csv", "--output", "a.png"), "text.csv must be a history: a line of column names"),
    "uneven": (("curves", "uneven.csv", "--output", "a.png"), "uneven.csv must be a history"),
    "empty": (("curves", "empty.csv", "--output", "a.png"), "empty.csv must be a history"),
    "binary": (("curves", "images.tif", "--output", "a.png"), "images.tif must be a history"),
    "other columns": (("curves", "other.csv", "--output", "a.png"), "must hold a loss, Dice or rate of an epoch"),
    "two of them": (("curves", "other.csv", "other.csv", "--output", "a.png"), "must hold a loss or Dice of an epoch"),
    "not JSON": (("learning_rate", "text.csv", "--output", "a.png"), "text.csv must be a run record"),
    "of weights": (("learning_rate", "weights.json", "--output", "a.png"), "weights.json must be a run record"),
    "a list": (("learning_rate", "list.json", "--output", "a.png"), "list.json must be a run record"),
    "no updates": (("learning_rate", "none.json", "--output", "a.png"), "at least one update. Received: 0"),
}


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    """A folder, which is the current one, with files that cannot be drawn."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "folder.png").mkdir()
    stacks = {"images": noisy((2, 32, 32)), "one": noisy((1, 32, 32)), "rgb": noisy((2, 32, 32, 3))}
    stacks |= {"nan": np.full((2, 32, 32), np.nan, np.float32), "cells": np.zeros((2, 32, 32), np.uint16)}
    stacks["cells"][0, 0, 0] = 999
    for name, sections in stacks.items():
        write_stack(tmp_path / f"{name}.tif", sections)
    (tmp_path / "cut.tif").write_bytes((tmp_path / "images.tif").read_bytes()[:1500])
    texts = {"text.csv": "loss\nhigh\n", "uneven.csv": "loss,dice\n1,2\n3\n", "empty.csv": "", "other.csv": "a\n1\n"}
    texts |= {"weights.json": '{"format": "weights"}', "list.json": "[]"}
    texts["none.json"] = json.dumps({"epochs": 0, "settings": SETTINGS | {"clr_mode": "triangular"}})
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(name, bad_files, draw):
    words, said = REFUSED[name]
    before = sorted(bad_files.rglob("*"))
    code, out, err = draw(*words)
    assert (code, out) == (2, "")
    assert err.startswith("figures.py")
    assert err.count("\n") == 1
    assert said in err
    assert sorted(bad_files.rglob("*")) == before


def test_it_runs_as_a_script(tmp_path):
    run = [sys.executable, "figures.py", "learning_rate", START, "--output", tmp_path / "rate.png"]
    done = subprocess.run(run, cwd=HOUSE, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'rate.png'}: 0.0")
