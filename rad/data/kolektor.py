"""Kolektor's surface defects, in which only an empty mask tells that an image is good.

KolektorSDD (Tabernik et al., "Segmentation-based deep-learning approach for surface-defect detection", Journal of
Intelligent Manufacturing 2020), eight photographs of each of 50 items:

    kos01/Part0.jpg, Part0_label.bmp, ...

Good images of every fifth item and all defects are the test set: photographs of one item stay together.

KolektorSDD2 (Bozic et al., "Mixed supervision for surface-defect detection", Computers in Industry 2021):

    train/10000.png, 10000_GT.png, ..., test/20000.png, 20000_GT.png, ...
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ..image_reader import FORMATS
from .dataset import Sample, wrong_layout
from .listing import list_images, subfolders


def load_kolektor(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """KolektorSDD's samples of `split` ("train" or "test"); the only category is "commutator", the only kind of defect
    "crack".

    Raises:
        ValueError: The layout is another one, another category is asked for, or an image has no mask that can be read.
    """
    items = [folder for folder in subfolders(root) if any(folder.glob("*_label.bmp"))]
    if not items:
        raise wrong_layout(root, "KolektorSDD", "kos01/Part0.jpg and kos01/Part0_label.bmp")
    _check_category("KolektorSDD", "commutator", categories)
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
    _check_category("KolektorSDD2", "surface", categories)
    found = _samples(root / split, "_GT.png", "surface", "defect")
    return [sample for sample in found if split == "test" or not sample.label]


def _samples(folder: Path, ending: str, category: str, defect: str) -> list[Sample]:
    """The images in a folder, each with a mask beside it that bears its name and this ending."""
    samples = []
    for image in list_images(folder):
        if image.name.endswith(ending):
            continue
        mask = image.with_name(image.stem + ending)
        is_good = is_empty(mask)
        samples.append(Sample(image, category, *(("good",) if is_good else (defect, mask))))
    return samples


def is_empty(mask: Path) -> bool:
    """Whether a mask marks nothing.

    Raises:
        ValueError: It does not exist or cannot be read.
    """
    try:
        with Image.open(mask, formats=FORMATS) as opened:
            return not np.asarray(opened).any()
    except Exception as error:  # Pillow's parsers raise many types on damaged files
        message = f"The mask {mask}, which tells whether its image is good, cannot be read ({error})."
        raise ValueError(message) from error


def _check_category(layout: str, name: str, wanted: list[str] | None) -> None:
    if wanted and wanted != [name]:
        raise ValueError(f"{layout} has one category, {name}; got {', '.join(wanted)}.")
