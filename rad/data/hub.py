"""Data sets of the Hugging Face Hub, or anything else that `datasets.load_dataset` reads."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..image_reader import FORMATS
from .dataset import AnomalyDataset, Sample, pick_categories
from .roles import is_good


class HubDataset(AnomalyDataset):
    """Rows of a `datasets.Dataset`; a row's image and mask are read when they are asked for.

    `samples[i].image` names the row only: take `dataset[i].image`.
    """

    def __init__(
        self, samples: list[Sample], rows: Sequence[dict[str, Any]], image_column: str, mask_column: str | None = None
    ) -> None:
        super().__init__(samples)
        self.rows, self.image_column, self.mask_column = rows, image_column, mask_column

    def __getitem__(self, index: int) -> Sample:
        sample, row = self.samples[index], self.rows[index]
        mask = row[self.mask_column] if self.mask_column and sample.label else None
        return replace(
            sample,
            image=open_image(row[self.image_column], str(sample.image)),
            mask=None if mask is None else open_image(mask, f"The mask of {sample.image}"),
        )


def open_image(value: dict | None, name: str) -> Path | Image.Image:
    """An image of a row: opened here, decoded and checked like an upload by `RADImageProcessor`."""
    if value is None:
        raise ValueError(f"{name} has no image.")
    if not value["bytes"]:
        return Path(value["path"])
    try:
        return Image.open(io.BytesIO(value["bytes"]), formats=FORMATS)
    except Exception as error:  # Pillow's parsers raise many types on damaged headers
        raise ValueError(f"{name} is not an image that can be read ({error}).") from error


def load_hub_dataset(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    category_column: str | None = None,
    label_column: str | None = None,
    categories: list[str] | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    mask_column: str | None = None,
    mask_threshold: float | None = None,
    good_only: bool = True,
) -> HubDataset:
    """One split of a data set: its good images to train on, or, to measure, all.

    Args:
        name: Hub id, or a folder, of a data set.
        image_column: Column with the images.
        category_column: Column that tells what an image shows; by default all show the same.
        label_column: Column that tells good images (0, False, or a word such as "good", "OK", "pass", "non_defective",
            in any case) from others, whose label is the kind of defect; by default all are good.
        categories: Names to keep; by default all.
        mask_column: Column with the masks of images that are not good; where it is empty, and without it, they count
            at image level only.
        mask_threshold: Values of the masks above it are defect; by default they are told by what is there, as
            `masks.py` says.
        good_only: Leave out all images that are not good.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: The data set cannot be loaded, lacks a column or a category, or has no good images; or all images
            are asked for without a column that tells which are good.
    """
    if not good_only and label_column is None:
        raise ValueError("With good_only=False, label_column must name the column that tells good images from others.")
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hub data sets need `pip install datasets`.") from error
    try:
        rows = datasets.load_dataset(name, config_name, split=split, token=token, cache_dir=cache_dir)
    except Exception as error:  # of the Hub, of Arrow, of the files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"The data set {name!r} cannot be loaded ({reason}).") from error
    for column in filter(None, (image_column, category_column, label_column, mask_column)):
        if column not in rows.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(rows.column_names)}.")
    for column in filter(None, (image_column, mask_column)):
        if not isinstance(rows.features[column], datasets.Image):
            raise ValueError(f"The column {column!r} of {name} holds {rows.features[column]}, not images.")
        rows = rows.cast_column(column, datasets.Image(decode=False))

    def texts(column: str | None, default: str) -> list[str]:
        if column is None:
            return [default] * len(rows)
        feature = rows.features[column]
        return [feature.int2str(v) if isinstance(feature, datasets.ClassLabel) else str(v) for v in rows[column]]

    names = texts(category_column, Path(name).name)
    picked = pick_categories(name, sorted(set(names)), categories)
    defects = ["good" if is_good(label) else label for label in texts(label_column, "good")]
    kept = [i for i in range(len(rows)) if names[i] in picked and (defects[i] == "good" or not good_only)]
    if "good" not in {defects[i] for i in kept}:
        raise ValueError(f"The split {split!r} of {name} has no good images.")
    samples = [Sample(Path(f"row {i} of {name}"), names[i], defects[i], mask_threshold=mask_threshold) for i in kept]
    return HubDataset(samples, rows.select(kept), image_column, mask_column)
