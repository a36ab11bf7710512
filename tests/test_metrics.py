"""Metrics against scikit-learn and against plain loops, and their refusals."""

import math
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.ndimage import label
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from rad.metrics import (
    aupro,
    average_precision,
    f1_max,
    image_auroc,
    image_metrics,
    pixel_ap,
    pixel_auroc,
    pixel_curves,
    pixel_metrics,
    psnr,
)

PIXEL_METRICS = [pixel_auroc, pixel_ap, aupro]
SIZES = [(24, 24), (17, 31), (9, 12)]


def sample(seed: int, levels: int | None):
    """Maps of mixed sizes, scores raised on defects, tied where `levels` is given; one image without a defect."""
    rng = np.random.default_rng(seed)
    masks = [np.zeros(size, bool) for size in SIZES]
    masks[0][2:7, 3:9] = masks[0][15:17, 15:20] = masks[1][4:12, 10:13] = True
    maps = [rng.random(mask.shape) + 0.3 * mask for mask in masks]
    return [np.round(m * levels) / levels for m in maps] if levels else maps, masks


def pooled(maps, masks):
    return np.concatenate([m.ravel() for m in masks]), np.concatenate([m.ravel() for m in maps])


def slow_f1_max(scores, labels):
    counts = [(np.sum(labels[scores >= t]), np.sum(scores >= t)) for t in np.unique(scores)]
    return max(2 * hits / (alarms + np.sum(labels)) for hits, alarms in counts)


def slow_aupro(maps, masks, max_fpr):
    labels, scores = pooled(maps, masks)
    regions = []
    for m, mask in zip(maps, masks, strict=True):
        labelled, count = label(mask, np.ones((3, 3)))
        regions += [m[labelled == i] for i in range(1, count + 1)]
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(scores)[::-1]:
        fpr.append(np.mean(scores[labels == 0] >= threshold))
        pro.append(np.mean([np.mean(region >= threshold) for region in regions]))
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr, fpr[1:], pro, pro[1:], strict=False):
        if x0 < max_fpr and x1 > x0:
            end = min(x1, max_fpr)
            area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / max_fpr


