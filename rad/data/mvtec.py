"""The family of MVTec-AD: a folder for each category, in it one for each split, in that one for each kind of defect.

MVTec-AD (Bergmann et al., CVPR 2019); VisA, once converted, and our synthetic set share its layout:

    <category>/train/good/*.png, test/good/*.png, test/<defect>/*.png, ground_truth/<defect>/*_mask.png

MVTec-AD 2 (Heckler-Kram et al., 2025). Its private test images have no public labels and are not listed:

    <category>/train/good/*.png, validation/good/*.png, test_public/{good,bad}/*.png,
    test_public/ground_truth/bad/*_mask.png, test_private*/*.png

MVTec LOCO (Bergmann et al., IJCV 2022). An image has one mask for each of its defects:

    <category>/train/good/*.png, validation/good/*.png, test/{good,logical_anomalies,structural_anomalies}/*.png,
    ground_truth/<defect>/<image>/000.png, 001.png, ...

MVTec 3D-AD (Bergmann et al., VISAPP 2022), of which the photographs are read and the point clouds in xyz/ are not:

    <category>/train/good/rgb/*.png, validation/good/rgb/*.png, test/{good,<defect>}/{rgb,gt}/*.png
"""

from pathlib import Path

from .dataset import Sample, check_files, check_masks_found, pick_categories, wrong_layout
from .doubts import label_files, named_otherwise
from .listing import images_under, list_files, list_images, subfolders
from .masks import MaskFinder
from .roles import mask_stem, meaning_of


def load_mvtec(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """MVTec-AD's samples of `split` ("train" or "test"); arguments and errors as `load_categories`."""
    return load_categories(root, split, categories, "MVTec-AD")


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
        and {f[0] for f in folders} == {f[0] for f in folders if f[1:3] in (("train", good), ("test", good))}
        and not any(meaning_of(f[0]).mask for f in folders)
        and all(f[1] in ("train", "test", "ground_truth") for f in folders)
        and not any(mask_stem(path.stem) for path in paths if path.parts[1] != "ground_truth")
        and not named_otherwise([root / path for path in paths if path.parts[2] == good])
        and not any(path.relative_to(root).parts[2:3] == (good,) for path in label_files(root, listing))
    )


def load_mvtec_ad_2(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """MVTec-AD 2's samples of `split` ("train", "validation" or "test", which is the public one)."""
    return load_categories(root, split, categories, "MVTec-AD 2", test="test_public")


def load_mvtec_loco(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """MVTec LOCO's samples of `split` ("train", "validation" or "test").

    Every pixel that is not 0 in any mask of an image counts as defect: the values tell kinds of defects apart. The
    metric of LOCO's authors, sPRO, saturates each kind at an area of its own instead; AUPRO on these masks is another
    number.
    """
    return load_categories(root, split, categories, "MVTec LOCO", a_folder_each=True)


def load_mvtec_3d(root: Path, split: str, categories: list[str] | None = None) -> list[Sample]:
    """MVTec 3D-AD's samples of `split` ("train", "validation" or "test").

    Raises:
        ValueError: The layout is another one, a category does not exist or lacks the split, or a defect has no mask.
    """
    available = [folder.name for folder in subfolders(root) if (folder / "train" / "good" / "rgb").is_dir()]
    if not available:
        raise wrong_layout(root, "MVTec 3D-AD", "<category>/train/good/rgb and <category>/test/<defect>/{rgb,gt}")
    samples = []
    for category in pick_categories(root, available, categories):
        for kind in subfolders(split_folder(root, category, split)):
            if not (kind / "rgb").is_dir():
                raise ValueError(f"{kind} is not whole: {kind / 'rgb'} does not exist.")
            images = list_images(kind / "rgb")
            masks = [None if kind.name == "good" else kind / "gt" / f"{image.stem}.png" for image in images]
            samples += [Sample(image, category, kind.name, mask) for image, mask in zip(images, masks, strict=True)]
    check_files(samples, root)
    return samples


def load_categories(
    root: Path,
    split: str,
    categories: list[str] | None,
    layout: str,
    test: str = "test",
    good: str = "good",
    a_folder_each: bool = False,
) -> list[Sample]:
    """Samples of one split of the named categories, by default all.

    Args:
        layout: Its name, for errors.
        test: Folder of the split "test"; other splits lie in folders of their own name.
        good: Folder of good images.
        a_folder_each: Whether an image's masks lie in a folder of its name, each a part, any value but 0 defect.

    Raises:
        ValueError: No category in the layout, or one without the split, or a named one that does not exist, or
            defects without a mask beside masks that are of no image.
    """
    available = [p.name for p in subfolders(root) if (p / "train" / good).is_dir() or (p / test / good).is_dir()]
    if not available:
        raise wrong_layout(root, layout, f"<category>/train/{good} and <category>/{test}/<defect>")
    samples = []
    for category in pick_categories(root, available, categories):
        folder = split_folder(root, category, split, test)
        own, truths = [], masks_by_kind(root / category, folder)
        others = set().union(*truths.values())
        for kind in subfolders(folder):
            if kind.name == "ground_truth":  # MVTec-AD 2 keeps its masks among the images
                continue
            defect, images = "good" if kind.name == good else kind.name, images_under(kind)
            masks = truths.get(kind.name.casefold(), []) + truths.get("", [])
            find = MaskFinder(masks, images, root / category)
            for image in images:
                parts = tuple(mask for mask in masks if mask.parent.name == image.stem)
                mask = (parts or None) if a_folder_each else find(image)
                mask = None if defect == "good" else mask
                own.append(Sample(image, category, defect, mask, 0 if a_folder_each else None))
                if defect != "good":
                    others -= set(parts if a_folder_each else find.candidates(image))
            if defect == "good":
                others -= set(masks) - set(truths.get("", []))
        if split == "test":
            check_masks_found(root / category, own, sorted(others))
        samples += own
    return samples


def split_folder(root: Path, category: str, split: str, test: str = "test") -> Path:
    """The folder of a category's split, that of "test" called otherwise; raises ValueError if there is none."""
    folder = root / category / (test if split == "test" else split)
    if not folder.is_dir():
        raise ValueError(f"Category {category!r} has no {split!r} folder: {folder} does not exist.")
    return folder


def masks_by_kind(*folders: Path) -> dict[str, list[Path]]:
    """The masks in ground_truth of these folders by the kind of defect, in lower case: "crack" of `Crack` and of
    `crack_masks`; "" of those in no folder of a kind."""
    found: dict[str, list[Path]] = {}
    for truth in {folder / "ground_truth" for folder in folders if (folder / "ground_truth").is_dir()}:
        for path in images_under(truth):
            kind = next(iter(path.relative_to(truth).parts[:-1]), "")
            found.setdefault((mask_stem(kind) or kind).casefold(), []).append(path)
    return found
