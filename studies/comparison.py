"""Results of runs -> comparison with what was published, verdicts, Markdown and figures, for `reproduce`.

The functions take the plan (its table, its jobs) and the results that were found; what is missing stays visible.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from score.scores import SCORES
from studies import verdicts

ROUNDING = 0.0005  # half a unit of the last published digit
SHOWN = ("loss", "val_loss", "dice", "val_dice")
# A Dice of windows is soft, of probabilities, as the published one was; of held-out sections it is that of the mask.
TITLES = {
    **{"loss": "train loss", "val_loss": "val loss", "dice": "train Dice (soft)", "val_dice": "val Dice (soft)"},
    **{f"held_out_{name}": score.title for name, score in SCORES.items()},
    "held_out_dice": "Dice at 0.5",
}
DIGITS = {"held_out_warping_error": 6}
HELD_OUT = ("loss", "val_loss", *(f"held_out_{name}" for name in ("bce", "dice", "v_rand", "v_info", "pixel_error")))


# -- published and reproduced -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One metric of one row: published, reproduced, and what to say of it."""

    row: object
    metric: str
    published: float | None
    reproduced: str
    held_out: str
    tolerance: float | None
    verdict: str


def compare(plan, results) -> list[Line]:
    """Published and reproduced, metric by metric; tolerances from the spread over the seeds of all such rows."""
    asked = {job.row.name for job in plan.jobs if job.protocol == "published"}
    return [
        compare_metric(plan.table, results, row, metric)
        for row in plan.table.rows
        for metric in row.published or (SHOWN if "published" in row.protocols else ())
        if row.name in asked or metric.startswith("held_out_")
    ]


def compare_metric(table, results, row, metric) -> Line:
    """Like with like: a training's number beside the same number of the trainings that held sections back."""
    held, digits = metric.startswith("held_out_"), DIGITS.get(metric, 4)
    ours = [] if held else results.values(row.name, metric, held_out=False)
    beside = plus_minus(results.values(row.name, metric, held_out=True), digits)
    published, stated = row.published.get(metric), row.tolerance.get(metric)
    if published is None or stated is None:
        return Line(row, metric, published, plus_minus(ours), beside, None, "not judged" if published else "")
    if not ours:
        reached, where = halfway(results, row, metric)
        return Line(row, metric, published, reached, beside, stated, f"not judged: {where}" if where else "no value")
    allowed = allowed_of(table, results, metric, len(ours), stated)
    away = verdicts.mean_and_deviation(ours)[0] - published
    verdict = "within" if abs(away) <= allowed else f"MISSED, {'above' if away > 0 else 'below'} by {abs(away):.3g}"
    return Line(row, metric, published, plus_minus(ours), beside, allowed, verdict)


def halfway(results, row, metric):
    """What the run of a row that has come furthest has reached, and where it is."""
    found = [
        r for job, r in results.halfway if (job.row, job.protocol) == (row, "published") and metric in r["metrics"]
    ]
    if not found:
        return "-", ""
    result = max(found, key=lambda result: result["epoch"])
    return f"{result['metrics'][metric]:.4f}", f"epoch {result['epoch']} of {result['settings']['epochs']}"


def allowed_of(table, results, metric, count, stated):
    """The tolerance; the quick recipe is another experiment, so its own stated one stays."""
    groups = [results.values(row.name, metric, False) for row in table.rows if metric in row.published]
    deviation, freedom = verdicts.pooled_deviation(groups)
    if table.quick:
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
        values = results.values(row.name, metric, held_out=True)
        if values:
            mean = verdicts.mean_and_deviation(values)[0]
            verb = "reaches" if mean >= wanted else "misses"
            yield f"{row.name}: mean {TITLES[metric]} {mean:.4f} {verb} the target of {wanted:g}", mean >= wanted


# -- rendering --------------------------------------------------------------------------------------------------


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


def markdown(head, body) -> list[str]:
    """A Markdown table, and an empty line."""
    lines = [head, ["---"] * len(head), *body]
    return [*("| " + " | ".join(map(str, cells)) + " |" for cells in lines), ""]


def plus_minus(values, digits=4, *, count=True) -> str:
    """Mean, standard deviation and how many.

    >>> plus_minus([0.5, 0.7])
    '0.6000 ± 0.1414 (2)'
    """
    mean, deviation = verdicts.mean_and_deviation(values)
    if math.isnan(mean):
        return "-"
    if math.isnan(deviation):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" + f" ({len(values)})" * count


def recipe(plan, row) -> str:
    """A recipe in one cell, from the settings that the parser resolved."""
    settings, table = plan.row_settings(row), plan.table
    updates = f"{settings['epochs']} x {settings['steps_per_epoch']} updates of {settings['batch_size']} windows"
    filters = "" if table.name == "table" else f", filters {'-'.join(map(str, settings['filters']))}"
    return "quick: " * table.quick + f"{updates} of {settings['window']} px{filters}"


