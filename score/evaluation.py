"""The `evaluate` verb: read a prediction and its labels, refuse, score, write JSON and report, print.

    python dilatedUnet.py evaluate --prediction prediction.tif --mask_path train-labels.tif --sections 24-29
    python dilatedUnet.py evaluate --prediction p.tif --mask_path l.tif --scores all --json s.json --report out

`score_arrays` does the same for arrays in memory; training calls it for the held-out sections.
"""

import contextlib
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np

import data
from files import atomic
from files.fetching import ISBI_ROLES
from files.flags import channel, label_value
from files.labels import ONE_FOR_ALL, holds_files, is_folder, one_for_all, order_of, require_ids
from files.sections import size_words
from score import report, scores
from score.scores import FIXED_THRESHOLD, THRESHOLDS, above

SCORES = {name: score for name, score in scores.SCORES.items() if score.of != "cells"}
DEFAULT_SCORES = tuple(name for name in SCORES if name != "warping_error")


# --- verb


def add_arguments(parser):
    """Declare the flags of `evaluate` on an argparse parser, in groups."""
    flag = parser.add_argument_group("what to score").add_argument
    words = "stack or folder: interior probability 0..1, scaled (8 or 16 bit), or a mask"
    flag("--prediction", help=words, required=True, metavar="PATH")
    words = "labels: stack, folder or data set; of two values the larger one = interior"
    flag("--mask_path", help=words, required=True, metavar="PATH")
    flag("--invert_mask", help="the larger label value is membrane (default: interior)", action="store_true")
    words = "both hold cells' numbers, 0 = background (predict --segment): mean IoU and SEG"
    flag("--instances", help=words, action="store_true")
    words = "label value that means 'not labelled', which no score counts"
    flag("--ignore_label", help=words, type=label_value, metavar="VALUE")
    words = "sections of the labels, counted from 0, such as 24-29 (default: all)"
    flag("--sections", help=words, metavar="LIST")
    words = f"comma-separated, of {', '.join(SCORES)}; or all (default: all but the slow warping_error)"
    flag("--scores", help=words, metavar="LIST")
    flag = parser.add_argument_group("what to write").add_argument
    flag("--json", help="write every number to FILE (default: none is written)", metavar="FILE")
    flag("--report", help="write report.html and PNG figures to DIR (default: none is written)", metavar="DIR")
    flag("--image_path", help="raw sections to show in the report (default: none)", metavar="PATH")
    flag("--channel", help="channel of --image_path, from 0, where it has several", type=channel, metavar="N")
    flag("--force", help="replace an existing FILE or report (default: refuse)", action="store_true")


def run(args):
    """Score what the parsed flags name; return 0. Bad input raises `data.DataError`."""
    which = parse_scores(args.scores)
    refuse_contradictions(args)
    refuse_existing(args)
    read = data.read_instances if args.instances else partial(data.read_labels, invert=args.invert_mask)
    labels, notes = in_image_order(args, *read(args.mask_path, ignore=args.ignore_label))
    asked = range(len(labels.sections)) if args.sections is None else data.parse_sections(args.sections)
    sections = data.sections_within(asked, len(labels.sections), "--sections")
    references = labels.sections[list(sections)]
    refuse_empty(args, references, sections)
    with contextlib.ExitStack() as files:
        fit = (sections, labels, notes, files)
        native = read_sections(args.prediction, "prediction", *fit, ids=args.instances)
        raw = read_sections(args.image_path, "image", *fit, channel=args.channel) if args.image_path else None
        refuse_inputs(args, labels, native, raw)
        notes += check_origin(native, labels, raw, sections)
        sections, references, native, raw = with_labels(sections, references, native, raw)
        if args.instances:
            native = Sections(native.reader, native.chosen, partial(require_ids, what="--prediction"))
            notes += [f"warning: --prediction: {ONE_FOR_ALL}"] * one_for_all(native)
            prediction, found = native, score_instances(native, references, sections=sections)
            text = f"mean IoU {found['mean_iou']:.4f}, SEG {found['seg']:.4f} of {found['cells']} cells"
        else:
            prediction, said = to_probabilities(native)
            notes += [said, *warnings_about(prediction, references)]
            found = score_arrays(prediction, references, which, sections=sections)
            text = report.table(found)
        result = {"prediction": str(args.prediction), "mask_path": str(args.mask_path)} | found
        written = []  # before anything is printed: it may be that nobody reads
        if args.json:
            atomic.write_json(args.json, result, force=args.force, indent=2)
            written.append(f"numbers: {args.json}")
        if args.report:
            written.append(f"report: {report.write(args.report, result, prediction, references, raw)}")
    for note in filter(None, notes):
        print(note, file=sys.stderr if note.startswith("warning:") else sys.stdout)
    print("\n".join([text, *written]))
    return 0


