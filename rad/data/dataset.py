"""One protocol for every data set: images with a label, a category, a kind of defect and, if there is one, a mask;
and what the layouts on disk share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..image_processor import FORMATS

MIN_IMAGES = 10  # of a category to be trained on


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        image: Path of the image, or an image opened but not decoded yet.
        category: What the image shows, "bottle" for example.
        defect: "good" or the kind of defect.
        mask: Ground-truth mask, or several of which each marks a part; None for good images and where none is known.
        mask_threshold: Grey values above it are defect: 127 where 255 is defect and faint fringes around it are not,
            0 where masks hold small numbers such as the kind of defect.
    """

    image: Path | Image.Image
    category: str
    defect: str = "good"
    mask: Path | Image.Image | tuple[Path, ...] | None = None
    mask_threshold: int = 127

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

    def mask(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray | None:
        """Ground-truth mask as bool [H, W], resized by nearest neighbour to `size` = (height, width) when given.

        All False for a good image. None for an anomalous one without a mask or with an empty one: it counts at image
        level and is left out at pixel level.

        Raises:
            ValueError: A mask cannot be read.
        """
        sample = self[index]
        if not sample.label:
            if size is None and isinstance(sample.image, Path):
                with Image.open(sample.image, formats=FORMATS) as image:
                    size = image.size[::-1]
            return np.zeros(sample.image.size[::-1] if size is None else size, dtype=bool)
        if sample.mask is None:
            return None
        parts = []
        for part in sample.mask if isinstance(sample.mask, tuple) else (sample.mask,):
            try:
                mask = (Image.open(part, formats=FORMATS) if isinstance(part, Path) else part).convert("L")
            except Exception as error:  # Pillow's parsers raise many types on damaged files
                raise ValueError(f"A mask of {self.samples[index].image} cannot be read ({error}).") from error
            if size is not None:
                mask = mask.resize(size[::-1], Image.Resampling.NEAREST)
            parts.append(np.asarray(mask) > sample.mask_threshold)
        mask = np.logical_or.reduce(parts)
        return mask if mask.any() else None


def find_mask(folder: Path, stem: str) -> Path | None:
    """`<stem>_mask` or `<stem>` in a folder of masks, as .png or .bmp, whatever the image's own suffix."""
    candidates = (folder / f"{stem}{end}{suffix}" for end in ("_mask", "") for suffix in (".png", ".bmp"))
    return next((path for path in candidates if path.is_file()), None)


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
