"""Which windows a run is fed with: a batch is a function of (seed, epoch, index)."""

import math
from dataclasses import dataclass, replace

import numpy as np

import augment
import data
from files.ahead import ahead
from network import losses
from score import segments

VALIDATION = 2**30  # added to the epoch that keys the windows of validation, so that they are not those of training
MOST_WINDOWS = 64  # of a validation on inner sections


@dataclass(frozen=True, eq=False)
class Stacks:
    """What a run has read: images, masks, the numbers of cells with --instances, and their use.

    In masks and numbers of cells, below 0 = not labelled.
    """

    images: data.Stack
    masks: data.Stack
    cells: data.Stack | None
    split: data.Split
    normalisation: data.Normalisation

    def describe(self):
        count, height, width = self.images.sections.shape
        return f"data: {self.images.source}, {count} sections of {height} x {width} px\nsplit: {self.split.describe()}"


@dataclass(frozen=True, eq=False)
class Feed:
    """Windows of `side` px, `context` px around them, of images and labels of shape (S, H, W).

    `weights` are those of the pixels (float32), for the weighted loss; else None.
    """

    images: np.ndarray
    masks: np.ndarray
    weights: np.ndarray | None
    split: data.Split
    recipe: augment.Recipe
    seed: int
    side: int
    context: int
    batch_size: int
    steps_per_epoch: int
    val_windows: int

    def source(self, role):
        """Images, masks and weights that windows are cut from, and the sections they may come from.

        `published` is the protocol of 2017: each of the two montages holds all sections, shuffled, 6 x 5 to train and
        5 x 6 to validate, and windows run across the seams.
        """
        stacks = (self.images, self.masks, self.weights)
        if self.split.protocol != "published":
            return *stacks, self.split.train if role == "train" else self.split.inner
        sections = list(self.split.train)
        rows, columns = montage_shape(len(sections))
        if role != "train":
            rows, columns = columns, rows
        order = np.random.default_rng((self.seed, 2017, role == "train")).permutation(len(sections))
        return *(s if s is None else data.montage(s[sections], rows, columns, order)[None] for s in stacks), (0,)

    def training(self, first_epoch, cuts=1, slices=range(1)):
        """Batches without end, from `first_epoch` on; batch b of epoch e holds the crops b * B ... of e.

        Each is cut into `cuts` equal ones, of which those in `slices` come, in turn.
        """
        source = self.source("train")
        epoch, size = first_epoch, self.batch_size // cuts
        while True:
            for step in range(self.steps_per_epoch):
                for cut in slices:
                    first = step * self.batch_size + cut * size
                    yield (self.crops(source, self.recipe, epoch, range(first, first + size)),)
            epoch += 1

    def crops(self, source, recipe, epoch, indices):
        images, masks, weights, sections = source
        keys = {"seed": self.seed, "epoch": epoch, "indices": indices, "sections": sections}
        size = {"window": self.side, "context": self.context}
        return augment.batch(images, masks, recipe, **keys, **size, weights=weights)

    def validation(self):
        """A function from an epoch's number to the batches that are validated after it; None without any.

        `published`: windows at random places of the montage, others after every epoch, as in 2017. Otherwise the same
        grid over the inner sections after every epoch.
        """
        if self.split.protocol == "published":
            source, none = self.source("validate"), augment.RECIPES["none"]
            groups = grouped(range(self.val_windows), self.batch_size)
            return lambda epoch: ahead((self.crops(source, none, VALIDATION + epoch, group) for group in groups), 2)
        places = grid(self.images.shape[1:], self.side, self.split.inner)
        places = [(s, i, j) for s, i, j in places if augment.labelled(self.masks[s], (i, j), self.side)]
        if len(places) > MOST_WINDOWS:  # any of them: every nth may be one column of windows
            chosen = np.random.default_rng(0).permutation(len(places))[:MOST_WINDOWS]
            places = [places[i] for i in sorted(chosen)]
        batches = [self.windows_at(group) for group in grouped(places, self.batch_size)]
        return (lambda epoch: batches) if batches else None

    def windows_at(self, places):
        """Plain windows in the form of `augment.batch`, for the recipe "none"."""
        none, shape = augment.RECIPES["none"], self.images.shape[1:]
        plain = augment.draw(none, seed=0, epoch=0, index=0, sections=(0,), shape=shape, window=self.side)
        draws = [replace(plain, section=section, origin=(row, column)) for section, row, column in places]
        return augment.collate(self.images, self.masks, draws, none, self.context, self.weights)

    def preview(self, normalisation, n=12):
        """The first `n` windows as the network will see them, and their masks."""
        images, masks, _, sections = self.source("train")
        how = {"seed": self.seed, "n": n, "window": self.side, "context": self.context, "sections": sections}
        how |= {"mean": normalisation.mean, "std": normalisation.std}
        return augment.preview_batch(images, masks, self.recipe, **how)


def grouped(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def montage_shape(count):
    """Rows and columns, rows >= columns, as near to a square as the count allows: 30 -> 6 x 5."""
    columns = next(c for c in range(math.isqrt(count), 0, -1) if count % c == 0)
    return count // columns, columns


def grid(shape, window, sections):
    """Windows that cover each section: (section, row, column) of their first pixel."""
    starts = [
        [round(i * (size - window) / max(1, n - 1)) for i in range(n)]
        for size in shape
        for n in [math.ceil(size / window)]
    ]
    return [(s, row, column) for s in sections for row in starts[0] for column in starts[1]]


def pixel_weights(stacks, w0, sigma):
    """Weight of every pixel for the weighted loss, float32 of shape (S, H, W).

    The class weights are those of the training sections; held-out sections get none, for nothing trains or chooses on
    them. Pixels without a label have 0, and count as background where a border is looked for.
    """
    masks, cells, split = stacks.masks.sections, stacks.cells, stacks.split
    train = masks[list(split.train)]
    balance = losses.class_weights(np.count_nonzero(train > 0), np.count_nonzero(train >= 0))
    found = np.zeros(masks.shape, np.float32)
    for i in {*split.train, *split.inner}:
        labels = losses.separate(np.maximum(cells.sections[i], 0)) if cells else segments.components(masks[i] > 0)
        found[i] = losses.border_weights(labels, w0=w0, sigma=sigma, balance=balance) * (masks[i] >= 0)
    return found
