"""Scores against the reference scorer's own numbers, naive second implementations, and known answers."""

import os
import shutil
from collections import Counter, deque
from itertools import product
from math import log

import numpy as np
import pytest
import tifffile
from conftest import ROOT, cases, python
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from skimage import measure

from score import scores, segments

GOLDEN_SECTIONS = [0, 7, 14, 21, 26, 29]
CHALLENGE = ("v_rand", "v_info", "rand_error", "pixel_error")
SIX_DIGITS = 6e-7  # half a unit of the sixth digit, as the golden values are printed, and a little


def four(probabilities, references):
    """Return the four scores of the golden table."""
    curves = scores.v_scores(probabilities, references)
    curves |= {name: getattr(scores, name)(probabilities, references) for name in CHALLENGE[2:]}
    return [curves[name].value for name in CHALLENGE]


@pytest.fixture(scope="module")
def labels(isbi):
    return tifffile.imread(isbi / "train-labels.tif")


@pytest.fixture(scope="module")
def thick(labels):
    eroded = [ndimage.binary_erosion(labels[k] > 0, np.ones((5, 5)), border_value=1) for k in GOLDEN_SECTIONS]
    return np.array(eroded, np.float32)


VALUES = [0.0, 0.05, 0.1, 0.2, 0.30000001, 0.45, 0.5, 0.55, 0.7, 0.8, 0.9, 1.0]


def stacks(*count):
    """Interior probabilities and labels of small sections."""
    sizes = st.tuples(*(st.just(n) for n in count), st.integers(1, 7), st.integers(1, 8))
    probability, label = st.sampled_from(np.float32(VALUES).tolist()), st.sampled_from([0, 255, 255, 255])
    return sizes.flatmap(
        lambda size: st.tuples(arrays(np.float32, size, elements=probability), arrays(np.uint8, size, elements=label))
    )


def neighbours(p, shape, offsets=((0, -1), (-1, 0), (0, 1), (1, 0))):
    spots = [(p[0] + r, p[1] + c) for r, c in offsets]
    return [q for q in spots if 0 <= q[0] < shape[0] and 0 <= q[1] < shape[1]]


def naive_components(mask):
    """{pixel: label} of the 4-connected components."""
    labels = measure.label(mask, connectivity=1)
    return {(int(y), int(x)): int(labels[y, x]) for y, x in np.argwhere(labels)}


def naive_thinning(interior):
    """The thinning told once more with a dictionary: absent = unvisited, None = queued, 0 = dam."""
    shape = interior.shape
    state = dict(naive_components(interior))
    if not state:
        return dict.fromkeys(product(range(shape[0]), range(shape[1])), 1)
    queue = deque()
    for x in range(shape[1]):
        for y in range(shape[0]):
            if not interior[y, x] and any(interior[q] for q in neighbours((y, x), shape)):
                queue.append((y, x))
    state |= dict.fromkeys(queue)
    flag = None
    while queue:
        p = queue.popleft()
        for q in neighbours(p, shape):
            if q not in state:
                state[q] = None
                queue.append(q)
            elif state[q] is None:
                continue
            elif state[q] == 0:
                if state[p] is None:
                    state[p], flag = 0, True
            elif state[p] is None or (state[p] == 0 and flag):
                state[p] = state[q]
            elif state[p] > 0 and state[p] != state[q]:
                state[p], flag = 0, False
    return state


def singletons(truth, proposal):
    """Pairs (true label, proposed label) of the pixels inside; a dam pixel is a label of its own."""
    return [(truth[p], proposal.get(p, 0) or p) for p in truth]


def naive_pairs(pixels):
    """(AB, B, A) by going through every ordered pair of pixels, each with itself too."""
    together = [0, 0, 0]
    for (i, j), (k, m) in product(pixels, pixels):
        dam = isinstance(j, tuple) or isinstance(m, tuple)
        together[0] += j == m and (dam or i == k)
        together[1] += j == m
        together[2] += i == k
    return together


def naive_info(pixels):
    n = len(pixels)
    keys = zip(*[(i, j, (i, j)) for i, j in pixels], strict=True)
    truth, proposal, joint = (-sum(c / n * log(c / n) for c in Counter(key).values()) for key in keys)
    whole = truth + proposal
    return 2 * (whole - joint) / whole if whole > 1e-12 else 0.0


