"""Kolektor's surface defects, in which only an empty mask tells that an image is good.

KolektorSDD (Tabernik et al., "Segmentation-based deep-learning approach for surface-defect detection", Journal of
Intelligent Manufacturing 2020), eight photographs of each of 50 items:

    kos01/Part0.jpg, Part0_label.bmp, ...

Good images of every fifth item and all defects are the test set. Good images of one item stay together; nearly every
item has one defect, so that good photographs of the same item are trained on.

KolektorSDD2 (Bozic et al., "Mixed supervision for surface-defect detection", Computers in Industry 2021):

    train/10000.png, 10000_GT.png, ..., test/20000.png, 20000_GT.png, ...

Its archive also holds copies, "10301 (copy).png", which are left out.
"""

from pathlib import Path

from .dataset import Sample, pick_categories, wrong_layout
from .listing import list_images, subfolders
from .masks import read_mask


def load_kolektor(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """KolektorSDD's samples of `split` ("train" or "test"); the only category is "commutator", the only kind of defect
    "crack".

    Raises:
        ValueError: The layout is another one, another category is asked for, or an image has no mask that can be read.
    """
    items = [folder for folder in subfolders(root) if list_images(folder)]
    if not any(root.glob("*/*_label.bmp")):
        raise wrong_layout(root, "KolektorSDD", "kos01/Part0.jpg and kos01/Part0_label.bmp")
    pick_categories(root, ["commutator"], categories)
    samples = []
    for number, folder in enumerate(items, start=1):
        found = _samples(folder, "_label.bmp", "commutator", "crack")
        is_test = number % 5 == 0
        samples += [sample for sample in found if (sample.label or is_test) == (split == "test")]
    return samples


def load_kolektor2(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """KolektorSDD2's samples of `split` ("train" or "test"), of "train" the good ones; the only category is "surface",
    the only kind of defect "defect".

    Raises:
        ValueError: As `load_kolektor`.
    """
    if not any((root / split).glob("*_GT.png")):
        raise wrong_layout(root, "KolektorSDD2", f"{split}/10000.png and {split}/10000_GT.png")
    pick_categories(root, ["surface"], categories)
    found = _samples(root / split, "_GT.png", "surface", "defect")
    return [sample for sample in found if split == "test" or not sample.label]


def _samples(folder: Path, ending: str, category: str, defect: str) -> list[Sample]:
    """The images in a folder, each with a mask beside it that bears its name and this ending."""
    samples = []
    for image in list_images(folder):
        if image.name.endswith(ending) or image.stem.endswith("(copy)"):
            continue
        mask = image.with_name(image.stem + ending)
        try:
            is_bad = read_mask(mask, image).pixels.any()
        except ValueError as error:
            raise ValueError(f"Only masks tell which images in {folder} are good: {error}") from error
        samples.append(Sample(image, category, *((defect, mask) if is_bad else ("good",))))
    return samples
