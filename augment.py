"""Augmentation: numbers drawn in numpy, one resampling of image and mask on the device.

    made = recipe("all", elastic_sd_px=8)
    arrays = batch(images, masks, made, seed=1, epoch=0, indices=range(3), window=512, sections=range(24))
    image, mask = warp(arrays, made, window=512, mean=127.0, std=42.0)

An element of a batch is a function of (seed, epoch, index) and nothing else. `draw` makes the numbers, `cut` the
source window, `warp` all that touches each pixel: compiled, 2 to 3 ms of one core per 512 x 512 pair.

Geometry is ONE map from a pixel u of the window to the source window, in rows and columns about the centre:
source = A u - shift + B G B^T, A = Rotation Shear Turn Flip / scale, with G a coarse grid of Gaussian displacements
and B bicubic weights (U-Net, arXiv 1505.04597, section 3.1).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from keras import ops
from keras.backend import standardize_dtype

from files.sections import reflect
from network.hashing import random_words

CLIP_SD = 3.0  # grid displacements are clipped here, so that no pixel can leave the source window


@dataclass(frozen=True)
class Recipe:
    """Ranges that `draw` draws from; the defaults change nothing but the crop."""

    flips: bool = False  # mirror rows and columns with probability 1/2 each
    quarter_turns: bool = False  # turn by 0, 90, 180 or 270 degrees
    max_rotation_deg: float = 0.0  # angle uniform in +- this; 180 is any angle
    scale: tuple[float, float] = (1.0, 1.0)  # magnification, log-uniform between these; above 1 enlarges
    max_shear_deg: float = 0.0  # of the columns, uniform in +- this
    max_shift_px: float = 0.0  # of the content in rows and in columns, uniform in +- this
    elastic_grid: int = 3  # nodes per side of the displacement grid, corner to corner of the window
    elastic_sd_px: float = 0.0  # standard deviation of the nodes' displacements; 0 is none
    brightness: float = 0.0  # offset, uniform in +- this, in standard deviations of the raw data
    contrast: float = 0.0  # factor, log-uniform in 1 / (1 + this) .. 1 + this
    gamma: float = 0.0  # exponent, likewise
    shade: float = 0.0  # from border to border the gray values change by twice this, along rows and along columns
    blur: float = 0.0  # standard deviation of a Gaussian blur, px, uniform in 0 .. this
    noise: float = 0.0  # standard deviation of the pixels' noise, uniform in 0 .. this, in those of the raw data

    def __post_init__(self):
        object.__setattr__(self, "scale", tuple(self.scale))  # hashable, also where a list was given
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be two numbers, smallest and largest. Received: {self.scale}")

    @property
    def resamples(self):
        """Whether a source coordinate can fall between pixels."""
        moves = (self.max_rotation_deg, self.max_shear_deg, self.max_shift_px, self.elastic_sd_px)
        return any(moves) or self.scale != (1, 1)


_TURNS = {"flips": True, "quarter_turns": True}  # sections of EM stacks have no preferred orientation
_AFFINE = {"max_rotation_deg": 180.0, "scale": (0.8, 1.25), "max_shear_deg": 5.0, "max_shift_px": 16.0}
_ELASTIC = {"elastic_grid": 3, "elastic_sd_px": 10.0}  # the setting of the U-Net paper
_GRAY = {"brightness": 0.25, "contrast": 0.25, "gamma": 0.25, "noise": 0.1}
_BROAD = {"brightness": 0.5, "contrast": 0.4, "gamma": 0.5, "shade": 0.5, "blur": 1.5, "noise": 0.5}
RECIPES = {
    "none": Recipe(),
    "affine": Recipe(**_TURNS, **_AFFINE),
    "elastic": Recipe(**_TURNS, **_ELASTIC),
    "all": Recipe(**_TURNS, **_AFFINE, **_ELASTIC, **_GRAY),
    "broad": Recipe(**_TURNS, **_AFFINE, **_ELASTIC, **_BROAD),
}


def recipe(name, **overrides):
    """One of `RECIPES`, with the fields of `Recipe` that are given and not None in place of its own.

    >>> recipe("elastic", elastic_grid=5, elastic_sd_px=None).elastic_sd_px
    10.0
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if name == "none" and given:
        raise ValueError(f"augment none takes no {', '.join(given)}: choose affine, elastic, all or broad")
    made = replace(RECIPES[name], **given)
    if "elastic_grid" in given and not made.elastic_sd_px:
        raise ValueError(f"elastic_grid needs elastic_sd_px above 0. Received: {given['elastic_grid']} and 0")
    return made


