"""Decisions with a stated false-alarm rate: what good images' scores and pixels say of a threshold.

Functions of three buffers of `NormalityModel`: the sorted scores of N held-out good images and the sorted peaks of
their maps, float64 [N] each, and the map values that their pixels exceed at the probabilities `TAIL`, [len(TAIL)].
Where good images were also seen through another camera, each number is the higher of both at its rank.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.stats import binomtest

from ..pipeline_output import Decision, find_regions, stack_maps
from .evidence import FUSED, GLOBAL, SCORE_TYPES

TAIL = np.append(np.logspace(0, -4, 401), 0.0)  # pixel tail probabilities at which thresholds are stored
DEFAULT_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)  # false alarms on good images, the first that these can tell
EDGE = 0.45  # of a defect's peak, down to which it reaches: what is blurred around it is lower
TAIL_SIZE = 6  # good images that the mean excess in the tail is taken from at least, where there are twice as many


def good_tail(good: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Where the tail of good images' scores starts, its rate and its mean excess: the upper tenth, or of few images as
    many as tell a mean, at most half of them."""
    size = max(1, len(good) // 10, min(TAIL_SIZE, len(good) // 2))
    start = good[-size - 1] if len(good) > 1 else good[0]
    mean_excess = (good[-size:] - start).mean().clamp_min(1e-3)
    return start, (size + 1) / (len(good) + 1), mean_excess


def p_values(scores: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """How often a good image scores as high, float64 [B] in (0, 1], for scores [B].

    The rank among held-out good images, (1 + #{good >= score}) / (1 + n); in their tail (`good_tail`) an exponential
    one fitted to it, because ranks cannot tell rates below 1 / (n + 1) apart.
    """
    start, rate, mean_excess = good_tail(good)
    scores = scores.to(good)
    above = (good[None] >= scores[:, None]).sum(1).double()  # in float32 a rate that is a rank would be missed
    rank = (1.0 + above) / (1.0 + len(good))
    tail = rate * torch.exp(-(scores - start) / mean_excess)
    return torch.where(scores > start, tail, rank).clamp(1e-12, 1.0)


def score_threshold_at(false_alarm_rate: float, good: torch.Tensor) -> float:
    """The image score that good images exceed at this rate: scores above it have a p-value below the rate."""
    start, rate, mean_excess = good_tail(good)
    if false_alarm_rate < rate:
        return float(start + mean_excess * np.log(rate / false_alarm_rate))
    rank = int(np.clip(np.floor(false_alarm_rate * (len(good) + 1)), 1, len(good)))
    return float(good.flip(0)[rank - 1])


def interval_at(false_alarm_rate: float, good: torch.Tensor) -> tuple[float, float]:
    """95 % confidence interval (Clopper and Pearson's) of the rate that the threshold for this rate really has.

    It follows from how many of the held-out good images lie above the threshold, and from nothing else: with ten
    of them, none above, the rate may be anything up to 31 %.
    """
    above = int((good >= score_threshold_at(false_alarm_rate, good)).sum())
    interval = binomtest(above, len(good)).proportion_ci(confidence_level=0.95)
    return float(interval.low), float(interval.high)


def held_out_alarms_at(false_alarm_rate: float, good: torch.Tensor) -> int:
    """How many of the held-out good images raise an alarm at this rate, each judged by the others."""
    values = [p_values(good[i : i + 1], torch.cat([good[:i], good[i + 1 :]])) for i in range(len(good))]
    return int((torch.cat(values) <= false_alarm_rate).sum())


def pixel_threshold_at(false_alarm_rate: float, quantiles: torch.Tensor) -> float:
    """The map value that this share of good images' pixels exceeds."""
    return float(np.interp(-false_alarm_rate, -TAIL, quantiles.float().cpu().numpy()))


def resolution_of(num_scores: int) -> float:
    """The smallest p-value that so many held-out good images bear out, a tenth of one in their number and 1e-4 at
    least; smaller ones only say that an image is very odd."""
    return 1.0 / min(10 * num_scores, 10_000)


def default_rate_of(num_scores: int) -> float:
    """The false-alarm rate to decide at where nobody asks for one: 1 %, or the smallest round rate that so many
    held-out good images tell from none, since a smaller one would find next to nothing."""
    return next((rate for rate in DEFAULT_RATES if rate * (num_scores + 1) >= 1), DEFAULT_RATES[-1])


def rate_note(rate: float, num_scores: int) -> str:
    """What it takes to decide at 1 %, as a sentence; empty where that many good images are there, or less is asked."""
    needed = round(1 / DEFAULT_RATES[0]) - 1
    if num_scores >= needed or rate < DEFAULT_RATES[0]:
        return ""
    return f"An alarm at {DEFAULT_RATES[0]:.0%} takes {needed} good images held out, {needed - num_scores} more."


def p_value_text(p_value: float, resolution: float) -> str:
    """A p-value as tables and figures have it; nothing rarer than the resolution is claimed."""
    return f"p = {p_value:.2g}" if p_value >= resolution else f"p < {resolution:.2g}"


def check_rate(rate: Any, name: str = "false_alarm_rate") -> float:
    """A number of Python, NumPy or torch as a float; raises ValueError unless it lies between 0 and 1, exclusive."""
    number = rate.item() if isinstance(rate, np.ndarray | np.generic | torch.Tensor) and rate.ndim == 0 else rate
    if not isinstance(number, int | float) or not 0 < number < 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {rate}.")
    return float(number)


def decide(
    maps: Sequence[np.ndarray],
    scores: np.ndarray,
    false_alarm_rate: float,
    good: torch.Tensor,
    quantiles: torch.Tensor,
    peaks: torch.Tensor,
) -> Decision:
    """What to call B images at a false-alarm rate.

    Args:
        maps: Of the chosen score, [H, W] each.
        scores: [B], likewise.
        false_alarm_rate: Share of good images that may be called anomalous, and of their pixels, in (0, 1).
        good, quantiles, peaks: Of the chosen score.

    Raises:
        ValueError: The rate lies elsewhere.
    """
    false_alarm_rate = check_rate(false_alarm_rate)
    p_value = p_values(torch.from_numpy(np.asarray(scores)), good)
    is_anomalous = (p_value <= false_alarm_rate).numpy()
    pixel_threshold = pixel_threshold_at(false_alarm_rate, quantiles)
    peak_threshold = score_threshold_at(false_alarm_rate, peaks)
    masks = [
        outline(m, pixel_threshold, peak_threshold) if bad else np.zeros(m.shape, bool)
        for m, bad in zip(maps, is_anomalous, strict=True)
    ]
    return Decision(
        p_value=p_value.numpy(),
        is_anomalous=is_anomalous,
        mask=stack_maps(masks),
        regions=[find_regions(mask, m) for mask, m in zip(masks, maps, strict=True)],
        threshold=score_threshold_at(false_alarm_rate, good),
        interval=interval_at(false_alarm_rate, good),
        pixel_threshold=pixel_threshold,
    )


def outline(anomaly_map: np.ndarray, pixel_threshold: float, peak_threshold: float) -> np.ndarray:
    """Where an anomalous image is defective, bool [H, W].

    Connected pixels above the threshold of pixels are a region, which counts if its peak is above that of peaks, as no
    region is on most good images, or if it is the highest one: the verdict has a place. A region reaches down to a
    share of its peak, `EDGE`; of a weaker one that is connected with it, no more than that is left.

    Args:
        anomaly_map: Of the image, [H, W].
        pixel_threshold: What that share of good images' pixels exceeds.
        peak_threshold: What the largest value of that share of good images' maps exceeds.
    """
    labelled, count = ndimage.label(anomaly_map > pixel_threshold, structure=np.ones((3, 3)))
    if not count:
        return labelled > 0
    peaks = np.append(np.inf, ndimage.maximum(anomaly_map, labelled, range(1, count + 1)))
    peaks[peaks < min(peak_threshold, peaks[1:].max())] = np.inf
    edges = np.where(peaks > 0, EDGE * peaks, pixel_threshold)
    mask = anomaly_map > np.maximum(pixel_threshold, edges)[labelled]
    labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))  # a cut may leave parts of no peak of their own
    peaks = np.append(-np.inf, ndimage.maximum(anomaly_map, labelled, range(1, count + 1)))
    return (peaks >= min(peak_threshold, peaks.max()))[labelled]


