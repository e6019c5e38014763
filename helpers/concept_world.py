"""Concept world: scenes whose class depends on a shape AND a concept, drawn by code, so the truth is known.

    zebra      = horse + stripes        dalmatian = dog + dots         fire engine = truck + red
    horse      = horse + plain          dog       = dog + plain        van         = truck + another colour

Decoys, on request, are horses and dogs with a texture that is not their concept: they tell "stripes" from
"textured". A scene is painted in layers: a 1/f-noise background, the object in its base colour, its coat (the
part that carries the concept), dark details. Coordinates run right and down; a unit is half the width of an
object. Any size shows the same scene: lengths are in 64ths of the frame, the pixels of the default size.
"""

import difflib
import functools
from typing import NamedTuple

import numpy as np

from helpers.images import check_folders

SIZE = 64  # pixels a side by default, and the length that all others are given in
BATCH = 64  # images drawn at once, by one generator: image i does not depend on how many are drawn
CLASSES = (
    "zebra",
    "horse",
    "dalmatian",
    "dog",
    "fire engine",
    "van",
)  # two a shape: with its concept, without
TEXTURES = ("striped", "dotted", "zigzagged")  # the first is the horse's concept, the second the dog's
PLAIN = len(TEXTURES)
HUES = {
    "red": (-0.02, 0.02),
    "blue": (0.61, 0.65),
    "green": (0.32, 0.36),
    "yellow": (0.13, 0.17),
}  # of a circle of 1
CONCEPTS = (*TEXTURES, *HUES, "random")
COLOURED_TEXTURES = tuple(f"{colour} {texture}" for colour in HUES for texture in TEXTURES)

# Shapes, facing right, as joints (x, y, radius) joined by tapering limbs, or as boxes (left, top, right,
# bottom). "coat" carries the concept, "base" is the rest of the body, "detail" is painted last.
SILHOUETTES = {
    "horse": {
        "coat": [[(-0.46, -0.14, 0.25), (0.0, -0.06, 0.22), (0.30, -0.12, 0.24)],
                 [(0.30, -0.18, 0.20), (0.56, -0.64, 0.12)]],
        "base": [[(0.54, -0.70, 0.13), (0.68, -0.62, 0.12), (0.90, -0.40, 0.07)],
                 [(0.50, -0.78, 0.05), (0.52, -0.96, 0.02)],
                 [(-0.56, 0.02, 0.15), (-0.66, 0.42, 0.065), (-0.62, 0.90, 0.055)],
                 [(-0.44, 0.05, 0.13), (-0.40, 0.44, 0.065), (-0.38, 0.90, 0.055)],
                 [(0.26, 0.02, 0.12), (0.22, 0.44, 0.06), (0.22, 0.90, 0.055)],
                 [(0.38, 0.00, 0.11), (0.46, 0.44, 0.06), (0.44, 0.90, 0.055)]],
        "detail": [[(0.46, -0.88, 0.05), (0.28, -0.66, 0.07), (0.12, -0.36, 0.05)],
                   [(-0.68, -0.24, 0.04), (-0.86, 0.00, 0.07), (-0.88, 0.48, 0.05)]],
    },
    "dog": {
        "coat": [[(-0.48, 0.16, 0.21), (0.0, 0.20, 0.20), (0.34, 0.14, 0.24)],
                 [(0.36, 0.06, 0.20), (0.50, -0.18, 0.17)]],
        "base": [[(0.54, -0.28, 0.20), (0.66, -0.22, 0.15), (0.92, -0.15, 0.09)],
                 [(-0.56, 0.24, 0.14), (-0.62, 0.66, 0.075)],
                 [(-0.40, 0.24, 0.13), (-0.38, 0.66, 0.075)],
                 [(0.26, 0.24, 0.12), (0.24, 0.66, 0.075)],
                 [(0.44, 0.20, 0.12), (0.48, 0.66, 0.075)],
                 [(-0.62, 0.10, 0.07), (-0.84, -0.18, 0.055), (-0.86, -0.50, 0.03)]],
        "detail": [[(0.46, -0.40, 0.08), (0.36, -0.22, 0.11), (0.34, -0.02, 0.09)],
                   [(0.97, -0.19, 0.055)]],
    },
    "truck": {
        "coat": [(-0.96, -0.58, 0.36, 0.30), (0.42, -0.24, 0.80, 0.30), (0.42, 0.04, 0.96, 0.30),
                 [(0.72, -0.16, 0.08), (0.88, 0.12, 0.08)]],
        "base": [(-0.90, 0.26, 0.98, 0.42)],
        "detail": [[(-0.66, 0.44, 0.17)], [(-0.26, 0.44, 0.17)], [(0.66, 0.44, 0.17)],
                   (0.54, -0.16, 0.78, 0.06)],
    },
}  # fmt: skip  # a table of shapes: one limb or box a place


