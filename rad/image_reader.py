"""Untrusted images in: files, bytes, PIL images, arrays and tensors as pixels with the numbers that they hold.

Needs torch, NumPy and Pillow; 16-bit colour needs tifffile and imagecodecs, HEIC needs pillow-heif, which are extras.
"""

import importlib
import io
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ImageInput = Image.Image | str | Path | bytes | BinaryIO | np.ndarray | torch.Tensor
PipelineImageInput = ImageInput | Iterable[ImageInput]

# Raster formats only: no EPS, which would start an interpreter.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "I;16", "I;16L", "I;16B", "F")
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "F")  # of more than 8 bits
MAX_SIDE = 10_000
MAX_PAGES = 16  # of a TIFF of which one is the picture
SUBFILE_TYPE, OLD_SUBFILE_TYPE, BITS, PHOTOMETRIC = 254, 255, 258, 262  # tags of TIFF
WHITES = (255, 1023, 4095, 16383, 65535)  # the largest number of 8, 10, 12, 14 and 16 bits
EXTRAS = {"deep": "tifffile imagecodecs", "heic": "pillow-heif"}  # as in pyproject.toml
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read(image: ImageInput) -> Image.Image | np.ndarray:
    """One image upright, each side 1 to 10,000 pixels, with no more loss than its own format has.

    Args:
        image: One of
            - a PIL image, or the path, the bytes or the open binary file of a PNG, JPEG, BMP, TIFF, WEBP, GIF or PPM,
              or of a HEIC where pillow-heif is installed. EXIF rotation is applied, transparency is composited over
              white, colour profiles are ignored. 16-bit colour needs tifffile and imagecodecs. Mode F must lie in
              [0, 1]. Animations and multi-page files are refused; of an MPO (a JPEG with further pictures, from a
              phone) and of a TIFF with thumbnails the main picture is taken. TIFFs in which white is 0 are turned.
            - an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], or a tensor [1, H, W] or [3, H, W],
              of bool, uint8, uint16 (0..65535) or floats in [0, 1].

    Returns:
        Of a picture of up to 8 bits an RGB image; else an array [H, W, 1 or 3], uint16 with the file's own numbers,
        whatever part of 0..65535 they use, or float32 in [0, 1].

    Raises:
        FileNotFoundError: The path is not an existing file.
        ValueError: Anything else that cannot be decoded in full, or needs an extra that is not installed, in one
            sentence.
    """
    name = name_of(image)
    if isinstance(image, str | Path):
        path = Path(image).expanduser()
        if not path.is_file():
            if "://" in str(image):
                raise ValueError(f"{image} is a URL, which is not opened: download the image and give its path.")
            raise FileNotFoundError(f"There is no image file at {path}.")
        with path.open("rb") as file:
            return _from_file(file, name)
    if isinstance(image, bytes):
        return _from_file(io.BytesIO(image), name)
    if isinstance(image, Image.Image):
        return _from_pil(image, name)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"The tensor has the shape {list(image.shape)}, but must be [1, H, W] or [3, H, W].")
        image = image.detach().cpu().permute(1, 2, 0)
        # NumPy knows no bfloat16.
        return _from_array((image.float() if image.is_floating_point() else image).numpy(), name)
    if callable(getattr(image, "read", None)):
        return _from_file(image, name)
    raise ValueError(
        f"{type(image).__name__} is not an image: give a PIL image, a file's path, bytes or open file, a NumPy array "
        "or a tensor."
    )


def decode(image: ImageInput, pixel_range: Sequence[int] | None = None) -> Image.Image:
    """One image as upright 8-bit RGB, to be looked at; what networks see comes from `RADImageProcessor`.

    Args:
        image: What `read` accepts.
        pixel_range: The numbers of a 16-bit picture that become black and white; by default 0 and the largest of 8,
            10, 12, 14 or 16 bits, whichever is the first that holds all of its numbers.

    Raises:
        FileNotFoundError, ValueError: As `read`.
    """
    pixels = read(image)
    if isinstance(pixels, Image.Image):
        return pixels
    if pixels.dtype == np.uint16:
        low, high = pixel_range or (0, white_of(int(pixels.max())))
        levels = (np.arange(65536, dtype=np.float64) - low) / (high - low)
        pixels = (levels.clip(0, 1) * 255).round().astype(np.uint8)[pixels]
    else:
        pixels = (pixels * 255).round().astype(np.uint8)
    return Image.fromarray(pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels)


def peak(image: ImageInput) -> int | None:
    """The largest number in a 16-bit picture; None for all others, of which no pixel is decoded.

    Raises:
        FileNotFoundError, ValueError: As `read`.
    """
    if isinstance(image, str | Path):
        try:
            with Image.open(Path(image).expanduser(), formats=FORMATS) as header:
                several = getattr(header, "is_animated", False)  # of which another one may be the picture
                if header.mode not in DEEP_MODES and not is_deep_colour(header) and not several:
                    return None
        except Exception:  # `read` says what is wrong, if anything is
            pass
    elif isinstance(image, Image.Image) and image.mode not in DEEP_MODES and not is_deep_colour(image):
        return None
    pixels = read(image)
    return int(pixels.max()) if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint16 else None


