"""The published tables: run their rows, each a command line, compare, render.

    python dilatedUnet.py reproduce table --quick                   the 2017 table on a CPU, reduced, 6 minutes a run
    python dilatedUnet.py reproduce study lr --budget 6             one factor for six hours; the same command goes on
    python dilatedUnet.py reproduce all --render --output results/README.md     every table, of the records there are

Every row x seed x fold is a run in `runs/reproduce/TABLE/ROW-PROTOCOL-fF-sS[-quick]`: a finished one is not repeated, a
half-finished one is resumed, and two commands at once share the rows. `--collect` copies the records, without weights,
into `results/TABLE[-quick].json`, from which `--render` works in a fresh clone. Exit code 0: every row lies within its
tolerance; 1: a row misses it, learned nothing, or lacks a run; 2: bad usage; 130: interrupted, or over the budget.
"""

import argparse
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from files.atomic import DataError, locked, make_writable, refuse_existing, refuse_inputs, write_text
from files.flags import in_words, number, up_to
from files.shell import Terminated, say
from studies import comparison, records, rows

SUITE = Path(__file__).resolve().parent.parent / "dilatedUnet.py"
JAX_CACHE = Path(os.path.expanduser("~/.cache/dilated-unet/jax"))  # stays relative for a user without a home
MOST = 100  # seeds, or folds: beyond it is a slip of the keyboard
MARK = "<!-- written by `python dilatedUnet.py reproduce"
STUDIES = (("study", None), ("study", "sections"), ("study", "receptive"), ("study", "finetune"), ("study", "ladder"))
EVERYTHING = (("table", None), ("best", None), *STUDIES, ("unet2015", None))
INTRODUCTION = """# Results

Every table, from the records in this folder. QUICK tables are of reduced recipes for two CPU cores. These were recorded
before the initialisation of the networks' last layer changed (see CHANGELOG.md): the quick table of 2017, the row
`best-standard`, the studies of depth, augmentation, learning rate, optimizer and receptive field, and the U-Net of
2015. `benchmarks/` holds what was measured of speed, `start/` the run of `start.py`, `trials/` recipes that were
tried.
"""


def add_arguments(parser):
    """Declare the flags of `reproduce` on an argparse parser, in groups."""
    group = parser.add_argument_group("what to reproduce")
    group.add_argument("name", choices=(*rows.TABLES, "all"), help="which table; all: every table, with --render")
    group.add_argument(
        "factor", nargs="?", choices=tuple(rows.FACTORS), help="factor of study (default: the first four)"
    )
    group.add_argument("--quick", action="store_true", help="reduced recipes for 2 CPU cores; every table says so")
    group.add_argument("--seeds", type=up_to(MOST), metavar="N", help="seeds 0..N-1 (default: 3; 1 with --quick)")
    folds, held_out = number(int, 2, MOST), "held-out runs as N-fold cross-validation (best: 5)"
    group.add_argument("--folds", type=folds, metavar="N", help=held_out)
    group.add_argument("--protocol", choices=("published", "holdout", "kfold"), help="only the runs of this protocol")
    group.add_argument("--only", nargs="+", metavar="ROW", help="only these rows")
    group = parser.add_argument_group("what to do")
    hours = number(float, 0, 24 * 366, above=True)
    group.add_argument("--budget", type=hours, metavar="HOURS", help="stop after so many hours, at an epoch's end")
    group.add_argument("--list", action="store_true", help="print the command lines and their cost, and train nothing")
    group.add_argument("--render", action="store_true", help="render whatever records exist, and train nothing")
    group.add_argument(
        "--collect", action="store_true", help="at the end copy the records, not the weights, into --records"
    )
    group.add_argument("--missing", action="store_true", help="train only what --records lack, and add it to them")
    group.add_argument("--output", metavar="FILE.md", help="write the Markdown there as well")
    group.add_argument("--figures", metavar="FOLDER", help="draw a PNG per factor of study")
    group.add_argument("--force", action="store_true", help="replace an --output or a figure that was there before")
    group.add_argument("--runs", default="runs/reproduce", metavar="FOLDER", help="where the runs are")
    group.add_argument("--records", default="results", metavar="FOLDER", help="committed records, for --render")


