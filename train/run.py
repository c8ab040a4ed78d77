"""One training run, top to bottom: data, split, network, course of learning rates, training, scores.

Everything a run draws is keyed by (seed, epoch, index), and everything that changes while it trains is in its
checkpoint, so a run that was killed goes on as if it had not been. Its parts: `feed` which windows, `trainee` what is
trained, `recorder` what happens after every epoch, `record` the run folder, `finish` scores and pictures.
"""

import contextlib
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np

import augment
import clr_callback
import data
import figures
from data import DataError
from files import atomic, shell
from files.ahead import ahead
from files.shell import say
from network import device, distribution, layers, losses, optimizers, unet
from predict import prediction
from train import initial
from train import record as records
from train.feed import Feed, Stacks, pixel_weights
from train.finish import draw_weights, finish
from train.recorder import Recorder
from train.trainee import Course, Trainee, find_rates

SPLIT = ("train", "inner", "held_out", "gap")

# -- the run ----------------------------------------------------------------------------------------------------


def run(args, defaults=None):
    """Train as the parsed command line says; returns the exit code. `defaults` as in `record.prepare`."""
    with refused():
        spread = distribution.start(args.distribute)
    if (args.steps_per_execution or 1) > 1 and device.one_update_per_call(spread.replicas):
        where = "PyTorch" if device.backend() == "torch" else "several devices of TensorFlow"
        raise DataError(f"--steps_per_execution must be 1 with {where}. Received: {args.steps_per_execution}")
    if args.batch_size % spread.replicas:
        rule = f"a multiple of the {spread.replicas} devices that share it"
        raise DataError(f"--batch_size must be {rule}. Received: {args.batch_size}")
    place = place_of(args)
    try:
        return train(args, place, spread, defaults or {})
    except spread.lost as error:
        first = str(error).strip().partition("\n")[0]
        say(f"another process of this run is lost ({first}); {how_to_go_on(place, force=args.force)}")
        return 1


def train(args, place, spread, defaults):
    def read():
        precision = precision_of(args, place)
        say(device.describe(precision) + spread.words)
        return precision, load(args)

    precision, stacks = together(spread, read)
    if args.augment_preview:
        return preview(args, stacks)
    say(stacks.describe())
    lay_out(args, place, stacks, precision)
    course = course_of(args)
    trainee = make_trainee(args, course, stacks.normalisation, precision, spread)
    start = starting_point(args, place, trainee.network, stacks)
    if args.lr_find:
        return find_learning_rate(args, trainee, feed_of(args, stacks), place)
    say(f"schedule: {course.describe(args.window)}")
    record = new_record(args, stacks, precision, trainee.network) | {"init_from": start}
    extra = extra_callbacks(args, place) if spread.chief else []
    with contextlib.ExitStack() as locks:
        before = together(spread, lambda: spread.chief and begin(args, place, stacks, record, defaults, locks))
        done = records.nothing_left(place, before, args) if before else None
        if spread.agree(bool(done)):
            say(f"{place.folder}: {done or 'finished already'}")
            return 0
        with spread.apart():
            copy = None if spread.replicas == 1 else make_trainee(args, course, stacks.normalisation, precision)
        journal = together(spread, lambda: restore(args, place, spread, trainee, copy))
        check_shared(spread, len(journal.rows), place.folder)
        if before:
            record = records.continued(record, before, len(journal.rows))
        feed = feed_of(args, stacks)
        say(f"run record: {place.folder}; weights: {place.weights} (Keras 3 saves weights as .weights.h5)")
        if spread.chief:
            atomic.write_json(place.record, record)  # first of all files: it makes the others this run's
            if feed.weights is not None:
                draw_weights(stacks, feed.weights, place.picture("weights"))
        validation = feed.validation()
        recorder = Recorder(place, record, course, journal, validation=validation, spread=spread, copy=copy)
        recorder.set_model(trainee)  # `fit` does, but not every resumption has an epoch left
        return fit(args, recorder, feed, extra, stacks)


