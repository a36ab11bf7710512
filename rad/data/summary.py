"""What was read of a data set, to be looked at before hours of training."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..image_processor import FULL_SCALE
from ..image_reader import FORMATS, ImageInput, is_deep_colour, name_of, peak, read, white_of
from .dataset import AnomalyDataset
from .listing import list_files

MAX_HEADERS = 500  # images whose size and pixels are looked at
MAX_ROWS = 40  # folders that are named
MAX_LEFT_OUT = 10  # likewise of what is left out
BITS = {"1": "1-bit", "F": "float grey", "L": "8-bit grey", "P": "8-bit palette"}


@dataclass(frozen=True)
class DataSummary:
    """What was read as what. Names are relative to the data folder.

    Attributes:
        name: Of the data folder or the Hub's data set.
        roles: Number of images by role ("train, good", "test, dent") and folder.
        masks: How many defects have a mask file, and how many have none.
        sizes: How many images have which (width, height), of those looked at.
        pixels: Likewise what their pixels are, "8-bit colour" for example.
        num_looked_at: Images that were looked at and could be read.
        unreadable: Names of those that could not.
        peak: The largest number in 16-bit pictures that were looked at; None where there are none.
        pixel_range: The numbers that become black and white, where it is known.
        left_out: How many files were left out, by the reason.
        notes: What else there is to say, in sentences.
    """

    name: str
    roles: Mapping[tuple[str, str], int]
    masks: tuple[int, int]
    sizes: Counter[tuple[int, int]]
    pixels: Counter[str]
    num_looked_at: int
    left_out: Mapping[str, int]
    notes: list[str] = field(default_factory=list)
    unreadable: tuple[str, ...] = ()
    peak: int | None = None
    pixel_range: tuple[int, int] | None = None

    def facts(self) -> dict[str, str]:
        """What is told below the table of roles, by its name."""
        num_images, facts = sum(self.roles.values()), {}
        if sum(self.masks):
            facts["Masks"] = f"{self.masks[0]} of {sum(self.masks)} defects have a file"
        looked = "" if self.num_looked_at == num_images else f" (of {self.num_looked_at} images looked at)"
        if self.sizes:
            (width, height), count = self.sizes.most_common(1)[0]
            others = f" in {count} images, {len(self.sizes)} sizes in all" if len(self.sizes) > 1 else ""
            facts["Size"] = f"{width} x {height} pixels{others}{looked}"
            facts["Pixels"] = ", ".join(f"{kind} ({n})" for kind, n in self.pixels.most_common()) + looked
        told = []
        if self.peak is not None:
            told.append(
                f"values up to {self.peak:,}, as of {white_of(self.peak).bit_length()} bits, in 16-bit pictures"
            )
        if self.pixel_range not in (None, FULL_SCALE):
            told.append("{:,} is black, {:,} white".format(*self.pixel_range))
        if told:
            facts["Range"] = "; ".join(told)
        if self.unreadable:
            facts["Unreadable"] = f"{len(self.unreadable)} of the images looked at, such as {self.unreadable[0]}"
        if self.left_out:
            facts["Left out"] = "; ".join(f"{reason} ({count:,})" for reason, count in self.left_out.items())
        return facts

    def sentences(self) -> list[str]:
        """The facts and the notes."""
        return [*(f"{name}: {fact}." for name, fact in self.facts().items()), *self.notes]

    def rows(self) -> list[tuple[str, str, str]]:
        """Number of images, role and folder of each row; the rest is summed up in the last."""
        rows = sorted(self.roles.items(), key=lambda item: (not item[0][0].startswith("train"), item[0]))
        rest = rows[MAX_ROWS:]
        found = [(f"{count:,}", role, folder) for (role, folder), count in rows[:MAX_ROWS]]
        return found + ([(f"{sum(n for _, n in rest):,}", "", f"in {len(rest)} more folders")] if rest else [])

    def to_text(self) -> str:
        """Lines for a terminal."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"  {n.rjust(widths[0])}  {role.ljust(widths[1])}  {folder}" for n, role, folder in rows]
        told = [f"  {sentence}" for sentence in self.sentences()]
        return "\n".join([f"What was read of {self.name}:", *lines, *told])

    def to_markdown(self) -> str:
        """A table and a list, for a model card."""
        rows = [[cell.replace("|", "/") for cell in row] for row in self.rows()]
        table = [f"| {n} | {role} | `{folder}` |" for n, role, folder in rows]
        told = [f"- {sentence}" for sentence in self.sentences()]
        return "\n".join(["| images | role | folder |", "|---|---|---|", *table, "", *told])


