"""What a run says: a line that is written over on a terminal, seldom lines in a log."""

import itertools
import re

import pytest

from train import progress
from train.trainee import Course

COURSE = Course(10, 10, 3, patience=0, mode="none", lr=1e-3, max_lr=1e-3, step_size=1, gamma=1.0)
ROW = {"epoch": 5, "update": 50, "learning_rate": 1e-3, "loss": 0.9, "dice": 0.5, "val_loss": 0.8, "val_dice": 0.6}


@pytest.fixture
def started(monkeypatch):
    """A progress after 40 of 100 updates, on a terminal or not, whose clock goes on by `seconds` at every look."""

    def start(terminal, seconds):
        clock = itertools.count(0, seconds)
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal, raising=False)
        found = progress.Progress(COURSE)
        found.start(40)
        return found

    return start


def test_on_a_terminal_one_line_shows_epoch_update_loss_dice_rate_speed_and_time_left(started, capsys):
    started(True, 2).show(50, 0.9, 0.5, 1e-3)
    words = r"epoch 5/10 \[#{10}\.{10}\].*update 50/100.*loss 0.900.*dice 0.500.*lr 1.0e-03.*15.00 images/s.*0:00:10"
    assert re.fullmatch(rf"\r.*{words}.*", capsys.readouterr().err)


@pytest.mark.parametrize(("seconds", "lines"), [(1, 0), (19, 1), (70, 4)])
def test_a_log_gets_a_line_per_epoch_or_per_minute_whichever_is_rarer(started, capsys, seconds, lines):
    log = started(False, seconds)
    for _ in range(4):  # a look at the clock each, and two more for a line
        log.show(50, 0.9, 0.5, 1e-3)
        log.log(ROW)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    assert all("update 50/100" in line and "val_loss 0.800" in line and "left" in line for line in said)
