"""The `evaluate` verb: what it reads and refuses, what it says, and what it writes."""

import argparse
import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import tifffile
from scipy import ndimage

import data
from score import evaluation, report, scores


@pytest.fixture(scope="module")
def stack():
    """Six labelled sections with crooked cells, and a proposal that is good, worse in section 4."""
    rng = np.random.default_rng(7)
    truth = np.zeros((6, 64, 80), np.uint8)
    for section in truth:
        height = ndimage.gaussian_filter(rng.normal(size=section.shape), 5)
        section[:] = 255 * (np.abs(height) > 0.25 * height.std())
    proposal = ndimage.gaussian_filter(truth / 255.0, (0, 1, 1)) + rng.normal(0, 0.05, truth.shape)
    proposal[4] = 0.5 * proposal[4] + 0.4
    return np.clip(proposal, 0, 1).astype(np.float32), truth


@pytest.fixture
def files(tmp_path, stack):
    """Write the stack; `files(prediction, labels)` writes others. Returns their flags."""

    def write(prediction=stack[0], labels=stack[1]):
        tifffile.imwrite(tmp_path / "p.tif", prediction)
        tifffile.imwrite(tmp_path / "l.tif", labels)
        return ["--prediction", str(tmp_path / "p.tif"), "--mask_path", str(tmp_path / "l.tif")]

    return write


def evaluate(flags):
    parser = argparse.ArgumentParser()
    evaluation.add_arguments(parser)
    return evaluation.run(parser.parse_args([str(flag) for flag in flags]))


def numbers(flags, tmp_path):
    evaluate([*flags, "--json", tmp_path / "s.json", "--force"])
    return json.loads((tmp_path / "s.json").read_text())


# --- scores


def test_json_holds_a_number_for_every_default_score_and_not_the_slow_one(files, stack, tmp_path):
    found = numbers(files(), tmp_path)
    assert {"v_rand", "v_info", "rand_error", "pixel_error", "dice", "iou"} <= set(found)
    assert all(isinstance(found[name], float) for name in evaluation.DEFAULT_SCORES)
    assert "warping_error" not in found
    assert found["sections"] == [0, 1, 2, 3, 4, 5]
    assert found["thresholds"] == list(scores.THRESHOLDS)
    curve = scores.v_scores(*stack)["v_rand"]
    assert found["v_rand"] == curve.value
    assert found["best_thresholds"]["v_rand"] == curve.threshold
    assert found["curves"]["v_rand"] == curve.curve.tolist()
    assert found["per_section"]["v_rand"] == curve.per_section.tolist()


def test_all_adds_the_warping_error_with_its_splits_and_mergers(files, stack, tmp_path):
    found = numbers([*files(), "--scores", "all"], tmp_path)
    expected = scores.warping_error(*stack)
    assert found["warping_error"] == expected.value
    assert found["details"]["warping_error"]["splits"] == expected.details["splits"].tolist()


def test_a_list_of_scores_gives_these_alone(files, tmp_path):
    found = numbers([*files(), "--scores", "iou, v_rand"], tmp_path)
    assert set(found) & set(evaluation.SCORES) == {"iou", "v_rand"}


@pytest.mark.parametrize("wrong", ["dise", "v_rand,", ""])
def test_unknown_scores_are_named(files, wrong):
    if wrong:
        with pytest.raises(data.DataError, match="--scores must be"):
            evaluate([*files(), "--scores", wrong])
    else:
        assert evaluation.parse_scores("") == evaluation.DEFAULT_SCORES


def test_pooled_scores_divide_once(stack):
    found = evaluation.score_arrays(*stack, which=("dice", "iou", "precision", "recall", "bce", "ece"))
    proposal, truth = stack[0] > 0.5, stack[1] > 0
    both = (proposal & truth).sum()
    assert found["dice"] == pytest.approx(2 * both / (proposal.sum() + truth.sum()))
    assert found["iou"] == pytest.approx(both / (proposal | truth).sum())
    assert found["precision"] == pytest.approx(both / proposal.sum())
    assert found["recall"] == pytest.approx(both / truth.sum())
    assert found["bce"] == pytest.approx(scores.bce(*stack), rel=1e-9)
    assert found["ece"] == pytest.approx(scores.calibration(*stack).ece)
    assert sum(found["calibration"]["pixels"]) == truth.size


def test_a_section_without_interior_has_no_value_and_the_others_still_count(stack):
    truth = stack[1].copy()
    truth[2] = 0
    found = evaluation.score_arrays(stack[0], truth)
    assert found["per_section"]["v_rand"][2] is None
    assert found["v_rand"] == evaluation.score_arrays(np.delete(stack[0], 2, 0), np.delete(truth, 2, 0))["v_rand"]
    json.dumps(found, allow_nan=False)


# --- sections


def test_sections_are_taken_of_both_where_both_are_whole(files, stack, tmp_path, capsys):
    found = numbers([*files(), "--sections", "1,3-4", "--scores", "v_rand"], tmp_path)
    assert found["sections"] == [1, 3, 4]
    assert found["v_rand"] == scores.v_rand(stack[0][[1, 3, 4]], stack[1][[1, 3, 4]]).value
    assert "taken to be" not in capsys.readouterr().out


