"""What was read of a data set, to be looked at before hours of training."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..image_reader import FORMATS
from .dataset import AnomalyDataset
from .listing import list_files

MAX_HEADERS = 500  # images whose size and pixels are looked at
MAX_ROWS = 40  # folders that are named
MAX_LEFT_OUT = 10  # likewise of what is left out
BITS = {"1": "1-bit", "I": "32-bit grey", "F": "float grey", "L": "8-bit grey", "P": "8-bit palette"}


@dataclass(frozen=True)
class DataSummary:
    """What was read as what. Names are relative to the data folder.

    Attributes:
        name: Of the data folder or the Hub's data set.
        roles: Number of images by role ("train, good", "test, dent") and folder.
        masks: How many defects have a mask, and how many have none.
        sizes: How many images have which (width, height), of those looked at.
        pixels: Likewise what their pixels are, "8-bit colour" for example.
        num_looked_at: Images whose header was read.
        left_out: How many files were left out, by the reason.
        notes: What else there is to say.
    """

    name: str
    roles: Mapping[tuple[str, str], int]
    masks: tuple[int, int]
    sizes: Counter[tuple[int, int]]
    pixels: Counter[str]
    num_looked_at: int
    left_out: Mapping[str, int]
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, str]:
        """The lines below the table of roles, by what they tell."""
        num_images, facts = sum(self.roles.values()), {}
        if sum(self.masks):
            facts["Masks"] = f"{self.masks[0]} of {sum(self.masks)} defects have one"
        looked = "" if self.num_looked_at == num_images else f" (of {self.num_looked_at} images looked at)"
        if self.sizes:
            (width, height), count = self.sizes.most_common(1)[0]
            others = f" in {count} images, {len(self.sizes)} sizes in all" if len(self.sizes) > 1 else ""
            facts["Size"] = f"{width} x {height} pixels{others}{looked}"
            facts["Pixels"] = ", ".join(f"{kind} ({n})" for kind, n in self.pixels.most_common()) + looked
        if self.left_out:
            facts["Left out"] = "; ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return facts | {"Note": " ".join(self.notes)} if self.notes else facts

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
        facts = [f"  {name}: {fact}." for name, fact in self.facts().items()]
        return "\n".join([f"What was read of {self.name}:", *lines, *facts])

    def to_markdown(self) -> str:
        """A table and a list, for a model card."""
        rows = [[cell.replace("|", "/") for cell in row] for row in self.rows()]
        table = [f"| {n} | {role} | `{folder}` |" for n, role, folder in rows]
        facts = [f"- {name}: {fact}." for name, fact in self.facts().items()]
        return "\n".join(["| images | role | folder |", "|---|---|---|", *table, "", *facts])


def summarise(
    splits: Mapping[str, AnomalyDataset], root: Path | None = None, name: str = "", notes: list[str] | None = None
) -> DataSummary:
    """Sums up what was read; opens headers of up to `MAX_HEADERS` images, evenly picked, and decodes none.

    Args:
        splits: "train" and "test", or one of them.
        root: The data folder, whose other files are told as left out; None for data sets of the Hub.
        name: Of the data set, by default the folder's.
        notes: To be told beside it, for example why there is no test split.
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
    picked = samples[::step]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda each: _header(splits[each[0]][each[1]].image), picked))
    headers = [header for header in found if header]
    left_out = {} if root is None else _left_out(root, splits)
    return DataSummary(
        name=name,
        roles=roles,
        masks=(with_mask, len(defects) - with_mask),
        sizes=Counter(size for size, _ in headers),
        pixels=Counter(kind for _, kind in headers),
        num_looked_at=len(headers),
        left_out=left_out,
        notes=notes or [],
    )


def describe(image: Path | Image.Image) -> str:
    """What one image is, as its header says: "384 x 384 pixels, 8-bit colour"."""
    header = _header(image)
    return f"{header[0][0]} x {header[0][1]} pixels, {header[1]}" if header else "no header that Pillow reads"


def _header(image: Path | Image.Image) -> tuple[tuple[int, int], str] | None:
    """Width and height of an image and what its pixels are; None where that cannot be read."""
    if isinstance(image, Image.Image):
        return image.size, _pixels(image)
    try:
        with Image.open(image, formats=FORMATS) as opened:
            return opened.size, _pixels(opened)
    except Exception:  # who decodes it says why
        return None


def _pixels(image: Image.Image) -> str:
    is_colour = image.mode.startswith(("RGB", "YCbCr"))
    alpha = " with alpha" if image.mode in ("LA", "PA", "RGBA") else ""
    if image.mode.startswith("I;16") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        return f"16-bit {'colour' if is_colour else 'grey'}{alpha}"
    kind = "8-bit colour" if is_colour else BITS.get(image.mode.removesuffix("A"), f"mode {image.mode}")
    return kind + alpha


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
        named = [f"{n} in {'the folder itself' if f == '.' else f}" for f, n in folders.most_common(MAX_LEFT_OUT)]
        more = [f"{len(folders) - len(named)} more folders"] if len(folders) > len(named) else []
        left_out[f"images of no split or category asked for, or masks of no defect ({', '.join(named + more)})"] = len(
            unused
        )
    return left_out
