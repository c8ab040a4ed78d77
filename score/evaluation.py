"""The `evaluate` verb: read a prediction and its labels, refuse, score, write JSON and report, print.

    python dilatedUnet.py evaluate --prediction prediction.tif --mask_path train-labels.tif --sections 24-29
    python dilatedUnet.py evaluate --prediction p.tif --mask_path l.tif --scores all --json s.json --report out

`score_arrays` does the same for arrays in memory; training calls it for the held-out sections.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import numpy as np

import data
from files import atomic
from score import origin, report, scores
from score.scores import FIXED_THRESHOLD, THRESHOLDS, above

SCORES = {name: score for name, score in scores.SCORES.items() if score.of != "cells"}
DEFAULT_SCORES = tuple(name for name in SCORES if name != "warping_error")


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
        "--sections", metavar="LIST", help="sections of the labels, counted from 0, such as 24-29 (default: all)"
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
    if args.instances and (args.report or args.invert_mask or args.scores != "default"):
        raise data.DataError("--instances goes without --report, --invert_mask and --scores.")
    refuse_existing(args)
    labels, notes = read_references(args)
    sections = chosen_sections(args.sections, len(labels.sections))
    references = labels.sections[list(sections)]
    if not references.any():
        what = "no cell is labelled" if args.instances else "no pixel is interior"
        raise data.DataError(f"--mask_path: {what} in the sections to score, {data.format_sections(sections)}.")
    with contextlib.ExitStack() as files:
        fit = (sections, labels.sections.shape, notes, files)
        native = read_sections(args.prediction, "prediction", *fit)
        raw = read_sections(args.image_path, "image", *fit) if args.image_path else None
        refuse_inputs(args, labels, native, raw)
        notes += origin.check(native.reader, labels, raw and raw.reader)
        score = score_cells if args.instances else score_masks
        prediction, found, text = score(native, references, sections, which, notes)
        result = {"prediction": str(args.prediction), "mask_path": str(args.mask_path)} | found
        written = write(result, args, prediction, references, raw)
    for note in filter(None, notes):
        print(note, file=sys.stderr if note.startswith("warning:") else sys.stdout)
    print("\n".join([text, *written]))
    return 0


def read_references(args):
    """Read the labels, and what is to be said of them."""
    if args.instances:
        return data.read_instances(args.mask_path)
    return data.read_labels(args.mask_path, invert=args.invert_mask)


def score_masks(native, references, sections, which, notes):
    """Return the prediction as probabilities, its scores, and these as a table."""
    prediction, said = to_probabilities(native, native.source)
    notes += [said, *warnings_about(prediction, references)]
    found = score_arrays(prediction, references, which, sections=sections)
    return prediction, found, report.table(found)


def score_cells(native, references, sections, which, notes):
    """As `score_masks`, for numbers of cells."""
    if native.dtype.kind not in "biu":
        raise data.DataError(
            f"--prediction must hold whole numbers, 0 = background, with --instances. Received: {native.dtype}"
        )
    found = score_instances(native, references, sections=sections)
    return native, found, f"mean IoU {found['mean_iou']:.4f}, SEG {found['seg']:.4f} of {found['cells']} cells"


def write(result, args, prediction, references, raw):
    """Write the JSON file and the report, where asked for, before anything is printed; say where they are."""
    written = []
    if args.json:
        atomic.write_json(args.json, result, force=args.force, indent=2)
        written.append(f"numbers: {args.json}")
    if args.report:
        written.append(f"report: {report.write(args.report, result, prediction, references, raw)}")
    return written


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


def outputs(args):
    """Return (flag, path) of what will be written, and of what would be replaced in the folder of the report."""
    found = [("--json", args.json)] if args.json else []
    if args.report:
        found.append(("--report", Path(args.report) / "report.html"))
        found += [("--report", path) for kind in report.PICTURES for path in sorted(Path(args.report).glob(kind))]
    return found


def refuse_existing(args):
    """Refuse before the work, not after it, where an output is in the way or cannot be one."""
    for flag, path, kind, wrong in (
        ("--json", args.json, "file", os.path.isdir),
        ("--report", args.report, "folder", os.path.isfile),
    ):
        if path is not None and (not path or wrong(path)):
            raise data.DataError(f"{flag} must be a {kind}. Received: {path or repr(path)}")
    paths = [os.path.realpath(path) for _, path in outputs(args)]
    if len(set(paths)) < len(paths):
        raise data.DataError(f"--json must not be a file of --report. Received: {args.json}")
    for flag, path in outputs(args):
        if os.path.lexists(path) and not args.force:
            raise data.DataError(f"{flag}: {path} exists already (--force replaces it).")


def refuse_inputs(args, *stacks):
    """An output is never an input, not even with --force; find out now whether it can be written."""
    for flag, path in outputs(args):
        atomic.refuse_inputs(flag, path, *(stack.source for stack in stacks if stack is not None))
        atomic.make_writable(Path(path).parent)


# --- input


def chosen_sections(text, count):
    """Return the sections to score of `count` labelled ones."""
    if not text:
        return tuple(range(count))
    sections = data.parse_sections(text)
    if sections[-1] >= count:
        raise data.DataError(f"--sections must lie in 0-{count - 1}, the sections of --mask_path. Received: {text}")
    return sections


class Sections:
    """Sections of an open stack, each read when it is asked for: memory does not grow with their number."""

    def __init__(self, reader, chosen, convert=None):
        self.reader, self.chosen, self.convert = reader, chosen, convert or (lambda section: section)
        self.source, self.dtype = reader.source, reader.dtype

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, place):
        return self.convert(self.reader[self.chosen[place]])


def read_sections(path, role, sections, shape, notes, files):
    """Open a stack that must fit labels of the given shape (S, H, W); return the `Sections` wanted.

    A stack of as many sections as the labels is subset like them; one of exactly as many as were asked for is
    taken to BE those, and `notes` says so. `files`, an ExitStack, closes it.
    """
    flag = "--image_path" if role == "image" else f"--{role}"
    if role == "prediction" and not os.path.exists(os.path.expanduser(path)):
        raise data.DataError(f"{flag}: {path} does not exist.")
    reader = files.enter_context(data.iter_sections(path, what=role))
    if reader.shape[1:] != shape[1:]:
        sizes = [" x ".join(map(str, found[1:])) for found in (reader.shape, shape)]
        raise data.DataError(
            f"{flag} and --mask_path must have the same section size. Received: {' and '.join(sizes)} (rows x columns)"
        )
    if len(reader) == shape[0]:
        return Sections(reader, sections)
    if len(reader) != len(sections):
        raise data.DataError(
            f"{flag} must have as many sections as --mask_path, or as --sections names. Received: "
            f"{len(reader)}, {shape[0]} and {len(sections)}"
        )
    named = data.format_sections(sections)
    notes.append(f"{flag}: its {len(reader)} sections are taken to be sections {named} of the labels")
    return Sections(reader, range(len(reader)))


def to_probabilities(native, source="prediction"):
    """Turn a prediction as it was stored into interior probabilities.

    Parameters
    ----------
    native : Sections, or ndarray of shape (S, H, W)
        Float 0..1; bool; integers 0/1, 0/255 or 0/65535 (masks); uint8 or uint16 scaled by 255 or 65535.

    Returns
    -------
    Sections of float32, and a sentence that says how they were read
    """
    dtype = native.dtype
    lows, highs, least = zip(*((s.min(), s.max(), s[s != 0].min(initial=s.max())) for s in native), strict=True)
    lowest, highest = float(np.min(lows)), float(np.max(highs))
    two_values = lowest >= 0 and all(value in (0, highest) for value in least)
    full = 255 if dtype == np.uint8 else 65535
    received = f"Received: {dtype} {lowest:g}..{highest:g} in {source}"
    if dtype.kind == "f":
        if not (lowest >= 0 and highest <= 1):  # NaN fails too
            raise data.DataError(f"--prediction must hold probabilities 0..1. {received}")
        convert, words = lambda s: s.astype(np.float32, copy=False), "probabilities, 0..1, 1 = interior"
    elif two_values and highest in (0, 1, 255, 65535):
        convert, words = lambda s: (s > 0).astype(np.float32), f"a mask, 0 = membrane, {int(highest) or 1} = interior"
    elif dtype not in (np.uint8, np.uint16):
        raise data.DataError(f"--prediction must be float, 8 or 16 bit, or a mask. {received}")
    elif highest <= full // 256:
        raise data.DataError(f"--prediction must be a mask or probabilities scaled to 0..{full}. {received}")
    else:
        convert = lambda s: s.astype(np.float32) / np.float32(full)  # noqa: E731
        words = f"{dtype.itemsize * 8}-bit values, divided by {full}; 1 = interior"
    return _converted(native, convert), f"prediction: {words}"


def _converted(native, convert):
    if isinstance(native, Sections):
        return Sections(native.reader, native.chosen, convert)
    return np.stack([convert(section) for section in native])


def warnings_about(prediction, references):
    """Say what makes the scores of a readable prediction doubtful."""
    largest, between, sums = 0.0, False, np.zeros(4)
    for p, r in zip(prediction, references, strict=True):
        largest = max(largest, float(p.max()))
        between = between or bool(((p > 0) & ~above(p, THRESHOLDS[-1])).any())
        sums += (p.size, p.sum(dtype=np.float64), (r > 0).sum(), p[r > 0].sum(dtype=np.float64))
    pixels, probability, interior, both = sums
    found = []
    if largest < 0.25:
        found.append(
            f"the largest probability is {largest:.4f}; an instance mask, or values that are not scaled to the full "
            "range, cannot be scored"
        )
    if pixels * both - probability * interior < -1e-9 * pixels**2:
        found.append(
            "the prediction looks inverted (its correlation with the labels is negative); 1 or 255 must mean interior. "
            "Invert it, or try --invert_mask if it is the labels that are turned"
        )
    if not between:
        found.append(
            "every threshold gives the same segmentation (the prediction holds only 0 and 1), so the curves are flat "
            "and the best threshold means nothing; score the probabilities to find one"
        )
    return [f"warning: {words}" for words in found]


# --- scores


def score_arrays(probabilities, references, which=DEFAULT_SCORES, *, sections=None):
    """Score a stack in memory, or `Sections`.

    Parameters
    ----------
    probabilities, references : sequence of S arrays of shape (H, W)
        Interior probability, 0..1, and masks, interior > 0.
    which : sequence of str
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
    numbers = range(len(references)) if sections is None else sections
    result = {"sections": [int(s) for s in numbers], "thresholds": list(THRESHOLDS), "fixed_threshold": FIXED_THRESHOLD}
    result |= {key: {} for key in ("best_thresholds", "curves", "details", "per_section")}
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
    """Return the `scores.Curve` of each score asked for; both leaderboard scores come of one border thinning."""
    names = [name for name in which if SCORES[name].of == "thresholds"]
    found = scores.v_scores(probabilities, references) if {"v_rand", "v_info"} & set(names) else {}
    return {name: found[name] if name in found else SCORES[name].function(probabilities, references) for name in names}