def refuse_empty(args, references, sections):
    """Refuse sections in which there is nothing to score."""
    if (references > 0).any():
        return
    what = "no cell is labelled" if args.instances else "no pixel is interior"
    why = "" if (references >= 0).any() else f": nothing is labelled there (--ignore_label {args.ignore_label})"
    raise data.DataError(f"--mask_path: {what} in the sections to score, {data.format_sections(sections)}{why}.")


def refuse_contradictions(args):
    """Refuse flags that are of no use with each other."""
    if args.instances and (args.report or args.invert_mask or args.scores):
        raise data.DataError("--instances goes without --report, --invert_mask and --scores.")
    if args.channel is not None and not args.image_path:
        raise data.DataError(f"--channel goes with --image_path. Received: {args.channel}")


def parse_scores(text):
    """Turn ``--scores`` into names, in the order of the table.

    >>> parse_scores("iou,v_rand")
    ('v_rand', 'iou')
    """
    sets = {"all": tuple(SCORES), "default": DEFAULT_SCORES, None: DEFAULT_SCORES}
    asked = sets.get(text) or [name.strip() for name in text.split(",")]
    unknown = ", ".join(repr(name) for name in asked if name not in SCORES)
    if unknown:
        raise data.DataError(f"--scores must be 'all' or names of {', '.join(SCORES)}. Received: {unknown}")
    return tuple(name for name in SCORES if name in asked)


def outputs(args):
    """Return (flag, path) of what will be written, and of what would be replaced in the folder of the report."""
    found = [("--json", args.json)] if args.json else []
    if args.report:
        replaced = (path for kind in report.PICTURES for path in sorted(Path(args.report).glob(kind)))
        new = (Path(args.report) / name for name in ("report.html", "section-000.png"))
        found += [("--report", path) for path in (*new, *replaced)]
    return found


def refuse_existing(args):
    """Refuse before the work, not after it, where an output is in the way or cannot be one."""
    if args.json and os.path.isdir(args.json):
        raise data.DataError(f"--json must be a file. Received: {args.json}")
    if args.report and os.path.isfile(args.report):
        raise data.DataError(f"--report must be a folder. Received: {args.report}")
    inside = args.json and args.report and Path(args.report).resolve() == Path(args.json).resolve().parent
    if inside and any(map(Path(args.json).resolve().match, ("report.html", *report.PICTURES))):
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


def in_image_order(args, labels, notes):
    """Labels and notes; a folder of labels in the order of the files of --image_path or else of --prediction, by name.

    So a section has the number that it has in training (`data.load_pair`).
    """
    for path, role, number in ((args.image_path, "image", args.channel), (args.prediction, "prediction", None)):
        if path and os.path.isdir(os.path.expanduser(path)) and os.path.isdir(labels.source):
            with data.iter_sections(path, what=role, channel=number, ids=args.instances) as reader:
                pairs = order_of(reader, labels)
            if pairs:
                return data.chosen(labels, pairs[0]), [*notes, pairs[1]]
    if len(labels.sections) > 1 and is_folder(labels) and not holds_files(os.path.expanduser(args.prediction)):
        notes = [*notes, "pairs: sections and labels go together by their order; with --image_path FOLDER by name"]
    return labels, notes


def with_labels(sections, references, *stacks):
    """Leave out the sections without labels, of which nothing can be scored; `stacks` may be None."""
    kept = [place for place, reference in enumerate(references) if (reference >= 0).any()]
    stacks = (s and Sections(s.reader, [s.chosen[place] for place in kept]) for s in stacks)
    return [sections[place] for place in kept], references[kept], *stacks


