"""How the scores of `evaluate` are shown: a table for the terminal, and a report of HTML with pictures.

Arrays and the dict of `evaluation.score_arrays` in, text and files out. The page holds all it shows: it needs no
network and no other file. Every mark differs in pattern as well as in colour, and every picture has a text that says
what it shows.
"""

import base64
import html
import io
import re
from pathlib import Path
from string import Template

import numpy as np

import data
import figures
from files import atomic
from score import segments
from score.scores import SCORES

ZOOM = 2  # pictures are drawn with 2 x 2 pixels for each of the data's, so that hatches and outlines stay fine
MOST_SECTIONS = 30
WEBP_PX = 16383  # the longest side of a WebP
PAGE = Path(__file__).with_name("report.html")
PICTURES = ("section-*.png", "curves-*.png")  # beside report.html
BLUE, ORANGE, MAGENTA = figures.BLUE, figures.ORANGE, "#CC3C96"
STRIPES = "repeating-linear-gradient({0}deg,{1} 0 2px,transparent 2px 6px)"
CHESSBOARD = "repeating-conic-gradient({1} 0 25%,#fff 0 50%) 0 0/6px 6px"
MARKS = {  # of the errors: colour, hatch in the legend of a figure, its angle and fill on the page, meaning
    "split": (BLUE, "///", -45, STRIPES, "a true cell cut up (blue, rising stripes; heavy: the false wall)"),
    "merger": (ORANGE, "\\\\\\", 45, STRIPES, "true cells joined in the prediction (orange, falling stripes)"),
    "missed membrane": (MAGENTA, "...", 0, CHESSBOARD, "true membrane predicted as interior (magenta, dotted line)"),
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


def rows(result):
    """Yield (title, value, which is better, threshold, lowest .. highest section, U-Net 2015, best) as text."""
    for name in (name for name in SCORES if name in result):
        score, published = SCORES[name], PUBLISHED.get(name, {})
        values = [value for value in result["per_section"][name] if value is not None]
        threshold, best = result["best_thresholds"].get(name), next(iter(published), None)
        yield (
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
    lines = [head, *rows(result)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    words = _sections_words(result["sections"])
    return "\n".join(["", words, body[0], "-" * len(body[0]), *body[1:], f"* {PUBLISHED_NOTE}", ""])


def _sections_words(sections):
    return f"{len(sections)} section{'s' * (len(sections) != 1)}: {data.format_sections(sections)}"


# --- files


def write(folder, result, prediction, references, raw=None):
    """Write ``report.html`` and the figures as PNG into a folder; return the path of the page.

    `result` is that of `evaluation.score_arrays`; `prediction` (interior probability), `references` (interior > 0) and
    `raw` (any scale, may be None) are sequences of sections of shape (H, W).
    """
    folder = Path(folder)
    atomic.make_writable(folder)
    charts = {}  # names of the scores whose curves each of them shows
    for name in result["curves"]:
        charts.setdefault(SCORES[name].chart, []).append(name)
    before = {path for kind in PICTURES for path in folder.glob(kind)}
    drawn = [_chart(result, names, folder / f"curves-{kind}.png") for kind, names in charts.items()]
    legend = {name: mark[:2] for name, mark in MARKS.items()}
    blocks, written = [], {folder / f"curves-{kind}.png" for kind in charts}
    for place in worst_first(result)[:MOST_SECTIONS]:
        pictures = section_pictures(result, prediction[place], references[place], None if raw is None else raw[place])
        number = result["sections"][place]
        shown = {f"section {number}: {name.lower()}": picture for name, (picture, _) in pictures.items()}
        written.add(folder / f"section-{number:03d}.png")
        figures.sheet(shown, folder / f"section-{number:03d}.png", legend=legend)
        blocks.append(_section_html(result, place, pictures))
    target = folder / "report.html"
    atomic.write_text(target, _page(result, drawn, blocks))  # an existing report was refused before the work began
    own = rf"section-\d{{3,}}\.png|curves-({'|'.join({score.chart for score in SCORES.values() if score.chart})})\.png"
    for path in before - written:  # of the report that this one replaces
        if re.fullmatch(own, path.name):
            path.unlink()
    return target


def _chart(result, names, path):
    """Draw curves into a PNG, and return it as HTML."""
    thresholds = result["thresholds"][: min(len(result["curves"][name]) for name in names)]
    curves = {title(SCORES[name]): result["curves"][name] for name in names}
    figures.score_curves(thresholds, curves, path, higher_is_better=SCORES[names[0]].higher_is_better)
    at = {name: f"{rounded(name, result[name])}, at {result['best_thresholds'][name]:.1f}" for name in names}
    best = "; ".join(f"{title(SCORES[name])} is best, {words}" for name, words in at.items())
    words = f"Against the threshold: {best} (large open marker)."
    return f"<figure>{_img(path.read_bytes(), words)}<figcaption>{html.escape(words)}</figcaption></figure>"


def worst_first(result):
    """Return the places of the sections in the stack, the worst first by the first score there is."""
    name = next(name for name in SCORES if name in result["per_section"])
    sign = 1 if SCORES[name].higher_is_better else -1
    keys = [np.inf if value is None else sign * value for value in result["per_section"][name]]
    return sorted(range(len(keys)), key=keys.__getitem__)


def overlay_threshold(result):
    """Return the threshold at which the overlays are cut: the best one of the first score that has one."""
    return next((result["best_thresholds"][n] for n in SCORES if n in result["best_thresholds"]), 0.5)


# --- pictures


def section_pictures(result, prediction, reference, raw=None):
    """Return {title: (uint8 picture, alt text)} of one section: raw, truth, prediction, errors."""
    threshold = overlay_threshold(result)
    unlabelled = reference < 0
    maps = segments.split_merge_maps(reference, segments.above(prediction, threshold) & ~unlabelled)
    ground = np.asarray(prediction if raw is None else raw, np.float64)
    low, high = np.percentile(ground, (0.5, 99.5))
    ground = (np.clip((ground - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)
    cells = segments.components(reference > 0)
    split, merged = (np.setdiff1d(cells[mask], 0).size for mask in (maps.splits, maps.mergers))
    words = (
        f"at threshold {threshold:.1f}, over the {'prediction' if raw is None else 'raw section'}: "
        f"{split} cells split, {merged} cells merged, {int(maps.missed.sum())} px of the membrane's centre line missed"
    )
    return ({} if raw is None else {"Raw": (ground, "the raw section")}) | {
        "Truth": (
            np.uint8(reference > 0) * 255 + np.uint8(unlabelled) * 128,
            f"the labels: interior white, membrane black{', not labelled gray' if unlabelled.any() else ''}",
        ),
        "Prediction": (np.uint8(np.clip(prediction, 0, 1) * 255), "the interior probability: 1 white, 0 black"),
        "Errors": (paint(ground, maps), words),
    }


def paint(ground, maps):
    """Draw `segments.Maps` over a gray section: uint8 RGB, `ZOOM` times as large."""
    from scipy.ndimage import binary_dilation, binary_erosion

    around = np.ones((3, 3))
    picture = np.repeat(_enlarge(ground)[..., None] * 0.75 + 50, 3, axis=-1)
    rows, columns = np.indices(picture.shape[:2])
    for mask, colour, diagonal in ((maps.splits, BLUE, rows + columns), (maps.mergers, ORANGE, rows - columns)):
        region = _enlarge(mask)
        _blend(picture, region, colour, 0.18)
        _blend(picture, region & (diagonal % 14 < 3), colour, 0.75)
        _blend(picture, region & ~binary_erosion(region, around, 2, border_value=1), colour, 0.9)
    _blend(picture, binary_dilation(_enlarge(maps.cuts), around), BLUE, 1.0)
    wall = binary_dilation(_enlarge(maps.missed), around, 2)
    _blend(picture, wall, "#FFFFFF", 0.9)
    _blend(picture, wall & ((rows // 3 + columns // 3) % 2 == 0), MAGENTA, 1.0)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _enlarge(array):
    return np.kron(array, np.ones((ZOOM, ZOOM), array.dtype))


def _blend(picture, mask, colour, strength):
    picture[mask] = (1 - strength) * picture[mask] + strength * np.array(list(bytes.fromhex(colour[1:])))


# --- html


def _img(picture, alt):
    """Return an <img> that holds its data: the bytes of a PNG, PNG for masks, WebP else (a fifth of the size)."""
    from PIL import Image

    kind, size, buffer = "png", "", io.BytesIO()
    if isinstance(picture, bytes):
        buffer.write(picture)
    else:
        size = f' width="{picture.shape[1]}" height="{picture.shape[0]}"'
        if picture.ndim == 2 and np.isin(picture, (0, 255)).all():
            Image.fromarray(picture).convert("1").save(buffer, "PNG", optimize=True)
        elif max(picture.shape[:2]) > WEBP_PX:
            Image.fromarray(picture).save(buffer, "PNG")
        else:
            kind = "webp"
            Image.fromarray(picture).save(buffer, "WEBP", quality=82)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/{kind};base64,{encoded}" alt="{html.escape(alt)}"{size}>'


def _section_html(result, place, pictures):
    number = result["sections"][place]
    shown = "".join(
        f"<figure>{_img(picture, f'Section {number}, {name.lower()}: {alt}')}"
        f"<figcaption><b>{name}</b> {html.escape(alt)}</figcaption></figure>"
        for name, (picture, alt) in pictures.items()
    )
    values = ((name, found[place]) for name, found in result["per_section"].items() if found[place] is not None)
    listed = "".join(f"<div><dt>{title(SCORES[k])}</dt><dd>{rounded(k, v)}</dd></div>" for k, v in values)
    return (
        f'<section id="s{number}"><h3>Section {number}</h3><dl class="values">{listed}</dl>'
        f'<div class="pictures n{len(pictures)}">{shown}</div></section>'
    )


def _table_html(result):
    head = ("score", "value", "best threshold", "sections, lowest .. highest", "U-Net 2015 *", "best published *")
    body = ""
    for name, value, better, *rest in rows(result):
        cells = "".join(f"<td>{html.escape(cell) or '&ndash;'}</td>" for cell in (value, *rest))
        body += f"<tr><th scope=row>{name}<small>{better} is better</small></th>{cells}</tr>"
    columns = "".join(f"<th scope=col>{words}</th>" for words in head)
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"


def _words_html(result):
    """Return what each score means, and what was published."""
    found = ""
    for name in (name for name in SCORES if name in result):
        board = "; ".join(f"{method} {rounded(name, value)}" for method, value in PUBLISHED.get(name, {}).items())
        words = SCORES[name].words + f" Published *: {board}." * bool(board)
        found += f"<dt>{title(SCORES[name])}</dt><dd>{html.escape(words)}</dd>"
    return found


def _lead(result):
    """Return the one or two sentences a reader needs first."""
    sections, text = result["sections"], _sections_words(result["sections"])
    if "v_rand" not in result:
        return text + "."
    best = ", ".join(f"{SCORES[key].title} <b>{result[key]:.4f}</b>" for key in ("v_rand", "v_info") if key in result)
    text += f": {best} (1 is perfect; best threshold for V_rand {result['best_thresholds']['v_rand']:.1f})"
    worst = worst_first(result)[0]
    value = result["per_section"]["v_rand"][worst]
    if value is not None and len(sections) > 1:
        text += f'. The worst is <a href="#s{sections[worst]}">section {sections[worst]}</a> at {value:.4f}'
    return text + "."


def _page(result, charts, blocks):
    left_out = len(result["sections"]) - len(blocks)
    legend = "".join(
        f'<li><span class=swatch style="background:{fill.format(angle, colour)};border-color:{colour}"></span>'
        f"{name}: {html.escape(words)}</li>"
        for name, (colour, _, angle, fill, words) in MARKS.items()
    )
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        lead=_lead(result),
        source=" against ".join(html.escape(result[key]) for key in ("prediction", "mask_path") if key in result),
        table=_table_html(result),
        note=PUBLISHED_NOTE,
        charts="".join(charts),
        words=_words_html(result),
        legend=legend,
        threshold=f"{overlay_threshold(result):.1f}",
        blocks="".join(blocks),
        left_out=f"{left_out} better sections are left out of the pictures." if left_out > 0 else "",
    )