def _pixel_scores(probabilities, references, which, result):
    """Return the scores without a curve; counts are summed over the sections first, then divided once."""
    counts = np.array([scores.confusion(p, r) for p, r in zip(probabilities, references, strict=True)])
    values = {}
    for name in which:
        score = SCORES[name]
        if score.of == "counts":
            values[name] = score.function(counts.sum(axis=0))
            result["per_section"][name] = [score.function(row) for row in counts]
            result["best_thresholds"][name] = FIXED_THRESHOLD
        elif score.of == "stack":
            values[name] = score.function(probabilities, references)
            pairs = zip(probabilities, references, strict=True)
            result["per_section"][name] = [score.function([p], [r]) for p, r in pairs]
    if "ece" in which:
        bins = scores.calibration(probabilities, references)
        result["calibration"] = {key: row.tolist() for key, row in bins._asdict().items()}
    return values


def score_instances(prediction, references, *, sections=None):
    """Return the scores of numbers of cells, 0 = background: "mean_iou", "seg", "per_section", "cells", "sections"."""
    numbers = list(range(len(references)) if sections is None else sections)
    both = {name: score.function for name, score in scores.SCORES.items() if score.of == "cells"}
    return {name: score(prediction, references) for name, score in both.items()} | {
        "per_section": [
            {"section": numbers[i]} | {name: score([prediction[i]], [references[i]]) for name, score in both.items()}
            for i in range(len(references))
            if references[i].any()
        ],
        "cells": sum(len(np.unique(section[section > 0])) for section in references),
        "sections": numbers,
    }
