"""Any folder of good images, searched with its subfolders: what an engineer with a camera has.

If it holds a folder `good` (or `ok`, or `normal`) and others beside it, these are kinds of defects, each with its
masks, if there are any, in `ground_truth`:

    good/**/*.png, <defect>/**/*.png, ground_truth/<defect>/**/*_mask.png (255 = defect)

Then every fifth good image, in order of names, is a test image like the defects, and the others are for training.
"""

from pathlib import Path

from .dataset import IMAGE_SUFFIXES, Sample, subfolders
from .masks import find_mask

GOOD_FOLDERS = ("good", "ok", "normal")  # in any case
# Parts of other layouts, whose test images must not be taken for good ones
OTHER_LAYOUTS = {"train/good": "MVTec-AD", "train/ok": "BTAD", "Data/Images": "VisA", "NG": "Real-IAD"}


def load_folder(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """Images under `root` as samples of `split` ("train" or "test") and of one category, named after the folder.

    Raises:
        ValueError: Asked for other categories, or for a test split without defects; or the folder holds two folders of
            good images, or is a data set in another layout or one category of it, whose test images are no good ones.
    """
    category, folders = root.resolve().name, subfolders(root)
    if categories and categories != [category]:
        raise ValueError(f"{root} is a plain folder of images: it has no categories but {category!r}, its own name.")
    good = [folder for folder in folders if folder.name.lower() in GOOD_FOLDERS]
    defects = [folder for folder in folders if folder not in (*good, root / "ground_truth")]
    if len(good) > 1:
        raise ValueError(
            f"{root} holds {' and '.join(folder.name for folder in good)}: keep good images in one folder."
        )
    if good and defects:
        numbered = enumerate(images_under(good[0]), start=1)
        samples = [Sample(image, category) for number, image in numbered if (number % 5 == 0) == (split == "test")]
        for folder in defects if split == "test" else []:
            for image in images_under(folder):
                mask = find_mask(root / "ground_truth" / image.parent.relative_to(root), image.stem)
                samples.append(Sample(image, category, folder.name, mask))
        return samples

    for part, layout in OTHER_LAYOUTS.items():
        if (root / part).is_dir():
            raise ValueError(
                f"{root} holds {part}, so it is a category in {layout} layout: give its parent folder and name the "
                f"category."
            )
        for found in root.glob(f"*/{part}"):
            raise ValueError(f"{root} holds {found.relative_to(root)}, so it is no plain folder of images.")
    if split == "test":
        raise ValueError(
            f"{root} has no 'test' split: expected the folder good and one for each kind of defect, found "
            f"{[folder.name for folder in folders][:10] or 'no folders'}."
        )
    return [Sample(image, category) for image in images_under(root)]


def images_under(folder: Path) -> list[Path]:
    """Image files in a folder and its subfolders, sorted; hidden files and folders are left out."""
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return [path for path in images if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
