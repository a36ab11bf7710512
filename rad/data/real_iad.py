"""Real-IAD (Wang et al., CVPR 2024): one JSON file for each category names its images and masks.

realiad_jsons/<category>.json (or realiad_jsons/realiad_jsons/<category>.json, as the archive unpacks) holds

    {"meta": {"normal_class": "OK", "prefix": "<category>/"},
     "train": [{"anomaly_class": "OK", "image_path": "OK/S0001/....jpg", "mask_path": null}, ...], "test": [...]}

with paths that start at the prefix, which lies in the data set's folder or in one of `IMAGE_FOLDERS`. To use the
lists of single views, put them in place of these.
"""

import json
from pathlib import Path

from .dataset import Sample, check_files, path_inside, pick_categories, wrong_layout

IMAGE_FOLDERS = (".", "realiad_1024", "realiad_512", "realiad_256", "realiad_raw")  # the first that is there counts


def load_real_iad(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """Samples of `split` ("train" or "test"); kinds of defects are the anomaly classes, "AK" for example.

    Every pixel of a mask that is not 0 is defect.

    Raises:
        ValueError: The layout is another one, a JSON file is of another form or names a file that does not exist or
            lies outside `root`, or a category does not exist.
    """
    folder = root / "realiad_jsons"
    nested = folder / "realiad_jsons"
    files = {path.stem: path for path in sorted((nested if nested.is_dir() else folder).glob("*.json"))}
    if not files:
        raise wrong_layout(root, "Real-IAD", "realiad_jsons/<category>.json")
    samples = []
    for category in pick_categories(root, list(files), categories):
        file = files[category]
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            normal, prefix = content["meta"]["normal_class"], content["meta"]["prefix"]
            entries = [(e["anomaly_class"], e["image_path"], e.get("mask_path")) for e in content[split]]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file} is not in Real-IAD's form: expected meta with normal_class and prefix, and a list {split!r} "
                f"of anomaly_class, image_path and mask_path; reading it failed with {type(error).__name__}: {error}."
            ) from error
        bases = [path_inside(root / base, prefix, file) for base in IMAGE_FOLDERS]
        base = next((path for path in bases if path.is_dir()), None)
        if base is None:
            raise ValueError(f"{file} names the folder {prefix!r}, which is in none of {', '.join(IMAGE_FOLDERS)}.")
        listed = []
        for kind, image, mask in entries:
            image = path_inside(base, image, file)
            if kind == normal:
                listed.append(Sample(image, category))
            else:
                mask = path_inside(base, mask, file) if mask else None
                listed.append(Sample(image, category, str(kind), mask, mask_threshold=0))
        check_files(listed, file)
        samples += listed
    return samples
