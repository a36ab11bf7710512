"""A small, deterministic stand-in for an industrial inspection data set.

Five textures and three objects are rendered as if photographed on a production line, and six kinds of
defect (`rad.data.defects`) are blended into them with exact masks. Files follow the MVTec AD layout::

    <root>/<category>/train/good/000.png
    <root>/<category>/test/good/000.png
    <root>/<category>/test/<defect>/000.png
    <root>/<category>/ground_truth/<defect>/000_mask.png

Lengths in this module are in units of 1/256 of the image side, so that a part looks the same at any size.
"""

import argparse
import math
import os
import zlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from skimage import data
from tqdm.auto import tqdm

from ..files import whole
from .defects import DEFECTS, add_defect
from .drawing import MIN_SIZE, mix, noise, ramp, relief, rgb, turn

TEXTURES: tuple[str, ...] = ("brick", "grass", "gravel", "brushed_metal", "woven_fabric")
OBJECTS: tuple[str, ...] = ("hex_nut", "capsule", "connector")
CATEGORIES: tuple[str, ...] = TEXTURES + OBJECTS
SUPERSAMPLING = 2


# ------------------------------------------------------------------------------------------- building blocks


def _stage(
    rng: np.random.Generator, size: int, shift: float, degrees: float, base: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x, y [N, N] of a supersampled image whose origin is the slightly moved part."""
    n = size * SUPERSAMPLING
    t = ((np.arange(n) + 0.5) * (256 / n) - 128).astype(np.float32)
    dx, dy = rng.uniform(-shift, shift, 2).tolist()
    return turn(t[None, :] - dx, t[:, None] - dy, math.radians(base + rng.uniform(-degrees, degrees)))


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
    balance = rgb(*rng.normal(1, 0.012, 3)) * rng.normal(1, 0.03)
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
    rotation = step * np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    room = np.abs(rotation) @ np.full(2, size / 2) + 1
    centre = rng.uniform(room, np.array(source.shape) - room)
    grey = ndimage.affine_transform(
        source, rotation, centre - rotation @ np.full(2, (size - 1) / 2), (size, size), order=1
    )
    grey = np.clip(grey, 0, 1) ** rng.uniform(0.92, 1.1)
    stops = np.linspace(0, 1, 4)
    channels = zip(*_TONES[name], strict=True)
    return np.stack([np.interp(grey, stops, channel) for channel in channels]).astype(np.float32), None


def _brushed_metal(rng: np.random.Generator, size: int) -> tuple[np.ndarray, None]:
    unit = size / 256
    x = np.linspace(-1, 1, size, dtype=np.float32)[None, :]
    grain = sum(
        weight * noise(rng, (size, size), (across * unit, along * unit))
        for weight, across, along in ((0.020, 1, 14), (0.026, 1, 70), (0.020, 2.5, 220), (0.012, 9, 300))
    )
    # Brushing spreads the reflection of a lamp into a band across the strokes.
    sheen = 0.16 * np.exp(-np.square((x - rng.normal(-0.25, 0.08)) / 0.55))
    sheen = sheen + 0.02 * noise(rng, (size, size), (300 * unit, 60 * unit))
    return (0.50 + sheen + grain) * rgb(0.985, 1.0, 1.02), None


def _woven_fabric(rng: np.random.Generator, size: int) -> tuple[np.ndarray, None]:
    x, y = _stage(rng, size, 8, 2.5)
    n = x.shape[0]
    unit = n / 256
    x = x + 0.9 * noise(rng, (n, n), 45 * unit)
    y = y + 0.9 * noise(rng, (n, n), 45 * unit)
    pitch = 7.0
    i, j = np.floor(x / pitch).astype(int) + 64, np.floor(y / pitch).astype(int) + 64
    u, v = x / pitch % 1 - 0.5, y / pitch % 1 - 0.5
    over = (i + j) % 2 == 0  # plain weave: threads pass over and under in turn
    across, along = np.where(over, u, v), np.where(over, v, u)
    tone = 0.035 * rng.standard_normal((2, 128), np.float32)
    thread = np.where(over, tone[0][i % 128], tone[1][j % 128])
    fibre = np.where(over, noise(rng, (n, n), (5 * unit, 1)), noise(rng, (n, n), (1, 5 * unit)))
    height = np.sqrt(np.clip(1.02 - 4 * across**2, 0, 1)) * (1 - 1.5 * along**2)
    lit = 0.30 + 0.62 * height - 0.10 * across + thread + 0.045 * fibre + 0.03 * noise(rng, (n, n), 60 * unit)
    colours = np.where(over, rgb(0.50, 0.58, 0.68), rgb(0.60, 0.65, 0.70))
    return lit * colours, None


def _hexagon(x: np.ndarray, y: np.ndarray, flat: float) -> np.ndarray:
    """Distance [N, N] to a hexagon whose flats are `flat` from its centre, negative inside."""
    x, y = np.abs(x), np.abs(y)
    return np.maximum(0.8660254 * x + 0.5 * y, y) - flat


def _hex_nut(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = _stage(rng, size, 4, 5)
    n, unit = x.shape[0], x.shape[0] / 256
    flat, bore = 76.0, 43.0
    rho, theta = np.hypot(x, y), np.arctan2(y, x)
    outer = _hexagon(x, y, flat)
    ring = np.maximum(outer, bore - rho)
    # A turned chamfer cuts the corners of the hexagon; a second one opens the thread.
    height = -0.55 * np.maximum(rho - flat + 3, 0) - 0.9 * np.maximum(bore + 6 - rho, 0) - np.maximum(outer + 2, 0)
    diffuse, shine = relief(ndimage.gaussian_filter(height, unit), unit, 24)
    turned = noise(rng, (1, 512), 1.5)[0][np.clip(rho * 4, 0, 511).astype(int)]
    lamp = rng.normal(-2.2, 0.05)
    fan = np.abs(np.cos(theta - lamp)) ** 5 * ramp(flat + 2 - rho, 0, 4)  # lathe marks reflect a lamp in two fans
    steel = 0.16 + 0.34 * diffuse + 0.55 * shine + 0.24 * fan + 0.018 * turned
    steel = steel + 0.014 * noise(rng, (n, n), 2 * unit) + 0.02 * noise(rng, (n, n), 40 * unit)
    wall = 0.05 + 0.16 * ramp(rho, bore - 9, bore) * (0.5 + 0.5 * np.cos(theta - lamp + np.pi))
    wall = wall * (1 + 0.6 * np.sin((rho + 0.9 * theta / np.pi) * 2.1)) * ramp(rho, bore - 10, bore - 6)
    mat = 0.175 + 0.014 * noise(rng, (n, n), 1.6 * unit) + 0.008 * noise(rng, (n, n), 31 * unit)
    mat = mat * rgb(0.90, 1.0, 1.12)
    scene = mat * (_shadow(_hexagon(x - 5, y - 6, flat), 12, 0.6) * _shadow(outer, 4, 0.35))
    scene = mix(scene, rgb(0.03, 0.033, 0.038) + wall, _cover(rho - bore))
    return mix(scene, steel * rgb(0.985, 1.0, 1.025), _cover(ring)), ring < 0


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


def _capsule(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = _stage(rng, size, 5, 5, base=-28)
    n, unit = x.shape[0], x.shape[0] / 256
    radius, straight, seam = 35.0, 52.0, -6.0
    off_axis = np.hypot(np.maximum(np.abs(x) - straight, 0), y)
    distance = off_axis - radius
    distance = np.where(x > seam, distance, distance + 1.6)  # the cap slides over the body and is a little wider
    height = np.sqrt(np.maximum(radius**2 - off_axis**2, 1.0))
    diffuse, shine = relief(height, unit, 60)
    rim = np.clip(off_axis / radius, 0, 1) ** 6
    colour = mix(rgb(0.90, 0.84, 0.70), rgb(0.62, 0.10, 0.09), _cover(seam - x))
    colour = mix(colour, rgb(0.30, 0.28, 0.27), 0.75 * _print("RAD 50", x + 45, y, 14))
    groove = np.exp(-np.square((x - seam - 20) / 1.3)) + 0.8 * np.exp(-np.square((x - seam + 0.8) / 0.9))
    body = colour * (0.34 + 0.72 * diffuse - 0.22 * rim - 0.18 * groove)
    body = body + (0.75 * ramp(shine, 0.25, 0.95) * (1 + 0.05 * noise(rng, (n, n), 10 * unit)))
    body = body + (0.10 * colour * np.exp(-np.square((off_axis - 27) / 6))) * (y > 0)
    tray = 0.66 + 0.012 * noise(rng, (n, n), 1.5 * unit) + 0.010 * noise(rng, (n, n), 23 * unit)
    tray = tray * rgb(0.97, 1.0, 1.02)
    cast = np.hypot(np.maximum(np.abs(x - 2) - straight, 0), y - 13) - radius + 4
    scene = tray * (_shadow(cast, 15, 0.45) * _shadow(distance, 5, 0.25))
    return mix(scene, body, _cover(distance)), distance < 0


def _connector(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
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
    board = mix(rgb(0.035, 0.21, 0.12), rgb(0.09, 0.36, 0.20), _cover(trace, 0.8))
    board = mix(board, rgb(0.80, 0.64, 0.32), _cover(np.abs(via - 4.2) - 1.8))
    board = mix(board, rgb(0.02, 0.03, 0.03), _cover(via - 2.4))
    outline = _cover(np.abs(_box(x, y, half_width + 7, half_height + 7)) - 0.8)
    board = mix(board, rgb(0.84, 0.86, 0.82), 0.9 * np.maximum(outline, _print("J7", x + 112, y, 16)))
    board = board * (1 + 0.05 * noise(rng, (n, n), 1.4 * unit) + 0.05 * noise(rng, (n, n), 30 * unit))
    board = board + 0.05 * np.exp(-np.square((x + y + rng.normal(60, 12)) / 70))
    cast = _box(x - 6, y - 8, half_width, half_height, 5)
    scene = board * (_shadow(cast, 9, 0.6) * _shadow(body, 3, 0.4))
    # Black plastic with a gold pin in every well.
    pin_y = np.abs(y) - 15
    well = _box(lane, pin_y, 7, 8, 1)
    height = -1.1 * np.maximum(body + 2.5, 0) - 1.2 * np.clip(-well, 0, 3)
    diffuse, shine = relief(ndimage.gaussian_filter(height, 0.8 * unit), unit, 20)
    plastic = 0.02 + 0.13 * diffuse + 0.20 * shine + 0.006 * noise(rng, (n, n), 1.5 * unit)
    plastic = plastic * (1 - 0.55 * _cover(well + 2, 2))
    pin = np.where(wired, _box(lane, pin_y, 3.6, 3.6, 0.8), 9)
    tip = np.where(np.abs(lane) > np.abs(pin_y), -lane * 0.55, -np.sign(y) * pin_y * 0.8)
    tip = np.tanh(tip * 3) * (np.maximum(np.abs(lane), np.abs(pin_y)) > 1.7)
    gold = 0.72 + 0.26 * tip
    part = mix(plastic * rgb(1, 1, 1.04), rgb(0.01, 0.01, 0.01), 0.6 * _cover(pin - 2, 1.5))
    part = mix(part, gold * rgb(1.0, 0.80, 0.42), _cover(pin))
    return mix(scene, part, _cover(body)), body < 0


_MATERIALS: dict[str, Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray | None]]] = {
    **{name: partial(_photo_crop, name) for name in _TONES},
    "brushed_metal": _brushed_metal,
    "woven_fabric": _woven_fabric,
    "hex_nut": _hex_nut,
    "capsule": _capsule,
    "connector": _connector,
}


def render(category: str, rng: np.random.Generator, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Photograph a good part.

    Args:
        category: One of `CATEGORIES`.
        rng: The only source of chance.
        size: Side in pixels.

    Returns:
        The image, uint8 [size, size, 3], and the foreground, bool [size, size]: where the part is, all True for a
        texture.

    Raises:
        ValueError: Unknown category, or a size below 32.
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


# ------------------------------------------------------------------------------------------------- data set


def _image_rng(seed: int, category: str, split: str, kind: str, index: int) -> np.random.Generator:
    """The generator of one image, whatever else is written beside it."""
    key = zlib.crc32(f"{category}/{split}/{kind}/{index}".encode())
    return np.random.default_rng(np.random.SeedSequence([seed, key]))


def _write_image(
    root: Path, category: str, split: str, kind: str, index: int, severity: float, size: int, seed: int
) -> None:
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
    index (a defect also on its severity, spread evenly from 0 to 1 over `num_per_defect` images).

    Args:
        root: The new folder; an empty one may be there.
        categories: Some of `CATEGORIES`.
        num_train, num_test_good: Good images of each category.
        num_per_defect: Images of each category and kind of defect.
        size: Side of the images in pixels.
        seed: Of all chance.

    Raises:
        ValueError: Unknown category, a size below 32, or a `root` that already holds files.
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
    with whole(root) as folder:
        folder.mkdir()
        for job in tqdm(jobs, desc="synthetic", unit="image"):
            _write_image(folder, *job, size, seed)
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m rad.data.synthetic OUT`."""
    parser = argparse.ArgumentParser(description="Write a synthetic anomaly data set in the MVTec AD layout.")
    parser.add_argument("out", type=lambda path: Path(path).expanduser())
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
