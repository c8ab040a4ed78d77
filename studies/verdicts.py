"""What repeated runs allow one to say: intervals, tolerances, and the study's conclusions as decidable statements.

Numbers and histories in, verdicts out; no files, no runs.

>>> ours, base = {(0, 0): 0.95, (1, 0): 0.96, (2, 0): 0.94}, {(0, 0): 0.94, (1, 0): 0.96, (2, 0): 0.93}
>>> print(paired(ours, base))
+0.0067 [-0.0077, +0.0210], 3 seeds
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

FEWEST = 3  # values that an interval needs; two would give t = 12.7
LEVEL = 0.05  # of a table's wrong statements, and one minus the confidence of an interval
ROUNDING = 0.0005  # half a unit of the last published digit
STILL = 0.05  # a loss that changes by less than this part stagnates; one that rises by more diverges


# -- intervals --------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """Mean; nan of no values."""
    return statistics.fmean(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """Standard deviation (n - 1); nan of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Sample:
    """Values that are independent of each other, and what Student's t says of their mean."""

    values: tuple[float, ...]
    unit: str = "seeds"

    @cached_property
    def mean(self) -> float:
        return mean(self.values)

    @cached_property
    def standard_error(self) -> float:
        return deviation(self.values) / math.sqrt(len(self.values))

    def interval(self) -> tuple[float, float]:
        """The 95 % t-interval of the mean, m -+ t(0.975, n - 1) s / sqrt(n)."""
        half = t_quantile(len(self.values) - 1) * self.standard_error
        return self.mean - half, self.mean + half

    def p_zero(self) -> float | None:
        """How easily a mean so far from 0 arises where the true one is 0 (two-sided p); None of too few values."""
        return self._both_sides(abs(self.mean))

    def p_beyond(self, margin: float) -> float | None:
        """How easily such a mean arises where the true one is `margin` or more away from 0; None of too few values.

        Of two one-sided tests the one at the nearer limit, doubled, so that it is below 0.05 exactly where the whole
        95 % interval lies inside +- margin.
        """
        return self._both_sides(margin - abs(self.mean))

    def _both_sides(self, distance):
        """Twice the probability of a mean by `distance` or more above the true one, by Student's t."""
        from scipy.special import stdtr

        if len(self.values) < FEWEST:
            return None
        if not self.standard_error:  # values that are all the same
            return float(distance <= 0)
        return min(1.0, 2 * float(stdtr(len(self.values) - 1, -distance / self.standard_error)))

    def __str__(self):
        count = f"{len(self.values)} {self.unit if len(self.values) != 1 else self.unit[:-1]}"
        limits = " [{:+.4f}, {:+.4f}]".format(*self.interval()) if len(self.values) >= FEWEST else ""
        return f"{self.mean:+.4f}{limits}, {count}"


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - LEVEL / 2))


def independent(values: Mapping[tuple[int, int], float]) -> Sample:
    """Sample from {(seed, fold): value}: a fold's seeds are averaged first, for they share its sections.

    Where there is one fold only, the seeds are the sample.

    >>> independent({(0, 0): 1.0, (1, 0): 3.0, (0, 1): 6.0})
    Sample(values=(2.0, 6.0), unit='folds')
    """
    folds = sorted({fold for _, fold in values})
    if len(folds) < 2:
        return Sample(tuple(values[key] for key in sorted(values)))
    return Sample(tuple(statistics.fmean(v for (_, f), v in values.items() if f == fold) for fold in folds), "folds")


def paired(ours: Mapping, base: Mapping) -> Sample:
    """Differences ours - base over the (seed, fold) that both have."""
    return independent({key: ours[key] - base[key] for key in ours.keys() & base.keys()})


def pooled_deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, pooled over them, and its degrees of freedom."""
    spread = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in spread)
    squares = sum((len(group) - 1) * statistics.variance(group) for group in spread)
    return math.sqrt(squares / freedom) if freedom else math.nan, freedom


def tolerance(deviation: float, freedom: int, count: int, stated: float) -> float:
    """How far the mean of `count` runs may lie from a published single run.

    Both scatter with the seed, so their difference has the standard deviation s sqrt(1 + 1 / n): the 95 % prediction
    interval t s sqrt(1 + 1 / n) is the tolerance, and at least `ROUNDING`. The one stated beforehand is the ceiling, so
    that noise makes nothing easier to reproduce; it stands alone where s has fewer than 3 degrees of freedom.
    """
    if freedom < FEWEST:
        return stated
    return min(stated, max(ROUNDING, t_quantile(freedom) * deviation * math.sqrt(1 + 1 / count)))


# -- verdicts ---------------------------------------------------------------------------------------------------


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p values adjusted for their number (Holm 1979), so that all of a table's are true in 95 of 100 tables.

    >>> holm([0.04, None, 0.01])
    [0.04, None, 0.02]
    """
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted, highest = [None] * len(ps), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = highest
    return adjusted


def no_difference(table: Sequence[tuple[Sample, float]]) -> list[str]:
    """Verdicts on "it makes no difference" for the (differences, margin) of one table.

    Confirmed if the whole interval lies within +- margin, the smallest difference that would matter; refuted if it
    excludes 0; else undecided, the runs cannot tell. Both kinds are corrected for how many the table holds.
    """
    within = holm([found.p_beyond(margin) for found, margin in table])
    beside = holm([found.p_zero() for found, _ in table])
    words = []
    for same, other in zip(within, beside, strict=True):
        certain = "confirmed" if same is not None and same < LEVEL else "refuted"
        words.append("too few runs" if same is None else certain if min(same, other) < LEVEL else "undecided")
    return words