@pytest.mark.parametrize("max_pixels", [1, 50, 2**20])
@pytest.mark.parametrize("levels", [None, 10, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_pixel_metrics_equal_scikit_learn_and_loops_however_few_pixels_are_held(seed, levels, max_pixels):
    maps, masks = sample(seed, levels)
    labels, scores = pooled(maps, masks)
    assert pixel_metrics(maps, masks, max_pixels=max_pixels) == pytest.approx(
        {
            "pixel_auroc": roc_auc_score(labels, scores),
            "pixel_ap": average_precision_score(labels, scores),
            "pixel_f1_max": slow_f1_max(scores, labels),
            "aupro": slow_aupro(maps, masks, 0.3),
            "aupro_0.05": slow_aupro(maps, masks, 0.05),
        },
        abs=1e-9,
    )


@pytest.mark.parametrize("max_fpr", [0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [None, 10, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_aupro_equals_a_loop_over_thresholds_and_regions(seed, levels, max_fpr):
    maps, masks = sample(seed, levels)
    assert aupro(maps, masks, max_fpr) == pytest.approx(slow_aupro(maps, masks, max_fpr), abs=1e-9)


class Lazy(Sequence):
    """Arrays made when they are asked for, as if read from disk."""

    def __init__(self, make, count: int):
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if index >= self.count:
            raise IndexError(index)
        return self.make(index)


def test_memory_does_not_grow_with_the_number_of_images():
    def mask(index):
        return np.arange(32 * 32).reshape(32, 32) // 16 == index % 64

    def score(index):
        return np.random.default_rng(index).random((32, 32), np.float32) + 0.2 * mask(index)

    def peak(count):
        tracemalloc.start()
        pixel_metrics(Lazy(score, count), Lazy(mask, count), max_pixels=2**7)
        bytes_held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_held

    peak(10)  # what is allocated once only
    assert peak(120) < 1.5 * peak(30)


@pytest.mark.parametrize("levels", [None, 10])
def test_curves_have_the_areas_that_the_metrics_state(levels):
    maps, masks = sample(0, levels)
    metrics, curves = pixel_metrics(maps, masks, (1.0,)), pixel_curves(maps, masks)
    assert auc(curves["fpr"], curves["tpr"]) == pytest.approx(metrics["pixel_auroc"], abs=0.01)
    assert auc(curves["fpr"], curves["pro"]) == pytest.approx(metrics["aupro_1"], abs=0.01)
    gains = np.diff(curves["tpr"])
    assert np.sum(gains * curves["precision"][1:]) == pytest.approx(metrics["pixel_ap"], abs=1e-9)


def test_thinned_curves_hold_points_of_the_whole_curves():
    maps, masks = sample(0, None)
    labels, scores = pooled(maps, masks)
    curves = pixel_curves(maps, masks, num_points=7, max_pixels=20)
    assert {len(values) for values in curves.values()} == {9}
    rows = np.array(list(curves.values())).T
    assert rows[0].tolist() == [math.inf, 0, 0, 1, 0]
    assert rows[-1] == pytest.approx([-math.inf, 1, 1, labels.mean(), 1])
    for threshold, fpr, tpr, precision, _ in rows[1:-1]:
        above = scores >= threshold
        assert (fpr, tpr, precision) == pytest.approx(
            (above[labels == 0].mean(), above[labels].mean(), labels[above].mean())
        )
    assert curves["tpr"][1] < 0.02 and curves["tpr"][-2] == 1  # from the first to the last defect pixel


def test_aupro_by_hand():
    # Regions of 1 and 4 pixels; found at 0.9: the small one, with 1 of 10 good pixels; at 0.8: half of the large one,
    # with 2 more. The curve runs (0, 0), (0.1, 0.5), (0.3, 0.75).
    masks = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    maps = np.array([[0.9, 0.9, 0.8, 0.8, 0.1], [0.1] * 5, [0.1, 0.8, 0.8, 0.1, 0.1]])
    assert aupro([maps], [masks], 0.3) == pytest.approx((0.1 * 0.5 / 2 + 0.2 * (0.5 + 0.75) / 2) / 0.3)
    assert aupro([maps], [masks], 0.2) == pytest.approx((0.1 * 0.5 / 2 + 0.1 * (0.5 + 0.625) / 2) / 0.2)


def test_aupro_joins_regions_that_touch_at_a_corner():
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[1, 1] = mask[1, 2] = True
    score = np.zeros((4, 4))
    score[0, 0] = 1
    # One region of 3 pixels: a third of it is found first; two regions would give a half. The rest comes with all.
    assert aupro([score], [mask], 0.3) == pytest.approx(1 / 3 + 0.3 / 2 * (1 - 1 / 3))


def test_aupro_weights_regions_equally():
    mask = np.zeros((20, 20), bool)
    mask[0, 0] = mask[5:15, 5:15] = True
    score = mask.astype(float)
    score[0, 0] = -1  # the small region is missed below every limit but 1
    assert aupro([score], [mask]) == pytest.approx(0.5)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_pixel_metrics_are_one_where_perfect(metric):
    _, masks = sample(0, None)
    assert metric([mask.astype(np.float32) for mask in masks], masks) == pytest.approx(1)


def test_a_constant_map_is_chance():
    _, masks = sample(0, None)
    maps = [np.zeros(mask.shape) for mask in masks]
    assert pixel_auroc(maps, masks) == pytest.approx(0.5)
    assert pixel_ap(maps, masks) == pytest.approx(np.mean(pooled(maps, masks)[0]))
    assert aupro(maps, masks, 0.3) == pytest.approx(0.15)


@pytest.mark.parametrize("levels", [None, 10])
@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_pixel_metrics_do_not_change_under_a_monotone_transform(metric, levels):
    maps, masks = sample(2, levels)
    assert metric([np.exp(3 * m) - 5 for m in maps], masks) == pytest.approx(metric(maps, masks), abs=1e-12)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_pixel_metrics_do_not_depend_on_the_order_of_images(metric):
    maps, masks = sample(3, 10)
    assert metric(maps[::-1], masks[::-1]) == pytest.approx(metric(maps, masks), abs=1e-12)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_pixel_metrics_take_stacked_arrays_of_any_number_type(metric):
    rng = np.random.default_rng(0)
    maps, masks = rng.integers(0, 256, (3, 8, 8), dtype=np.uint8), rng.integers(0, 2, (3, 8, 8), dtype=np.uint8)
    assert metric(maps, masks) == pytest.approx(metric(list(maps / 255), list(masks.astype(bool))), abs=1e-12)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 4), bool), "no defect region"),
        (np.zeros((1, 4, 4)), np.ones((1, 4, 4), bool), "no defect-free pixel"),
        (np.zeros((0, 4, 4)), np.zeros((0, 4, 4), bool), "no defect region"),
        (np.full((1, 4, 4), np.nan), np.eye(4, dtype=bool)[None], "NaN or infinite"),
        (np.full((1, 4, 4), np.inf), np.eye(4, dtype=bool)[None], "NaN or infinite"),
        (np.zeros((1, 4, 4)), np.eye(5, dtype=bool)[None], "one shape"),
        (np.zeros((1, 4, 4, 1)), np.zeros((1, 4, 4, 1), bool), "one shape"),
        (np.zeros((2, 4, 4)), np.eye(4, dtype=bool)[None], "2 maps, but 1 masks"),
        (np.zeros((1, 4, 4)), 255 * np.eye(4, dtype=np.uint8)[None], "bool, or 0 and 1"),
    ],
)
def test_pixel_metrics_refuse(metric, maps, masks, message):
    with pytest.raises(ValueError, match=message):
        metric(maps, masks)