class Scenes(NamedTuple):
    """A batch of scenes; row i of every array belongs to scene i."""

    images: np.ndarray  # (n, size, size, 3) uint8
    labels: np.ndarray  # (n,) int64, an index into CLASSES
    object_masks: np.ndarray  # (n, size, size) bool, pixels that the object touches
    concept_masks: np.ndarray  # (n, size, size) bool, pixels whose colour the concept decides


def draw_scenes(n_images, seed=0, labels=None, decoys=0.0, size=SIZE):
    """Draw scenes with their labels and masks.

    The concept mask is the visible coat: torso and neck of an animal, the painted walls of a truck. A class
    without its concept (horse, dog, van) has the same mask: the place where the concept would be. Everything
    but the label is drawn from (seed, i) alone, so scene i under another label is the same scene with another
    shape or concept; of another size it is the same scene again, with finer grain.

    n_images: how many, at least 1.
    seed: a non-negative integer; the same seed gives the same bytes.
    labels: class names or indices, one a scene; by default the classes take turns: 0, 1, ... 5, 0, 1, ...
    decoys: share, 0 to 1, of the horses and dogs that are not plain but wear a texture that is not their
    concept
        (dots or zigzags on a horse, stripes or zigzags on a dog) and stay a horse or dog.
    size: pixels a side, at least 16.
    Returns Scenes. Raises ValueError for a bad count, share or size, an unknown class, or labels of another
    length.
    """
    if not 0 <= decoys <= 1:
        raise ValueError(f"decoys is a share between 0 and 1, not {decoys}")
    _check_count(n_images, size)
    labels = np.arange(n_images) % len(CLASSES) if labels is None else _label_indices(labels, n_images)
    images = np.empty((n_images, size, size, 3), np.uint8)
    object_masks, concept_masks = np.empty((2, n_images, size, size), bool)
    for batch, rng in _batches(n_images, seed, stream=0):
        painted = _paint_scenes(rng, labels[batch], decoys, size)
        images[batch], object_masks[batch], concept_masks[batch] = painted
    return Scenes(images, labels, object_masks, concept_masks)


def draw_counterfactual_pairs(n_pairs, seed=0, size=SIZE):
    """Draw pairs of scenes in which only the concept is exchanged: zebra and horse, dalmatian and dog, and so
    on.

    Returns two Scenes of n_pairs, with the concept and without it; their pixels differ inside the concept
    mask alone. Scene i of the first is a zebra, a dalmatian or a fire engine, in turn.
    Raises ValueError for a bad count or size.
    """
    _check_count(n_pairs, size)
    with_concept = np.arange(n_pairs) % len(SILHOUETTES) * 2
    return tuple(draw_scenes(n_pairs, seed, with_concept + without, size=size) for without in (0, 1))


def draw_concept_images(concept, n_images, seed=0, size=SIZE):
    """Draw full-frame images of one concept, with the textures and colours that the scenes use.

    concept: one of CONCEPTS ("striped", ..., "red", ..., "random") or of COLOURED_TEXTURES ("red striped",
    ...).
        "random" is a patch of background with a blob of any texture or none, for random-against-random CAVs.
    n_images: how many, at least 1.
    size: pixels a side, at least 16.
    Returns (n_images, size, size, 3) uint8. Raises ValueError for an unknown concept, a bad count or size.
    """
    _check_count(n_images, size)
    concepts = (*CONCEPTS, *COLOURED_TEXTURES)
    *colour, kind = _known(concept, concepts, "concept").split()
    images = np.empty((n_images, size, size, 3), np.uint8)
    for batch, rng in _batches(n_images, seed, stream=1 + concepts.index(concept)):
        images[batch] = _to_bytes(_paint_concept(rng, size, kind, *colour))[: batch.stop - batch.start]
    return images


