"""Untrusted images in; maps and pictures out. Needs torch, NumPy, Pillow and, for colours, matplotlib only."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

ImageInput = Image.Image | str | Path | np.ndarray | torch.Tensor
PipelineImageInput = ImageInput | Sequence[ImageInput]

# Raster formats only: no EPS, which would start an interpreter.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "I;16", "I;16L", "I;16B", "F")
MAX_SIDE = 10_000


class RADImageProcessor:
    """Takes images of any size to the model's square input.

    Args:
        resolution: Side of that square in pixels. The aspect ratio is not kept: `resize_map` undoes it.
    """

    def __init__(self, resolution: int = 256) -> None:
        self.resolution = resolution

    def preprocess(self, images: PipelineImageInput) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Images as the model's input. Each is resized by itself (bicubic, antialiased), whatever its neighbours.

        Returns:
            Images [B, 3, resolution, resolution], float32 in [-1, 1], and each upright image's own (height, width).

        Raises:
            ValueError, FileNotFoundError: An empty list, or what `decode` refuses.
        """
        images = list(images) if isinstance(images, list | tuple) else [images]
        if not images:
            raise ValueError("The list of images is empty: give at least one image.")
        tensors, sizes = [], []
        for image in images:
            image = decode(image)
            sizes.append((image.height, image.width))
            pixels = np.asarray(image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC))
            tensors.append(torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1))
        return torch.stack(tensors), sizes


def decode(image: ImageInput) -> Image.Image:
    """One image as upright 8-bit RGB, each side 1 to 10,000 pixels.

    Args:
        image: One of
            - a PIL image, or the path of a PNG, JPEG, BMP, TIFF, WEBP, GIF or PPM file. EXIF rotation is applied,
              transparency is composited over white, colour profiles are ignored. 16-bit grey (modes I;16 and I) is
              scaled by the full range 0..65535, whatever range the pixels use; 16-bit colour as Pillow reads it,
              by its upper 8 bits. Mode F must lie in [0, 1]. Animations and multi-page files are refused; of an
              MPO (a JPEG with further pictures, from a phone) the main picture is taken.
            - an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], or a tensor [1, H, W] or [3, H, W],
              of bool, uint8, uint16 (0..65535) or floats in [0, 1].

    Raises:
        FileNotFoundError: The path is not an existing file.
        ValueError: Anything else that cannot be decoded in full, in one sentence.
    """
    if isinstance(image, str | Path):
        return _from_path(image)
    if isinstance(image, Image.Image):
        return _from_pil(image, "The PIL image")
    if isinstance(image, np.ndarray):
        return _from_array(image, "The array")
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"The tensor has the shape {list(image.shape)}, but must be [1, H, W] or [3, H, W].")
        image = image.detach().cpu().permute(1, 2, 0)
        # NumPy knows no bfloat16.
        return _from_array((image.float() if image.is_floating_point() else image).numpy(), "The tensor")
    raise ValueError(
        f"{type(image).__name__} is not an image: give a PIL image, a file path, a NumPy array or a tensor."
    )


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


def _from_path(path: str | Path) -> Image.Image:
    if not os.path.isfile(path):
        if "://" in str(path):
            raise ValueError(f"{path} is a URL, which is not opened: download the image and give its path.")
        raise FileNotFoundError(f"There is no image file at {path}.")
    name = Path(path).name
    try:
        # Reads the header only: the size is checked before any pixel is decoded.
        image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image, or not one of the formats {', '.join(FORMATS)}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels: each side must have 1 to {MAX_SIDE:,} ({error}).") from error
    except Exception as error:  # Pillow's parsers raise many types on damaged headers
        raise ValueError(f"{name} cannot be read as an image ({error}).") from error
    with image:
        return _from_pil(image, name)


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    # An image opened by the caller is decoded only here, hence the same rules as for a path.
    if image.format not in (None, "MPO", *FORMATS):  # Pillow opens a JPEG with further pictures as MPO
        raise ValueError(f"{name} is of the format {image.format}, which is not one of {', '.join(FORMATS)}.")
    _check_size(*image.size, name)
    if image.mode not in MODES:
        raise ValueError(f"{name} has the pixel mode {image.mode}, which is not one of {', '.join(MODES)}.")
    try:
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise many types on damaged pixels
        raise ValueError(f"{name} is truncated or damaged and cannot be decoded ({error}).") from error
    if animated:
        raise ValueError(f"{name} has more than one frame: give a single frame.")
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image)
        if image.mode == "I":
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError(f"{name} has integers outside the 16-bit range 0 to 65535.")
            pixels = pixels.astype(np.uint16)
        if "transparency" in image.info:
            pixels = np.where(pixels == image.info["transparency"], np.uint16(65535), pixels)
        return _from_array(pixels, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"{name} has the shape {list(array.shape)}, but must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]."
        )
    _check_size(array.shape[1], array.shape[0], name)
    kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
    if kind == "b":
        array = array * np.uint8(255)
    elif kind == "u" and bits == 16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif kind == "f":
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has NaN or infinite values: floats must lie in [0, 1].")
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{name} has values from {array.min():g} to {array.max():g}: floats must lie in [0, 1].")
        array = (array.astype(np.float32) * 255).round().astype(np.uint8)
    elif kind != "u" or bits != 8:
        raise ValueError(f"{name} is of the type {array.dtype}, but must be bool, uint8, uint16 or float in [0, 1].")
    return _from_pil(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array), name)


def _check_size(width: int, height: int, name: str) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise ValueError(f"{name} is {width} x {height} pixels, but each side must have 1 to {MAX_SIDE:,} pixels.")
