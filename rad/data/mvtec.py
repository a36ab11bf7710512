"""The layout of MVTec-AD (Bergmann et al., CVPR 2019), which VisA, BTAD and our synthetic set share once converted:

<root>/<category>/train/good/*.png, test/good/*.png, test/<defect>/*.png and ground_truth/<defect>/*_mask.png
"""

from pathlib import Path

from .dataset import Sample, list_images, subfolders


def load_mvtec(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """Samples of `split` ("train" or "test") of the named categories, by default all.

    Raises:
        ValueError: No category in the layout, or a named one that does not exist; the message lists those that do.
    """
    available = [path.name for path in subfolders(root) if (path / "train").is_dir() or (path / "test").is_dir()]
    if not available:
        raise ValueError(
            f"{root} is not in MVTec-AD layout: expected <category>/train/good and <category>/test/<defect>, "
            f"found {[path.name for path in subfolders(root)][:10] or 'no folders'}."
        )
    missing = sorted(set(categories or []) - set(available))
    if missing:
        raise ValueError(f"{root} has no category {', '.join(missing)}; it has {', '.join(available)}.")

    samples = []
    for category in categories or available:
        folder = root / category / split
        if not folder.is_dir():
            raise ValueError(f"Category {category!r} has no {split!r} folder: {folder} does not exist.")
        for defect in subfolders(folder):
            masks = root / category / "ground_truth" / defect.name
            for image in list_images(defect):
                mask = None
                if defect.name != "good":
                    candidates = [masks / f"{image.stem}_mask.png", masks / f"{image.stem}.png"]
                    mask = next((path for path in candidates if path.exists()), None)
                samples.append(Sample(image, category, defect.name, mask))
    return samples
