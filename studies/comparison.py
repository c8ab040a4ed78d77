"""Results of runs -> comparison with what was published, verdicts, Markdown and figures, for `reproduce`.

The functions take the results that were found of a plan (its table, its jobs); what is missing stays visible.
"""

import re
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

from score.scores import SCORES
from studies import verdicts

SHOWN = ("loss", "val_loss", "dice", "val_dice")
# A Dice of windows is soft, of probabilities, as the published one was; of held-out sections it is that of the mask.
TITLES = {
    **{"loss": "train loss", "val_loss": "val loss", "dice": "train Dice (soft)", "val_dice": "val Dice (soft)"},
    **{f"held_out_{name}": score.title for name, score in SCORES.items()},
    "held_out_dice": "Dice at 0.5",
    **{f"held_out_merged_{name}": f"{SCORES[name].title}, false borders taken away" for name in ("v_rand", "v_info")},
}
DIGITS = {f"held_out_{name}": score.digits for name, score in SCORES.items() if score.digits > 5}  # of others 4
HELD_OUT = ("loss", "val_loss", *(f"held_out_{name}" for name in ("bce", "dice", "v_rand", "v_info", "pixel_error")))
V_RANDS = ("held_out_v_rand", "held_out_merged_v_rand")
BY_FOLD = (*V_RANDS, "held_out_v_info", "held_out_merged_v_info")


def report(results) -> tuple[list[str], list[str]]:
    """The Markdown, line by line, and the problems that make the exit code 1."""
    table, lines = results.table, published_lines(results)
    problems = problems_of(results, lines)
    text = [f"### {heading(table, table.title)}", "", machines(results), ""] + [table.note, ""] * bool(table.note)
    if lines:
        head = ["row", "recipe", "", "published", "reproduced", "tolerance", "verdict", "held-out runs"]
        text += [*markdown(head, lines), READING + (TOLERANCE_QUICK if table.quick else TOLERANCE), ""]
    text += held_out_table(results) + fold_table(results)
    for factor in table.factors:
        text += factor_words(factor, results)
    text += comparison_words(results)
    text += bullets("Learned nothing:", [words for _, words in degenerate(results)])
    text += bullets("Targets:", [words for words, _ in targets(results)])
    return text + bullets("Not reproduced:", problems), problems


# -- published and reproduced -----------------------------------------------------------------------------------


def published_lines(results) -> list[list[str]]:
    """The cells of a table: metric by metric of every row."""
    asked = {job.row.name for job in results.plan.jobs if job.protocol == "published"}
    return [
        [row.name, recipe(results.plan, row), TITLES[metric], *compare(results, row, metric)]
        for row in results.table.rows
        for metric in row.published or (SHOWN if "published" in row.protocols else ())
        if row.name in asked or metric.startswith("held_out_")
    ]


def compare(results, row, metric) -> list[str]:
    """Published, reproduced, tolerance, verdict; beside it the same number of trainings that held sections back."""
    ours = [] if metric.startswith("held_out_") else results.values(row.name, metric, held_out=False)
    beside = plus_minus(results.values(row.name, metric), DIGITS.get(metric, 4))
    published, stated = row.published.get(metric), row.tolerance.get(metric)
    if published is None:
        return ["-", plus_minus(ours), "-", "", beside]
    if stated is None:
        return [f"{published:g}", plus_minus(ours), "-", "not judged", beside]
    if not ours:
        reached, verdict = halfway(results, row, metric)
        return [f"{published:g}", reached, f"± {stated:.2g}", verdict, beside]
    # The spread is that over the seeds of all such rows; the quick recipe is another experiment, and keeps its own.
    groups = [results.values(other.name, metric, held_out=False) for other in results.table.rows if other.published]
    spread = verdicts.pooled_deviation(groups)
    allowed = stated if results.table.quick else verdicts.tolerance(*spread, len(ours), stated)
    away = verdicts.mean(ours) - published
    verdict = "within" if abs(away) <= allowed else f"MISSED, {'above' if away > 0 else 'below'} by {abs(away):.3g}"
    return [f"{published:g}", plus_minus(ours), f"± {allowed:.2g}", verdict, beside]