def white_of(peak: int) -> int:
    """The largest number of the first of 8, 10, 12, 14 or 16 bits that hold this one."""
    return next(white for white in WHITES if peak <= white)


def name_of(image: Any) -> str:
    """What to call an image in a sentence."""
    if isinstance(image, str | Path):
        return str(image)  # in a data set `000.png` alone says nothing
    kinds = {bytes: "The picture", Image.Image: "The PIL image", np.ndarray: "The array", torch.Tensor: "The tensor"}
    return next((name for kind, name in kinds.items() if isinstance(image, kind)), "The file")


def _from_file(file: BinaryIO, name: str) -> Image.Image | np.ndarray:
    try:
        # Reads the header only: the size is checked before any pixel is decoded.
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        file.seek(0)
        start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
            return _from_heif(file, name)
        if start[:4] in TIFF_MAGIC:  # of a kind that Pillow does not know, such as float colour
            return _from_array(_deep_pixels(file, "TIFF", name), name)
        raise ValueError(f"{name} is not an image, or not one of the formats {', '.join(FORMATS)}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels: each side must have 1 to {MAX_SIDE:,} ({error}).") from error
    except Exception as error:  # Pillow's parsers raise many types on damaged headers
        raise ValueError(f"{name} cannot be read as an image ({error}).") from error
    with image:
        return _from_pil(image, name)


def _from_heif(file: BinaryIO, name: str) -> Image.Image | np.ndarray:
    heif = _extra("pillow_heif", "heic", f"{name} is a HEIC picture")
    file.seek(0)
    try:
        image = heif.open_heif(file)  # its main picture; the header only
        _check_size(*image.size, name)
        return _from_pil(image.to_pillow(), name)
    except (ValueError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{name} is truncated or damaged and cannot be decoded ({error}).") from error


def _from_pil(image: Image.Image, name: str) -> Image.Image | np.ndarray:
    # An image opened by the caller is decoded only here, hence the same rules as for a path.
    if image.format not in (None, "MPO", *FORMATS):  # Pillow opens a JPEG with further pictures as MPO
        raise ValueError(f"{name} is of the format {image.format}, which is not one of {', '.join(FORMATS)}.")
    try:
        page = _main_page(image)
    except Exception as error:  # Pillow's parsers raise many types on damaged pages
        raise ValueError(f"{name} is truncated or damaged and cannot be decoded ({error}).") from error
    if page is None:
        raise ValueError(f"{name} has more than one frame: give a single frame.")
    _check_size(*image.size, name)
    if image.mode not in MODES:
        raise ValueError(f"{name} has the pixel mode {image.mode}, which is not one of {', '.join(MODES)}.")
    try:
        deep = image.fp if is_deep_colour(image) else None
        tags = image.tag_v2 if image.format == "TIFF" else {}
        is_inverted, bits = tags.get(PHOTOMETRIC) == 0, max(tags.get(BITS, (16,)))
        if deep is None:
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise many types on damaged pixels
        raise ValueError(f"{name} is truncated or damaged and cannot be decoded ({error}).") from error
    if deep is not None:
        pixels = _deep_pixels(deep, image.format, name, page)
        return _from_array(_upright(pixels, image.getexif().get(0x0112, 1)), name)
    if image.mode in DEEP_MODES:
        pixels = np.asarray(image)
        if is_inverted:  # of 8 bits Pillow has turned them
            pixels = 1 - pixels if image.mode == "F" else 2**bits - 1 - pixels.astype(np.int64)
            pixels = pixels.astype(np.uint16) if image.mode.startswith("I;16") else pixels
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


def _main_page(image: Image.Image) -> int | None:
    """Turns a file that is not decoded yet to its one picture, and says which of its frames that is; None where it has
    several.

    A TIFF's thumbnails are those that say so, and up to two pages of half the side or less that show the same.
    """
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return 0
    if image.format != "TIFF" or not image.tile:  # decoded by the caller: who knows which page is meant
        return None
    sizes, full = [], []
    try:
        for page in range(MAX_PAGES + 1):  # not `n_frames`, which follows links through all of a hostile file
            image.seek(page)
            sizes.append(image.size)
            if not image.tag_v2.get(SUBFILE_TYPE, 0) & 1 and image.tag_v2.get(OLD_SUBFILE_TYPE) != 2:
                full.append(page)
    except EOFError:
        pass
    main = max(full, key=lambda page: sizes[page][0] * sizes[page][1], default=0)
    others = [page for page in full if page != main]
    is_small = all(2 * sizes[page][0] <= sizes[main][0] for page in others)
    if len(sizes) > MAX_PAGES or len(others) > 2 or not is_small or max(sizes[main]) > MAX_SIDE:
        return None
    if others:
        shown = [_look_of(image, page) for page in (main, *others)]
        one_shape = all(
            abs(sizes[page][0] * sizes[main][1] - sizes[page][1] * sizes[main][0]) <= max(sizes[main])
            for page in others
        )
        if not one_shape or any(np.abs(look - shown[0]).mean() > 0.1 for look in shown[1:]):
            return None
    image.seek(0 if main else 1)  # so that the page is as it was opened, with nothing of it decoded
    image.seek(main)
    return main


def _look_of(image: Image.Image, page: int) -> np.ndarray:
    """A page in 16 x 16 greys from 0 to 1, whatever its own range."""
    image.seek(page)
    pixels = np.asarray(image.convert("F").resize((16, 16), Image.Resampling.BOX))
    return (pixels - pixels.min()) / max(float(pixels.max() - pixels.min()), 1e-6)


def _from_array(array: np.ndarray, name: str) -> Image.Image | np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"{name} has the shape {list(array.shape)}, but must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; of "
            "several images [B, H, W, C]."
        )
    _check_size(array.shape[1], array.shape[0], name)
    kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
    if kind == "b":
        array = array * np.uint8(255)
    elif kind == "f":
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has NaN or infinite values: floats must lie in [0, 1].")
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{name} has values from {array.min():g} to {array.max():g}: floats must lie in [0, 1].")
        return _over_white(array.astype(np.float32), 1)
    elif kind == "u" and bits == 16:
        return _over_white(array.astype(np.uint16), 65535)
    elif kind != "u" or bits != 8:
        raise ValueError(f"{name} is of the type {array.dtype}, but must be bool, uint8, uint16 or float in [0, 1].")
    return _from_pil(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array), name)