RING8 = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]


def naive_simple(image, p):
    """One white 4-connected component beside p in its 8-ring, and one black 8-connected one."""
    window = image[p[0] - 1 : p[0] + 2, p[1] - 1 : p[1] + 2].copy()
    black = ~window
    window[1, 1] = black[1, 1] = False
    white = naive_components(window)
    sides = {white[q] for q in ((0, 1), (1, 0), (1, 2), (2, 1)) if q in white}
    return len(sides) == 1 and measure.label(black, connectivity=2).max() == 1


def ring_objects(image, p):
    found = naive_components(image)
    return {found[q] for q in neighbours(p, image.shape, RING8) if q in found}


def naive_warping(probability, reference, threshold):
    """(splits, mergers): lists and sorts before each pass, relabels the section for every pixel judged."""
    proposal, image = np.pad(probability, 1), np.pad(reference > 0, 1)
    before = None
    while True:
        wrong = [
            (y, x)
            for x in range(image.shape[1])
            for y in range(image.shape[0])
            if image[y, x] != (float(proposal[y, x]) > threshold)
        ]
        if len(wrong) == before:
            break
        before = len(wrong)
        for p in sorted(wrong, key=lambda p: -np.float32(abs(float(proposal[p]) - threshold))):
            if naive_simple(image, p):
                image[p] = not image[p]
    splits = mergers = 0
    for p in wrong:
        objects = ring_objects(image, p)
        if not image[p]:
            mergers += len(objects) >= 2
        elif len(objects) >= 2:
            splits += 1
        elif len(objects) == 1:
            image[p] = False
            splits += len(ring_objects(image, p)) >= 2
            image[p] = True
    return splits, mergers


def same_thinning(interior):
    """Dams stand where they should, and each segment is one of the naive ones."""
    expected, found = naive_thinning(interior), segments.thin_borders(interior)
    pairs = {(int(found[p]), label) for p, label in expected.items()}
    assert all((one == 0) == (other == 0) for one, other in pairs)
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@settings(max_examples=150)
@given(stacks())
def test_thinning_equals_the_naive_one(pair):
    for t in (0.0, 0.1, 0.5):
        same_thinning(segments.above(pair[0], t))


@pytest.mark.parametrize("seed", range(6))
def test_thinning_equals_the_naive_one_where_wide_membranes_meet(seed):
    """Larger and with wider membranes than hypothesis draws, so that dams meet dams."""
    same_thinning(np.random.default_rng(seed).random((40, 50)) > 0.95)


@settings(max_examples=60)
@given(stacks(2))
def test_scores_of_pairs_equal_going_through_all_pairs(stack):
    probabilities, references = stack
    if not all((r > 0).any() for r in references):
        return
    rand, info, error = np.zeros((3, 11))
    for k, t in enumerate(scores.THRESHOLDS):
        sums = np.zeros(3)
        for p, r in zip(probabilities, references, strict=True):
            truth, interior = naive_components(r > 0), p.astype(float) > t
            pixels = singletons(truth, naive_thinning(interior))
            joint, proposal, reference = naive_pairs(pixels)
            rand[k] += joint / (proposal + reference)
            info[k] += naive_info(pixels) / 2
            sums += naive_pairs(singletons(truth, naive_components(interior)))
        error[k] = 1 - 2 * sums[0] / (sums[1] + sums[2])
    curves = scores.v_scores(probabilities, references) | {"error": scores.rand_error(probabilities, references)}
    for curve, expected in zip(curves.values(), (rand, info, error), strict=True):
        np.testing.assert_allclose(curve.curve, expected, atol=1e-9)
    assert curves["v_rand"].value == max(rand)


@settings(max_examples=150)
@given(stacks())
def test_warping_equals_the_naive_one(pair):
    probability, reference = pair
    for t in (0.0, 0.30000000000000004, 0.5):
        splits, mergers = segments.topology_errors(probability, reference, t)
        assert (splits.sum(), mergers.sum()) == naive_warping(probability, reference, t)


