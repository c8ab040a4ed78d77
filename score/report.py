"""The report of `evaluate`: one self-contained HTML page, and PNG files of the same figures.

Arrays and the dict of `evaluation.score_arrays` in, files out; no network when it is written or read. Every
mark differs in pattern as well as in colour (Okabe and Ito's palette, doi:10.1038/nmeth.1618), and every
picture has a text that says what it shows.
"""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from score import segments
from score.scores import SCORES

ZOOM = 2  # pictures are drawn with 2 x 2 pixels for each of the data's, so that hatches and outlines stay fine
MOST_SECTIONS = 30
PICTURES = ("section-*.png", "curves-*.png")  # beside report.html
BLUE, ORANGE, MAGENTA, GREEN = (0, 114, 178), (230, 159, 0), (204, 60, 150), (0, 158, 115)
MARKS = {  # name: colour, meaning
    "splits": (
        BLUE,
        "split: a true cell cut in two or more (blue, rising stripes; heavy line: the false wall)",
    ),
    "mergers": (ORANGE, "merger: true cells joined in the prediction (orange, falling stripes)"),
    "missed": (MAGENTA, "missed membrane: true membrane predicted as interior (magenta, dotted line)"),
}
SERIES = {
    "v_rand": (BLUE, "-", "o"),
    "v_info": (ORANGE, "--", "s"),
    "rand_error": (BLUE, "-", "o"),
    "pixel_error": (ORANGE, "--", "s"),
    "warping_error": (GREEN, ":", "^"),
}

PUBLISHED_NOTE = (
    "Published results are on the challenge's TEST stack (30 sections of the same tissue); other sections, "
    "held-out ones of the training stack among them, are not the same measurement."
)
# doi:10.3389/fnana.2015.00142 and the challenge's board; arXiv:1505.04597 for the lower three. Best first.
# fmt: off
PUBLISHED = {
    "v_rand": {"SFCNNs": 0.98680, "CASIA (multicut)": 0.98356, "PolyMtl": 0.98058, "M2FCN": 0.97805,
               "FusionNet": 0.97804, "CUMedVision": 0.97682, "U-Net 2015": 0.97276},
    "v_info": {"SFCNNs": 0.99144, "CASIA (multicut)": 0.99063, "M2FCN": 0.98919, "FusionNet": 0.98893,
               "CUMedVision": 0.98865, "PolyMtl": 0.98816, "U-Net 2015": 0.98662},
    "warping_error": {"human values": 0.000005, "U-Net 2015": 0.000353, "DIVE-SCI": 0.000355,
                      "IDSIA": 0.000420, "IDSIA-SCI": 0.000653},
    "rand_error": {"human values": 0.0021, "IDSIA-SCI": 0.0189, "DIVE-SCI": 0.0305,
                   "U-Net 2015": 0.0382, "IDSIA": 0.0504},
    "pixel_error": {"human values": 0.0010, "DIVE-SCI": 0.0584, "U-Net 2015": 0.0611,
                    "IDSIA": 0.0613, "IDSIA-SCI": 0.1027},
}
# fmt: on


# --- table


class Row(NamedTuple):
    """One score as text."""

    name: str
    title: str
    value: str
    better: str
    threshold: str
    sections: str  # lowest .. highest
    unet: str
    best: str


def rows(result):
    """Return the scores of a result as `Row`s, published results beside ours."""
    return [_row(name, score, result) for name, score in SCORES.items() if name in result]


def _row(name, score, result):
    values = [value for value in result["per_section"][name] if value is not None]
    threshold = result["best_thresholds"].get(name)
    published = PUBLISHED.get(name, {})
    best = next(iter(published), None)
    return Row(
        name,
        title(score),
        rounded(name, result[name]),
        "higher" if score.higher_is_better else "lower",
        "" if threshold is None else f"{threshold:.1f}{'' if score.of == 'thresholds' else ' fixed'}",
        f"{rounded(name, min(values))} .. {rounded(name, max(values))}" if values else "",
        rounded(name, published["U-Net 2015"]) if published else "",
        f"{rounded(name, published[best])} ({best})" if published else "",
    )


def title(score):
    """Return the title of a `scores.Score` as it starts a line."""
    return score.title[0].upper() + score.title[1:]


def rounded(name, value):
    """Write a value with as many decimals as its score deserves."""
    return f"{value:.{SCORES[name].digits}f}"


