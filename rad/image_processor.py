"""Pictures to the networks' square input; maps and pictures back. Needs torch, NumPy, Pillow and, for colours,
matplotlib only."""

import operator
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .image_reader import WHITES, ImageInput, PipelineImageInput, name_of, read, white_of

FULL_SCALE = (0, 255)
GAP = 1.5  # between the brightest pixels of two cameras' pictures, at least


class RADImageProcessor:
    """Takes images of any size to the model's square input.

    Pictures of 8 bits, floats, and 16-bit pictures that use their full scale mean the same by 0 and by white. Cameras
    of 10, 12 or 14 bits leave most of a 16-bit file's scale unused, so what their numbers mean has to be known.

    Args:
        resolution: Side of that square in pixels. The aspect ratio is not kept: `resize_map` undoes it.
        pixel_range: The numbers that become black and white, (0, 4095) for 12 bits; None for the full scale of each
            picture's own type, whatever part of it is used.
        darkest_peak: The brightest pixel of the darkest 16-bit picture that the range was found on. A picture that
            stays below two thirds of it and fits into two bits fewer is taken for one of another range.
    """

    def __init__(self, resolution: int = 256, pixel_range: Sequence[int] | None = None, darkest_peak: int = 0) -> None:
        self.resolution, self.darkest_peak = resolution, darkest_peak
        self.pixel_range = None if pixel_range is None else check_pixel_range(pixel_range)

    def preprocess(self, images: PipelineImageInput) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Images as the model's input. Each is resized by itself (bicubic, antialiased), whatever its neighbours.

        Returns:
            Images [B, 3, resolution, resolution], float32 in [-1, 1], and each upright image's own (height, width).

        Raises:
            ValueError, FileNotFoundError: An empty list, or what `resize` refuses.
        """
        images = list(images) if isinstance(images, list | tuple) else [images]
        if not images:
            raise ValueError("The list of images is empty: give at least one image.")
        resized, sizes = zip(*(self.resize(image) for image in images), strict=True)
        return torch.stack([to_input(torch.from_numpy(pixels).permute(2, 0, 1)) for pixels in resized]), list(sizes)

    def resize(self, image: ImageInput) -> tuple[np.ndarray, tuple[int, int]]:
        """One image at the model's square: [resolution, resolution, 3], uint8 of an 8-bit picture and else float32 in
        [0, 1], which is an image again, and is not changed by another pass; and the image's own (height, width).

        Raises:
            ValueError, FileNotFoundError: What `image_reader.read` refuses, or a picture of another range.
        """
        pixels, side = read(image), (self.resolution, self.resolution)
        low, high = self._scale(pixels, name_of(image))
        if isinstance(pixels, Image.Image) and (low, high) == FULL_SCALE:
            return np.array(pixels.resize(side, Image.Resampling.BICUBIC)), (pixels.height, pixels.width)
        pixels = np.asarray(pixels)
        channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(pixels, 2, 0)]
        resized = np.stack([np.asarray(c.resize(side, Image.Resampling.BICUBIC)) for c in channels], axis=2)
        resized = ((resized - low) / (high - low)).clip(0, 1)
        return resized.repeat(3, axis=2) if resized.shape[2] == 1 else resized, pixels.shape[:2]

    def _scale(self, pixels: Image.Image | np.ndarray, name: str) -> tuple[int, int]:
        """The numbers of a picture that become 0 and 1; raises ValueError if it has another range than the model's."""
        if isinstance(pixels, np.ndarray) and pixels.dtype != np.uint16:
            return 0, 1
        own = (0, 65535) if isinstance(pixels, np.ndarray) else FULL_SCALE
        if self.pixel_range is None or (own == FULL_SCALE and self.pixel_range in (FULL_SCALE, (0, 65535))):
            return own
        low, high = self.pixel_range
        peak = int(pixels.max()) if isinstance(pixels, np.ndarray) else max(top for _, top in pixels.getextrema())
        if self.pixel_range == FULL_SCALE and white_of(peak) == 65535:
            return own
        too_dark = own != FULL_SCALE and peak <= high // 4 and peak < self.darkest_peak / GAP
        if peak > high or too_dark or (own == FULL_SCALE and high > 255):
            raise ValueError(
                f"{name} has {8 if own == FULL_SCALE else 16}-bit pixels with values up to {peak:,}, but this model "
                f"knows pictures of the range {low} to {high:,}"
                f"{f', the darkest with values up to {self.darkest_peak:,}' if too_dark else ''}: "
                "convert the picture, or fit the model to pictures like it."
            )
        return low, high


