"""The documents: every link leads somewhere, every command is one that the program takes, every named test exists."""

import contextlib
import doctest
import importlib
import json
import os
import re
import shlex
import unicodedata
from pathlib import Path

import pytest
from conftest import ROOT, python

import dilatedUnet
import figures

NOTEBOOK = ROOT / "docs" / "first-steps.ipynb"


def text_of(page):
    if page.suffix == ".md":
        return page.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"])


FOLDERS = (".", "docs", "results", "benchmarks", "weights")
PAGES = [NOTEBOOK, *(page for folder in FOLDERS for page in sorted(ROOT.glob(f"{folder}/*.md")))]
TEXTS = {str(page.relative_to(ROOT)): text_of(page) for page in PAGES}
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
PROGRAMS = r"(dilatedUnet|figures|start|benchmarks/\w+)\.py"
ROOMS = "train|predict|score|studies|network|files|weights|results|images|docs|benchmarks|tests"


def links(text):
    return [target for target in LINK.findall(text) if not re.match(r"https?:|mailto:", target)]


def anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    words = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
    return {
        "".join(c for c in word if c in " -_" or unicodedata.category(c)[0] in "LN").replace(" ", "-") for word in words
    }


def commands(text):
    """(program, its words) of every command in a page, in code blocks and between backticks."""
    for program, rest in re.findall(rf"python3? {PROGRAMS}([^`\n]*)", text.replace("\\\n", " ")):
        if "(" not in rest:
            rest = rest.split(")")[0]  # of X=$(python ...)
        yield program, shlex.split(rest, comments=True)


COMMANDS = [(name, *command) for name, text in TEXTS.items() for command in commands(text)]


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_file_heading_and_test_of_the_repository_that_a_page_names_is_there(name):
    for target in links(TEXTS[name]):
        path, _, anchor = target.partition("#")
        place = Path(os.path.normpath(ROOT / Path(name).parent / path)) if path else ROOT / name
        assert place.exists(), target
        assert place.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(place.read_text()), target
    for path, test in re.findall(rf"`((?:{ROOMS})/[\w./-]+\.(?:py|md|png|txt|csv|ipynb))(?:::(\w+))?`", TEXTS[name]):
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


@pytest.mark.parametrize(("name", "program", "words"), COMMANDS)
def test_every_command_is_one_that_the_program_takes(name, program, words):
    if program == "dilatedUnet":
        with contextlib.nullcontext() if "--help" not in words else pytest.raises(SystemExit, match="0"):
            dilatedUnet.parse(words)
    elif program == "figures":
        figures.build_parser().parse_args(words)
    elif program == "start":
        assert words in ([], ["test"])
    else:
        source = (ROOT / f"{program}.py").read_text()
        assert not [word for word in words if word.startswith("--") and f'"{word}"' not in source]


def test_every_picture_is_shown_somewhere_and_the_first_page_is_one_page():
    shown = {os.path.normpath(Path(name).parent / target) for name, text in TEXTS.items() for target in links(text)}
    assert {f"images/{picture.name}" for picture in ROOT.glob("images/*")} <= shown
    assert len(TEXTS["README.md"].splitlines()) <= 170


def script(notebook):
    """The code of a notebook as a Python program; `!` lines as processes that must end well."""
    cells = [cell["source"] for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    text = "\n".join("".join(lines) for lines in cells).replace("\\\n", " ")
    call = r"subprocess.run([sys.executable, *shlex.split('\1')], check=True)"
    return re.sub(r"^!python (.*)$", call, text, flags=re.M)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    program = script(NOTEBOOK).replace("runs/first-steps", str(tmp_path))
    done = python("-c", f"import shlex, subprocess, sys\n{program}", env=os.environ | {"MPLBACKEND": "agg"})
    own, shipped = map(float, re.findall(r"^V_rand +(\S+)", done.stdout, re.MULTILINE))
    assert 0.5 < own <= 1
    assert 0.9 < shipped <= 1


LIBRARY = [path for path in ROOT.glob("*/*.py") if path.parent.name not in ("tests", "benchmarks")]
WITH_EXAMPLES = [path for path in sorted([*ROOT.glob("*.py"), *LIBRARY]) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_in_docstrings_are_right(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed
