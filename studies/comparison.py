"""Results of runs -> comparison with what was published, verdicts, Markdown and figures, for `reproduce`.

The functions take the plan (its table, its jobs) and the results that were found; what is missing stays visible.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from studies import verdicts

# -- comparison -------------------------------------------------------------------------------------------------


ROUNDING = 0.0005  # half a unit of the last published digit


@dataclass(frozen=True)
class Line:
    """One metric of one row: published, reproduced, and what to say of it."""

    row: object
    metric: str
    published: float | None
    reproduced: Sequence[float]
    held_out: Sequence[float]
    tolerance: float | None
    verdict: str


def compare(plan, results) -> list[Line]:
    """Published and reproduced, metric by metric; tolerances from the spread over the seeds of all such rows."""
    asked = {job.row.name for job in plan.jobs if job.protocol == "published"}
    lines = []
    for row in plan.table.rows:
        metrics = row.published or (SHOWN if "published" in row.protocols else ())
        lines += [
            compare_metric(plan.table, results, row, metric)
            for metric in metrics
            if row.name in asked or metric.startswith("held_out_")
        ]
    return lines


def compare_metric(table, results, row, metric) -> Line:
    held = metric.startswith("held_out_")
    ours = [] if held else results.values(row.name, metric, held_out=False)
    beside = results.values(
        row.name, f"held_out_{metric.removeprefix('val_')}" if metric == "val_dice" else metric, True
    )
    published, stated = row.published.get(metric), row.tolerance.get(metric)
    if published is None or stated is None:
        return Line(row, metric, published, ours, beside, None, "not judged" if published else "")
    allowed = allowed_of(table, results, metric, len(ours), stated)
    if not ours:
        return Line(row, metric, published, ours, beside, allowed, "no value")
    away = verdicts.spread(ours)[0] - published
    verdict = "within" if abs(away) <= allowed else f"MISSED, {'above' if away > 0 else 'below'} by {abs(away):.3g}"
    return Line(row, metric, published, ours, beside, allowed, verdict)


def allowed_of(table, results, metric, count, stated):
    """The tolerance; the quick recipe is another experiment, so its own stated one stays."""
    groups = [results.values(row.name, metric, False) for row in table.rows if metric in row.published]
    deviation, freedom = verdicts.pooled_deviation(groups)
    if table.quick or not count:
        return stated
    return verdicts.tolerance(deviation, freedom, count, stated=stated, rounding=ROUNDING)


def problems_of(table, results, lines) -> list[str]:
    """Why the table does not count as reproduced, each with the name of the row."""
    problems = [f"{line.row.name}: {TITLES[line.metric]} {line.verdict}" for line in lines if is_problem(line, results)]
    problems += [words for row, words in degenerate(results) if row.published or row.target]
    problems += [words for row in table.rows for words, met in targets(row, results) if not met]
    return problems + [f"{words} (missing)" for words in results.missing]


def degenerate(results):
    """(row, sentence) of every run that learned nothing; for a level of a factor that is a finding, not a failure."""
    return [(job.row, f"{job.name}: {r['degenerate']}") for job, r in results.finished if r.get("degenerate")]


def is_problem(line, results):
    """A missed tolerance, or a finished run without the number; a run that is missing is named by itself."""
    return line.verdict.startswith("MISSED") or (line.verdict == "no value" and results.of(line.row.name, False))


def targets(row, results):
    """(sentence, whether it is met) for each target of a row that has runs."""
    for metric, wanted in row.target.items():
        if not results.of(row.name, held_out=True):
            continue
        mean = verdicts.spread(results.values(row.name, metric, held_out=True))[0]
        verb = "reaches" if mean >= wanted else "misses"
        yield f"{row.name}: mean {TITLES[metric]} {mean:.4f} {verb} the target of {wanted:g}", mean >= wanted


# -- rendering --------------------------------------------------------------------------------------------------

SHOWN = ("loss", "val_loss", "dice", "val_dice")
TITLES = {
    **{"loss": "train loss", "val_loss": "val loss", "dice": "train Dice", "val_dice": "val Dice"},
    **{"held_out_bce": "BCE", "held_out_dice": "Dice", "held_out_v_rand": "V_rand", "held_out_v_info": "V_info"},
    **{"held_out_pixel_error": "pixel error", "held_out_rand_error": "Rand error"},
    **{"held_out_warping_error": "warping error", "held_out_mean_iou": "mean IoU", "held_out_seg": "SEG"},
}
DIGITS = {"held_out_warping_error": 6}
HELD_OUT = ("loss", "val_loss", *(f"held_out_{name}" for name in ("bce", "dice", "v_rand", "v_info", "pixel_error")))


def report(plan, results) -> tuple[list[str], list[str]]:
    """The Markdown, line by line, and the problems that make the exit code 1."""
    table, lines = plan.table, compare(plan, results)
    problems = problems_of(table, results, lines)
    text = [f"### {heading(table, table.title)}", "", machines(results), ""] + [table.note, ""] * bool(table.note)
    text += published_table(plan, results, lines) if lines else []
    text += held_out_table(plan, results) + fold_table(table, results)
    for factor in table.factors:
        text += factor_words(table, factor, results)
    text += comparison_words(table, results) if table.comparisons else []
    met = [words for row in table.rows for words, _ in targets(row, results)]
    text += bullets("Learned nothing:", [words for _, words in degenerate(results)]) + bullets("Targets:", met)
    text += bullets("Not reproduced:", problems)
    return text, problems


def heading(table, title):
    return title + (" (QUICK: reduced recipe, not the full one)" if table.quick else "")


def bullets(title, lines):
    return [title, "", *(f"- {line}" for line in lines), ""] if lines else []


def markdown(head, rows) -> list[str]:
    """A Markdown table, and an empty line."""
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(map(str, cells)) + " |" for cells in lines), ""]


def number(values, digits=4, *, count=True) -> str:
    """Mean, standard deviation and how many.

    >>> number([0.5, 0.7])
    '0.6000 ± 0.1414 (2)'
    """
    mean, deviation = verdicts.spread(values)
    if math.isnan(mean):
        return "-"
    if math.isnan(deviation):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" + f" ({len(values)})" * count


def recipe_words(table, settings) -> str:
    """A recipe in one cell, from the settings that the parser resolved."""
    updates = f"{settings['epochs']} x {settings['steps_per_epoch']} updates of {settings['batch_size']} windows"
    filters = "" if table.name == "table" else f", filters {'-'.join(map(str, settings['filters']))}"
    return "quick: " * table.quick + f"{updates} of {settings['window']} px{filters}"


def recipe(plan, row):
    return recipe_words(plan.table, plan.row_settings(row))


def machines(results) -> str:
    """What the runs ran on, with which versions, and for how long."""
    found = [result for _, result in results.finished]
    if not found:
        return "No finished run yet."
    devices = sorted({f"{result['device']}, {result['precision']}" for result in found})
    versions = sorted(
        {" ".join(f"{k} {v}" for k, v in result["versions"].items() if k != "backend") for result in found}
    )
    commits = sorted({f"{str(r['commit'])[:10]}{'+' * str(r['commit']).endswith('+')}" for r in found})
    minutes = sum(result["minutes"] for result in found)
    data, named = ({result["data"] for result in found}, {result["settings"].get("image_path") for result in found})
    mixed = " **The runs do not share one data set.**" if len(data) > len(named) else ""
    return (
        f"{len(found)} runs, {minutes:.0f} minutes of training, on {'; '.join(devices)}. {'; '.join(versions)}. "
        f"Commit {', '.join(commits)}.{mixed}"
    )


def published_table(plan, results, lines) -> list[str]:
    head = ["row", "recipe", "", "published", "reproduced", "tolerance", "verdict", "held-out runs"]
    rows = []
    for line in lines:
        shown = "-" if line.published is None else f"{line.published:g}"
        allowed = "-" if line.tolerance is None else f"± {line.tolerance:.2g}"
        digits = DIGITS.get(line.metric, 4)
        ours, beside = number(line.reproduced, digits), number(line.held_out, digits)
        rows.append(
            [line.row.name, recipe(plan, line.row), TITLES[line.metric], shown, ours, allowed, line.verdict, beside]
        )
    return [*markdown(head, rows), tolerance_words(plan.table), ""]


def tolerance_words(table):
    common = (
        "Mean ± standard deviation (runs). Losses and Dice are those of the epoch whose weights were kept. In the "
        "held-out runs, train and val loss are of the training and the inner sections, val Dice of the held-out ones. "
    )
    if table.quick:
        return common + (
            "The quick recipe is another experiment: its tolerance is stated beforehand, wide, and only says that the "
            "network learned."
        )
    return common + (
        "Tolerance: t s sqrt(1 + 1/n), the 95 % prediction interval for a single published run, s pooled over the "
        f"seeds of the published rows; with fewer than {verdicts.FEWEST} degrees of freedom the one stated in the row."
    )


def held_out_table(plan, results) -> list[str]:
    """Every row with held-out runs."""
    metrics = plan.table.shown or HELD_OUT
    head = ["row", "recipe", "runs", *(TITLES[m] for m in metrics), "minutes", "parameters"]
    rows = []
    for row in plan.table.rows:
        runs = results.of(row.name, held_out=True)
        if runs:
            values = {metric: results.values(row.name, metric, True) for metric in metrics}
            scores = [number(found, DIGITS.get(metric, 4), count=False) for metric, found in values.items()]
            parameters = {result.get("parameters") for result in runs.values()} - {None}
            minutes = number([result["minutes"] for result in runs.values()], 1, count=False)
            shown = " or ".join(f"{p:,}" for p in sorted(parameters)) or "-"
            rows.append([row.name, recipe(plan, row), len(runs), *scores, minutes, shown])
    return ["Held-out sections:", "", *markdown(head, rows)] if rows else []


def fold_table(table, results) -> list[str]:
    """V_rand of every fold."""
    folds = sorted({job.fold for job, _ in results.finished if job.protocol == "kfold"})
    rows = []
    for row in table.rows if folds else ():
        values = results.metric(row.name, "held_out_v_rand", True)
        cells = [number([v for (_, f), v in values.items() if f == fold]) for fold in folds]
        rows.append([row.name, *cells, number(list(values.values()))])
    return markdown(["V_rand", *(f"fold {fold}" for fold in folds), "all"], rows) if rows else []


NO_DIFFERENCE = {
    "confirmed": "confirmed, it makes no difference",
    "refuted": "refuted, it does make a difference",
    "undecided": "undecided, the runs cannot tell",
    "too few runs": "too few runs",
}


def comparison_words(table, results) -> list[str]:
    """ "Dilation makes no difference", for each pair of rows and metric."""
    rows, names = [], {row.name for row in table.rows}
    for c in table.comparisons:
        if not {c.ours, c.base} <= names:
            continue
        pair = (results.metric(name, c.metric, c.held_out) for name in (c.ours, c.base))
        found = verdicts.interval(verdicts.paired(*pair))
        shown = str(found) if found.count else "-"
        where = TITLES[c.metric] + (" (held-out)" if c.held_out else " (published protocol)")
        verdict = NO_DIFFERENCE[verdicts.no_difference(found, c.margin)]
        small = verdict.startswith("refuted") and max(abs(found.low), abs(found.high)) < c.margin
        rows.append([c.words, where, shown, f"{c.margin:g}", verdict + ", but one below the margin" * small])
    words = (
        "Paired by seed and fold, with the 95 % t-interval of the mean difference. No difference is confirmed if the "
        "interval holds 0 and its half width is below the margin, refuted if it excludes 0. Folds share training "
        "sections, so over folds the interval is on the narrow side."
    )
    if not rows:
        return []
    head = ["does it make a difference?", "measured on", "difference", "margin", "verdict"]
    return [*markdown(head, rows), words, ""]


# -- the factors of the study -----------------------------------------------------------------------------------


def histories(factor, results) -> dict[str, dict]:
    """{level: {(seed, fold): history}} of the held-out runs."""
    found = {level: results.of(row, held_out=True) for level, row in factor.levels.items()}
    return {
        level: {key: r["history"] for key, r in runs.items() if {"loss", "val_loss"} <= r["history"].keys()}
        for level, runs in found.items()
    }


def factor_words(table, factor, results) -> list[str]:
    """Verdicts on the conclusions about one factor, and what to choose."""
    text = [f"#### {heading(table, factor.title)}", ""]
    rows = []
    for conclusion in verdicts.CONCLUSIONS.get(factor.name, ()):
        verdict, found = conclusion.judge(histories(factor, results))
        shown = str(found).replace("pair", "run") if found.count else "-"
        rows.append([conclusion.words, conclusion.rule, shown, verdict])
    if rows:
        text += markdown(["the study", "true where this is positive", "found", "verdict"], rows)
    return [*text, *(steps(factor, results) if factor.name == "sections" else [choice(factor, results)]), ""]


def choice(factor, results) -> str:
    """What a user should choose, in two sentences."""
    scores = {level: results.metric(row, factor.metric, True) for level, row in factor.levels.items()}
    title = TITLES[factor.metric]
    ranked = sorted((level for level in scores if scores[level]), key=lambda level: -mean_of(scores[level]))
    if len(ranked) < 2:
        return "Choose: there are not yet held-out runs of two levels to choose from."
    first, second = ranked[:2]
    lead = verdicts.interval(verdicts.paired(scores[first], scores[second]))
    shown, agreed = number(list(scores[first].values())), f" The study chose {factor.chosen}." * bool(factor.chosen)
    verdict = verdicts.holds(lead)
    if verdict == "confirmed":
        return f"Choose {first}: its held-out {title}, {shown}, is ahead of {second} by {lead}.{agreed}"
    doubt = "rests on too few runs" if verdict == "too few runs" else "is within noise"
    return (
        f"Choose by cost: {first} has the highest held-out {title}, {shown}, but its lead over {second}, {lead}, "
        f"{doubt}.{agreed}"
    )


def mean_of(scores):
    return verdicts.spread(scores.values())[0]


def steps(factor, results) -> list[str]:
    """How much more sections bring, from level to level."""
    lines, levels = [], list(factor.levels.items())
    for (few, row), (many, other) in pairwise(levels):
        pair = [results.metric(name, "held_out_v_rand", True) for name in (other, row)]
        gain = verdicts.interval(verdicts.paired(*pair))
        if gain.count:
            lines.append(f"from {few} to {many} sections V_rand changes by {gain}: {verdicts.holds(gain)}")
    return bullets("More labelled sections:", lines) or ["No two levels have runs of the same seed yet.", ""]


def draw(plan, results, folder) -> list[Path]:
    """A figure per factor that has runs: losses against epochs, or a score against a number."""
    import figures

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for factor in plan.table.factors:
        panels = score_panels(factor, results) if factor.x else loss_panels(factor, results)
        if panels:
            note = heading(plan.table, factor.title)
            path = folder / f"{plan.table.name}-{factor.name}{'-quick' * plan.table.quick}.png"
            written.append(figures.factor(panels, path, xlabel=factor.x or "epoch", title=note))
    return written


def loss_panels(factor, results) -> dict:
    """{panel: {level: (epochs, mean, standard deviation)}}; the deviation of a single run is 0."""
    found = histories(factor, results)
    panels = {}
    for title, column in (("training loss", "loss"), ("validation loss", "val_loss")):
        levels = {level: over_runs(runs.values(), column) for level, runs in found.items()}
        panels[title] = {level: curve for level, curve in levels.items() if curve[0]}
    return {title: levels for title, levels in panels.items() if levels}


def over_runs(runs, column):
    """Epochs, mean and deviation over the runs that reached each epoch."""
    by_epoch = {}
    for history in runs:
        for epoch, value in zip(history["epoch"], history.get(column, ()), strict=False):
            by_epoch.setdefault(epoch, []).append(value)
    epochs = sorted(by_epoch)
    return (epochs, *spreads([by_epoch[epoch] for epoch in epochs]))


def spreads(groups):
    found = [verdicts.spread(group) for group in groups]
    return [mean for mean, _ in found], [0.0 if math.isnan(deviation) else deviation for _, deviation in found]


def score_panels(factor, results) -> dict:
    """V_rand and Dice on the held-out sections against the number that the factor changes."""
    panels = {}
    for metric in ("held_out_v_rand", "held_out_dice"):
        scores = {level: results.values(row, metric, True) for level, row in factor.levels.items()}
        points = sorted((x_of(factor, level, results), values) for level, values in scores.items() if values)
        if points:
            panels[f"held-out {TITLES[metric]}"] = {"": ([x for x, _ in points], *spreads([v for _, v in points]))}
    return panels


def x_of(factor, level, results):
    """The number of a level: sections by its label, the receptive field from the records."""
    if level.isdigit():
        return int(level)
    return next(iter(results.of(factor.levels[level], held_out=True).values()))["receptive_field_px"]
