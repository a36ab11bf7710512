"""Drawn defects, which measure, and by which fits choose their weights: scratches, cracks, stains and others with
exact masks, put on good photographs.

They are the defects of the synthetic set, and stand in for real ones where there are good images only. No network is
trained on them: a discriminator learns from the defects of `rad.data.pasting`, which are made in another way, so that
these tell what it makes of defects that it has not seen.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .drawing import LIGHT, MIN_SIZE, mix, noise, ramp, relief, rgb, turn

JUST_VISIBLE = 4  # grey levels of 255: a smaller change is lost in the sensor noise

# A painter takes a patch [3, h, w] in [0, 1], coordinates x, y [h, w] in units from the defect's centre, a
# strength in (0, 1], pixels per unit, a generator and the foreground [h, w] (or None), and returns the patch.


def _curve(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance [h, w] to a gently bent stroke through the centre, and its uneven pressure in [0, 1]."""
    (u, v), bend = turn(x, y, rng.uniform(0, np.pi)), rng.uniform(-0.006, 0.006)
    distance = (v - bend * u * u) / np.sqrt(1 + np.square(2 * bend * u))
    knots = np.linspace(-0.5, 0.5, 12) * length
    pressure = rng.uniform(0.45, 1, 12)
    pressure[[0, -1]] = 0
    return distance, np.interp(u, knots, pressure, 0, 0)


def _blob(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, radius: float, rough: float) -> np.ndarray:
    """An irregular round shape [h, w]: 1 at its middle, 0 on its outline, negative outside."""
    u, v = turn(x, y, rng.uniform(0, np.pi))
    v = v / rng.uniform(0.65, 1)
    theta, wobble = np.arctan2(v, u), 0.0
    for k in range(2, 8):
        wobble = wobble + rough / k * rng.normal() * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    return 1 - np.hypot(u, v) / (radius * np.clip(1 + wobble, 0.5, 1.6))


def _scratch(
    patch: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    strength: float,
    unit: float,
    rng: np.random.Generator,
    foreground: np.ndarray | None,
) -> np.ndarray:
    width = max(rng.uniform(0.7, 1.2), 0.6 / unit)
    distance, pressure = _curve(x, y, rng, rng.uniform(45, 110))
    lit = np.exp(-np.square(distance / width))
    shade = np.exp(-np.square((distance - 1.8 * width) / width))
    side = -1 if patch.mean() > 0.7 else 1  # a groove in a bright surface shows as its dark side
    return patch + (side * strength * pressure * (0.55 * lit - 0.28 * shade))


def _crack(
    patch: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    strength: float,
    unit: float,
    rng: np.random.Generator,
    foreground: np.ndarray | None,
) -> np.ndarray:
    k = 4
    h, w = x.shape
    canvas = Image.new("L", (w * k, h * k))
    draw = ImageDraw.Draw(canvas)
    origin = np.array([-x[0, 0], -y[0, 0]]) * unit * k

    def walk(point: np.ndarray, course: float, length: float, width: float) -> None:
        heading = course
        while length > 0:
            heading += rng.normal(0, 0.45)
            step = rng.uniform(2, 6)
            end = point + step * np.array([np.cos(heading), np.sin(heading)])
            ends = [tuple(p * unit * k + origin) for p in (point, end)]
            draw.line(ends, 255, max(1, round(width * min(1, length / 20 + 0.3) * unit * k)))
            if width > 0.8 and rng.random() < 0.12:
                walk(end, heading + rng.choice((-1, 1)) * rng.uniform(0.5, 1), length / 2, 0.6 * width)
            point, heading, length = end, 0.9 * heading + 0.1 * course, length - step

    ahead = rng.uniform(0, 2 * np.pi)
    for course in (ahead, ahead + np.pi):
        walk(np.zeros(2), course, rng.uniform(25, 50), rng.uniform(1.3, 2.2))
    gap = np.asarray(canvas.resize((w, h), Image.Resampling.BOX), np.float32) / 255
    gap = ndimage.gaussian_filter(gap, 0.5)
    edge = np.clip(ndimage.shift(gap, max(unit, 0.7), order=1) - gap, 0, 1)  # the far lip catches the light
    return patch * (1 - strength * 0.85 * gap) + (0.16 * strength * edge)


def _stain(
    patch: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    strength: float,
    unit: float,
    rng: np.random.Generator,
    foreground: np.ndarray | None,
) -> np.ndarray:
    inside = _blob(x, y, rng, rng.uniform(12, 26), 0.2)
    inside = inside + 0.14 * noise(rng, x.shape, 13 * unit) + 0.06 * noise(rng, x.shape, 4.7 * unit)
    film = ramp(inside, 0, 0.3) * (0.75 + 0.12 * noise(rng, x.shape, 6 * unit))
    film = film + 0.4 * np.exp(-np.square((inside - 0.09) / 0.07))  # drying leaves a darker edge
    film = strength * np.clip(film, 0, 1)
    if patch.mean() < 0.2:  # only a pale deposit shows on a dark part
        return mix(patch, rgb(0.62, 0.60, 0.55), 0.6 * film)
    liquids = (0.62, 0.46, 0.26), (0.66, 0.38, 0.22), (0.32, 0.36, 0.50), (0.45, 0.44, 0.42)
    return patch * mix(rgb(1, 1, 1), rgb(*rng.choice(liquids)), film)


