"""What the pipeline returns: maps and scores by name, decisions, regions, denoising steps, restorations."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from scipy import ndimage

from .image_processor import resize_map

# One value for each image: an array [B, ...], or a list of B arrays where sizes differ; tensors on request
Stack = np.ndarray | list[np.ndarray] | torch.Tensor | list[torch.Tensor]
Pictures = list[Image.Image] | Stack


@dataclass(frozen=True)
class AnomalyRegion:
    """One connected region of a mask.

    Attributes:
        box: Left, top, right and bottom in pixels of the input; right and bottom are exclusive.
        area: Pixels.
        peak: Largest value of the anomaly map inside.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float


@dataclass(frozen=True)
class Decision:
    """What B images are called at a false-alarm rate.

    Attributes:
        p_value: [B] in (0, 1], how often a good image scores as high.
        is_anomalous: [B] bool, p_value <= false_alarm_rate.
        mask: [B, H, W] bool, or a list of [H, W]: the regions that a good image would not have; empty for images
            judged good.
        regions: For each image the connected regions of its mask, largest peak first.
        threshold: The image score at which the rate lies.
        interval: 95 % confidence interval of the rate that this threshold really has, wide where it rests on few good
            images.
        pixel_threshold: The map value which that share of good images' pixels exceeds: no region is below.
    """

    p_value: np.ndarray
    is_anomalous: np.ndarray
    mask: np.ndarray | list[np.ndarray]
    regions: list[list[AnomalyRegion]]
    threshold: float
    interval: tuple[float, float]
    pixel_threshold: float


class Maps(Mapping[str, Stack]):
    """Maps by name, kept as they were computed and resized when they are asked for: at the size of large photographs
    all of them together would fill the memory. So take `maps[name]` once, not in a loop over images.

    Args:
        small: Of each score [B, g, g].
        sizes: Height and width that each of the B images' maps are to have.
        shown: Maps that are there at this size already.
        are_tensors: Give tensors in place of arrays.
    """

    def __init__(
        self,
        small: Mapping[str, torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        shown: Mapping[str, Stack] | None = None,
        are_tensors: bool = False,
    ) -> None:
        self.small, self.sizes, self.shown, self.are_tensors = small, list(sizes), dict(shown or {}), are_tensors

    def __getitem__(self, name: str) -> Stack:
        found = self.shown[name] if name in self.shown else resized_stack(self.small[name], self.sizes)
        return _to_tensors(found) if self.are_tensors else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.small)

    def __len__(self) -> int:
        return len(self.small)

    def __repr__(self) -> str:
        return f"Maps({', '.join(self)}; {len(self.sizes)} of each)"

    def to_tensors(self) -> "Maps":
        return Maps(self.small, self.sizes, self.shown, are_tensors=True)