class Sections:
    """Sections of an open stack, each read when it is asked for: memory does not grow with their number."""

    def __init__(self, reader, chosen, convert=None):
        self.reader, self.chosen, self.convert = reader, chosen, convert or (lambda section: section)
        self.source, self.dtype = reader.source, reader.dtype

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, place):
        return self.convert(self.reader[self.chosen[place]])


def read_sections(path, role, sections, labels, notes, files, **how):
    """Open a stack that must fit the labels, a Stack (S, H, W); return the `Sections` wanted.

    A stack of as many sections as the labels is subset like them; one of exactly as many as were asked for is taken to
    BE those, and `notes` says so. Two folders go by name. `files`, an ExitStack, closes it. `how` as in
    `data.iter_sections`.
    """
    shape = labels.sections.shape
    flag = data.flag(role)
    if role == "prediction" and not os.path.exists(atomic.within(path)[0]):  # nor is it a data set's name
        raise data.DataError(f"{flag}: {path} does not exist.")
    reader = files.enter_context(data.iter_sections(path, what=role, **how))
    if reader.shape[1:] != shape[1:]:
        sizes = " and ".join(size_words(found) for found in (reader.shape, shape))
        raise data.DataError(f"{flag} and --mask_path must have the same section size. Received: {sizes}")
    if len(reader) == shape[0]:
        pairs = order_of(reader, labels)
        return Sections(reader, np.argsort(pairs[0])[list(sections)].tolist() if pairs else sections)
    if len(reader) != len(sections):
        rule = "must have as many sections as --mask_path, or as --sections names"
        raise data.DataError(f"{flag} {rule}. Received: {len(reader)}, {shape[0]} and {len(sections)}")
    if pairs := order_of(reader, data.chosen(labels, list(sections))):
        return Sections(reader, np.argsort(pairs[0]).tolist())
    named = data.format_sections(sections)
    notes.append(f"{flag}: its {len(reader)} sections are taken to be sections {named} of the labels")
    return Sections(reader, range(len(reader)))


def check_origin(prediction, labels, given, sections):
    """Return warnings where a prediction was made from other images than are labelled, or is the images, or is of
    sections that trained its network; or refuse it.

    `predict` writes the SHA-256 of the images' pixels into its output. Two stacks of one size are easily taken for each
    other: `predict --image_path isbi2012` means the test stack, `evaluate --mask_path isbi2012` the training labels.
    `given` is what ``--image_path`` names, or None; `sections` are the numbers of those that are scored.
    """
    made_from = prediction.reader.made_of.get("pixels_sha256")
    own, other = images_of(labels)
    if not made_from:
        same = [given.source] if given is not None and all(map(np.array_equal, prediction, given)) else []
        same += [_name(images) for images in (own, other) if images and _is(prediction, images, sections)]
        return [f"warning: --prediction holds the pixels of {name}: images, not a prediction" for name in same[:1]]
    if other is not None and made_from == _sha256(other):
        raise data.DataError(
            f"--prediction was made from {_name(other)}, and --mask_path labels {_name(own)}: name the labels of the "
            "images that were predicted (those of isbi2012's test images are isbi2012-test)."
        )
    seen = sections_named(prediction.reader.made_of.get("trained_on"))
    seen = [i for i, place in zip(sections, prediction.chosen, strict=True) if place in seen]
    which = f"warning: sections {data.format_sections(seen)} trained the network that predicted them"
    found = [f"{which}: their scores say nothing about new sections; name others with --sections"] if seen else []
    images = own if given is None else given.reader
    if images is None or made_from == _sha256(images):
        return found
    return [f"warning: the prediction was made from other images than {_name(images)}, or from a part of them", *found]


def sections_named(named):
    """The sections that a prediction names; none where it names none, or is damaged."""
    with contextlib.suppress(data.DataError):
        return {*data.parse_sections(named)}
    return set()


