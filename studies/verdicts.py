"""What repeated runs allow one to say: intervals, tolerances, and the conclusions of the two studies as statements
that a computer can decide. Numbers and histories in, verdicts out; no files, no runs.

>>> values = paired({(0, 0): 0.95, (1, 0): 0.96, (2, 0): 0.94}, {(0, 0): 0.94, (1, 0): 0.96, (2, 0): 0.93})
>>> print(interval(values))
+0.0067 [-0.0077, +0.0210], 3 pairs
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

FEWEST = 3  # values that an interval needs; two would give t = 12.7
CONFIDENCE = 0.95
STILL = 0.05  # a loss that changes by less than this part stagnates; one that rises by more diverges


# -- intervals --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """Mean and 95 % interval of `count` values; without limits where there are too few."""

    count: int
    mean: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self):
        if math.isnan(self.low):
            return f"{self.mean:+.4f}, {self.count} pair{'s' * (self.count != 1)}"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}], {self.count} pairs"


def interval(values: Sequence[float]) -> Interval:
    """Mean of the values and its 95 % t-interval, m -+ t(0.975, n - 1) s / sqrt(n)."""
    values = list(values)
    if not values:
        return Interval(0, math.nan)
    mean = statistics.fmean(values)
    if len(values) < FEWEST:
        return Interval(len(values), mean)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(len(values), mean, mean - half, mean + half)


def paired(ours: Mapping, base: Mapping) -> list[float]:
    """Differences ours - base over the (seed, fold) that both have."""
    return [ours[key] - base[key] for key in sorted(ours.keys() & base.keys())]


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1); nan for the deviation of a single value."""
    values = list(values)
    if not values:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def pooled_deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, pooled over them, and its degrees of freedom."""
    freedom = sum(len(group) - 1 for group in groups if group)
    if not freedom:
        return math.nan, 0
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups if len(group) > 1)
    return math.sqrt(squares / freedom), freedom


def tolerance(deviation: float, freedom: int, count: int, *, stated: float, rounding: float) -> float:
    """How far the mean of `count` runs may lie from a published single run.

    Both scatter with the seed, so their difference has the standard deviation s sqrt(1 + 1 / n): the 95 % prediction
    interval t s sqrt(1 + 1 / n) is the tolerance, and at least half a unit of the last digit that was published.
    Where s has fewer than 3 degrees of freedom the tolerance is the one stated beforehand in the row.
    """
    if freedom < FEWEST:
        return stated
    return max(rounding, t_quantile(freedom) * deviation * math.sqrt(1 + 1 / count))


# -- verdicts ---------------------------------------------------------------------------------------------------


def no_difference(found: Interval, margin: float) -> str:
    """Verdict on "it makes no difference": confirmed, refuted, undecided, or too few runs.

    Refuted if the interval excludes 0; confirmed if it holds 0 and its half width is below `margin`, the smallest
    difference that would matter; else undecided: the runs cannot tell.
    """
    if math.isnan(found.low):
        return "too few runs"
    if found.low > 0 or found.high < 0:
        return "refuted"
    return "confirmed" if (found.high - found.low) / 2 < margin else "undecided"


def holds(found: Interval) -> str:
    """Verdict on a statement that is true where its number is positive: confirmed, not confirmed, within noise."""
    if math.isnan(found.low):
        return "too few runs"
    if found.low > 0:
        return "confirmed"
    return "not confirmed" if found.high < 0 else "within noise"


# -- what a history does ----------------------------------------------------------------------------------------


def quarter(series: Sequence[float], which: int) -> float:
    """Mean over the first (0) to the last (3) quarter of the epochs.

    >>> quarter([8.0, 6.0, 4.0, 2.0], 3)
    2.0
    """
    if len(series) < 4:
        raise ValueError(f"a history must have at least 4 epochs to be judged. Received: {len(series)}")
    count = len(series)
    return statistics.fmean(series[which * count // 4 : (which + 1) * count // 4])


def late(series: Sequence[float]) -> float:
    """Mean over the last quarter of the epochs."""
    return quarter(series, 3)


def fall(series: Sequence[float]) -> float:
    """By what part a loss falls from the second quarter to the last."""
    return 1 - late(series) / quarter(series, 1)


def rise(series: Sequence[float]) -> float:
    """By what part the last quarter lies above the lowest level, a running mean over a tenth of the epochs."""
    width = max(1, len(series) // 10)
    means = [statistics.fmean(series[i : i + width]) for i in range(len(series) - width + 1)]
    return late(series) / min(means) - 1


def overshoot(series: Sequence[float]) -> float:
    """By what part a loss ever exceeds the minimum that it had reached before."""
    lowest, highest = math.inf, 0.0
    for value in series:
        lowest = min(lowest, value)
        highest = max(highest, value / lowest - 1)
    return highest


def roughness(series: Sequence[float]) -> float:
    """Mean step from epoch to epoch in the second half, as a part of the level there."""
    half = series[len(series) // 2 :]
    steps = [abs(b - a) for a, b in pairwise(half)]
    return statistics.fmean(steps) / statistics.fmean(half)


def reduction(series: Sequence[float]) -> float:
    """By what part the last quarter lies below the first epoch."""
    return 1 - late(series) / series[0]


# -- the conclusions of the training study ----------------------------------------------------------------------


@dataclass(frozen=True)
class Conclusion:
    """A sentence of the study, and a number per (seed, fold) that is positive where it is true.

    `measure` takes {level: {"loss": series, "val_loss": series}} and says how far the statement is fulfilled.
    """

    words: str
    rule: str
    levels: tuple[str, ...]
    measure: Callable[[Mapping[str, Mapping[str, Sequence[float]]]], float]

    def judge(self, histories: Mapping[str, Mapping]) -> tuple[str, Interval]:
        """Verdict and interval, from {level: {(seed, fold): history}}."""
        keys = set.intersection(*(set(histories.get(level, ())) for level in self.levels))
        found = interval(
            [self.measure({level: histories[level][key] for level in self.levels}) for key in sorted(keys)]
        )
        return holds(found), found


def _stagnates(h):
    return min(fall(h["3"]["loss"]) - STILL, STILL - fall(h["3"]["val_loss"]))


def _both_fall(level):
    return lambda h: min(fall(h[level]["loss"]), fall(h[level]["val_loss"])) - STILL


def _lower_at_first(h):
    return quarter(h["augmented"]["loss"], 0) - quarter(h["raw"]["loss"], 0)


def _diverges(level):
    return lambda h: rise(h[level]["val_loss"]) - STILL


def _lowest(best, column):
    return lambda h: min(late(h[level][column]) for level in h if level != best) - late(h[best][column])


CONCLUSIONS = {
    "depth": (
        Conclusion(
            "with depth 3 the training loss falls while the validation loss stagnates",
            "from the second to the last quarter training falls by more than 5 %, validation by less",
            ("3",),
            _stagnates,
        ),
        Conclusion(
            "with depth 4 both fall",
            "from the second to the last quarter both fall by more than 5 %",
            ("4",),
            _both_fall("4"),
        ),
        Conclusion(
            "depth 4 ends with the lower validation loss",
            "validation loss of the last quarter, depth 3 minus depth 4",
            ("3", "4"),
            _lowest("4", "val_loss"),
        ),
    ),
    "augmentation": (
        Conclusion(
            "raw data give lower errors at first",
            "training loss of the first quarter, augmented minus raw",
            ("raw", "augmented"),
            _lower_at_first,
        ),
        Conclusion(
            "with raw data the validation loss then rises",
            "validation loss of the last quarter more than 5 % above its lowest level",
            ("raw",),
            _diverges("raw"),
        ),
        Conclusion(
            "with augmented data both losses keep falling",
            "from the second to the last quarter both fall by more than 5 %",
            ("augmented",),
            _both_fall("augmented"),
        ),
    ),
    "lr": (
        Conclusion(
            "a rate of 1e-5 does not reach a low loss",
            "training loss of the last quarter, 1e-5 minus 1e-4",
            ("1e-5", "1e-4"),
            _lowest("1e-4", "loss"),
        ),
        Conclusion(
            "with 1e-3 the validation loss shoots up",
            "largest rise of the validation loss above the minimum before it, 1e-3 minus 1e-4",
            ("1e-3", "1e-4"),
            lambda h: overshoot(h["1e-3"]["val_loss"]) - overshoot(h["1e-4"]["val_loss"]),
        ),
        Conclusion(
            "1e-4 is the best of the three",
            "validation loss of the last quarter, the better of the two others minus 1e-4",
            ("1e-5", "1e-4", "1e-3"),
            _lowest("1e-4", "val_loss"),
        ),
    ),
    "optimizer": (
        Conclusion(
            "SGD does not reduce the loss",
            "training loss of the last quarter less than 5 % below the first epoch",
            ("SGD",),
            lambda h: STILL - reduction(h["SGD"]["loss"]),
        ),
        Conclusion(
            "Adam reaches the lowest loss",
            "training loss of the last quarter, the better of the two others minus Adam",
            ("SGD", "Adam", "Adamax"),
            _lowest("Adam", "loss"),
        ),
        Conclusion(
            "with Adam the validation loss shows signs of divergence",
            "validation loss of the last quarter more than 5 % above its lowest level",
            ("Adam",),
            _diverges("Adam"),
        ),
        Conclusion(
            "Adamax is smooth",
            "mean step of the validation loss from epoch to epoch in the second half, Adam minus Adamax",
            ("Adam", "Adamax"),
            lambda h: roughness(h["Adam"]["val_loss"]) - roughness(h["Adamax"]["val_loss"]),
        ),
    ),
}