@dataclass(frozen=True)
class Draw:
    """All the numbers of one element of a batch.

    `section` and `origin` (row, column) place the crop; `affine` is the (2, 3) map of centred pixels, `grid` the
    (2, g, g) displacements in px (rows, then columns); `gray` holds contrast, brightness, gamma, the standard
    deviations of noise and blur, and the shade along rows and columns, all float32; `key` keys the noise.
    """

    section: int
    origin: tuple[int, int]
    window: int
    affine: np.ndarray
    grid: np.ndarray
    gray: np.ndarray
    key: int


def _generator(seed, *key):
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def draw(recipe, *, seed, epoch, index, sections, shape, window):
    """Draw the numbers of crop `index` of `epoch` from these sections of a `shape`, rows and columns.

    The same random numbers are consumed whatever the recipe is, so two recipes see the same crops, and a stronger
    setting of one change leaves the others as they were; another `elastic_grid` alone draws other blur and shade.
    Sections are dealt like cards: in an epoch, each `len(sections)` crops in a row visit all of them once.
    """
    random = _generator(seed, epoch, index, 0)
    origin = tuple(int(random.integers(side - window + 1)) for side in shape)
    turns, rows_flipped, columns_flipped = random.integers([4, 2, 2])
    signed = random.uniform(-1, 1, size=8)
    noise, key = random.random(), int(random.integers(-(2**31), 2**31))
    grid = np.clip(random.standard_normal((2, recipe.elastic_grid, recipe.elastic_grid)), -CLIP_SD, CLIP_SD)
    blur, *shade = random.uniform([0, -1, -1], 1)
    low, high = np.log(recipe.scale)
    matrix = affine(
        rotation_deg=signed[0] * recipe.max_rotation_deg,
        scale=np.exp((low + high) / 2 + signed[1] * (high - low) / 2),
        shear_deg=signed[2] * recipe.max_shear_deg,
        shift_px=signed[3:5] * recipe.max_shift_px,
        quarter_turns=int(turns) * recipe.quarter_turns,
        flip=(rows_flipped and recipe.flips, columns_flipped and recipe.flips),
    )
    contrast, gamma = (1 + recipe.contrast) ** signed[5], (1 + recipe.gamma) ** signed[6]
    changes = (contrast, signed[7] * recipe.brightness, gamma, noise * recipe.noise, blur * recipe.blur)
    gray = np.array([*changes, *np.multiply(shade, recipe.shade)], np.float32)
    deal, place = divmod(index, len(sections))
    section = int(sections[_generator(seed, epoch, deal, 1).permutation(len(sections))[place]])
    return Draw(section, origin, window, matrix, np.float32(recipe.elastic_sd_px * grid), gray, key)


def affine(*, rotation_deg=0.0, scale=1.0, shear_deg=0.0, shift_px=(0.0, 0.0), quarter_turns=0, flip=(False, False)):
    """Map of centred output pixels (row, column) to centred source pixels, float32 of shape (2, 3).

    The content is moved by `shift_px` (rows, columns), rotated anticlockwise by `rotation_deg` as seen on a
    screen, sheared, turned anticlockwise by `quarter_turns`, flipped along rows and columns, magnified by `scale`.

    >>> affine(quarter_turns=1).tolist()
    [[0.0, 1.0, -0.0], [-1.0, 0.0, -0.0]]
    """
    cos, sin = np.cos(np.deg2rad(rotation_deg)), np.sin(np.deg2rad(rotation_deg))
    rotation = np.array([[cos, sin], [-sin, cos]])
    shear = np.array([[1, 0], [np.tan(np.deg2rad(shear_deg)), 1]])
    turn = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), quarter_turns % 4)
    mirror = np.diag([-1 if axis else 1 for axis in flip])
    matrix = rotation @ shear @ turn @ mirror / scale
    return np.column_stack([matrix, -np.asarray(shift_px, float)]).astype(np.float32)