def _hole(
    patch: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    strength: float,
    unit: float,
    rng: np.random.Generator,
    foreground: np.ndarray | None,
) -> np.ndarray:
    inside = _blob(x, y, rng, rng.uniform(7, 14), 0.16) + 0.05 * noise(rng, x.shape, 3 * unit)
    depth = ramp(inside, -0.02, 0.18)
    gy, gx = np.gradient(ndimage.gaussian_filter(depth, 1.2 * unit))
    slope = (gx * LIGHT[0] + gy * LIGHT[1]) * unit  # positive on the wall that faces the light
    slope = slope / max(np.abs(slope).max(), 1e-6)
    pit = mix(patch, patch * 0.16 + 0.012, depth * strength**1.4)  # a shallow pit shows by its walls only
    return pit + (strength**0.7 * (0.16 * np.clip(slope, 0, 1) - 0.14 * np.clip(-slope, 0, 1)))


def _contamination(
    patch: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    strength: float,
    unit: float,
    rng: np.random.Generator,
    foreground: np.ndarray | None,
) -> np.ndarray:
    colours = (0.06, 0.06, 0.06), (0.86, 0.84, 0.78), (0.36, 0.24, 0.14), (0.60, 0.62, 0.66), (0.15, 0.28, 0.55)
    here = patch.mean((1, 2), keepdims=True)
    colour = max((rgb(*c) for c in rng.permutation(colours)[:2]), key=lambda c: np.abs(here - c).sum())
    height = np.zeros(x.shape, np.float32)
    if rng.random() < 0.3:  # a fibre
        distance, pressure = _curve(x, y, rng, rng.uniform(30, 60))
        height = np.sqrt(np.clip(1 - np.square(distance / max(1.6, 0.8 / unit)), 0, 1)) * (pressure > 0)
    else:
        for _ in range(rng.integers(1, 5)):
            dx, dy = rng.normal(0, 9, 2)
            chip = _blob(x - dx, y - dy, rng, rng.uniform(3.5, 8.5), 0.25) + 0.08 * noise(rng, x.shape, 3 * unit)
            height = np.maximum(height, np.sqrt(np.clip(chip, 0, 1)) * rng.uniform(0.6, 1))
    height = height * (1 + 0.12 * noise(rng, x.shape, 2.5 * unit))
    cover = ndimage.gaussian_filter(ramp(height, 0.0, 0.35), 0.5)
    diffuse, shine = relief(ndimage.gaussian_filter(height, 0.6 * unit) * 5, unit, 25)
    shadow = ndimage.gaussian_filter(ndimage.shift(cover, 2.2 * unit, order=1), 1.5 * unit)
    ground = patch * (1 - 0.55 * strength * shadow)
    grain = 1 + 0.04 * noise(rng, x.shape, 1.2)
    lit = colour * (0.30 + 0.85 * diffuse * grain) + 0.25 * shine
    return mix(ground, lit, cover * strength)


def _deformation(
    patch: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    strength: float,
    unit: float,
    rng: np.random.Generator,
    foreground: np.ndarray | None,
) -> np.ndarray:
    reach = rng.uniform(18, 30)
    weight = np.square(np.clip(1 - (x * x + y * y) / reach**2, 0, 1))
    direction = rng.uniform(0, 2 * np.pi)
    if foreground is not None:  # push the outline in, or pull it out
        gy, gx = np.gradient(ndimage.gaussian_filter(foreground.astype(np.float32), 4 * unit))
        near = weight > 0.5
        direction = np.arctan2(gy[near].sum(), gx[near].sum()) + (np.pi if rng.random() < 0.3 else 0)
    pull = strength * (0.5 if foreground is not None else 0.62) * reach * weight * unit
    rows, cols = np.indices(x.shape, np.float32)
    at = [rows - pull * np.sin(direction), cols - pull * np.cos(direction)]
    moved = np.stack([ndimage.map_coordinates(c, at, order=3, mode="reflect") for c in patch])
    gy, gx = np.gradient(weight)
    dent = strength * unit * reach * (gx * LIGHT[0] + gy * LIGHT[1])
    moved = moved * (1 + 0.35 * dent) + (0.04 * dent)
    if foreground is None:
        return moved
    # The background stays where it was, except where the object has left it.
    object_moved = ndimage.map_coordinates(foreground.astype(np.float32), at, order=1, mode="nearest")
    return mix(np.where(foreground, moved, patch), moved, object_moved)


