"""A small, deterministic stand-in for an industrial inspection data set.

Five textures and three objects are rendered as if photographed on a production line, and six kinds of
defect are blended into them with exact masks. Files follow the MVTec AD layout::

    <root>/<category>/train/good/000.png
    <root>/<category>/test/good/000.png
    <root>/<category>/test/<defect>/000.png
    <root>/<category>/ground_truth/<defect>/000_mask.png

Lengths in this module are in units of 1/256 of the image side, so that a part looks the same at any size.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from skimage import data
from tqdm.auto import tqdm

TEXTURES: tuple[str, ...] = ("brick", "grass", "gravel", "brushed_metal", "woven_fabric")
OBJECTS: tuple[str, ...] = ("hex_nut", "capsule", "connector")
CATEGORIES: tuple[str, ...] = TEXTURES + OBJECTS
DEFECTS: tuple[str, ...] = ("scratch", "crack", "stain", "hole", "contamination", "deformation")

MIN_SIZE = 32
JUST_VISIBLE = 4  # grey levels of 255: a smaller change is lost in the sensor noise
SUPERSAMPLING = 2
LIGHT = np.array([-0.45, -0.6, 0.66], np.float32)  # from the upper left, towards the camera
LIGHT /= np.linalg.norm(LIGHT)
HALFWAY = (LIGHT + (0, 0, 1)).astype(np.float32)  # a surface facing halfway between light and camera shines
HALFWAY /= np.linalg.norm(HALFWAY)


# ------------------------------------------------------------------------------------------- building blocks


def _noise(rng: np.random.Generator, shape: tuple[int, int], scale: float | tuple[float, float]) -> np.ndarray:
    """Smooth noise [H, W] of about unit variance whose features are `scale` (or `(y, x)`) pixels wide."""
    sy, sx = np.broadcast_to(np.maximum(scale, 1.0), 2)
    h, w = shape[0] / sy, shape[1] / sx
    coarse = rng.standard_normal((int(h) + 4, int(w) + 4), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC, (1, 1, 1 + w, 1 + h)))


def _rgb(red: float, green: float, blue: float) -> np.ndarray:
    """A colour [3, 1, 1]; inside this module images are planar, [3, H, W] in [0, 1]."""
    return np.array((red, green, blue), np.float32).reshape(3, 1, 1)


def _ramp(t: np.ndarray, low: float, high: float) -> np.ndarray:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((t - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _mix(base: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Paint `colour` over `base` (each a colour or an image [3, H, W]) with opacity `alpha` [H, W]."""
    return base + (colour - base) * alpha


def _relief(height: np.ndarray, unit: float, gloss: float) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse and specular light [H, W] on a height map lit from the upper left; `unit` is pixels per unit."""
    gy, gx = np.gradient(height * unit)
    norm = 1 / np.sqrt(gx * gx + gy * gy + 1)
    diffuse = np.clip((LIGHT[2] - gx * LIGHT[0] - gy * LIGHT[1]) * norm, 0, 1)
    shine = np.clip((HALFWAY[2] - gx * HALFWAY[0] - gy * HALFWAY[1]) * norm, 0, 1) ** gloss
    return diffuse, shine


def _turn(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x, y along axes turned by `angle` radians."""
    return math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x


def _stage(rng: np.random.Generator, size: int, shift: float, degrees: float, base: float = 0.0):
    """Coordinates x, y [N, N] of a supersampled image whose origin is the slightly moved part."""
    n = size * SUPERSAMPLING
    t = ((np.arange(n) + 0.5) * (256 / n) - 128).astype(np.float32)
    dx, dy = rng.uniform(-shift, shift, 2).tolist()
    return _turn(t[None, :] - dx, t[:, None] - dy, math.radians(base + rng.uniform(-degrees, degrees)))


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float, corner: float = 0.0) -> np.ndarray:
    """Signed distance [N, N] to a rounded rectangle around the origin, negative inside."""
    x, y = np.abs(x) - half_width + corner, np.abs(y) - half_height + corner
    outside = np.sqrt(np.square(np.maximum(x, 0)) + np.square(np.maximum(y, 0)))
    return outside + np.minimum(np.maximum(x, y), 0) - corner