@lru_cache(maxsize=16)
def bicubic(window, nodes):
    """Weights B, float32 (window, nodes): `B @ G @ B.T` interpolates a grid G whose corners are the window's.

    Cubic convolution with a = -1/2 (Keys 1981, doi:10.1109/TASSP.1981.1163711), edge nodes repeated outwards.
    """
    place = np.linspace(0, nodes - 1, window)
    first = np.minimum(place.astype(int), nodes - 2)
    weights = np.zeros((window, nodes))
    for step in (-1, 0, 1, 2):
        t = np.abs(place - first - step)
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        node = np.clip(first + step, 0, nodes - 1)
        weights[np.arange(window), node] += np.where(t <= 1, near, far)
    return weights.astype(np.float32)


@lru_cache(maxsize=64)
def margin(recipe, window):
    """Pixels of context that `recipe` may need on each side of the window, whatever is drawn; 0 without resampling."""
    if not recipe.resamples:
        return 0
    shear = 1 + np.tan(np.deg2rad(recipe.max_shear_deg))
    # the angle at which the bound on the larger row sum of |A| is largest
    angle = min(np.deg2rad(recipe.max_rotation_deg), np.arctan(1 / shear))
    stretch = (shear * np.cos(angle) + np.sin(angle)) / recipe.scale[0]
    overshoot = np.abs(bicubic(window, recipe.elastic_grid)).sum(axis=1).max() ** 2
    moved = recipe.max_shift_px + CLIP_SD * recipe.elastic_sd_px * overshoot
    # one more for the right-hand neighbour of linear sampling and for float32 rounding
    return max(int(np.ceil((stretch - 1) * (window - 1) / 2 + moved)) + 1, 1)


def cut(stack, draw, margin):
    """The source window of `draw` from a stack (S, H, W), in the stack's own dtype.

    Beyond the section's border it goes on mirrored, as numpy.pad(mode="reflect") does, any number of times.
    """
    section = stack[draw.section]
    rows, columns = (
        reflect(origin - margin, origin + draw.window + margin, size)
        for origin, size in zip(draw.origin, section.shape, strict=True)
    )
    top = rows.min()
    return section[top : rows.max() + 1].take(columns, axis=1).take(rows - top, axis=0)  # each row made once


def batch(images, masks, recipe, *, seed, epoch, indices, window, sections, context=0, weights=None):
    """Numbers and source windows of the crops `indices` of `epoch`, for `warp`.

    Parameters
    ----------
    images, masks : ndarray of shape (S, H, W)
        Raw gray values (uint8, uint16, float32) and labels, each in its own dtype; labels below 0 mean "not labelled".
    window, context : int
        Side of the crop, which lies within the section, and px around it, mirrored beyond the section's border, that
        an unpadded network loses: `warp` is to be given the window `window + 2 * context`.
    weights : ndarray of shape (S, H, W), optional
        Of the pixels, for a weighted loss; they come as "weights", and `warp` returns them too.

    Returns
    -------
    dict of ndarray
        "image", "mask" (B, n, n) with n = w + 2 * margin(recipe, w), w = window + 2 * context; "affine" (B, 2, 3),
        "grid" (B, 2, g, g) and "gray" (B, 7) in float32; "key" (B,) in int32.
    """
    kwargs = {"seed": seed, "epoch": epoch, "sections": sections, "shape": images.shape[1:], "window": window}
    draws = [onto_labels(draw(recipe, index=int(index), **kwargs), masks) for index in indices]
    return collate(images, masks, draws, recipe, context, weights)