class FalseAlarmMixin:
    """How a normality model decides, by its buffers `good_scores` [types + 1, N], `good_peaks` [types, N] and
    `pixel_quantiles` [types, TAIL]; the rows are those of `score_types` and, of scores, the global one last."""

    config: Any
    good_scores: torch.Tensor
    good_peaks: torch.Tensor
    pixel_quantiles: torch.Tensor

    @property
    def score_types(self) -> tuple[str, ...]:
        """The score types that have a map, "fused" first, in the order of the buffers' rows."""
        names = [name for name, score_type in SCORE_TYPES.items() if score_type.has_map]
        return tuple(name for name in names if name != "discriminator" or self.config.discriminator)

    def decider(self, score_type: str = FUSED) -> Callable[..., Decision]:
        """`decide` for one score type, without the model: a function of maps, scores and the false-alarm rate."""
        peaks = self.good_peaks[_row(score_type, self.score_types)].double().cpu()
        quantiles = self._quantiles(score_type).cpu()
        return functools.partial(decide, good=self._good(score_type), quantiles=quantiles, peaks=peaks)

    @property
    def num_different(self) -> int:
        """Parts that the held-out good images show: photos of the same one say no more than one of them."""
        return self.config.num_different or self.config.num_scores

    @property
    def default_rate(self) -> float:
        """The false-alarm rate where nobody asks for one: see `default_rate_of`."""
        return default_rate_of(self.num_different)

    def decide(
        self,
        maps: Mapping[str, Sequence[np.ndarray]],
        scores: Mapping[str, np.ndarray],
        false_alarm_rate: float | None = None,
        score_type: str = FUSED,
    ) -> Decision:
        """What to call B images at a false-alarm rate.

        Args:
            maps: For each score type a map [H, W] of each image, at any size.
            scores: For each score type [B].
            false_alarm_rate: Share of good images that may be called anomalous, in (0, 1); by default `default_rate`.
            score_type: Which of them decides; one that has a map.

        Raises:
            ValueError: There is no such score type here, or no such rate.
        """
        rate = self.default_rate if false_alarm_rate is None else false_alarm_rate
        return self.decider(score_type)(maps[score_type], scores[score_type], rate)

    def p_value(self, scores: torch.Tensor, score_type: str = FUSED) -> torch.Tensor:
        """How often a good image scores as high, [B] in (0, 1]: see `p_values`."""
        return p_values(scores, self._good(score_type))

    @property
    def p_value_resolution(self) -> float:
        """The smallest p-value that the held-out good images bear out: see `resolution_of`."""
        return resolution_of(self.num_different)

    def score_threshold(self, false_alarm_rate: float, score_type: str = FUSED) -> float:
        """The image score that good images exceed at this rate: scores above it have a p-value below the rate."""
        return score_threshold_at(false_alarm_rate, self._good(score_type))

    def false_alarm_interval(self, false_alarm_rate: float, score_type: str = FUSED) -> tuple[float, float]:
        """95 % confidence interval of the rate that the threshold for this rate really has: see `interval_at`."""
        return interval_at(false_alarm_rate, self._good(score_type))

    def held_out_alarms(self, false_alarm_rate: float, score_type: str = FUSED) -> int:
        """How many of the `num_scores` held-out good images raise an alarm at this rate, each judged by the others."""
        return held_out_alarms_at(false_alarm_rate, self._good(score_type))

    def pixel_threshold(self, false_alarm_rate: float, score_type: str = FUSED) -> float:
        """The map value that this share of good images' pixels exceeds."""
        return pixel_threshold_at(false_alarm_rate, self._quantiles(score_type))

    def heat_range(self, score_type: str = FUSED) -> tuple[float, float]:
        """Where the heat of a map starts and ends in all pictures: none below what 1 good pixel in 20 exceeds, half as
        strong as it gets where 1 in 1000 does."""
        low, middle = (self.pixel_threshold(rate, score_type) for rate in (0.05, 0.001))
        return low, max(2 * middle - low, low + 1e-6)

    def _good(self, score_type: str) -> torch.Tensor:
        """Scores of the held-out good images, float64, ascending."""
        return self.good_scores[_row(score_type, (*self.score_types, GLOBAL))].double().cpu()

    def _quantiles(self, score_type: str) -> torch.Tensor:
        return self.pixel_quantiles[_row(score_type, self.score_types)]


def _row(score_type: str, names: tuple[str, ...]) -> int:
    if score_type not in names:
        raise ValueError(f"score_type must be one of {', '.join(names)}, got {score_type!r}.")
    return names.index(score_type)
