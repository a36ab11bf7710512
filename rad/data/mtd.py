"""Magnetic Tile Defects (Huang et al., "Surface defect saliency of magnetic tile", The Visual Computer 2018).

MT_<class>/<name>.jpg is an image and MT_<class>/<name>.png its mask, or, as its authors publish it, both lie in
MT_<class>/Imgs; MT_Free holds the good ones. `train_filenames.txt` lists the good images to train on (DifferNet's
split); all others are the test set. Without it every fifth good image, in order of names, is for the test.
"""

from pathlib import Path

from .dataset import Sample, wrong_layout
from .listing import images_under, subfolders


def load_mtd(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """Samples of `split` ("train" or "test"); the only category is "magnetic_tile", the defects are the classes.

    Raises:
        ValueError: The layout is another one, or another category is asked for.
    """
    if not (root / "MT_Free").is_dir():
        raise wrong_layout(root, "MTD", "the folder MT_Free")
    if categories and categories != ["magnetic_tile"]:
        raise ValueError(f"MTD has one category, magnetic_tile; got {', '.join(categories)}.")
    images = {  # PNG files are masks
        folder.name.removeprefix("MT_").lower(): [p for p in images_under(folder) if p.suffix.lower() != ".png"]
        for folder in subfolders(root)
        if folder.name.startswith("MT_")
    }
    masks = [
        p for f in subfolders(root) if f.name.startswith("MT_") for p in images_under(f) if p.suffix.lower() == ".png"
    ]
    of_images = {image.with_suffix("") for found in images.values() for image in found}
    alone = [mask for mask in masks if mask.with_suffix("") not in of_images]
    if alone:
        raise ValueError(
            f"{len(alone)} PNG files in {root}, such as {alone[0].relative_to(root)}, bear the name of no image: in "
            "MTD's layout PNG files are masks, and images are .jpg."
        )
    names_file = root / "train_filenames.txt"
    if names_file.is_file():
        train = set(names_file.read_text().split())
        if not train & {image.name for image in images["free"]}:
            raise ValueError(f"{names_file} names none of the images in MT_Free: expected file names, one in a line.")
    else:
        train = {image.name for number, image in enumerate(images["free"], start=1) if number % 5}

    samples = []
    for defect, found in images.items():
        for image in found:
            good = defect == "free"
            if (good and image.name in train) == (split == "train"):
                mask = image.with_suffix(".png")
                mask = mask if mask.is_file() and not good else None
                samples.append(Sample(image, "magnetic_tile", "good" if good else defect, mask))
    return samples
