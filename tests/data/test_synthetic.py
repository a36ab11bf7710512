"""The synthetic data set: reproducible bytes, exact masks, defects that grow with their severity."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from rad.data import synthetic
from rad.data.synthetic import CATEGORIES, DEFECTS, OBJECTS, TEXTURES, add_defect, render, write_synthetic

SMALL = {"num_train": 1, "num_test_good": 1, "num_per_defect": 1, "size": 64}


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("synthetic") / "set", **SMALL)


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {category: render(category, np.random.default_rng(1), 128) for category in CATEGORIES}


def test_constants():
    assert len(TEXTURES) == 5 and len(OBJECTS) == 3 and CATEGORIES == TEXTURES + OBJECTS
    assert len(set(DEFECTS)) >= 6


def test_layout(small_set):
    expected = set()
    for category in CATEGORIES:
        expected |= {f"{category}/train/good/000.png", f"{category}/test/good/000.png"}
        expected |= {f"{category}/test/{kind}/000.png" for kind in DEFECTS}
        expected |= {f"{category}/ground_truth/{kind}/000_mask.png" for kind in DEFECTS}
    assert set(files_of(small_set)) == expected
    assert [path.name for path in small_set.parent.iterdir()] == ["set"]  # nothing half-written is left
    for path in small_set.rglob("*.png"):
        image = Image.open(path)
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
def test_render(category, parts):
    image, foreground = parts[category]
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert foreground.shape == (128, 128) and foreground.dtype == bool
    assert 20 < image.mean() < 235 and image.std() > 5
    assert foreground.all() if category in TEXTURES else 0.1 < foreground.mean() < 0.6
    assert render(category, np.random.default_rng(0), 33)[0].shape == (33, 33, 3)


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("category", CATEGORIES)
def test_defect_changes_the_mask_and_nothing_else(category, kind, parts):
    image, foreground = parts[category]
    before = image.copy()
    for severity in (0.0, 0.5, 1.0):
        bad, mask = add_defect(image, kind, severity, np.random.default_rng(7), foreground)
        change = np.abs(bad.astype(int) - image).max(-1)
        assert (image == before).all(), "the input must not be written to"
        assert bad.dtype == np.uint8 and mask.dtype == bool and mask.any()
        assert not change[~mask].any()
        assert (change[mask] >= synthetic.JUST_VISIBLE).mean() > 0.5
        assert mask.mean() < 0.25
        if kind != "deformation":
            assert not (mask & ~foreground).any()


@pytest.mark.parametrize("kind", DEFECTS)
def test_severity_raises_contrast(kind, parts):
    def contrast(severity: float) -> float:
        total = 0.0
        for image, foreground in parts.values():
            for seed in range(2):
                bad, mask = add_defect(image, kind, severity, np.random.default_rng(seed), foreground)
                total += np.abs(bad.astype(float) - image)[mask].mean()
        return total

    low, middle, high = contrast(0.0), contrast(0.5), contrast(1.0)
    assert low < middle < high and high > 1.5 * low


def test_the_least_strength_follows_the_texture(monkeypatch):
    strengths, paint = [], synthetic._PAINTERS["hole"]

    def spy(patch, x, y, strength, *others):
        strengths.append(strength)
        return paint(patch, x, y, strength, *others)

    monkeypatch.setitem(synthetic._PAINTERS, "hole", spy)
    noise = np.random.default_rng(0).standard_normal((128, 128, 1)).repeat(3, -1)
    least = []
    for deviation in (0, 12, 90):  # smooth, busy, very busy
        image = (128 + deviation * noise).clip(0, 255).astype(np.uint8)
        first = []
        for severity in (0.0, 0.5, 1.0):
            strengths.clear()
            add_defect(image, "hole", severity, np.random.default_rng(0))
            first.append(strengths[0])
        assert first[1] == pytest.approx((first[0] + 1) / 2) and first[2] == pytest.approx(1)
        least.append(first[0])
    assert least == [pytest.approx(0.25), pytest.approx(0.25 + 3.5 * 12 / 255, abs=0.03), pytest.approx(0.8)]


@pytest.mark.parametrize("kind", DEFECTS)
def test_any_photograph(kind):
    coins = np.repeat(data.coins()[:200, :331, None], 3, -1)
    coins.flags.writeable = False
    bad, mask = add_defect(coins, kind, 0.7, np.random.default_rng(0))
    assert bad.shape == coins.shape and mask.shape == coins.shape[:2] and mask.any()
    assert (bad[~mask] == coins[~mask]).all()
    assert (bad == bad[..., :1]).all(), "a grey photograph must stay grey"

    for flat in (0, 127, 255):  # black, grey and white, tiny and not square
        image = np.full((32, 47, 3), flat, np.uint8)
        bad, mask = add_defect(image, kind, 0.0, np.random.default_rng(0))
        assert mask.any() and (bad[~mask] == flat).all()


@pytest.mark.parametrize("kind", DEFECTS)
def test_small_foreground(kind):
    image = data.astronaut()[:128, :160]
    foreground = np.zeros(image.shape[:2], bool)
    foreground[4:30, 120:156] = True
    _, mask = add_defect(image, kind, 0.5, np.random.default_rng(0), foreground)
    assert (mask & foreground).any()


def test_refusals(tmp_path):
    rng = np.random.default_rng(0)
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="Unknown category 'moon'"):
        render("moon", rng)
    with pytest.raises(ValueError, match="at least 32"):
        render("brick", rng, 16)
    with pytest.raises(ValueError, match="Unknown defect 'ghost'"):
        add_defect(image, "ghost", 0.5, rng)
    with pytest.raises(ValueError, match="Severity"):
        add_defect(image, "hole", 1.5, rng)
    for wrong in (image[..., 0], image[:20], image / 255):
        with pytest.raises(ValueError, match="uint8 RGB"):
            add_defect(wrong, "hole", 0.5, rng)
    for foreground in (np.zeros((64, 64), bool), np.ones((32, 64), bool)):
        with pytest.raises(ValueError, match="foreground"):
            add_defect(image, "hole", 0.5, rng, foreground)
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
