"""Pasted defects, which train: textures pasted on good images, from which a discriminator learns what a defect may be
and the denoiser what to remove with the noise.

As in CutPaste (Li et al., CVPR 2021), DRAEM (Zavrtanik et al., ICCV 2021) and NSA (Schlüter et al., ECCV 2022), a
region of random shape gets another texture. Shapes and fills are as varied as they are cheap; none knows a product.
What they have learned is measured with other defects, the drawn ones of `rad.data.defects`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from .camera import change_camera


def artificial_batches(
    images: list[np.ndarray], categories: list[str], batch_size: int, seed: int, camera_prob: float = 0.0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of good images, most with artificial defects; the n-th depends on the seed and n alone.

    Args:
        images: Good images, [S, S, 3] each, uint8 or float in [0, 1].
        categories: Of each image; textures are pasted within one.
        camera_prob: Share of the images that are seen through another camera, defects and all.

    Yields:
        Images [B, 3, S, S] in [-1, 1] and masks [B, S, S], 1 on defects.
    """
    members = {name: [i for i, c in enumerate(categories) if c == name] for name in set(categories)}
    number = 0
    while True:
        batch = []
        for place in range(number * batch_size, (number + 1) * batch_size):
            rng = np.random.default_rng([seed, place])
            i = int(rng.integers(len(images)))
            image, other = (_levels(images[j]) for j in (i, rng.choice(members[categories[i]])))
            if rng.random() < 0.5:
                image = image[:, ::-1]
            if rng.random() < 0.5:
                image = image * rng.uniform(0.7, 1.3) + rng.normal() * 6
            image, mask = image.clip(0, 255), np.zeros(image.shape[:2], bool)
            if rng.random() < 0.85:
                image, mask = paste_defects(image, other, rng)
            if rng.random() < camera_prob:
                image = change_camera(image, rng)
            batch.append((image.transpose(2, 0, 1), mask))
        pictures, masks = (np.stack(part).astype(np.float32) for part in zip(*batch, strict=True))
        yield torch.from_numpy(pictures) / 127.5 - 1, torch.from_numpy(masks)
        number += 1


def _levels(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) if image.dtype == np.uint8 else image.astype(np.float32) * 255