def halfway(results, row, metric) -> tuple[str, str]:
    """What the run of a row that has come furthest has reached, and where it is."""
    ours = [result for job, result in results.halfway if job.row is row and job.protocol == "published"]
    found = [result for result in ours if metric in result["metrics"]]
    if not found:
        return "-", "no value"
    result = max(found, key=lambda result: result["epoch"])
    where = f"epoch {result['epoch']} of {result['settings']['epochs']}"
    return f"{result['metrics'][metric]:.4f}", f"not judged: {where}"


def problems_of(results, lines) -> list[str]:
    """Why the table does not count as reproduced, each with the name of the row."""
    problems = []
    for name, _, title, *_, verdict, _ in lines:
        # a finished run without the number; a run that is missing is named by itself
        if verdict.startswith("MISSED") or (verdict == "no value" and results.of(name, held_out=False)):
            problems.append(f"{name}: {title} {verdict}")
    problems += [words for row, words in degenerate(results) if row.published or row.target]
    problems += [words for words, met in targets(results) if not met]
    return problems + [f"{words} (missing)" for words in results.missing]


def degenerate(results):
    """(row, sentence) of every run that learned nothing; for a level of a factor that is a finding, not a failure."""
    return [(job.row, f"{job.name}: {r['degenerate']}") for job, r in results.finished if r["degenerate"]]


def targets(results):
    """(sentence, whether it is met) for each target of a row that has runs; each seed must have all folds."""
    for row in results.table.rows:
        folds = {job.fold for job in results.plan.jobs if job.row is row}
        for metric, wanted in row.target.items():
            if found := results.metric(row.name, metric):
                mean, planned = verdicts.independent(found).mean, len(folds) * len({seed for seed, _ in found})
                there, whole = f"{row.name}: mean {TITLES[metric]} {mean:.4f}", len(found) == planned
                verb = "reaches" if mean >= wanted else "misses"
                so_far = f" in {len(found)} of {planned} runs; the target of {wanted:g} is for all"
                yield there + (f" {verb} the target of {wanted:g}" if whole else so_far), whole and mean >= wanted


# -- rendering --------------------------------------------------------------------------------------------------

READING = (
    "Mean ± standard deviation (runs). Losses and Dice are those of the epoch whose weights were kept. In the held-out "
    "runs, train is of the training sections and val of the inner ones, which choose the epoch and are not trained on; "
    "Dice is soft in both, as published. The held-out sections themselves are in the next table. "
)
TOLERANCE = (
    "Tolerance: t s sqrt(1 + 1/n), the 95 % prediction interval for a single published run, s pooled over the seeds of "
    f"the published rows; never above the one stated beforehand, which stands alone with fewer than {verdicts.FEWEST} "
    "degrees of freedom. By chance alone one number in twenty lies outside."
)
TOLERANCE_QUICK = (
    "The quick recipe is another experiment: its tolerance is stated beforehand, wide, and only says that the network "
    "learned."
)
PAIRED = (
    "Paired by seed and fold, a fold's seeds averaged first, with the 95 % t-interval of the mean difference. No "
    "difference is confirmed if the whole interval lies within ± margin (two one-sided tests), refuted if it excludes "
    "0; both are corrected for the number of lines (Holm), so an interval that only just does so decides nothing. "
    "Folds share training sections, so over folds the interval is on the narrow side."
)
NO_DIFFERENCE = {
    "confirmed": "confirmed, it makes no difference beyond the margin",
    "refuted": "refuted, it does make a difference",
    "undecided": "undecided, the runs cannot tell",
    "too few runs": "too few runs",
}


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
    if not values:
        return "-"
    spread = f" ± {verdicts.deviation(values):.{digits}f}" + f" ({len(values)})" * count
    return f"{verdicts.mean(values):.{digits}f}" + spread * (len(values) > 1)


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
    commits = sorted({commit[:10] + "+" * commit.endswith("+") for commit in (str(r["commit"]) for r in found)})
    minutes = sum(result["minutes"] for result in found)
    sources = [(result["settings"].get("image_path"), result["data"]) for result in found]
    mixed = " **The runs do not share one data set.**" * (len(set(sources)) > len(dict(sources)))
    starts = {(r["settings"].get("init_from"), r["init_from"]) for r in found if r.get("init_from")}
    mixed += " **The runs do not start from one network.**" * (len(starts) > len(dict(starts)))
    trained = f"{len(found)} run{'s' * (len(found) > 1)}, {minutes:.0f} minutes of training, on {'; '.join(devices)}."
    return f"{trained} {'; '.join(sorted(versions))}. Commit {', '.join(commits)}.{mixed}"