def fit(args, recorder, feed, extra, stacks):
    """The updates and the end; where a signal ends it, the checkpoint of the last epoch stays."""
    spread, journal = recorder.spread, recorder.journal
    try:
        if not journal.stopped:
            first_epoch, replicas = len(journal.rows), spread.replicas
            batches = spread.feed(lambda slices: feed.training(first_epoch, replicas, slices))
            if device.backend() == "jax":  # TensorFlow draws ahead by itself
                batches = ahead(batches, recorder.model.steps_per_execution)
            length = {"initial_epoch": first_epoch, "epochs": args.epochs, "steps_per_epoch": args.steps_per_epoch}
            recorder.model.fit(batches, **length, callbacks=[recorder, *extra], shuffle=False, verbose=0)
        if spread.chief:
            with spread.apart():
                finish(recorder, stacks, args.tta, args.merge, feed.recipe.noise)
    except BaseException as error:
        stop = error if isinstance(error, KeyboardInterrupt) else next(iter(shell.received), None)
        if stop is None:
            raise
        recorder.progress.end()
        done = f"after epoch {recorder.checkpointed} (update {recorder.checkpointed * args.steps_per_epoch}) "
        say(f"{str(stop) or 'interrupted'}: {how_to_go_on(recorder.place, done, args.force)}")
        return getattr(stop, "code", 130)
    spread.agree(0)  # who leaves early takes the others along
    return 0


def together(spread, step):
    """`step()` in every process; where it is refused in one, all end, for they would wait for each other."""
    try:
        found, wrong = step(), None
    except (DataError, OSError) as error:
        wrong = error
    if not spread.any(wrong is not None):
        return found
    raise wrong or DataError("another process of this run was refused, and says why.")


def how_to_go_on(place, done="", force=False):
    way = "--resume in place of --force" if force else "--resume"
    return f"the checkpoint {done}is in {place.folder}; the same command with {way} goes on from there"


@contextlib.contextmanager
def refused():
    """Around checks of what was typed: a leaf's ValueError becomes the DataError that the command line prints."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{error}.".replace("..", ".")) from error


# -- the command line, taken apart ------------------------------------------------------------------------------


def place_of(args):
    """Run folder and weight file, from the flags or from the network's name."""
    network = args.arch if args.arch != "unet2017" else ("dilated" if args.dilate else "standard") + "_unet"
    name = Path(args.weight_path).name if args.weight_path else f"{network}-{args.protocol}-{args.seed}"
    folder = Path(args.run_dir or records.folder_named(name))
    return records.Place(folder, prediction.weight_file(args.weight_path or folder / "best.weights"))


def precision_of(args, place):
    """That of the run that is resumed, unless another is asked for."""
    before = records.read_record(place.record) if args.resume and args.precision == "auto" else None
    return before["precision"] if before else device.choose_precision(args.precision)


