"""beanTech Anomaly Detection (Mishra et al., "VT-ADL", ISIE 2021).

<category>/train/ok, test/ok, test/ko and ground_truth/ko with 01, 02 and 03 as categories; images are .bmp or .png,
and a mask's suffix may differ from its image's.
"""

from pathlib import Path

from .dataset import Sample
from .mvtec import load_categories


def load_btad(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """Samples of `split` ("train" or "test"); the only kind of defect is "ko".

    Raises:
        ValueError: As `load_categories`.
    """
    return load_categories(root, split, categories, "BTAD", good="ok")