@dataclass
class RADPipelineOutput(BaseOutput):
    """Scores of a list of B images. Maps are float32 [B, H, W] at the inputs' own size, or a list of B arrays [H, W]
    when the sizes differ.

    Attributes:
        anomaly_map: The map of the chosen score. In calibrated mode in units of good-image deviation: about 0 on good
            images, 1 a standard deviation above.
        score: [B], one number for each image, likewise.
        maps: The maps of all scores by name, resized when they are asked for: "fused", "pixel" (KL), "feature"
            (error), "rgb" (the difference that RAN compares with) and, where RAN has none and so not in paper mode,
            "residual" and "mahalanobis" (Mahalanobis distance of the feature residual and of the features) and a
            discriminator's logits.
        scores: The scores of all by name, [B] each, and in calibrated mode "global", how odd the image is as a whole,
            which has no map.
        category: The category whose normality was used, for each image; None where nothing is known of any.
        p_value, is_anomalous, mask, regions, threshold, pixel_threshold: As in `Decision`; None in paper mode.
        false_alarm_interval: Its interval; None in paper mode.
    """

    anomaly_map: Pictures
    score: np.ndarray | torch.Tensor
    maps: Mapping[str, Stack]
    scores: dict[str, np.ndarray | torch.Tensor]
    category: list[str] | None = None
    p_value: np.ndarray | torch.Tensor | None = None
    is_anomalous: np.ndarray | torch.Tensor | None = None
    mask: Pictures | None = None
    regions: list[list[AnomalyRegion]] | None = None
    threshold: float | None = None
    false_alarm_interval: tuple[float, float] | None = None
    pixel_threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._decider: Callable[..., Decision] | None = None  # no fields, since they are no results
        self._score_type = ""

    @classmethod
    def of(
        cls,
        maps: Mapping[str, torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        scores: dict[str, np.ndarray],
        score_type: str,
        category: list[str | None],
        decider: Callable[..., Decision] | None = None,
        false_alarm_rate: float = 0.01,
    ) -> "RADPipelineOutput":
        """The output of maps [B, g, g] and scores by name, with a decision if somebody can decide.

        Args:
            sizes: Height and width of each image's map.
            score_type: The chosen score.
            decider: From `NormalityModel.decider`.
            false_alarm_rate: At which it decides.
        """
        decided, shown = {}, resized_stack(maps[score_type], sizes)
        if decider is not None:
            decided = dict(vars(decider(shown, scores[score_type], false_alarm_rate)))
            decided["false_alarm_interval"] = decided.pop("interval")
        known = None if None in category else category
        by_name = Maps(maps, sizes, {score_type: shown})
        output = cls(shown, scores[score_type], by_name, scores, known, **decided)
        output._decider, output._score_type = decider, score_type
        return output

    def decide(self, false_alarm_rate: float) -> Decision:
        """Decides again at another false-alarm rate; no network runs.

        Raises:
            ValueError: The rate does not lie between 0 and 1, or these are scores of paper mode, which know no rate.
        """
        if self._decider is None:
            raise ValueError("Scores of paper mode know no false-alarm rate: use mode='calibrated'.")
        maps = [np.asarray(m) for m in self.maps[self._score_type]]
        return self._decider(maps, np.asarray(self.score), false_alarm_rate)

    def to_tensors(self) -> "RADPipelineOutput":
        """The same with tensors in place of arrays."""
        return self._with(**{name: _to_tensors(value) for name, value in self.items()})

    def to_pictures(self, heat: list[Image.Image]) -> "RADPipelineOutput":
        """The same with pictures in place of the anomaly map, one of each image, and of masks, of 0 and 255."""
        masks: Any = self.mask
        return self._with(anomaly_map=heat, mask=[Image.fromarray(np.uint8(255) * mask) for mask in masks])

    def _with(self, **fields: Any) -> "RADPipelineOutput":
        output = replace(self, **fields)
        output._decider, output._score_type = self._decider, self._score_type
        return output

    def _map(self, name: str) -> Stack | None:
        warnings.warn(f"{name}_map goes in the next version: use maps[{name!r}].", FutureWarning, stacklevel=3)
        return self.maps.get(name)

    pixel_map = property(lambda self: self._map("pixel"))
    feature_map = property(lambda self: self._map("feature"))
    residual_map = property(lambda self: self._map("residual"))
    mahalanobis_map = property(lambda self: self._map("mahalanobis"))
    discriminator_map = property(lambda self: self._map("discriminator"))
    rgb_map = property(lambda self: self._map("rgb"))


@dataclass
class RADDenoisingOutput(BaseOutput):
    """One step of the denoiser at each of T timesteps, at the model's resolution S.

    Attributes:
        timesteps: Steps of the full chain, [T].
        noise_levels: Standard deviation of the noise in x_t, sqrt(1 - alphas_cumprod), [T] in (0, 1).
        x_t: The noised image at each timestep, RGB.
        x0_hat: What the denoiser makes of it, RGB.
        pixel_map: KL in bits, mean over colour channels, float32 [T, S, S].
        feature_map: Squared error of the predicted features, mean over channels, float32 [T, g, g].
        rgb_map: |x0_hat - x_0|, mean over colour channels, float32 [T, S, S].
    """

    timesteps: list[int]
    noise_levels: np.ndarray
    x_t: Pictures
    x0_hat: Pictures
    pixel_map: np.ndarray
    feature_map: np.ndarray
    rgb_map: np.ndarray


@dataclass
class RADRestorationOutput(BaseOutput):
    """What good parts in the place of these would look like.

    Attributes:
        images: The restored images, RGB at the inputs' own size.
        intermediates: For each image the input and the image after each step, RGB at the model's resolution.
        distances: For each image the Mahalanobis score before the first and after each step, in units of good-image
            deviation: 0 is a typical good image.
        p_value: [B] in (0, 1], how often a good image scores as high as the restored one, at the model's resolution.
        is_anomalous: [B] bool: the restored image still does not pass as good, the restoration has failed.
    """

    images: Pictures
    intermediates: list[Pictures]
    distances: list[np.ndarray]
    p_value: np.ndarray
    is_anomalous: np.ndarray


def find_regions(mask: np.ndarray, anomaly_map: np.ndarray) -> list[AnomalyRegion]:
    """8-connected regions of a mask [H, W], those with the largest peak in the map [H, W] first."""
    labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
    index = range(1, count + 1)
    areas = ndimage.sum_labels(mask, labelled, index)
    peaks = ndimage.maximum(anomaly_map, labelled, index)
    regions = [
        AnomalyRegion((columns.start, rows.start, columns.stop, rows.stop), int(area), float(peak))
        for (rows, columns), area, peak in zip(ndimage.find_objects(labelled), areas, peaks, strict=True)
    ]
    return sorted(regions, key=lambda region: -region.peak)


def resized_stack(maps: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> np.ndarray | list[np.ndarray]:
    """Maps [B, g, g] at each image's own (height, width): float32 [B, H, W], or a list where sizes differ."""
    if len(set(sizes)) > 1:
        return resize_map(maps, list(sizes))
    stack = np.empty((len(maps), *sizes[0]), np.float32)
    for i, size in enumerate(sizes):  # one after another, with no second copy of all
        stack[i] = resize_map(maps[i : i + 1], [size])[0]
    return stack


def stack_maps(maps: Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """[B, H, W] of maps [H, W] of one size; the list as it is where sizes differ."""
    return np.stack(maps) if len({m.shape for m in maps}) == 1 else list(maps)


def pictures_as(pictures: list[Image.Image], output_type: str) -> Pictures:
    """RGB pictures as they are ("pil"), or float32 in [0, 1] as arrays [B, H, W, 3] ("np") or tensors [B, 3, H, W]
    ("pt"), in a list where sizes differ."""
    if output_type == "pil":
        return pictures
    arrays = [np.asarray(picture, dtype=np.float32) / 255 for picture in pictures]
    stacked = stack_maps([a.transpose(2, 0, 1) for a in arrays] if output_type == "pt" else arrays)
    return _to_tensors(stacked) if output_type == "pt" else stacked


def _to_tensors(value: Any) -> Any:
    if isinstance(value, Maps):
        return value.to_tensors()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {name: _to_tensors(part) for name, part in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
        return [torch.from_numpy(part) for part in value]
    return value