def _over_white(pixels: np.ndarray, white: int) -> np.ndarray:
    """Pixels [H, W, 1, 3 or 4]; a fourth channel is opacity."""
    if pixels.shape[2] != 4:
        return pixels
    opacity = pixels[..., 3:] / np.float64(white)
    mixed = opacity * pixels[..., :3] + (1 - opacity) * white
    return (mixed.round() if white > 1 else mixed).astype(pixels.dtype)


# -- what Pillow reads by its upper 8 bits, or not at all -------------------------------------------------------------


def is_deep_colour(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet has pixels of more than 8 bits and no mode of Pillow's for them."""
    if image.mode in DEEP_MODES or not getattr(image, "tile", None):
        return False
    settings = image.tile[0][3]
    settings = settings if isinstance(settings, tuple) else (settings,)
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS, (1,))) > 8
    if image.format == "PPM":
        return max(value for value in (0, *settings) if isinstance(value, int)) > 255
    return any(isinstance(value, str) and ";16" in value for value in settings)


def _deep_pixels(file: BinaryIO, format: str | None, name: str, number: int | None = None) -> np.ndarray:
    """Pixels [H, W] or [H, W, 3 or 4] of a TIFF or PNG, as they are stored but for white, which is never 0; of a TIFF
    from the page of this number, by default the only one that is no thumbnail."""
    if format not in ("TIFF", "PNG"):
        raise ValueError(f"{name} is a {format} of 16-bit colour, which is read of PNG and TIFF files only.")
    file.seek(0)
    reader = _extra("tifffile" if format == "TIFF" else "imagecodecs", "deep", f"{name} has pixels of 16-bit colour")
    try:
        if format == "PNG":  # its size is that of the header, which has been checked
            pixels = reader.png_decode(file.read())
        else:
            with reader.TiffFile(file) as tiff:
                pages = islice(tiff.pages, MAX_PAGES)
                full = [page for page in pages if not page.subfiletype & 1] or [tiff.pages[0]]
                page = full[0] if number is None else tiff.pages[number]
                _check_size(page.imagewidth, page.imagelength, name)
                if (number is None and len(full) > 1) or page.imagedepth > 1:
                    raise ValueError("it has more than one page")
                if page.samplesperpixel > 4 or page.bitspersample > 64:  # before memory is set aside for them
                    raise ValueError(f"it has {page.samplesperpixel} samples of {page.bitspersample} bits a pixel")
                pixels = page.asarray()
                if page.planarconfig == 2 and pixels.ndim == 3:
                    pixels = pixels.transpose(1, 2, 0)
                if page.photometric == 0:
                    if pixels.dtype.kind not in "uf":
                        raise ValueError("white is 0 in it and numbers are signed")
                    grey = pixels[..., :1] if pixels.ndim == 3 else pixels  # beside it there is opacity
                    grey[...] = (1 if pixels.dtype.kind == "f" else 2**page.bitspersample - 1) - grey
    except Exception as error:  # so many types on damaged pixels
        raise ValueError(f"{name} is truncated or damaged and cannot be decoded ({error}).") from error
    if pixels.ndim == 3 and pixels.shape[2] == 2:  # grey and opacity
        pixels = pixels[..., [0, 0, 0, 1]]
    return pixels


def _extra(module: str, extra: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{what}: reading it needs `pip install {EXTRAS[extra]}` (RAD's extra [{extra}]).") from error


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What `ImageOps.exif_transpose` does, of an array."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _check_size(width: int, height: int, name: str) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise ValueError(f"{name} is {width} x {height} pixels, but each side must have 1 to {MAX_SIDE:,} pixels.")