def summarise(
    splits: Mapping[str, AnomalyDataset], root: Path | None = None, name: str = "", notes: list[str] | None = None
) -> DataSummary:
    """Sums up what was read; opens up to `MAX_HEADERS` images, evenly picked, and decodes those of 16 bits.

    Args:
        splits: "train" and "test", or one of them.
        root: The data folder, whose other files are told as left out; None for data sets of the Hub.
        name: Of the data set, by default the folder's.
        notes: Sentences to be told beside it, for example why there is no test split.
    """
    name = name or (root.resolve().name if root else "")
    samples = [(split, i, sample) for split, data in splits.items() for i, sample in enumerate(data.samples)]
    roles: Counter[tuple[str, str]] = Counter()
    for split, _, sample in samples:
        inside = root is not None and isinstance(sample.image, Path) and sample.image.is_relative_to(root)
        folder = sample.image.relative_to(root).parent.as_posix() if inside else sample.category
        roles[f"{split}, {sample.defect}", "the folder itself" if folder == "." else folder] += 1
    defects = [(split, i) for split, i, sample in samples if sample.label]
    with_mask = sum(splits[split][i].mask is not None for split, i in defects)

    step = max(1, -(-len(samples) // MAX_HEADERS))
    picked = [splits[split][i].image for split, i, _ in samples[::step]]
    names = [name_of(image) for image in picked]  # not where the folder lies: the summary is published
    names = [path.removeprefix(f"{root}/") for path in names]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_look, picked))
    looks = [look for look in found if look]
    return DataSummary(
        name=name,
        roles=roles,
        masks=(with_mask, len(defects) - with_mask),
        sizes=Counter(size for size, _, _ in looks),
        pixels=Counter(kind for _, kind, _ in looks),
        num_looked_at=len(looks),
        left_out={} if root is None else _left_out(root, splits),
        notes=notes or [],
        unreadable=tuple(path for path, look in zip(names, found, strict=True) if look is None),
        peak=max((highest for *_, highest in looks if highest is not None), default=None),
    )


def describe(image: Path | Image.Image) -> str:
    """What one image is: "384 x 384 pixels, 8-bit colour".

    Raises:
        FileNotFoundError, ValueError: As `image_reader.read`.
    """
    (width, height), kind, _ = look_at(image)
    return f"{width} x {height} pixels, {kind}"


def _look(image: ImageInput) -> tuple[tuple[int, int], str, int | None] | None:
    """As `look_at`; None where it cannot be read, of which who decodes it says why."""
    try:
        return look_at(image)
    except (ValueError, OSError):
        return None


def look_at(image: ImageInput) -> tuple[tuple[int, int], str, int | None]:
    """Width and height of an image, what its pixels are, and the largest number of 16-bit ones; one of 8 bits is not
    decoded.

    Raises:
        FileNotFoundError, ValueError: As `image_reader.read`.
    """
    highest = peak(image)
    if isinstance(image, Image.Image):
        return image.size, _kind(image), highest
    try:
        with Image.open(image, formats=FORMATS) as opened:
            if not getattr(opened, "is_animated", False):
                return opened.size, _kind(opened), highest
        pixels = read(image)  # of a picture with thumbnails
    except Exception:  # a format that Pillow does not know, or no image
        pixels = read(image)
    if isinstance(pixels, Image.Image):
        return pixels.size, _kind(pixels), highest
    kind = "16-bit" if pixels.dtype == np.uint16 else "float"
    return pixels.shape[1::-1], f"{kind} {'grey' if pixels.shape[2] == 1 else 'colour'}", highest


def _kind(image: Image.Image) -> str:
    is_colour = image.mode.startswith(("RGB", "YCbCr", "CMYK"))
    alpha = " with alpha" if image.mode in ("LA", "PA", "RGBA") else ""
    if image.mode.startswith("I") or is_deep_colour(image):
        return f"16-bit {'colour' if is_colour else 'grey'}{alpha}"
    return ("8-bit colour" if is_colour else BITS.get(image.mode.removesuffix("A"), f"mode {image.mode}")) + alpha


def _left_out(root: Path, splits: Mapping[str, AnomalyDataset]) -> dict[str, int]:
    """How many files of a folder are part of no split, by the reason."""
    listing, used = list_files(root), set()
    for data in splits.values():
        for sample in data.samples:
            masks = sample.mask if isinstance(sample.mask, tuple) else (sample.mask,)
            used.update(path for path in (sample.image, *masks) if isinstance(path, Path))
    unused = [path for path in listing.images if path not in used]
    if unused:
        real = {path.resolve() for path in used}
        unused = [path for path in unused if path.resolve() not in real]
    left_out = {reason: len(paths) for reason, paths in listing.left_out.items()}
    folders = Counter(path.relative_to(root).parent.as_posix() for path in unused)
    if unused:
        named = ["the folder itself" if f == "." else f for f, _ in folders.most_common(MAX_LEFT_OUT)]
        more = [f"{len(folders) - len(named)} more folders"] if len(folders) > len(named) else []
        reason = f"images of no split or category asked for, or masks of no defect, in {', '.join(named + more)}"
        left_out[reason] = len(unused)
    return left_out