def test_a_prediction_of_the_sections_alone_is_matched_to_them_out_loud(files, stack, tmp_path, capsys):
    found = numbers([*files(stack[0][3:5]), "--sections", "3-4", "--scores", "v_rand"], tmp_path)
    assert found["v_rand"] == scores.v_rand(stack[0][3:5], stack[1][3:5]).value
    assert "its 2 sections are taken to be sections 3-4 of the labels" in capsys.readouterr().out


def test_sections_that_do_not_fit_are_refused(files, stack):
    with pytest.raises(data.DataError, match="--sections must lie in 0-5"):
        evaluate([*files(), "--sections", "5-6"])
    with pytest.raises(data.DataError, match=r"as many sections.*2, 6 and 6"):
        evaluate(files(stack[0][:2]))
    with pytest.raises(data.DataError, match=r"same section size.*64 x 79 and 64 x 80"):
        evaluate(files(stack[0][:, :, :79]))


# --- what a prediction may be


@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 65535)])
def test_scaled_integers_score_like_their_probabilities(files, stack, tmp_path, capsys, dtype, full):
    scaled = np.round(stack[0] * full).astype(dtype)
    found = numbers(files(scaled), tmp_path)
    expected = evaluation.score_arrays(scaled.astype(np.float32) / np.float32(full), stack[1])
    assert found["v_rand"] == expected["v_rand"]
    assert found["bce"] == expected["bce"]
    assert f"divided by {full}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "one"), [(np.uint8, 1), (np.uint8, 255), (np.uint16, 65535), (np.uint16, 1), (bool, 1)]
)
def test_masks_are_masks_whatever_their_one_is_and_flat_curves_are_warned_of(stack, dtype, one):
    mask = ((stack[0] > 0.5) * np.array(one)).astype(dtype)
    found, words = evaluation.to_probabilities(mask)
    assert found.dtype == np.float32
    assert (found == (stack[0] > 0.5)).all()
    assert "a mask" in words
    assert any("every threshold" in w for w in evaluation.warnings_about(found, stack[1]))


def test_probabilities_are_warned_of_neither(stack):
    assert evaluation.warnings_about(*stack) == []


@pytest.mark.parametrize(
    "wrong",
    [
        np.array([[[0.0, 1.5]]], np.float32),
        np.array([[[-0.1, 1.0]]], np.float64),
        np.array([[[0.5, np.nan]]], np.float32),
        np.array([[[0, 1, 2, 7]]], np.uint16),
        np.array([[[0, 1, 2]]], np.int32),
    ],
)
def test_values_out_of_range_are_refused_in_one_sentence(wrong):
    with pytest.raises(data.DataError, match=r"^--prediction .*Received: .*\S") as caught:
        evaluation.to_probabilities(wrong)
    assert "\n" not in str(caught.value)


def test_an_inverted_prediction_is_warned_of(files, stack, capsys):
    evaluate([*files(1 - stack[0]), "--scores", "dice"])
    assert "looks inverted" in capsys.readouterr().err
    evaluate([*files(), "--scores", "dice"])
    assert "looks inverted" not in capsys.readouterr().err


def test_invert_mask_turns_the_labels(files, stack, tmp_path):
    found = numbers([*files(labels=255 - stack[1]), "--invert_mask"], tmp_path)
    assert found["v_rand"] == scores.v_rand(*stack).value


def test_correlation_is_pearsons(stack):
    expected = np.corrcoef(stack[0].ravel(), stack[1].ravel() > 0)[0, 1]
    assert evaluation.correlation(*stack) == pytest.approx(expected)
    assert evaluation.correlation(np.ones((1, 4, 4)), stack[1][:1, :4, :4]) == 0


# --- output


