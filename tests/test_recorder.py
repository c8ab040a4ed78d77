"""What happens after every epoch, and that nothing which is not finite is kept."""

import math
from types import SimpleNamespace

import pytest
from conftest import arrays

from data import DataError
from train import record as records
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