def paste_defects(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One or two defects on a good image.

    Args:
        image: A good image, float32 [S, S, 3] in [0, 255].
        other: Another one, whose texture may be pasted, likewise.
        rng: The only source of chance.

    Returns:
        The image, likewise, and the mask, bool [S, S]: true where something was pasted that can be seen.
    """
    side = len(image)
    mask = np.zeros((side, side), bool)
    for _ in range(1 + (rng.random() < 0.3)):
        # 1. Where: a large region with a soft outline, or a small one with a sharper one
        shape = _shape(side, rng)
        large = shape.mean() > 0.02
        opacity = gaussian_filter(shape.astype(np.float32), rng.uniform(0.4, 4.0 if large else 1.2))
        if not large:
            opacity = np.minimum(1.0, opacity / max(float(opacity.max()), 0.05))  # thin lines would fade
        # 2. What
        opacity = opacity[..., None] * rng.uniform(0.4, 1.0)
        pasted = (image + opacity * (_fill(image, other, rng) - image)).clip(0, 255)
        # 3. What cannot be seen is no defect
        change = gaussian_filter(np.abs(pasted - image).mean(2), 2.0 if large else 0.7)
        visible = shape & (change > (1.5 if large else 4.0))
        if visible.sum() >= 0.5 * shape.sum() or not large:
            image = pasted.astype(np.float32)
            mask |= shape if large else visible
    return image, mask


def _shape(side: int, rng: np.random.Generator) -> np.ndarray:
    """A random region, bool [side, side]: part of the image beyond an edge, a blob, a line, or scattered spots."""
    kind, pixels = rng.random(), side**2
    if kind < 0.25:
        return _beyond_edge(side, rng)
    if kind < 0.35:
        return _ellipse(side, rng, 0.023 * pixels, 0.25 * pixels)
    if kind < 0.58:
        return _ellipse(side, rng, 0.00023 * pixels, 0.014 * pixels)
    if kind < 0.78:
        return _line(side, rng)
    if kind < 0.9:
        return _ellipse(side, rng, 0.001 * pixels, 0.053 * pixels, at_border=True)
    noise = _smooth_noise(side, int(2 ** rng.integers(1, 6)), rng)
    return noise > np.quantile(noise, rng.uniform(0.75, 0.97))


def _beyond_edge(side: int, rng: np.random.Generator) -> np.ndarray:
    """4 to 50 % of the image on one side of a wavy edge, most often along an axis; sometimes cut off at one end."""
    y, x = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
    angle = rng.choice(4) * np.pi / 2 + rng.normal() * 0.15 if rng.random() < 0.7 else rng.uniform(-np.pi, np.pi)
    distance = x * np.cos(angle) + y * np.sin(angle)
    distance += _smooth_noise(side, int(rng.integers(2, 8)), rng) * rng.uniform(0, 0.055)
    distance += _smooth_noise(side, 24, rng) * rng.uniform(0, 0.012)
    shape = distance > np.quantile(distance, 1 - rng.uniform(0.04, 0.5))
    if rng.random() < 0.3:
        along = y * np.cos(angle) - x * np.sin(angle) + _smooth_noise(side, 6, rng) * 0.03
        shape &= along > rng.uniform(-0.47, 0.23)
    return shape


def _ellipse(
    side: int, rng: np.random.Generator, smallest: float, largest: float, at_border: bool = False
) -> np.ndarray:
    """A wavy ellipse of a log-uniform area in pixels."""
    radius = np.sqrt(np.exp(rng.uniform(np.log(smallest), np.log(largest))) / np.pi)
    stretch, angle = np.exp(rng.normal() * 0.5), rng.uniform(0, np.pi)
    center = rng.uniform(0.015 * side, 0.985 * side, 2)
    if at_border:
        inset = rng.uniform(-0.3, 0.6) * radius
        center[rng.integers(2)] = rng.choice([inset, side - inset])
    y, x = np.mgrid[:side, :side].astype(np.float32) - center.astype(np.float32)[:, None, None]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.hypot(u / (radius * stretch), v * stretch / radius)
    cells = int(np.clip(side / max(radius, 4.0), 3, 40))
    return distance + _smooth_noise(side, cells, rng) * rng.uniform(0, 0.25) < 1


def _line(side: int, rng: np.random.Generator) -> np.ndarray:
    """A curve, drawn at twice the size for a smooth outline."""
    canvas = Image.new("L", (2 * side, 2 * side))
    points, bend = [tuple(rng.uniform(0, 2 * side, 2))], rng.normal() * 0.02
    angle = rng.choice([np.pi / 2, rng.uniform(0, 2 * np.pi)])
    step = side / 32
    for _ in range(1 + int(rng.uniform(2.5, 50))):
        angle += rng.normal() * 0.15 + bend
        points.append((points[-1][0] + step * np.cos(angle), points[-1][1] + step * np.sin(angle)))
    ImageDraw.Draw(canvas).line(points, fill=255, width=int(rng.integers(2, 9) * max(1.0, side / 256)), joint="curve")
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX)) > 100


def _fill(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What is pasted: [S, S, 3]."""
    side, kind = len(image), rng.random()
    if kind < 0.45:  # the texture of another good image, moved, turned, at another brightness
        if rng.random() < 0.6:
            other = np.roll(other, tuple(rng.integers(0, side, 2)), (0, 1))
        other = other[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
        other = other.transpose(1, 0, 2) if rng.random() < 0.3 else other
        if rng.random() < 0.6:
            other = other - other.mean((0, 1)) + image.mean((0, 1)) + rng.normal() * 12
        return other
    if kind < 0.75:  # the image's own, at another contrast, brightness and sharpness
        blur = rng.uniform(0.8, 6.0)
        smooth = gaussian_filter(image, (blur, blur, 0))
        detail = rng.choice([rng.uniform(0, 0.6), rng.uniform(1.5, 3)]) * (image - smooth)
        return smooth * rng.uniform(0.8, 1.25) + rng.normal() * 8 + detail
    if kind < 0.9:  # a mottled colour, most often a dark one
        level = rng.uniform(0, 90) if rng.random() < 0.7 else rng.uniform(90, 255)
        tint = level + rng.normal(size=3) * image.std((0, 1)).std()  # grey on grey images
        mottle = _smooth_noise(side, int(2 ** rng.integers(2, 7)), rng)[..., None] * rng.uniform(0, 10)
        return tint + mottle + 0.2 * rng.random() * (image - image.mean((0, 1)))
    shift = rng.choice([-1, 1], p=[0.7, 0.3]) * rng.uniform(12, 70)  # a stain or a highlight
    return image + shift + _smooth_noise(side, 32, rng)[..., None] * rng.uniform(0, 6)


def _smooth_noise(side: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of about unit deviation with so many cells a side, float32 [side, side]."""
    grid = Image.fromarray(rng.standard_normal((cells + 2, cells + 2), dtype=np.float32))
    inner = (0.5, 0.5, cells + 1.5, cells + 1.5)
    return np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC, box=inner))