def run(args, parse) -> int:
    """Train what is missing, compare, render; the exit code. `parse` is the suite's own parser of a list of words."""
    check_flags(args)
    args.collect |= args.missing  # what was missing is added to the records
    plans = list(plans_of_all(args, parse)) if args.name == "all" else [plan_of(args, parse)]
    if args.figures and not any(plan.table.factors for plan in plans):
        raise DataError(f"--figures draws study and unet2015. Received: {args.name}")
    if args.figures and not args.force:
        refuse_existing(*(comparison.picture(p.table, f, args.figures) for p in plans for f in p.table.factors))
    if args.list:
        print("\n".join(listing(plans[0], args.missing)) or "# no run is missing")
        return 0
    places = {args.records: args.collect, args.figures: args.figures, Path(args.output or "").parent: args.output}
    places |= {} if args.render else {Path(args.runs, plans[0].table.name): True}
    make_writable(*(folder for folder, asked in places.items() if asked))
    done = args.render or train(plans[0], args)
    if args.collect:
        records.collect(plans[0], args.records)
    return finish(args, plans, done)


def check_flags(args):
    """Refuse before the work what would fail after it."""
    if args.render and (args.list or args.missing):
        raise DataError("--render trains nothing: choose it, or --list, or --missing.")
    if args.name == "all" and (args.collect or not args.render):
        raise DataError(f"all is for --render alone; else name one table: {', '.join(rows.TABLES)}.")
    if args.name == "all" and (args.only or args.factor or args.quick):
        raise DataError("all renders every table: a factor, --only and --quick go with one table.")
    for name in ("records", "runs"):
        if os.path.isfile(folder := getattr(args, name)):
            raise DataError(f"--{name} must be a folder. Received: {folder}")
    refuse_inputs("--output", args.output or "", *Path(args.records).glob("*.json"))
    output = Path(args.output or "")
    ours = output.is_file() and output.read_bytes().startswith(MARK.encode())
    if args.output and output.exists() and not (args.force or ours):
        raise DataError(f"--output: {output} exists and is not a table written by reproduce (--force replaces it).")


def plan_of(args, parse) -> rows.Plan:
    """The runs that were asked for."""
    table = rows.select(args.name, args.factor, args.quick, args.only)
    kept = records.committed(args.records, table) if args.render or args.collect else {}
    seeds = args.seeds or default_seeds(table, args, kept)
    jobs = rows.jobs_of(table, seeds, args.folds, args.protocol)
    if not jobs:
        turned = ", where --folds makes kfold of holdout" * bool(args.folds)
        raise DataError(f"--protocol must be one that {args.name} has{turned}. Received: {args.protocol}")
    runs = args.runs and Path(args.runs)
    return rows.Plan(table, jobs, parse, runs, kept if args.render or args.missing else {})


def default_seeds(table, args, kept):
    """3, or 1 if quick; for --render as many as there are runs of."""
    default = 1 if table.quick else 3
    if not args.render:
        return default
    there = {path.name for path in (Path(args.runs) / table.name).glob("*-s*")} if args.runs else set()
    jobs = rows.jobs_of(table, MOST, args.folds, args.protocol)
    return max((job.seed + 1 for job in jobs if job.name in there | set(kept)), default=default)


def plans_of_all(args, parse) -> Iterator[rows.Plan]:
    """Every table, with the rows that have committed records; of the full table of 2017 all rows, for it is the aim."""
    for quick, (name, factor) in itertools.product((False, True), EVERYTHING):
        table = rows.select(name, factor, quick)
        there = [row for row, _ in records.read(args.records, table)]
        only = [row.name for row in table.rows if row.name in there or (name == "table" and not quick)]
        if only:
            chosen = {"name": name, "factor": factor, "quick": quick, "only": only, "runs": None}
            yield plan_of(argparse.Namespace(**vars(args) | chosen), parse)


def finish(args, plans, done):
    """Write and print the tables; the exit code."""
    words = [args.name, *([args.factor] if args.factor else ()), *(["--quick"] if args.quick else ())]  # no folders
    words += in_words({key: value for key in ("seeds", "folds", "protocol") if (value := getattr(args, key))})
    words = shlex.join([*words, *(["--only", *args.only] if args.only else ()), "--render"])
    text, problems, everything = [f"{MARK} {words}` -->"], [], args.name == "all"
    text += [INTRODUCTION] if everything else []
    for plan in plans:
        results = records.Results(plan)
        if args.figures:
            for path in comparison.draw(results, args.figures):
                say(f"figure: {path}")
        lines, found = comparison.report(results)
        text += lines
        problems += found
        for factor in plan.table.factors if everything else ():  # the committed pictures
            path = comparison.picture(plan.table, factor, SUITE.parent / "images")
            text += [f"![{factor.title}](../images/{path.name})\n"] * path.exists()
    whole = "\n".join(text).rstrip() + "\n"
    if args.output:
        write_text(args.output, whole)
    for problem in () if everything else problems:
        say(f"not reproduced: {problem}")
    print(whole, end="")
    return 130 if not done else 1 if problems else 0


