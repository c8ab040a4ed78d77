"""What is trained: every flag of network, optimizer, loss, augmentation and learning rate acts."""

from dataclasses import asdict

import keras
import numpy as np
import pytest
import tifffile
from conftest import TINY, cases

import augment
import data
import dilatedUnet
from network import losses, optimizers
from train import run as training
from train.feed import Stacks


def parse(words):
    return dilatedUnet.parse([*TINY.split(), *words.split()])


def trainee(words=""):
    args = parse(words)
    return training.make_trainee(args, training.course_of(args), data.Normalisation(128.0, 40.0), args.precision)


@cases(
    "flags, kind, settings",
    ("", optimizers.RMSprop, {"momentum": 0.0, "use_ema": False}),
    ("--momentum 0.9", optimizers.RMSprop, {"momentum": 0.9}),
    ("--optimizer adam", keras.optimizers.Adam, {"beta_1": 0.9}),
    ("--optimizer adamax", keras.optimizers.Adamax, {}),
    ("--optimizer muon", optimizers.Muon, {"beta_1": 0.9}),
    ("--optimizer sgd --momentum 0.5", keras.optimizers.SGD, {"momentum": 0.5}),
    ("--ema 0.9", optimizers.RMSprop, {"use_ema": True, "ema_momentum": 0.9}),
)
def test_the_optimizer_is_the_one_asked_for(flags, kind, settings):
    optimizer = trainee(flags).optimizer
    assert type(optimizer) is kind
    assert {key: getattr(optimizer, key) for key in settings} == settings


@cases(
    "flags, rates",
    ("--max_lr 5e-3 --step_size 2", [1e-3, 3e-3, 5e-3, 3e-3, 1e-3, 3e-3, 5e-3]),
    ("--max_lr 5e-3 --step_size 2 --clr_mode triangular2", [1e-3, 3e-3, 5e-3, 3e-3, 1e-3, 2e-3, 3e-3]),
    ("--max_lr 5e-3 --step_size 2 --clr_mode exp_range --clr_gamma 0.5", [1e-3, 2e-3, 2e-3, 1.25e-3, 1e-3]),
    ("--clr_mode none", [1e-3] * 9),
    ("--max_lr 5e-3 --clr_mode cosine --epochs 5 --steps_per_epoch 1", [5e-3, 4.414e-3, 3e-3]),
)
def test_the_rate_of_every_update_is_the_courses(flags, rates):
    """What the optimizer itself takes for its rate, at each number of updates done."""
    made, course = trainee(f"--lr 1e-3 {flags}"), training.course_of(parse(f"--lr 1e-3 {flags}"))
    for update, rate in enumerate(rates):
        made.optimizer.iterations.assign(update)
        assert float(made.optimizer.learning_rate) == pytest.approx(rate, rel=1e-3)
        assert float(course.rate(update)) == pytest.approx(rate, rel=1e-3)


def test_an_update_uses_the_rate_of_its_number_and_is_counted_for_batch_norm(small):
    """Two trainees that differ in the rate of update 1 alone are the same after update 0, and not after update 1."""
    found, images = {}, tifffile.imread(small / "images.tif")
    stacks = [data.Stack(array, None, [], "") for array in (images, (images > 128).astype(np.uint8))]
    for mode in ("none", "triangular --max_lr 2e-3 --step_size 1"):
        args = parse(f"--optimizer sgd --lr 1e-3 --average_warmup 1 --clr_mode {mode}")
        read = Stacks(*stacks, None, training.split_of(args, 10), data.Normalisation.fit(images))
        made = training.make_trainee(args, training.course_of(args), read.normalisation, "float32")
        feed, states = training.feed_of(args, read).training(0), found.setdefault(mode[:4], [])
        for _ in range(2):
            made.train_on_batch(next(feed)[0])
            states.append([np.array(v) for v in made.network.trainable_variables])
    first, second = ([np.array_equal(*pair) for pair in zip(*(s[i] for s in found.values()))] for i in (0, 1))  # noqa: B905
    assert all(first)
    assert not all(second)
    assert (made.updates, made.network.get_layer("head_bn").update()) == (2, 1)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_loss_is_the_one_asked_for(name):
    mask, interior = np.random.default_rng(0).random((2, 2, 8, 8)).astype(np.float32)
    found = trainee(f"--loss {name}").compute_loss(y_pred=(interior, mask))
    assert float(found) == float(losses.LOSSES[name](mask, interior))


@cases(
    "flags, expected",
    (
        "--precision float32 --dropout 0 --dilate 1",
        {"down1_conv1.compute_dtype": "float32", "down1_bn1.kept": 256, "centre_conv3.dilation_rate": (4, 4)},
    ),
    (
        "--precision bfloat16 --classes 3 --filters 5,7 --dropout 0.5 --dilate 0 --dilate_rate 2 --addition 0",
        {
            **{"down1_conv1.compute_dtype": "bfloat16", "head_conv.filters": 3, "down2_conv1.filters": 7},
            **{"down1_drop.kept": 128, "centre_conv3.dilation_rate": (1, 1), "down1_conv2.dilation_rate": (2, 2)},
        },
    ),
)
def test_the_network_is_the_one_asked_for(flags, expected):
    network = trainee(flags).network
    for place, value in expected.items():
        layer, attribute = place.split(".")
        assert getattr(network.get_layer(layer), attribute) == value, place
    assert ("centre_sum" in [layer.name for layer in network.layers]) == ("--addition 0" not in flags)


def test_the_seed_makes_the_network_training_warps_and_validation_sees_windows_as_they_are(small):
    one, two, three = (trainee(f"--seed {seed}").network.get_layer("down1_conv1").kernel for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)
    args, images = parse("--augment all"), tifffile.imread(small / "images.tif")
    made, stack = trainee("--augment all"), data.Stack(images, None, [], "")
    assert made.recipe == augment.RECIPES["all"]
    feed = training.feed_of(args, Stacks(stack, stack, None, training.split_of(args, 10), made.normalisation))
    _, mask = made(feed.windows_at([(2, 5, 7)]), training=False)
    assert np.array_equal(np.asarray(mask)[0], images[2, 5:37, 7:39].astype(np.float32))


@cases(
    "flags, field, value",
    ("--augment affine", "max_rotation_deg", 180.0),
    ("--augment elastic", "elastic_sd_px", 10.0),
    ("--augment all --elastic_grid 5", "elastic_grid", 5),
    ("--augment all --elastic_sd_px 4", "elastic_sd_px", 4.0),
    ("--augment all --max_rotation_deg 15", "max_rotation_deg", 15.0),
    ("--augment all --max_shear_deg 2", "max_shear_deg", 2.0),
    ("--augment all --max_shift_px 3", "max_shift_px", 3.0),
    ("--augment all --scale 0.9 1.1", "scale", (0.9, 1.1)),
    ("--augment all --noise 0.3", "noise", 0.3),
)
def test_the_augmentation_is_the_one_asked_for(flags, field, value):
    args = parse(flags)
    recipe, preset = training.recipe_of(args), augment.RECIPES[args.augment]
    assert (getattr(recipe, field), asdict(recipe) | {field: None}) == (value, asdict(preset) | {field: None})
