"""VisA as downloaded (Zou et al., "SPot-the-Difference", ECCV 2022), split by its own file for one-class training.

split_csv/1cls.csv has the columns object, split, label, image and mask; its paths start at the data set's folder:
<object>/Data/Images/{Normal,Anomaly}/*.JPG and <object>/Data/Masks/Anomaly/*.png. Converted by its authors' script it
is in MVTec-AD's layout instead.
"""

import csv
from pathlib import Path

from .dataset import Sample, check_files, path_inside, pick_categories, wrong_layout

COLUMNS = ("object", "split", "label", "image", "mask")


def load_visa(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """Samples of `split` ("train" or "test"); the only kind of defect is "anomaly".

    Every pixel of a mask that is not 0 is defect: the values tell kinds of defects apart.

    Raises:
        ValueError: The layout is another one, the split file cannot be read or names a file that does not exist or
            lies outside `root`, or a category does not exist.
    """
    table = root / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise wrong_layout(root, "VisA", "the file split_csv/1cls.csv")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table} is no CSV file that can be read ({error}).") from error
    if not rows or not set(COLUMNS) <= rows[0].keys():
        found = f"{list(rows[0])}" if rows else "no rows"
        raise ValueError(f"{table} must have rows with the columns {', '.join(COLUMNS)}; it has {found}.")

    picked = pick_categories(root, sorted({row["object"] for row in rows}), categories)
    samples = []
    for row in rows:
        if row["object"] not in picked or row["split"] != split:
            continue
        if row["label"] not in ("normal", "anomaly"):
            raise ValueError(f"{table} labels an image {row['label']!r}; it must be normal or anomaly.")
        image = path_inside(root, row["image"], table)
        if row["label"] == "normal":
            samples.append(Sample(image, row["object"]))
        else:
            mask = path_inside(root, row["mask"], table) if row["mask"] else None
            samples.append(Sample(image, row["object"], "anomaly", mask, mask_threshold=0))
    check_files(samples, table)
    return samples
