"""Data sets: `load_dataset` gives the train or test split of any supported layout as an `AnomalyDataset`,
`load_hub_dataset` that of the Hub's."""

from collections.abc import Sequence
from pathlib import Path

from .btad import load_btad
from .dagm import load_dagm
from .dataset import AnomalyDataset, Sample
from .doubts import check_pictures
from .folder import check_names, load_folder
from .hub import load_hub_dataset
from .kolektor import load_kolektor, load_kolektor2
from .listing import IMAGE_SUFFIXES, list_files
from .mtd import load_mtd
from .mvtec import is_mvtec, load_mvtec, load_mvtec_3d, load_mvtec_ad_2, load_mvtec_loco
from .real_iad import load_real_iad
from .visa import load_visa

DATASET_FORMATS = {
    "mvtec": load_mvtec,
    "mvtec_ad_2": load_mvtec_ad_2,
    "mvtec_loco": load_mvtec_loco,
    "mvtec_3d": load_mvtec_3d,
    "visa": load_visa,
    "btad": load_btad,
    "mtd": load_mtd,
    "real_iad": load_real_iad,
    "kolektor": load_kolektor,
    "kolektor2": load_kolektor2,
    "dagm": load_dagm,
    "folder": load_folder,
}
HAVE_VALIDATION = ("mvtec_ad_2", "mvtec_loco", "mvtec_3d")


def load_dataset(
    root: str | Path,
    dataset_format: str = "auto",
    split: str = "train",
    categories: list[str] | None = None,
    *,
    good: Sequence[str] = (),
    bad: Sequence[str] = (),
    masks: Sequence[str] = (),
    all_good: bool = False,
) -> AnomalyDataset:
    """Lists a data set on disk; images are decoded later, by `RADImageProcessor`.

    Args:
        root: Folder of the data set.
        dataset_format: "mvtec" (MVTec-AD's layout), "mvtec_ad_2", "mvtec_loco", "mvtec_3d" (its photographs), "visa"
            (as downloaded, with its split file), "btad", "mtd" (Magnetic Tile Defects), "real_iad", "kolektor" and
            "kolektor2" (KolektorSDD and SDD2), "dagm", "folder" (any folder whose names tell good from bad, or of good
            images alone), or "auto" for the one that the folder looks like. Each layout is drawn in the module of its
            name.
        split: "train" (good images only) or "test"; of MVTec-AD 2, LOCO and 3D-AD also "validation": good images,
            which are part of no other split.
        categories: Names to keep; by default all.
        good, bad, masks: Of "folder": globs, relative to `root`, of files, or folders with all below them, that are
            good images, defects and masks, where names do not say it.
        all_good: Of "folder": every image shows a good part, whatever the names say.

    Raises:
        ValueError: Unknown format or split, another layout, a category that does not exist, no images, or it is not
            clear which are good.
        FileNotFoundError: `root` is no folder.
    """
    if dataset_format not in ("auto", *DATASET_FORMATS):
        raise ValueError(
            f"dataset_format must be auto or one of {', '.join(DATASET_FORMATS)}, got {dataset_format!r}."
        )
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"The data folder {root} does not exist.")
    told = {"good": good, "bad": bad, "masks": masks, "all_good": all_good}
    told = {name: value for name, value in told.items() if value}
    if told and dataset_format not in ("auto", "folder"):
        raise ValueError(f"{' and '.join(told)} belong to dataset_format folder, got {dataset_format!r}.")
    if all_good and len(told) > 1:
        raise ValueError("With all_good every image is good: give it without good, bad and masks.")
    if dataset_format == "auto":
        dataset_format = "folder" if told else detect_format(root)
    splits = ["train", *(["validation"] if dataset_format in HAVE_VALIDATION else []), "test"]
    if split not in splits:
        raise ValueError(f"split of {dataset_format} must be {' or '.join(map(repr, splits))}, got {split!r}.")
    samples = DATASET_FORMATS[dataset_format](root, split, categories, **told)
    if split != "test":
        samples = [sample for sample in samples if not sample.label]
    if not (good or all_good):
        check_pictures(root, [sample.image for sample in samples])
        for label in (0, 1):
            check_names(root, [sample.image for sample in samples if sample.label == label], are_good=not label)
    if not samples:
        left_out = "; ".join(f"{reason} ({len(paths):,})" for reason, paths in list_files(root).left_out.items())
        raise ValueError(
            f"No images for split {split!r} in {root}{f', where this is left out: {left_out}' if left_out else ''}; "
            f"accepted files: {', '.join(IMAGE_SUFFIXES)}."
        )
    return AnomalyDataset(samples)


def detect_format(root: str | Path) -> str:
    """The layout that a folder looks like: one of `DATASET_FORMATS`."""
    signs = {
        "visa": "split_csv/1cls.csv",
        "real_iad": "realiad_jsons",
        "mtd": "MT_Free",
        "mvtec_ad_2": "*/test_public",
        "mvtec_loco": "*/test/logical_anomalies",
        "mvtec_3d": "*/train/good/rgb",
        "kolektor": "*/Part*_label.bmp",
        "kolektor2": "train/*_GT.png",
        "dagm": "*/Train/Label",
    }
    root = Path(root).expanduser()
    found = next((name for name, sign in signs.items() if any(root.glob(sign))), None)
    if found is None and any(root.glob("*/train/*")):
        found = "mvtec" if is_mvtec(root) else "btad" if is_mvtec(root, good="ok") else None
    return found or "folder"


__all__ = [
    "DATASET_FORMATS",
    "IMAGE_SUFFIXES",
    "AnomalyDataset",
    "Sample",
    "detect_format",
    "load_dataset",
    "load_hub_dataset",
]