def onto_labels(draw, masks):
    """The draw itself, or where its window holds no label (all below 0), another place around a pixel that has one."""
    mask, window = masks[draw.section], draw.window
    if labelled(mask, draw.origin, window):
        return draw
    pixels = np.argwhere(mask >= 0)
    origin = np.clip(pixels[draw.key % len(pixels)] - window // 2, 0, np.subtract(mask.shape, window))
    return replace(draw, origin=tuple(origin.tolist()))


def labelled(mask, origin, window):
    """Whether a window of a mask holds a label, 0 or more."""
    rows, columns = (slice(start, start + window) for start in origin)
    return mask[rows, columns].max() >= 0


def collate(images, masks, draws, recipe, context=0, weights=None):
    """The same as `batch`, from draws already made."""
    reach = context + margin(recipe, draws[0].window + 2 * context)
    stacks = {"image": images, "mask": masks} | ({} if weights is None else {"weights": weights})
    made = {name: np.stack([cut(stack, one, reach) for one in draws]) for name, stack in stacks.items()}
    made |= {name: np.stack([getattr(one, name) for one in draws]) for name in ("affine", "grid", "gray")}
    return made | {"key": np.array([one.key for one in draws], np.int32)}


def warp(batch, recipe, *, window, mean, std):
    """Resample, normalise and change the gray values of a batch: the part that runs compiled on the device.

    Parameters
    ----------
    batch : dict
        What `batch` returned, as arrays or tensors.
    mean, std : float
        Of the raw gray values; the image becomes (raw - mean) / (std + 1e-10) before its gray values change.

    Returns
    -------
    image : float32 tensor of shape (B, window, window, 1)
        Sampled linearly.
    mask : float32 tensor of shape (B, window, window)
        Values of the source's mask, exactly: the nearest ones.
    weights : float32 tensor of shape (B, window, window)
        Only where the batch holds "weights".
    """
    rows, columns = _coordinates(batch, recipe, window)
    width = window + 2 * margin(recipe, window)
    first = ops.arange(ops.shape(rows)[0], dtype="int32")[:, None, None] * width**2  # pixel of each source
    nearest = _flat_index(rows + 0.5, columns + 0.5, width, first)
    labels = [_pick(batch[name], nearest) for name in ("mask", "weights") if name in batch]
    image = _linear(batch["image"], rows, columns, width, first) if recipe.resamples else _pick(batch["image"], nearest)
    image = _change_gray((image - mean) / (std + 1e-10), batch["gray"], recipe)
    if recipe.blur:
        image = _blur(image, batch["gray"][:, 4], recipe.blur)
    if recipe.noise:
        image = image + batch["gray"][:, 3, None, None] * _noise(batch["key"], window)
    return image[..., None], *labels


def _coordinates(batch, recipe, window):
    """Rows and columns in the source window, each (B, window, window)."""
    pixel = ops.arange(window, dtype="float32") - (window - 1) / 2
    matrix = ops.convert_to_tensor(batch["affine"])[..., None, None]
    if standardize_dtype(matrix.dtype) != "float32":
        raise ValueError(f"affine must be float32: a layer's autocast coarsens it. Received: {matrix.dtype}")
    centre = (window - 1) / 2 + margin(recipe, window)
    along_rows = matrix[:, :, 0] * pixel[:, None] + (matrix[:, :, 2] + centre)
    source = along_rows + matrix[:, :, 1] * pixel
    if recipe.elastic_sd_px:
        # sums, no matrix product: its rounding depends on the batch's size, and on a GPU it keeps 10 bits (TF32)
        weights = ops.convert_to_tensor(bicubic(window, recipe.elastic_grid))
        rows_done = ops.sum(weights[:, :, None] * batch["grid"][:, :, None], axis=-2)
        for node in range(recipe.elastic_grid):
            source = source + rows_done[..., node, None] * weights[:, node]
    return source[:, 0], source[:, 1]


def _flat_index(rows, columns, width, first):
    return ops.cast(rows, "int32") * width + ops.cast(columns, "int32") + first


def _pick(source, index):
    return ops.cast(ops.take(ops.reshape(source, (-1,)), index, axis=0), "float32")


def _linear(source, rows, columns, width, first):
    index = _flat_index(rows, columns, width, first)
    down, right = rows - ops.floor(rows), columns - ops.floor(columns)
    upper, lower = _pick(source, index), _pick(source, index + width)
    upper = upper + right * (_pick(source, index + 1) - upper)
    lower = lower + right * (_pick(source, index + (width + 1)) - lower)
    return upper + down * (lower - upper)


def _change_gray(image, gray, recipe):
    """Contrast about the mean, brightness, gamma, then shade, on standardised gray values z.

    Gamma's black lies 3 standard deviations below the mean, and its curve keeps the level and the slope at the mean,
    so that it leaves brightness and contrast alone. With x = z / 3 that is ((1 + x) ** gamma - 1) / gamma, here as its
    Pade approximant x (1 + (1 + gamma) x / 6) / (1 + (2 - gamma) x / 3): exact for gamma 1 and 2, and without the
    logarithms and exponentials that would double the warp's time.
    """
    contrast, brightness, gamma, _, _, down, right = (gray[:, column, None, None] for column in range(7))
    if recipe.contrast or recipe.brightness:
        image = image * contrast + brightness
    if recipe.gamma:
        x = ops.maximum(image / 3, -1.0)
        image = x * (3 + (1 + gamma) / 2 * x) / (1 + (2 - gamma) / 3 * x)
    if recipe.shade:
        rows, columns = (ops.linspace(-1.0, 1.0, size, dtype="float32") for size in image.shape[1:])
        image = image + down * rows[:, None] + right * columns
    return image


def _blur(image, sd, most):
    """Gaussian blur of each image (B, h, w) by its own standard deviation, px, `most` at most; mirrored outside."""
    reach = min(int(np.ceil(3 * most)), min(image.shape[1:]) - 1)
    away = ops.arange(-reach, reach + 1, dtype="float32")
    weights = ops.exp(-(away**2) / (2 * ops.maximum(sd[:, None], 0.01) ** 2))  # 0.01 px: the image as it is
    weights = weights / ops.sum(weights, axis=1, keepdims=True)
    for axis in (1, 2):
        sides = [(reach, reach) if one == axis else (0, 0) for one in range(3)]
        padded, size = ops.pad(image, sides, mode="reflect"), image.shape[axis]
        places = [(slice(None),) * axis + (slice(i, i + size),) for i in range(2 * reach + 1)]
        image = sum(weights[:, i, None, None] * padded[place] for i, place in enumerate(places))
    return image


def _noise(key, window):
    """Noise of mean 0 and variance 1, close to Gaussian: sums of the four bytes of one random word per pixel."""
    words = random_words(window * window, (0, key[:, None]))
    bits = ops.reshape(ops.cast(words, "int32"), (-1, window, window))
    pairs = ops.bitwise_and(bits, 0x00FF00FF) + ops.bitwise_and(ops.right_shift(bits, 8), 0x00FF00FF)
    total = ops.right_shift(pairs * 0x10001, 16)  # the upper half word sums both half words
    return (ops.cast(total, "float32") - 510) * (1 / np.sqrt(4 * (256**2 - 1) / 12))


def preview_batch(images, masks, recipe, *, seed, n, window, mean, std, sections, context=0):
    """What a network would see of the first `n` crops, and their masks, arrays of shape (n, w, w).

    w = window + 2 * context, the sides that are warped in training. The images are uint8; black and white lie 3
    standard deviations below and above the raw data's mean.
    """
    which = {"seed": seed, "epoch": 0, "indices": range(n), "sections": sections}
    arrays = batch(images, masks, recipe, **which, window=window, context=context)
    tensors = {name: ops.convert_to_tensor(array) for name, array in arrays.items()}
    image, mask = warp(tensors, recipe, window=window + 2 * context, mean=mean, std=std)
    shown = np.clip(ops.convert_to_numpy(image)[..., 0] * 42.5 + 127.5, 0, 255)
    return shown.astype(np.uint8), ops.convert_to_numpy(mask).astype(masks.dtype)