def machines(results) -> str:
    """What the runs ran on, with which versions, and for how long."""
    found = [result for _, result in results.finished]
    if not found:
        return "No finished run yet."
    devices = sorted({f"{result['device']}, {result['precision']}" for result in found})
    versions = {" ".join(f"{k} {v}" for k, v in r["versions"].items() if k != "backend") for r in found}
    commits = sorted({f"{str(r['commit'])[:10]}{'+' * str(r['commit']).endswith('+')}" for r in found})
    minutes = sum(result["minutes"] for result in found)
    data, named = ({result["data"] for result in found}, {result["settings"].get("image_path") for result in found})
    mixed = " **The runs do not share one data set.**" if len(data) > len(named) else ""
    return (
        f"{len(found)} runs, {minutes:.0f} minutes of training, on {'; '.join(devices)}. "
        f"{'; '.join(sorted(versions))}. Commit {', '.join(commits)}.{mixed}"
    )


def published_table(plan, results, lines) -> list[str]:
    head = ["row", "recipe", "", "published", "reproduced", "tolerance", "verdict", "held-out runs"]
    body = []
    for line in lines:
        shown = "-" if line.published is None else f"{line.published:g}"
        allowed = "-" if line.tolerance is None else f"± {line.tolerance:.2g}"
        numbers = [shown, line.reproduced, allowed, line.verdict, line.held_out]
        body.append([line.row.name, recipe(plan, line.row), TITLES[line.metric], *numbers])
    return [*markdown(head, body), tolerance_words(plan.table), ""]


def tolerance_words(table):
    common = (
        "Mean ± standard deviation (runs). Losses and Dice are those of the epoch whose weights were kept. In the "
        "held-out runs, train is of the training sections and val of the inner ones, which choose the epoch and are "
        "not trained on; Dice is soft in both, as published. The held-out sections themselves are in the next table. "
    )
    if table.quick:
        return common + (
            "The quick recipe is another experiment: its tolerance is stated beforehand, wide, and only says that the "
            "network learned."
        )
    return common + (
        "Tolerance: t s sqrt(1 + 1/n), the 95 % prediction interval for a single published run, s pooled over the "
        "seeds of the published rows; never above the one stated beforehand, which stands alone with fewer than "
        f"{verdicts.FEWEST} degrees of freedom. By chance alone one number in twenty lies outside."
    )


def held_out_table(plan, results) -> list[str]:
    """Every row with held-out runs."""
    metrics = plan.table.shown or HELD_OUT
    head = ["row", "recipe", "runs", *(TITLES[m] for m in metrics), "minutes", "parameters"]
    body = []
    for row in plan.table.rows:
        runs = results.of(row.name, held_out=True)
        if runs:
            values = {metric: results.values(row.name, metric, True) for metric in metrics}
            scores = [plus_minus(found, DIGITS.get(metric, 4), count=False) for metric, found in values.items()]
            parameters = {result.get("parameters") for result in runs.values()} - {None}
            minutes = plus_minus([result["minutes"] for result in runs.values()], 1, count=False)
            shown = " or ".join(f"{p:,}" for p in sorted(parameters)) or "-"
            body.append([row.name, recipe(plan, row), len(runs), *scores, minutes, shown])
    return ["Held-out sections:", "", *markdown(head, body)] if body else []


def fold_table(table, results) -> list[str]:
    """V_rand of every fold."""
    folds = sorted({job.fold for job, _ in results.finished if job.protocol == "kfold"})
    body = []
    for row in table.rows if folds else ():
        values = results.metric(row.name, "held_out_v_rand", True)
        cells = [plus_minus([v for (_, f), v in values.items() if f == fold]) for fold in folds]
        body.append([row.name, *cells, plus_minus(list(values.values()))])
    return markdown(["V_rand", *(f"fold {fold}" for fold in folds), "all"], body) if body else []


NO_DIFFERENCE = {
    "confirmed": "confirmed, it makes no difference beyond the margin",
    "refuted": "refuted, it does make a difference",
    "undecided": "undecided, the runs cannot tell",
    "too few runs": "too few runs",
}


