"""DAGM 2007, "Weakly supervised learning for industrial optical inspection": ten artificial textures.

    Class1/Train/0576.PNG, Class1/Train/Label/0576_label.PNG, Class1/Test/0002.PNG, Class1/Test/Label/0002_label.PNG

An image is defective if there is a label of its name, an ellipse around the defect: pixel metrics are coarse.
"""

from pathlib import Path

from .dataset import Sample, pick_categories, wrong_layout
from .listing import list_images, subfolders


def load_dagm(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """Samples of `split` ("train" or "test"), of "train" the good ones; the only kind of defect is "defect".

    Raises:
        ValueError: The layout is another one, a category does not exist or lacks the split, or labels are of no image.
    """
    available = [folder.name for folder in subfolders(root) if (folder / "Train" / "Label").is_dir()]
    if not available:
        raise wrong_layout(root, "DAGM", "Class1/Train/0576.PNG and Class1/Train/Label/0576_label.PNG")
    samples = []
    for category in pick_categories(root, available, categories):
        folder = root / category / split.capitalize()
        if not (folder / "Label").is_dir():
            raise ValueError(f"Category {category!r} is not whole: {folder / 'Label'} does not exist.")
        images = list_images(folder)
        labels = {path.stem: path for path in list_images(folder / "Label")}
        lost = sorted(labels.keys() - {f"{image.stem}_label" for image in images})
        if lost:
            raise ValueError(f"{len(lost)} labels in {folder / 'Label'}, such as {lost[0]}, are of no image.")
        for image in images:
            mask = labels.get(f"{image.stem}_label")
            if mask is None:
                samples.append(Sample(image, category))
            elif split == "test":
                samples.append(Sample(image, category, "defect", mask))
    return samples