def load(args):
    """The stacks, checked and split; with --instances the cells touch no other in the masks."""
    images = data.resolve(args.image_path, "image", log=say)
    masks = data.resolve(args.mask_path or args.image_path, "mask", log=say)
    if masks == images and not args.mask_path:
        raise DataError(f"--mask_path must name the labels, for there are none beside {images}.")
    how = {"invert_mask": args.invert_mask, "instances": args.instances, "ignore": args.ignore_label}
    how["channel"] = args.channel
    images, masks, messages = data.load_pair(images, masks, **how)
    for message in messages:
        say(message)
    side, lost = output_side(args)
    if args.arch == "unet2015":
        with refused():
            field_of(args).check_size("--window", args.window)
    if lost:
        check_output(args, images, side)
    else:
        data.check_window(images, side, field_of(args).multiple)
    reach = max(unet.CENTRE_DILATIONS) * field_of(args).multiple  # a pixel of the centre is that many wide
    if args.arch == "unet2017" and args.dilate and args.window <= reach:
        words = f"the widest dilation looks {reach} px far, which windows of {args.window} px never show"
        say(f"warning: {words}: what it weighs there is not learned, but acts on larger sections")
    cells = masks if args.instances else None
    if cells:
        apart = np.stack([losses.separate(np.maximum(section, 0)) > 0 for section in cells.sections])
        unlabelled = None if args.ignore_label is None else cells.sections < 0
        masks = replace(cells, sections=data.mask_of(apart, unlabelled))
    labelled = [i for i, section in enumerate(masks.sections) if section.max() >= 0]
    split = split_of(args, len(images.sections), labelled)
    if split.held_out and not split.inner and args.inner_sections is None:
        say("fewer than four sections: none chooses the weights, so the last are kept, and --patience is of no use")
    return Stacks(images, masks, cells, split, data.Normalisation.fit(images.sections[list(split.train)]))


def check_output(args, images, side):
    """Refuse a window whose output is larger than a section: an unpadded network's is smaller than the window."""
    field, room = field_of(args), min(images.shape[1:])
    if side > room:
        fits = [size for size in field.valid_sizes(count=room) if size - 2 * field.shrink <= room]
        most = f"at most {fits[-1]}" if fits else "no window fits"
        rule = f"of {side} px, must fit into the sections of {images.source}, so {most}"
        raise DataError(f"--window: its output, {rule}. Received: {args.window}")


def output_side(args):
    """Side of the network's output for an input of --window, and px lost on each side."""
    lost = field_of(args).shrink
    return args.window - 2 * lost, lost


def field_of(args):
    """Receptive field of the network that the flags describe."""
    with refused():
        return unet.field_from_settings(network_settings(args))


def split_of(args, count, labelled=None):
    """The split of so many sections, of which some may be without labels."""
    named = {"val_sections": args.val_sections, "train_sections": args.train_sections}
    named = {name: data.parse_sections(text) for name, text in named.items() if text}
    how = {"fold": args.fold or 0, "folds": args.folds or 5, "gap": args.gap, "inner": args.inner_sections}
    return data.split_sections(count, args.protocol, labelled=labelled, **how, **named)


def feed_of(args, stacks):
    weights = pixel_weights(stacks, args.w0, args.sigma) if args.loss == "weighted" else None
    side, context = output_side(args)
    labels = (stacks.images.sections, stacks.masks.sections, weights)
    sizes = {"side": side, "context": context, "batch_size": args.batch_size, "val_windows": args.val_windows}
    keys = {"seed": args.seed, "steps_per_epoch": args.steps_per_epoch}
    return Feed(*labels, stacks.split, recipe_of(args), **sizes, **keys)


def recipe_of(args):
    names = ("elastic_grid", "elastic_sd_px", "max_rotation_deg", "max_shear_deg", "max_shift_px", "noise")
    overrides = {name: getattr(args, name) for name in names}
    with refused():
        return augment.recipe(args.augment, **overrides, scale=tuple(args.scale) if args.scale else None)


def course_of(args):
    length = (args.epochs, args.steps_per_epoch, args.batch_size, args.patience)
    return Course(*length, args.clr_mode, args.lr, args.max_lr, args.step_size, args.clr_gamma)


def network_settings(args):
    """The arguments of `unet.from_settings` that the weights' record keeps."""
    shared = {"dropout": args.dropout, "classes": args.classes}
    shared |= {} if args.bn_momentum == layers.MOMENTUM else {"bn_momentum": args.bn_momentum}  # records of old lack it
    if args.arch == "unet2015":
        own = {"arch": args.arch, "filters": args.filters[0], "levels": args.depth, "padding": args.padding}
        return own | {"batch_norm": args.batch_norm} | shared
    if args.arch == "resunet":
        return {"arch": args.arch, "filters": list(args.filters)} | shared
    own = {"filters": list(args.filters), "dilate": bool(args.dilate), "dilate_rate": args.dilate_rate}
    return own | {"addition": bool(args.addition)} | shared