def held_out_table(results) -> list[str]:
    """Every row with held-out runs."""
    metrics = results.table.shown or HELD_OUT
    head = ["row", "recipe", "runs", *(TITLES[m] for m in metrics), "minutes", "parameters"]
    body = []
    for row in results.table.rows:
        runs = results.of(row.name).values()
        scores = [plus_minus(results.values(row.name, m), DIGITS.get(m, 4), count=False) for m in metrics]
        minutes = plus_minus([result["minutes"] for result in runs], 1, count=False)
        parameters = " or ".join(f"{n:,}" for n in sorted({result["parameters"] for result in runs} - {None}))
        if runs:
            body.append([row.name, recipe(results.plan, row), len(runs), *scores, minutes, parameters or "-"])
    return ["Held-out sections:", "", *markdown(head, body)] if body else []


def fold_table(results) -> list[str]:
    """V_rand and V_info of every fold, also with the false borders taken away."""
    folds = sorted({job.fold for job, _ in results.finished if job.protocol == "kfold"})
    body = []
    for row, metric in product(results.table.rows if folds else (), BY_FOLD):
        if values := results.metric(row.name, metric):
            cells = [plus_minus([v for (_, f), v in values.items() if f == fold]) for fold in folds]
            body.append([row.name, TITLES[metric], *cells, plus_minus(list(values.values()))])
    return markdown(["row", "score", *(f"fold {fold}" for fold in folds), "all"], body) if body else []


def comparison_words(results) -> list[str]:
    """ "Dilation makes no difference", for each pair of rows and metric."""
    names = {row.name for row in results.table.rows}
    asked = [c for c in results.table.comparisons if {c.ours, c.base} <= names]
    found = [verdicts.paired(*(results.metric(name, c.metric, c.held_out) for name in (c.ours, c.base))) for c in asked]
    judged = verdicts.no_difference([(sample, c.margin) for c, sample in zip(asked, found, strict=True)])
    body = []
    for c, sample, verdict in zip(asked, found, judged, strict=True):
        where = TITLES[c.metric] + (" (held-out)" if c.held_out else " (published protocol)")
        body.append([c.words, where, sample if sample.values else "-", f"{c.margin:g}", NO_DIFFERENCE[verdict]])
    head = ["does it make a difference?", "measured on", "difference", "margin", "verdict"]
    return [*markdown(head, body), PAIRED, ""] if body else []


# -- the factors of the study -----------------------------------------------------------------------------------


def histories(factor, results) -> dict[str, dict]:
    """{level: {(seed, fold): history}} of the held-out runs that have both losses, and quarters."""

    def is_judged(history):
        return all(len(history.get(c, ())) >= 4 and min(history[c]) > 0 for c in ("epoch", "loss", "val_loss"))

    return {
        level: {key: r["history"] for key, r in results.of(row).items() if is_judged(r["history"])}
        for level, row in factor.levels.items()
    }


def factor_words(factor, results) -> list[str]:
    """Verdicts on the conclusions about one factor, corrected for their number, and what to choose."""
    conclusions = verdicts.CONCLUSIONS.get(factor.name, ())
    found = [conclusion.sample(histories(factor, results)) for conclusion in conclusions]
    body = [
        [conclusion.words, conclusion.rule, sample if sample.values else "-", verdict]
        for conclusion, sample, verdict in zip(conclusions, found, verdicts.holds(found), strict=True)
    ]
    text = [f"#### {heading(results.table, factor.title)}", ""]
    if body:
        text += markdown(["the study", "true where this is positive", "found", "verdict"], body)
    advice = [choice(factor, results)] if factor.alike else steps(factor, results) if factor.name == "sections" else []
    return [*text, *advice, ""] if advice else text


