"""What rendered parts and drawn defects share: noise, colours, light and coordinates.

Images are planar, [3, H, W] in [0, 1]. Lengths are in units of 1/256 of the image side, so that a part looks the same
at any size; `unit` is pixels per unit.
"""

import math

import numpy as np
from PIL import Image

MIN_SIZE = 32
LIGHT = np.array([-0.45, -0.6, 0.66], np.float32)  # from the upper left, towards the camera
LIGHT /= np.linalg.norm(LIGHT)
HALFWAY = (LIGHT + (0, 0, 1)).astype(np.float32)  # a surface facing halfway between light and camera shines
HALFWAY /= np.linalg.norm(HALFWAY)


def noise(rng: np.random.Generator, shape: tuple[int, int], scale: float | tuple[float, float]) -> np.ndarray:
    """Smooth noise [H, W] of about unit variance whose features are `scale` (or `(y, x)`) pixels wide."""
    sy, sx = np.broadcast_to(np.maximum(scale, 1.0), 2)
    h, w = shape[0] / sy, shape[1] / sx
    coarse = rng.standard_normal((int(h) + 4, int(w) + 4), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC, (1, 1, 1 + w, 1 + h)))


def rgb(red: float, green: float, blue: float) -> np.ndarray:
    """A colour [3, 1, 1] in [0, 1]."""
    return np.array((red, green, blue), np.float32).reshape(3, 1, 1)


def ramp(t: np.ndarray, low: float, high: float) -> np.ndarray:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((t - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(base: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Paint `colour` over `base` (each a colour or an image [3, H, W]) with opacity `alpha` [H, W]."""
    return base + (colour - base) * alpha


def relief(height: np.ndarray, unit: float, gloss: float) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse and specular light [H, W] on a height map lit from the upper left; `unit` is pixels per unit."""
    gy, gx = np.gradient(height * unit)
    norm = 1 / np.sqrt(gx * gx + gy * gy + 1)
    diffuse = np.clip((LIGHT[2] - gx * LIGHT[0] - gy * LIGHT[1]) * norm, 0, 1)
    shine = np.clip((HALFWAY[2] - gx * HALFWAY[0] - gy * HALFWAY[1]) * norm, 0, 1) ** gloss
    return diffuse, shine


def turn(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x, y along axes turned by `angle` radians."""
    return math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