def make_trainee(args, course, normalisation, precision, spread=None):
    """The compiled model, on the devices of `spread`."""
    spread = spread or distribution.Alone()
    with spread.scope():
        network = unet.from_settings(network_settings(args), precision=precision, seed=args.seed)
        how = {"recipe": recipe_of(args), "window": args.window, "loss": args.loss, "shrink": output_side(args)[1]}
        how |= {"partly": args.ignore_label is not None, "warmup": args.average_warmup}
        trainee = Trainee(network, normalisation=normalisation, **how)
        options = {"learning_rate": clr_callback.Schedule(course.rate)}
        if args.optimizer in ("sgd", "rmsprop"):
            options["momentum"] = args.momentum
        if args.ema:
            options |= {"use_ema": True, "ema_momentum": args.ema}
        kind = optimizers.OPTIMIZERS[args.optimizer]
        optimizer = (type(args.optimizer, (optimizers.Warm, kind), {}) if args.average_warmup else kind)(**options)
        updates = device.steps_per_execution(args.steps_per_execution, args.steps_per_epoch, spread.replicas)
        trainee.compile(optimizer, steps_per_execution=updates, jit_compile=device.use_xla(spread.replicas))
        trainee.optimizer.build(network.trainable_variables)
        return trainee


def new_record(args, stacks, precision, network):
    now, split, settings = records.sitting(args.argv, precision), stacks.split, network_settings(args)
    pixels = {"image_sha256": stacks.images.sections, "mask_sha256": stacks.masks.sections}
    return {
        "argv": args.argv,
        **now,
        "recipe": args.recipe,
        "settings": {key: value for key, value in sorted(vars(args).items()) if key not in records.FREE_ON_RESUME},
        **{"epochs": args.epochs, "finished": False, "sittings": [now | {"from_epoch": 0}], "seed": args.seed},
        "split": {key: list(getattr(split, key)) for key in SPLIT} | {"protocol": split.protocol},
        "normalisation": stacks.normalisation.to_dict(),
        "intensity": records.intensity(stacks.images.sections[list(split.train)]),
        "data": {
            **{"images": args.image_path, "masks": args.mask_path or args.image_path},
            **{key: data.sha256_pixels(sections) for key, sections in pixels.items()},
            "voxel_nm": stacks.images.voxel_nm,
            **({} if args.ignore_label is None else {"labelled": float(np.mean(stacks.masks.sections >= 0))}),
        },
        "network": settings,
        "parameters": network.count_params(),
        "receptive_field_px": unet.field_from_settings(settings).size,
    }


# -- steps of a run ---------------------------------------------------------------------------------------------


def begin(args, place, stacks, record, defaults, locks):
    """Take the folder and the weights for this process, and make them ready; the record of the run that goes on."""
    network = (prediction.weight_file(args.init_from), prediction.record_file(args.init_from)) if args.init_from else ()
    for path in (place.folder, place.weights, place.last):
        locks.enter_context(atomic.locked(path))
    inputs = (args.image_path, args.mask_path, *network)
    inputs = [path for path in inputs if path and os.path.isfile(atomic.within(path)[0])]
    inputs += [stacks.images.source, stacks.masks.source]  # a folder of sections, where it is one
    how = {"resume": args.resume, "force": args.force, "inputs": inputs}
    return records.prepare(place, record, **how, defaults=defaults)


def resumes(args, place):
    """Whether there is a checkpoint to go on from."""
    return args.resume and place.checkpoint.exists()


def starting_point(args, place, network, stacks):
    """The weights of --init_from, for the record; a run that is resumed has them already."""
    if not args.init_from or (resumes(args, place) and not args.lr_find):
        return None
    return initial.start_from(network, args.init_from, stacks)


