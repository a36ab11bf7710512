"""Masks of defects: found beside an image whatever they are called, read whatever they are encoded in, and resized.

What marks a defect is told by the values that a mask holds, never by how much of the image they cover:

- black (0) is good; of two values the brighter one is defect, 0/1 and 0/255 alike;
- few values, small whole numbers and greys in solid areas are kinds of defect; other greys are edges, and defect above
  the middle;
- in a palette black is good, else index 0; colours are defects on black or on white;
- where some of the mask is transparent and the rest of one kind, what is not transparent is defect.

What fits none of these is refused, with what was found.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from scipy.ndimage import label, maximum, maximum_filter, minimum_filter

from ..image_reader import FORMATS, MAX_SIDE, is_deep_colour, read
from .roles import Meaning, mask_stem, meaning_of, part_name

LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".heic", ".heif", ".hif")
NUM_KINDS = 31  # a mask of whole numbers up to here holds kinds of defect, not greys
INVERTED_SHARE = 0.5  # masks that cover more may be inverted
SMALLEST_LINE = 16  # pixels of a faint line of its own
NOISE = 16  # 8-bit greys that compression may leave in black areas

MaskSource = Path | Image.Image


@dataclass(frozen=True)
class Mask:
    """A mask as it was read.

    Attributes:
        pixels: Bool [H, W], true on defects.
        rules: What marks a defect in it; nothing for white on black.
    """

    pixels: np.ndarray
    rules: tuple[str, ...] = ()


class MaskFinder:
    """Finds the mask of an image by its name and, where several bear it, by the folders that both lie in.

    A mask bears its image's name, alone or as `mask_stem` knows it (`000_mask.png`, `000-GT.tif`, `mask_000.jpg`),
    whatever the case of letters, with its image's suffix or without words such as "image" or "NG"; one that bears
    no name ("mask.png") is that of the only image in its folder.

    Args:
        masks: Of defects, all there are.
        images: All there are, good and bad.
        root: Of a data set, or of one of its categories: folders above it tell nothing.
    """

    def __init__(self, masks: Sequence[Path], images: Sequence[Path], root: Path) -> None:
        self.masks, self.root, self.by_stem = masks, root, {}
        in_folder = Counter(image.parent for image in images)
        for mask in masks:
            stems = {mask.stem, mask_stem(mask.stem) or mask.stem}
            if is_mask_alone(mask) and in_folder[mask.parent] == 1:
                stems = {str(mask.parent)}
            for stem in stems:
                self.by_stem.setdefault(stem.casefold(), []).append(mask)

    def __call__(self, image: Path) -> Path | None:
        """The mask that fits best: of one folder `<stem>_mask` goes first, then other words than the name alone, and
        formats that no compression touches. Raises ValueError if two in other folders fit alike."""
        first, second = (self.candidates(image) + [None, None])[:2]
        if second and first.parent != second.parent and self._fit(image, first) == self._fit(image, second):
            raise ValueError(f"{image} has two masks, {first} and {second}: keep one, or name it by --masks.")
        return first

    def candidates(self, image: Path) -> list[Path]:
        """All that may be an image's mask, the best first."""
        keys = dict.fromkeys(
            key.casefold() for key in (image.stem, str(image.parent), image.name, part_name(image.stem))
        )
        near = [mask for key in keys for mask in self.by_stem.get(key, ())]
        found = [mask for mask in near if not self._is_of_another(image, mask)]

        def rank(mask: Path) -> tuple:
            is_other_case = image.stem not in (mask.stem, mask_stem(mask.stem))  # "a" and "A" may be two images
            words = mask.stem.casefold().replace(image.stem.casefold(), "", 1)
            is_lossy = mask.suffix.lower() in LOSSY_SUFFIXES
            return -self._fit(image, mask), is_other_case, words != "_mask", not words, is_lossy, mask.name

        return sorted(found, key=rank)

    def without_image(self, defects: Iterable[Path]) -> list[Path]:
        """The masks that may be those of none of these images, and do not lie where they say that they are of good
        ones."""
        found = {mask for image in defects for mask in self.candidates(image)}
        return [
            mask
            for mask in self.masks
            if mask not in found
            and not any(meaning_of(part).quality == "good" for part in mask.relative_to(self.root).parts[:-1])
        ]

    def _folders(self, path: Path, is_mask: bool = False) -> list[str]:
        parts = path.relative_to(self.root).parts[:-1]
        return [((is_mask and mask_stem(part)) or part).casefold() for part in parts]  # "scratch" of "scratch_masks"

    def _fit(self, image: Path, mask: Path) -> int:
        return sum((Counter(self._folders(image)) & Counter(self._folders(mask, is_mask=True))).values())

    def _is_of_another(self, image: Path, mask: Path) -> bool:
        """Whether a mask lies in a folder that is named for what the image's are not."""
        words = [meaning_of(part) for part in mask.relative_to(self.root).parts[:-1]]
        own = self._folders(image)
        return any(word.mask for word in words) and any(
            (word.quality == "good" or word.kind or (word.unknown and not word.mask)) and folder not in own
            for folder, word in zip(self._folders(mask, is_mask=True), words, strict=True)
        )


