"""What the figures show is what they were given; files are whole, small and written beside their place."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

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


def test_an_animation_of_thirty_noisy_sections_stays_below_three_megabytes(tmp_path):
    sections = noisy((30, 512, 512))
    path = figures.animation(sections, noisy((30, 512, 512)), tmp_path / "train.gif")
    assert 300_000 < path.stat().st_size <= 3_000_000
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
