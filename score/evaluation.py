"""The `evaluate` verb: read a prediction and its labels, refuse, score, print, write JSON and report.

    python dilatedUnet.py evaluate --prediction prediction.tif --mask_path train-labels.tif --sections 24-29
    python dilatedUnet.py evaluate --prediction p.tif --mask_path l.tif --scores all --json s.json --report
    out

`score_arrays` does the same for arrays in memory; training calls it for the held-out sections.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data


@dataclass(frozen=True)
class Score:
    """How one score is shown: its name, which way is better, and in plain words what it tells."""

    title: str
    higher_is_better: bool
    words: str


SCORES = {
    "v_rand": Score(
        "V_rand",
        True,
        "Take two pixels of the same cell: are they together in the prediction as well, and the other "
        "way round? Thick membranes are forgiven, one gap that joins two large cells costs much.",
    ),
    "v_info": Score(
        "V_info",
        True,
        "How much the predicted segments and the true ones tell of each other, in bits rather than in "
        "pairs of pixels: large cells weigh less than in V_rand.",
    ),
    "rand_error": Score(
        "Rand error",
        False,
        "The pairs of pixels again, but without forgiving thick membranes: every pixel "
        "predicted as membrane inside a cell counts. The figure of the U-Net paper.",
    ),
    "pixel_error": Score(
        "Pixel error",
        False,
        "1 - F1 of the interior pixels at the best threshold. Predicting cell everywhere "
        "already scores about 0.12 on ISBI-2012: not a measure of segmentation.",
    ),
    "warping_error": Score(
        "Warping error",
        False,
        "The share of pixels at which a cell is split or two are merged, after the "
        "truth was bent onto the prediction: shifted membranes cost nothing.",
    ),
    "dice": Score("Dice", True, "Overlap of predicted and true interior at threshold 0.5, 2 TP / (2 TP + FP + FN)."),
    "iou": Score("IoU", True, "Overlap of predicted and true interior at threshold 0.5, TP / (TP + FP + FN)."),
    "precision": Score("Precision", True, "The share of the predicted interior (threshold 0.5) that is interior."),
    "recall": Score("Recall", True, "The share of the true interior that was predicted (threshold 0.5)."),
    "bce": Score(
        "BCE",
        False,
        "Binary cross-entropy in nats a pixel: what training minimised; sure and wrong costs most.",
    ),
    "ece": Score(
        "ECE",
        False,
        "Expected calibration error: how far a predicted probability is from the share of interior "
        "pixels found at that probability, on average.",
    ),
}
DEFAULT_SCORES = tuple(name for name in SCORES if name != "warping_error")
CURVES = ("v_rand", "v_info", "rand_error", "pixel_error", "warping_error")
FIXED_THRESHOLD = 0.5

PUBLISHED_NOTE = (
    "Published results are on the challenge's TEST stack (30 sections of the same tissue); other sections, "
    "held-out ones of the training stack among them, are not the same measurement."
)
PUBLISHED = {  # doi:10.3389/fnana.2015.00142 and the challenge's board; arXiv:1505.04597 for the lower three
    "v_rand": {
        "SFCNNs": 0.98680,
        "CASIA (multicut)": 0.98356,
        "PolyMtl": 0.98058,
        "M2FCN": 0.97805,
        "FusionNet": 0.97804,
        "CUMedVision": 0.97682,
        "U-Net 2015": 0.97276,
    },
    "v_info": {
        "SFCNNs": 0.99144,
        "CASIA (multicut)": 0.99063,
        "M2FCN": 0.98919,
        "FusionNet": 0.98893,
        "CUMedVision": 0.98865,
        "PolyMtl": 0.98816,
        "U-Net 2015": 0.98662,
    },
    "warping_error": {
        "human values": 0.000005,
        "U-Net 2015": 0.000353,
        "DIVE-SCI": 0.000355,
        "IDSIA": 0.000420,
        "IDSIA-SCI": 0.000653,
    },
    "rand_error": {
        "human values": 0.0021,
        "IDSIA-SCI": 0.0189,
        "DIVE-SCI": 0.0305,
        "U-Net 2015": 0.0382,
        "IDSIA": 0.0504,
    },
    "pixel_error": {
        "human values": 0.0010,
        "DIVE-SCI": 0.0584,
        "U-Net 2015": 0.0611,
        "IDSIA": 0.0613,
        "IDSIA-SCI": 0.1027,
    },
}


# --- verb


def add_arguments(parser):
    """Declare the flags of `evaluate` on an argparse parser, in groups."""
    files = parser.add_argument_group("what to score")
    files.add_argument(
        "--prediction",
        required=True,
        metavar="PATH",
        help="TIFF stack or folder: interior probability 0..1 (float), scaled (8 or 16 bit), or a mask",
    )
    files.add_argument(
        "--mask_path",
        required=True,
        metavar="PATH",
        help="labels: TIFF stack, folder, or data set name; two values, the larger one = interior",
    )
    files.add_argument(
        "--invert_mask", action="store_true", help="the larger label value is membrane (default: interior)"
    )
    files.add_argument(
        "--instances",
        action="store_true",
        help="both hold cells' numbers, 0 = background (predict --segment): score mean IoU and SEG instead",
    )
    files.add_argument(
        "--sections",
        metavar="LIST",
        help="sections of the labels, counted from 0, such as 24-29 (default: all)",
    )
    files.add_argument(
        "--scores",
        default="default",
        metavar="LIST",
        help=f"comma-separated, of {', '.join(SCORES)}; or all (default: all but the slow warping_error)",
    )
    output = parser.add_argument_group("what to write")
    output.add_argument("--json", metavar="FILE", help="write every number to FILE (default: none is written)")
    output.add_argument(
        "--report", metavar="DIR", help="write report.html and PNG figures to DIR (default: none is written)"
    )
    output.add_argument("--image_path", metavar="PATH", help="raw sections to show in the report (default: none)")
    output.add_argument("--force", action="store_true", help="replace an existing FILE or report (default: refuse)")


def run(args):
    """Score what the parsed flags name; return 0. Bad input raises `data.DataError`."""
    which = parse_scores(args.scores)
    refuse_existing(args)
    if args.instances:
        return run_instances(args)
    labels, messages = data.read_labels(args.mask_path, invert=args.invert_mask)
    sections = _asked(args.sections, len(labels.sections))
    native, words = read_sections(args.prediction, "prediction", sections, labels.sections.shape)
    references = labels.sections[list(sections)]
    prediction, kind = to_probabilities(native, args.prediction)
    raw = None
    if args.image_path and args.report:
        raw, more = read_sections(args.image_path, "image", sections, labels.sections.shape)
        words += more
    say([*messages, *words, kind, *warnings_about(prediction, references)])
    result = {
        "prediction": str(args.prediction),
        "mask_path": str(args.mask_path),
        **score_arrays(prediction, references, which, sections=sections),
    }
    print(table(result))
    write(result, args, prediction, references, raw)
    return 0


def run_instances(args):
    """Score labels of cells against labels of cells; return 0."""
    if args.report or args.invert_mask or args.scores != "default":
        raise data.DataError("--instances goes without --report, --invert_mask and --scores.")
    references, messages = data.read_instances(args.mask_path)
    sections = _asked(args.sections, len(references.sections))
    prediction, words = read_sections(args.prediction, "prediction", sections, references.sections.shape)
    if prediction.dtype.kind not in "biu":
        raise data.DataError(
            f"--prediction must hold whole numbers, 0 = background, with --instances. Received: {prediction.dtype}"
        )
    chosen = references.sections[list(sections)]
    if not chosen.any():
        raise data.DataError(f"--sections: no cell is labelled in {data.format_sections(sections)}.")
    say([*messages, *words])
    result = {"prediction": str(args.prediction), "mask_path": str(args.mask_path)}
    result |= score_instances(prediction, chosen, sections=sections)
    print(f"mean IoU {result['mean_iou']:.4f}, SEG {result['seg']:.4f} of {result['cells']} cells")
    write(result, args, None, None, None)
    return 0


def write(result, args, prediction, references, raw):
    """Write the JSON file and the report, where asked for, and say where they are."""
    if args.json:
        with data.replacing(args.json, force=args.force) as partial:
            partial.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(f"numbers: {args.json}")
    if args.report:
        from score import report

        print(f"report: {report.write(args.report, result, prediction, references, raw)}")


def say(messages):
    """Print notes to stdout, and what wants attention to stderr."""
    for message in messages:
        if message:
            print(message, file=sys.stderr if message.startswith("warning:") else sys.stdout)


def score_instances(prediction, references, *, sections=None):
    """Score instance labels.

    Parameters
    ----------
    prediction, references : ndarray of int, shape (S, H, W)
        Numbers of cells, 0 = background.

    Returns
    -------
    dict
        "mean_iou" and "seg" (`scores.mean_iou`, `scores.seg`), "per_section" likewise, "cells", "sections".
    """
    from score import scores

    numbers = list(range(len(references)) if sections is None else sections)
    labelled = [i for i in range(len(references)) if references[i].any()]
    both = {"mean_iou": scores.mean_iou, "seg": scores.seg}
    return {name: score(prediction, references) for name, score in both.items()} | {
        "per_section": [
            {"section": numbers[i]} | {name: score(prediction[[i]], references[[i]]) for name, score in both.items()}
            for i in labelled
        ],
        "cells": sum(len(np.unique(section[section > 0])) for section in references),
        "sections": numbers,
    }


def parse_scores(text):
    """Turn ``--scores`` into names, in the order of the table.

    >>> parse_scores("iou,v_rand")
    ('v_rand', 'iou')
    """
    asked = [name.strip() for name in str(text or "default").split(",")]
    if asked in (["all"], ["default"]):
        return tuple(SCORES) if asked == ["all"] else DEFAULT_SCORES
    unknown = [name for name in asked if name not in SCORES]
    if unknown:
        raise data.DataError(
            f"--scores must be 'all' or names of {', '.join(SCORES)}. Received: {', '.join(unknown) or repr(text)}"
        )
    return tuple(name for name in SCORES if name in asked)


def refuse_existing(args):
    """Refuse before the work, not after it, where an output is in the way."""
    for flag, path in (
        ("--json", args.json),
        ("--report", args.report and Path(args.report) / "report.html"),
    ):
        if path and Path(path).exists() and not args.force:
            raise data.DataError(f"{flag}: {path} exists already (--force replaces it).")
    if args.report and Path(args.report).is_file():
        raise data.DataError(f"--report must be a folder. Received: the file {args.report}")


# --- input


def _asked(text, count):
    """Return the sections to score of `count` labelled ones."""
    if not text:
        return tuple(range(count))
    sections = data.parse_sections(text)
    if sections[-1] >= count:
        raise data.DataError(f"--sections must lie in 0-{count - 1}, the sections of --mask_path. Received: {text}")
    return sections


def read_sections(path, role, sections, shape):
    """Read the sections wanted of a stack that must fit labels of the given shape (S, H, W).

    A stack of as many sections as the labels is subset like them; one of exactly as many as were asked for is
    taken to BE those.
    """
    with data.iter_sections(path, what=role) as reader:
        flag = "--image_path" if role == "image" else f"--{role}"
        if reader.shape[1:] != shape[1:]:
            raise data.DataError(
                f"{flag} and --mask_path must have the same section size. Received: "
                f"{_by(reader.shape[1:])} and {_by(shape[1:])} (rows x columns)"
            )
        chosen, words = sections, []
        if len(reader) != shape[0]:
            if len(reader) != len(sections):
                raise data.DataError(
                    f"{flag} must have as many sections as --mask_path, or as --sections names. Received: "
                    f"{len(reader)}, {shape[0]} and {len(sections)}"
                )
            chosen = range(len(reader))
            words = [
                f"{flag}: its {len(reader)} sections are taken to be sections "
                f"{data.format_sections(sections)} of the labels"
            ]
        return np.stack([reader[i] for i in chosen]), words


def _by(shape):
    return " x ".join(str(n) for n in shape)


def to_probabilities(native, source="prediction"):
    """Turn a prediction as it was stored into interior probabilities.

    Parameters
    ----------
    native : ndarray of shape (S, H, W)
        Float 0..1; bool; integers 0/1, 0/255 or 0/65535 (masks); uint8 or uint16 scaled by 255 or 65535.

    Returns
    -------
    ndarray of float32, shape (S, H, W), and a sentence that says how it was read
    """
    lowest, highest = native.min(), native.max()
    if native.dtype.kind == "f":
        if not (lowest >= 0 and highest <= 1):  # NaN fails too
            raise data.DataError(
                f"--prediction must hold probabilities 0..1. Received: {lowest:g}..{highest:g} in {source}"
            )
        return native.astype(np.float32, copy=False), "prediction: probabilities, 0..1, 1 = interior"
    full = 255 if native.dtype == np.uint8 else 65535
    is_mask = highest in (0, 1, 255, 65535) and not ((native != 0) & (native != highest)).any()
    if is_mask:
        return (native > 0).astype(np.float32), f"prediction: a mask, 0 = membrane, {int(highest) or 1} = interior"
    if native.dtype not in (np.uint8, np.uint16):
        raise data.DataError(
            f"--prediction must be float, 8 or 16 bit, or a mask. Received: {native.dtype} with values "
            f"{lowest}..{highest} in {source}"
        )
    if highest <= full // 256:
        raise data.DataError(
            f"--prediction of {native.dtype} must be a mask or probabilities scaled to 0..{full}. Received: "
            f"values {lowest}..{highest} in {source}"
        )
    bits = 8 if full == 255 else 16
    return native.astype(np.float32) / np.float32(
        full
    ), f"prediction: {bits}-bit values, divided by {full}; 1 = interior"


def warnings_about(prediction, references):
    """Say what makes the scores of a readable prediction doubtful."""
    from score import scores

    found = []
    if prediction.max() < 0.25:
        found.append(
            f"warning: the largest probability is {prediction.max():.4f}; an instance mask, or values that "
            "are not scaled to the full range, cannot be scored"
        )
    if correlation(prediction, references) < 0:
        found.append(
            "warning: the prediction looks inverted (its correlation with the labels is negative); 1 or 255 "
            "must mean interior. Invert it, or try --invert_mask if it is the labels that are turned"
        )
    if not any(((p > 0) & ~scores.above(p, scores.THRESHOLDS[-1])).any() for p in prediction):
        found.append(
            "warning: every threshold gives the same segmentation (the prediction holds only 0 and 1), so "
            "the curves are flat and the best threshold means nothing; score the probabilities to find one"
        )
    return found


def correlation(prediction, references):
    """Pearson's correlation of two stacks, from sums over the sections; 0 where one of them is constant."""
    sums = np.zeros(6)
    for p, r in zip(prediction, references, strict=True):
        p, r = p.astype(np.float64), (r > 0).astype(np.float64)
        sums += (p.size, p.sum(), r.sum(), (p * p).sum(), r.sum(), (p * r).sum())
    n, p, r, pp, rr, pr = sums
    spread = (n * pp - p * p) * (n * rr - r * r)
    return float((n * pr - p * r) / np.sqrt(spread)) if spread > 1e-9 * n else 0.0


