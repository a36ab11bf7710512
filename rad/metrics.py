"""Image and pixel metrics: exact, ties included, in bounded memory, and fast enough for whole test sets.

Pixel metrics take `maps` and `masks`, two sequences of equal length that may be gone through several times: arrays
[N, H, W], lists of [H, W] arrays of any sizes, or sequences that read an item from disk when it is asked for.
A map is finite and higher where more anomalous; its mask has the same shape, bool or 0/1, true on defects. The pixels
of all images are pooled. A `ValueError` says what is wrong with the input: NaN, shapes that differ, one class only.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from tqdm.auto import tqdm

MAX_PIXELS = 2**23  # sorted at a time
IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "aupro_0.05")


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`image_auroc`, `image_ap` and `image_f1_max` of `scores` [N] against `labels` [N] (1: anomalous)."""
    return {
        "image_auroc": image_auroc(scores, labels),
        "image_ap": average_precision(scores, labels),
        "image_f1_max": f1_max(scores, labels),
    }


def image_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of `scores` [N] against `labels` [N] (1: anomalous), in [0, 1]; scikit-learn's."""
    return float(roc_auc_score(*_check_scores(scores, labels)))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision of `scores` [N] against `labels` [N] (1: anomalous), in (0, 1]; scikit-learn's."""
    return float(average_precision_score(*_check_scores(scores, labels)))


def f1_max(scores: np.ndarray, labels: np.ndarray) -> float:
    """The highest F1 score, 2 PR / (P + R), that any threshold on `scores` [N] reaches, in (0, 1]."""
    precision, recall, _ = precision_recall_curve(*_check_scores(scores, labels))
    found = recall > 0
    return float(np.max(2 * (precision * recall)[found] / (precision + recall)[found]))


def pixel_metrics(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    max_fprs: Sequence[float] = (0.3, 0.05),
    max_pixels: int = MAX_PIXELS,
) -> dict[str, float]:
    """All pixel metrics from one ordering of the pixels.

    AUPRO is the area under the per-region-overlap curve up to a false-positive rate, divided by that rate. The curve
    gives, for each threshold, the share of a defect region found, averaged over all 8-connected regions of all masks,
    against the false-positive rate over all defect-free pixels of all images. It passes through every threshold and is
    linear in between. Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.

    Args:
        max_fprs: False-positive rates in (0, 1] that AUPRO goes up to.
        max_pixels: About so many pixels are held at a time; the result does not depend on it. Each image is gone
            through twice for every `max_pixels` different scores that the defect pixels have.

    Returns:
        `pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `aupro` for a rate of 0.3 and `aupro_0.05`, say, for any other;
        all in [0, 1].

    Raises:
        ValueError: Also for a rate outside (0, 1].
    """
    for max_fpr in max_fprs:
        if not 0 < max_fpr <= 1:
            raise ValueError(f"max_fpr must lie in (0, 1], not {max_fpr}.")
    auroc, ap, f1, pro_areas = 0.0, 0.0, 0.0, np.zeros(len(max_fprs))
    for part in _curves(maps, masks, max_pixels):
        auroc += _area(part.fpr_above, part.fpr, part.tpr_gain, 1)
        ap += np.sum(part.precision * part.tpr_gain)
        f1 = max(f1, np.max(2 * part.precision * part.tpr / (part.precision + part.tpr)))
        pro_areas += [_area(part.fpr_above, part.fpr, part.pro_gain, max_fpr) for max_fpr in max_fprs]
    results = {"pixel_auroc": auroc, "pixel_ap": ap, "pixel_f1_max": f1}
    for max_fpr, area in zip(max_fprs, pro_areas, strict=True):
        results["aupro" if max_fpr == 0.3 else f"aupro_{max_fpr:g}"] = area / max_fpr
    return {name: float(value) for name, value in results.items()}


