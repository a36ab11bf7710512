"""Any folder of good images, searched with its subfolders: what an engineer with a camera has."""

from pathlib import Path

from .dataset import IMAGE_SUFFIXES, Sample


def load_folder(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """All images under `root` as good training samples of one category, named after the folder.

    Raises:
        ValueError: Asked for a test split or for categories, a plain folder has neither; or the folder is one category
            of a data set, whose test images are no good ones.
    """
    if split != "train":
        raise ValueError(f"{root} is a plain folder of good images: it has no {split!r} split, only 'train'.")
    if categories:
        raise ValueError(f"{root} is a plain folder of good images: it has no categories.")
    if (root / "train" / "good").is_dir():
        raise ValueError(f"{root} is a category in MVTec-AD layout: give its parent folder and name the category.")
    images = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    hidden = (any(part.startswith(".") for part in path.relative_to(root).parts) for path in images)
    return [Sample(path, root.resolve().name) for path, skip in zip(images, hidden, strict=True) if not skip]
