"""Data sets: `load_dataset` gives the train or test split of any supported layout as an `AnomalyDataset`."""

from pathlib import Path

from .dataset import IMAGE_SUFFIXES, AnomalyDataset, Sample
from .folder import load_folder
from .mtd import load_mtd
from .mvtec import load_mvtec

DATASET_FORMATS = {"mvtec": load_mvtec, "mtd": load_mtd, "folder": load_folder}


def load_dataset(
    root: str | Path, dataset_format: str = "mvtec", split: str = "train", categories: list[str] | None = None
) -> AnomalyDataset:
    """Lists a data set on disk; images are decoded later, by `RADImageProcessor`.

    Args:
        root: Folder of the data set.
        dataset_format: "mvtec" (MVTec-AD's layout), "mtd" (Magnetic Tile Defects) or "folder" (good images only).
        split: "train" (good images only) or "test".
        categories: Names to keep; by default all.

    Raises:
        ValueError: Unknown format or split, another layout, a category that does not exist, or no images.
        FileNotFoundError: `root` is no folder.
    """
    if dataset_format not in DATASET_FORMATS:
        raise ValueError(f"dataset_format must be one of {', '.join(DATASET_FORMATS)}, got {dataset_format!r}.")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"The data folder {root} does not exist.")
    samples = DATASET_FORMATS[dataset_format](root, split, categories)
    if split == "train":
        samples = [sample for sample in samples if not sample.label]
    if not samples:
        raise ValueError(f"No images for split {split!r} in {root}; accepted files: {', '.join(IMAGE_SUFFIXES)}.")
    return AnomalyDataset(samples)


__all__ = ["DATASET_FORMATS", "IMAGE_SUFFIXES", "AnomalyDataset", "Sample", "load_dataset"]