# --- scores


def score_arrays(probabilities, references, which=DEFAULT_SCORES, *, sections=None):
    """Score a stack in memory.

    Parameters
    ----------
    probabilities : ndarray of shape (S, H, W)
        Interior probability, 0..1.
    references : ndarray of shape (S, H, W)
        Masks, interior > 0.
    which : sequence of str, or "all"
        Names of `SCORES`.
    sections : sequence of int, optional
        The numbers of these sections in their stack, for the record.

    Returns
    -------
    dict
        Ready for JSON: one number per score under its name; ``sections``, ``thresholds``, and by name
        ``best_thresholds``, ``curves``, ``details``, ``per_section``; ``calibration`` with the reliability
        bins. None where a section has no value.
    """
    from score import scores

    which = tuple(SCORES) if which == "all" else tuple(which)
    numbers = list(range(len(references))) if sections is None else [int(s) for s in sections]
    result = {
        "sections": numbers,
        "thresholds": list(scores.THRESHOLDS),
        "fixed_threshold": FIXED_THRESHOLD,
        "best_thresholds": {},
        "curves": {},
        "details": {},
        "per_section": {},
    }
    values = {}
    for name, curve in _curves(probabilities, references, which).items():
        values[name] = curve.value
        result["best_thresholds"][name] = curve.threshold
        result["curves"][name] = curve.curve.tolist()
        result["details"][name] = {key: _plain(row) for key, row in curve.details.items()}
        result["per_section"][name] = _plain(curve.per_section)
    values |= _pixel_scores(probabilities, references, which, result)
    return {name: values[name] for name in SCORES if name in values} | result