def pixel_auroc(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """`image_auroc` over all pixels, in [0, 1]."""
    return pixel_metrics(maps, masks, ())["pixel_auroc"]


def pixel_ap(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """`average_precision` over all pixels, in (0, 1]."""
    return pixel_metrics(maps, masks, ())["pixel_ap"]


def aupro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], max_fpr: float = 0.3) -> float:
    """AUPRO up to `max_fpr`, in [0, 1]: see `pixel_metrics`."""
    return list(pixel_metrics(maps, masks, (max_fpr,)).values())[-1]


def pixel_curves(
    maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], num_points: int = 1000, max_pixels: int = MAX_PIXELS
) -> dict[str, np.ndarray]:
    """The ROC (`fpr`, `tpr`), precision-recall (`tpr`, `precision`) and PRO (`fpr`, `pro`) curves, to be drawn.

    Returns:
        Float arrays [K], from the highest threshold to the lowest: `threshold`, `fpr`, `tpr`, `precision`, `pro`.
        Each row is exact; at most `num_points` rows are kept, evenly spread over the scores of defect pixels, beside
        the two ends at thresholds of plus and minus infinity.
    """
    names, parts = ("threshold", "fpr", "tpr", "precision", "pro"), []
    for part in _curves(maps, masks, max_pixels):
        parts.append(_thin(np.stack([getattr(part, name) for name in names]), num_points))
    start, end = [[math.inf], [0], [0], [1], [0]], [[-math.inf], [1], [1], [part.prevalence], [1]]
    rows = np.concatenate([start, _thin(np.concatenate(parts, axis=1), num_points), end], axis=1)
    return dict(zip(names, rows, strict=True))


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of two arrays of one shape, infinite where they are equal.

    Args:
        mask: True where pixels count, of the arrays' shape or of their leading dimensions ([H, W] for [H, W, C]).
        data_range: The difference between the highest and the lowest possible value.

    Raises:
        ValueError: Shapes that differ, NaN or infinite values, or no pixel to compare.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"The arrays differ in shape: {a.shape} and {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("The arrays have NaN or infinite values.")
    squared_error = (a - b) ** 2
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != a.shape[: mask.ndim]:
            raise ValueError(f"The mask must be bool and fit {a.shape}, not {mask.dtype} {mask.shape}.")
        squared_error = squared_error[mask]
    if squared_error.size == 0:
        raise ValueError("There is no pixel to compare.")
    mse = squared_error.mean()
    return math.inf if mse == 0 else float(10 * np.log10(data_range**2 / mse))


def _check_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels, scores), in scikit-learn's order."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"Scores {scores.shape} and labels {labels.shape} must be of one shape [N].")
    if not np.isfinite(scores).all():
        raise ValueError("The scores have NaN or infinite values.")
    if set(np.unique(labels)) != {0, 1}:
        raise ValueError(f"Labels must be 0 and 1, and both must occur, not {np.unique(labels)[:5]}.")
    return labels, scores


class _Part(NamedTuple):
    """Part of all curves, from high thresholds to low: arrays [K], a row for each different score of a defect pixel.

    Between two such scores only good pixels are added, so a curve goes from the last row's height straight right to
    `fpr_above` and then, in a line, up to `fpr` and the row's own height.
    """

    threshold: np.ndarray
    fpr_above: np.ndarray  # share of the good pixels above the threshold
    fpr: np.ndarray  # share of the good pixels at the threshold or above
    tpr: np.ndarray  # share of the defect pixels found
    tpr_gain: np.ndarray  # what the row adds to it
    pro: np.ndarray  # share of a region found, mean over regions
    pro_gain: np.ndarray
    precision: np.ndarray
    prevalence: float  # share of defects in all pixels


