"""Magnetic Tile Defects (Huang et al., "Surface defect saliency of magnetic tile", The Visual Computer 2018).

MT_<class>/<name>.jpg is an image and MT_<class>/<name>.png its mask; MT_Free holds the good ones.
`train_filenames.txt` lists the good images to train on (DifferNet's split); all others are the test set.
"""

from pathlib import Path

from .dataset import Sample, wrong_layout


def load_mtd(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """Samples of `split` ("train" or "test"); the only category is "magnetic_tile", the defects are the classes.

    Raises:
        ValueError: The layout is another one, or another category is asked for.
    """
    names_file = root / "train_filenames.txt"
    if not (root / "MT_Free").is_dir() or not names_file.is_file():
        raise wrong_layout(root, "MTD", "the folder MT_Free and the file train_filenames.txt")
    if categories and categories != ["magnetic_tile"]:
        raise ValueError(f"MTD has one category, magnetic_tile; got {', '.join(categories)}.")
    train_names = set(names_file.read_text().split())

    samples = []
    for folder in sorted(root.glob("MT_*")):
        defect = folder.name.removeprefix("MT_").lower()
        for image in sorted(folder.glob("*.jpg")):
            in_train = defect == "free" and image.name in train_names
            if in_train == (split == "train"):
                good = defect == "free"
                mask = None if good else image.with_suffix(".png")
                samples.append(Sample(image, "magnetic_tile", "good" if good else defect, mask))
    return samples