def find_pixel_range(
    peaks: Sequence[int | None], pixel_range: Sequence[int] | None = None
) -> tuple[tuple[int, int], int]:
    """What the numbers of a set of pictures mean.

    Args:
        peaks: `image_reader.peak` of each picture.
        pixel_range: Black and white, where they are known.

    Returns:
        (0, white): of 8-bit pictures (0, 255), of 16-bit ones the first of 8, 10, 12, 14 or 16 bits that hold all of
        them; and the smallest peak of 16-bit pictures, 0 if there are none.

    Raises:
        ValueError: There are 8-bit pictures beside 16-bit ones that do not use their full scale, or 16-bit ones of two
            ranges: some fit into two bits fewer, and none lies between them and the others.
    """
    deep = sorted(peak for peak in peaks if peak is not None)
    darkest = deep[0] if deep else 0
    if pixel_range is not None:
        return check_pixel_range(pixel_range), darkest
    if not deep:
        return FULL_SCALE, 0
    white, advice = white_of(deep[-1]), "give images of one kind"
    if len(deep) < len(peaks) and white not in (255, 65535):
        raise ValueError(
            f"{len(peaks) - len(deep)} images have 8-bit pixels and {len(deep)} have 16-bit ones with values up to "
            f"{deep[-1]:,}: {advice}."
        )
    # Of two cameras: no picture between them, or many that end at the white of fewer bits
    low = [peak for peak in deep if white > 255 and peak <= white // 4]
    if low:
        number = max(range(1, len(low) + 1), key=lambda n: deep[n] / max(deep[n - 1], 1))
        saturated = [
            white for white, count in Counter(low).items() if white in WHITES and count > max(2, len(deep) / 10)
        ]
        number = deep.index(saturated[0]) + low.count(saturated[0]) if saturated else number
        if deep[number] > GAP * deep[number - 1] or saturated:
            raise ValueError(
                f"Of {len(deep)} images with 16-bit pixels the darkest {number} reach {deep[number - 1]:,}, all "
                f"others {deep[number]:,} or more, as if two cameras took them: {advice}."
            )
    return (0, white), darkest


def check_pixel_range(pixel_range: Sequence[int]) -> tuple[int, int]:
    """A range as two numbers; raises ValueError unless 0 <= black < white <= 65535."""
    try:
        low, high = (operator.index(value) for value in pixel_range)
    except (TypeError, ValueError):
        low = high = 0
    if not 0 <= low < high <= 65535:
        raise ValueError(
            f"pixel_range must be black and white, whole numbers with 0 <= black < white <= 65535, got {pixel_range}."
        )
    return low, high


def to_input(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels, uint8 or float in [0, 1], as the networks' input in [-1, 1]."""
    return pixels * 2 - 1 if pixels.is_floating_point() else pixels.float() / 127.5 - 1


def resize_map(maps: torch.Tensor, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Maps [B, h, w] to each image's own (height, width): float32 [H, W], bilinear, each by itself."""
    if maps.ndim != 3 or len(maps) != len(sizes):
        raise ValueError(f"The maps must be [B, h, w] with B sizes, not {list(maps.shape)} with {len(sizes)}.")
    return [
        F.interpolate(m[None, None].float(), size=size, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()
        for m, size in zip(maps.detach(), sizes, strict=True)
    ]


def to_pil(x: torch.Tensor, sizes: list[tuple[int, int]] | None = None) -> list[Image.Image]:
    """Tensors [B, 3, S, S], clamped to [-1, 1], as RGB images, resized (bicubic) to (height, width) if given."""
    if x.ndim != 4 or x.shape[1] != 3 or (sizes is not None and len(x) != len(sizes)):
        raise ValueError(f"The tensor must be [B, 3, S, S], with B sizes if any, not {list(x.shape)} with {sizes}.")
    pixels = ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    images = [Image.fromarray(p) for p in pixels]
    if sizes is None:
        return images
    return [
        image.resize((width, height), Image.Resampling.BICUBIC)
        for image, (height, width) in zip(images, sizes, strict=True)
    ]


def paste(original: Image.Image, x: torch.Tensor, keep: torch.Tensor) -> Image.Image:
    """A changed image at the original's size; kept pixels are the original's own, not resized twice.

    Args:
        original: Any size.
        x: What was made of it, [3, S, S] in [-1, 1].
        keep: How much of each pixel is kept, [1, S, S] in [0, 1].
    """
    weight = Image.fromarray((keep[0].float().cpu().numpy() * 255).round().astype(np.uint8))
    weight = weight.resize(original.size, Image.Resampling.BILINEAR)
    return Image.composite(original, to_pil(x[None], [original.size[::-1]])[0], weight)


def overlay(image: Image.Image, map: np.ndarray, vmin: float, vmax: float, opacity: float = 0.55) -> Image.Image:
    """Heat over an image, in the colours of inferno: perceptually uniform, and readable by colour-blind people.

    Opacity rises from 0 at `vmin` and below to `opacity` at `vmax` and above: normal parts stay as they are.

    Raises:
        ValueError: `map` is not a finite [H, W] of the image's size, or not vmin < vmax, both finite.
    """
    if map.shape != (image.height, image.width):
        raise ValueError(f"The map must be finite and {(image.height, image.width)} as the image, not {map.shape}.")
    pixels = np.array(image.convert("RGB"))
    for rows in (slice(top, top + 256) for top in range(0, len(pixels), 256)):  # large pictures take no more memory
        layer = _heat(map[rows], vmin, vmax)
        alpha = opacity * layer[..., 3:]
        pixels[rows] = ((1 - alpha) * pixels[rows].astype(np.float32) + alpha * 255 * layer[..., :3]).round()
    return Image.fromarray(pixels)


def heat(map: np.ndarray, vmin: float, vmax: float) -> Image.Image:
    """The heat that `overlay` lays over an image as a layer of its own: RGBA, transparent at `vmin` and below,
    opaque at `vmax` and above.

    Raises:
        ValueError: `map` is not a finite [H, W], or not vmin < vmax, both finite.
    """
    return Image.fromarray((255 * _heat(map, vmin, vmax)).round().astype(np.uint8))


def _heat(map: np.ndarray, vmin: float, vmax: float) -> np.ndarray:
    """Colours of inferno and an opacity that rises with them, [H, W, 4] in [0, 1]."""
    from matplotlib import colormaps

    if map.ndim != 2 or not np.isfinite(map).all():
        raise ValueError(f"The map must be finite and [H, W], not {list(map.shape)}.")
    if not 0 < vmax - vmin < float("inf"):
        raise ValueError(f"vmin ({vmin}) must be below vmax ({vmax}), both finite.")
    heat = ((map.astype(np.float32) - vmin) / (vmax - vmin)).clip(0, 1)
    colors = colormaps["inferno"](heat)
    colors[..., 3] = heat
    return colors
