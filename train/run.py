"""One training run: data, split, network, schedule, callbacks, run record, exact resume.

`run` reads top to bottom as what happens. Everything a run draws is keyed by (seed, epoch, index), and everything
that changes while it trains is in its checkpoint, so a run that was killed goes on as if it had not been.
"""

import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import keras
import numpy as np
from keras import ops

import augment
import clr_callback
import data
from data import DataError
from network import device, distribution, losses, optimizers, unet
from predict import prediction

# What may differ between a run and its resumption; every other setting must be the same.
FREE_ON_RESUME = (
    *("epochs", "resume", "force", "tensorboard", "gpu", "distribute", "lr_find", "augment_preview"),
    *("verb", "run", "argv", "recipe"),
)
KEPT = ("rows", "best", "waited", "reference", "stopped", "seconds")  # of the recorder, in the checkpoint
HISTORY = ("epoch", "update", "learning_rate", "loss", "dice", "val_loss", "val_dice")
VALIDATION = 2**30  # added to the epoch that keys the windows of validation, so that they are not those of training
MIN_DELTA = 1e-3  # of the validation loss, for early stopping; the study's value


# -- the network, with the warp in front and the loss behind ------------------------------------------------------


class Trainee(keras.Model):
    """Windows and numbers in, loss out: augmentation, network and loss as one compiled step.

    Its input is what `augment.batch` returns; its output holds (interior probability, warped mask, or None and the
    logits), so that loss and metric see the mask that was warped with the image. For the weighted loss the mask is
    signed: a pixel's weight, positive in the interior and negative outside. An unpadded network loses `shrink` px on
    each side, and so does the mask.
    """

    def __init__(self, network, *, recipe, window, normalisation, loss, shrink=0):
        super().__init__(name="trainee")
        self.network, self.shrink = network, shrink
        self.with_logits = unet.with_logits(network) if loss == "weighted" else None
        self.recipe, self.window, self.normalisation = recipe, window, normalisation
        constants = {"window": window, "mean": normalisation.mean, "std": normalisation.std}
        self.warp_training = device.fused(partial(augment.warp, recipe=recipe, **constants))
        self.warp_validation = device.fused(partial(augment.warp, recipe=augment.RECIPES["none"], **constants))
        self.loss_function = weighted_loss if self.with_logits else plain_loss(loss)
        self.dice = keras.metrics.Mean(name="dice")

    def call(self, x, training=False):
        image, mask = (self.warp_training if training else self.warp_validation)(x)
        kept = slice(self.shrink, mask.shape[1] - self.shrink)
        mask = mask[:, kept, kept]
        if self.with_logits:
            interior, logits = self.with_logits(image, training=training)
            return interior, mask, logits
        return self.network(image, training=training), mask

    def _maybe_symbolic_build(self, **_):
        """Nothing: all variables are there already, and Keras's own (3.15) cannot average a dict over workers."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.loss_function(*y_pred) / distribution.replicas()  # their gradients are summed

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        interior, mask, *_ = y_pred
        self.dice.update_state(losses.soft_dice(ops.cast(mask > 0, "float32"), interior))
        return {key: distribution.for_logs(value) for key, value in self.get_metrics_result().items()}

    def state(self):
        """Everything that changes during training: weights, statistics, dropout keys, optimizer slots."""
        return [*self.network.variables, *self.optimizer.variables]


def plain_loss(name):
    loss = losses.get(name)
    return lambda interior, mask: loss(mask, interior)


def weighted_loss(interior, signed, logits):
    return losses.weighted_cross_entropy(signed > 0, logits, ops.abs(signed))


# -- the run ----------------------------------------------------------------------------------------------------


def run(args, defaults=None):
    """Train as the parsed command line says; returns the exit code.

    `defaults` are the settings of a command line without flags: an older run whose record lacks a flag had those.
    """
    with refused():
        spread = distribution.start(args.distribute)
    check_batch(args, spread)
    try:
        return train(args, spread, defaults or {})
    except spread.lost as error:
        say(f"another process of this run is lost ({first_line(error)}); {how_to_go_on(output_paths(args)[0])}")
        return 1


def train(args, spread, defaults):
    folder, weights = output_paths(args)
    settings = resolved_settings(args)
    precision = precision_of(args, folder)
    say(device.describe(precision) + spread.words)
    images, masks, cells = load(args)
    split = split_of(args, len(images.sections))
    normalisation = data.Normalisation.fit(images.sections[list(split.train)])
    if args.augment_preview:
        return preview(args, images, masks, split, normalisation)
    count, height, width = images.sections.shape
    say(f"data: {images.source}, {count} sections of {height} x {width} px")
    say(f"split: {split.describe()}")
    trainee, clr = make_trainee(args, normalisation, precision, spread)
    if args.lr_find:
        return find_learning_rate(args, trainee, images, targets_of(args, masks, cells, split), split, folder)
    say(f"schedule: {describe_schedule(args)}")
    record = new_record(args, settings, images, masks, split, normalisation, precision, trainee.network)
    extra = extra_callbacks(args, folder) if spread.chief else []
    done = prepare_folder(args, folder, weights, record, defaults) if spread.chief else None
    if spread.agree(bool(done)):
        say(done or f"{folder}: finished already")
        return 0
    targets = targets_of(args, masks, cells, split)
    validation = validation_batches(args, images, targets, split)
    with spread.apart():
        copy = None if spread.replicas == 1 else make_trainee(args, normalisation, precision)[0]
    recorder = Recorder(args, folder, weights, record, validation, spread, copy)
    recorder.set_model(trainee)  # `fit` does, but not every resumption has an epoch left
    first_epoch = recorder.restore() if args.resume else 0
    check_shared(spread, first_epoch, folder)
    say(f"run record: {folder}; weights: {weights} (Keras 3 saves weights as .weights.h5)")
    if targets is not masks and spread.chief:
        draw_weights(images, targets, split, folder)
    feed = spread.feed(partial(training_batches, args, images, targets, split, first_epoch, spread.replicas))
    callbacks = [clr, recorder, *extra]
    if not recorder.stopped:
        try:
            trainee.fit(
                feed,
                initial_epoch=first_epoch,
                epochs=args.epochs,
                steps_per_epoch=args.steps_per_epoch,
                callbacks=[c for c in callbacks if c is not None],
                shuffle=False,
                verbose=0,
            )
        except KeyboardInterrupt:
            say(recorder.interrupted())
            return 130
    if spread.chief:
        with spread.apart():
            finish(args, recorder, images, (masks, cells), split, normalisation, folder, weights)
    spread.agree(0)  # who leaves early takes the others along
    return 0


def precision_of(args, folder):
    """That of the run that is resumed, unless another is asked for, which is then refused."""
    before = read_record(folder) if args.resume and args.precision == "auto" else None
    return before["precision"] if before else device.choose_precision(args.precision)


def say(words):
    print(words, file=sys.stderr, flush=True)


def how_to_go_on(folder, done=""):
    return f"the checkpoint {done}is in {folder}; the same command with --resume goes on from there"


def first_line(error):
    return str(error).strip().partition("\n")[0]


def check_batch(args, spread):
    if args.batch_size % spread.replicas:
        raise DataError(
            f"--batch_size must be a multiple of the {spread.replicas} devices that share it. "
            f"Received: {args.batch_size}"
        )


def check_shared(spread, first_epoch, folder):
    """Every process has read the checkpoint that the chief has read."""
    chiefs = spread.agree(first_epoch)
    if first_epoch != chiefs:
        raise DataError(
            f"{folder} must be a folder that all machines share: the first process goes on after epoch {chiefs}, this "
            f"one sees epoch {first_epoch}."
        )


def output_paths(args):
    """Run folder and weight file, from the flags or from the network's name."""
    name = Path(args.weight_path).name if args.weight_path else f"{network_name(args)}-{args.protocol}-{args.seed}"
    folder = Path(args.run_dir or Path("runs") / name.removesuffix(".h5").removesuffix(".weights"))
    return folder, prediction.weight_file(args.weight_path or folder / "best.weights")


