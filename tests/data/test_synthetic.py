"""The synthetic data set: reproducible bytes, in the layout of MVTec-AD, with defects of all severities."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rad.data import synthetic
from rad.data.defects import DEFECTS, add_defect
from rad.data.synthetic import CATEGORIES, OBJECTS, TEXTURES, render, write_synthetic

SMALL = {"num_train": 1, "num_test_good": 1, "num_per_defect": 1, "size": 64}


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("synthetic") / "set", **SMALL)


def test_constants():
    assert len(TEXTURES) == 5 and len(OBJECTS) == 3 and CATEGORIES == TEXTURES + OBJECTS


def test_layout(small_set):
    expected = set()
    for category in CATEGORIES:
        expected |= {f"{category}/train/good/000.png", f"{category}/test/good/000.png"}
        expected |= {f"{category}/test/{kind}/000.png" for kind in DEFECTS}
        expected |= {f"{category}/ground_truth/{kind}/000_mask.png" for kind in DEFECTS}
    assert set(files_of(small_set)) == expected
    assert [path.name for path in small_set.parent.iterdir()] == ["set"]  # nothing half-written is left
    for path in small_set.rglob("*.png"):
        with Image.open(path) as image:
            image.load()
        is_mask = path.stem.endswith("_mask")
        assert image.size == (64, 64) and image.mode == ("L" if is_mask else "RGB")
        if is_mask:
            assert set(np.unique(image)) == {0, 255}


def test_same_seed_same_bytes_whatever_else_is_written(small_set, tmp_path):
    (tmp_path / "part").mkdir()  # an empty folder may be there
    more = {**SMALL, "num_train": 2, "num_test_good": 2}
    part = files_of(write_synthetic(tmp_path / "part", categories=("capsule", "gravel"), **more))
    whole = files_of(small_set)
    kept = {name: whole[name] for name in whole if name.startswith(("capsule/", "gravel/"))}
    assert kept == {name: part[name] for name in kept}
    assert part["capsule/train/good/000.png"] != part["capsule/train/good/001.png"]

    other = files_of(write_synthetic(tmp_path / "other", categories=("gravel",), seed=1, **SMALL))
    assert all(other[name] != whole[name] for name in other if "mask" not in name)


def test_severities_span_the_range(tmp_path, monkeypatch):
    seen = []

    def spy(image, kind, severity, rng, foreground):
        seen.append(severity)
        return add_defect(image, kind, severity, rng, foreground)

    monkeypatch.setattr(synthetic, "add_defect", spy)
    write_synthetic(tmp_path / "set", ("brushed_metal",), num_train=0, num_test_good=0, num_per_defect=3, size=64)
    assert seen == [0.0, 0.5, 1.0] * len(DEFECTS)


@pytest.mark.parametrize("category", CATEGORIES)
def test_render(category):
    image, foreground = render(category, np.random.default_rng(1), 128)
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert foreground.shape == (128, 128) and foreground.dtype == bool
    assert 20 < image.mean() < 235 and image.std() > 5
    assert foreground.all() if category in TEXTURES else 0.1 < foreground.mean() < 0.6
    assert render(category, np.random.default_rng(0), 33)[0].shape == (33, 33, 3)


def test_refusals(tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="Unknown category 'moon'"):
        render("moon", rng)
    with pytest.raises(ValueError, match="at least 32"):
        render("brick", rng, 16)
    with pytest.raises(ValueError, match="Unknown categories moon"):
        write_synthetic(tmp_path / "set", categories=("moon",))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds files"):
        write_synthetic(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="at least 32"):
        write_synthetic(tmp_path / "set", **{**SMALL, "size": 8})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]  # a failure leaves nothing behind


def test_command_line(tmp_path):
    counts = ["--num_train", "1", "--num_test_good", "1", "--num_per_defect", "1", "--size", "64"]
    synthetic.main([str(tmp_path / "set"), "--categories", "hex_nut", "--seed", "3", *counts])
    assert len(files_of(tmp_path / "set")) == 2 + 2 * len(DEFECTS)
