"""Drawn defects: exact masks, contrast that grows with severity, on any photograph."""

import numpy as np
import pytest
from skimage import data

from rad.data import defects
from rad.data.defects import DEFECTS, add_defect
from rad.data.synthetic import CATEGORIES, render


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {category: render(category, np.random.default_rng(1), 128) for category in CATEGORIES}


def test_there_are_six_kinds():
    assert len(set(DEFECTS)) >= 6


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
        assert (change[mask] >= defects.JUST_VISIBLE).mean() > 0.5
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
    strengths, paint = [], defects._PAINTERS["hole"]

    def spy(patch, x, y, strength, *others):
        strengths.append(strength)
        return paint(patch, x, y, strength, *others)

    monkeypatch.setitem(defects._PAINTERS, "hole", spy)
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


def test_refusals():
    rng = np.random.default_rng(0)
    image = np.zeros((64, 64, 3), np.uint8)
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