@pytest.mark.parametrize("max_fpr", [0, -0.1, 1.1, math.nan])
def test_aupro_refuses_a_limit_outside_0_1(max_fpr):
    maps, masks = sample(0, None)
    with pytest.raises(ValueError, match="max_fpr"):
        aupro(maps, masks, max_fpr)


def test_image_metrics_by_hand():
    scores, labels = np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1])
    assert image_auroc(scores, labels) == pytest.approx(3.5 / 4)
    assert average_precision(scores, labels) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert f1_max(scores, labels) == pytest.approx(2 * 2 / 3 * 1 / (2 / 3 + 1))  # both found, with one false alarm


@pytest.mark.parametrize("levels", [None, 10, 2])
def test_image_metrics_equal_scikit_learn(levels):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 40)
    scores = rng.random(40) + 0.5 * labels
    scores = np.round(scores * levels) if levels else scores
    assert image_metrics(scores, labels) == pytest.approx(
        {
            "image_auroc": roc_auc_score(labels, scores),
            "image_ap": average_precision_score(labels, scores),
            "image_f1_max": slow_f1_max(scores, labels),
        }
    )


@pytest.mark.parametrize("metric", [image_auroc, average_precision, f1_max])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [1, 1], "both must occur"),
        ([0.1, 0.2], [0, 0], "both must occur"),
        ([0.1, 0.2], [0, 2], "must be 0 and 1"),
        ([], [], "both must occur"),
        ([0.1, math.nan], [0, 1], "NaN or infinite"),
        ([0.1, 0.2, 0.3], [0, 1], "one shape"),
        ([[0.1], [0.2]], [[0], [1]], "one shape"),
    ],
)
def test_image_metrics_refuse(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(np.array(scores), np.array(labels))


def test_psnr():
    a = np.zeros((4, 4, 3))
    assert psnr(a, a + 0.1) == pytest.approx(20)
    assert psnr(a, a + 25.5, data_range=255) == pytest.approx(20)
    assert psnr(a, a) == math.inf


def test_psnr_of_unsigned_integers_does_not_wrap():
    a = np.full((2, 2), 5, np.uint8)
    assert psnr(a, a + 10, data_range=255) == psnr(a + 10, a, data_range=255) == pytest.approx(20 * math.log10(25.5))


def test_psnr_counts_pixels_under_the_mask_only():
    a = np.zeros((4, 4, 3))
    b = a + 1
    mask = np.zeros((4, 4), bool)
    mask[0, :2] = True
    b[mask] = 0.01
    assert psnr(a, b, mask) == pytest.approx(40)


@pytest.mark.parametrize(
    ("a", "b", "mask", "message"),
    [
        (np.zeros((2, 2)), np.zeros((2, 3)), None, "differ in shape"),
        (np.full((2, 2), np.nan), np.zeros((2, 2)), None, "NaN or infinite"),
        (np.full((2, 2), np.inf), np.full((2, 2), np.inf), None, "NaN or infinite"),
        (np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2), bool), "no pixel"),
        (np.zeros((2, 2)), np.zeros((2, 2)), np.ones((2, 3), bool), "mask must be bool"),
        (np.zeros((2, 2)), np.zeros((2, 2)), np.ones((2, 2), int), "mask must be bool"),
    ],
)
def test_psnr_refuses(a, b, mask, message):
    with pytest.raises(ValueError, match=message):
        psnr(a, b, mask)