def is_mask_alone(path: Path) -> bool:
    """Whether a name says "mask" and not of which image: "mask.png" beside "image.png"."""
    return meaning_of(path.stem) == Meaning(mask=True) and mask_stem(path.stem) is None


def read_mask(
    source: MaskSource | tuple[MaskSource, ...],
    image: MaskSource | np.ndarray,
    threshold: float | None = None,
    name: object = None,
) -> Mask:
    """A mask, or several of which each marks a part.

    Args:
        image: That it belongs to, for its size.
        threshold: Values above it are defect, in the file's own units; by default they are told by what is there.
        name: What errors call the image; by default its path.

    Raises:
        ValueError: It cannot be read, its shape is not its image's, or its values do not tell what is defect; in one
            sentence, which names both.
    """
    parts, (height, width), name = [], upright_size(image), image if name is None else name
    for part in source if isinstance(source, tuple) else (source,):
        called = f"The mask {part.name} of {name}" if isinstance(part, Path) else f"The mask of {name}"
        try:
            with Image.open(part, formats=FORMATS) if isinstance(part, Path) else nullcontext(part) as mask:
                if max(mask.size) > MAX_SIDE or getattr(mask, "n_frames", 1) > 1:
                    raise ValueError(f"{mask.width} x {mask.height} pixels, {getattr(mask, 'n_frames', 1)} pages")
                lossy, is_cut = _is_lossy(mask), is_deep_colour(mask)
                mask = ImageOps.exif_transpose(mask)
        except Exception as error:  # Pillow's parsers raise many types on damaged files
            raise ValueError(f"{called} cannot be read ({error}).") from error
        if abs(mask.width * height - mask.height * width) > max(height, width, *mask.size):  # a pixel of rounding
            raise ValueError(
                f"{called} has {mask.width} x {mask.height} pixels, the image {width} x {height}: they must be of one "
                "shape."
            )
        try:
            levels, rules = _levels(mask, lossy)
            pixels, more = (levels > threshold, ()) if threshold is not None else _defects(levels, lossy)
            if is_cut and not pixels.any():
                raise ValueError("has 16 bits a colour, of which the upper 8 are read, and these are all 0")
        except ValueError as error:
            expected = "expected 0 for good, and for defects one other value or one a kind"
            raise ValueError(f"{called} {error}: {expected}.") from error
        parts.append(Mask(pixels, (*rules, *more)))
    if len(parts) == 1:
        return parts[0]
    largest = max((part.pixels.shape for part in parts), key=np.prod)
    united = np.logical_or.reduce([resize_mask(part.pixels, largest) for part in parts])
    return Mask(united, tuple(dict.fromkeys(rule for part in parts for rule in part.rules)))


