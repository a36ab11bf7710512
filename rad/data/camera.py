"""Another camera, or the same on another day: changes of a picture that say nothing about the part in it."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter

QUALITY = 60, 100  # of JPEG and WebP


def through_another_camera(
    x_0: torch.Tensor, rng: np.random.Generator, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """`change_camera` of an image as the networks take it, [3, S, S] in [-1, 1].

    Where the photo's own (height, width) is given and smaller, the change is made at that size: enlarged, compression
    and noise are coarser. Of larger photos little of it is left, so S is the worst.
    """
    side = x_0.shape[-1]
    own = None if size is None else tuple(min(one, side) for one in size)
    if own in (None, (side, side)):
        changed = change_camera((x_0.permute(1, 2, 0).numpy() + 1) * 127.5, rng)
        return torch.from_numpy(changed).permute(2, 0, 1) / 127.5 - 1
    small = F.interpolate(x_0[None], own, mode="bilinear", antialias=True)[0]
    changed = torch.from_numpy(change_camera((small.permute(1, 2, 0).numpy() + 1) * 127.5, rng))
    change = changed.permute(2, 0, 1) / 127.5 - 1 - small
    return (x_0 + F.interpolate(change[None], (side, side), mode="bicubic")[0]).clamp(-1, 1)


def change_camera(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture of the same part with another exposure, focus, sensor and file format: gain and gamma up to 5 % off,
    moved by a pixel at most, and, at random, out of focus, with noise, and compressed.

    Args:
        image: float32 [H, W, 3] in [0, 255]; what is grey stays so.
        rng: The only source of chance.

    Returns:
        The picture, likewise.
    """
    height, width = image.shape[:2]
    is_grey = bool((image == image[..., :1]).all())
    image = (image[..., :1] if is_grey else image) / 255
    image = 255 * (image * rng.uniform(0.95, 1.05)).clip(0, 1) ** rng.uniform(0.95, 1.05)
    top, left = rng.integers(0, 3, 2)
    image = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")[top : top + height, left : left + width]
    blur, noise = rng.uniform(0.3, 0.9), rng.uniform(0.5, 2.5)
    if rng.random() < 0.5:
        image = gaussian_filter(image, (blur, blur, 0))
    if rng.random() < 0.5:
        image = image + rng.normal(0, noise, image.shape)
    if rng.random() < 0.75:
        image = image + _compression(image, "WEBP" if rng.random() < 0.25 else "JPEG", int(rng.integers(*QUALITY)))
    return np.broadcast_to(image.clip(0, 255), (height, width, 3)).astype(np.float32)


def _compression(image: np.ndarray, file_format: str, quality: int) -> np.ndarray:
    """What saving changes about a picture [H, W, 1 or 3] in [0, 255]: all else keeps its own precision."""
    pixels, file = image.clip(0, 255).round().astype(np.uint8), io.BytesIO()
    mode = "L" if pixels.shape[2] == 1 else "RGB"
    Image.fromarray(pixels[..., 0] if mode == "L" else pixels).save(file, file_format, quality=quality)
    saved = np.asarray(Image.open(file).convert(mode), np.float32)
    return saved.reshape(pixels.shape) - pixels
