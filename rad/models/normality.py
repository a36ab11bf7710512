"""What good images look like: the statistics that turn raw scores into units of good-image deviation."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

SCORE_TYPES = ("fused", "pixel", "feature", "residual", "mahalanobis", "rgb")
FUSED = ("pixel", "feature", "residual", "mahalanobis")
TAIL = np.append(np.logspace(0, -4, 401), 0.0)  # pixel tail probabilities at which thresholds are stored
NUM_FOLDS = 5
PRIOR_IMAGES = 10  # weight of statistics over all positions in those of one position


class NormalityModel(ModelMixin, ConfigMixin):
    """Statistics of good images, fitted by `NormalityModel.fit` and saved with the pipeline.

    For every category it holds
    - a Gaussian of the extractor's features at every position, as PaDiM does (Defard et al., 2021), and one of the
      residuals that the network's prediction of those features leaves, on a grid half as fine, for context: means at
      each position, covariances shared by square blocks of positions, or by all positions for objects that move;
    - location and deviation of every raw score map (log KL, feature error and log RGB difference at each timestep and
      position, the two Mahalanobis distances), so that a score says how far from good images this one lies;
    - the scores of held-out good images, from which p-values and thresholds with a stated false-alarm rate follow.

    Args:
        categories: Names of the categories, in the order of the class labels.
        timesteps: Steps of the full chain at which maps are scored.
        feature_channels: Channels of the extractor.
        gaussian_size: Side of the grid of the features' Gaussian, that of the residuals' is half of it; both are
            averaged down to their grid.
        gaussian_channels: Both are projected to this many orthonormal directions.
        gaussian_block: Side in positions of the blocks that share a covariance; it divides both grids.
        map_size: Side of the grid of calibrated maps.
        weights: Of the KL, feature error, residual and Mahalanobis maps in the fused map.
        image_weights: Likewise in the map whose largest values make the fused image score: what finds a defect's
            outline best is not what tells bad images from good ones best.
        context: How much the mean over a neighbourhood of half the side adds to the fused map; it helps large, faint
            defects and costs small ones.
        top_k: The image score is the mean of this many largest values of the map (RAN: 64).
        num_scores: Held-out good images in all.
        pooled: For each category, whether one Gaussian serves all positions.
    """

    @register_to_config
    def __init__(
        self,
        categories: tuple[str, ...] = ("object",),
        timesteps: tuple[int, ...] = (20, 201, 401),
        feature_channels: int = 192,
        gaussian_size: int = 16,
        gaussian_channels: int = 140,
        gaussian_block: int = 1,
        map_size: int = 64,
        weights: tuple[float, float, float, float] = (0.05, 0.25, 0.35, 0.35),
        image_weights: tuple[float, float, float, float] = (0.0, 0.0, 0.5, 0.5),
        context: float = 0.0,
        top_k: int = 64,
        num_scores: int = 1,
        pooled: tuple[bool, ...] = (False,),
    ):
        super().__init__()
        num_categories, num_maps, channels = len(categories), 3 * len(timesteps) + 2, gaussian_channels
        self.register_buffer("projection", torch.zeros(feature_channels, channels))
        if gaussian_size < 2 or gaussian_size % gaussian_block or gaussian_size // 2 % gaussian_block:
            raise ValueError(
                f"gaussian_block {gaussian_block} must divide both grids of the Gaussians, {gaussian_size} and "
                f"{gaussian_size // 2}, and the coarser one needs at least 1 position."
            )
        for kind, size in (("feature", gaussian_size), ("residual", gaussian_size // 2)):
            self.register_buffer(f"{kind}_mean", torch.zeros(num_categories, channels, size, size))
            # Lower triangle of the inverse Cholesky factor W of each covariance: |W (f - mean)| is the distance
            num_blocks, triangle = (size // gaussian_block) ** 2, channels * (channels + 1) // 2
            self.register_buffer(f"{kind}_whitening", torch.zeros(num_categories, num_blocks, triangle))
        self.register_buffer("category_mean", torch.zeros(num_categories, channels))
        self.register_buffer("category_std", torch.ones(num_categories, channels))
        self.register_buffer("location", torch.zeros(num_categories, num_maps, map_size, map_size))
        self.register_buffer("scale", torch.ones(num_categories, num_maps, map_size, map_size))
        self.register_buffer("map_scale", torch.ones(num_categories, len(SCORE_TYPES)))
        self.register_buffer("score_location", torch.zeros(num_categories, len(SCORE_TYPES)))
        self.register_buffer("score_scale", torch.ones(num_categories, len(SCORE_TYPES)))
        self.register_buffer("good_scores", torch.zeros(len(SCORE_TYPES), num_scores))  # sorted, standardised
        self.register_buffer("pixel_quantiles", torch.zeros(len(SCORE_TYPES), len(TAIL)))

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
        whitening = {label: self._unpack(label, kind) for label in set(labels)}
        return torch.stack([_distance(d, whitening[label]) for d, label in zip(deviations, labels, strict=True)])

    def _unpack(self, label: int, kind: str) -> torch.Tensor:
        """Whitening matrices [blocks, P, P] of a category."""
        channels, packed = self.config.gaussian_channels, self.get_buffer(f"{kind}_whitening")[label].float()
        matrix = packed.new_zeros(len(packed), channels, channels)
        rows, columns = torch.tril_indices(channels, channels)
        matrix[:, rows, columns] = packed
        return matrix

    def classify(self, features: torch.Tensor) -> list[int]:
        """The category whose good images each image resembles most, by the Gaussian of position-averaged features."""
        average = self.project(features).mean((2, 3))[:, None]
        std = self.category_std.float()
        energy = ((average - self.category_mean.float()) / std).square().mean(-1) + 2 * std.log().mean(-1)
        return energy.argmin(1).tolist()

    # -- calibrated scores ----------------------------------------------------------------------------------------

    def calibrate(self, raw_maps: torch.Tensor, labels: list[int]) -> dict[str, torch.Tensor]:
        """Calibrated maps of each type [B, map_size, map_size], in units of good-image deviation.

        Args:
            raw_maps: From `stack_raw_maps`, [B, 3 T + 2, map_size, map_size].
            labels: Class label of each image.
        """
        z = (raw_maps - self.location[labels].float()) / self.scale[labels].float()
        return self._combine(z, self.map_scale[labels].float())

    def _combine(self, z: torch.Tensor, map_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means over timesteps of deviations z [B, 3 T + 2, h, w], and their weighted sum, each in its own scale."""
        num_timesteps = len(self.config.timesteps)
        names = ("pixel", "feature", "rgb", "residual", "mahalanobis")
        parts = z.split([num_timesteps] * 3 + [1, 1], dim=1)
        scale = {name: map_scale[:, i].view(-1, 1, 1) for i, name in enumerate(SCORE_TYPES)}
        maps = {name: part.mean(1) / scale[name] for name, part in zip(names, parts, strict=True)}
        fused = _weighted(maps, self.config.weights)
        if self.config.context:
            side = z.shape[-1] // 4 * 2 + 1
            mean = F.avg_pool2d(fused[:, None], side, stride=1, padding=side // 2, count_include_pad=False)[:, 0]
            fused = fused + self.config.context * mean
        return {"fused": fused / scale["fused"], **maps}

    def image_scores(
        self, maps: dict[str, torch.Tensor], labels: list[int], score_type: str = "fused"
    ) -> torch.Tensor:
        """Image scores [B]: mean of the largest values of a map, in units of good images' deviation.

        Args:
            maps: From `calibrate`.
            labels: Class label of each image.
        """
        column = SCORE_TYPES.index(score_type)
        location, scale = self.score_location[labels, column].float(), self.score_scale[labels, column].float()
        return (self._top_k_mean(maps, score_type) - location) / scale

    def _top_k_mean(self, maps: dict[str, torch.Tensor], score_type: str) -> torch.Tensor:
        values = _weighted(maps, self.config.image_weights) if score_type == "fused" else maps[score_type]
        values = values.flatten(1)
        return values.topk(min(self.config.top_k, values.shape[1]), dim=1).values.mean(1)

    def p_value(self, scores: torch.Tensor, score_type: str = "fused") -> torch.Tensor:
        """How often a good image scores as high, [B] in (0, 1].

        The rank among held-out good images, (1 + #{good >= score}) / (1 + n); beyond their upper tenth an exponential
        tail fitted to it, because ranks can not tell rates below 1 / (n + 1) apart.
        """
        good, start, rate, mean_excess = self._tail(score_type)
        scores = scores.to(good)
        above = (good[None] >= scores[:, None]).sum(1)
        rank = (1.0 + above) / (1.0 + len(good))
        tail = rate * torch.exp(-(scores - start) / mean_excess)
        return torch.where(scores > start, tail, rank).clamp(1e-12, 1.0)

    def score_threshold(self, false_alarm_rate: float, score_type: str = "fused") -> float:
        """The image score that good images exceed at this rate: scores above it have a p-value below the rate."""
        good, start, rate, mean_excess = self._tail(score_type)
        if false_alarm_rate < rate:
            return float(start + mean_excess * np.log(rate / false_alarm_rate))
        rank = int(np.clip(np.floor(false_alarm_rate * (len(good) + 1)), 1, len(good)))
        return float(good.flip(0)[rank - 1])

    def pixel_threshold(self, false_alarm_rate: float, score_type: str = "fused") -> float:
        """The map value that this share of good images' pixels exceeds."""
        quantiles = self.pixel_quantiles[SCORE_TYPES.index(score_type)].float().cpu().numpy()
        return float(np.interp(-false_alarm_rate, -TAIL, quantiles))

    def _tail(self, score_type: str) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
        """Good images' scores (float64, ascending), where their tail starts, its rate and its mean excess."""
        good = self.good_scores[SCORE_TYPES.index(score_type)].double().cpu()
        size = max(1, len(good) // 10)
        start = good[-size - 1] if len(good) > 1 else good[0]
        mean_excess = (good[-size:] - start).mean().clamp_min(1e-3)
        return good, start, (size + 1) / (len(good) + 1), mean_excess

    # -- fitting --------------------------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        features: torch.Tensor,
        residuals: torch.Tensor,
        labels: list[int],
        raw_maps: torch.Tensor,
        categories: list[str],
        **config,
    ) -> "NormalityModel":
        """Fits on good images; every score that enters a threshold is held out.

        All images serve the Gaussians; the last len(raw_maps) of them are also scored. Those are split into folds:
        the Gaussians and the deviations that score a fold never saw it. When the scored images were kept from the
        network's training as well, their scores are those of fresh images.

        Args:
            features: The extractor's on all good images, [N, feature_channels, h, w], any float type.
            residuals: What their prediction leaves, likewise.
            labels: Class label of each, [N].
            raw_maps: KL, feature error and RGB difference maps of the last n images, [n, 3 T, map_size, map_size].
            categories: Their names; each needs at least two scored images.
            config: Further arguments of the constructor. By default the features' Gaussian has half their side; one
                category has a covariance at each of its positions, several share them in 2 x 2 blocks and have fewer
                directions, which keeps the model small.
        """
        label_of = torch.tensor(labels)
        num_scored = len(raw_maps)
        scored_labels = label_of[len(labels) - num_scored :]
        counts = torch.bincount(scored_labels, minlength=len(categories)).tolist()
        for category, count in zip(categories, counts, strict=True):
            if count < 2:
                raise ValueError(
                    f"Category {category!r} has {count} good images to calibrate on; it needs at least 2."
                )
        size = features.shape[-1] // 2
        several = len(categories) > 1
        defaults = {
            "gaussian_block": 2 if several and size % 4 == 0 else 1,
            "gaussian_channels": min(88 if several else 140, features.shape[1]),
        }
        model = cls(
            categories=tuple(categories),
            feature_channels=features.shape[1],
            gaussian_size=size,
            map_size=raw_maps.shape[-1],
            num_scores=num_scored,
            pooled=(False,) * len(categories),
            **defaults | config,
        ).to(raw_maps.device)
        # A fixed random orthonormal basis: it keeps directions of small variance, which principal components lose
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(features.shape[1], features.shape[1], generator=generator))[0]
        model.projection.copy_(basis[:, : model.config.gaussian_channels])
        projected = {
            kind: torch.cat([model.project(chunk, kind) for chunk in x.split(64)])
            for kind, x in (("feature", features), ("residual", residuals))
        }
        block = model.config.gaussian_block
        rows, columns = torch.tril_indices(*[model.config.gaussian_channels] * 2)

        maps = {name: torch.empty(num_scored, *raw_maps.shape[-2:], device=raw_maps.device) for name in SCORE_TYPES}
        pooled = []
        for label in range(len(categories)):
            members = (label_of == label).nonzero().flatten()
            scored = (scored_labels == label).nonzero().flatten()
            fold_of_scored = torch.arange(len(scored)) % min(NUM_FOLDS, len(scored))
            fold = torch.full((len(members),), -1)
            fold[len(members) - len(scored) :] = fold_of_scored
            x = {kind: p[members] for kind, p in projected.items()}

            # 1. Held-out distances under either sort of covariance; the likelier sort describes the category
            distances, energies = {}, {False: 0.0, True: 0.0}
            for shared in (False, True):
                for kind, values in x.items():
                    distance = distances[shared, kind] = values.new_empty(len(scored), *values.shape[-2:])
                    for k in fold_of_scored.unique():
                        mean, whitening = _fit_gaussian(values[fold != k], block, shared)
                        held_out = torch.stack([_distance(d, whitening) for d in values[fold == k] - mean])
                        distance[fold_of_scored == k] = held_out
                        log_det = -2 * torch.diagonal(whitening, dim1=-2, dim2=-1).log().sum(-1).mean()
                        energies[shared] += float(held_out.square().mean() + log_det) * len(held_out)
            pooled.append(energies[True] < energies[False])
            for kind, values in x.items():
                mean, whitening = _fit_gaussian(values, block, pooled[-1])
                model.get_buffer(f"{kind}_mean")[label] = mean
                model.get_buffer(f"{kind}_whitening")[label] = whitening[:, rows, columns]
            average = x["feature"].mean((2, 3))
            model.category_mean[label] = average.mean(0)
            model.category_std[label] = average.std(0).clamp_min(1e-3)

            # 2. Location and deviation of every map, held out fold by fold for the scores
            held_out = (distances[pooled[-1], kind] for kind in ("residual", "feature"))
            distance_maps = [_resize(d, model.config.map_size) for d in held_out]
            raw = torch.cat([raw_maps[scored].float(), *distance_maps], dim=1)
            z = torch.empty_like(raw)
            for k in fold_of_scored.unique():
                location, scale = _fit_deviation(raw[fold_of_scored != k])
                z[fold_of_scored == k] = (raw[fold_of_scored == k] - location) / scale
            model.location[label], model.scale[label] = _fit_deviation(raw)

            # 3. Unit deviation for each combined map, first the parts, then the fused one
            map_scale = raw.new_ones(1, len(SCORE_TYPES))
            parts = model._combine(z, map_scale)
            map_scale[0, 1:] = torch.stack([parts[name].std() for name in SCORE_TYPES[1:]])
            map_scale[0, 0] = model._combine(z, map_scale)["fused"].std()
            model.map_scale[label] = map_scale[0]
            combined = model._combine(z, map_scale)
            for column, name in enumerate(SCORE_TYPES):
                maps[name][scored] = combined[name]
                scores = model._top_k_mean(combined, name)
                model.score_location[label, column] = scores.mean()
                model.score_scale[label, column] = scores.std().clamp_min(1e-3)
        model.register_to_config(pooled=tuple(pooled))

        # 4. Scores of held-out good images, pooled over the categories whose units they share
        tail = torch.from_numpy(TAIL)
        for column, name in enumerate(SCORE_TYPES):
            scores = model.image_scores(maps, scored_labels.tolist(), name)
            model.good_scores[column] = scores.sort().values
            values = maps[name].flatten().double().sort().values
            index = ((1.0 - tail) * (len(values) - 1)).round().long()
            model.pixel_quantiles[column] = values[index.to(values.device)].float()
        return model


