"""Regions of a map: those that a good image would not have, down to their edge."""

import numpy as np
import pytest

from rad.models.false_alarms import EDGE, outline

PIXEL, PEAK = 2.0, 6.0


def blob(row, column, height, width=4.0):
    y, x = np.mgrid[:64, :64]
    return height * np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * width**2))


@pytest.mark.parametrize("height", [7.0, 20.0, 100.0])
def test_a_region_reaches_down_to_a_share_of_its_peak(height):
    """However strong: what is blurred around a defect grows with it."""
    mask = outline(blob(30, 30, height), PIXEL, PEAK)
    expected = blob(30, 30, height) > max(PIXEL, EDGE * height)
    assert np.array_equal(mask, expected) and mask.any()


def test_what_good_images_have_too_is_no_region():
    strong, weak, faint = blob(12, 12, 20), blob(50, 12, 5), blob(12, 50, 1.5)
    mask = outline(strong + weak + faint, PIXEL, PEAK)
    assert mask[12, 12] and not mask[40:].any() and not mask[:, 40:].any()


def test_each_region_has_its_own_edge():
    """A faint defect beside a strong one is not lost."""
    mask = outline(blob(12, 12, 100) + blob(50, 50, 8), PIXEL, PEAK)
    assert mask[12, 12] and mask[50, 50] and mask[50, 53] and not mask[12, 20]


def test_where_no_peak_is_high_enough_the_highest_is_shown():
    mask = outline(blob(12, 12, 4) + blob(50, 50, 5), PIXEL, PEAK)
    assert mask[50, 50] and not mask[12, 12]


def test_where_nothing_stands_out_nothing_is_shown():
    assert not outline(blob(12, 12, 1), PIXEL, PEAK).any()


def test_regions_of_values_below_zero_are_whole():
    anomaly_map = blob(12, 12, 1) - 3
    assert np.array_equal(outline(anomaly_map, -2.5, PEAK), anomaly_map > -2.5)


@pytest.mark.parametrize("seed", range(5))
def test_a_mask_lies_above_the_threshold_of_pixels_and_holds_the_highest_value(seed):
    anomaly_map = np.random.default_rng(seed).normal(0, 3, (40, 50))
    mask = outline(anomaly_map, PIXEL, PEAK)
    assert (anomaly_map[mask] > PIXEL).all() and mask[np.unravel_index(anomaly_map.argmax(), mask.shape)]