def test_the_reference_scorers_tiny_case_and_thresholds_that_accumulate_and_compare_in_double():
    t = np.full((2, 8, 10), 255, np.uint8)
    t[0, :, 4] = 0
    t[0, 3, 5:] = 0
    t[1, :4, 5] = 0
    t[1, 4, :5] = 0
    t[1, 4, 5] = 255
    p = np.full((2, 8, 10), 0.9, np.float32)
    p[0, :, 3:6] = 0.1
    p[0, 2:5, 6:] = 0.3
    p[0, 6, 3:6] = 0.5
    p[1, :5, 4:7] = 0.2
    p[1, 3:6, :5] = 0.2
    p[1, 7, 9] = 0.0
    assert four(p, t) == pytest.approx([0.989790, 0.974209, 0.302156, 0.077441], abs=SIX_DIGITS)
    assert (len(scores.THRESHOLDS), scores.THRESHOLDS[3]) == (11, 0.30000000000000004)
    assert scores.THRESHOLDS[-1] == 0.9999999999999999
    p = np.float32([0.1, 0.5, 0.7, 0.9, 1.0])  # float32(0.1) > 0.1 and float32(0.7) < 0.7 as doubles
    for threshold, above in ((0.1, 5), (0.5, 3), (0.7, 2)):
        assert segments.above(p, threshold).sum() == segments.above(p.astype(np.float64), threshold).sum() == above
    assert not segments.above(np.float64([0.7000000001]), 0.7), "doubles are rounded to float32 first"


@cases(
    "proposal, golden",
    ("labels", [1, 1, 0, 0]),
    ("thick", [0.996940, 0.994652, 0.111947, 0.103056]),
    ("all cell", [0.080675, 0, 0.918477, 0.113845]),
    ("all membrane", [0.080675, 0, 0.999775, 1]),
)
def test_golden_values_on_the_real_labels(labels, thick, proposal, golden):
    truth = labels[GOLDEN_SECTIONS]
    made = {
        "labels": truth > 0,
        "thick": thick,
        "all cell": np.ones(truth.shape),
        "all membrane": np.zeros(truth.shape),
    }
    assert four(made[proposal].astype(np.float32), truth) == pytest.approx(golden, abs=SIX_DIGITS)


def test_golden_warping_error_of_the_thick_crop(labels, thick):
    crop = (slice(0, 2), slice(100, 292), slice(100, 292))
    found = scores.warping_error(thick[crop], labels[[0, 7]][crop])
    assert found.value == 94 / (2 * 192 * 192) == pytest.approx(0.001275, abs=SIX_DIGITS)
    assert (found.details["splits"] == 94).all()
    assert (found.details["mergers"] == 0).all()