def upright_size(image: MaskSource | np.ndarray) -> tuple[int, int]:
    """Height and width of an image as it is looked at; of a file from its header.

    Raises:
        ValueError: It cannot be read.
    """
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    try:
        if isinstance(image, Path):
            with Image.open(image, formats=FORMATS) as opened:
                return upright_size(opened)
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # Pillow's parsers raise many types on damaged files, and know fewer formats
        pixels = read(image)
        return (pixels.height, pixels.width) if isinstance(pixels, Image.Image) else pixels.shape[:2]
    return image.size if turned else image.size[::-1]


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A bool mask [H, W] at `size` = (height, width): where it shrinks, a pixel is defect if any part of it is, so
    that no defect vanishes however thin; where it grows, by nearest neighbour."""
    for axis, length in enumerate(size):
        own = mask.shape[axis]
        places = np.arange(length)
        if length >= own:
            mask = mask.take((2 * places + 1) * own // (2 * length), axis)
            continue
        # How many defect pixels there are before each row that a new one starts or ends in
        before = np.concatenate([np.zeros_like(mask.take([0], axis), np.int32), np.cumsum(mask, axis, np.int32)], axis)
        first, end = places * own // length, -(-(places + 1) * own // length)
        mask = before.take(end, axis) > before.take(first, axis)
    return mask


def _is_lossy(image: Image.Image) -> bool:
    """Whether its file's compression moves values."""
    if image.format != "WEBP":
        return image.format in ("JPEG", "MPO", "AVIF", "HEIF")
    file = getattr(image, "fp", None)
    if file is None:  # decoded already
        return True
    file.seek(0)
    return b"VP8L" not in file.read()  # the chunk of lossless pixels


