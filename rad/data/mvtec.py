"""The family of MVTec-AD: a folder for each category, in it one for each split, in that one for each kind of defect.

MVTec-AD (Bergmann et al., CVPR 2019); VisA, once converted, and our synthetic set share its layout:

    <category>/train/good/*.png, test/good/*.png, test/<defect>/*.png, ground_truth/<defect>/*_mask.png

MVTec-AD 2 (Heckler-Kram et al., 2025). Its private test images have no public labels and are not listed:

    <category>/train/good/*.png, validation/good/*.png, test_public/{good,bad}/*.png,
    test_public/ground_truth/bad/*_mask.png, test_private*/*.png

MVTec LOCO (Bergmann et al., IJCV 2022). An image has one mask for each of its defects:

    <category>/train/good/*.png, validation/good/*.png, test/{good,logical_anomalies,structural_anomalies}/*.png,
    ground_truth/<defect>/<image>/000.png, 001.png, ...
"""

from collections.abc import Callable
from pathlib import Path

from .dataset import Sample, check_masks_found, pick_categories, wrong_layout
from .doubts import label_files, named_otherwise
from .listing import images_under, list_files, list_images, subfolders
from .masks import find_mask
from .roles import mask_stem, meaning_of


def load_mvtec(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """MVTec-AD's samples of `split` ("train" or "test"); arguments and errors as `load_categories`."""

    def mask(category: Path, defect: str, image: Path) -> Path | None:
        return find_mask(category / "ground_truth" / defect, image.stem)

    return load_categories(root, split, categories, "MVTec-AD", mask)


def is_mvtec(root: Path, good: str = "good") -> bool:
    """Whether a folder holds MVTec-AD's layout, or BTAD's with another `good`, and nothing that it does not know."""
    listing = list_files(root)
    paths = [path.relative_to(root) for path in listing.images]

    def fits(folders: tuple[str, ...]) -> bool:
        role, kind = folders[1:3] if len(folders) > 2 else ("", "")
        if role == "ground_truth":
            return True
        below = map(meaning_of, folders[3:])
        if any(word.quality or word.mask or word.aside for word in below):
            return False
        told = meaning_of(kind)
        return kind == good or (role == "test" and not (told.quality == "good" or told.mask or told.aside))

    folders = {path.parts[:-1] for path in paths}
    return (
        all(map(fits, folders))
        and any(f[1:3] == ("train", good) for f in folders)
        and all(f[1] in ("train", "test", "ground_truth") for f in folders)
        and not any(mask_stem(path.stem) for path in paths if path.parts[1] != "ground_truth")
        and not named_otherwise([root / path for path in paths if path.parts[2] == good])
        and not any(path.relative_to(root).parts[2:3] == (good,) for path in label_files(root, listing))
    )


def load_mvtec_ad_2(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """MVTec-AD 2's samples of `split` ("train", "validation" or "test", which is the public one)."""

    def mask(category: Path, defect: str, image: Path) -> Path | None:
        return find_mask(category / "test_public" / "ground_truth" / defect, image.stem)

    return load_categories(root, split, categories, "MVTec-AD 2", mask, test="test_public")


def load_mvtec_loco(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """MVTec LOCO's samples of `split` ("train", "validation" or "test").

    Every pixel that is not 0 in any mask of an image counts as defect: the values tell kinds of defects apart. The
    metric of LOCO's authors, sPRO, saturates each kind at an area of its own instead; AUPRO on these masks is another
    number.
    """

    def mask(category: Path, defect: str, image: Path) -> tuple[Path, ...] | None:
        folder = category / "ground_truth" / defect / image.stem
        return tuple(list_images(folder)) or None if folder.is_dir() else None

    return load_categories(root, split, categories, "MVTec LOCO", mask, mask_threshold=0)


def load_categories(
    root: Path,
    split: str,
    categories: list[str] | None,
    layout: str,
    mask: Callable[[Path, str, Path], Path | tuple[Path, ...] | None],
    test: str = "test",
    good: str = "good",
    mask_threshold: float | None = None,
) -> list[Sample]:
    """Samples of one split of the named categories, by default all.

    Args:
        layout: Its name, for errors.
        mask: Finds the mask of an image, given the category's folder, the defect's name (with the subfolders in its
            folder that the image lies in) and the image.
        test: Folder of the split "test"; other splits lie in folders of their own name.
        good: Folder of good images.

    Raises:
        ValueError: No category in the layout, or one without the split, or a named one that does not exist, or
            masks of which none bears the name of an image.
    """
    available = [p.name for p in subfolders(root) if (p / "train" / good).is_dir() or (p / test / good).is_dir()]
    if not available:
        raise wrong_layout(root, layout, f"<category>/train/{good} and <category>/{test}/<defect>")
    samples = []
    for category in pick_categories(root, available, categories):
        folder = root / category / (test if split == "test" else split)
        if not folder.is_dir():
            raise ValueError(f"Category {category!r} has no {split!r} folder: {folder} does not exist.")
        own = []
        for kind in subfolders(folder):
            if kind.name == "ground_truth":  # MVTec-AD 2 keeps its masks among the images
                continue
            defect = "good" if kind.name == good else kind.name
            for image in images_under(kind):
                found = (
                    None if defect == "good" else mask(root / category, str(image.parent.relative_to(folder)), image)
                )
                own.append(Sample(image, category, defect, found, mask_threshold))
        truths = [truth for truth in (root / category / "ground_truth", folder / "ground_truth") if truth.is_dir()]
        if {sample.mask for sample in own if sample.label} == {None}:
            check_masks_found(folder, own, [path for truth in truths for path in images_under(truth)])
        samples += own
    return samples
