"""One protocol for every data set: images with a label, a category, a kind of defect and, if there is one, a mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        image: Path of the image, or an image opened but not decoded yet.
        category: What the image shows, "bottle" for example.
        defect: "good" or the kind of defect.
        mask: Path of the ground-truth mask (255 = defect); None for good images and where no mask is known.
    """

    image: Path | Image.Image
    category: str
    defect: str = "good"
    mask: Path | None = None

    @property
    def label(self) -> int:
        """0 for good, 1 for anomalous."""
        return int(self.defect != "good")


class AnomalyDataset(Dataset):
    """Samples of a train or test split; item i is a `Sample`, `mask(i)` its mask.

    Args:
        samples: In a fixed order.
    """

    def __init__(self, samples: Sequence[Sample]):
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @property
    def categories(self) -> list[str]:
        """Names of the categories, sorted: their positions are the class labels of a unified model."""
        return sorted({sample.category for sample in self.samples})

    def mask(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray | None:
        """Ground-truth mask as bool [H, W], resized by nearest neighbour to `size` = (height, width) when given.

        All False for a good image. None for an anomalous one without a mask or with an empty one: it counts at image
        level and is left out at pixel level.
        """
        sample = self.samples[index]
        if sample.mask is None:
            if sample.label:
                return None
            height, width = size or Image.open(sample.image).size[::-1]
            return np.zeros((height, width), dtype=bool)
        with Image.open(sample.mask) as image:
            mask = image.convert("L")
            if size is not None:
                mask = mask.resize(size[::-1], Image.Resampling.NEAREST)
            mask = np.asarray(mask) > 127  # 255 is a defect; JPEG-like fringes around it are not
        return mask if mask.any() else None


def list_images(folder: Path) -> list[Path]:
    """Image files directly in a folder, sorted by name; hidden files are left out."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def subfolders(folder: Path) -> list[Path]:
    """Folders directly in a folder, sorted by name; hidden ones are left out."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