def check_names(parameter, names, folder="", what="concept"):
    """Raise ValueError, with the way out, unless the folder has images of all names, or all can be drawn.

    parameter: the one that gives the names, for the error.
    what: "concept" or "class".
    """
    place = {"concept": "concepts_dir", "class": "targets_dir"}[what]
    if folder:
        check_folders(folder, names, parameter, place)
        return
    for name in names:
        try:
            _known(name, CLASSES if what == "class" else (*CONCEPTS, *COLOURED_TEXTURES), what)
        except ValueError as error:
            raise ValueError(f"{parameter}: {error}; for images of your own give {place}") from None


# Painting. Functions that take a generator draw for a whole batch, however many images of it are wanted.


def _paint_scenes(rng, labels, decoys, size):
    """Images (k, size, size, 3) uint8, object masks and concept masks (k, size, size) for the first k scenes
    of a batch.
    """
    k = len(labels)
    shapes, has_concept = labels // 2, labels % 2 == 0
    body, coat, detail = _place_silhouettes(size, shapes, *_draw_pose(rng)[:, :k])

    foreign = (shapes + rng.integers(1, 3, BATCH)[:k]) % 3
    kinds = np.where(has_concept, shapes, np.where(rng.random(BATCH)[:k] < decoys, foreign, PLAIN))
    texture = _draw_textures(rng, np.where(shapes == 2, PLAIN, kinds), size)
    ground, figure = (colour[:k] for colour in _draw_contrast(rng))
    red, other = _draw_vivid(rng, *HUES["red"])[:k], _draw_vivid(rng, 0.12, 0.88)[:k]
    dark = _hsv(rng.random(BATCH), rng.uniform(0, 0.5, BATCH), rng.uniform(0, 0.12, BATCH))[:k]

    shapes, has_concept = shapes[:, None, None, None], has_concept[:, None, None, None]
    paint = _blend(np.where(shapes == 2, np.where(has_concept, red, other), ground), figure, texture)
    figures = _blend(_blend(ground, paint, coat), dark, detail)
    images = _to_bytes(_blend(_draw_background(rng, size)[:k], figures, body))
    return images, body > 0, (body > 0) & (coat > 0) & (detail < 1)


def _paint_concept(rng, size, kind, colour=None):
    """Full-frame images (batch, 3, size, size) in [0, 1] of a colour, or of a texture on a colour if one is
    named.
    """
    if kind in HUES:
        return np.broadcast_to(_draw_vivid(rng, *HUES[kind]), (BATCH, 3, size, size))
    ground, figure = _draw_contrast(rng)
    if kind == "random":
        patch = _blend(ground, figure, _draw_textures(rng, rng.integers(0, PLAIN + 1, BATCH), size))
        blob = np.clip(6 * (_noise(rng, size) + rng.uniform(-1, 1, (BATCH, 1, 1))), 0, 1)
        return _blend(_draw_background(rng, size), patch, blob)
    if colour is not None:
        ground = _draw_vivid(rng, *HUES[colour])
    return _blend(ground, figure, _draw_textures(rng, np.full(BATCH, TEXTURES.index(kind)), size))


def _draw_textures(rng, kinds, size):
    """How far each pixel belongs to the figure of a texture, given as k indices into TEXTURES: (k, size,
    size) in [0, 1].

    Period (5 to 9 64ths of the frame), angle and phase are drawn an image. PLAIN is 0 everywhere.
    """
    period, angle = (
        rng.uniform((5, 0), (9, np.pi), (BATCH, 2)).astype(np.float32)[: len(kinds)].T[..., None, None]
    )
    phase = rng.random((BATCH, 2), np.float32)[: len(kinds)].T[..., None, None]
    y, x = _pixel_centres(size)
    u = (np.cos(angle) * x + np.sin(angle) * y) / period + phase[0]
    v = (np.cos(angle) * y - np.sin(angle) * x) / period + phase[1]
    textures = np.zeros_like(u)
    for kind, depth in enumerate((_stripes, _dots, _zigzags)):
        rows = kinds == kind
        textures[rows] = np.clip(0.5 + size / SIZE * period[rows] * depth(u[rows], v[rows]), 0, 1)
    return textures