def blocks(rows=12, columns=12):
    """Four cells with walls one pixel wide."""
    truth = np.ones((rows, columns), np.uint8)
    truth[rows // 2], truth[:, columns // 2] = 0, 0
    return truth


def test_perfect_is_perfect_and_empty_and_one_segment_cases_have_their_scores():
    truth = blocks()[None]
    assert four(truth.astype(np.float32), truth) == [1, 1, 0, 0]
    assert scores.warping_error(truth.astype(np.float32), truth).value == 0
    for score in (scores.dice, scores.iou, scores.precision, scores.recall):
        assert score(scores.confusion(truth[0], truth[0])) == 1
    one, none = np.ones((1, 6, 7)), np.zeros((1, 6, 7))
    assert scores.v_info(one, one).value == 0, "one segment scores 0 by definition"
    assert scores.v_rand(one, one).value == 1
    assert scores.v_rand(none, one).value == 1, "no basin: the section is one segment"
    assert scores.pixel_error(none, one).value == 1
    assert scores.rand_error(none, one).value == pytest.approx(1 - 2 * 42 / (42 + 42**2))
    for score in (scores.v_rand, scores.v_info, scores.rand_error):
        with pytest.raises(ValueError, match="interior"):
            score(one, none)
    with pytest.raises(ValueError, match="labelled cells"):
        scores.seg(one, none)
    both = scores.v_rand([blocks(), blocks()], [blocks(), np.zeros((12, 12))])
    assert both.value == 1
    assert np.isnan(both.per_section[1])


def test_pure_merge_lowers_precision_and_pure_split_lowers_recall():
    truth, whole, nested = blocks(), np.ones((12, 12)), np.ones((12, 12))
    nested[6] = 0  # merges two pairs of cells, splits none
    merge = scores.v_scores([whole], [truth], [0.5])
    split = scores.v_scores([truth], [whole], [0.5])
    info = scores.v_scores([nested], [truth], [0.5])["v_info"].details
    for name in ("v_rand", "v_info"):
        assert merge[name].details["precision"] < 0.5
        assert split[name].details["recall"] < 0.5
    assert merge["v_rand"].details["recall"] == pytest.approx(1)
    assert split["v_rand"].details["precision"] == pytest.approx(1)
    assert info["recall"] < 1 - 1e-6 < info["precision"], "information lost by merging is recall of H(T)"


def test_pixel_scores_and_calibration_are_those_worked_out_by_hand():
    truth, proposal = np.array([[[1, 1, 1, 0]], [[1, 0, 0, 0]]]), np.array([[[1, 1, 0, 0]], [[1, 1, 1, 1]]])
    found = scores.pixel_error(proposal, truth, [0.5])
    assert found.value == pytest.approx(1 - 2 * 3 / (2 * 3 + 3 + 1))
    p, r = np.array([[0.9, 0.6, 0.2, 0.5]]), np.array([[1, 0, 1, 0]])
    counts = scores.confusion(p, r)
    assert counts.tolist() == [1, 1, 1, 1]
    assert (scores.dice(counts), scores.iou(counts)) == (0.5, pytest.approx(1 / 3))
    more = scores.confusion(np.ones((1, 4)), r)
    assert (scores.precision(more), scores.recall(more)) == (0.5, 1.0)
    assert scores.bce([p], [r]) == pytest.approx(-(log(0.9) + log(0.4) + log(0.2) + log(0.5)) / 4)
    assert scores.bce([np.ones((1, 1))], [np.zeros((1, 1))]) == pytest.approx(-log(1e-7), rel=1e-6)
    p = np.array([[0.8] * 10 + [0.1] * 10])
    r = np.array([[1] * 6 + [0] * 4 + [1] * 3 + [0] * 7])  # one bin is too sure, the other not enough
    pixels = scores.calibration([p, p], [r, r])["pixels"]
    assert (pixels[12], pixels[1], pixels.sum()) == (20, 20, 40)
    assert scores.ece([p, p], [r, r]) == pytest.approx(0.2)
    assert scores.ece([np.ones((2, 2))], [np.ones((2, 2))]) == 0


def test_warping_counts_a_broken_wall_as_merger_a_false_wall_as_split_and_forgives_a_shifted_one():
    truth = np.ones((9, 9), np.uint8)
    truth[4] = 0
    gap = truth.astype(np.float32)
    gap[4, 4] = 1
    merged = scores.warping_error([gap], [truth], [0.5])
    split = scores.warping_error([truth], [gap > 0], [0.5])
    assert (merged.details["mergers"], merged.details["splits"]) == (1, 0)
    assert (split.details["splits"], split.details["mergers"]) == (1, 0)
    assert merged.value == split.value == pytest.approx(1 / 81)
    moved = np.roll(truth, 1, axis=0)
    assert scores.warping_error([moved], [truth]).value == 0 < scores.pixel_error([moved], [truth]).value


@settings(max_examples=60)
@given(
    arrays(np.uint16, (2, 5, 6), elements=st.integers(0, 4)), arrays(np.uint16, (2, 5, 6), elements=st.integers(0, 4))
)
def test_seg_and_mean_iou_equal_going_through_all_pairs(prediction, truth):
    seg, best = [], []
    for p, t in zip(prediction, truth, strict=True):
        for cell in set(t.ravel()) - {0}:
            jaccards = {
                s: ((t == cell) & (p == s)).sum() / ((t == cell) | (p == s)).sum() for s in set(p.ravel()) - {0}
            }
            best.append(max(jaccards.values(), default=0))
            seg.append(sum(j for s, j in jaccards.items() if ((t == cell) & (p == s)).sum() > 0.5 * (t == cell).sum()))
    if seg:
        assert scores.seg(prediction, truth) == pytest.approx(np.mean(seg))
        assert scores.mean_iou(prediction, truth) == pytest.approx(np.mean(best))


@cases(
    "shapes, words",
    (((1, 4, 4), (1, 4, 5)), r"\(4, 4\) and \(4, 5\) in section 0"),
    (((2, 4, 4), (1, 4, 4)), r"as many sections.*\(4, 4\) and \(0,\) in section 1"),
    (((4, 4), (4, 4)), "one shape"),
    (((0, 4, 4), (0, 4, 4)), "at least one section"),
)
def test_stacks_that_do_not_fit_are_refused(shapes, words):
    for score in (scores.v_rand, scores.rand_error, scores.pixel_error, scores.warping_error, scores.bce):
        with pytest.raises(ValueError, match=words):
            score(*map(np.ones, shapes))


def test_maps_mark_what_is_split_merged_missed_or_cut_and_forgive_a_shifted_wall():
    truth = np.ones((40, 60), np.uint8)
    truth[:, 20], truth[:, 40] = 0, 0
    proposal = truth.copy()
    proposal[10:13, 20] = 1  # joins the first two cells
    proposal[20, 41:] = 0  # cuts the third
    maps = segments.split_merge_maps(truth, proposal)
    third = np.arange(60) > 40
    np.testing.assert_array_equal(maps.splits, np.tile(third, (40, 1)))
    np.testing.assert_array_equal(maps.mergers, (truth > 0) & ~third)
    assert np.argwhere(maps.missed).tolist() == [[10, 20], [11, 20], [12, 20]]
    assert np.argwhere(maps.cuts).tolist() == [[20, c] for c in range(41, 60)]
    wall = np.ones((40, 60), np.uint8)
    wall[:, 28:33] = 0
    for proposal in (wall, np.roll(wall, 2, axis=1) | (np.arange(60) < 2)):
        assert not any(m.any() for m in segments.split_merge_maps(wall, proposal))
    sliver = np.ones((60, 60), np.uint8)
    sliver[:, 3] = 0
    merged = segments.split_merge_maps(sliver, np.ones((60, 60))).mergers
    np.testing.assert_array_equal(merged, np.tile(np.arange(60) < 3, (60, 1)))
    for one, other in ((np.ones((5, 5)), np.zeros((5, 5))), (np.zeros((5, 5)), np.ones((5, 5)))):
        assert not segments.split_merge_maps(one, other).splits.any()


def test_segment_floods_from_the_seeds_that_are_large_enough_and_v_rand_chooses_the_threshold():
    p = np.full((9, 21), 0.9, np.float32)
    p[:, 10] = 0.1
    p[4, 3] = 0.2  # a hole inside a cell is filled
    found = segments.segment(p, 0.5)
    assert (found.dtype, found.max()) == (np.uint32, 2)
    assert (found[:, 10] == 0).all()
    for cell in (found[:, :10], found[:, 11:]):
        assert (cell == cell[0, 0]).all()
    assert (segments.segment(p, 0.5, lines=False) > 0).all()
    assert (segments.segment(p, 0.95) == 1).all()
    assert not segments.segment(p, 0.95, background=0.5).any()
    assert (segments.segment(p, 0.5, background=0.5)[:, 10] == 0).all()
    assert segments.segment(p, 0.5, min_size=9 * 10).max() == 1, "the cell with the hole has a pixel less"
    assert segments.segment(p, 0.5, min_size=9 * 10, background=0.5)[:, 11:].all(), "the other is just large enough"
    truth = blocks()
    p = np.where(truth > 0, 0.95, 0.65)[None]  # only thresholds 0.7, 0.8 and 0.9 see the walls
    assert scores.best_threshold(p, truth[None]) == scores.THRESHOLDS[7]


def score_a_tiny_stack(before="", **options):
    one = "scores.v_rand(np.eye(8)[None], [np.ones((8, 8))]).value"
    done = python("-c", f"{before}import numpy as np; from score import scores; print({one})", **options)
    assert float(done.stdout) == pytest.approx(eval(one))
    return done.stderr


def test_scoring_works_where_nothing_can_be_cached(tmp_path):
    """A read-only installation and no home to write to: compiled for the process alone."""
    shutil.copytree(ROOT / "score", tmp_path / "score", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("score/__pycache__", "home"):
        (tmp_path / name).write_text("a file, so that no cache folder can be made there, whoever asks")
    blocked = str(tmp_path / "home" / "nowhere")
    env = {**os.environ, "HOME": blocked, "XDG_CACHE_HOME": blocked, "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("NUMBA_CACHE_DIR", None)
    score_a_tiny_stack(cwd=tmp_path, env=env)


def test_scoring_works_without_numba_and_says_that_it_is_slow():
    said = score_a_tiny_stack("import sys; sys.modules['numba'] = None\n")
    assert "numba is not installed" in said
