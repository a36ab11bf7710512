"""Image and pixel metrics: exact, ties included, and fast enough for whole test sets.

Pixel metrics take `maps`, an array `[N, H, W]` or a list of `[H, W]` arrays of any sizes, finite, higher where more
anomalous; and `masks` of the same shapes, bool or 0/1, true on defects. The pixels of all images are pooled.
A `ValueError` says what is wrong with the input: NaN, shapes that differ, or one class only.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import label
from sklearn.metrics import auc, average_precision_score, roc_auc_score


def image_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of `scores` `[N]` against `labels` `[N]` (1: anomalous), in [0, 1]; scikit-learn's."""
    return float(roc_auc_score(*_check_scores(scores, labels)))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision of `scores` `[N]` against `labels` `[N]` (1: anomalous), in (0, 1]; scikit-learn's."""
    return float(average_precision_score(*_check_scores(scores, labels)))


def pixel_auroc(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """`image_auroc` over all pixels, in [0, 1]: the share of (defect, good) pixel pairs in the right order."""
    defect, good = _split(*_check_maps(maps, masks))
    below, not_above = (np.searchsorted(good, defect, side) for side in ("left", "right"))
    return float((below.mean() + not_above.mean()) / 2 / good.size)  # a tie counts one half


def pixel_ap(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """`average_precision` over all pixels, in (0, 1]: precision at each threshold, weighted by the recall it adds."""
    defect, good = _split(*_check_maps(maps, masks))
    # Recall grows at defect scores only, so these are all the thresholds that count.
    thresholds, first, count = np.unique(defect, return_index=True, return_counts=True)
    true_positives = defect.size - first
    false_positives = good.size - np.searchsorted(good, thresholds, "left")
    return float(np.sum(count * true_positives / (true_positives + false_positives)) / defect.size)


def aupro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], max_fpr: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to `max_fpr`, divided by `max_fpr`; in [0, 1].

    The curve gives, for each threshold, the share of a defect region found, averaged over all 8-connected regions of
    all masks, against the false-positive rate over all defect-free pixels of all images. It passes through every
    threshold and is linear in between. Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.

    Raises:
        ValueError: also for `max_fpr` outside (0, 1].
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must lie in (0, 1], not {max_fpr}.")
    maps, masks = _check_maps(maps, masks)
    good = np.concatenate([m[~mask] for m, mask in zip(maps, masks, strict=True)])
    num_good = good.size

    # 1. The highest threshold that reaches the limit: the curve needs nothing below it.
    limit = math.ceil(max_fpr * num_good)
    lowest = np.partition(good, num_good - limit)[num_good - limit]
    good = good[good >= lowest]

    # 2. Each good pixel adds to the false-positive rate, each defect pixel its share of its region to the overlap.
    scores, overlap, num_regions = [good], [np.zeros(good.size)], 0
    for m, mask in zip(maps, masks, strict=True):
        regions, count = label(mask, structure=np.ones((3, 3)))
        num_regions += count
        found = mask & (m >= lowest)
        scores.append(m[found])
        overlap.append(1 / np.bincount(regions.ravel())[regions[found]])
    scores, overlap = np.concatenate(scores), np.concatenate(overlap)
    order = np.argsort(scores)[::-1]
    scores, overlap = scores[order], overlap[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # tied pixels are found together
    fpr = np.append(0, np.cumsum(overlap == 0)[last] / num_good)
    pro = np.append(0, np.cumsum(overlap)[last] / num_regions)

    # 3. Cut the last segment at the limit, and integrate.
    pro[-1] = np.interp(max_fpr, fpr[-2:], pro[-2:])
    return float(auc(fpr.clip(max=max_fpr), pro) / max_fpr)


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of two arrays of one shape, infinite where they are equal.

    Args:
        mask: true where pixels count, of the arrays' shape or of their leading dimensions (`[H, W]` for `[H, W, C]`).
        data_range: the difference between the highest and the lowest possible value.

    Raises:
        ValueError: shapes that differ, NaN or infinite values, or no pixel to compare.
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


def _check_maps(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Checked maps and bool masks."""
    if len(maps) != len(masks):
        raise ValueError(f"There are {len(maps)} maps, but {len(masks)} masks.")
    maps, masks = [np.asarray(m) for m in maps], [np.asarray(mask) for mask in masks]
    for i, (m, mask) in enumerate(zip(maps, masks, strict=True)):
        if m.ndim != 2 or m.shape != mask.shape:
            raise ValueError(f"Map {i} {m.shape} and its mask {mask.shape} must be of one shape [H, W].")
        if not np.isfinite(m).all():
            raise ValueError(f"Map {i} has NaN or infinite values.")
        if mask.dtype != bool:
            if not np.isin(mask, (0, 1)).all():
                raise ValueError(f"Mask {i} must be bool, or 0 and 1.")
            masks[i] = mask.astype(bool)
    if not any(mask.any() for mask in masks):
        raise ValueError("The masks have no defect region.")
    if all(mask.all() for mask in masks):
        raise ValueError("The masks have no defect-free pixel.")
    return maps, masks


def _split(maps: list[np.ndarray], masks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The sorted scores of defect pixels and of good pixels."""
    defect = np.concatenate([m[mask] for m, mask in zip(maps, masks, strict=True)])
    good = np.concatenate([m[~mask] for m, mask in zip(maps, masks, strict=True)])
    return np.sort(defect), np.sort(good)
