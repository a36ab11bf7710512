"""One protocol for every data set: images with a label, a category, a kind of defect and, if there is one, a mask;
and what the layouts on disk share."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .masks import Mask, read_mask, resize_mask, upright_size

MIN_IMAGES = 10  # of a category to be trained on


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        image: Path of the image, an image opened but not decoded yet, or its pixels.
        category: What the image shows, "bottle" for example.
        defect: "good" or the kind of defect.
        mask: Ground-truth mask, or several of which each marks a part; None for good images and where none is known.
        mask_threshold: Values of the mask above it are defect: 0 where any value but 0 is, as where they are kinds of
            defect; by default they are told by what is there, as `masks.py` says.
    """

    image: Path | Image.Image | np.ndarray
    category: str
    defect: str = "good"
    mask: Path | Image.Image | tuple[Path, ...] | None = None
    mask_threshold: float | None = None

    @property
    def label(self) -> int:
        """0 for good, 1 for anomalous."""
        return int(self.defect != "good")


class AnomalyDataset(Dataset):
    """Samples of a train or test split; item i is a `Sample`, `mask(i)` its mask.

    Args:
        samples: In a fixed order.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @property
    def categories(self) -> list[str]:
        """Names of the categories, sorted: their positions are the class labels of a unified model."""
        return sorted({sample.category for sample in self.samples})

    def split_holdout(
        self, share: float, seed: int, indices: Sequence[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Indices to train on and to hold out, the same share of each category, in ascending order.

        Args:
            share: To hold out, in [0, 1]: none, or at least two of each category and at most all but two.
            seed: Which ones.
            indices: Those to split, by default all.

        Raises:
            ValueError: A category has fewer than `MIN_IMAGES` images.
        """
        train, holdout = [], []
        for number, category in enumerate(self.categories):
            chosen = range(len(self)) if indices is None else indices
            members = [i for i in chosen if self.samples[i].category == category]
            if len(members) < MIN_IMAGES:
                raise ValueError(
                    f"Category {category!r} has {len(members)} good images to train on; "
                    f"it needs at least {MIN_IMAGES}."
                )
            shuffled = np.random.default_rng([seed, number]).permutation(members).tolist()
            count = min(max(2, round(share * len(members))), len(members) - 2) if share else 0
            holdout += shuffled[:count]
            train += shuffled[count:]
        return sorted(train), sorted(holdout)

    def read_mask(self, index: int) -> Mask | None:
        """The mask of an anomalous image at its own size, which may be empty; None where there is none.

        Raises:
            ValueError: As `masks.read_mask`.
        """
        sample = self[index]
        if sample.mask is None:
            return None
        return read_mask(sample.mask, sample.image, sample.mask_threshold, self.samples[index].image)

    def mask(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray | None:
        """Ground-truth mask as bool [H, W], resized by `resize_mask` to `size` = (height, width) when given.

        All False for a good image. None for an anomalous one without a mask or with an empty one: it counts at image
        level and is left out at pixel level.

        Raises:
            ValueError: As `masks.read_mask`.
        """
        if not self.samples[index].label:
            return np.zeros(size or upright_size(self[index].image), dtype=bool)
        mask = self.read_mask(index)
        if mask is None or not mask.pixels.any():
            return None
        return mask.pixels if size is None else resize_mask(mask.pixels, size)


def evenly(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` positions, evenly spread."""
    if limit is None or limit >= count:
        return list(range(count))
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def check_masks_found(folder: Path, samples: Sequence[Sample], others: Sequence[Path]) -> None:
    """Raises ValueError if one mask is that of two defects, if there are defects without a mask and masks of no image
    (`others`), which belong together though no name says how, or if one of these seems to be part of a mask."""
    defects = [sample for sample in samples if sample.label]
    of: dict[Path, Path] = {}
    for sample in defects:
        for mask in sample.mask if isinstance(sample.mask, tuple) else filter(None, (sample.mask,)):
            if mask in of:
                raise ValueError(
                    f"The mask {mask} bears the name of two defects, {of[mask]} and {sample.image}: keep masks in "
                    "folders like those of their images."
                )
            of[mask] = sample.image
    stems = {(mask.parent, image.stem) for mask, image in of.items()}
    for other in others:
        parts = re.split(r"[-_. ]", other.stem)
        if any((other.parent, other.stem[: len("_".join(parts[:i]))]) in stems for i in range(1, len(parts))):
            raise ValueError(
                f"{other} seems to be one of several masks of an image, of which one is read: unite them in one file."
            )
    without = [sample for sample in defects if not sample.mask]
    if without and others:
        image, mask = (p.relative_to(folder) if p.is_relative_to(folder) else p for p in (without[0].image, others[0]))
        raise ValueError(
            f"{len(without)} of the {len(defects)} defects in {folder} have no mask of their name and kind, such as "
            f"{image}, though {len(others)} masks are of no image, such as {mask}: name masks as their images, "
            "000_mask.png of 000.png, in a folder of the same kind, or take them away."
        )


def pick_categories(source: Path | str, available: list[str], wanted: list[str] | None) -> list[str]:
    """The wanted categories of those that a data set has, by default all.

    Raises:
        ValueError: One does not exist; the message lists those that do.
    """
    missing = sorted(set(wanted or []) - set(available))
    if missing:
        raise ValueError(f"{source} has no category {', '.join(missing)}; it has {', '.join(available)}.")
    return wanted or available


def wrong_layout(root: Path, layout: str, expected: str) -> ValueError:
    """The error that says what a layout expects and what the folder holds."""
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    found = f"{names[:10]}{' and more' if len(names) > 10 else ''}" if names else "nothing"
    return ValueError(f"{root} is not in {layout} layout: expected {expected}, found {found}.")


def path_inside(folder: Path, name: str, source: Path) -> Path:
    """The path that a list names inside a folder.

    Raises:
        ValueError: What `source`, the list, names is no relative path or may lead out of the folder.
    """
    if not isinstance(name, str) or Path(name).anchor or ".." in Path(name).parts:
        raise ValueError(f"{source} names {name!r}, which is no path inside {folder}.")
    return folder / name


def check_files(samples: Iterable[Sample], source: Path) -> None:
    """Raises ValueError with the count and the first name if images or masks that a list names do not exist."""
    paths = (path for sample in samples for path in (sample.image, sample.mask) if path is not None)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{source} names {len(missing)} files that do not exist, the first is {missing[0]}.")