def stack_raw_maps(kl: torch.Tensor, error: torch.Tensor, rgb: torch.Tensor, size: int, *distances) -> torch.Tensor:
    """Raw score maps on one grid, [B, 3 T (+ 2), size, size].

    KL and RGB difference are averaged down, then their logs taken: both are positive with a long tail.

    Args:
        kl, rgb: [B, T, H, W].
        error: [B, T, h, w].
        distances: Of the residuals and of the features, each [B, g, g]; left out while fitting.
    """
    kl, rgb = (_resize(m, size).clamp_min(1e-6).log() for m in (kl, rgb))
    return torch.cat([kl, _resize(error, size), rgb, *(_resize(d, size) for d in distances)], dim=1)


def _resize(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Maps [B, (M,) h, w] on a grid of `size`: averaged down or interpolated up, [B, M, size, size]."""
    maps = maps.float() if maps.ndim == 4 else maps[:, None].float()
    if maps.shape[-1] > size:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, (size, size), mode="bilinear")


def _weighted(maps: dict[str, torch.Tensor], weights: tuple[float, ...]) -> torch.Tensor:
    return sum(weight * maps[name] for weight, name in zip(weights, FUSED, strict=True))


def _distance(deviation: torch.Tensor, whitening: torch.Tensor) -> torch.Tensor:
    """Norm of whitened deviations [P, g, g] from the mean, under blocks of matrices [b * b, P, P]: [g, g]."""
    channels, size = deviation.shape[0], deviation.shape[-1]
    blocks = int(round(len(whitening) ** 0.5))
    side = size // blocks
    x = deviation.reshape(channels, blocks, side, blocks, side).permute(1, 3, 0, 2, 4).reshape(blocks**2, channels, -1)
    squares = (whitening @ x).square().sum(1).view(blocks, blocks, side, side)
    return squares.permute(0, 2, 1, 3).reshape(size, size).clamp_min(1e-12).sqrt()


def _fit_gaussian(x: torch.Tensor, block: int, pooled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [P, g, g] and whitening matrices [(g / block) ** 2, P, P] of features [N, P, g, g].

    RAN adds 0.01 I to each covariance. Each is also drawn towards the mean of all, which counts as much as
    `PRIOR_IMAGES` images.
    """
    count, channels, size, _ = x.shape
    blocks = size // block
    pooled_mean = x.mean((0, 2, 3)).view(-1, 1, 1).expand(-1, size, size)
    mean = pooled_mean if pooled else x.mean(0)
    residuals = (x - mean).reshape(count, channels, blocks, block, blocks, block)
    residuals = residuals.permute(2, 4, 1, 0, 3, 5).reshape(blocks**2, channels, -1)
    covariance = residuals @ residuals.transpose(1, 2) / residuals.shape[-1]
    shared = covariance.mean(0, keepdim=True)
    own = 0 if pooled else count
    covariance = (own * covariance + PRIOR_IMAGES * shared) / (own + PRIOR_IMAGES)
    covariance = covariance.double().cpu().numpy() + 0.01 * np.eye(channels)
    whitening = np.linalg.inv(np.linalg.cholesky(covariance))
    return mean.contiguous(), torch.from_numpy(whitening).float().to(x.device)


def _fit_deviation(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Location and deviation at every position of maps [N, M, h, w], each [M, h, w].

    Moments are averaged over 3 x 3 neighbours and drawn towards those of all positions, which count as much as
    `PRIOR_IMAGES` images: few images say little of any one position. The distances, the last two maps, are in units of
    each position's deviation already: one location and deviation serves all of theirs.
    """
    count = len(raw)
    moments = torch.stack([raw.mean(0), raw.square().mean(0)])
    everywhere = moments.mean((-2, -1), keepdim=True).expand_as(moments)
    moments = F.avg_pool2d(moments, 3, stride=1, padding=1, count_include_pad=False)
    location, square = (count * moments + PRIOR_IMAGES * everywhere) / (count + PRIOR_IMAGES)
    location[-2:], square[-2:] = everywhere[0, -2:], everywhere[1, -2:]
    return location, (square - location.square()).clamp_min(1e-12).sqrt()