# Depth of the point (u, v) inside the figure, negative outside; everything in periods.


def _stripes(u, v):
    return np.abs(u % 1 - 0.5) - 0.25


def _zigzags(u, v):
    return _stripes(u + np.abs(v % 2 - 1), v)


def _dots(u, v):
    u = u + 0.5 * (np.floor(v) % 2)
    return 0.32 - np.hypot(u % 1 - 0.5, v % 1 - 0.5)


def _draw_background(rng, size):
    """1/f noise between two dull colours of middling brightness: (batch, 3, size, size) in [0, 1]."""
    near, far = (
        _hsv(rng.random(BATCH), rng.uniform(0, 0.5, BATCH), rng.uniform(0.35, 0.75, BATCH)) for _ in range(2)
    )
    return _blend(near, far, np.clip(0.5 + 0.25 * _noise(rng, size), 0, 1))


def _noise(rng, size):
    """Noise of unit variance whose amplitude falls with frequency as f to the -1 to -1.6: (batch, size,
    size).

    Waves that the default size can show are drawn first, the same ones for every size; those that only a
    finer grid shows come from a generator of their own, so that `rng` goes on alike.
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)).astype(np.float32)
    frequency[0, 0] = np.inf  # no constant part
    exponent = rng.uniform(1.0, 1.6, (BATCH, 1, 1)).astype(np.float32)
    white = _white(rng, SIZE)
    if size != SIZE:
        coarse, white = white, _white(rng.spawn(1)[0], size)
        half = min(size, SIZE) // 2
        for rows in (slice(half), slice(1 - half, None)):
            white[:, rows, :half] = coarse[:, rows, :half]
    field = np.fft.irfft2(white * np.exp(-exponent * np.log(frequency)), (size, size))
    return field / field.std(axis=(1, 2), keepdims=True)


def _white(rng, size):
    """A batch of spectra of white noise, as `irfft2` reads them: (batch, size, size // 2 + 1) complex."""
    return rng.standard_normal((BATCH, size, size // 2 + 1, 2), np.float32).view(np.complex64)[..., 0]


def _pixel_centres(size):
    """Where the pixels of a frame lie, down and right, in 64ths of the frame: (2, size, size)."""
    return ((np.mgrid[:size, :size] + 0.5) * (SIZE / size) - 0.5).astype(np.float32)


def _draw_pose(rng):
    """Unit, angle, shear, stretch, facing (+1 or -1), centre x and y, lengths in 64ths: (7, batch, 1, 1)."""
    unit = rng.uniform(22, 29, BATCH)
    angle, shear = rng.uniform(-0.2, 0.2, BATCH), rng.uniform(-0.12, 0.12, BATCH)
    stretch, facing = rng.uniform(0.92, 1.08, BATCH), rng.choice([-1, 1], BATCH)
    centre = SIZE / 2 - 0.5 + rng.uniform(-1, 1, (2, BATCH)) * (SIZE / 2 - unit)
    return np.stack([unit, angle, shear, stretch, facing, *centre]).astype(np.float32)[..., None, None]


def _place_silhouettes(size, shapes, unit, angle, shear, stretch, facing, centre_x, centre_y):
    """Cover (0 to 1) of every pixel by body, coat and detail of each posed silhouette: three arrays (k,
    size, size).
    """
    y, x = _pixel_centres(size)
    x, y = (x - centre_x) / unit, (y - centre_y) / unit
    down = (np.cos(angle) * y - np.sin(angle) * x) * stretch
    right = (np.cos(angle) * x + np.sin(angle) * y) * facing / stretch + shear * down
    tables = _distance_tables()
    half = tables.shape[1] // 2
    row, column = (
        np.clip(half + half / 1.5 * axis, 0, 2 * half - 1).astype(np.int32) for axis in (down, right)
    )
    pixels = tables[shapes[:, None, None], row, column] * (size / SIZE * unit)[..., None]
    body, coat, detail = np.moveaxis(pixels, -1, 0)
    return np.clip(0.5 - body, 0, 1), np.clip(1 - coat, 0, 1), np.clip(1 - detail, 0, 1)


@functools.cache
def _distance_tables(resolution=384):
    """Signed distance (units, negative inside) to each shape's body, coat and detail on [-1.5, 1.5]^2: (3, r,
    r, 3).
    """
    y, x = (np.mgrid[:resolution, :resolution] + 0.5) / resolution * 3 - 1.5
    tables = []
    for parts in SILHOUETTES.values():
        coat, base, detail = (
            np.min([_distance(part, x, y) for part in layer], axis=0) for layer in parts.values()
        )
        tables.append(np.stack([np.minimum(np.minimum(coat, base), detail), coat, detail], axis=-1))
    return np.stack(tables).astype(np.float32)


def _distance(part, x, y):
    """Signed distance of the points (x, y) to a box or a chain of tapering limbs."""
    if isinstance(part, tuple):
        left, top, right, bottom = part
        return np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom))
    nearest = np.inf
    for (x0, y0, r0), (x1, y1, r1) in zip(part, part[1:] or part, strict=False):
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        t = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / max(length, 1e-9), 0, 1)
        nearest = np.minimum(
            nearest, np.hypot(x - x0 - t * (x1 - x0), y - y0 - t * (y1 - y0)) - r0 - t * (r1 - r0)
        )
    return nearest