def choice(factor, results) -> str:
    """What a user should choose, in two sentences."""
    found = {level: results.metric(row, factor.metric) for level, row in factor.levels.items()}
    found = {level: values for level, values in found.items() if values}
    if len(found) < 2:
        return "Choose: there are not yet held-out runs of two levels to choose from."
    shared = set.intersection(*map(set, found.values()))  # what is ranked is what is compared
    if not shared:
        return f"Choose: {', '.join(found)} have no runs of the same seed yet."
    scores = {level: {key: values[key] for key in sorted(shared)} for level, values in found.items()}
    means = {level: verdicts.independent(values).mean for level, values in scores.items()}
    first, second = sorted(means, key=means.get, reverse=True)[:2]
    lead = verdicts.paired(scores[first], scores[second])
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
    for metric, ((few, row), (many, other)) in product(V_RANDS, pairwise(factor.levels.items())):
        gain = verdicts.paired(*(results.metric(name, metric) for name in (other, row)))
        if gain.values:
            found[f"from {few} to {many} sections {TITLES[metric].replace(',', ' with')} changes by {gain}"] = gain
    judged = [verdict.replace("not confirmed", "confirmed") for verdict in verdicts.holds([*found.values()])]  # a fall
    lines = [f"{words}: {verdict}" for words, verdict in zip(found, judged, strict=True)]
    return bullets("More labelled sections:", lines) or ["No two levels have runs of the same seed yet.", ""]


def picture(table, factor, folder) -> Path:
    return Path(folder) / f"{table.name}-{factor.name}{'-quick' * table.quick}.png"


def draw(results, folder) -> Iterator[Path]:
    """A figure per factor that has runs: losses against epochs, or a score against a number."""
    import figures

    for factor in results.table.factors:
        panels = score_panels(factor, results) if factor.x else loss_panels(factor, results)
        if panels:
            words = {"xlabel": factor.x or "epoch", "title": heading(results.table, factor.title)}
            yield figures.factor(panels, picture(results.table, factor, folder), **words)


def loss_panels(factor, results) -> dict:
    """{panel: {level: (epochs, mean, standard deviation)}}."""
    found = {level: runs.values() for level, runs in histories(factor, results).items() if runs}
    panels = {}
    for title, column in {"training loss": "loss", "validation loss": "val_loss"}.items():
        for level, runs in found.items():
            by_epoch = {}  # over the runs that reached it
            for history in runs:
                for epoch, value in zip(history["epoch"], history[column], strict=True):
                    by_epoch.setdefault(epoch, []).append(value)
            panels.setdefault(title, {})[level] = curve(by_epoch)
    return panels


def curve(groups):
    """Sorted x, mean and standard deviation, of {x: values}; the deviation of a single value is 0."""
    found = [groups[x] for x in sorted(groups)]
    deviations = [verdicts.deviation(values) if len(values) > 1 else 0.0 for values in found]
    return sorted(groups), [verdicts.mean(values) for values in found], deviations


def score_panels(factor, results) -> dict:
    """V_rand and Dice on the held-out sections against the number that the factor changes."""
    panels = {}
    for metric in (*V_RANDS, "held_out_dice"):
        scores = {level: results.values(row, metric) for level, row in factor.levels.items()}
        lines = {}
        for level, values in scores.items():
            if values:  # sections by their label, "2" or "scratch, 2 sections"; the receptive field from the records
                of_a_run = next(iter(results.of(factor.levels[level]).values()))
                *line, label = level.split(", ")
                number = re.match("[0-9]+", label)
                x = int(number[0]) if number else of_a_run["receptive_field_px"]
                lines.setdefault(line[0] if line else "", {})[x] = values
        if lines:
            panels[f"held-out {TITLES[metric]}"] = {line: curve(points) for line, points in lines.items()}
    return panels
