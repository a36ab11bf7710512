"""Data sets: `load_dataset` gives the train or test split of any supported layout as an `AnomalyDataset`,
`load_hub_dataset` that of the Hub's."""

from pathlib import Path

from .dataset import IMAGE_SUFFIXES, AnomalyDataset, Sample
from .folder import load_folder
from .hub import load_hub_dataset
from .mtd import load_mtd
from .mvtec import load_mvtec

DATASET_FORMATS = {"mvtec": load_mvtec, "mtd": load_mtd, "folder": load_folder}


def load_dataset(
    root: str | Path, dataset_format: str = "auto", split: str = "train", categories: list[str] | None = None
) -> AnomalyDataset:
    """Lists a data set on disk; images are decoded later, by `RADImageProcessor`.

    Args:
        root: Folder of the data set.
        dataset_format: "mvtec" (MVTec-AD's layout), "mtd" (Magnetic Tile Defects), "folder" (good images only), or
            "auto" for the one that the folder looks like.
        split: "train" (good images only) or "test".
        categories: Names to keep; by default all.

    Raises:
        ValueError: Unknown format or split, another layout, a category that does not exist, or no images.
        FileNotFoundError: `root` is no folder.
    """
    if dataset_format not in ("auto", *DATASET_FORMATS):
        raise ValueError(
            f"dataset_format must be auto or one of {', '.join(DATASET_FORMATS)}, got {dataset_format!r}."
        )
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"The data folder {root} does not exist.")
    dataset_format = detect_format(root) if dataset_format == "auto" else dataset_format
    samples = DATASET_FORMATS[dataset_format](root, split, categories)
    if split == "train":
        samples = [sample for sample in samples if not sample.label]
    if not samples:
        raise ValueError(f"No images for split {split!r} in {root}; accepted files: {', '.join(IMAGE_SUFFIXES)}.")
    return AnomalyDataset(samples)


def detect_format(root: str | Path) -> str:
    """The layout that a folder looks like: one of `DATASET_FORMATS`."""
    if any(Path(root).glob("*/train/good")):
        return "mvtec"
    return "mtd" if (Path(root) / "MT_Free").is_dir() else "folder"


__all__ = [
    "DATASET_FORMATS",
    "IMAGE_SUFFIXES",
    "AnomalyDataset",
    "Sample",
    "detect_format",
    "load_dataset",
    "load_hub_dataset",
]