# Colours: (batch, 3, 1, 1) in [0, 1].


def _draw_contrast(rng):
    """Two colours of any hue, one bright and one dark, in either order."""
    bright = _hsv(rng.random(BATCH), rng.uniform(0, 0.6, BATCH), rng.uniform(0.85, 1, BATCH))
    dark = _hsv(rng.random(BATCH), rng.uniform(0, 0.9, BATCH), rng.uniform(0.03, 0.25, BATCH))
    swap = rng.random((BATCH, 1, 1, 1)) < 0.5
    return np.where(swap, dark, bright), np.where(swap, bright, dark)


def _draw_vivid(rng, low, high):
    """Saturated paint with a hue between low and high."""
    return _hsv(rng.uniform(low, high, BATCH), rng.uniform(0.75, 1, BATCH), rng.uniform(0.65, 1, BATCH))


def _hsv(hue, saturation, value):
    """Colours from hue, saturation and value."""
    sector = (np.array([5, 3, 1]) + 6 * hue[:, None]) % 6
    rgb = value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(sector, 4 - sector), 0, 1))
    return rgb.astype(np.float32)[:, :, None, None]


def _blend(under, over, cover):
    """Lay a colour or image over another where cover (batch, size, size) is 1."""
    return under + (over - under) * cover[:, None]


# Input and output.


def _batches(n_images, seed, stream):
    """(slice, generator) for each batch of images."""
    for batch, start in enumerate(range(0, n_images, BATCH)):
        yield slice(start, min(start + BATCH, n_images)), np.random.default_rng([seed, stream, batch])


def _to_bytes(images):
    return (images * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)


def _check_count(count, size):
    if count < 1:
        raise ValueError(f"at least one image must be drawn, not {count}")
    if size < 16:
        raise ValueError(f"a scene needs at least 16 pixels a side, not {size}")


def _label_indices(labels, n_images):
    """Class indices (n_images,) of class names or indices."""
    indices = range(len(CLASSES))
    labels = [
        label if label in indices else CLASSES.index(_known(label, CLASSES, "class")) for label in labels
    ]
    if len(labels) != n_images:
        raise ValueError(f"{len(labels)} labels were given for {n_images} images")
    return np.array(labels, np.int64)


def _known(name, names, what):
    """The name itself, or a ValueError that names the nearest and all known ones."""
    if name in names:
        return name
    nearest = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise ValueError(f"unknown {what} {name!r}{hint}; known are: {', '.join(names)}")