def comparison_words(table, results) -> list[str]:
    """ "Dilation makes no difference", for each pair of rows and metric."""
    names = {row.name for row in table.rows}
    asked = [c for c in table.comparisons if {c.ours, c.base} <= names]
    found = [verdicts.paired(*(results.metric(name, c.metric, c.held_out) for name in (c.ours, c.base))) for c in asked]
    judged = verdicts.no_difference([(sample, c.margin) for c, sample in zip(asked, found, strict=True)])
    body = []
    for c, sample, verdict in zip(asked, found, judged, strict=True):
        where = TITLES[c.metric] + (" (held-out)" if c.held_out else " (published protocol)")
        body.append([c.words, where, sample if sample.values else "-", f"{c.margin:g}", NO_DIFFERENCE[verdict]])
    words = (
        "Paired by seed and fold, a fold's seeds averaged first, with the 95 % t-interval of the mean difference. No "
        "difference is confirmed if the whole interval lies within ± margin (two one-sided tests), refuted if it "
        "excludes 0; both are corrected for the number of lines (Holm), so an interval that only just does so decides "
        "nothing. Folds share training sections, so over folds the interval is on the narrow side."
    )
    head = ["does it make a difference?", "measured on", "difference", "margin", "verdict"]
    return [*markdown(head, body), words, ""] if body else []


# -- the factors of the study -----------------------------------------------------------------------------------


def histories(factor, results) -> dict[str, dict]:
    """{level: {(seed, fold): history}} of the held-out runs."""
    found = {level: results.of(row, held_out=True) for level, row in factor.levels.items()}
    return {
        level: {key: r["history"] for key, r in runs.items() if is_judged(r["history"])}
        for level, runs in found.items()
    }


def is_judged(history):
    """Whether a history has both losses, and quarters."""
    return all(len(history.get(c, ())) >= 4 and min(history[c]) > 0 for c in ("epoch", "loss", "val_loss"))


def factor_words(table, factor, results) -> list[str]:
    """Verdicts on the conclusions about one factor, corrected for their number, and what to choose."""
    conclusions = verdicts.CONCLUSIONS.get(factor.name, ())
    found = [conclusion.sample(histories(factor, results)) for conclusion in conclusions]
    body = [
        [conclusion.words, conclusion.rule, sample if sample.values else "-", verdict]
        for conclusion, sample, verdict in zip(conclusions, found, verdicts.holds(found), strict=True)
    ]
    text = [f"#### {heading(table, factor.title)}", ""]
    if body:
        text += markdown(["the study", "true where this is positive", "found", "verdict"], body)
    return [*text, *(steps(factor, results) if factor.name == "sections" else [choice(factor, results)]), ""]


def choice(factor, results) -> str:
    """What a user should choose, in two sentences."""
    scores = {level: results.metric(row, factor.metric, True) for level, row in factor.levels.items()}
    means = {level: verdicts.independent(found).mean for level, found in scores.items() if found}
    if len(means) < 2:
        return "Choose: there are not yet held-out runs of two levels to choose from."
    first, second = sorted(means, key=means.get, reverse=True)[:2]
    lead = verdicts.paired(scores[first], scores[second])
    if not lead.values:
        return f"Choose: {first} and {second} have no runs of the same seed yet."
    (verdict,) = verdicts.holds([lead])
    shown = f"{TITLES[factor.metric]}, {plus_minus(list(scores[first].values()))}"
    agreed = f" The study chose {factor.chosen}." * bool(factor.chosen)
    if verdict == "confirmed":
        return f"Choose {first}: its held-out {shown}, is ahead of {second} by {lead}.{agreed}"
    doubt = "rests on too few runs" if verdict == "too few runs" else "is within noise"
    ahead = f"{first} has the highest held-out {shown}, but its lead over {second}, {lead}"
    return f"Choose by cost: {ahead}, {doubt}.{agreed}"


def steps(factor, results) -> list[str]:
    """How much more sections bring, from level to level."""
    found = {}
    for (few, row), (many, other) in pairwise(factor.levels.items()):
        gain = verdicts.paired(*(results.metric(name, "held_out_v_rand", True) for name in (other, row)))
        if gain.values:
            found[f"from {few} to {many} sections V_rand changes by {gain}"] = gain
    lines = [f"{words}: {verdict}" for words, verdict in zip(found, verdicts.holds([*found.values()]), strict=True)]
    return bullets("More labelled sections:", lines) or ["No two levels have runs of the same seed yet.", ""]


def pictures(table, folder) -> list[Path]:
    """Files of `draw`, one per factor."""
    return [folder / f"{table.name}-{factor.name}{'-quick' * table.quick}.png" for factor in table.factors]


def draw(plan, results, folder) -> list[Path]:
    """A figure per factor that has runs: losses against epochs, or a score against a number."""
    import figures

    written = []
    for factor, path in zip(plan.table.factors, pictures(plan.table, folder), strict=True):
        panels = score_panels(factor, results) if factor.x else loss_panels(factor, results)
        if panels:
            folder.mkdir(parents=True, exist_ok=True)
            note = heading(plan.table, factor.title)
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
    found = [verdicts.mean_and_deviation(group) for group in groups]
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
