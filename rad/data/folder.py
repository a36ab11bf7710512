"""Any folder of good images, searched with its subfolders: what an engineer with a camera has."""

from pathlib import Path

from .dataset import IMAGE_SUFFIXES, Sample


def load_folder(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """All images under `root` as good training samples of one category, named after the folder.

    Raises:
        ValueError: Asked for a test split or for categories; a plain folder has neither.
    """
    if split != "train":
        raise ValueError(f"{root} is a plain folder of good images: it has no {split!r} split, only 'train'.")
    if categories:
        raise ValueError(f"{root} is a plain folder of good images: it has no categories.")
    images = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return [Sample(path, root.resolve().name) for path in images if not path.name.startswith(".")]