def test_the_table_shows_value_threshold_and_published_results(files, capsys, stack):
    evaluate([*files(), "--sections", "2-5", "--scores", "all"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("V_rand"))
    curve = scores.v_rand(stack[0][2:], stack[1][2:])
    assert re.search(rf"V_rand +{curve.value:.5f} +higher +{curve.threshold:.1f} .* 0.97276 +0.98680 \(SFCNNs\)", row)
    assert any(line.startswith("Warping error") and "0.000353" in line for line in lines)
    assert "4 sections: 2-5" in lines
    assert any("TEST stack" in line for line in lines)


def test_published_boards_go_from_best_to_worst():
    for name, board in report.PUBLISHED.items():
        ordered = sorted(board.values(), reverse=evaluation.SCORES[name].higher_is_better)
        assert list(board.values()) == ordered, name


def test_existing_files_are_refused_before_anything_is_read(tmp_path):
    (tmp_path / "s.json").write_text("old")
    (tmp_path / "report.html").write_text("old")
    missing = ["--prediction", "nowhere.tif", "--mask_path", "nowhere.tif"]
    for flag in (["--json", tmp_path / "s.json"], ["--report", tmp_path]):
        with pytest.raises(data.DataError, match="exists already"):
            evaluate([*missing, *flag])
    with pytest.raises(data.DataError, match="must be a folder"):
        evaluate([*missing, "--report", tmp_path / "s.json"])
    assert (tmp_path / "s.json").read_text() == "old"


def test_flags_name_their_defaults():
    parser = argparse.ArgumentParser()
    evaluation.add_arguments(parser)
    words = " ".join(parser.format_help().split())
    for flag in ("--sections", "--scores", "--json", "--report", "--image_path", "--force"):
        assert "default" in words.split(f" {flag} ", 2)[-1].split(" --", 1)[0], flag


# --- report


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(stack, tmp_path_factory):
    """A report with raw sections, and its page."""
    folder = tmp_path_factory.mktemp("report")
    for name, array in (("p", stack[0]), ("l", stack[1]), ("r", (stack[0] * 200).astype(np.uint8))):
        tifffile.imwrite(folder / f"{name}.tif", array)
    flags = [
        "--prediction",
        folder / "p.tif",
        "--mask_path",
        folder / "l.tif",
        "--image_path",
        folder / "r.tif",
    ]
    evaluate([*flags, "--sections", "1-5", "--scores", "all", "--report", folder / "out"])
    return folder / "out", (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_the_report_needs_no_network(written):
    page = Page(written[1])
    assert page.open == []
    sources = [attrs["src"] for tag, attrs in page.tags if "src" in attrs]
    assert len(sources) == 3 + 5 * 4
    assert all(source.startswith("data:image/") for source in sources)
    assert not [attrs for tag, attrs in page.tags if tag in ("link", "script", "iframe")]
    assert all(attrs["href"].startswith("#") for tag, attrs in page.tags if "href" in attrs)
    outside_pictures = re.sub(r'src="[^"]*"', "", written[1])
    assert not re.search(r"https?:|url\(|@import", outside_pictures)


def test_every_picture_says_what_it_shows(written):
    alts = [attrs["alt"] for tag, attrs in Page(written[1]).tags if tag == "img"]
    assert all(len(alt) > 15 for alt in alts)
    assert sum("cells split" in alt for alt in alts) == 5


def test_the_worst_section_comes_first(written, stack):
    order = [int(n) for n in re.findall(r'<section id="s(\d+)"', written[1])]
    values = scores.v_rand(stack[0][1:], stack[1][1:]).per_section
    assert order == [1 + int(k) for k in np.argsort(values)]


def test_the_report_shows_the_numbers_of_the_table(written, stack):
    text = re.sub(r'src="[^"]*"', "", written[1])
    assert f"{scores.v_rand(stack[0][1:], stack[1][1:]).value:.5f}" in text
    for name in evaluation.SCORES:
        assert f"<dt>{report.title(evaluation.SCORES[name])}</dt>" in text


def test_the_figures_lie_beside_the_page_as_png(written):
    names = sorted(path.name for path in written[0].iterdir())
    sheets = [f"section-{k:03d}.png" for k in range(1, 6)]
    assert names == ["curves-errors.png", "curves-scores.png", "curves-warping.png", "report.html", *sheets]
    for path in written[0].glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_pictures_survive_the_embedding():
    mask = np.array([[0, 255], [255, 0]], np.uint8)
    kind, text = report._uri(mask).split(";base64,")
    assert kind == "data:image/png"
    assert base64.b64decode(text).startswith(b"\x89PNG")


def test_marks_differ_by_more_than_colour():
    one = np.zeros((30, 30), bool)
    painted = []
    for name in ("splits", "mergers", "missed"):
        maps = dict.fromkeys(("splits", "mergers", "missed", "cuts"), one) | {name: ~one}
        picture = report.paint(np.zeros((30, 30), np.uint8), argparse.Namespace(**maps)).astype(int)
        painted.append(picture[10:50, 10:50].mean(axis=-1) > np.median(picture[10:50, 10:50].mean(axis=-1)))
    for a in range(3):
        for b in range(a):
            assert (painted[a] != painted[b]).any()


def test_a_report_without_raw_or_curves_is_a_page_too(stack, tmp_path):
    result = evaluation.score_arrays(*stack, which=("dice",))
    page = report.write(tmp_path / "r", result, *stack).read_text()
    assert page.count("<figure>") == 6 * 3
    assert not list((tmp_path / "r").glob("curves*"))


def test_names_from_outside_are_escaped(stack, tmp_path):
    result = {"prediction": "<script>.tif", "mask_path": "a&b"} | evaluation.score_arrays(*stack, which=("iou",))
    page = report.write(tmp_path / "r", result, *stack).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;.tif against a&amp;b" in page


@pytest.mark.slow
def test_the_report_of_six_real_sections_stays_small(isbi, tmp_path):
    labels = tifffile.imread(isbi / "train-labels.tif")[24:]
    raw = tifffile.imread(isbi / "train-volume.tif")[24:]
    proposal = np.stack([ndimage.gaussian_filter(s.astype(np.float32) / 255, 2) for s in raw])
    result = evaluation.score_arrays(proposal, labels, ("v_rand", "v_info", "pixel_error"), sections=range(24, 30))
    assert report.write(tmp_path, result, proposal, labels, raw).stat().st_size < 8e6
