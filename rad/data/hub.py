"""Data sets of the Hugging Face Hub, or anything else that `datasets.load_dataset` reads."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..image_processor import FORMATS
from .dataset import AnomalyDataset, Sample

GOOD_LABELS = ("good", "normal", "0", "False")


class HubDataset(AnomalyDataset):
    """Rows of a `datasets.Dataset`; a row's image is read when it is asked for.

    `samples[i].image` names the row only: take `dataset[i].image`.
    """

    def __init__(self, samples: list[Sample], rows, image_column: str):
        super().__init__(samples)
        self.rows, self.image_column = rows, image_column

    def __getitem__(self, index: int) -> Sample:
        value = self.rows[index][self.image_column]
        if not value["bytes"]:
            return replace(self.samples[index], image=Path(value["path"]))
        try:
            # Opened here, decoded and checked like an upload by RADImageProcessor
            image = Image.open(io.BytesIO(value["bytes"]), formats=FORMATS)
        except Exception as error:  # Pillow's parsers raise many types on damaged headers
            raise ValueError(f"{self.samples[index].image} is not an image that can be read ({error}).") from error
        return replace(self.samples[index], image=image)


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
) -> HubDataset:
    """Good images of one split of a data set.

    Args:
        name: Hub id, or a folder, of a data set.
        image_column: Column with the images.
        category_column: Column that tells what an image shows; by default all show the same.
        label_column: Column that tells good images (0, "good" or "normal") from others; by default all are good.
        categories: Names to keep; by default all.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: The data set can not be loaded, lacks a column or a category, or has no good images.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hub data sets need `pip install datasets`.") from error
    try:
        rows = datasets.load_dataset(name, config_name, split=split, token=token, cache_dir=cache_dir)
    except Exception as error:  # of the Hub, of Arrow, of the files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"The data set {name!r} can not be loaded ({reason}).") from error
    for column in filter(None, (image_column, category_column, label_column)):
        if column not in rows.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(rows.column_names)}.")
    if not isinstance(rows.features[image_column], datasets.Image):
        raise ValueError(f"The column {image_column!r} of {name} holds {rows.features[image_column]}, not images.")
    rows = rows.cast_column(image_column, datasets.Image(decode=False))

    def texts(column: str | None, default: str) -> list[str]:
        if column is None:
            return [default] * len(rows)
        feature = rows.features[column]
        return [feature.int2str(v) if isinstance(feature, datasets.ClassLabel) else str(v) for v in rows[column]]

    names = texts(category_column, Path(name).name)
    available = sorted(set(names))
    missing = sorted(set(categories or []) - set(available))
    if missing:
        raise ValueError(f"{name} has no category {', '.join(missing)}; it has {', '.join(available)}.")
    good = [label in GOOD_LABELS for label in texts(label_column, "good")]
    kept = [i for i in np.flatnonzero(good).tolist() if not categories or names[i] in categories]
    if not kept:
        raise ValueError(f"The split {split!r} of {name} has no good images.")
    samples = [Sample(Path(f"row {i} of {name}"), names[i]) for i in kept]
    return HubDataset(samples, rows.select(kept), image_column)