def restore(args, place, spread, trainee, copy):
    """What the run remembers: of the checkpoint, if it goes on from one."""
    if not resumes(args, place):
        return records.Journal()
    journal = records.load_checkpoint(place.checkpoint, trainee.state())
    if copy is not None:
        with spread.apart():
            records.load_checkpoint(place.checkpoint, copy.state())
    if len(journal.rows) > args.epochs:
        raise DataError(f"--epochs must be at least the {len(journal.rows)} done. Received: {args.epochs}")
    for path in (place.weights, prediction.record_file(place.weights)) if journal.validated else ():
        if not path.exists():
            raise DataError(f"{path}, of the best weights so far, is gone: --force starts anew.")
    say(f"resumed after epoch {len(journal.rows)}, update {len(journal.rows) * args.steps_per_epoch}")
    return journal


def lay_out(args, place, stacks, precision):
    """--minutes: the epochs and their updates, of the run that is resumed or else from the time of an update."""
    if not args.minutes:
        return
    if resumes(args, place) and (before := records.read_record(place.record)):
        args.epochs, args.steps_per_epoch = before["epochs"], before["settings"]["steps_per_epoch"]
        say(f"--minutes: a run that goes on keeps its {args.epochs} epochs of {args.steps_per_epoch} updates")
        return
    trainee = make_trainee(args, course_of(args), stacks.normalisation, precision)
    updates = initial.updates_in(args.minutes, trainee, feed_of(args, stacks).training(0))
    args.epochs, args.steps_per_epoch = initial.laid_out(updates, args.steps_per_epoch, args.steps_per_execution or 1)


def check_shared(spread, epoch, folder):
    """Every process has read the checkpoint that the chief has read."""
    chiefs = spread.agree(epoch)
    if epoch != chiefs:
        words = f"the first process goes on after epoch {chiefs}, this one sees epoch {epoch}"
        raise DataError(f"{folder} must be a folder that all machines share: {words}.")


def extra_callbacks(args, place):
    if not args.tensorboard:
        return []
    if importlib.util.find_spec("tensorboard") is None:
        raise DataError("--tensorboard needs the package tensorboard, which is not installed.")
    folder = place.folder / "tensorboard"
    atomic.make_writable(folder, folder / "train", folder / "validation")
    return [TensorBoard(folder)]


class TensorBoard(keras.callbacks.TensorBoard):
    """Keras's, with the learning rate of the last update, which the recorder gives, instead of the next one's."""

    def _collect_learning_rate(self, logs):
        return logs


def preview(args, stacks):
    """--augment_preview: what the network will see."""
    atomic.refuse_inputs("--augment_preview", args.augment_preview, stacks.images.source, stacks.masks.source)
    refuse_picture(args, Path(args.augment_preview))
    shown, truth = feed_of(args, stacks).preview(stacks.normalisation)
    figures.preview(shown, truth, args.augment_preview)
    say(f"{args.augment_preview}: {len(shown)} windows as the network will see them (--augment {args.augment})")
    return 0


def refuse_picture(args, path):
    if not args.force:
        atomic.refuse_existing(path)
    atomic.make_writable(path.parent)


def find_learning_rate(args, trainee, feed, place):
    """--lr_find: raise the rate from update to update, draw the loss against it, suggest a range."""
    path = place.picture("lr_find")
    refuse_picture(args, path)
    rates, found = find_rates(trainee, feed.training(0), args.lr_find)
    with refused():
        low, high = clr_callback.suggest_range(rates, found)
    figures.lr_find(rates, found, (low, high), path)
    cyclical = f"--lr {low:.1e} --max_lr {high:.1e}"
    if args.clr_mode == "none":
        cyclical = f"--lr {high:.1e}, or --clr_mode triangular {cyclical}"
    say(f"suggested: {cyclical} (picture: {path})")
    return 0