def listing(plan, missing) -> Iterator[str]:
    """The commands, with their expected cost; only of the runs that are missing, if so asked."""
    for job in plan.jobs:
        if missing and records.find(plan, job).state == "finished":
            continue
        yield f"# {job.name}: about {rows.cost_words(job.row, plan.settings(job), job.quick)}"
        yield shlex.join(["python", "dilatedUnet.py", *job.command(plan.folder(job))])


# -- training -----------------------------------------------------------------------------------------------------


def train(plan, args) -> bool:
    """Run what is neither finished nor in the way; False if interrupted, or the budget is used up."""
    deadline = time.monotonic() + 3600 * (math.inf if args.budget is None else args.budget)
    states = [(job, records.find(plan, job)) for job in plan.jobs]
    for job, found in states:
        if found.state in ("other", "broken"):
            say(f"{job.name} cannot run: {found.words}")
    todo = [(job, found) for job, found in states if found.state in ("absent", "half")]
    for start in {plan.settings(job)["init_from"] for job, _ in todo} - {None}:
        if not Path(f"{start}.weights.h5").exists():
            raise DataError(f"{args.name} starts from {start}: run it in the suite's folder, {SUITE.parent}.")
    minutes = sum(job.row.minutes for job, _ in todo)
    machine = "2 CPU cores" if plan.table.quick else "one H200-class GPU (--list says what on a CPU)"
    say(f"{len(todo)} of {len(states)} runs to go: about {minutes:.0f} minutes on {machine}")
    for i, (job, found) in enumerate(todo, 1):
        say(f"[{i}/{len(todo)}] {job.name}" + f" ({found.words})" * (found.state == "half"))
        watch = Watch(plan.folder(job), plan.settings(job)["epochs"], deadline)
        code = run_alone(plan, job, watch)
        if args.collect:
            records.collect(plan, args.records)
        if code in (130, Terminated.code):
            why = f"the budget of {args.budget:g} hours is used up" if watch.late else "interrupted"
            say(f"{why} in {job.name}: the same command goes on from here")
            return False
        if code:
            say(f"{job.name} failed with exit code {code}; the others go on")
    return True


def run_alone(plan, job, watch) -> int:
    """One run, unless another process has it; the exit code."""
    if watch.late:
        return 130
    folder = plan.folder(job)
    try:
        with locked(folder.with_name(f"{folder.name}.row")):  # training locks the folder itself
            finished = records.find(plan, job).state == "finished"  # by another process, since we looked
            return 0 if finished else in_own_process(job.command(folder), watch)
    except DataError as error:
        say(f"{job.name} is left to another process: {error}")
        return 0


class Watch:
    """Whether a run that another process trains must stop: after an epoch, when no other fits into the budget."""

    def __init__(self, folder, epochs, deadline):
        self.folder, self.epochs, self.deadline = folder, epochs, deadline
        self.saved, self.since = self._checkpoint(), time.monotonic()
        self.late = self.since >= deadline

    def __call__(self) -> bool:
        saved, now = self._checkpoint(), time.monotonic()
        if saved != self.saved:
            seconds, self.saved, self.since = now - self.since, saved, now
            with suppress(OSError):  # without a history there is no epoch to keep
                lines = (self.folder / "history.csv").read_bytes().count(b"\n")  # the head is one, too
                self.late = lines <= self.epochs and now + seconds >= self.deadline
        return self.late

    def _checkpoint(self):
        """When it was saved, which is the last thing that happens in an epoch; None without one."""
        with suppress(OSError):
            return (self.folder / "checkpoint.npz").stat().st_mtime_ns


def in_own_process(argv, watch=lambda: False) -> int:
    """The suite in a process of its own; on Ctrl-C it is given the time to leave by itself."""
    # JAX compiles for minutes what it may find compiled: of the row before, or of the run that is resumed
    cached = os.environ.get("KERAS_BACKEND") == "jax" and JAX_CACHE.is_absolute()
    cache = {"JAX_COMPILATION_CACHE_DIR": str(JAX_CACHE)} if cached else {}
    process = subprocess.Popen([sys.executable, SUITE, *argv], env=cache | os.environ)
    try:
        while not watch():
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=1)
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=60) or 130
    except subprocess.TimeoutExpired:  # it ignores Ctrl-C, as what a shell runs in the background does
        return 130
    except KeyboardInterrupt as stop:
        if not isinstance(stop, Terminated):  # a terminal has sent Ctrl-C to the run as well
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        return 130
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
