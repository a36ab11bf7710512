"""Every layout on disk, listed as it should be, and what is said when it is another one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rad.data import DATASET_FORMATS, AnomalyDataset, detect_format, load_dataset, load_hub_dataset


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


def test_masks_of_which_none_bears_an_images_name_are_refused(mvtec):
    masks = mvtec / "bottle" / "ground_truth" / "crack"
    (masks / "000_mask.png").rename(masks / "crack_one.png")
    with pytest.raises(ValueError, match=r"1 of the 1 defects in .*bottle have no mask .*crack_one\.png"):
        load_dataset(mvtec, "mvtec", "test")


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


def test_what_mtd_needs_is_named(mtd):
    for image in (mtd / "MT_Free").glob("*.jpg"):
        image.rename(image.with_suffix(".JPG.png"))
    with pytest.raises(
        ValueError, match="PNG files .* bear the name of no image: in MTD's layout PNG files are masks"
    ):
        load_dataset(mtd)
    (mtd / "MT_Free").rename(mtd / "elsewhere")
    with pytest.raises(ValueError, match="not in MTD layout: expected .*MT_Free"):
        load_dataset(mtd, "mtd", "train")


def test_mtd_as_its_authors_publish_it(mtd):
    """In folders Imgs, without the list: every fifth good image is for the test."""
    (mtd / "train_filenames.txt").unlink()
    for name in "fghij":
        write_image(mtd / "MT_Free" / f"{name}.JPG")
    for folder in list(mtd.iterdir()):
        folder.rename(mtd / "moved")
        folder.mkdir()
        (mtd / "moved").rename(folder / "Imgs")
    assert [sample.image.stem for sample in load_dataset(mtd)] == list("abcfhij")
    test = load_dataset(mtd, split="test")
    assert [(sample.image.stem, sample.defect) for sample in test] == [("d", "crack"), ("g", "good"), ("e", "uneven")]
    assert np.argwhere(test.mask(0)).tolist() == [[3, 4]]


# MVTec-AD 2


@pytest.fixture
def mvtec_ad_2(tmp_path) -> Path:
    for path in ("train/good/0_regular", "validation/good/1_regular", "test_public/good/2_shift_1"):
        write_image(tmp_path / "can" / f"{path}.png")
    write_image(tmp_path / "can" / "test_public" / "bad" / "3_regular.png")
    write_mask(tmp_path / "can" / "test_public" / "ground_truth" / "bad" / "3_regular_mask.png", (4, 5, 255))
    write_image(tmp_path / "can" / "test_private" / "4_regular.png")
    write_image(tmp_path / "can" / "test_private_mixed" / "4_mixed.png")
    return tmp_path


def test_mvtec_ad_2_is_measured_on_its_public_images(mvtec_ad_2):
    test = load_dataset(mvtec_ad_2, split="test")
    assert listed(test) == [("can", "bad", 1), ("can", "good", 0)]
    assert np.argwhere(test.mask(0)).tolist() == [[4, 5]] and not test.mask(1).any()


@pytest.mark.parametrize(("split", "name"), [("train", "0_regular.png"), ("validation", "1_regular.png")])
def test_validation_images_are_part_of_no_other_split(mvtec_ad_2, split, name):
    assert [sample.image.name for sample in load_dataset(mvtec_ad_2, "mvtec_ad_2", split)] == [name]


# MVTec LOCO


@pytest.fixture
def mvtec_loco(tmp_path) -> Path:
    for folder in ("train/good", "validation/good", "test/good", "test/logical_anomalies"):
        write_image(tmp_path / "pushpins" / folder / "000.png")
    write_image(tmp_path / "pushpins" / "test" / "structural_anomalies" / "001.png")
    truth = tmp_path / "pushpins" / "ground_truth"
    write_mask(truth / "logical_anomalies" / "000" / "000.png", (0, 1, 3))
    write_mask(truth / "logical_anomalies" / "000" / "001.png", (5, 7, 254))
    return tmp_path


def test_mvtec_loco_unites_the_masks_of_an_image(mvtec_loco):
    test = load_dataset(mvtec_loco, split="test")
    assert [sample.defect for sample in test] == ["good", "logical_anomalies", "structural_anomalies"]
    assert np.argwhere(test.mask(1)).tolist() == [[0, 1], [5, 7]]
    assert test.mask(1, size=(12, 16)).sum() == 8
    assert test.mask(2) is None
    assert len(load_dataset(mvtec_loco, split="validation")) == len(load_dataset(mvtec_loco)) == 1


# VisA


ROWS = """object,split,label,image,mask
candle,train,normal,candle/Data/Images/Normal/0000.JPG,
candle,test,normal,candle/Data/Images/Normal/0001.JPG,
candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png
pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,
"""


@pytest.fixture
def visa(tmp_path) -> Path:
    for name in ("candle/Data/Images/Normal/0000", "candle/Data/Images/Normal/0001", "pcb1/Data/Images/Normal/0000"):
        write_image(tmp_path / f"{name}.JPG")
    write_image(tmp_path / "candle/Data/Images/Anomaly/000.JPG")
    write_mask(tmp_path / "candle/Data/Masks/Anomaly/000.png", (2, 3, 1), (2, 4, 5))
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text(ROWS)
    return tmp_path


def test_visa_is_split_by_its_file(visa):
    assert listed(load_dataset(visa)) == [("candle", "good", 0), ("pcb1", "good", 0)]
    test = load_dataset(visa, split="test")
    assert [(sample.image.name, sample.defect) for sample in test] == [("0001.JPG", "good"), ("000.JPG", "anomaly")]
    assert np.argwhere(test.mask(1)).tolist() == [[2, 3], [2, 4]]
    assert load_dataset(visa, "visa", "train", ["pcb1"]).categories == ["pcb1"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (ROWS.replace("candle/Data/Images/Normal/0001.JPG", "/etc/passwd"), "names '/etc/passwd', which is no path"),
        (ROWS.replace("candle/Data/Masks", "candle/../../Data/Masks"), "Data/Masks/.*, which is no path inside"),
        (ROWS.replace("Normal/0001", "Normal/0007").replace("Masks", "Mask"), "2 files that do not exist.*0007.JPG"),
        (ROWS.replace("test,anomaly", "test,broken"), "labels an image 'broken'; it must be normal or anomaly"),
        (ROWS.replace("label", "class"), r"columns object, split, label, image, mask; it has \['object'.*'class'"),
        ("object,split,label,image,mask", "it has no rows"),
        ("object,split\ncandle,\xff", "no CSV file that can be read"),
    ],
)
def test_a_bad_split_file_of_visa_is_explained(visa, table, message):
    (visa / "split_csv" / "1cls.csv").write_bytes(table.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        load_dataset(visa, "visa", "test")


# BTAD


@pytest.mark.parametrize(("suffix", "mask_suffix"), [(".bmp", ".png"), (".png", ".png"), (".bmp", ".bmp")])
def test_btad_calls_good_ok(tmp_path, suffix, mask_suffix):
    for path in ("train/ok/0000", "test/ok/0001", "test/ko/0002"):
        write_image(tmp_path / "01" / f"{path}{suffix}")
    write_mask(tmp_path / "01" / "ground_truth" / "ko" / f"0002{mask_suffix}", (3, 2, 255))
    assert listed(load_dataset(tmp_path)) == [("01", "good", 0)]
    test = load_dataset(tmp_path, split="test")
    assert listed(test) == [("01", "ko", 1), ("01", "good", 0)]
    assert np.argwhere(test.mask(0)).tolist() == [[3, 2]]


# Real-IAD


@pytest.fixture
def real_iad(tmp_path) -> Path:
    entries = [("OK", "OK/S1/a.jpg", None), ("OK", "OK/S2/b.jpg", None), ("AK", "NG/AK/S3/c.jpg", "NG/AK/S3/c.png")]
    for _, image, _ in entries:
        write_image(tmp_path / "realiad_256" / "audiojack" / image)
    write_mask(tmp_path / "realiad_256" / "audiojack" / "NG/AK/S3/c.png", (1, 1, 255), (1, 2, 9))
    entries = [dict(zip(("anomaly_class", "image_path", "mask_path"), entry, strict=True)) for entry in entries]
    content = {"meta": {"normal_class": "OK", "prefix": "audiojack/"}, "train": entries[:1], "test": entries[1:]}
    (tmp_path / "realiad_jsons").mkdir()
    (tmp_path / "realiad_jsons" / "audiojack.json").write_text(json.dumps(content))
    return tmp_path


def test_real_iad_is_split_by_its_files(real_iad):
    assert [sample.image.name for sample in load_dataset(real_iad)] == ["a.jpg"]
    test = load_dataset(real_iad, split="test")
    assert listed(test) == [("audiojack", "good", 0), ("audiojack", "AK", 1)]
    assert np.argwhere(test.mask(1)).tolist() == [[1, 1], [1, 2]]


def test_real_iad_as_its_archives_unpack(real_iad):
    """The files of the JSON archive lie one folder deeper, and of two resolutions the larger counts."""
    (real_iad / "realiad_jsons").rename(real_iad / "moved")
    (real_iad / "realiad_jsons").mkdir()
    (real_iad / "moved").rename(real_iad / "realiad_jsons" / "realiad_jsons")
    shutil.copytree(real_iad / "realiad_256", real_iad / "realiad_1024")
    image = load_dataset(real_iad, split="test", categories=["audiojack"])[0].image
    assert image == real_iad / "realiad_1024" / "audiojack" / "OK" / "S2" / "b.jpg"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("NG/AK/S3/c.jpg", "../../../c.jpg", "names '../../../c.jpg', which is no path inside"),
        ("audiojack/", "/etc", "names '/etc', which is no path inside"),
        ("audiojack/", "elsewhere", "folder 'elsewhere', which is in none of .*realiad_1024"),
        ("OK/S2/b.jpg", "OK/S2/z.jpg", "names 1 files that do not exist, the first is .*z.jpg"),
        ("image_path", "path", "not in Real-IAD's form: expected meta .*KeyError: 'image_path'"),
        ('"test": [', '"test": [7, ', "not in Real-IAD's form"),
        ('{"meta"', "", "not in Real-IAD's form"),
        ('"NG/AK/S3/c.png"', "[1]", "names .1., which is no path inside"),
    ],
)
def test_a_bad_file_of_real_iad_is_explained(real_iad, old, new, message):
    file = real_iad / "realiad_jsons" / "audiojack.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_dataset(real_iad, "real_iad", "test")


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


def test_a_folder_has_no_test_split_and_no_category_but_its_own_name(tmp_path):
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no 'test' split: all of its 1 images are good ones"):
        load_dataset(tmp_path, "folder", "test")
    with pytest.raises(ValueError, match="no categories"):
        load_dataset(tmp_path, "folder", "train", ["nut"])
    assert len(load_dataset(tmp_path, "folder", "train", [tmp_path.name])) == 1


@pytest.fixture
def labelled(tmp_path) -> Path:
    root = tmp_path / "nuts"
    for number in range(10):
        write_image(root / "good" / f"{number}.png")
    write_image(root / "dent" / "monday" / "a.jpg")
    write_image(root / "scratch" / "b.jpg")
    write_mask(root / "ground_truth" / "dent" / "monday" / "a_mask.png", (0, 0, 255))
    return root


def test_a_folder_may_have_defects_beside_the_good(labelled):
    train, test = load_dataset(labelled), load_dataset(labelled, split="test")
    assert [sample.image.stem for sample in train] == ["0", "1", "2", "3", "5", "6", "7", "8"]
    assert [(s.image.stem, s.defect) for s in test] == [("4", "good"), ("9", "good"), ("a", "dent"), ("b", "scratch")]
    assert np.argwhere(test.mask(2)).tolist() == [[0, 0]] and test.mask(3) is None
    assert train.categories == test.categories == ["nuts"]


def test_good_images_may_lie_in_a_folder_ok(labelled):
    (labelled / "good").rename(labelled / "OK")
    assert len(load_dataset(labelled)) == 8


# The Hub


@pytest.fixture
def hub_folder(tmp_path) -> Path:
    """Rows good, scratch with a mask, dent without one; in the manner of a data set on the Hub."""
    datasets = pytest.importorskip("datasets")
    write_image(tmp_path / "image.png")
    write_mask(tmp_path / "mask.png", (5, 0, 1))
    write_mask(tmp_path / "empty.png")
    image, mask, empty = ((tmp_path / f"{name}.png").read_bytes() for name in ("image", "mask", "empty"))
    columns = {
        "image": [{"bytes": image, "path": None}] * 3,
        "label": [0, 1, 2],
        "mask": [{"bytes": empty, "path": None}, {"bytes": mask, "path": None}, None],
    }
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["good", "scratch", "dent"]), mask=datasets.Image()
    )
    (tmp_path / "parts").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "parts" / "test.parquet")
    return tmp_path / "parts"


def load_rows(folder: Path, **kwargs) -> AnomalyDataset:
    return load_hub_dataset(str(folder), split="test", cache_dir=folder.parent / "cache", **kwargs)


def test_a_hub_data_set_with_masks(hub_folder):
    test = load_rows(hub_folder, label_column="label", mask_column="mask", good_only=False)
    assert listed(test) == [("parts", "good", 0), ("parts", "scratch", 1), ("parts", "dent", 1)]
    assert test.mask(0).shape == (6, 8) and not test.mask(0).any()
    assert np.argwhere(test.mask(1)).tolist() == [[5, 0]] and test.mask(2) is None
    assert test.mask(1, (12, 16)).sum() == 4 and test[1].image.size == (8, 6) and test.mask(2, (12, 16)) is None
    assert load_rows(hub_folder, label_column="label", good_only=False).mask(1) is None


def test_good_rows_are_trained_on(hub_folder):
    assert listed(load_rows(hub_folder, label_column="label")) == [("parts", "good", 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"good_only": False}, "label_column must name the column"),
        ({"label_column": "label", "mask_column": "truth"}, "has no column 'truth'; it has image, label, mask"),
        ({"mask_column": "label"}, "The column 'label' of .* not images"),
        ({"categories": ["nut"]}, "has no category nut; it has parts"),
    ],
)
def test_what_a_hub_data_set_lacks_is_named(hub_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_rows(hub_folder, **arguments)


# KolektorSDD, KolektorSDD2, DAGM and MVTec 3D-AD, as their authors publish them


@pytest.fixture
def kolektor(tmp_path) -> Path:
    for item in range(1, 7):
        for part in range(2):
            write_image(tmp_path / f"kos{item:02d}" / f"Part{part}.jpg")
            defect = [(2, 3, 255)] if (item, part) in ((2, 1), (5, 0)) else []
            write_mask(tmp_path / f"kos{item:02d}" / f"Part{part}_label.bmp", *defect)
    return tmp_path


@pytest.fixture
def kolektor2(tmp_path) -> Path:
    for split, first in (("train", 10000), ("test", 20000)):
        for number in range(first, first + 3):
            write_image(tmp_path / split / f"{number}.png")
            write_mask(tmp_path / split / f"{number}_GT.png", *([(2, 3, 255)] if number % 10 == 1 else []))
    write_image(tmp_path / "train" / "10000 (copy).png")  # as in its archive
    write_mask(tmp_path / "train" / "10000_GT (copy).png")
    return tmp_path


@pytest.fixture
def dagm(tmp_path) -> Path:
    for category in ("Class1", "Class2"):
        for split, names in (("Train", ("0576", "0577")), ("Test", ("0001", "0002"))):
            for name in names:
                write_image(tmp_path / category / split / f"{name}.PNG")
            write_mask(tmp_path / category / split / "Label" / f"{names[1]}_label.PNG", (2, 3, 255))
            (tmp_path / category / split / "Label" / "Labels.txt").write_text("1\n1\t0\t0576.PNG\t0\t0\n")
    return tmp_path


@pytest.fixture
def mvtec_3d(tmp_path) -> Path:
    for split, kind in (("train", "good"), ("validation", "good"), ("test", "good"), ("test", "crack")):
        write_image(tmp_path / "bagel" / split / kind / "rgb" / "000.png")
        (tmp_path / "bagel" / split / kind / "xyz").mkdir()
        (tmp_path / "bagel" / split / kind / "xyz" / "000.tiff").write_bytes(b"a cloud of points")
    write_mask(tmp_path / "bagel" / "test" / "good" / "gt" / "000.png")
    write_mask(tmp_path / "bagel" / "test" / "crack" / "gt" / "000.png", (2, 3, 255))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("kolektor", ["kos01/Part0", "kos01/Part1", "kos02/Part0", "kos03/Part0", "kos03/Part1", "kos04/Part0",
                      "kos04/Part1", "kos06/Part0", "kos06/Part1"],
         ["kos02/Part1 crack", "kos05/Part0 crack", "kos05/Part1"]),
        ("kolektor2", ["train/10000", "train/10002"], ["test/20000", "test/20001 defect", "test/20002"]),
        ("dagm", ["Train/0576"] * 2, ["Test/0001", "Test/0002 defect"] * 2),
        ("mvtec_3d", ["rgb/000"], ["rgb/000 crack", "rgb/000"]),
    ],
)  # fmt: skip
def test_data_as_its_authors_publish_it(name, train, test, request):
    def told(split: str) -> list[str]:
        samples = load_dataset(request.getfixturevalue(name), split=split).samples
        return [f"{s.image.parent.name}/{s.image.stem}{f' {s.defect}' if s.label else ''}" for s in samples]

    assert told("train") == train and told("test") == test
    dataset = load_dataset(request.getfixturevalue(name), name, "test")
    masks = [np.argwhere(dataset.mask(i)).tolist() for i in range(len(dataset))]
    assert masks == [[[2, 3]] if sample.label else [] for sample in dataset]


@pytest.mark.parametrize(("name", "ending"), [("kolektor", "Part0_label.bmp"), ("kolektor2", "10002_GT.png")])
def test_an_image_of_which_no_mask_tells_whether_it_is_good_is_refused(name, ending, request):
    root = request.getfixturevalue(name)
    path = next(root.rglob(f"*{ending}"))
    path.unlink()
    with pytest.raises(ValueError, match=f"Only masks tell which images in .* are good: The mask {ending} of"):
        load_dataset(root)


def test_labels_of_no_image_are_refused(dagm):
    (dagm / "Class2" / "Train" / "0577.PNG").unlink()
    with pytest.raises(ValueError, match="1 labels in .*Class2.*, such as 0577_label, are of no image"):
        load_dataset(dagm)


def test_half_a_data_set_is_refused(dagm):
    shutil.rmtree(dagm / "Class1" / "Test" / "Label")
    with pytest.raises(ValueError, match="not whole: .*Class1/Test/Label does not exist"):
        load_dataset(dagm, split="test")


def test_a_kind_of_mvtec_3d_without_photographs_is_refused(mvtec_3d):
    shutil.rmtree(mvtec_3d / "bagel" / "test" / "crack" / "rgb")
    with pytest.raises(ValueError, match="test/crack is not whole"):
        load_dataset(mvtec_3d, split="test")


def test_a_defect_of_mvtec_3d_without_a_mask_is_named(mvtec_3d):
    (mvtec_3d / "bagel" / "test" / "crack" / "gt" / "000.png").unlink()
    with pytest.raises(ValueError, match="names 1 files that do not exist, .*crack/gt/000.png"):
        load_dataset(mvtec_3d, split="test")


def test_the_validation_split_of_mvtec_3d_is_apart(mvtec_3d):
    assert len(load_dataset(mvtec_3d, split="validation")) == 1


# Any layout


@pytest.mark.parametrize(
    "name",
    "mvtec mvtec_ad_2 mvtec_loco mvtec_3d visa mtd real_iad kolektor kolektor2 dagm".split(),
)
def test_layouts_are_told_apart(name, request):
    assert detect_format(request.getfixturevalue(name)) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mvtec", "<category>/train/good"),
        ("mvtec_ad_2", "<category>/test_public/<defect>"),
        ("mvtec_loco", "<category>/test/<defect>"),
        ("visa", "split_csv/1cls.csv"),
        ("btad", "<category>/train/ok"),
        ("mtd", "MT_Free"),
        ("real_iad", "realiad_jsons/<category>.json"),
        ("mvtec_3d", "<category>/train/good/rgb"),
        ("kolektor", "kos01/Part0.jpg"),
        ("kolektor2", "train/10000.png"),
        ("dagm", "Class1/Train/0576.PNG"),
    ],
)
def test_a_wrong_layout_says_what_was_found_and_expected(tmp_path, name, expected):
    with pytest.raises(ValueError, match=f"layout: expected .*{expected}.*, found nothing"):
        load_dataset(tmp_path, name)
    write_image(tmp_path / "photos" / "000.png")
    with pytest.raises(ValueError, match=rf"layout: expected .*{expected}.*, found \['photos'\]"):
        load_dataset(tmp_path, name)


@pytest.mark.parametrize("name", ["mvtec", "visa", "mtd", "real_iad", "kolektor", "kolektor2", "dagm", "labelled"])
def test_most_layouts_have_no_validation_split(name, request):
    with pytest.raises(ValueError, match="must be 'train' or 'test', got 'validation'"):
        load_dataset(request.getfixturevalue(name), split="validation")


def test_a_folder_with_no_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"No images for split 'train' in .*; accepted files: \.png, .*\.jpg"):
        load_dataset(tmp_path, "folder", "train")
    (tmp_path / "bottle" / "train" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match="No images for split 'train'"):
        load_dataset(tmp_path, "mvtec", "train")


@pytest.mark.parametrize("dataset_format", DATASET_FORMATS)
def test_a_missing_root_is_named(tmp_path, dataset_format):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_dataset(tmp_path / "nowhere", dataset_format)


def test_an_unknown_format_or_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of mvtec, .*mtd, .*folder, got 'coco'"):
        load_dataset(tmp_path, "coco")
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        load_dataset(tmp_path, "mvtec", "val")