def network_name(args):
    if args.arch == "unet2015":
        return args.arch
    return ("dilated" if args.dilate else "standard") + "_unet"


def resolved_settings(args):
    return {key: value for key, value in sorted(vars(args).items()) if key not in FREE_ON_RESUME}


def load(args):
    """Images, masks (1 = interior), and with --instances the cells' numbers, which touch no other (else None)."""
    images = data.resolve(args.image_path, "image", log=say)
    masks = data.resolve(args.mask_path or args.image_path, "mask", log=say)
    if masks == images and not args.mask_path:
        raise DataError(f"--mask_path must name the labels, for there are none beside {images}.")
    images, masks, messages = data.load_pair(images, masks, invert_mask=args.invert_mask, instances=args.instances)
    for message in messages:
        say(message)
    check_window(args, images)
    if not args.instances:
        return images, masks, None
    apart = np.stack([losses.separate(section) for section in masks.sections])
    return images, replace(masks, sections=(apart > 0).astype(np.uint8)), masks


def check_window(args, images):
    side, lost = output_side(args)
    if args.arch == "unet2015":
        with refused():
            unet.check_size("--window", args.window, args.depth, args.padding)
    data.check_window(images, side, 1 if lost else 2 ** (args.depth if args.arch == "unet2015" else len(args.filters)))


def output_side(args):
    """Side of the network's output for an input of --window, and px lost on each side."""
    lost = unet.shrink(args.depth, args.padding) if args.arch == "unet2015" else 0
    return args.window - 2 * lost, lost