def _curves(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], max_pixels: int) -> Iterator[_Part]:
    """The curves in parts of at most `max_pixels` rows, so that no more than these is in memory."""
    if len(maps) != len(masks):
        raise ValueError(f"There are {len(maps)} maps, but {len(masks)} masks.")
    bound, num_found, pro_found = math.inf, 0, 0.0
    while True:
        # 1. The next highest scores of defect pixels, ascending: how many have each, and their shares of their regions
        found, num_kept, num_defect, num_regions = [], 0, 0, 0
        for m, mask in _checked(maps, masks):
            regions, count = label(mask, structure=np.ones((3, 3)))
            num_defect, num_regions = num_defect + np.count_nonzero(mask), num_regions + count
            mask = mask & (m < bound)
            shares = 1 / np.bincount(regions.ravel())[regions[mask]]
            found.append((m[mask], np.ones(shares.size), shares))
            num_kept += shares.size
            if num_kept > 2 * max_pixels:
                found = [_merge(found, max_pixels)]
                num_kept = len(found[0][0])
        if not num_defect:
            raise ValueError("The masks have no defect region.")
        scores, counts, shares = _merge(found, max_pixels)

        # 2. Good pixels below each score, and at most as high
        below, not_above, num_good = 0, 0, 0
        for good in _sorted_good(maps, masks, max_pixels):
            below = below + np.searchsorted(good, scores, "left")
            not_above = not_above + np.searchsorted(good, scores, "right")
            num_good += good.size
        if not num_good:
            raise ValueError("The masks have no defect-free pixel.")

        # 3. Shares of all, from the highest score to the lowest
        num_true, num_false = num_found + np.cumsum(counts[::-1]), num_good - below[::-1]
        pro = pro_found + np.cumsum(shares[::-1]) / num_regions
        yield _Part(
            threshold=scores[::-1],
            fpr_above=(num_good - not_above[::-1]) / num_good,
            fpr=num_false / num_good,
            tpr=num_true / num_defect,
            tpr_gain=counts[::-1] / num_defect,
            pro=pro,
            pro_gain=shares[::-1] / num_regions,
            precision=num_true / (num_true + num_false),
            prevalence=num_defect / (num_defect + num_good),
        )
        bound, num_found, pro_found = scores[0], num_true[-1], pro[-1]
        if num_found == num_defect:
            return


def _merge(found: list[tuple[np.ndarray, np.ndarray, np.ndarray]], limit: int) -> list[np.ndarray]:
    """The `limit` highest different scores, ascending, with the sums of their counts and shares."""
    scores, counts, shares = (np.concatenate(column) for column in zip(*found, strict=True))
    scores, inverse = np.unique(scores, return_inverse=True)
    return [column[-limit:] for column in (scores, np.bincount(inverse, counts), np.bincount(inverse, shares))]


def _sorted_good(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], max_pixels: int) -> Iterator[np.ndarray]:
    """The scores of good pixels, sorted, some images at a time."""
    chunk, size = [], 0
    for number, (m, mask) in enumerate(_checked(maps, masks), start=1):
        chunk.append(m[~mask])
        size += chunk[-1].size
        if size >= max_pixels or number == len(maps):
            yield np.sort(np.concatenate(chunk))
            chunk, size = [], 0


def _checked(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Maps and bool masks, one at a time."""
    pairs = tqdm(zip(maps, masks, strict=True), "Pixel metrics", len(maps), leave=False, delay=5)
    for i, (m, mask) in enumerate(pairs):
        m, mask = np.asarray(m), np.asarray(mask)
        if m.ndim != 2 or m.shape != mask.shape:
            raise ValueError(f"Map {i} {m.shape} and its mask {mask.shape} must be of one shape [H, W].")
        if not np.isfinite(m).all():
            raise ValueError(f"Map {i} has NaN or infinite values.")
        if mask.dtype != bool:
            if not np.isin(mask, (0, 1)).all():
                raise ValueError(f"Mask {i} must be bool, or 0 and 1.")
            mask = mask.astype(bool)
        yield m, mask


def _area(x_0: np.ndarray, x_1: np.ndarray, gain: np.ndarray, limit: float) -> float:
    """Area up to `limit` under a curve that starts at 0 and rises by `gain`, in a line, between `x_0` and `x_1`."""
    a, b = np.minimum(x_0, limit), np.minimum(x_1, limit)
    return np.sum(gain * (limit - b + (b - a) ** 2 / (2 * np.maximum(x_1 - x_0, np.finfo(float).tiny))))


def _thin(rows: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of the columns, evenly spread."""
    count = rows.shape[1]
    return rows if count <= limit else rows[:, np.linspace(0, count - 1, limit).round().astype(int)]