def _levels(image: Image.Image, lossy: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """One channel [H, W], 0 where the image is good, and what it is if not grey."""
    if image.mode in ("1", "L", "F", "I") or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        return (levels * np.uint8(255) if image.mode == "1" else levels), ()
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa"):
        pixels = np.asarray(image.convert("RGBA"))
        colours, opacity = pixels[..., :3], pixels[..., 3]
        if opacity.min() < opacity.max():
            dark = colours[opacity > 0].max(-1) <= NOISE
            if dark.all() or not dark.any():
                return opacity, ("what is not transparent is defect",)
            colours = (colours * (opacity[..., None] / 255)).round().astype(np.uint8)  # over black
        elif image.mode == "P":
            found = _from_palette(image)
            if found:
                return found
    elif image.mode in ("RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
        colours = np.asarray(image.convert("RGB"))
    else:
        raise ValueError(f"is of mode {image.mode}")
    brightest, darkest = colours.max(-1), colours.min(-1)
    if (brightest - darkest).max() <= NOISE:
        return brightest, ()
    if brightest.min() <= NOISE:
        _check_areas(colours, brightest > NOISE, lossy)
        return brightest, ("colours on black are defects",)
    if darkest.max() >= 255 - NOISE:
        _check_areas(colours, darkest < 255 - NOISE, lossy)
        return 255 - darkest, ("colours on white are defects",)
    codes = colours.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    shown, counts = np.unique(codes, return_counts=True)
    names = [str(tuple(int(shown[i]).to_bytes(3, "big"))) for i in np.argsort(-counts)[:2]]
    raise ValueError(f"has the colours {' and '.join(names)}{' and more' if len(shown) > 2 else ''}, but no black")


def _check_areas(colours: np.ndarray, lit: np.ndarray, lossy: bool) -> None:
    """Raises ValueError if colours [H, W, 3] have no areas of one colour where they are `lit`, as photographs do."""
    spread = maximum_filter(colours, (3, 3, 1)) - minimum_filter(colours, (3, 3, 1))
    uneven = lit & (spread.max(-1) > (NOISE if lossy else 0))
    num_colours = len(np.unique(colours[lit].astype(np.int32) @ np.array([65536, 256, 1])))
    if lossy:
        is_photo = uneven.mean() > 0.15
    else:
        is_photo = num_colours > 1000 and uneven.sum() > 0.95 * lit.sum()
    if is_photo:
        raise ValueError(f"has {num_colours:,} different colours, as a photograph")


def _from_palette(image: Image.Image) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """Of a mask with a palette; None where it is to be read by its colours."""
    indices = np.asarray(image)
    palette = np.zeros((256, 3), np.uint8)
    given = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette[: len(given)] = given
    used = np.flatnonzero(np.bincount(indices.ravel(), minlength=256))
    colours = palette[used]
    is_black, is_white = (colours == 0).all(-1), (colours == 255).all(-1)
    by_index = np.where(indices > 0, np.uint8(255), np.uint8(0)), ("every index of the palette but 0 is defect",)
    if len(used) > 1 and len(np.unique(colours, axis=0)) < len(used) and used[0] == 0:
        return by_index
    if (colours.max(-1) == colours.min(-1)).all() and is_black.any():
        return palette[:, 0][indices], ()
    if is_black.any() and len(used) <= NUM_KINDS:
        return palette.any(-1)[indices] * np.uint8(255), ("colours of the palette but black are defects",)
    if used[0] == 0 and not is_black.any():
        if is_white.any() and (len(used) == 1 or not is_white[0]):
            raise ValueError("has a palette whose index 0 is not black, and white beside it or alone")
        return by_index
    return None


def _defects(levels: np.ndarray, lossy: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which values of one channel [H, W] are defects, and the rule."""
    if levels.dtype.kind == "f" and not np.isfinite(levels).all():
        raise ValueError("has NaN or infinite values")
    values = np.flatnonzero(np.bincount(levels.ravel())) if levels.dtype.itemsize < 4 else np.unique(levels)
    low, high = values[0].item(), values[-1].item()
    is_whole = levels.dtype.kind != "f" or bool((values == values.round()).all())
    if low < 0:
        raise ValueError(f"has negative values, down to {low:g}")
    if lossy and 0 < high <= NUM_KINDS:
        raise ValueError(f"is of values up to {high:g} that lossy compression does not keep apart")
    if low == high:
        if high not in (0, 1, 255, 65535):
            raise ValueError(f"is {high:g} everywhere")
        return levels > 0, ()
    if low > high / 8:
        raise ValueError(f"has no background, its values go from {low:g} to {high:g}")
    if len(values) == 2:
        return levels > low, () if high == 255 else ("the larger of two values is defect",)
    if is_whole and high <= NUM_KINDS:
        return levels > 0, ("each value but 0 is a kind of defect",)
    solid, noise = maximum_filter(levels, 3) == minimum_filter(levels, 3), high * NOISE / 255
    near_black, near_white = (values > 0) & (values <= noise), (values < high) & (values >= high - noise)
    is_noisy = lossy or len(values) > NUM_KINDS or (near_black.any() and near_white.any())
    if is_whole and low == 0 and len(values) <= 4 and not is_noisy:
        # Kinds have areas, or stand alone however thin they are; what only lies around brighter values is their edge
        regions, count = label(levels > 0, np.ones((3, 3)))
        alone = maximum(levels, regions, np.arange(1, count + 1))
        if set(values[1:].tolist()) <= {*np.unique(levels[solid]).tolist(), *np.unique(alone).tolist()}:
            return levels > 0, ("each value but 0 is a kind of defect",)

    # Greys: edges have many, each in few places; kinds of defect have areas
    scale = next((s for s in (1, 255, 65535) if high <= s and (s > 1 or not is_whole)), high)
    middle = scale / 2 if high > scale / 2 else high / 2
    lit = levels > high / 8
    between = np.count_nonzero(lit & ~solid & (levels < (high * 7 / 8 if lossy else high)))
    if len(values) > NUM_KINDS and between > max(0.05 * levels.size, 0.75 * np.count_nonzero(lit)):
        raise ValueError(f"has {len(values)} different values, as a photograph")
    faintest = noise if is_noisy else 0
    faint = levels[solid & (levels > faintest) & (levels <= middle)]
    if faint.size and not lossy:
        return levels > faint.min() / 2, ("greys in solid areas are kinds of defect",)
    rules = () if middle == 127.5 else ("values above the middle are defect",)
    if lossy:  # areas stay nearly even in it, edges do not
        even = maximum_filter(levels, 5) - minimum_filter(levels, 5) <= noise / 2
        areas = levels[even & (levels > 3 * noise) & (levels <= middle)]
        if areas.size >= SMALLEST_LINE:
            return levels > np.percentile(areas, 5) / 2, ("greys in solid areas are kinds of defect",)
        return levels > middle, rules
    regions, count = label(levels > faintest, np.ones((3, 3)))
    sizes, places = np.bincount(regions.ravel()), np.arange(1, count + 1)
    # What is faint all over is no edge of another, but may be crumbs of one
    lines = (maximum(levels, regions, places) <= middle) & (sizes[1:] >= SMALLEST_LINE)
    is_faint = np.concatenate([[False], lines])[regions]
    return (levels > middle) | is_faint, (*rules, *(["faint lines are defects"] if is_faint.any() else []))