def _plain(values):
    return [None if np.isnan(v) else v for v in np.asarray(values).tolist()]


def _curves(probabilities, references, which):
    from score import scores

    found = {}
    if {"v_rand", "v_info"} & set(which):
        found = {k: v for k, v in scores.v_scores(probabilities, references).items() if k in which}
    for name in ("rand_error", "pixel_error", "warping_error"):
        if name in which:
            found[name] = getattr(scores, name)(probabilities, references)
    return found


def _pixel_scores(probabilities, references, which, result):
    """Add the scores without a curve; sums over the sections first, then one division."""
    from score import scores

    pairs = list(zip(probabilities, references, strict=True))
    counts = np.array([scores.confusion(p, r, FIXED_THRESHOLD) for p, r in pairs])
    values = {}
    for name in ("dice", "iou", "precision", "recall"):
        if name in which:
            score = getattr(scores, name)
            values[name] = score(counts.sum(axis=0))
            result["per_section"][name] = [score(row) for row in counts]
            result["best_thresholds"][name] = FIXED_THRESHOLD
    if "bce" in which:
        per_section = [scores.bce(p, r) for p, r in pairs]
        values["bce"] = float(np.average(per_section, weights=[r.size for _, r in pairs]))
        result["per_section"]["bce"] = per_section
    if "ece" in which:
        bins = scores.calibration(probabilities, references)
        values["ece"] = bins.ece
        result["per_section"]["ece"] = [scores.calibration([p], [r]).ece for p, r in pairs]
        result["calibration"] = {key: row.tolist() for key, row in bins._asdict().items()}
    return values