def table(result):
    """Return the scores as a table for the terminal."""
    head = ("score", "value", "better", "threshold", "sections", "U-Net 2015 *", "best published *")
    lines = [head, *(row[1:] for row in rows(result))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    sections = result["sections"]
    count = f"{len(sections)} section{'s' * (len(sections) != 1)}: {data.format_sections(sections)}"
    return "\n".join(["", count, body[0], "-" * len(body[0]), *body[1:], f"* {PUBLISHED_NOTE}", ""])


# --- page


def write(folder, result, prediction, references, raw=None):
    """Write ``report.html`` and the figures as PNG into a folder; return the path of the page.

    Parameters
    ----------
    folder : path
    result : dict
        As `evaluation.score_arrays` returns it.
    prediction : ndarray of float32, shape (S, H, W)
        Interior probability.
    references : ndarray of shape (S, H, W)
        Masks, interior > 0.
    raw : ndarray of shape (S, H, W), optional
        The image sections, any scale.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    curves = [
        _keep(folder, f"curves-{kind}.png", _curve_figure(result, names)) for kind, names in _charts(result).items()
    ]
    blocks = []
    for place in worst_first(result)[:MOST_SECTIONS]:
        pictures = section_pictures(result, prediction[place], references[place], None if raw is None else raw[place])
        number = result["sections"][place]
        _keep(folder, f"section-{number:03d}.png", _sheet(pictures, f"section {number}"))
        blocks.append(_section_html(result, place, pictures))
    page = _page(result, curves, blocks)
    target = folder / "report.html"
    with data.replacing(target, force=True) as partial:  # an existing report was refused before the work began
        partial.write_text(page, encoding="utf-8")
    return target


def worst_first(result):
    """Return the places of the sections in the stack, the worst score first; without one, in their order."""
    name = next((n for n in SCORES if n in result["per_section"]), None)
    values = result["per_section"].get(name, [])
    sign = 1 if name and SCORES[name].higher_is_better else -1
    key = {k: np.inf if v is None else sign * v for k, v in enumerate(values)}
    return sorted(range(len(result["sections"])), key=lambda k: key.get(k, 0))


def overlay_threshold(result):
    """Return the threshold at which the overlays are cut: the best one of the first score that has one."""
    return next((result["best_thresholds"][n] for n in SCORES if n in result["best_thresholds"]), 0.5)


# --- pictures


def section_pictures(result, prediction, reference, raw=None):
    """Return {title: (uint8 picture, alt text)} of one section: raw, truth, prediction, errors."""
    threshold = overlay_threshold(result)
    maps = segments.split_merge_maps(reference, segments.above(prediction, threshold))
    pictures = {}
    ground = _stretched(prediction if raw is None else raw)
    if raw is not None:
        pictures["Raw"] = (ground, "the raw section")
    pictures["Truth"] = (
        (np.asarray(reference) > 0).astype(np.uint8) * 255,
        "the labels: interior white, membrane black",
    )
    pictures["Prediction"] = (
        (np.clip(prediction, 0, 1) * 255).astype(np.uint8),
        "the interior probability: 1 white, 0 black",
    )
    count = {name: _regions(getattr(maps, name), segments.components(reference > 0)) for name in ("splits", "mergers")}
    words = (
        f"at threshold {threshold:.1f}, over the {'prediction' if raw is None else 'raw section'}: "
        f"{count['splits']} cells split, {count['mergers']} cells merged, "
        f"{int(maps.missed.sum())} px of the membrane's centre line missed"
    )
    pictures["Errors"] = (paint(ground, maps), words)
    return pictures


def _regions(mask, labels):
    return np.unique(labels[mask & (labels > 0)]).size


def _stretched(image):
    image = np.asarray(image, np.float64)
    low, high = np.percentile(image, (0.5, 99.5))
    return (np.clip((image - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)


def paint(ground, maps):
    """Draw `segments.Maps` over a gray section: uint8 RGB, `ZOOM` times as large."""
    picture = np.repeat(_enlarge(ground)[..., None] * 0.75 + 50, 3, axis=-1)
    rows, columns = np.indices(picture.shape[:2])
    for mask, colour, diagonal in (
        (maps.splits, BLUE, rows + columns),
        (maps.mergers, ORANGE, rows - columns),
    ):
        region = _enlarge(mask)
        _blend(picture, region, colour, 0.18)
        _blend(picture, region & (diagonal % 14 < 3), colour, 0.75)
        _blend(picture, region & ~_eroded(region, 2), colour, 0.9)
    _blend(picture, _grown(_enlarge(maps.cuts), 1), BLUE, 1.0)
    wall = _grown(_enlarge(maps.missed), 2)
    _blend(picture, wall, (255, 255, 255), 0.9)
    _blend(picture, wall & ((rows // 3 + columns // 3) % 2 == 0), MAGENTA, 1.0)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _enlarge(array):
    return np.repeat(np.repeat(array, ZOOM, axis=0), ZOOM, axis=1)


def _blend(picture, mask, colour, strength):
    picture[mask] = (1 - strength) * picture[mask] + strength * np.array(colour)


def _eroded(mask, pixels):
    from scipy import ndimage

    return ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=pixels, border_value=1)


def _grown(mask, pixels):
    from scipy import ndimage

    return ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=pixels)


def _figure(width, height):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def _charts(result):
    """Return {chart: names of the scores whose curves it shows}."""
    charts = {}
    for name in result["curves"]:
        charts.setdefault(SCORES[name].chart, []).append(name)
    return charts


def _curve_figure(result, names):
    """Draw the scores (higher is better) or the errors (lower is better) against the threshold."""
    figure = _figure(5.2, 3.6)
    axes = figure.subplots()
    for name in names:
        colour, line, marker = SERIES[name]
        colour = tuple(c / 255 for c in colour)
        curve = result["curves"][name]
        axes.plot(
            result["thresholds"][: len(curve)],
            curve,
            line,
            color=colour,
            marker=marker,
            markersize=4,
            label=title(SCORES[name]),
        )
        axes.plot(
            result["best_thresholds"][name],
            result[name],
            marker,
            color=colour,
            markersize=11,
            markerfacecolor="none",
        )
    axes.set(
        xlabel="threshold on the interior probability",
        ylabel=f"{'score, higher' if SCORES[names[0]].higher_is_better else 'error, lower'} is better",
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _sheet(pictures, heading):
    """Lay the pictures of a section out beside each other, with the legend below."""
    from matplotlib.patches import Patch

    figure = _figure(3.6 * len(pictures), 4.4)
    for axes, (name, (picture, _)) in zip(np.ravel(figure.subplots(1, len(pictures))), pictures.items(), strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
        axes.set_title(f"{heading}: {name.lower()}", fontsize=10)
        axes.set_axis_off()
    hatches = {"splits": "///", "mergers": "\\\\\\", "missed": "..."}
    handles = [
        Patch(
            facecolor="white",
            edgecolor=tuple(c / 255 for c in colour),
            hatch=hatches[name],
            label=words.split(" (")[0],
        )
        for name, (colour, words) in MARKS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(pictures)), frameon=False, fontsize=9)
    return figure


def _keep(folder, name, figure):
    """Save a figure as PNG beside its place, move it there, and return it as bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with data.replacing(folder / name, force=True) as partial:
        partial.write_bytes(buffer.getvalue())
    return buffer.getvalue()


# --- html


def _uri(picture):
    """Return an image as a data URI: PNG for masks and charts, WebP for the rest (a fifth of the size)."""
    from PIL import Image

    if isinstance(picture, bytes):
        return "data:image/png;base64," + base64.b64encode(picture).decode()
    buffer = io.BytesIO()
    flat = picture.ndim == 2 and np.isin(picture, (0, 255)).all()
    image = Image.fromarray(picture).convert("1") if flat else Image.fromarray(picture)
    image.save(buffer, format="PNG" if flat else "WEBP", **({"optimize": True} if flat else {"quality": 82}))
    return f"data:image/{'png' if flat else 'webp'};base64," + base64.b64encode(buffer.getvalue()).decode()


def _img(picture, alt):
    size = "" if isinstance(picture, bytes) else f' width="{picture.shape[1]}" height="{picture.shape[0]}"'
    return f'<img src="{_uri(picture)}" alt="{html.escape(alt)}"{size}>'


def _section_html(result, place, pictures):
    number = result["sections"][place]
    figures = "".join(
        f"<figure>{_img(picture, f'Section {number}, {name.lower()}: {alt}')}"
        f"<figcaption><b>{name}</b> {html.escape(alt)}</figcaption></figure>"
        for name, (picture, alt) in pictures.items()
    )
    values = []
    for name in SCORES:
        value = (result["per_section"].get(name) or [None] * (place + 1))[place]
        if value is not None:
            values.append(f"<div><dt>{title(SCORES[name])}</dt><dd>{rounded(name, value)}</dd></div>")
    return (
        f'<section id="s{number}"><h3>Section {number}</h3><dl class="values">{"".join(values)}</dl>'
        f'<div class="pictures n{len(pictures)}">{figures}</div></section>'
    )


def _table_html(result):
    lines = []
    for row in rows(result):
        cells = (
            ("value", row.value),
            ("best threshold", row.threshold),
            ("worst and best section", row.sections),
            ("U-Net 2015 *", row.unet),
            ("best published *", row.best),
        )
        numbers = "".join(
            f'<td data-label="{label}"{"" if cell else " class=none"}>{html.escape(cell) or "&ndash;"}</td>'
            for label, cell in cells
        )
        lines.append(f"<tr><th scope=row>{row.title}<small>{row.better} is better</small></th>{numbers}</tr>")
    head = "".join(
        f"<th scope=col>{h}</th>"
        for h in (
            "score",
            "value",
            "best threshold",
            "sections, lowest .. highest",
            "U-Net 2015 *",
            "best published *",
        )
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _board_html(result):
    """Return the whole published boards, folded away."""
    boards = []
    for name in result:
        if name in PUBLISHED:
            items = {**PUBLISHED[name], "this prediction": result[name]}
            order = sorted(items, key=items.get, reverse=SCORES[name].higher_is_better)
            lines = "".join(
                f"<tr{' class=ours' if m == 'this prediction' else ''}><th scope=row>{html.escape(m)}</th>"
                f"<td>{rounded(name, items[m])}</td></tr>"
                for m in order
            )
            boards.append(f"<table class=board><caption>{title(SCORES[name])}</caption><tbody>{lines}</tbody></table>")
    return (
        (
            f"<details><summary>All published results</summary><p class=note>{PUBLISHED_NOTE}</p>"
            f"<div class=boards>{''.join(boards)}</div></details>"
        )
        if boards
        else ""
    )


def _legend_html():
    patterns = {"splits": (45, 0), "mergers": (-45, 0)}
    items = []
    for name, (colour, words) in MARKS.items():
        rgb = "rgb({},{},{})".format(*colour)
        if name in patterns:
            fill = f"repeating-linear-gradient({-patterns[name][0]}deg,{rgb} 0 2px,transparent 2px 6px)"
        else:
            fill = f"repeating-conic-gradient({rgb} 0 25%,#fff 0 50%) 0 0/6px 6px"
        items.append(
            f'<li><span class=swatch style="background:{fill};border-color:{rgb}"></span>{html.escape(words)}</li>'
        )
    return f"<ul class=legend>{''.join(items)}</ul>"


def _lead(result):
    """Return the one or two sentences a reader needs first."""
    numbers = data.format_sections(result["sections"])
    text = f"{len(result['sections'])} section{'s' * (len(result['sections']) != 1)} ({numbers})"
    if "v_rand" in result:
        pairs = [f"V_rand <b>{result['v_rand']:.4f}</b>"] + [f"V_info <b>{result['v_info']:.4f}</b>"] * (
            "v_info" in result
        )
        threshold = result["best_thresholds"]["v_rand"]
        text += f": {', '.join(pairs)} (1 is perfect; best threshold for V_rand {threshold:.1f})"
        worst = worst_first(result)[0]
        value = result["per_section"]["v_rand"][worst]
        if value is not None and len(result["sections"]) > 1:
            number = result["sections"][worst]
            text += f'. The worst is <a href="#s{number}">section {number}</a> at {value:.4f}'
    return text + "."


def _chart_words(result, names):
    """Return what a chart shows, with its numbers, for those who do not see it."""
    best = [
        f"{title(SCORES[name])} is best, {rounded(name, result[name])}, at {result['best_thresholds'][name]:.1f}"
        for name in names
    ]
    return "Against the threshold: " + "; ".join(best) + " (large open marker)."


def _page(result, curves, blocks):
    names = [n for n in SCORES if n in result]
    words = "".join(f"<dt>{title(SCORES[n])}</dt><dd>{html.escape(SCORES[n].words)}</dd>" for n in names)
    charts = "".join(
        f"<figure>{_img(png, alt)}<figcaption>{html.escape(alt)}</figcaption></figure>"
        for png, alt in zip(curves, (_chart_words(result, names) for names in _charts(result).values()), strict=True)
    )
    left_out = len(result["sections"]) - len(blocks)
    note = f"<p class=note>{left_out} better sections are left out of the pictures.</p>" if left_out > 0 else ""
    files = (html.escape(result.get(key, "")) for key in ("prediction", "mask_path"))
    source = f"<p class=note>{' against '.join(files)}</p>"
    return PAGE.format(
        style=STYLE,
        lead=_lead(result),
        source=source if "prediction" in result else "",
        table=_table_html(result),
        note=PUBLISHED_NOTE,
        boards=_board_html(result),
        charts=charts,
        words=words,
        legend=_legend_html(),
        threshold=f"{overlay_threshold(result):.1f}",
        blocks="".join(blocks),
        left_out=note,
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Segmentation scores</title><style>{style}</style></head><body><main>
<h1>Segmentation scores</h1><p class="lead">{lead}</p>{source}
<h2>Scores</h2>{table}<p class="note">* {note}</p>{boards}
<h2>How the threshold matters</h2><div class="charts">{charts}</div>
<h2>Sections, worst first</h2>
<p>Errors are drawn for the prediction cut at {threshold}. Borders a few pixels off are not errors.</p>
{legend}{blocks}{left_out}
<h2>What the scores mean</h2><dl class="words">{words}</dl>
</main></body></html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5b6470; --line: #d9dde2; --page: #fff;
  --tint: #f4f6f8; --link: #0b5c92 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a3abb5; --line: #3a4048;
  --page: #16191d; --tint: #20252b; --link: #7cc0ee } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 1rem 1.25rem 3rem }
a, summary { color: var(--link) }
h1 { font-size: 1.7rem; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .3rem }
.lead { font-size: 1.1rem; margin: .3rem 0 }
.note { color: var(--soft); font-size: .9rem; margin: .4rem 0; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: baseline }
th:first-child { text-align: left }
thead th { font-size: .85rem; color: var(--soft); font-weight: 600 }
th small { display: block; font-weight: 400; color: var(--soft) }
td:nth-child(2) { font-weight: 700 }
img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: 3px }
figure { margin: 0 }
figcaption { font-size: .85rem; color: var(--soft); padding: .25rem 0 }
figcaption b { color: var(--ink) }
.charts { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)) }
.charts img { width: 100%; max-width: 620px }
.pictures { display: grid; gap: .5rem .8rem; grid-template-columns: 3fr 1fr; align-items: start }
.pictures.n3 { grid-template-columns: 2fr 1fr }
.pictures figure { grid-column: 2 }
.pictures figure:last-child { grid-column: 1; grid-row: 1 / span 3 }
.pictures img { width: 100% }
.values { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .2rem 0 .6rem; font-size: .9rem;
  font-variant-numeric: tabular-nums }
