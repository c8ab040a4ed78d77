"""Whether a stack has the gray values that a network was trained on: they are mapped, warned about, or refused.

A network sees (value - mean) / standard deviation of its TRAINING sections. Of the centres of three sections:

1. Values are read as they are, or so that white of their type becomes white of the training's type (255, 65535, or 1
   where floating point goes no further), whichever fits the training's percentiles better.
2. Percentiles that are then far from the training's (`WARN_SD`, in its standard deviations, `WARN_RANGE` a factor) are
   a warning, those beyond `REFUSE_SD` or `REFUSE_RANGE` are refused, but for a single gray value or few pixels.
3. If the percentiles, freed of mean and standard deviation, fit the mirrored ones of the training twice as well as its
   own, or thin lines are bright that were dark there (`dark_lines`), the stack is probably inverted: a warning.
   ISBI-2012 and the synthetic stack have 0.09 to 0.19, with other contrast, noise or pixel size 0.05 to 0.22; inverted
   -0.09 and less.
"""

import numpy as np

from data import DataError, Normalisation

LEVELS = (5, 25, 50, 75, 95)
NORMAL = np.array([-1.645, -0.674, 0.0, 0.674, 1.645])  # the same of a normal distribution, for records without theirs
WARN_SD, REFUSE_SD = 0.5, 8.0  # three sections of ISBI-2012 are up to 0.2 from all; gamma 0.7 is 0.6
WARN_RANGE, REFUSE_RANGE = 2.5, 8.0
SKEWED = 0.06  # how far freed percentiles must be from the training's, in sd, to be called inverted; noise is 0.02
LINES, LINES_PX = 0.05, 2**16  # of `dark_lines`: less of it, or in fewer pixels, says nothing
FEW_PX = 2**10  # pixels say nothing for certain
SAMPLE_PX = 2048  # side of the centre that is looked at


def sample(reader, side=SAMPLE_PX):
    """Pixels of the centres of the first, the middle and the last section, (S, h, w)."""
    count, *size = reader.shape
    centre = [slice(max(0, (n - side) // 2), min(n, (n + side) // 2)) for n in size]
    return np.stack([reader.part(index, *centre) for index in sorted({0, count // 2, count - 1})])


def normalisation_for(pixels, record, how, log):
    """The `Normalisation` with which a network sees a stack; `log` is told what was found.

    Parameters
    ----------
    pixels : ndarray of shape (S, h, w)
        Of `sample`; a DataError where these values cannot be those that the network knows.
    record : dict
        Of the weights, with `normalisation` and, but for old ones, `intensity`.
    how : {"training", "own"}
        Of --normalise; with the mean and standard deviation of `pixels`, 1 and 2 are of no concern.
    """
    trained, kept = Normalisation.from_dict(record["normalisation"]), record.get("intensity")
    pixels = np.stack([one for one in pixels if one.min() < one.max()] or [*pixels])  # but for blank sections
    dtype, white, levels = "uint8", 255.0, None  # of old records, which do not say
    if kept is not None:
        dtype, white = kept["dtype"], _white(kept["dtype"], kept["max"])
        white = white or next((known for known in (255.0, 65535.0) if kept["max"] <= known), float(kept["max"]))
        levels = np.array([kept["percentiles"][level - 1] for level in LEVELS])
    found, own = np.percentile(pixels.astype(np.float64), LEVELS), Normalisation.fit(pixels)
    lines = (kept or {}).get("dark_lines", 0)
    turned = abs(lines) > LINES and dark_lines(pixels) * np.sign(lines) < -LINES
    if levels is not None:
        ours, theirs = (
            (span - norm.mean) / (norm.std + norm.epsilon) for span, norm in ((found, own), (levels, trained))
        )
        straight, mirrored = np.abs(ours - theirs).mean(), np.abs(-ours[::-1] - theirs).mean()
        turned |= straight > SKEWED and mirrored < straight / 2
    if turned:
        log("warning: the stack looks inverted: what is dark in it was bright in the training sections.")
    if how == "own":
        if not own.std:
            raise DataError("--normalise own needs sections of more than one gray value.")
        log(f"normalised by its own mean {own.mean:.4g} and standard deviation {own.std:.4g}")
        return own
    levels = trained.mean + trained.std * NORMAL if levels is None else levels
    factors = {1.0, white / (_white(pixels.dtype, pixels.max()) or white)}
    factor = min(factors, key=lambda factor: (_distance(found * factor, levels, trained), factor != 1.0))
    if factor != 1.0:
        log(f"gray values: {pixels.dtype} is read as the {dtype} of the training sections, times {factor:.4g}")
    _judge(found, factor, levels, trained, log, pixels.size >= FEW_PX)
    return Normalisation(trained.mean / factor, trained.std / factor, trained.epsilon / factor)


def is_record(kept):
    """Whether what a record of weights says of the training's gray values can be what `train` writes."""
    try:
        numbers = (kept.get("dark_lines", 0), kept["min"], kept["max"], *kept["percentiles"])
        finite = all(type(number) in (int, float) and np.isfinite(float(number)) for number in numbers)
        return len(numbers) == 102 and finite and np.dtype(kept["dtype"]).kind in "buif"
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return False


def dark_lines(sections):
    """Thin dark structures against thin bright ones, in (S, h, w): a logarithm that no contrast changes."""
    from scipy import ndimage

    if sections.size < LINES_PX:
        return 0.0
    ratios = []
    top, left = (max(0, (side - 512) // 2) for side in sections.shape[1:])
    for section in sections[:, top : top + 512, left : left + 512]:
        gray = ndimage.gaussian_filter(section.astype(np.float64), 1)
        dark, bright = ndimage.grey_closing(gray, (9, 9)) - gray, gray - ndimage.grey_opening(gray, (9, 9))
        ratios.append(np.log((dark.mean() + 1e-9) / (bright.mean() + 1e-9)))
    found = float(np.mean(ratios))
    return round(found, 4) if np.isfinite(found) else 0.0


def _white(dtype, largest):
    """The largest value of a type; of floating point 1 where nothing is larger, else unknown."""
    dtype = np.dtype(dtype)
    if dtype.kind in "ui":
        return float(np.iinfo(dtype).max)
    return 1.0 if largest <= 1 else None


def _distance(found, levels, trained):
    return float(np.abs(found - levels).mean() / (trained.std + trained.epsilon))


def _judge(found, factor, levels, trained, log, enough):
    """Warn of gray values that are not those of the training, or refuse them."""
    away = _distance(found * factor, levels, trained)
    ratio = float(factor * (found[-1] - found[0]) / max(levels[-1] - levels[0], 1e-30))
    stack, training = (f"{span[0]:.4g} to {span[-1]:.4g}" for span in (found, levels))
    times = f", which is {factor * found[0]:.4g} to {factor * found[-1]:.4g} there" if factor != 1.0 else ""
    words = f"most gray values of the training sections lie from {training}, of this stack from {stack}{times}"
    if enough and (away > REFUSE_SD or ratio > REFUSE_RANGE or 0 < ratio < 1 / REFUSE_RANGE):
        advice = "`predict --normalise own` adapts them"
        raise DataError(f"--image_path: {words}: the network knows no such values ({advice}).")
    if away > WARN_SD or not 1 / WARN_RANGE < ratio < WARN_RANGE:
        log(f"warning: {words}; compare with --normalise own.")