_PAINTERS: dict[str, Callable[..., np.ndarray]] = {
    "scratch": _scratch,
    "crack": _crack,
    "stain": _stain,
    "hole": _hole,
    "contamination": _contamination,
    "deformation": _deformation,
}
DEFECTS: tuple[str, ...] = tuple(_PAINTERS)


def _place(
    rng: np.random.Generator, shape: tuple[int, int], kind: str, unit: float, foreground: np.ndarray | None
) -> np.ndarray:
    """Row and column of a defect: well inside the surface, or on the outline of an object to deform."""
    if foreground is None:
        return (np.array(shape) * rng.uniform(0.14, 0.86, 2)).astype(int)
    share = ndimage.uniform_filter(foreground.astype(np.float32), max(3, int(14 * unit)))
    wanted = (share > 0.4) & (share < 0.8) if kind == "deformation" else share > 0.97
    spots = np.flatnonzero(foreground & wanted)
    spots = spots if spots.size else np.flatnonzero(foreground)
    return np.array(np.unravel_index(rng.choice(spots), shape))


def _visible(change: np.ndarray, least: int) -> np.ndarray:
    """Mask [h, w] of a change: its visible pixels with their pinholes closed and lone specks dropped."""
    seen = np.pad(np.abs(change).max(0) >= JUST_VISIBLE, 4)
    seen = ndimage.binary_closing(seen, iterations=2)[4:-4, 4:-4]
    labels, _ = ndimage.label(seen, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= least)[labels]


def add_defect(
    image: np.ndarray, kind: str, severity: float, rng: np.random.Generator, foreground: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Blend one defect into a copy of any RGB photograph.

    Args:
        image: The photograph, uint8 [H, W, 3], at least 32 pixels on each side. A grey one stays grey.
        kind: One of `DEFECTS`.
        severity: 0 (barely visible) to 1 (plain).
        rng: Decides the place and the shape.
        foreground: The object the defect must lie on, bool [H, W]; only a deformation may move its outline.

    Returns:
        The defective image, uint8 [H, W, 3], and its mask, bool [H, W], never empty. Outside the mask the image equals
        the input.

    Raises:
        ValueError: Bad arguments, or no defect can be seen.
    """
    if kind not in _PAINTERS:
        raise ValueError(f"Unknown defect {kind!r}; choose from {', '.join(DEFECTS)}.")
    if not 0 <= severity <= 1:
        raise ValueError(f"Severity must lie between 0 and 1, not {severity}.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < MIN_SIZE:
        got = f"{image.dtype} {image.shape}"
        raise ValueError(f"Expected a uint8 RGB image [H, W, 3] of at least {MIN_SIZE} pixels a side, not {got}.")
    shape = image.shape[:2]
    if foreground is not None:
        if foreground.shape != shape or not foreground.any():
            raise ValueError(f"The foreground must be a mask of shape {shape} that holds at least one pixel.")
        foreground = None if foreground.all() else foreground.astype(bool)
    unit = max(min(shape), 128) / 256  # on a tiny image a defect keeps a width that pixels can show
    least = max(4, int(10 * unit * unit))
    grey = not np.ptp(image, axis=-1).any()
    for _ in range(10):  # a place may hide the defect, for example black on black
        centre = _place(rng, shape, kind, unit, foreground)
        low, high = np.maximum(centre - int(72 * unit), 0), np.minimum(centre + int(72 * unit) + 1, shape)
        window = slice(low[0], high[0]), slice(low[1], high[1])
        y, x = (np.mgrid[window] - centre[:, None, None]).astype(np.float32) / unit
        part = None if foreground is None else foreground[window]
        clean = np.moveaxis(image[window], -1, 0).astype(np.float32)
        # What is barely visible on a smooth surface is lost in a busy one: the least strength follows the texture
        detail = clean.mean(0) - ndimage.gaussian_filter(clean.mean(0), 6 * unit)
        least_strength = np.clip(0.25 + 3.5 * detail.std() / 255, 0, 0.8)
        strength = least_strength + (1 - least_strength) * severity
        change = _PAINTERS[kind](clean / 255, x, y, strength, unit, rng, part) * 255 - clean
        if part is not None and kind != "deformation":
            change *= np.clip(2 * ndimage.gaussian_filter(part.astype(np.float32), 1) - 1, 0, 1)
        if grey:
            change = change.mean(0, keepdims=True).repeat(3, 0)
        for boost in (1.0, 1.5, 2.5, 4.0):
            painted = np.rint(np.clip(clean + boost * change, 0, 255))
            seen = _visible(painted - clean, least)
            if seen.sum() >= 2 * least:
                result, mask = image.copy(), np.zeros(shape, bool)
                result[window][seen] = painted[:, seen].T.astype(np.uint8)
                mask[window] = seen
                return result, mask
    raise ValueError(f"No visible {kind} fits on this image; give a larger foreground.")