.values div { display: flex; gap: .4rem }
.values dt { color: var(--soft) }
.values dd { margin: 0 }
.legend { list-style: none; padding: 0; display: grid; gap: .3rem; font-size: .9rem }
.legend li { display: flex; gap: .6rem; align-items: flex-start }
.swatch { flex: none; width: 34px; height: 18px; border: 2px solid; border-radius: 2px; margin-top: .15rem;
  background-color: #fff }
.words { display: grid; grid-template-columns: max-content 1fr; gap: .4rem 1.2rem }
.words dt { font-weight: 600 }
.words dd { margin: 0; max-width: 75ch }
details { margin: .8rem 0 }
summary { cursor: pointer }
.boards { display: flex; flex-wrap: wrap; gap: 1.5rem }
.board { width: auto }
.board caption { text-align: left; font-weight: 600 }
.board th { font-weight: 400 }
.board td { font-weight: 400 }
.ours { background: var(--tint) }
.ours th, .ours td { font-weight: 700 }
@media (max-width: 900px) {
  .pictures, .pictures.n3 { grid-template-columns: repeat(2, 1fr) }
  .pictures figure, .pictures figure:last-child { grid-area: auto }
}
@media (max-width: 620px) {
  main { padding: .6rem .8rem 2rem }
  .pictures, .pictures.n3 { grid-template-columns: 1fr }
  .words { display: block }
  .words dd { margin: 0 0 .7rem }
  main > table thead { position: absolute; left: -9999px }
  main > table tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0 }
  main > table th, main > table td { display: flex; justify-content: space-between; border: 0;
    padding: .1rem 0 }
  main > table td.none { display: none }
  main > table td::before { content: attr(data-label); color: var(--soft); font-weight: 400;
    text-align: left }
}
"""