def holds(table: Sequence[Sample]) -> list[str]:
    """Verdicts on the statements of one table, each true where its number is positive, corrected likewise."""
    words = []
    for found, p in zip(table, holm([found.p_zero() for found in table]), strict=True):
        certain = "confirmed" if found.mean > 0 else "not confirmed"
        words.append("too few runs" if p is None else certain if p < LEVEL else "within noise")
    return words


# -- what a history does ----------------------------------------------------------------------------------------


def quarter(series: Sequence[float], which: int) -> float:
    """Mean over the first (0) to the last (3) quarter of the epochs.

    >>> quarter([8.0, 6.0, 4.0, 2.0], 3)
    2.0
    """
    count = len(series)
    return statistics.fmean(series[which * count // 4 : (which + 1) * count // 4])


def late(series: Sequence[float]) -> float:
    """Mean over the last quarter of the epochs."""
    return quarter(series, 3)


def fall(series: Sequence[float]) -> float:
    """By what part a loss falls from the second quarter to the last."""
    return 1 - late(series) / quarter(series, 1)


def rise(series: Sequence[float]) -> float:
    """By what part of its level a loss rises over the second half of the epochs, along the least-squares line.

    The slope of mere noise is 0 on average; a last value above the lowest one is not, for noise makes that lowest.

    >>> rise([9.0, 2.0, 3.0, 3.0, 3.0, 3.0])
    0.0
    """
    half = series[len(series) // 2 :]
    slope = statistics.linear_regression(range(len(half)), half).slope
    return slope * (len(half) - 1) / statistics.fmean(half)


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

    `measure` takes a history {"loss": series, "val_loss": series} of each level.
    """

    words: str
    rule: str
    levels: tuple[str, ...]
    measure: Callable[..., float]

    def sample(self, histories: Mapping[str, Mapping]) -> Sample:
        """Its numbers, from {level: {(seed, fold): history}}."""
        found = [histories.get(level, {}) for level in self.levels]
        keys = set.intersection(*map(set, found))
        return independent({key: self.measure(*(of_level[key] for of_level in found)) for key in keys})


def _both_fall(words, level):
    rule = "from the second to the last quarter both fall by more than 5 %"
    return Conclusion(words, rule, (level,), lambda h: min(fall(h["loss"]), fall(h["val_loss"])) - STILL)


def _rises(words, level):
    rule = "over the second half the validation loss rises by more than 5 %"
    return Conclusion(words, rule, (level,), lambda h: rise(h["val_loss"]) - STILL)


def _lowest(words, level, others, column):
    what = f"{'training' if column == 'loss' else 'validation'} loss of the last quarter"
    rule = f"{what}, {' or '.join(others)}{', whichever is lower,' * (len(others) > 1)} minus {level}"
    measure = lambda best, *rest: min(late(h[column]) for h in rest) - late(best[column])  # noqa: E731
    return Conclusion(words, rule, (level, *others), measure)


def _more(words, rule, more, less, of, column="val_loss"):
    return Conclusion(words, f"{rule}, {more} minus {less}", (more, less), lambda a, b: of(a[column]) - of(b[column]))


STAGNATES = "from the second to the last quarter training falls by more than 5 %, validation by less"
FIRST = "training loss of the first quarter"
SHOOTS = "largest rise of the validation loss above the minimum before it"
STEP = "mean step of the validation loss from epoch to epoch in the second half"
KEPT = "training loss of the last quarter less than 5 % below the first epoch"
CONCLUSIONS = {
    "depth": (
        Conclusion(
            "with depth 3 the training loss falls while the validation loss stagnates",
            *(STAGNATES, ("3",), lambda h: min(fall(h["loss"]) - STILL, STILL - fall(h["val_loss"]))),
        ),
        _both_fall("with depth 4 both fall", "4"),
        _lowest("depth 4 ends with the lower validation loss", "4", ("3",), "val_loss"),
    ),
    "augmentation": (
        _more("raw data give lower errors at first", FIRST, "augmented", "raw", lambda x: quarter(x, 0), "loss"),
        _rises("with raw data the validation loss then rises", "raw"),
        _both_fall("with augmented data both losses keep falling", "augmented"),
    ),
    "lr": (
        _lowest("a rate of 1e-5 does not reach a low loss", "1e-4", ("1e-5",), "loss"),
        _more("with 1e-3 the validation loss shoots up", SHOOTS, "1e-3", "1e-4", overshoot),
        _lowest("1e-4 is the best of the three", "1e-4", ("1e-5", "1e-3"), "val_loss"),
    ),
    "optimizer": (
        Conclusion("SGD does not reduce the loss", KEPT, ("SGD",), lambda h: STILL - reduction(h["loss"])),
        _lowest("Adam reaches the lowest loss", "Adam", ("SGD", "Adamax"), "loss"),
        _rises("with Adam the validation loss shows signs of divergence", "Adam"),
        _more("Adamax is smooth", STEP, "Adam", "Adamax", roughness),
    ),
}
