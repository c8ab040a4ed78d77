"""What happens after every epoch, and that nothing which is not finite is kept."""

import itertools
import math
import re
from types import SimpleNamespace

import pytest
from conftest import arrays

from data import DataError
from train import record as records
from train import recorder as recorders
from train.recorder import Recorder
from train.trainee import Course


@pytest.fixture
def recorder(tmp_path):
    """A recorder of one epoch of two updates; its trainee validates at 0.5."""
    course = Course(3, 2, 1, patience=2, mode="none", lr=1e-3, max_lr=1e-3, step_size=1, gamma=1.0)
    place = records.Place(tmp_path, tmp_path / "best.weights.h5")
    made = Recorder(place, {"finished": False}, course, validation=lambda epoch: [])
    trainee = SimpleNamespace(optimizer=SimpleNamespace(use_ema=False), state=lambda: [], stop_training=False)
    trainee.is_finite = lambda: True
    trainee.validate = lambda batches: {"val_loss": 0.5, "val_dice": 0.75}
    made.set_model(trainee)
    made.saved = []
    made.save_weights = made.saved.append
    made.on_train_begin()
    return made


def test_an_epoch_is_validated_recorded_and_saved(recorder):
    logs = {"loss": 0.7, "dice": 0.6}
    for epoch, saved in ((0, 1), (1, 1), (2, 1)):
        recorder.on_epoch_end(epoch, logs)
        assert len(recorder.saved) == saved, "only better weights are saved"
        assert recorder.model.stop_training is (epoch == 2), "patience of 2 epochs"
    assert logs == {"loss": 0.7, "dice": 0.6, "learning_rate": 1e-3, "val_loss": 0.5, "val_dice": 0.75}
    lines = (recorder.place.history).read_text().splitlines()
    assert lines[:2] == ["epoch,update,learning_rate,loss,dice,val_loss,val_dice", "1,2,0.001,0.7,0.6,0.5,0.75"]
    assert arrays(recorder.place.checkpoint)[1]["rows"] == recorder.journal.rows


@pytest.mark.parametrize("what", ["loss", "weights", "validation loss"])
def test_what_is_not_finite_stops_the_run_and_is_not_kept(recorder, what):
    before = recorder.place.checkpoint.read_bytes()
    if what == "weights":
        recorder.model.is_finite = lambda: False
    elif what == "validation loss":
        recorder.model.validate = lambda batches: {"val_loss": math.nan, "val_dice": 0.5}
    ends = recorder.on_train_batch_end if what == "loss" else recorder.on_epoch_end
    with pytest.raises(DataError) as error:
        ends(int(what == "loss"), {"loss": math.inf if what == "loss" else 1.0, "dice": 0.5})
    words = f"the {what} {'are' if what == 'weights' else 'is'} not finite at update 1 (learning rate 0.001)"
    assert str(error.value).startswith(words)
    assert str(error.value).endswith("the checkpoint of epoch 0 stays. Try a lower --lr.")
    assert recorder.place.checkpoint.read_bytes() == before
    assert not recorder.saved


# -- what a run says


COURSE = Course(10, 10, 3, patience=0, mode="none", lr=1e-3, max_lr=1e-3, step_size=1, gamma=1.0)
ROW = {"epoch": 5, "update": 50, "learning_rate": 1e-3, "loss": 0.9, "dice": 0.5, "val_loss": 0.8, "val_dice": 0.6}


@pytest.fixture
def started(monkeypatch):
    """A progress after 40 of 100 updates, on a terminal or not, whose clock goes on by `seconds` at every look."""

    def start(terminal, seconds):
        clock = itertools.count(0, seconds)
        monkeypatch.setattr(recorders.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(recorders.sys.stderr, "isatty", lambda: terminal, raising=False)
        found = recorders.Progress(COURSE)
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