def _cover(distance: np.ndarray, soft: float = 0.5) -> np.ndarray:
    """Opacity of a shape from its signed distance, with an edge `2 * soft` wide."""
    return np.clip(0.5 - distance / (2 * soft), 0, 1)


def _shadow(distance: np.ndarray, reach: float, depth: float) -> np.ndarray:
    """Brightness factor of the shadow around a shape standing on the background."""
    return 1 - depth * np.exp(-np.square(np.maximum(distance + 2, 0) / reach))


def _camera(rng: np.random.Generator, scene: np.ndarray, size: int) -> np.ndarray:
    """Photograph a scene [3, k*size, k*size] to uint8 [size, size, 3]: uneven light, vignette, blur, noise."""
    k = scene.shape[-1] // size
    photo = sum(scene[:, i::k, j::k] for i in range(k) for j in range(k)) * np.float32(1 / k**2)
    t = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = t[None, :], t[:, None]
    tilt_x, tilt_y = rng.normal(-0.05, 0.03, 2).tolist()
    balance = _rgb(*rng.normal(1, 0.012, 3)) * rng.normal(1, 0.03)
    photo *= balance * (1 + tilt_x * x + tilt_y * y - 0.07 * (x * x + y * y))
    photo = ndimage.gaussian_filter(photo, (0, 0.55, 0.55))
    grain = rng.standard_normal((3, size, size), np.float32) + rng.standard_normal((size, size), np.float32)
    photo += grain * (0.004 + 0.007 * np.sqrt(np.clip(photo, 0, 1)))
    return np.rint(np.clip(photo, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


# ------------------------------------------------------------------------------------------------- materials
# A material takes a generator and an image size, and returns a scene [3, k*size, k*size] with its foreground
# [k*size, k*size], or None where all of it is the surface.


@cache
def _photograph(name: str) -> np.ndarray:
    """A bundled grey photograph [512, 512] in [0, 1], stretched to its full range."""
    grey = getattr(data, name)().astype(np.float32)
    low, high = np.percentile(grey, (0.5, 99.5))
    return np.clip((grey - low) / (high - low), 0, 1)


_TONES = {  # the photographs are grey: colours from dark to light
    "brick": ((0.16, 0.10, 0.09), (0.52, 0.29, 0.22), (0.74, 0.53, 0.43), (0.92, 0.86, 0.80)),
    "grass": ((0.05, 0.08, 0.03), (0.22, 0.33, 0.11), (0.46, 0.55, 0.25), (0.85, 0.88, 0.62)),
    "gravel": ((0.08, 0.08, 0.09), (0.38, 0.36, 0.35), (0.62, 0.59, 0.55), (0.90, 0.87, 0.82)),
}


def _photo_crop(name: str, rng: np.random.Generator, size: int) -> tuple[np.ndarray, None]:
    """A random, slightly turned and tinted crop [3, size, size] of a bundled photograph."""
    source = _photograph(name)
    step = 256 / size * rng.uniform(0.92, 1.08)
    a = np.deg2rad(rng.uniform(-4, 4))
    turn = step * np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    room = np.abs(turn) @ np.full(2, size / 2) + 1
    centre = rng.uniform(room, np.array(source.shape) - room)
    grey = ndimage.affine_transform(source, turn, centre - turn @ np.full(2, (size - 1) / 2), (size, size), order=1)
    grey = np.clip(grey, 0, 1) ** rng.uniform(0.92, 1.1)
    stops = np.linspace(0, 1, 4)
    channels = zip(*_TONES[name], strict=True)
    return np.stack([np.interp(grey, stops, channel) for channel in channels]).astype(np.float32), None


def _brushed_metal(rng, size):
    unit = size / 256
    x = np.linspace(-1, 1, size, dtype=np.float32)[None, :]
    grain = sum(
        weight * _noise(rng, (size, size), (across * unit, along * unit))
        for weight, across, along in ((0.020, 1, 14), (0.026, 1, 70), (0.020, 2.5, 220), (0.012, 9, 300))
    )
    # Brushing spreads the reflection of a lamp into a band across the strokes.
    sheen = 0.16 * np.exp(-np.square((x - rng.normal(-0.25, 0.08)) / 0.55))
    sheen = sheen + 0.02 * _noise(rng, (size, size), (300 * unit, 60 * unit))
    return (0.50 + sheen + grain) * _rgb(0.985, 1.0, 1.02), None


def _woven_fabric(rng, size):
    x, y = _stage(rng, size, 8, 2.5)
    n = x.shape[0]
    unit = n / 256
    x = x + 0.9 * _noise(rng, (n, n), 45 * unit)
    y = y + 0.9 * _noise(rng, (n, n), 45 * unit)
    pitch = 7.0
    i, j = np.floor(x / pitch).astype(int) + 64, np.floor(y / pitch).astype(int) + 64
    u, v = x / pitch % 1 - 0.5, y / pitch % 1 - 0.5
    over = (i + j) % 2 == 0  # plain weave: threads pass over and under in turn
    across, along = np.where(over, u, v), np.where(over, v, u)
    tone = 0.035 * rng.standard_normal((2, 128), np.float32)
    thread = np.where(over, tone[0][i % 128], tone[1][j % 128])
    fibre = np.where(over, _noise(rng, (n, n), (5 * unit, 1)), _noise(rng, (n, n), (1, 5 * unit)))
    height = np.sqrt(np.clip(1.02 - 4 * across**2, 0, 1)) * (1 - 1.5 * along**2)
    lit = 0.30 + 0.62 * height - 0.10 * across + thread + 0.045 * fibre + 0.03 * _noise(rng, (n, n), 60 * unit)
    colours = np.where(over, _rgb(0.50, 0.58, 0.68), _rgb(0.60, 0.65, 0.70))
    return lit * colours, None


def _hexagon(x: np.ndarray, y: np.ndarray, flat: float) -> np.ndarray:
    """Distance [N, N] to a hexagon whose flats are `flat` from its centre, negative inside."""
    x, y = np.abs(x), np.abs(y)
    return np.maximum(0.8660254 * x + 0.5 * y, y) - flat


def _hex_nut(rng, size):
    x, y = _stage(rng, size, 4, 5)
    n, unit = x.shape[0], x.shape[0] / 256
    flat, bore = 76.0, 43.0
    rho, theta = np.hypot(x, y), np.arctan2(y, x)
    outer = _hexagon(x, y, flat)
    ring = np.maximum(outer, bore - rho)
    # A turned chamfer cuts the corners of the hexagon; a second one opens the thread.
    height = -0.55 * np.maximum(rho - flat + 3, 0) - 0.9 * np.maximum(bore + 6 - rho, 0) - np.maximum(outer + 2, 0)
    diffuse, shine = _relief(ndimage.gaussian_filter(height, unit), unit, 24)
    turned = _noise(rng, (1, 512), 1.5)[0][np.clip(rho * 4, 0, 511).astype(int)]
    lamp = rng.normal(-2.2, 0.05)
    fan = np.abs(np.cos(theta - lamp)) ** 5 * _ramp(flat + 2 - rho, 0, 4)  # lathe marks reflect a lamp in two fans
    steel = 0.16 + 0.34 * diffuse + 0.55 * shine + 0.24 * fan + 0.018 * turned
    steel = steel + 0.014 * _noise(rng, (n, n), 2 * unit) + 0.02 * _noise(rng, (n, n), 40 * unit)
    wall = 0.05 + 0.16 * _ramp(rho, bore - 9, bore) * (0.5 + 0.5 * np.cos(theta - lamp + np.pi))
    wall = wall * (1 + 0.6 * np.sin((rho + 0.9 * theta / np.pi) * 2.1)) * _ramp(rho, bore - 10, bore - 6)
    mat = 0.175 + 0.014 * _noise(rng, (n, n), 1.6 * unit) + 0.008 * _noise(rng, (n, n), 31 * unit)
    mat = mat * _rgb(0.90, 1.0, 1.12)
    scene = mat * (_shadow(_hexagon(x - 5, y - 6, flat), 12, 0.6) * _shadow(outer, 4, 0.35))
    scene = _mix(scene, _rgb(0.03, 0.033, 0.038) + wall, _cover(rho - bore))
    return _mix(scene, steel * _rgb(0.985, 1.0, 1.025), _cover(ring)), ring < 0


@cache
def _imprint(text: str, height: int) -> np.ndarray:
    """Opacity [h, w] of a printed text, sampled at 8 pixels a unit."""
    font = ImageFont.load_default(height)
    box = font.getbbox(text)
    stamp = Image.new("L", (box[2] + 4, box[3] + 4))
    ImageDraw.Draw(stamp).text((2, 2), text, 255, font)
    return np.asarray(stamp, np.float32) / 255


def _print(text: str, x: np.ndarray, y: np.ndarray, height: float) -> np.ndarray:
    """Opacity [N, N] of a text of `height` units centred on the origin of x, y."""
    stamp = _imprint(text, 48)
    scale = 48 / height
    row, col = y * scale + stamp.shape[0] / 2, x * scale + stamp.shape[1] / 2
    inside = (row >= 0) & (row < stamp.shape[0]) & (col >= 0) & (col < stamp.shape[1])
    ink = np.zeros(x.shape, np.float32)
    ink[inside] = stamp[row[inside].astype(int), col[inside].astype(int)]
    return ink


def _capsule(rng, size):
    x, y = _stage(rng, size, 5, 5, base=-28)
    n, unit = x.shape[0], x.shape[0] / 256
    radius, straight, seam = 35.0, 52.0, -6.0
    off_axis = np.hypot(np.maximum(np.abs(x) - straight, 0), y)
    distance = off_axis - radius
    distance = np.where(x > seam, distance, distance + 1.6)  # the cap slides over the body and is a little wider
    height = np.sqrt(np.maximum(radius**2 - off_axis**2, 1.0))
    diffuse, shine = _relief(height, unit, 60)
    rim = np.clip(off_axis / radius, 0, 1) ** 6
    colour = _mix(_rgb(0.90, 0.84, 0.70), _rgb(0.62, 0.10, 0.09), _cover(seam - x))
    colour = _mix(colour, _rgb(0.30, 0.28, 0.27), 0.75 * _print("RAD 50", x + 45, y, 14))
    groove = np.exp(-np.square((x - seam - 20) / 1.3)) + 0.8 * np.exp(-np.square((x - seam + 0.8) / 0.9))
    body = colour * (0.34 + 0.72 * diffuse - 0.22 * rim - 0.18 * groove)
    body = body + (0.75 * _ramp(shine, 0.25, 0.95) * (1 + 0.05 * _noise(rng, (n, n), 10 * unit)))
    body = body + (0.10 * colour * np.exp(-np.square((off_axis - 27) / 6))) * (y > 0)
    tray = 0.66 + 0.012 * _noise(rng, (n, n), 1.5 * unit) + 0.010 * _noise(rng, (n, n), 23 * unit)
    tray = tray * _rgb(0.97, 1.0, 1.02)
    cast = np.hypot(np.maximum(np.abs(x - 2) - straight, 0), y - 13) - radius + 4
    scene = tray * (_shadow(cast, 15, 0.45) * _shadow(distance, 5, 0.25))
    return _mix(scene, body, _cover(distance)), distance < 0


def _connector(rng, size):
    x, y = _stage(rng, size, 4, 2.5)
    n, unit = x.shape[0], x.shape[0] / 256
    pitch, columns = 22.0, 8
    half_width, half_height = pitch * columns / 2 + 4, 34.0
    body = _box(x, y, half_width, half_height, 3)
    column = np.floor(x / pitch)
    lane = x - pitch * (column + 0.5)
    wired = np.abs(x) < pitch * columns / 2
    # The board: solder mask over copper traces, gold vias, white print.
    beyond = np.abs(y) - np.where(column.astype(int) % 2, np.float32(100), np.float32(88))  # vias are staggered
    trace = np.where(wired & (beyond < 0), np.abs(lane), 9) - 2.2
    via = np.where(wired, np.hypot(lane, beyond), 99)
    board = _mix(_rgb(0.035, 0.21, 0.12), _rgb(0.09, 0.36, 0.20), _cover(trace, 0.8))
    board = _mix(board, _rgb(0.80, 0.64, 0.32), _cover(np.abs(via - 4.2) - 1.8))
    board = _mix(board, _rgb(0.02, 0.03, 0.03), _cover(via - 2.4))
    outline = _cover(np.abs(_box(x, y, half_width + 7, half_height + 7)) - 0.8)
    board = _mix(board, _rgb(0.84, 0.86, 0.82), 0.9 * np.maximum(outline, _print("J7", x + 112, y, 16)))
    board = board * (1 + 0.05 * _noise(rng, (n, n), 1.4 * unit) + 0.05 * _noise(rng, (n, n), 30 * unit))
    board = board + 0.05 * np.exp(-np.square((x + y + rng.normal(60, 12)) / 70))
    cast = _box(x - 6, y - 8, half_width, half_height, 5)
    scene = board * (_shadow(cast, 9, 0.6) * _shadow(body, 3, 0.4))
    # Black plastic with a gold pin in every well.
    pin_y = np.abs(y) - 15
    well = _box(lane, pin_y, 7, 8, 1)
    height = -1.1 * np.maximum(body + 2.5, 0) - 1.2 * np.clip(-well, 0, 3)
    diffuse, shine = _relief(ndimage.gaussian_filter(height, 0.8 * unit), unit, 20)
    plastic = 0.02 + 0.13 * diffuse + 0.20 * shine + 0.006 * _noise(rng, (n, n), 1.5 * unit)
    plastic = plastic * (1 - 0.55 * _cover(well + 2, 2))
    pin = np.where(wired, _box(lane, pin_y, 3.6, 3.6, 0.8), 9)
    tip = np.where(np.abs(lane) > np.abs(pin_y), -lane * 0.55, -np.sign(y) * pin_y * 0.8)
    tip = np.tanh(tip * 3) * (np.maximum(np.abs(lane), np.abs(pin_y)) > 1.7)
    gold = 0.72 + 0.26 * tip
    part = _mix(plastic * _rgb(1, 1, 1.04), _rgb(0.01, 0.01, 0.01), 0.6 * _cover(pin - 2, 1.5))
    part = _mix(part, gold * _rgb(1.0, 0.80, 0.42), _cover(pin))
    return _mix(scene, part, _cover(body)), body < 0


_MATERIALS: dict[str, Callable] = {
    **{name: partial(_photo_crop, name) for name in _TONES},
    "brushed_metal": _brushed_metal,
    "woven_fabric": _woven_fabric,
    "hex_nut": _hex_nut,
    "capsule": _capsule,
    "connector": _connector,
}


def render(category: str, rng: np.random.Generator, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Photograph a good part.

    Returns the image, uint8 [size, size, 3], and the foreground, bool [size, size]: where the part is, all
    True for a texture. Raises ValueError for an unknown category or a size below 32.
    """
    if category not in _MATERIALS:
        raise ValueError(f"Unknown category {category!r}; choose from {', '.join(CATEGORIES)}.")
    if size < MIN_SIZE:
        raise ValueError(f"Image size must be at least {MIN_SIZE} pixels, not {size}.")
    scene, foreground = _MATERIALS[category](rng, size)
    if foreground is None:
        foreground = np.ones((size, size), bool)
    else:
        k = foreground.shape[0] // size
        foreground = foreground.reshape(size, k, size, k).mean((1, 3)) >= 0.5
    return _camera(rng, scene, size), foreground


# --------------------------------------------------------------------------------------------------- defects
# A painter takes a patch [3, h, w] in [0, 1], coordinates x, y [h, w] in units from the defect's centre, a
# strength in (0, 1], pixels per unit, a generator and the foreground [h, w] (or None), and returns the patch.


def _curve(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance [h, w] to a gently bent stroke through the centre, and its uneven pressure in [0, 1]."""
    (u, v), bend = _turn(x, y, rng.uniform(0, np.pi)), rng.uniform(-0.006, 0.006)
    distance = (v - bend * u * u) / np.sqrt(1 + np.square(2 * bend * u))
    knots = np.linspace(-0.5, 0.5, 12) * length
    pressure = rng.uniform(0.45, 1, 12)
    pressure[[0, -1]] = 0
    return distance, np.interp(u, knots, pressure, 0, 0)


def _blob(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, radius: float, rough: float) -> np.ndarray:
    """An irregular round shape [h, w]: 1 at its middle, 0 on its outline, negative outside."""
    u, v = _turn(x, y, rng.uniform(0, np.pi))
    v = v / rng.uniform(0.65, 1)
    theta, wobble = np.arctan2(v, u), 0.0
    for k in range(2, 8):
        wobble = wobble + rough / k * rng.normal() * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    return 1 - np.hypot(u, v) / (radius * np.clip(1 + wobble, 0.5, 1.6))


def _scratch(patch, x, y, strength, unit, rng, foreground):
    width = max(rng.uniform(0.7, 1.2), 0.6 / unit)
    distance, pressure = _curve(x, y, rng, rng.uniform(45, 110))
    lit = np.exp(-np.square(distance / width))
    shade = np.exp(-np.square((distance - 1.8 * width) / width))
    side = -1 if patch.mean() > 0.7 else 1  # a groove in a bright surface shows as its dark side
    return patch + (side * strength * pressure * (0.55 * lit - 0.28 * shade))


def _crack(patch, x, y, strength, unit, rng, foreground):
    k = 4
    h, w = x.shape
    canvas = Image.new("L", (w * k, h * k))
    draw = ImageDraw.Draw(canvas)
    origin = np.array([-x[0, 0], -y[0, 0]]) * unit * k

    def walk(point, course, length, width):
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


def _stain(patch, x, y, strength, unit, rng, foreground):
    inside = _blob(x, y, rng, rng.uniform(12, 26), 0.2)
    inside = inside + 0.14 * _noise(rng, x.shape, 13 * unit) + 0.06 * _noise(rng, x.shape, 4.7 * unit)
    film = _ramp(inside, 0, 0.3) * (0.75 + 0.12 * _noise(rng, x.shape, 6 * unit))
    film = film + 0.4 * np.exp(-np.square((inside - 0.09) / 0.07))  # drying leaves a darker edge
    film = strength * np.clip(film, 0, 1)
    if patch.mean() < 0.2:  # only a pale deposit shows on a dark part
        return _mix(patch, _rgb(0.62, 0.60, 0.55), 0.6 * film)
    liquids = (0.62, 0.46, 0.26), (0.66, 0.38, 0.22), (0.32, 0.36, 0.50), (0.45, 0.44, 0.42)
    return patch * _mix(_rgb(1, 1, 1), _rgb(*rng.choice(liquids)), film)


def _hole(patch, x, y, strength, unit, rng, foreground):
    inside = _blob(x, y, rng, rng.uniform(7, 14), 0.16) + 0.05 * _noise(rng, x.shape, 3 * unit)
    depth = _ramp(inside, -0.02, 0.18)
    gy, gx = np.gradient(ndimage.gaussian_filter(depth, 1.2 * unit))
    slope = (gx * LIGHT[0] + gy * LIGHT[1]) * unit  # positive on the wall that faces the light
    slope = slope / max(np.abs(slope).max(), 1e-6)
    pit = _mix(patch, patch * 0.16 + 0.012, depth * strength**1.4)  # a shallow pit shows by its walls only
    return pit + (strength**0.7 * (0.16 * np.clip(slope, 0, 1) - 0.14 * np.clip(-slope, 0, 1)))


def _contamination(patch, x, y, strength, unit, rng, foreground):
    colours = (0.06, 0.06, 0.06), (0.86, 0.84, 0.78), (0.36, 0.24, 0.14), (0.60, 0.62, 0.66), (0.15, 0.28, 0.55)
    here = patch.mean((1, 2), keepdims=True)
    colour = max((_rgb(*c) for c in rng.permutation(colours)[:2]), key=lambda c: np.abs(here - c).sum())
    height = np.zeros(x.shape, np.float32)
    if rng.random() < 0.3:  # a fibre
        distance, pressure = _curve(x, y, rng, rng.uniform(30, 60))
        height = np.sqrt(np.clip(1 - np.square(distance / max(1.6, 0.8 / unit)), 0, 1)) * (pressure > 0)
    else:
        for _ in range(rng.integers(1, 5)):
            dx, dy = rng.normal(0, 9, 2)
            chip = _blob(x - dx, y - dy, rng, rng.uniform(3.5, 8.5), 0.25) + 0.08 * _noise(rng, x.shape, 3 * unit)
            height = np.maximum(height, np.sqrt(np.clip(chip, 0, 1)) * rng.uniform(0.6, 1))
    height = height * (1 + 0.12 * _noise(rng, x.shape, 2.5 * unit))
    cover = ndimage.gaussian_filter(_ramp(height, 0.0, 0.35), 0.5)
    diffuse, shine = _relief(ndimage.gaussian_filter(height, 0.6 * unit) * 5, unit, 25)
    shadow = ndimage.gaussian_filter(ndimage.shift(cover, 2.2 * unit, order=1), 1.5 * unit)
    ground = patch * (1 - 0.55 * strength * shadow)
    grain = 1 + 0.04 * _noise(rng, x.shape, 1.2)
    lit = colour * (0.30 + 0.85 * diffuse * grain) + 0.25 * shine
    return _mix(ground, lit, cover * strength)


def _deformation(patch, x, y, strength, unit, rng, foreground):
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
    return _mix(np.where(foreground, moved, patch), moved, object_moved)


_PAINTERS: dict[str, Callable] = {
    "scratch": _scratch,
    "crack": _crack,
    "stain": _stain,
    "hole": _hole,
    "contamination": _contamination,
    "deformation": _deformation,
}


def _place(rng: np.random.Generator, shape: tuple[int, int], kind: str, unit: float, foreground) -> np.ndarray:
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
        image: uint8 [H, W, 3], at least 32 pixels on each side. A grey photograph stays grey.
        kind: one of `DEFECTS`.
        severity: 0 (barely visible) to 1 (plain).
        rng: decides the place and the shape.
        foreground: bool [H, W], the object the defect must lie on; only a deformation may move its outline.

    Returns the defective image, uint8 [H, W, 3], and its mask, bool [H, W], never empty. Outside the mask the
    image equals the input. Raises ValueError for bad arguments or where no defect can be seen.
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


# ------------------------------------------------------------------------------------------------- data set


def _image_rng(seed: int, category: str, split: str, kind: str, index: int) -> np.random.Generator:
    """The generator of one image, whatever else is written beside it."""
    key = zlib.crc32(f"{category}/{split}/{kind}/{index}".encode())
    return np.random.default_rng(np.random.SeedSequence([seed, key]))


def _write_image(root: Path, category: str, split: str, kind: str, index: int, severity: float, size: int, seed: int):
    rng = _image_rng(seed, category, split, kind, index)
    image, foreground = render(category, rng, size)
    if kind != "good":
        image, mask = add_defect(image, kind, severity, rng, foreground)
        path = root / category / "ground_truth" / kind / f"{index:03d}_mask.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    path = root / category / split / kind / f"{index:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_synthetic(
    root: str | os.PathLike,
    categories: Sequence[str] = CATEGORIES,
    num_train: int = 100,
    num_test_good: int = 20,
    num_per_defect: int = 4,
    size: int = 256,
    seed: int = 0,
) -> Path:
    """Write a data set in the MVTec AD layout and return its folder.

    The same seed gives the same bytes, and each image depends only on the seed, its category, split, kind and
    index (a defect also on its severity, spread evenly from 0 to 1 over `num_per_defect` images). Raises
    ValueError for an unknown category or a `root` that already holds files.
    """
    root = Path(root)
    unknown = sorted(set(categories) - set(CATEGORIES))
    if unknown:
        raise ValueError(f"Unknown categories {', '.join(unknown)}; choose from {', '.join(CATEGORIES)}.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root} already holds files; give a new or empty folder.")
    counts = [("train", "good", num_train), ("test", "good", num_test_good)]
    counts += [("test", kind, num_per_defect) for kind in DEFECTS]
    jobs = [
        (category, split, kind, index, index / (count - 1) if count > 1 else 0.5)
        for category in categories
        for split, kind, count in counts
        for index in range(count)
    ]
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        for job in tqdm(jobs, desc="synthetic", unit="image"):
            _write_image(partial, *job, size, seed)
        if root.exists():
            root.rmdir()
        partial.rename(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m rad.data.synthetic OUT`."""
    parser = argparse.ArgumentParser(description="Write a synthetic anomaly data set in the MVTec AD layout.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--categories", nargs="+", default=CATEGORIES, choices=CATEGORIES)
    parser.add_argument("--num_train", type=int, default=100)
    parser.add_argument("--num_test_good", type=int, default=20)
    parser.add_argument("--num_per_defect", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    kwargs = vars(args)
    write_synthetic(kwargs.pop("out"), **kwargs)


if __name__ == "__main__":
    main()
