"""Every layout on disk, listed as it should be, and what is said when it is another one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rad.data import AnomalyDataset, Sample, load_dataset


def write_image(path: Path, pixels: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8), 128, np.uint8) if pixels is None else pixels).save(path)


def write_mask(path: Path, *values: tuple[int, int, int]) -> None:
    """A mask of 6 x 8 pixels that is 0 but for (row, column, value)."""
    mask = np.zeros((6, 8), np.uint8)
    for row, column, value in values:
        mask[row, column] = value
    write_image(path, mask)


@pytest.fixture
def mvtec(tmp_path) -> Path:
    for category in ("bottle", "cable"):
        for name in ("000.png", "001.png"):
            write_image(tmp_path / category / "train" / "good" / name)
        write_image(tmp_path / category / "test" / "good" / "000.png")
        write_image(tmp_path / category / "test" / "crack" / "000.png")
        write_mask(tmp_path / category / "ground_truth" / "crack" / "000_mask.png", (1, 2, 255))
    return tmp_path


@pytest.fixture
def mtd(tmp_path) -> Path:
    for name in ("a", "b", "c"):
        write_image(tmp_path / "MT_Free" / f"{name}.jpg")
        write_mask(tmp_path / "MT_Free" / f"{name}.png")
    write_image(tmp_path / "MT_Crack" / "d.jpg")
    write_mask(tmp_path / "MT_Crack" / "d.png", (3, 4, 255))
    write_image(tmp_path / "MT_Uneven" / "e.jpg")
    write_mask(tmp_path / "MT_Uneven" / "e.png")
    (tmp_path / "train_filenames.txt").write_text("a.jpg\nc.jpg\n")
    return tmp_path


def listed(dataset: AnomalyDataset) -> list[tuple[str, str, int]]:
    return [(sample.category, sample.defect, sample.label) for sample in dataset]


# MVTec-AD


def test_mvtec_train(mvtec):
    dataset = load_dataset(mvtec, "mvtec", "train")
    assert listed(dataset) == [("bottle", "good", 0)] * 2 + [("cable", "good", 0)] * 2
    assert dataset.categories == ["bottle", "cable"]
    assert dataset[1].image == mvtec / "bottle" / "train" / "good" / "001.png"
    assert all(sample.mask is None for sample in dataset)


def test_mvtec_test(mvtec):
    dataset = load_dataset(mvtec, "mvtec", "test")
    assert listed(dataset) == [(c, d, int(d == "crack")) for c in ("bottle", "cable") for d in ("crack", "good")]
    mask = dataset.mask(0)
    assert mask.dtype == bool and np.argwhere(mask).tolist() == [[1, 2]]
    assert dataset.mask(1).shape == (6, 8) and not dataset.mask(1).any()


def test_masks_may_bear_the_name_of_their_image(mvtec):
    masks = mvtec / "bottle" / "ground_truth" / "crack"
    (masks / "000_mask.png").rename(masks / "000.png")
    assert load_dataset(mvtec, "mvtec", "test")[0].mask == masks / "000.png"


def test_the_train_split_has_good_images_only(mvtec):
    write_image(mvtec / "bottle" / "train" / "crack" / "000.png")
    assert listed(load_dataset(mvtec, "mvtec", "train", ["bottle"])) == [("bottle", "good", 0)] * 2


def test_categories_are_filtered(mvtec):
    assert load_dataset(mvtec, "mvtec", "test", ["cable"]).categories == ["cable"]
    assert load_dataset(mvtec, "mvtec", "test", ["cable", "bottle"]).categories == ["bottle", "cable"]


def test_an_unknown_category_lists_those_that_exist(mvtec):
    with pytest.raises(ValueError, match="no category screw; it has bottle, cable"):
        load_dataset(mvtec, "mvtec", "train", ["cable", "screw"])


def test_a_category_without_masks_counts_at_image_level(mvtec):
    for path in (mvtec / "bottle" / "ground_truth").rglob("*.png"):
        path.unlink()
    dataset = load_dataset(mvtec, "mvtec", "test", ["bottle"])
    assert listed(dataset) == [("bottle", "crack", 1), ("bottle", "good", 0)]
    assert dataset[0].mask is None and dataset.mask(0) is None and dataset.mask(0, size=(3, 4)) is None


def test_a_category_without_the_split_is_named(mvtec):
    write_image(mvtec / "nut" / "train" / "good" / "000.png")
    with pytest.raises(ValueError, match="'nut' has no 'test' folder"):
        load_dataset(mvtec, "mvtec", "test")


def test_other_files_and_hidden_ones_are_left_out(mvtec):
    folder = mvtec / "bottle" / "train" / "good"
    (folder / "notes.txt").write_text("not an image")
    (folder / "._000.png").write_bytes(b"left by another system")
    (mvtec / ".cache" / "train").mkdir(parents=True)
    write_image(folder / "002.JPG")
    names = [sample.image.name for sample in load_dataset(mvtec, "mvtec", "train", ["bottle"])]
    assert names == ["000.png", "001.png", "002.JPG"]
    assert load_dataset(mvtec, "mvtec", "train").categories == ["bottle", "cable"]


def test_another_layout_is_described(tmp_path):
    write_image(tmp_path / "photos" / "000.png")
    with pytest.raises(ValueError, match=r"not in MVTec-AD layout: expected <category>/train/good.*'photos'"):
        load_dataset(tmp_path, "mvtec", "train")


# Magnetic Tile Defects


def test_mtd_train_is_what_the_list_names(mtd):
    dataset = load_dataset(mtd, "mtd", "train")
    assert [sample.image.name for sample in dataset] == ["a.jpg", "c.jpg"]
    assert listed(dataset) == [("magnetic_tile", "good", 0)] * 2


def test_mtd_test_is_all_else(mtd):
    dataset = load_dataset(mtd, "mtd", "test")
    assert [(sample.image.name, sample.defect) for sample in dataset] == [
        ("d.jpg", "crack"),
        ("b.jpg", "good"),
        ("e.jpg", "uneven"),
    ]
    assert np.argwhere(dataset.mask(0)).tolist() == [[3, 4]]
    assert not dataset.mask(1).any()


def test_an_empty_mask_of_a_defect_is_no_mask(mtd):
    dataset = load_dataset(mtd, "mtd", "test")
    assert dataset[2].label == 1 and dataset.mask(2) is None


def test_the_full_value_of_a_grey_mask_is_defect(mtd):
    write_mask(mtd / "MT_Crack" / "d.png", (0, 0, 255), (5, 7, 255))
    assert np.argwhere(load_dataset(mtd, "mtd", "test").mask(0)).tolist() == [[0, 0], [5, 7]]


def test_faint_grey_around_a_mask_is_no_defect(mtd):
    write_mask(mtd / "MT_Crack" / "d.png", (3, 3, 2), (3, 4, 255), (3, 5, 40))
    assert np.argwhere(load_dataset(mtd, "mtd", "test").mask(0)).tolist() == [[3, 4]]


def test_mtd_has_one_category(mtd):
    assert len(load_dataset(mtd, "mtd", "train", ["magnetic_tile"])) == 2
    with pytest.raises(ValueError, match="one category, magnetic_tile; got bottle"):
        load_dataset(mtd, "mtd", "train", ["bottle"])


@pytest.mark.parametrize("missing", ["MT_Free", "train_filenames.txt"])
def test_what_mtd_needs_is_named(mtd, missing):
    (mtd / missing).rename(mtd / "elsewhere")
    with pytest.raises(ValueError, match=f"not in MTD layout: expected .*{missing}"):
        load_dataset(mtd, "mtd", "train")


# A plain folder


def test_a_folder_is_searched_with_its_subfolders(tmp_path):
    root = tmp_path / "nuts"
    for name in ("b.png", "a.JPG", "monday/c.bmp"):
        write_image(root / name)
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_bytes(b"")
    dataset = load_dataset(root, "folder", "train")
    assert listed(dataset) == [("nuts", "good", 0)] * 3
    assert [sample.image.name for sample in dataset] == ["a.JPG", "b.png", "c.bmp"]
    assert not dataset.mask(0).any() and dataset.mask(0).shape == (6, 8)


def test_a_folder_has_no_test_split_and_no_categories(tmp_path):
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no 'test' split"):
        load_dataset(tmp_path, "folder", "test")
    with pytest.raises(ValueError, match="no categories"):
        load_dataset(tmp_path, "folder", "train", ["nut"])


# Any layout


def test_a_folder_with_no_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"No images for split 'train' in .*; accepted files: \.png, \.jpg"):
        load_dataset(tmp_path, "folder", "train")
    (tmp_path / "bottle" / "train" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match="No images for split 'train'"):
        load_dataset(tmp_path, "mvtec", "train")


@pytest.mark.parametrize("dataset_format", ["mvtec", "mtd", "folder"])
def test_a_missing_root_is_named(tmp_path, dataset_format):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_dataset(tmp_path / "nowhere", dataset_format)


def test_an_unknown_format_or_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of mvtec, mtd, folder, got 'coco'"):
        load_dataset(tmp_path, "coco")
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        load_dataset(tmp_path, "mvtec", "val")


# Masks


def test_masks_are_resized_by_nearest_neighbour(tmp_path):
    """Blocks grow to blocks, with no soft edges that would widen them."""
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4, 1:3] = 255
    write_image(tmp_path / "image.png")
    write_image(tmp_path / "mask.png", mask)
    dataset = AnomalyDataset([Sample(tmp_path / "image.png", "nut", "crack", tmp_path / "mask.png")])
    assert np.array_equal(dataset.mask(0, size=(18, 16)), mask.repeat(3, 0).repeat(2, 1) > 0)
    assert np.array_equal(dataset.mask(0, size=(3, 4)), mask[1::2, 1::2] > 0)


def test_the_mask_of_a_good_image_has_the_size_asked_for(tmp_path):
    write_image(tmp_path / "image.png")
    assert AnomalyDataset([Sample(tmp_path / "image.png", "nut")]).mask(0, size=(3, 5)).shape == (3, 5)
