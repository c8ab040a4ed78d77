"""Cyclical learning rates: known values, the rate that was used, resume, refusals."""

import keras
import numpy as np
import pytest
from conftest import cases

import clr_callback as clr
from clr_callback import CyclicLR

pytestmark = pytest.mark.jax


def model(optimizer=None, **options):
    keras.utils.set_random_seed(0)
    made = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    made.compile(optimizer or keras.optimizers.SGD(0.123), "mse", **options)
    return made


X, Y = np.ones((40, 3), np.float32), np.zeros((40, 1), np.float32)


class Spy(keras.callbacks.Callback):
    """The rate the optimizer holds while each update runs."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))


def fit(made, *callbacks, epochs=1):
    return made.fit(X, Y, batch_size=4, epochs=epochs, callbacks=list(callbacks), verbose=0)


def test_the_callback_and_the_schedule_are_kerass_and_a_foreign_schedule_is_refused():
    assert issubclass(CyclicLR, keras.callbacks.Callback)
    assert isinstance(CyclicLR().schedule(), keras.optimizers.schedules.LearningRateSchedule)
    with pytest.raises(ValueError, match="steps_per_execution=5"):
        fit(model(steps_per_execution=5), CyclicLR())
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    with pytest.raises(ValueError, match="constant learning rate"):
        fit(model(keras.optimizers.SGD(decay)), CyclicLR())


@cases(
    "options, expected",
    ({}, {0: 1, 2: 2, 4: 3, 6: 2, 8: 1, 12: 3, 20: 3}),
    ({"mode": "triangular2"}, {4: 3, 12: 2, 20: 1.5}),
    ({"mode": "exp_range", "gamma": 0.9}, {12: 1 + 2 * 0.9**12}),
    ({"scale_fn": lambda x: 1 / 5 ** (x - 1)}, {12: 1 + 2 / 5}),
    ({"scale_fn": lambda x: 1 / (1 + x), "scale_mode": "iterations"}, {4: 1 + 2 / 5}),
)
def test_the_rate_rises_for_a_half_cycle_and_falls_for_one_its_height_scaled(options, expected):
    callback = CyclicLR(1.0, 3.0, 4, **options)
    assert {n: callback.rate(n) for n in expected} == pytest.approx(expected)


def test_cosine_rises_then_ends_at_the_base_rate():
    rates = [clr.cosine(n, 0.1, 1.0, 11, warm_up=2) for n in range(11)]
    assert (rates[:2], rates[2]) == (pytest.approx([1 / 3, 2 / 3]), pytest.approx(1.0))
    assert (rates[6], rates[-1]) == (pytest.approx(0.55), pytest.approx(0.1))
    np.testing.assert_allclose(clr.cosine(np.arange(11), 0.1, 1.0, 11, warm_up=2), rates)
    in_graph = [float(clr.Schedule(lambda n: clr.cosine(n, 0.1, 1.0, 11, warm_up=2))(n)) for n in range(11)]
    np.testing.assert_allclose(in_graph, rates, rtol=1e-6)


@pytest.mark.parametrize("mode", clr.MODES)
def test_the_rate_used_by_each_update_is_what_the_history_shows(mode):
    callback, spy = CyclicLR(0.01, 0.1, 3, mode, gamma=0.99), Spy()
    fit(model(), callback, spy)
    assert spy.rates == pytest.approx(callback.history["learning_rate"], rel=1e-6)
    assert callback.history["learning_rate"] == pytest.approx([callback.rate(n) for n in range(10)])
    assert callback.history["update"] == list(range(10))


def test_the_rate_used_moves_the_weights_and_a_second_fit_goes_on_at_the_right_update():
    # SGD on a linear loss moves the bias by minus the learning rate at each update
    made = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    made.compile(keras.optimizers.SGD(0.5), loss=lambda y, p: keras.ops.mean(p))
    callback = CyclicLR(0.01, 0.1, 2)
    made.fit(np.zeros((6, 1)), np.zeros((6, 1)), batch_size=1, callbacks=[callback], verbose=0)
    assert -float(made.get_weights()[1][0]) == pytest.approx(sum([0.01, 0.055, 0.1, 0.055, 0.01, 0.055]), rel=1e-5)
    made, again = model(), CyclicLR(0.01, 0.1, 7)
    fit(made, CyclicLR(0.01, 0.1, 7))
    history = fit(made, again, epochs=2).history
    assert again.history["update"] == list(range(10, 30))
    assert again.history["learning_rate"][0] == pytest.approx(again.rate(10))
    assert history["learning_rate"] == pytest.approx([again.rate(19), again.rate(29)])


def test_accumulated_gradients_are_one_update_and_the_rate_goes_on_from_it():
    callback, spy = CyclicLR(0.01, 0.09, 8), Spy()
    fit(model(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)), callback, spy, epochs=3)
    expected = [callback.rate(n) for n in range(15)]  # of 10 batches an epoch
    assert callback.history["update"] == list(range(15))
    np.testing.assert_allclose(callback.history["learning_rate"], expected, rtol=1e-6)
    np.testing.assert_allclose(spy.rates[1::2], expected, rtol=1e-6)


def test_a_model_with_the_schedule_is_saved_and_goes_on(tmp_path):
    callback = CyclicLR(np.float32(0.01), 0.09, np.int64(8), mode="exp_range", gamma=0.9)
    made = model(keras.optimizers.SGD(callback.schedule()))
    fit(made, callback)
    made.save(tmp_path / "m.keras")
    rate = keras.models.load_model(tmp_path / "m.keras").optimizer._learning_rate
    assert [float(rate(n)) for n in (0, 3, 11)] == pytest.approx([callback.rate(n) for n in (0, 3, 11)])


@pytest.mark.parametrize("in_graph", [False, True])
def test_float16_whose_optimizer_is_wrapped_has_the_same_rates(in_graph):
    rates = []
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        try:
            callback = CyclicLR(1e-4, 1e-2, step_size=3)
            optimizer = keras.optimizers.SGD(callback.schedule() if in_graph else 0.1)
            fit(model(optimizer), callback, epochs=2)
        finally:
            keras.config.set_dtype_policy("float32")
        rates.append(callback.history["learning_rate"])
    assert rates[0] == rates[1]
    assert len(rates[0]) == 20


@pytest.mark.parametrize("steps_per_execution", [1, 4, 5])
def test_the_schedule_in_the_graph_gives_the_same_weights(steps_per_execution):
    by_hand = model()
    fit(by_hand, CyclicLR(0.01, 0.1, 3), epochs=2)
    callback = CyclicLR(0.01, 0.1, 3)
    in_graph = model(keras.optimizers.SGD(callback.schedule()), steps_per_execution=steps_per_execution)
    fit(in_graph, callback, epochs=2)  # of 10 updates each, which 4 does not divide
    for mine, theirs in zip(in_graph.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
    assert callback.history["update"] == list(range(20))
    assert callback.history["learning_rate"] == pytest.approx([callback.rate(n) for n in range(20)])


@cases(
    "wrong, words",
    ({"base_lr": 0.0}, "base_lr must be above 0. Received: 0.0"),
    ({"base_lr": 0.2, "max_lr": 0.1}, "max_lr must be at least base_lr"),
    ({"step_size": 0}, "step_size must be a whole number"),
    ({"step_size": 2.5}, "step_size must be a whole number"),
    ({"mode": "square"}, "mode must be one of triangular, triangular2, exp_range"),
    ({"gamma": 0.0}, "gamma must be above 0"),
    ({"gamma": 1.1}, "gamma must be above 0 and at most 1"),
    ({"scale_fn": 3}, "scale_fn must be a function"),
    ({"scale_mode": "epoch"}, "scale_mode must be cycle or iterations"),
)
def test_wrong_arguments_are_refused_at_construction(wrong, words):
    with pytest.raises(ValueError, match=words):
        CyclicLR(**wrong)


def test_a_run_that_ends_in_mid_cycle_is_told_and_the_range_test_suggests_rates_around_the_fall_of_the_loss():
    assert "WARNING" not in clr.describe_schedule(4000, 2000)
    assert "mid-cycle, 1000 updates" in clr.describe_schedule(5000, 2000)
    rates = np.geomspace(1e-6, 1.0, 101)
    losses = [1.0 if r < 1e-4 else max(0.2, 1 - 0.4 * np.log10(r / 1e-4)) if r < 1e-1 else 5.0 for r in rates]
    low, high = clr.suggest_range(rates, losses)
    assert 1e-4 < low < 1e-3
    assert 1e-3 < high <= 1e-1 / 2
    assert low < high
    with pytest.raises(ValueError, match="never fell"):
        clr.suggest_range([1, 2, 3], [1.0, 2.0, 3.0])


def test_the_range_test_suggests_where_a_tenth_of_the_smoothed_fall_is_made_to_a_third_of_where_it_ends():
    rates = np.geomspace(1e-6, 1.0, 101)
    losses = np.interp(np.arange(101), [0, 20, 70, 90, 100], [1, 2, 0.2, 0.2, 5])  # first it rises
    losses[5] = 0  # of a single window
    curve, (low, high) = clr.smoothed(losses)[:91], clr.suggest_range(rates, losses)
    assert high == pytest.approx(rates[20 + curve[20:].argmin()] / 3)
    onset = [*rates].index(low)
    assert curve[onset] <= 0.9 * curve.max() + 0.1 * curve[20:].min() < curve[onset - 1]
    sudden = clr.suggest_range(rates, np.r_[np.ones(60), np.zeros(5), np.full(36, 9)])
    assert sudden == pytest.approx((rates[64] / 9, rates[64] / 3))


@cases("updates, rise", (40, 2), (4000, 100))
def test_a_cosine_rises_for_a_twentieth_of_its_updates_at_most_100(updates, rise):
    rates = clr.rate_of("cosine", 0.1, 1.0, 1, updates=updates)(np.arange(updates))
    assert (np.argmax(rates), rates[-1]) == (rise, pytest.approx(0.1))
    assert rates[0] == pytest.approx(1 / (rise + 1))
