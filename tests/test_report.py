"""The report: one page that holds all it shows, worst section first, and the same figures as PNG."""

import re
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
import tifffile
from conftest import cases
from scipy import ndimage

from score import evaluation, report, scores, segments


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
def written(labelled, tmp_path_factory):
    """A report with raw sections: its folder, and its page."""
    prediction, truth = (stack[1:] for stack in labelled)
    result = evaluation.score_arrays(prediction, truth, tuple(evaluation.SCORES), sections=range(1, 6))
    result |= {"prediction": "<script>.tif", "mask_path": "a&b"}
    path = report.write(tmp_path_factory.mktemp("report") / "out", result, prediction, truth, prediction * 200)
    return path.parent, path.read_text(encoding="utf-8")


def test_the_report_needs_no_network_escapes_names_and_says_what_every_picture_shows(written):
    page = Page(written[1])
    assert page.open == []
    sources = [attrs["src"] for tag, attrs in page.tags if "src" in attrs]
    assert len(sources) == 3 + 5 * 4
    assert all(source.startswith("data:image/") for source in sources)
    assert not [tag for tag, _ in page.tags if tag in ("link", "script", "iframe")]
    assert all(attrs["href"].startswith("#") for tag, attrs in page.tags if "href" in attrs)
    assert not re.search(r"https?:|url\(|@import", re.sub(r'src="[^"]*"', "", written[1]))
    assert "&lt;script&gt;.tif against a&amp;b" in written[1]
    alts = [attrs["alt"] for tag, attrs in Page(written[1]).tags if tag == "img"]
    assert all(len(alt) > 15 for alt in alts)
    assert sum("cells split" in alt for alt in alts) == 5


def test_the_worst_section_comes_first_with_the_numbers_of_the_table_and_png_beside(written, labelled):
    curve = scores.v_rand(labelled[0][1:], labelled[1][1:])
    order = [int(number) for number in re.findall(r'<section id="s(\d+)"', written[1])]
    assert order == [1 + int(k) for k in np.argsort(curve.per_section)]
    assert f"<td>{curve.value:.5f}</td>" in written[1]
    for score in evaluation.SCORES.values():
        assert f"<dt>{report.title(score)}</dt>" in written[1]
    names = sorted(path.name for path in written[0].iterdir())
    sheets = [f"section-{k:03d}.png" for k in range(1, 6)]
    assert names == ["curves-errors.png", "curves-scores.png", "curves-warping.png", "report.html", *sheets]
    for path in written[0].glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_marks_differ_by_more_than_colour():
    blank, painted = np.zeros((30, 30), bool), []
    for name in ("splits", "mergers", "missed"):
        maps = segments.Maps(blank, blank, blank, blank)._replace(**{name: ~blank})
        gray = report.paint(blank, maps)[10:50, 10:50].mean(axis=-1)
        painted.append(gray > np.median(gray))
    assert all((one != other).any() for one, other in combinations(painted, 2))


@pytest.mark.parametrize(("which", "charts"), [(("dice",), 0), (("v_rand",), 1), (("bce",), 0)])
def test_a_report_of_any_scores_without_raw_and_with_an_empty_section_is_a_page_too(which, charts, labelled, tmp_path):
    prediction, truth = (stack[:2].copy() for stack in labelled)
    truth[1] = 0
    result = evaluation.score_arrays(prediction, truth, which)
    page = report.write(tmp_path / "r", result, prediction, truth).read_text()
    assert (page.count("<figure>"), len(list((tmp_path / "r").glob("curves*")))) == (2 * 3 + charts, charts)


def test_pictures_larger_than_a_webp_are_png(tmp_path):
    prediction = np.random.default_rng(0).random((1, 8, 8200), np.float32)
    result = evaluation.score_arrays(prediction, (prediction > 0.3).astype(np.uint8), ("dice",))
    page = report.write(tmp_path / "r", result, prediction, (prediction > 0.3).astype(np.uint8)).read_text()
    assert re.findall('src="data:image/([a-z]+).*?width="([0-9]+)"', page) == [
        ("png", "8200"),
        ("webp", "8200"),
        ("png", "16400"),
    ]


@pytest.mark.slow
def test_the_report_of_six_real_sections_stays_small(isbi, tmp_path):
    labels = tifffile.imread(isbi / "train-labels.tif")[24:]
    raw = tifffile.imread(isbi / "train-volume.tif")[24:]
    proposal = np.stack([ndimage.gaussian_filter(s.astype(np.float32) / 255, 2) for s in raw])
    result = evaluation.score_arrays(proposal, labels, ("v_rand", "v_info", "pixel_error"), sections=range(24, 30))
    assert report.write(tmp_path, result, proposal, labels, raw).stat().st_size < 8e6


def test_errors_are_counted_and_coloured_at_the_best_threshold():
    """Two cells joined, one cut up by a wall of 0.6; two that only what is not labelled joins."""
    reference, prediction = np.zeros((40, 72), np.int8), np.zeros((40, 72), np.float32)
    for left in (2, 17, 36):
        reference[4:36, left : left + 14] = 1
    reference[4:36, 54:70] = 1
    reference[18:22, 50:] = -1
    prediction[reference != 0] = 0.9
    prediction[4:36, 16] = 0.9
    prediction[18:21, 36:50] = 0.6
    picture, words = report.section_pictures({"best_thresholds": {"v_rand": 0.7}}, prediction, reference)["Errors"]
    assert "at threshold 0.7" in words
    assert "1 cells split, 2 cells merged" in words
    for column, (more, less) in ((8, (0, 2)), (42, (2, 0))):  # orange is joined, blue is cut up
        found = picture[10:70, 2 * column : 2 * column + 2].mean(axis=(0, 1))
        assert found[more] > found[less] + 20, column


@cases("name, values", ("v_rand", [0.9, None, 0.1]), ("bce", [0.1, None, 0.9]))
def test_the_worst_section_is_the_first_and_one_without_a_value_the_last(name, values):
    assert report.worst_first({"per_section": {name: values}}) == [2, 0, 1]