def images_of(labels):
    """Return the images of known labels, and those that they are taken for, by place or as a Stack; else None."""
    if labels.source == "synthetic":
        both = (data.resolve("synthetic", role) for role in ("image", "test"))
        return tuple(sorted(both, key=lambda images: images.description != labels.description))
    path = Path(labels.source)
    pairs = {ISBI_ROLES["mask"]: ("image", "test"), ISBI_ROLES["test_mask"]: ("test", "image")}
    if path.name in pairs:
        found = [path.with_name(ISBI_ROLES[role]) for role in pairs[path.name]]
    elif path.name == "SEG" and path.parent.name[:2] in ("01", "02"):  # of the Cell Tracking Challenge
        found = [path.parents[1] / sequence for sequence in sorted(("01", "02"), key=path.parent.name[:2].__ne__)]
    else:
        found = []
    return tuple(place if place.exists() else None for place in found) or (None, None)


def _sha256(images):
    return data.sha256_pixels(images if isinstance(images, data.StackReader) else data.iter_sections(images))


def _is(prediction, images, sections):
    """Whether a prediction is these sections of a stack of images, which may be damaged or of another size."""
    with contextlib.suppress(data.DataError), data.iter_sections(images) as reader:
        pairs = zip(prediction, sections, strict=True)
        return len(reader) > max(sections) and all(np.array_equal(section, reader[i]) for section, i in pairs)
    return False


def _name(images):
    return images if isinstance(images, Path) else f"{images.source} ({images.description})"


def to_probabilities(native):
    """Turn a prediction as it was stored into interior probabilities, and a sentence that says how they were read.

    It holds floats 0..1; bool; integers 0/1, 0/255 or 0/65535 (masks); or uint8 or uint16 scaled by 255 or 65535.
    Both are `Sections`, those that are returned of float32.
    """
    dtype = native.dtype
    lows, highs, least = zip(*((s.min(), s.max(), s[s != 0].min(initial=s.max())) for s in native), strict=True)
    lowest, highest = float(np.min(lows)), float(np.max(highs))
    two_values = lowest >= 0 and all(value in (0, highest) for value in least)
    full = 255 if dtype == np.uint8 else 65535
    rule = None
    if dtype.kind == "f":
        rule = None if lowest >= -ROUNDING and highest <= 1 + ROUNDING else "hold probabilities 0..1"
        convert, words = lambda s: s.astype(np.float32, copy=False).clip(0, 1), "probabilities, 0..1, 1 = interior"
    elif two_values and highest in (0, 1, 255, 65535):
        convert, words = lambda s: (s > 0).astype(np.float32), f"a mask, 0 = membrane, {int(highest) or 1} = interior"
    else:
        if dtype not in (np.uint8, np.uint16):
            rule = "be float, 8 or 16 bit, or a mask"
        elif highest <= full // 256:
            rule = f"be a mask or probabilities scaled to 0..{full}"
        convert = lambda s: s.astype(np.float32) / np.float32(full)  # noqa: E731
        words = f"{dtype.itemsize * 8}-bit values, divided by {full}; 1 = interior"
    if rule:
        raise data.DataError(
            f"--prediction must {rule}. Received: {dtype} {lowest:.7g}..{highest:.7g} in {native.source}"
        )
    return Sections(native.reader, native.chosen, convert), f"prediction: {words}"


ROUNDING = 1e-5  # of probabilities, at either end
FEW_LEVELS = 10  # that the votes of a few masks have
DOUBTS = {  # what makes the scores of a readable prediction doubtful
    "small": "no probability is above 0.5; an instance mask, or values that are not scaled to the full range, cannot "
    "be scored",
    "gray": "hardly any value of --prediction is near 0 or near the largest one: these look like gray values of an "
    "image, not like probabilities",
    "cells": "most middle values of --prediction are the same as their neighbour's: these look like numbers of cells, "
    "not like probabilities. Score numbers with --instances",
    "inverted": "the prediction looks inverted (its correlation with the labels is negative); 1 or 255 must mean "
    "interior. Invert it, or try --invert_mask if it is the labels that are turned",
    "flat": "every threshold gives the same segmentation (the prediction holds only 0 and 1), so the curves are flat "
    "and the best threshold means nothing; score the probabilities to find one",
}