# --- table


def digits(name):
    """Return how many decimals of a score are worth showing."""
    return 6 if name == "warping_error" else 5


def rows(result):
    """Return (name, title, value, threshold, range over sections, U-Net 2015, best published) as text."""
    found = []
    for name, score in SCORES.items():
        if name in result:
            places = digits(name)
            spread = [v for v in result["per_section"][name] if v is not None]
            published = PUBLISHED.get(name, {})
            best = next(iter(published), None)
            found.append(
                (
                    name,
                    score.title,
                    f"{result[name]:.{places}f}",
                    _threshold(result, name),
                    f"{min(spread):.{places}f} .. {max(spread):.{places}f}" if spread else "",
                    f"{published['U-Net 2015']:.{places}f}" if published else "",
                    f"{published[best]:.{places}f} ({best})" if published else "",
                )
            )
    return found


def _threshold(result, name):
    threshold = result["best_thresholds"].get(name)
    return "" if threshold is None else f"{threshold:.1f}" + ("" if name in CURVES else " fixed")


def table(result):
    """Return the scores as a table for the terminal, published results beside ours."""
    head = ("score", "value", "better", "threshold", "sections", "U-Net 2015 *", "best published *")
    lines = [head]
    for name, title, value, threshold, spread, unet, best in rows(result):
        lines.append(
            (
                title,
                value,
                "higher" if SCORES[name].higher_is_better else "lower",
                threshold,
                spread,
                unet,
                best,
            )
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    body = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    numbers = result["sections"]
    title = f"{len(numbers)} section{'s' * (len(numbers) != 1)}: {data.format_sections(numbers)}"
    return "\n".join(["", title, body[0], "-" * len(body[0]), *body[1:], f"* {PUBLISHED_NOTE}", ""])
