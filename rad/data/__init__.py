"""Data sets: `load_dataset` gives the train or test split of any supported layout as an `AnomalyDataset`,
`load_hub_dataset` that of the Hub's."""

from pathlib import Path

from .btad import load_btad
from .dataset import IMAGE_SUFFIXES, AnomalyDataset, Sample
from .folder import load_folder
from .hub import load_hub_dataset
from .mtd import load_mtd
from .mvtec import load_mvtec, load_mvtec_ad_2, load_mvtec_loco
from .real_iad import load_real_iad
from .visa import load_visa

DATASET_FORMATS = {
    "mvtec": load_mvtec,
    "mvtec_ad_2": load_mvtec_ad_2,
    "mvtec_loco": load_mvtec_loco,
    "visa": load_visa,
    "btad": load_btad,
    "mtd": load_mtd,
    "real_iad": load_real_iad,
    "folder": load_folder,
}


def load_dataset(
    root: str | Path, dataset_format: str = "auto", split: str = "train", categories: list[str] | None = None
) -> AnomalyDataset:
    """Lists a data set on disk; images are decoded later, by `RADImageProcessor`.

    Args:
        root: Folder of the data set.
        dataset_format: "mvtec" (MVTec-AD's layout), "mvtec_ad_2", "mvtec_loco", "visa" (as downloaded, with its split
            file), "btad", "mtd" (Magnetic Tile Defects), "real_iad", "folder" (good images, and if wanted defects), or
            "auto" for the one that the folder looks like. Each layout is drawn in the module of its name.
        split: "train" (good images only) or "test"; of MVTec-AD 2 and LOCO also "validation": good images, which are
            part of no other split.
        categories: Names to keep; by default all.

    Raises:
        ValueError: Unknown format or split, another layout, a category that does not exist, or no images.
        FileNotFoundError: `root` is no folder.
    """
    if dataset_format not in ("auto", *DATASET_FORMATS):
        raise ValueError(
            f"dataset_format must be auto or one of {', '.join(DATASET_FORMATS)}, got {dataset_format!r}."
        )
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"The data folder {root} does not exist.")
    dataset_format = detect_format(root) if dataset_format == "auto" else dataset_format
    splits = ["train", *(["validation"] if dataset_format in ("mvtec_ad_2", "mvtec_loco") else []), "test"]
    if split not in splits:
        raise ValueError(f"split of {dataset_format} must be {' or '.join(map(repr, splits))}, got {split!r}.")
    samples = DATASET_FORMATS[dataset_format](root, split, categories)
    if split != "test":
        samples = [sample for sample in samples if not sample.label]
    if not samples:
        raise ValueError(f"No images for split {split!r} in {root}; accepted files: {', '.join(IMAGE_SUFFIXES)}.")
    return AnomalyDataset(samples)


def detect_format(root: str | Path) -> str:
    """The layout that a folder looks like: one of `DATASET_FORMATS`."""
    signs = {  # MVTec-AD's last of its family: the others show it too
        "visa": "split_csv/1cls.csv",
        "real_iad": "realiad_jsons",
        "mtd": "MT_Free",
        "mvtec_ad_2": "*/test_public",
        "mvtec_loco": "*/test/logical_anomalies",
        "mvtec": "*/train/good",
        "btad": "*/train/ok",
    }
    return next((name for name, sign in signs.items() if any(Path(root).glob(sign))), "folder")


__all__ = [
    "DATASET_FORMATS",
    "IMAGE_SUFFIXES",
    "AnomalyDataset",
    "Sample",
    "detect_format",
    "load_dataset",
    "load_hub_dataset",
]