def warnings_about(prediction, references):
    """Return those of `DOUBTS` that `Sections` of probabilities raise."""
    scaled = prediction.dtype.kind != "f"
    largest, between, sums, pairs, levels = 0.0, False, np.zeros(5), np.zeros(2), set()
    for p, r in zip(prediction, references, strict=True):
        if scaled:
            middle = abs(p - 0.5) < 0.45
            if len(levels) <= FEW_LEVELS:
                levels.update(np.unique(p[middle])[: FEW_LEVELS + 1].tolist())
            middle = middle[:, 1:] & middle[:, :-1]
            pairs += (middle.sum(), (middle & (p[:, 1:] == p[:, :-1])).sum())
        p, r = p[r >= 0], r[r >= 0]
        largest = max(largest, float(p.max()))
        between = between or bool(((p > 0) & ~above(p, THRESHOLDS[-1])).any())
        inside, sure = r > 0, (abs(p - 0.5) > 0.4).sum()
        sums += (p.size, p.sum(dtype=np.float64), inside.sum(), p[inside].sum(dtype=np.float64), sure)
    pixels, probability, interior, both, sure = sums
    found = {
        "small": largest < 0.25 or (scaled and largest <= 0.5),
        "gray": largest > 0.5 and scaled and sure < 0.1 * pixels,
        "cells": scaled and len(levels) > FEW_LEVELS and pairs[0] > 0.25 * pixels and pairs[1] > 0.8 * pairs[0],
        "inverted": pixels * both - probability * interior < -1e-9 * pixels**2,
        "flat": not between,
    }
    return [f"warning: {DOUBTS[name]}" for name, doubtful in found.items() if doubtful]


# --- scores


def score_arrays(probabilities, references, which=DEFAULT_SCORES, *, sections=None):
    """Score a stack in memory, or `Sections`, by the `SCORES` of these names.

    Parameters
    ----------
    probabilities, references : sequence of S arrays of shape (H, W)
        Interior probability, 0..1, and masks, interior > 0, not labelled < 0.
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
    # both leaderboard scores come of one border thinning, and counts are summed over the sections, then divided once
    curves = scores.v_scores(probabilities, references) if {"v_rand", "v_info"} & {*which} else {}
    counts = np.array([scores.confusion(p, r) for p, r in zip(probabilities, references, strict=True)])
    values = {}
    for name in which:
        function = SCORES[name].function
        if SCORES[name].of == "thresholds":
            curve = curves.get(name) or function(probabilities, references)
            values[name], result["best_thresholds"][name] = curve.value, curve.threshold
            result["curves"][name] = curve.curve.tolist()
            result["details"][name] = {key: _plain(row) for key, row in curve.details.items()}
            result["per_section"][name] = _plain(curve.per_section)
        elif SCORES[name].of == "counts":
            values[name], result["best_thresholds"][name] = function(counts.sum(axis=0)), FIXED_THRESHOLD
            result["per_section"][name] = [function(row) for row in counts]
        else:
            values[name] = function(probabilities, references)
            pairs = zip(probabilities, references, strict=True)
            result["per_section"][name] = [function([p], [r]) for p, r in pairs]
    if "ece" in which:
        bins = scores.calibration(probabilities, references)
        result["calibration"] = {key: row.tolist() for key, row in bins.items()}
    return {name: values[name] for name in SCORES if name in values} | result


def _plain(values):
    return [None if np.isnan(v) else v for v in np.asarray(values).tolist()]


def score_instances(prediction, references, *, sections=None):
    """Return the scores of numbers of cells, 0 = background: "mean_iou", "seg", "per_section", "cells", "sections"."""
    numbers = list(range(len(references)) if sections is None else sections)
    both = {name: score.function for name, score in scores.SCORES.items() if score.of == "cells"}

    def score(p, r):
        return {name: function(p, r) for name, function in both.items()}

    triples = zip(numbers, prediction, references, strict=True)
    per_section = [{"section": number} | score([p], [r]) for number, p, r in triples if (r > 0).any()]
    cells = sum(len(np.unique(section[section > 0])) for section in references)
    return score(prediction, references) | {"per_section": per_section, "cells": cells, "sections": numbers}
