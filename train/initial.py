"""Where a training starts from: the weights of another network (`--init_from`), and the time that it may take."""

import time

import keras

from data import DataError, format_sections, sha256_pixels
from files import atomic
from files.shell import say
from predict import prediction

TIMED = 4  # updates that are timed for --minutes, after two that compile
SHARE = 0.9  # of the minutes for the updates; the rest is for checkpoints and the scores at the end
FEWEST_EPOCHS = 5  # of a course that is laid out for a time


def start_from(network, path, stacks=None):
    """Give a network the weights of another one of its kind, batch norm's statistics included.

    What does not fit because the network has another number of classes or channels keeps its random start, and is
    named. The gray values are normalised by the new training sections' own mean and deviation, not by those of the
    other network: it saw gray values of mean 0 and deviation 1, and sees them again. Warns where that one was trained
    on sections of `stacks` that are held out now. Returns which weights those are, and these sections, for the record;
    a DataError says with which flags a network of another kind was built.
    """
    try:
        source, record = prediction.load_network(path)
    except DataError as error:
        raise DataError(str(error).replace("--weight_path", "--init_from", 1)) from error
    ours, theirs = ({layer.name: layer for layer in net.layers if layer.weights} for net in (network, source))
    shapes = {name: [w.shape for w in theirs[name].weights] if name in theirs else None for name in ours}
    other = [name for name, layer in ours.items() if [w.shape for w in layer.weights] != shapes[name]]
    wiring = [_sums_and_crops(net) for net in (network, source)]
    alike = set(ours) == set(theirs) and _dilations(ours) == _dilations(theirs) and wiring[0] == wiring[1]
    if not alike or set(other) - {"down1_conv1", "head_conv"}:
        raise DataError(f"--init_from: {path} holds another network: {_flags(record['network'])}.")
    for name in ours.keys() - set(other):
        for ours_is, theirs_is in zip(ours[name].weights, theirs[name].weights, strict=True):
            ours_is.assign(keras.ops.convert_to_numpy(theirs_is))
    say(f"starts from {prediction.weight_file(path)}" + f", but for {', '.join(other)}" * bool(other))
    trained_on, seen = prediction.sections_seen(record), seen_before(record, stacks) if stacks else []
    if seen:
        which = format_sections(seen)
        say(f"warning: {path} was trained on sections {which}, which are held out here: their scores mean nothing")
    digest = atomic.sha256(prediction.weight_file(path))
    earlier = {"trained_on": trained_on, "held_out_seen": seen}
    return {"weights": str(path), "sha256": digest} | {key: value for key, value in earlier.items() if value}


def seen_before(record, stacks):
    """Held-out sections that the network of a record was trained on, as far as the record says it."""
    seen = prediction.sections_seen(record)
    return sorted({*seen.get(sha256_pixels(stacks.images.sections), ())} & {*stacks.split.held_out}) if seen else []


def _dilations(layers):
    return {name: getattr(layer, "dilation_rate", None) for name, layer in layers.items()}


def _sums_and_crops(network):
    return {layer.name for layer in network.layers if isinstance(layer, (keras.layers.Add, keras.layers.Cropping2D))}


def _flags(settings):
    """Settings of a network as they are typed, but for those that the new one may have otherwise."""
    words = []
    for key, value in ({"arch": "unet2017"} | settings).items():
        if isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        if key == "batch_norm":
            words += ["--batch_norm"] * value
        elif key not in ("dropout", "classes"):
            words.append(f"--{'depth' if key == 'levels' else key} {int(value) if isinstance(value, bool) else value}")
    return " ".join(words)


def updates_in(minutes, trainee, batches):
    """Updates of a training of so many minutes; the first are made and timed, on a trainee that is then given up."""
    for timed in range(-2, TIMED):
        if timed == 0:
            begin = time.monotonic()
        trainee.train_on_batch(next(batches)[0])
    seconds = (time.monotonic() - begin) / TIMED
    updates = max(1, int(SHARE * 60 * minutes / seconds))
    say(f"--minutes {minutes:g}: an update takes {seconds:.2f} s, so there are {updates} of them")
    return updates


def laid_out(updates, steps_per_epoch, per_call=1):
    """Epochs, and updates of each, for a number of updates, of which `per_call` are made at once.

    >>> laid_out(730, 100), laid_out(60, 100), laid_out(60, 100, 5), laid_out(60, 100, 20)
    ((7, 100), (5, 12), (6, 10), (3, 20))
    """
    steps = min(steps_per_epoch, max(1, updates // FEWEST_EPOCHS))
    steps = max(per_call, steps // per_call * per_call)
    return max(1, updates // steps), steps