def targets_of(args, masks, cells, split):
    """What the loss compares with: the masks, or for the weighted loss each pixel's weight, signed (see `Trainee`).

    The class weights are those of the training sections; held-out sections get no weights, for nothing trains or
    chooses on them.
    """
    if args.loss != "weighted":
        return masks
    train = masks.sections[list(split.train)]
    balance = losses.class_weights(np.count_nonzero(train), train.size)
    signed = np.zeros(masks.sections.shape, np.float32)
    for i in {*split.train, *split.inner}:
        labels = cells.sections[i] if cells else losses.instances(masks.sections[i])
        options = {"w0": args.w0, "sigma": args.sigma, "class_balance": balance, "reach": 1 if cells else 0}
        (truth,), (weights,) = losses.weight_maps([labels], **options)
        signed[i] = np.where(truth > 0, weights, -weights)
    return replace(masks, sections=signed)


def split_of(args, count):
    inner = args.inner_sections if args.protocol in ("holdout", "kfold") else 0
    if inner is None:
        inner = min(3, max(1, count // 8)) if count >= 4 else 0
    return data.split_sections(
        count,
        args.protocol,
        val_sections=data.parse_sections(args.val_sections) if args.val_sections else None,
        fold=args.fold or 0,
        folds=args.folds or 5,
        gap=args.gap,
        inner=inner,
        train_sections=data.parse_sections(args.train_sections) if args.train_sections else None,
    )


@contextlib.contextmanager
def refused():
    """Around checks of what was typed: a leaf's ValueError becomes the DataError that the command line prints."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{error}.".replace("..", ".")) from error


def make_trainee(args, normalisation, precision, spread=None):
    """The compiled model and its learning-rate callback (None for a rate without cycles)."""
    spread = spread or distribution.Alone()
    with spread.scope():
        return _make_trainee(args, normalisation, precision, spread)


def _make_trainee(args, normalisation, precision, spread):
    network = unet.from_settings(network_settings(args), precision=precision, seed=args.seed)
    clr = None
    if args.clr_mode in clr_callback.MODES:
        clr = clr_callback.CyclicLR(args.lr, args.max_lr, args.step_size, args.clr_mode, args.clr_gamma)
    options = {"learning_rate": clr_callback.Schedule(rate_function(args))}
    if args.optimizer in ("sgd", "rmsprop"):
        options["momentum"] = args.momentum
    if args.ema:
        options |= {"use_ema": True, "ema_momentum": args.ema}
    trainee = Trainee(
        network,
        recipe=recipe_of(args),
        window=args.window,
        normalisation=normalisation,
        loss=args.loss,
        shrink=output_side(args)[1],
    )
    trainee.compile(
        optimizer=optimizers.OPTIMIZERS[args.optimizer](**options),
        steps_per_execution=device.steps_per_execution(args.steps_per_execution, args.steps_per_epoch),
        jit_compile=device.use_xla(spread.replicas),
    )
    trainee.optimizer.build(network.trainable_variables)
    return trainee, clr


def network_settings(args):
    """The arguments of `unet.from_settings` that the weights' record keeps."""
    if args.arch == "unet2015":
        return {
            "arch": args.arch,
            "filters": args.filters[0],
            "levels": args.depth,
            "padding": args.padding,
            "batch_norm": args.batch_norm,
            "dropout": args.dropout,
            "classes": args.classes,
        }
    return {
        "filters": list(args.filters),
        "dilate": bool(args.dilate),
        "dilate_rate": args.dilate_rate,
        "addition": bool(args.addition),
        "dropout": args.dropout,
        "classes": args.classes,
    }


def recipe_of(args):
    names = ("elastic_grid", "elastic_sd_px", "max_rotation_deg", "max_shear_deg", "max_shift_px", "noise")
    overrides = {name: getattr(args, name) for name in names}
    with refused():
        return augment.recipe(args.augment, **overrides, scale=tuple(args.scale) if args.scale else None)


def rate_function(args):
    """Learning rate as a pure function of the update number."""
    updates = args.epochs * args.steps_per_epoch
    if args.clr_mode == "none":
        return lambda update: args.lr + 0 * update
    if args.clr_mode == "cosine":
        warm_up = min(100, updates // 20)
        return lambda update: clr_callback.cosine(update, args.lr, args.max_lr, updates, warm_up)
    return clr_callback.CyclicLR(args.lr, args.max_lr, args.step_size, args.clr_mode, args.clr_gamma).rate


def describe_schedule(args):
    updates = args.epochs * args.steps_per_epoch
    crops = f"{updates * args.batch_size} crops of {args.window} x {args.window} px"
    if args.clr_mode == "none":
        return f"{updates} updates, {crops}, learning rate {args.lr:g} throughout"
    if args.clr_mode == "cosine":
        return f"{updates} updates, {crops}, learning rate {args.max_lr:g} falling to {args.lr:g} along a cosine"
    cycles = clr_callback.describe_schedule(updates, args.step_size)
    return f"{args.clr_mode} {args.lr:g}..{args.max_lr:g}, {crops}, {cycles}"


# -- what is fed ------------------------------------------------------------------------------------------------


def windows_source(args, images, masks, split, role):
    """Stacks that windows are cut from, and the sections they may come from.

    `published` is the protocol of 2017: each of the two montages holds all sections, shuffled, 6 x 5 to train and
    5 x 6 to validate, and windows run across the seams.
    """
    if split.protocol != "published":
        return images.sections, masks.sections, split.train if role == "train" else split.inner
    sections = list(split.train)
    rows, columns = montage_shape(len(sections))
    if role != "train":
        rows, columns = columns, rows
    order = np.random.default_rng((args.seed, 2017, role == "train")).permutation(len(sections))
    stacks = (data.montage(stack.sections[sections], rows, columns, order)[None] for stack in (images, masks))
    return (*stacks, (0,))


def montage_shape(count):
    """Rows and columns, rows >= columns, as near to a square as the count allows: 30 -> 6 x 5."""
    columns = next(c for c in range(math.isqrt(count), 0, -1) if count % c == 0)
    return count // columns, columns


def training_batches(args, images, masks, split, first_epoch, cuts=1, slices=range(1)):
    """Batches without end, from `first_epoch` on; batch b of epoch e holds the crops b * B ... of e.

    Each is cut into `cuts` equal ones, of which those in `slices` come, in turn.
    """
    stacks = windows_source(args, images, masks, split, "train")
    recipe = recipe_of(args)
    epoch, size = first_epoch, args.batch_size // cuts
    while True:
        for step in range(args.steps_per_epoch):
            for cut in slices:
                first = step * args.batch_size + cut * size
                yield (crops(stacks, recipe, args, epoch, range(first, first + size)),)
        epoch += 1


def crops(stacks, recipe, args, epoch, indices):
    images, masks, sections = stacks
    side, context = output_side(args)
    return augment.batch(
        images,
        masks,
        recipe,
        seed=args.seed,
        epoch=epoch,
        indices=indices,
        window=side,
        context=context,
        sections=sections,
    )


def validation_batches(args, images, masks, split):
    """Validation windows after an epoch: a function from the epoch's number to batches.

    `published`: windows at random places of the montage, others after every epoch, as in 2017. Otherwise the same
    grid over the inner sections after every epoch.
    """
    if split.protocol == "published":
        stacks = windows_source(args, images, masks, split, "validate")
        chosen = range(args.val_windows)
        groups = [chosen[i : i + args.batch_size] for i in chosen[:: args.batch_size]]
        return lambda epoch: (crops(stacks, augment.RECIPES["none"], args, VALIDATION + epoch, g) for g in groups)
    side, context = output_side(args)
    places = grid(images.sections.shape[1:], side, split.inner)
    places = places[:: max(1, math.ceil(len(places) / 64))]
    batches = [
        windows_at(images.sections, masks.sections, places[i : i + args.batch_size], side, context)
        for i in range(0, len(places), args.batch_size)
    ]
    return (lambda epoch: batches) if batches else None


def grid(shape, window, sections):
    """Windows that cover each section: (section, row, column) of their first pixel."""
    starts = [
        [round(i * (size - window) / max(1, n - 1)) for i in range(n)]
        for size in shape
        for n in [math.ceil(size / window)]
    ]
    return [(s, row, column) for s in sections for row in starts[0] for column in starts[1]]


def windows_at(images, masks, places, window, context=0):
    """Plain windows in the form of `augment.batch`, for the recipe "none"."""
    none = augment.RECIPES["none"]
    plain = augment.draw(none, seed=0, epoch=0, index=0, sections=(0,), shape=images.shape[1:], window=window)
    draws = [replace(plain, section=section, origin=(row, column)) for section, row, column in places]
    return augment.collate(images, masks, draws, none, context)


def preview(args, images, masks, split, normalisation):
    """--augment_preview: what the network will see."""
    import figures

    refuse_picture(args, Path(args.augment_preview))
    stacks, chosen = windows_source(args, images, masks, split, "train"), recipe_of(args)
    shown, truth = augment.preview_batch(
        stacks[0],
        stacks[1],
        chosen,
        seed=args.seed,
        n=12,
        window=output_side(args)[0],
        mean=normalisation.mean,
        std=normalisation.std,
        sections=stacks[2],
    )
    figures.preview(shown, truth, args.augment_preview)
    say(f"{args.augment_preview}: 12 windows as the network will see them (--augment {args.augment})")
    return 0


def refuse_picture(args, path):
    if not args.force:
        refuse_existing(path, words="exists: --force replaces it.")
    make_writable(path.parent)


# -- the run folder ---------------------------------------------------------------------------------------------


def prepare_folder(args, folder, weights, record, defaults):
    """Refuse to overwrite, check that a resumed run is the same run; a sentence if there is nothing left to do."""
    before, checkpoint = read_record(folder), folder / "checkpoint.npz"
    if args.resume and before and checkpoint.exists():
        check_same_run(args, before, record, defaults)
        if before["finished"] and (before["epochs"] >= args.epochs or before["stopped_early"]):
            return f"{folder}: finished after epoch {before['final']['epoch']} already; {what_now(before)}"
    elif args.resume:
        refuse_existing(checkpoint, weights, words="does not belong to a run in this folder: --force starts anew.")
        say(f"--resume: no checkpoint in {folder} yet, so the run starts at its beginning")
    elif not args.force:
        refuse_existing(folder / "run.json", weights, words="exists: --resume continues the run, --force replaces it.")
    make_writable(folder, weights.parent)
    if not args.resume:
        for stale in (checkpoint, folder / "history.csv"):
            stale.unlink(missing_ok=True)
    return None


def make_writable(*folders):
    """Make the folders, and find out now whether they can be written to."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{os.getpid()}.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise DataError(f"{folder} cannot be written to: {error.strerror}.") from error


def what_now(record):
    return "it stopped early, so more --epochs change nothing" if record["stopped_early"] else "raise --epochs to go on"


def refuse_existing(*paths, words):
    for path in paths:
        if path.exists():
            raise DataError(f"{path} {words}")


def read_record(folder):
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        missing = {"settings", "data", "precision", "epochs", "finished"} - set(record)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a run record: {error}.") from error
    if missing:
        raise DataError(f"{path} is not a run record: it lacks {', '.join(sorted(missing))}.")
    return record


def check_same_run(args, before, record, defaults):
    now = json.loads(json.dumps(record["settings"]))
    was = {key: defaults[key] for key in now if key in defaults} | before["settings"]
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise DataError(f"--resume needs the same settings: --{key} was {was.get(key)}. Received: {now.get(key)}")
    if before["data"] != json.loads(json.dumps(record["data"])):
        raise DataError("--resume needs the same data: the pixels of --image_path or --mask_path have changed.")
    if before["precision"] != record["precision"]:
        raise DataError(f"--resume needs --precision {before['precision']}, as before. Received: {record['precision']}")
    if args.clr_mode == "cosine" and before["epochs"] != args.epochs:
        raise DataError(
            f"--epochs may not change on --resume with --clr_mode cosine, which is laid out for {before['epochs']} "
            f"epochs. Received: {args.epochs}"
        )


def new_record(args, settings, images, masks, split, normalisation, precision, network):
    field = unet.field_from_settings(network_settings(args))
    return {
        "argv": args.argv,
        "command": shlex.join(["python", "dilatedUnet.py", *args.argv]),
        "recipe": args.recipe,
        "settings": settings,
        "epochs": args.epochs,
        "finished": False,
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "precision": precision,
        "seed": args.seed,
        "split": {key: list(getattr(split, key)) for key in ("train", "inner", "held_out", "gap")}
        | {"protocol": split.protocol},
        "normalisation": normalisation.to_dict(),
        "data": {
            "images": args.image_path,
            "masks": args.mask_path or args.image_path,
            "image_sha256": data.sha256_pixels(images.sections),
            "mask_sha256": data.sha256_pixels(masks.sections),
            "voxel_nm": images.voxel_nm,
        },
        "network": network_settings(args),
        "parameters": network.count_params(),
        "receptive_field_px": field.size,
    }


def versions():
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "backend": keras.backend.backend()}
    for name in ("keras", "tensorflow", "jax", "torch", "openvino", "numpy", "tifffile"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit():
    """The suite's own Git commit, with "+" where its program was changed since; None outside a clone."""

    def git(*words):
        here = Path(__file__).parent.parent
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=10)

    try:
        head = git("rev-parse", "--verify", "--quiet", "HEAD")
        return head.stdout.strip() + "+" * bool(git("status", "--porcelain", "-uno", "--", "*.py").stdout) or None
    except (OSError, subprocess.SubprocessError):
        return None


def hardware():
    return {"device": device.name(), "cores": os.cpu_count(), "system": platform.platform()}


# -- what happens after every epoch -----------------------------------------------------------------------------


class Recorder(keras.callbacks.Callback):
    """Validation, history, best weights, checkpoint, early stopping and the progress line, in this order.

    One callback, since the order matters for an exact resume: the checkpoint is written last and holds all that
    the others changed.
    """

    def __init__(self, args, folder, weights, record, validation, spread=None, copy=None):
        super().__init__()
        self.args, self.folder, self.weights, self.record = args, folder, weights, record
        self.validation = validation
        self.spread = spread or distribution.Alone()
        self.copy = copy  # where several devices train: their trainee's copy on one, to validate and to save
        self.rate = rate_function(args)
        self.rows, self.best, self.waited, self.stopped = [], math.inf, 0, False
        self.reference = math.inf  # of early stopping: improves only by MIN_DELTA or more
        self.seconds = 0.0  # of training, over all resumptions
        self.progress = Progress(args)

    def restore(self):
        """Set the state of the checkpoint, if there is one; returns the epoch to go on with."""
        path = self.folder / "checkpoint.npz"
        if not path.exists():
            return 0
        kept = load_checkpoint(path, self.model.state())
        if self.copy is not None:
            with self.spread.apart():
                load_checkpoint(path, self.copy.state())
        for key in KEPT:
            setattr(self, key, kept[key])
        if len(self.rows) > self.args.epochs:
            raise DataError(f"--epochs must be at least the {len(self.rows)} done. Received: {self.args.epochs}")
        say(f"resumed after epoch {len(self.rows)}, update {len(self.rows) * self.args.steps_per_epoch}")
        return len(self.rows)

    @property
    def alone(self):
        """What is on one device: the copy, or else the trainee itself."""
        return self.model if self.copy is None else self.copy

    def take_over(self):
        """Bring the copy, if there is one, up to date."""
        if self.copy is None:
            return
        for kept, variable in zip(self.copy.state(), self.model.state(), strict=True):
            kept.assign(ops.convert_to_numpy(variable))

    def on_train_begin(self, logs=None):
        if self.spread.chief:
            prediction.write_json(self.folder / "run.json", self.record)
            if not self.rows:
                with self.spread.apart():
                    self.take_over()
                    self.save_checkpoint()
        self.progress.start(len(self.rows))
        self.began = time.monotonic() - self.seconds

    def on_train_batch_end(self, batch, logs=None):
        loss, dice = float(logs["loss"]), float(logs["dice"])
        update = len(self.rows) * self.args.steps_per_epoch + batch
        self.refuse_infinite(loss, update, "loss")
        self.progress.show(len(self.rows), batch + 1, loss, dice, float(self.rate(update)))

    def refuse_infinite(self, loss, update, name):
        if math.isfinite(loss):
            return
        self.progress.end()
        lower = "--lr" if self.args.clr_mode == "none" else "--max_lr"
        raise DataError(
            f"the {name} is not finite at update {update} (learning rate {float(self.rate(update)):.3g}): the run "
            f"stops, and the checkpoint of epoch {len(self.rows)} stays. Try a lower {lower}."
        )

    def on_epoch_end(self, epoch, logs=None):
        last = (epoch + 1) * self.args.steps_per_epoch - 1
        row = {"epoch": epoch + 1, "update": last + 1, "learning_rate": float(self.rate(last))}
        row |= {"loss": float(logs["loss"]), "dice": float(logs["dice"])}
        if self.spread.chief:
            with self.spread.apart():
                self.take_over()
                self.close_epoch(row, last, logs)
        else:
            self.rows.append(row)
        self.stopped = bool(self.spread.agree(self.stopped))
        if self.stopped:
            self.model.stop_training = True

    def close_epoch(self, row, last, logs):
        """Validate and save."""
        with averaged_weights(self.alone):
            if self.validation:
                row |= self.validate(row["epoch"])
                self.refuse_infinite(row["val_loss"], last, "validation loss")
                logs.update({key: row[key] for key in ("val_loss", "val_dice")})  # for TensorBoard
            self.rows.append(row)
            if self.is_best(row):
                self.save_weights(self.weights)
        self.seconds = time.monotonic() - self.began
        self.write_history()
        self.save_checkpoint()

    def validate(self, epoch):
        """Loss and Dice as the mean over the validation windows of an epoch."""
        found, sizes = [], []
        for batch in self.validation(epoch):
            self.alone.reset_metrics()
            found.append(self.alone.test_on_batch(batch, return_dict=True))
            sizes.append(len(batch["key"]))
        means = {key: float(np.average([float(f[key]) for f in found], weights=sizes)) for key in ("loss", "dice")}
        return {"val_loss": means["loss"], "val_dice": means["dice"]}

    def is_best(self, row):
        if "val_loss" not in row:
            return False
        loss = row["val_loss"]
        improved = loss < self.reference - MIN_DELTA
        self.reference, self.waited = (loss, 0) if improved else (self.reference, self.waited + 1)
        self.stopped = self.waited >= self.args.patience > 0
        better, self.best = loss < self.best, min(loss, self.best)
        return better

    def save_weights(self, path):
        prediction.save_weights(self.alone.network, path, self.weights_record())

    def weights_record(self):
        keys = ("network", "normalisation", "seed", "precision", "split", "data", "command", "versions", "commit")
        kept = {key: self.record[key] for key in (*keys, "receptive_field_px")}
        return kept | {"window": self.args.window, "after": self.rows[-1]}

    def write_history(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        with data.replacing(self.folder / "history.csv", force=True) as partial:
            partial.write_text(text.getvalue())

    def save_checkpoint(self):
        kept = {key: getattr(self, key) for key in KEPT}
        save_checkpoint(self.folder / "checkpoint.npz", self.alone.state(), kept)

    def interrupted(self):
        self.progress.end()
        epoch = len(self.rows)
        done = f"after epoch {epoch} (update {epoch * self.args.steps_per_epoch}) "
        return f"interrupted: {how_to_go_on(self.folder, done)}"

    def on_train_end(self, logs=None):
        self.progress.end()


class averaged_weights:
    """With the optimizer's moving average of the weights in place, where it keeps one."""

    def __init__(self, trainee):
        self.optimizer = trainee.optimizer
        self.pairs = []
        if self.optimizer.use_ema:
            averages = self.optimizer._model_variables_moving_average
            self.pairs = list(zip(trainee.network.trainable_variables, averages, strict=True))

    def __enter__(self):
        # Copies, for JAX gives the buffers of a variable away to the step that it compiles.
        self.trained = [np.array(variable) for variable, _ in self.pairs]
        for variable, average in self.pairs:
            variable.assign(np.array(average))

    def __exit__(self, *_):
        for (variable, _), value in zip(self.pairs, self.trained, strict=True):
            variable.assign(value)


def save_checkpoint(path, variables, kept):
    """Variables and plain values in one .npz file, replaced as a whole."""
    arrays = {f"{i:04d}": ops.convert_to_numpy(variable) for i, variable in enumerate(variables)}
    names = [variable.path for variable in variables]
    with data.replacing(path, force=True) as partial, open(partial, "wb") as file:
        np.savez(file, meta=np.array(json.dumps({"names": names, **kept})), **arrays)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path, variables):
    """Set the variables and return the plain values; DataError where the file does not belong to them."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            kept = json.loads(str(file["meta"]))
            arrays = [file[f"{i:04d}"] for i in range(len(kept["names"]))]
    except Exception as error:  # a broken zip shows itself as one of a dozen kinds
        raise DataError(f"{path} is not a checkpoint, or a broken one: {error}.") from error
    if [a.shape for a in arrays] != [tuple(v.shape) for v in variables]:
        raise DataError(f"{path} belongs to another network or optimizer.")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
    return kept


class Progress:
    """One line on a terminal: Dice, loss, learning rate, images per second, time left; silent elsewhere."""

    def __init__(self, args):
        self.args, self.active = args, sys.stderr.isatty()

    def start(self, epochs_done):
        self.began, self.first = time.monotonic(), epochs_done * self.args.steps_per_epoch

    def show(self, epochs_done, step, loss, dice, rate):
        if not self.active:
            return
        update, total = epochs_done * self.args.steps_per_epoch + step, self.args.epochs * self.args.steps_per_epoch
        seconds = (time.monotonic() - self.began) / max(1, update - self.first)
        filled = round(20 * update / total)
        line = (
            f"epoch {epochs_done + 1}/{self.args.epochs} [{'#' * filled}{'.' * (20 - filled)}] "
            f"dice {dice:.3f}  loss {loss:.3f}  lr {rate:.1e}  {self.args.batch_size / seconds:.2f} images/s  "
            f"{clock(seconds * (total - update))} left"
        )
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)

    def end(self):
        if self.active:
            print(file=sys.stderr)


def clock(seconds):
    """Hours, minutes and seconds.

    >>> clock(3725)
    '1:02:05'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def extra_callbacks(args, folder):
    if not args.tensorboard:
        return []
    if importlib.util.find_spec("tensorboard") is None:
        raise DataError("--tensorboard needs the package tensorboard, which is not installed.")
    return [keras.callbacks.TensorBoard(folder / "tensorboard")]


# -- after training ---------------------------------------------------------------------------------------------


def finish(args, recorder, images, truth, split, normalisation, folder, weights):
    """Last weights, threshold, scores on the held-out sections, pictures, final record."""
    masks, cells = truth
    trainee = recorder.alone
    with averaged_weights(trainee):
        recorder.save_weights(folder / "last.weights.h5")
        if not any("val_loss" in row for row in recorder.rows):  # nothing to choose by: the last weights it is
            recorder.save_weights(weights)
    trainee.network.load_weights(weights)
    predict = prediction.section_predictor(trainee.network, normalisation, recorder.record["network"], tta=args.tta)
    interior_of = cache(lambda i: predict(images.sections[i]))  # some sections both choose and are scored
    record = recorder.record | {"finished": True, "epochs": args.epochs, "stopped_early": recorder.stopped}
    record["training_seconds"] = round(recorder.seconds, 1)
    record["final"] = recorder.rows[-1] | {"best_val_loss": None if math.isinf(recorder.best) else recorder.best}
    record |= choose_cells(cells, split, interior_of) if cells else choose_threshold(masks, split, interior_of)
    prediction.add_to_record(weights, **{key: record[key] for key in prediction.SEGMENTATION if key in record})
    sections = list(split.held_out or split.inner or some(split.train))
    interior = np.stack([interior_of(i) for i in sections])
    role = "held_out" if split.held_out else "training_sections"
    if cells:
        labels = np.stack(list(prediction.segment_stack(interior, record)))
        record[role] = score_cells(cells.sections[sections], labels, sections)
        draw_section(images, cells, labels, sections, folder / f"{role}.png")
    else:
        record[role] = score(masks.sections[sections], interior, sections)
        draw_section(images, masks, interior, sections, folder / f"{role}.png")
    prediction.write_json(folder / "run.json", record)
    draw_curves(args, recorder, folder)
    say(f"weights: {weights}; record, history and pictures: {folder}")


def some(sections, most=6):
    """At most `most` of the sections, evenly spread."""
    return [sections[i * len(sections) // most] for i in range(most)] if len(sections) > most else list(sections)


def choose_threshold(masks, split, interior_of):
    """Threshold of the highest V_rand on (at most six) training sections, for `predict --segment`."""
    from score import scores

    chosen = some(split.inner or split.train)
    if not masks.sections[chosen].any():
        return {"threshold": 0.5}
    found = scores.best_threshold([interior_of(i) for i in chosen], masks.sections[chosen])
    return {"threshold": found}


def choose_cells(cells, split, interior_of):
    """How to cut the probability into cells: highest mean IoU on (at most six) training sections."""
    from score import scores

    chosen = some(split.inner or split.train)
    if not cells.sections[chosen].any():
        return {"threshold": 0.5}
    found = scores.best_segmentation([interior_of(i) for i in chosen], cells.sections[chosen])
    return {"threshold": found.threshold, "background": found.background, "smallest_cell_px": found.min_size}


def score_cells(cells, labels, sections):
    """Scores of instances, and a plain word where there are none."""
    from score import evaluation

    if not cells.any():
        say("WARNING: no section of these holds a cell, so there is nothing to score")
        return {"sections": sections, "degenerate": "no cell"}
    found = evaluation.score_instances(labels, cells, sections=sections)
    found["degenerate"] = None if labels.any() else "the prediction holds no cell"
    say(f"sections {data.format_sections(sections)}: mean IoU {found['mean_iou']:.4f}, SEG {found['seg']:.4f}")
    if found["degenerate"]:
        say(f"WARNING: {found['degenerate']}")
    return found


def score(truth, interior, sections):
    """Scores of whole sections, and a plain word where the prediction is degenerate."""
    from score import evaluation

    if not truth.any():
        say("WARNING: no section of these holds interior, so there is nothing to score")
        return {"sections": sections, "degenerate": "no interior"}
    scores = evaluation.score_arrays(interior, truth, tuple(evaluation.SCORES), sections=sections)
    scores["degenerate"] = degenerate(interior, truth)
    shown = {key: scores[key] for key in evaluation.DEFAULT_SCORES}
    say(f"sections {data.format_sections(sections)}: " + ", ".join(f"{key} {shown[key]:.4f}" for key in shown))
    say(f"WARNING: {scores['degenerate']}" if scores["degenerate"] else "the prediction beats 'always interior'")
    return scores


def degenerate(interior, truth):
    """Why a prediction is worth nothing, or None.

    "Always interior" scores the Dice 2 f / (1 + f) for a fraction f of interior, 0.877 on the ISBI-2012 labels.
    """
    if float(interior.std()) < 1e-3:
        return f"the prediction is constant ({float(interior.mean()):.3f}): the network has learned nothing"
    fraction = float(truth.mean())
    always = 2 * fraction / (1 + fraction)
    chosen = interior > 0.5
    found = 2 * float((chosen & (truth > 0)).sum()) / max(1.0, float(chosen.sum() + truth.sum()))
    if found <= always:
        return f"Dice {found:.3f} is no better than 'always interior', which scores {always:.3f}"
    return None


def draw_section(images, masks, interior, sections, path):
    """Raw, truth and prediction of the middle one of the scored sections."""
    import figures

    i = len(sections) // 2
    titles = (f"section {sections[i]}", "truth", "prediction")
    figures.panel(images.sections[sections[i]], masks.sections[sections[i]], interior[i], path, titles=titles)


def draw_weights(images, targets, split, folder):
    """The first training section with its border weights."""
    import figures

    i = split.train[0]
    signed = targets.sections[i]
    labels = losses.instances(signed > 0)
    figures.weight_map(np.abs(signed), folder / "weights.png", image=images.sections[i], labels=labels)


def draw_curves(args, recorder, folder):
    import figures

    history = {key: [row.get(key) for row in recorder.rows] for key in HISTORY}
    figures.curves(history, folder / "curves.png")
    rates = [float(recorder.rate(n)) for n in range(len(recorder.rows) * args.steps_per_epoch)]
    figures.learning_rate(rates, folder / "learning_rate.png", label=args.clr_mode)


# -- the learning-rate range test -------------------------------------------------------------------------------


def find_learning_rate(args, trainee, images, masks, split, folder):
    """--lr_find: raise the rate from update to update, draw the loss against it, suggest a range."""
    import figures

    path = folder / "lr_find.png"
    refuse_picture(args, path)
    rates = clr_callback.exponential_range(args.lr_find, 1e-7, 1.0)
    trainee.optimizer._learning_rate = clr_callback.Schedule(_exponential(args.lr_find, 1e-7, 1.0))
    feed, found = training_batches(args, images, masks, split, 0), []
    for _ in rates:
        trainee.reset_metrics()
        found.append(float(trainee.train_on_batch(next(feed)[0], return_dict=True)["loss"]))
        if not math.isfinite(found[-1]) or found[-1] > 4 * min(found):
            break
    found = [loss for loss in found if math.isfinite(loss)] or [math.inf]
    with refused():
        low, high = clr_callback.suggest_range(rates[: len(found)], found)
    figures.lr_find(rates[: len(found)], found, (low, high), path)
    say(f"suggested: --lr {low:.1e} --max_lr {high:.1e} (picture: {path})")
    return 0


def _exponential(count, lowest, highest):
    factor = (highest / lowest) ** (1 / max(1, count - 1))
    return lambda update: lowest * factor**update
