"""A painted stack that looks like serial-section electron microscopy of neuropil, with membranes as labels.

The cells are a power diagram whose sites wander, grow and shrink from section to section; a smooth random
displacement, changing as slowly, curves their borders. Organelles live in the cells and are NOT labelled: a
network has to tell the outline of a mitochondrion or a vesicle from a membrane. Gray values are 0..255.
"""

from types import SimpleNamespace

import numpy as np

INTERIOR = 0.78  # of the pixels, as in ISBI-2012
REACH = 64  # px that sites lie beyond the borders of a section


def paint(sections, size, seed):
    """Paint a stack of so many sections of a size (H, W): gray and interior (1 inside cells, 0 on membranes).

    Both are uint8 arrays of shape (S, H, W).
    """
    rng = np.random.default_rng((seed, sections, *size))
    scene = _scene(rng, sections, size)
    # the membranes' width, by the fraction of interior wanted, within what looks like a membrane
    some = sorted({0, sections // 3, 2 * sections // 3, sections - 1})
    reach = [_cells(scene, z, 0).reach for z in some]
    half_width = float(np.clip(np.quantile(reach, 1 - INTERIOR), 1.5, 6.0))
    gray, interior = np.empty((2, sections, *size), np.uint8)
    for z in range(sections):
        cells = _cells(scene, z, half_width)
        interior[z] = cells.depth > 0
        grains = [(20, 5.0), (7, 9.0), (4.0, 16.0), (2.2, 22.0)]
        texture = sum(gray * _grain(rng, size, spacing) for spacing, gray in grains)
        tissue = 150 + scene.tone[cells.owner] + texture
        _add_vesicles(rng, tissue, scene, cells)
        _add_mitochondria(rng, tissue, scene, cells, z)
        _add_membranes(tissue, scene, cells, z)
        gray[z] = _expose(rng, tissue, scene, z)
    return gray, interior


def _spline(n, spacing):
    """Return the (n, knots) matrix of a uniform cubic B-spline; unit knots give unit variance."""
    position = np.arange(n) / spacing
    knot = position.astype(int)
    u = position - knot
    weights = np.stack([(1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, 1 + 3 * u + 3 * u**2 - 3 * u**3, u**3], 1) / 6
    matrix = np.zeros((n, knot[-1] + 4))
    np.put_along_axis(matrix, knot[:, None] + np.arange(4), weights, axis=1)
    return matrix / np.sqrt(151 / 315)  # the mean of the sum of squared weights


class _Field:
    """A smooth random field of unit variance; `field(z)` has shape (H, W). Spacings of its knots in px."""

    def __init__(self, rng, shape, spacing):
        self.z, self.y, self.x = (_spline(n, step) for n, step in zip(shape, spacing, strict=True))
        self.knots = rng.standard_normal((self.z.shape[1], self.y.shape[1], self.x.shape[1]))

    def __call__(self, z):
        return self.y @ np.tensordot(self.z[z], self.knots, 1) @ self.x.T


def _grain(rng, size, spacing):
    """Return a field of one section alone, of unit variance."""
    return _Field(rng, (1, *size), (1, spacing, spacing))(0)


def _scene(rng, sections, size):
    """What the sections share; S sections, n cells. The order is that of the random numbers."""
    shape = (sections, *size)
    sites, radii = _scatter(rng, size)
    count, slow, drift = len(sites), _spline(sections, 7), _spline(sections, 3)
    wander = np.tensordot(slow, rng.standard_normal((slow.shape[1], count, 2)), 1)
    growth = np.tensordot(slow, rng.standard_normal((slow.shape[1], count)), 1)
    warp = [(24, 95, 9), (6, 30, 5), (1.3, 10, 2)]
    return SimpleNamespace(
        size=size,
        sites=sites + 7 * wander,  # (S, n, 2): row and column of every cell's site in every section
        radii=radii * np.clip(1 + 0.3 * growth, 0.2, 1.6),  # (S, n), px
        # (amplitude in px, field of rows, field of columns)
        warp=[(px, *(_Field(rng, shape, (z, knots, knots)) for _ in range(2))) for px, knots, z in warp],
        thickness=_Field(rng, shape, (3, 45, 45)),
        faintness=_Field(rng, shape, (3, 35, 35)),
        synapses=_Field(rng, shape, (3, 22, 22)),
        shade=_Field(rng, shape, (6, 200, 200)),
        brightness=np.tensordot(drift, rng.standard_normal((drift.shape[1], 2)), 1),  # (S, 2): offset, contrast
        tone=rng.normal(0, 9, count),  # (n,): gray value of a cell
        crowd=rng.lognormal(-0.6, 0.9, count),  # (n,): how full of vesicles
        mitochondria=_mitochondria(rng, radii, sections),
    )


def _scatter(rng, size):
    """Throw darts: sites at distances that vary smoothly, so that thick and thin cells mix."""
    height, width = (n + 2 * REACH for n in size)
    radius = 27 * np.exp(np.clip(0.6 * _grain(rng, (height, width), 75), -0.6, 1.0))
    darts = rng.integers(0, (height, width), (height * width // 60, 2))
    sites, radii = np.empty((0, 2)), np.empty(0)
    for dart in darts:
        near = radius[tuple(dart)] * rng.uniform(0.8, 1.25)
        if not len(sites) or (((sites - dart) ** 2).sum(1) > (0.5 * (near + radii)) ** 2 * 2).all():
            sites, radii = np.vstack([sites, dart]), np.append(radii, near)
    return sites - REACH, radii


def _cells(scene, z, half_width):
    """Cut the cells of a section: a power diagram, as the nearest sites in one dimension more (Aurenhammer 1987)."""
    from scipy.spatial import cKDTree

    place = np.stack(np.mgrid[: scene.size[0], : scene.size[1]], -1).astype(float)
    for px, *fields in scene.warp:
        place += px * np.stack([field(z) for field in fields], -1)
    weight = (0.8 * scene.radii[z]) ** 2
    lifted = np.column_stack([scene.sites[z], np.sqrt(weight.max() - weight)])
    near = min(4, len(lifted))
    power, index = cKDTree(lifted).query(np.dstack([place, np.zeros(scene.size)]), k=list(range(1, near + 1)))
    sites = scene.sites[z][index]
    apart = np.linalg.norm(sites[..., 1:, :] - sites[..., :1, :], axis=-1)
    border = (power[..., 1:] ** 2 - power[..., :1] ** 2) / (2 * np.maximum(apart, 1.0))
    distance = border.min(-1, initial=1e3)
    broad = np.clip(scene.thickness(z) - 1.1, 0, None)  # here the membrane is cut at a slant
    width = np.exp(0.15 * scene.thickness(z)) + 0.8 * broad
    return SimpleNamespace(
        owner=index[..., 0],
        place=place,  # (H, W, 2), warped row and column
        reach=distance / width,  # half the width of the membrane that would come so far
        depth=distance - half_width * width,  # px from the membrane's edge, negative inside the membrane
        width=half_width * width,  # half the membrane's, px
    )


def _mitochondria(rng, radii, sections):
    """Scatter ellipsoids in the thicker cells, in coordinates of their cell."""
    cell = np.repeat(np.arange(len(radii)), rng.poisson(np.clip((radii - 15) / 17, 0, 2.2)))
    reach = radii[cell]
    angle = rng.uniform(0, 2 * np.pi, len(cell))
    away = reach * rng.uniform(0.1, 0.75, len(cell))
    return {
        "cell": cell,
        "offset": np.stack([away * np.sin(angle), away * np.cos(angle)], 1),
        "axes": np.clip(np.stack([0.55 * reach, 0.33 * reach], 1) * rng.uniform(0.7, 1.3, (len(cell), 2)), 7, 38),
        "turn": rng.uniform(0, np.pi, len(cell)),
        "middle": rng.uniform(-4, sections + 4, len(cell)),
        "half_length": rng.uniform(3, 10, len(cell)),
    }


def _add_mitochondria(rng, tissue, scene, cells, z):
    from scipy.ndimage import find_objects

    boxes = find_objects(cells.owner + 1, max_label=len(scene.tone))
    wiggle = _grain(rng, scene.size, 9)
    many = scene.mitochondria
    share = 1 - ((z - many["middle"]) / many["half_length"]) ** 2
    for i in np.flatnonzero(share > 0.05):
        cell = many["cell"][i]
        box = boxes[cell]
        if box is None:
            continue
        row, column = np.moveaxis(cells.place[box] - scene.sites[z, cell] - many["offset"][i], -1, 0)
        sin, cos, axes = np.sin(many["turn"][i]), np.cos(many["turn"][i]), many["axes"][i] * np.sqrt(share[i])
        along, across = cos * row + sin * column, cos * column - sin * row
        inside = (1 - np.hypot(along / axes[0], across / axes[1])) * axes.min()
        here = (inside > 0) & (cells.owner[box] == cell) & (cells.depth[box] > 1.5)
        cristae = 20 * np.sin(along * 0.85 + 1.6 * wiggle[box])
        matrix = 0.35 * (tissue[box] - 150) + 96 + cristae - 50 * np.exp(-(((inside - 1.4) / 1.3) ** 2))
        tissue[box] = np.where(here, matrix, tissue[box])


def _add_vesicles(rng, tissue, scene, cells):
    """Stamp small rings, and some dense cores, where there is room: many in some cells, few in others."""
    height, width = scene.size
    count = rng.poisson(height * width / 260)
    rows, columns = rng.integers(0, height, count), rng.integers(0, width, count)
    radius = np.where(rng.random(count) < 0.06, rng.uniform(6, 10, count), rng.uniform(2.6, 4.8, count))
    likely = np.minimum(scene.crowd[cells.owner[rows, columns]], 1.5) / 1.5
    room = (cells.depth[rows, columns] > radius + 1) & (rng.random(count) < likely)
    for row, column, r in zip(rows[room], columns[room], radius[room], strict=True):
        reach = int(r + 4)
        top, left = max(row - reach, 0), max(column - reach, 0)
        patch = tissue[top : row + reach + 1, left : column + reach + 1]
        y, x = np.ogrid[top : top + patch.shape[0], left : left + patch.shape[1]]
        away = np.hypot((y - row) * rng.uniform(0.8, 1.2), x - column)
        core = rng.uniform(-35, 30) if r < 5 else 8
        patch += rng.uniform(0.6, 1.4) * (core * (away < r - 0.8) - 55 * np.exp(-(((away - r) / 1.1) ** 2)))


def _add_membranes(tissue, scene, cells, z):
    """Darken the membranes: sharp where they are cut across, gray and broad at a slant, black at synapses."""
    slant = np.clip(cells.width / np.median(cells.width) - 1, 0, 1)
    faint = np.clip(1 - 0.17 * np.abs(scene.faintness(z)) - 0.3 * slant, 0.4, 1)
    edge = 1 / (1 + np.exp(np.clip((cells.depth + 0.6) / 0.7, -30, 30)))
    tissue += edge * faint * (42 + 0.25 * (tissue - 150) - tissue)
    dense = 1 / (1 + np.exp(-6 * (scene.synapses(z) - 1.8)))
    tissue -= 60 * dense * np.exp(-np.maximum(cells.depth, 0) / 5)
    np.maximum(tissue, 30, out=tissue)


def _expose(rng, tissue, scene, z):
    """Blur, shade and count electrons: noise grows with the root of the brightness."""
    from scipy.ndimage import gaussian_filter

    offset, contrast = scene.brightness[z]
    light = 1.15 * (1 + 0.06 * contrast) * (gaussian_filter(tissue, 0.75) - 133)
    light += 126 + 7 * offset + 7 * scene.shade(z)
    noise = rng.standard_normal(scene.size) * np.sqrt(np.clip(light, 10, None) / 140)
    return np.clip(np.rint(light + 11 * noise), 0, 255).astype(np.uint8)
