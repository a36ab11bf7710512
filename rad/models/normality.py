"""What good images look like: the statistics that turn evidence into scores in units of good-image deviation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from .evidence import FUSED, GLOBAL, WEIGHTED, Evidence, to_grid, weighted_sum
from .false_alarms import TAIL, FalseAlarmMixin
from .fitting import FittingMixin
from .gaussian import mahalanobis, pick, unpack_triangle

# Where the choice of weights starts, and what counts without one. How odd an image is as a whole counts little unless
# its product says otherwise: on some it tells most, on others it is the first to drift
MAP_WEIGHTS = {"pixel": 0.25, "feature": 0.5, "residual": 0.0, "mahalanobis": 1.0, "discriminator": 0.5}
IMAGE_WEIGHTS = {
    "pixel": 0.0,
    "feature": 0.0,
    "residual": 0.1,
    "mahalanobis": 0.9,
    "discriminator": 0.0,
    "global": 0.3,
}


class NormalityModel(FittingMixin, FalseAlarmMixin, ModelMixin, ConfigMixin):
    """Statistics of good images, fitted by `fit` and saved with the pipeline.

    For every category it holds
    - a Gaussian of the extractor's features at every position, as PaDiM does (Defard et al., 2021), and one of the
      residuals that the network's prediction of those features leaves, on a grid half as fine, for context: means at
      each position, covariances shared by square blocks of positions;
    - a Gaussian of the extractor's summaries of whole images (Rippel et al., ICPR 2020), with one covariance for all
      categories (Lee et al., NeurIPS 2018), for what is odd about an image and nowhere in it;
    - location and deviation of every raw score map (log KL, feature error and log RGB difference at each timestep and
      position, the two Mahalanobis distances), so that a score says how far from good images this one lies;
    - the scores of held-out good images, from which p-values and thresholds with a stated false-alarm rate follow.

    Args:
        categories: Names of the categories, in the order of the class labels.
        timesteps: Steps of the full chain at which maps are scored.
        num_noise_samples, seed: Of the noise that good images were scored under, which others are then scored under
            too: the units of KL, RGB and residual scores depend on them. None where nobody wrote the number down.
        feature_channels: Channels of the extractor.
        num_summaries: Numbers that are kept of its summary of an image, evenly picked, 2048 at most.
        gaussian_size: Side of the grid of the features' Gaussian, that of the residuals' is half of it; both are
            averaged down to their grid. By default the features' side.
        gaussian_channels: Both are projected to this many orthonormal directions. By default 140, of several
            categories 192, or all there are.
        gaussian_block: Side in positions of the blocks that share a covariance; it divides both grids. By default
            there are 16 x 16 of them, and for several categories 4 x 4, which with more directions find as much and
            keep the model small; one for each position where these do not divide both.
        map_size: Side of the grid of calibrated maps.
        weights: Of each score's map in the fused map, by name; those left out do not count.
        image_weights: Likewise in the map whose largest values make the fused image score, and the weight of the
            global score in it: what finds a defect's outline best is not what tells bad images from good ones best.
        context: How much the mean over a neighbourhood of half the side adds to the fused map; it helps large, faint
            defects and costs small ones.
        top_k: The image score is the mean of this many largest values of the map (RAN: 64).
        num_scores: Held-out good images in all.
        num_different: Parts that these show, if some are photos of the same one.
        pixel_range, darkest_peak: Of good images, as `RADImageProcessor` takes them.
        found: Of each kind of defects put on good images in the fit, how many there were ("of") and how many are found
            at false-alarm rates ("0.01"); None where there were none.
        discriminator: Whether there are maps of a discriminator; without one, its weights do not count.
    """

    @register_to_config
    def __init__(
        self,
        categories: Sequence[str] = ("object",),
        timesteps: Sequence[int] = (20, 201, 401),
        num_noise_samples: int | None = None,
        seed: int = 0,
        feature_channels: int = 192,
        num_summaries: int = 1152,
        gaussian_size: int | None = None,
        gaussian_channels: int | None = None,
        gaussian_block: int | None = None,
        map_size: int = 64,
        weights: Mapping[str, float] = MAP_WEIGHTS,
        image_weights: Mapping[str, float] = IMAGE_WEIGHTS,
        context: float = 0.0,
        top_k: int = 64,
        num_scores: int = 1,
        discriminator: bool = False,
        pixel_range: Sequence[int] = (0, 255),
        darkest_peak: int = 0,
        found: Mapping[str, Mapping[str, int]] | None = None,
        num_different: int | None = None,
    ) -> None:
        super().__init__()
        _check_weights("weights", weights, [name for name in WEIGHTED if name != GLOBAL])
        _check_weights("image_weights", image_weights, WEIGHTED)
        # What was asked for; None is chosen anew by each fit
        sizes = gaussian_size, gaussian_channels, gaussian_block
        self._asked: dict[str, Any] = {"weights": weights, "image_weights": image_weights}
        self._asked |= dict(zip(("gaussian_size", "gaussian_channels", "gaussian_block"), sizes, strict=True))
        self._register_buffers()

    def _register_buffers(self) -> None:
        """Buffers of the sizes that the configuration says, with nothing known yet."""
        config, num_categories = self.config, len(self.config.categories)
        size, block = config.gaussian_size or 16, config.gaussian_block or 1
        channels = config.gaussian_channels or min(140, config.feature_channels)
        if size < 2 or size % block or size // 2 % block:
            raise ValueError(
                f"gaussian_block {block} must divide both grids of the Gaussians, {size} and {size // 2}, and the "
                "coarser one needs at least 1 position."
            )
        raw = (num_categories, 3 * len(config.timesteps) + 2 + config.discriminator, config.map_size, config.map_size)
        num_types, num_summaries = len(self.score_types), config.num_summaries
        self.register_buffer("projection", torch.zeros(config.feature_channels, channels))
        for kind, side in (("feature", size), ("residual", size // 2)):
            self.register_buffer(f"{kind}_mean", torch.zeros(num_categories, channels, side, side))
            # Lower triangle of the inverse Cholesky factor W of each covariance: |W (f - mean)| is the distance
            packed = num_categories, (side // block) ** 2, channels * (channels + 1) // 2
            self.register_buffer(f"{kind}_whitening", torch.zeros(packed))
        self.register_buffer("global_whitening", torch.zeros(num_summaries * (num_summaries + 1) // 2))
        # Rows and columns are those of `score_types` and, of scores, the global one last
        units = {
            "category_mean category_std": (num_categories, channels),
            "global_mean global_std": (num_categories, num_summaries),
            "location scale": raw,
            "score_location score_scale": (num_categories, num_types + 1),
        }
        for (location, scale), shape in ((names.split(), shape) for names, shape in units.items()):
            self.register_buffer(location, torch.zeros(shape))
            self.register_buffer(scale, torch.ones(shape))
        self.register_buffer("map_scale", torch.ones(num_categories, num_types))
        self.register_buffer("good_scores", torch.zeros(num_types + 1, config.num_scores))  # sorted, standardised
        self.register_buffer(
            "good_peaks", torch.zeros(num_types, config.num_scores)
        )  # sorted; 0 calls every region one
        self.register_buffer("pixel_quantiles", torch.zeros(num_types, len(TAIL)))

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As in diffusers; settings saved when weights were lists, in the order of the registry, get their names."""
        config_dict = {name: value for name, value in config_dict.items() if name != "pooled"}  # read by nothing
        for name in ("weights", "image_weights"):
            if isinstance(config_dict.get(name), list):
                config_dict[name] = dict(zip(WEIGHTED, config_dict[name], strict=False))
        return super().extract_init_dict(config_dict, **kwargs)

    @property
    def channels(self) -> dict[str, slice]:
        """Where each score's maps stand among the raw maps and in their location and deviation."""
        count, channels, start = len(self.config.timesteps), {}, 0
        names = ["pixel", "feature", "rgb", *(["discriminator"] if self.config.discriminator else [])]
        for name in (*names, "residual", "mahalanobis"):
            stop = start + (count if name in ("pixel", "feature", "rgb") else 1)
            channels[name], start = slice(start, stop), stop
        return channels

    # -- Gaussians ------------------------------------------------------------------------------------------------

    def project(self, features: torch.Tensor, kind: str = "feature") -> torch.Tensor:
        """Features [B, feature_channels, h, w] on the grid and directions of a Gaussian, [B, P, g, g]."""
        features = F.adaptive_avg_pool2d(features.float(), self.get_buffer(f"{kind}_mean").shape[-1])
        return torch.einsum("bchw,cp->bphw", features, self.projection.float())

    def distance(self, features: torch.Tensor, labels: list[int], kind: str = "feature") -> torch.Tensor:
        """Mahalanobis distance to good images of the same category at every position; differentiable.

        Args:
            features: The extractor's, or the residuals of their prediction, [B, feature_channels, h, w].
            labels: Class label of each image.
            kind: "feature" or "residual".

        Returns:
            Distances [B, g, g]; about sqrt(gaussian_channels) on good images.
        """
        deviations = self.project(features, kind) - self.get_buffer(f"{kind}_mean")[labels].float()
        packed, side = self.get_buffer(f"{kind}_whitening"), deviations.shape[1]
        whitening = {label: unpack_triangle(packed[label].float(), side) for label in set(labels)}
        return torch.cat([mahalanobis(d[None], whitening[label]) for d, label in zip(deviations, labels, strict=True)])

    def global_distance(self, summaries: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """Mahalanobis distances [B] of the extractor's summaries [B, D] to those of good images."""
        summaries = pick(summaries, self.config.num_summaries).float()
        z = (summaries - self.global_mean[labels].float()) / self.global_std[labels].float()
        return (z @ unpack_triangle(self.global_whitening[None].float(), z.shape[1])[0].T).norm(dim=1)

    def classify(self, features: torch.Tensor) -> list[int]:
        """The category that each image resembles most, by the Gaussian of features averaged over positions."""
        average = self.project(features).mean((2, 3))[:, None]
        std = self.category_std.float()
        energy = ((average - self.category_mean.float()) / std).square().mean(-1) + 2 * std.log().mean(-1)
        return energy.argmin(1).tolist()

    def labels_of(self, categories: Sequence[str | None]) -> list[int]:
        """Class labels of categories by name; raises ValueError for one that is not known."""
        return [list(self.config.categories).index(name) for name in categories]

    # -- scores ---------------------------------------------------------------------------------------------------

    def forward(
        self, evidence: Evidence, labels: list[int]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Judges images by what good images of the same category look like.

        Args:
            evidence: Of B images, at this model's timesteps.
            labels: Class label of each image.

        Returns:
            The maps [B, map_size, map_size] and the image scores [B] of each type by name, in units of good images'
            deviation; the scores have one more, "global".
        """
        distance = self.global_distance(evidence.summaries, labels)
        return self.judge(self.raw_maps(evidence, labels), distance, labels)

    def raw_maps(self, evidence: Evidence, labels: list[int]) -> torch.Tensor:
        """All maps before they are compared with good images', at `channels` of [B, M, map_size, map_size]."""
        size = self.config.map_size
        distances = self.distance(evidence.residuals, labels, "residual"), self.distance(evidence.features, labels)
        return torch.cat([evidence.stack(size), *(to_grid(distance, size) for distance in distances)], dim=1)

    def judge(
        self, raw_maps: torch.Tensor, global_distance: torch.Tensor, labels: list[int]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Maps and scores as `forward` gives them, from `raw_maps` and `global_distance` [B]."""
        z = (raw_maps - self.location[labels].float()) / self.scale[labels].float()
        maps = self._combine(z, self.map_scale[labels].float())
        location, scale = self.score_location[labels].float(), self.score_scale[labels].float()
        outlying = (global_distance - location[:, -1]) / scale[:, -1]
        scores = {
            name: (self._image_score(maps, name, outlying) - location[:, row]) / scale[:, row]
            for row, name in enumerate(self.score_types)
        }
        scores[GLOBAL] = outlying
        if not all(values.isfinite().all() for values in scores.values()):
            raise ValueError(
                "An image's scores are not finite: the model is damaged, or its good images were too few."
            )
        return maps, scores

    def distance_score(self, distance: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """The "mahalanobis" image score [B] of distances of features [B, g, g] alone, as `forward` gives it."""
        channel, row = self.channels["mahalanobis"], self.score_types.index("mahalanobis")
        raw = to_grid(distance, self.config.map_size)
        z = (raw - self.location[labels, channel].float()) / self.scale[labels, channel].float()
        maps = z.mean(1) / self.map_scale[labels, row].float().view(-1, 1, 1)
        location, scale = self.score_location[labels, row].float(), self.score_scale[labels, row].float()
        return (self._top_mean(maps) - location) / scale

    def normal_weight(self, maps: torch.Tensor, pixel_rate: float, size: int) -> torch.Tensor:
        """Soft masks [B, 1, size, size] of what fused maps [B, h, w] call normal, 1 there and 0 at defects: all but a
        margin around the values that this share of good images' pixels exceeds."""
        maps = F.interpolate(maps[:, None].float(), (size, size), mode="bilinear")
        anomalous = (maps > self.pixel_threshold(pixel_rate)).float()
        radius = max(2, size // 64)
        anomalous = F.max_pool2d(anomalous, 2 * radius + 1, stride=1, padding=radius)
        blur = radius // 2
        return 1 - F.avg_pool2d(anomalous, 2 * blur + 1, stride=1, padding=blur, count_include_pad=False)

    def _combine(self, z: torch.Tensor, map_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means over timesteps of deviations z [B, M, h, w], and their weighted sum, each in its scale [B, types]."""
        scale = {name: map_scale[:, i].view(-1, 1, 1) for i, name in enumerate(self.score_types)}
        maps = {name: z[:, channels].mean(1) / scale[name] for name, channels in self.channels.items()}
        fused = weighted_sum(maps, self.config.weights)
        if self.config.context:
            side = z.shape[-1] // 4 * 2 + 1
            mean = F.avg_pool2d(fused[:, None], side, stride=1, padding=side // 2, count_include_pad=False)[:, 0]
            fused = fused + self.config.context * mean
        maps[FUSED] = fused / scale[FUSED]
        return {name: maps[name] for name in self.score_types}

    def _image_score(self, maps: dict[str, torch.Tensor], score_type: str, outlying: torch.Tensor) -> torch.Tensor:
        """Mean of the largest values of a map [B], to which the fused score adds how outlying the summary is [B]."""
        if score_type != FUSED:
            return self._top_mean(maps[score_type])
        score = self._top_mean(weighted_sum(maps, self.config.image_weights))
        return score + self.config.image_weights.get(GLOBAL, 0.0) * outlying

    def _top_mean(self, maps: torch.Tensor) -> torch.Tensor:
        values = maps.flatten(1)
        return values.topk(min(self.config.top_k, values.shape[1]), dim=1).values.mean(1)


def _check_weights(argument: str, weights: Mapping[str, float], names: Sequence[str]) -> None:
    if not isinstance(weights, Mapping) or not set(weights) <= set(names):
        raise ValueError(f"{argument} must give numbers to some of the names {', '.join(names)}, got {weights!r}.")
