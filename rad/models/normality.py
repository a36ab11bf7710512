"""What good images look like: the statistics that turn raw scores into units of good-image deviation."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from scipy.linalg.lapack import dtrtri
from scipy.stats import binomtest
from sklearn.covariance import ledoit_wolf
from threadpoolctl import threadpool_limits

SCORE_TYPES = ("fused", "pixel", "feature", "residual", "mahalanobis", "rgb", "discriminator")
FUSED = ("pixel", "feature", "residual", "mahalanobis", "discriminator")
GLOBAL = "global"  # the score of an image as a whole, which has no map
TAIL = np.append(np.logspace(0, -4, 401), 0.0)  # pixel tail probabilities at which thresholds are stored
NUM_FOLDS = 5
PRIOR_IMAGES = 10  # weight of statistics over all positions in those of one position


class NormalityModel(ModelMixin, ConfigMixin):
    """Statistics of good images, fitted by `NormalityModel.fit` and saved with the pipeline.

    For every category it holds
    - a Gaussian of the extractor's features at every position, as PaDiM does (Defard et al., 2021), and one of the
      residuals that the network's prediction of those features leaves, on a grid half as fine, for context: means at
      each position, covariances shared by square blocks of positions, or by all positions for objects that move;
    - a Gaussian of the extractor's summaries of whole images (Rippel et al., ICPR 2020), with one covariance for all
      categories (Lee et al., NeurIPS 2018), for what is odd about an image and nowhere in it;
    - location and deviation of every raw score map (log KL, feature error and log RGB difference at each timestep and
      position, the two Mahalanobis distances), so that a score says how far from good images this one lies;
    - the scores of held-out good images, from which p-values and thresholds with a stated false-alarm rate follow.

    Args:
        categories: Names of the categories, in the order of the class labels.
        timesteps: Steps of the full chain at which maps are scored.
        feature_channels: Channels of the extractor.
        num_summaries: Numbers in its summary of an image.
        gaussian_size: Side of the grid of the features' Gaussian, that of the residuals' is half of it; both are
            averaged down to their grid.
        gaussian_channels: Both are projected to this many orthonormal directions.
        gaussian_block: Side in positions of the blocks that share a covariance; it divides both grids.
        map_size: Side of the grid of calibrated maps.
        weights: Of the KL, feature error, residual, Mahalanobis and discriminator maps in the fused map.
        image_weights: Likewise in the map whose largest values make the fused image score, and the weight of the
            global score in it: what finds a defect's outline best is not what tells bad images from good ones best.
        context: How much the mean over a neighbourhood of half the side adds to the fused map; it helps large, faint
            defects and costs small ones.
        top_k: The image score is the mean of this many largest values of the map (RAN: 64).
        num_scores: Held-out good images in all.
        pooled: For each category, whether one Gaussian serves all positions.
        discriminator: Whether there are maps of a discriminator; without one, its weights do not count.
    """

    @register_to_config
    def __init__(
        self,
        categories: tuple[str, ...] = ("object",),
        timesteps: tuple[int, ...] = (20, 201, 401),
        feature_channels: int = 192,
        num_summaries: int = 1152,
        gaussian_size: int = 16,
        gaussian_channels: int = 140,
        gaussian_block: int = 1,
        map_size: int = 64,
        weights: tuple[float, ...] = (1.0, 1.0, 0.0, 0.75, 1.5),
        image_weights: tuple[float, ...] = (0.0, 0.0, 0.1, 0.9, 0.0, 1.2),
        context: float = 0.0,
        top_k: int = 64,
        num_scores: int = 1,
        pooled: tuple[bool, ...] = (False,),
        discriminator: bool = False,
    ):
        super().__init__()
        for name, given, of in (("weights", weights, FUSED), ("image_weights", image_weights, (*FUSED, GLOBAL))):
            if len(given) != len(of):
                raise ValueError(f"{name} must be {len(of)} numbers, those of {', '.join(of)}, got {given}.")
        num_categories, num_maps, channels = len(categories), 3 * len(timesteps) + 2 + discriminator, gaussian_channels
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
        self.register_buffer("global_mean", torch.zeros(num_categories, num_summaries))
        self.register_buffer("global_std", torch.ones(num_categories, num_summaries))
        self.register_buffer("global_whitening", torch.zeros(num_summaries * (num_summaries + 1) // 2))
        self.register_buffer("location", torch.zeros(num_categories, num_maps, map_size, map_size))
        self.register_buffer("scale", torch.ones(num_categories, num_maps, map_size, map_size))
        self.register_buffer("map_scale", torch.ones(num_categories, len(self.score_types)))
        # The columns of scores are those of the maps and, last, the global one
        self.register_buffer("score_location", torch.zeros(num_categories, len(self.score_types) + 1))
        self.register_buffer("score_scale", torch.ones(num_categories, len(self.score_types) + 1))
        self.register_buffer("good_scores", torch.zeros(len(self.score_types) + 1, num_scores))  # sorted, standardised
        self.register_buffer("pixel_quantiles", torch.zeros(len(self.score_types), len(TAIL)))

    @property
    def score_types(self) -> tuple[str, ...]:
        """The score types that have a map, "fused" first; the global score has none."""
        return SCORE_TYPES if self.config.discriminator else SCORE_TYPES[:-1]

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
        return torch.cat([_distance(d[None], whitening[label]) for d, label in zip(deviations, labels, strict=True)])

    def _unpack(self, label: int, kind: str) -> torch.Tensor:
        """Whitening matrices [blocks, P, P] of a category."""
        return _triangle(self.get_buffer(f"{kind}_whitening")[label].float(), self.config.gaussian_channels)

    def global_distance(self, summaries: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """Mahalanobis distances [B] of the extractor's summaries [B, num_summaries] to those of good images."""
        z = (summaries.float() - self.global_mean[labels].float()) / self.global_std[labels].float()
        return (z @ _triangle(self.global_whitening[None].float(), z.shape[1])[0].T).norm(dim=1)

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
            raw_maps: From `stack_raw_maps`, [B, 3 T (+ 1) + 2, map_size, map_size].
            labels: Class label of each image.
        """
        z = (raw_maps - self.location[labels].float()) / self.scale[labels].float()
        return self._combine(z, self.map_scale[labels].float())

    def _combine(self, z: torch.Tensor, map_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means over timesteps of deviations z [B, 3 T (+ 1) + 2, h, w], and their weighted sum, each in its scale."""
        num_timesteps = len(self.config.timesteps)
        further = (["discriminator"] if self.config.discriminator else []) + ["residual", "mahalanobis"]
        names = ["pixel", "feature", "rgb", *further]
        parts = z.split([num_timesteps] * 3 + [1] * len(further), dim=1)
        scale = {name: map_scale[:, i].view(-1, 1, 1) for i, name in enumerate(self.score_types)}
        maps = {name: part.mean(1) / scale[name] for name, part in zip(names, parts, strict=True)}
        fused = _weighted(maps, self.config.weights)
        if self.config.context:
            side = z.shape[-1] // 4 * 2 + 1
            mean = F.avg_pool2d(fused[:, None], side, stride=1, padding=side // 2, count_include_pad=False)[:, 0]
            fused = fused + self.config.context * mean
        return {"fused": fused / scale["fused"], **maps}

    def image_scores(
        self,
        maps: dict[str, torch.Tensor],
        labels: list[int],
        score_type: str = "fused",
        global_distance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Image scores [B]: mean of the largest values of a map, in units of good images' deviation.

        Args:
            maps: From `calibrate`.
            labels: Class label of each image.
            score_type: One of `score_types`, or "global", for which no map is needed.
            global_distance: [B], from the method of that name; the fused and the global score need it.
        """
        outlying = None
        if global_distance is not None:
            location, scale = self.score_location[labels, -1].float(), self.score_scale[labels, -1].float()
            outlying = (global_distance - location) / scale
        if score_type == GLOBAL:
            return outlying
        column = SCORE_TYPES.index(score_type)
        location, scale = self.score_location[labels, column].float(), self.score_scale[labels, column].float()
        return (self._image_score(maps, score_type, outlying) - location) / scale

    def _image_score(
        self, maps: dict[str, torch.Tensor], score_type: str, outlying: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean of the largest values of a map [B], to which the fused score adds how outlying the summary is [B]."""
        values = _weighted(maps, self.config.image_weights[:-1]) if score_type == "fused" else maps[score_type]
        values = values.flatten(1)
        score = values.topk(min(self.config.top_k, values.shape[1]), dim=1).values.mean(1)
        return score + self.config.image_weights[-1] * outlying if score_type == "fused" else score

    def p_value(self, scores: torch.Tensor, score_type: str = "fused") -> torch.Tensor:
        """How often a good image scores as high, [B] in (0, 1].

        The rank among held-out good images, (1 + #{good >= score}) / (1 + n); beyond their upper tenth an exponential
        tail fitted to it, because ranks cannot tell rates below 1 / (n + 1) apart.
        """
        return _p_value(scores, self._good_scores(score_type))

    @property
    def p_value_resolution(self) -> float:
        """The smallest p-value that the held-out good images bear out, a tenth of one in their number and 1e-4 at
        least; smaller ones only say that an image is very odd."""
        return 1.0 / min(10 * self.config.num_scores, 10_000)

    def score_threshold(self, false_alarm_rate: float, score_type: str = "fused") -> float:
        """The image score that good images exceed at this rate: scores above it have a p-value below the rate."""
        good = self._good_scores(score_type)
        start, rate, mean_excess = _tail(good)
        if false_alarm_rate < rate:
            return float(start + mean_excess * np.log(rate / false_alarm_rate))
        rank = int(np.clip(np.floor(false_alarm_rate * (len(good) + 1)), 1, len(good)))
        return float(good.flip(0)[rank - 1])

    def false_alarm_interval(self, false_alarm_rate: float, score_type: str = "fused") -> tuple[float, float]:
        """95 % confidence interval (Clopper and Pearson's) of the rate that the threshold for this rate really has.

        It follows from how many of the held-out good images lie above the threshold, and from nothing else: with ten
        of them, none above, the rate may be anything up to 31 %.
        """
        good = self._good_scores(score_type)
        above = int((good >= self.score_threshold(false_alarm_rate, score_type)).sum())
        interval = binomtest(above, len(good)).proportion_ci(confidence_level=0.95)
        return float(interval.low), float(interval.high)

    def held_out_alarms(self, false_alarm_rate: float, score_type: str = "fused") -> int:
        """How many of the `num_scores` held-out good images raise an alarm at this rate, each judged by the others."""
        good = self._good_scores(score_type)
        p_values = [_p_value(good[i : i + 1], torch.cat([good[:i], good[i + 1 :]])) for i in range(len(good))]
        return int((torch.cat(p_values) <= false_alarm_rate).sum())

    def pixel_threshold(self, false_alarm_rate: float, score_type: str = "fused") -> float:
        """The map value that this share of good images' pixels exceeds."""
        quantiles = self.pixel_quantiles[SCORE_TYPES.index(score_type)].float().cpu().numpy()
        return float(np.interp(-false_alarm_rate, -TAIL, quantiles))

    def _good_scores(self, score_type: str) -> torch.Tensor:
        """Scores of the held-out good images, float64, ascending."""
        return self.good_scores[-1 if score_type == GLOBAL else SCORE_TYPES.index(score_type)].double().cpu()

    # -- fitting --------------------------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        features: torch.Tensor,
        residuals: torch.Tensor,
        summaries: torch.Tensor,
        labels: list[int],
        raw_maps: torch.Tensor,
        categories: list[str],
        share: slice = slice(None),
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda part: part,
        **config,
    ) -> "NormalityModel":
        """Fits on good images; every score that enters a threshold is held out.

        All N images serve the Gaussians; those with raw maps, the last ones, are also scored. Those are split into
        folds: the Gaussians and the deviations that score a fold never saw it. When the scored images were kept from
        the network's training as well, their scores are those of fresh images.

        Everything is made of sums over images, so that several processes can fit together: each holds the features and
        maps of its own share alone, and all return the same model.

        Args:
            features: The extractor's on this share of the images, [n, feature_channels, h, w], any float type. Both
                may have been averaged down to their Gaussian's grid, if `gaussian_size` is given.
            residuals: What their prediction leaves, likewise.
            summaries: The extractor's, of the same images, [n, num_summaries].
            labels: Class label of each image of all shares, [N].
            raw_maps: KL, feature error and RGB difference maps, and a discriminator's logits if there is one, of the
                scored images in this share, [m, 3 T (+ 1), h, w].
            categories: Their names; each needs at least two scored images.
            share: Which of all images these are.
            reduce: Sums a tensor over processes, with the sum as its result on each.
            config: Further arguments of the constructor. By default the features' Gaussian has half their side; one
                category has a covariance at each of its positions; each of several has one for each quarter of the
                image and one for all residuals, but of more directions, which finds more and keeps the model small.

        Raises:
            ValueError: A category has fewer than two scored images.
        """
        label_of, num_scored = torch.tensor(labels), int(reduce(torch.tensor(len(raw_maps))))
        place = torch.arange(len(labels)) - (len(labels) - num_scored)  # among the scored images; others are below 0
        fold_of = torch.full_like(label_of, -1)  # follows from the place: the same for any number of processes
        counts = []
        for label, category in enumerate(categories):
            scored = (label_of == label) & (place >= 0)
            counts.append(int(scored.sum()))
            if counts[-1] < 2:
                raise ValueError(
                    f"Category {category!r} has {counts[-1]} good images to calibrate on; it needs at least 2."
                )
            fold_of[scored] = torch.arange(counts[-1]) % NUM_FOLDS
        everyone = torch.zeros(len(labels), summaries.shape[1], dtype=torch.float64)
        everyone[share] = summaries.double()
        everyone = reduce(everyone)
        mean, std, whitening = _fit_summaries(everyone, label_of)
        global_distance = torch.zeros(num_scored, dtype=torch.float64)
        for k in range(NUM_FOLDS):
            held_out = fold_of == k
            rest = _fit_summaries(everyone[~held_out], label_of[~held_out])
            z = (everyone[held_out] - rest[0][label_of[held_out]]) / rest[1][label_of[held_out]]
            global_distance[place[held_out]] = (z @ rest[2].T).norm(dim=1)
        label_of, place, fold_of = label_of[share], place[share], fold_of[share]

        several = len(categories) > 1
        config = {"gaussian_size": features.shape[-1] // 2} | config
        defaults = {
            "gaussian_block": config["gaussian_size"] // 2 if several and config["gaussian_size"] % 2 == 0 else 1,
            "gaussian_channels": min(192 if several else 140, features.shape[1]),
        }
        model = cls(
            categories=tuple(categories),
            feature_channels=features.shape[1],
            num_summaries=summaries.shape[1],
            map_size=raw_maps.shape[-1],
            num_scores=num_scored,
            discriminator=raw_maps.shape[1] % 3 == 1,
            pooled=(False,) * len(categories),
            **defaults | config,
        ).to(raw_maps.device)
        # A fixed random orthonormal basis: it keeps directions of small variance, which principal components lose
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(features.shape[1], features.shape[1], generator=generator))[0]
        model.projection.copy_(basis[:, : model.config.gaussian_channels])
        model.global_mean.copy_(mean)
        model.global_std.copy_(std)
        model.global_whitening.copy_(whitening[tuple(torch.tril_indices(*whitening.shape))])
        block, size = model.config.gaussian_block, model.config.map_size
        rows, columns = torch.tril_indices(*[model.config.gaussian_channels] * 2)

        names = model.score_types
        maps, pooled = raw_maps.new_zeros(len(names), num_scored, size, size, dtype=torch.float32), []
        scores = maps.new_zeros(len(names) + 1, num_scored)
        for label, count in enumerate(counts):
            mine, folds = (label_of == label).nonzero().flatten(), range(min(NUM_FOLDS, count))
            fold, scored = fold_of[mine], fold_of[mine] >= 0
            x = {
                kind: torch.cat([model.project(values[chunk], kind) for chunk in mine.split(64)])
                for kind, values in (("feature", features), ("residual", residuals))
            }

            # 1. Held-out distances under either sort of covariance; the likelier sort describes the category
            total, distances, energies = {}, {}, maps.new_zeros(2, dtype=torch.float64)
            for kind, values in x.items():
                total[kind] = _Moments.of(values, reduce, block)
                for shared in (False, True):
                    distances[shared, kind] = values.new_empty(len(values), *values.shape[-2:])
                for k in folds:
                    rest = total[kind] - _Moments.of(values[fold == k], reduce, block)
                    for shared in (False, True):
                        mean, whitening = _fit_gaussian(rest, shared)
                        held_out = _distance(values[fold == k] - mean, whitening)
                        distances[shared, kind][fold == k] = held_out
                        log_det = -2 * torch.diagonal(whitening, dim1=-2, dim2=-1).log().sum(-1).mean()
                        energies[int(shared)] += (held_out.square().mean((1, 2)) + log_det).sum()
            separate, together = reduce(energies).tolist()
            pooled.append(together < separate)
            for kind, moments in total.items():
                mean, whitening = _fit_gaussian(moments, pooled[-1])
                model.get_buffer(f"{kind}_mean")[label] = mean
                model.get_buffer(f"{kind}_whitening")[label] = whitening[:, rows, columns]
            mean, std = _Moments.of(x["feature"].mean((2, 3)), reduce).mean_and_std()
            model.category_mean[label], model.category_std[label] = mean, std.clamp_min(1e-3)

            # 2. Location and deviation of every map, held out fold by fold for the scores
            distance_maps = [_resize(distances[pooled[-1], kind][scored], size) for kind in ("residual", "feature")]
            raw = torch.cat([raw_maps[label_of[place >= 0] == label].float(), *distance_maps], dim=1)
            moments, z = _Moments.of(raw, reduce), torch.empty_like(raw)
            # Logits mean the same everywhere, and so do distances under a covariance of each position's own
            shared = pooled[-1] or block > 1
            positioned = [True] * 3 * len(model.config.timesteps) + [False] * model.config.discriminator + [shared] * 2
            for k in folds:
                held_out = fold[scored] == k
                location, scale = _fit_deviation(moments - _Moments.of(raw[held_out], reduce), positioned)
                z[held_out] = (raw[held_out] - location) / scale
            model.location[label], model.scale[label] = _fit_deviation(moments, positioned)

            # 3. Unit deviation for each combined map, first the parts, then the fused one
            map_scale = raw.new_ones(1, len(names))
            parts = model._combine(z, map_scale)
            parts = torch.stack([parts[name].flatten() for name in names[1:]], dim=1)
            map_scale[0, 1:] = _Moments.of(parts, reduce).mean_and_std()[1]
            fused = model._combine(z, map_scale)["fused"].flatten()
            map_scale[0, 0] = _Moments.of(fused, reduce).mean_and_std()[1]
            model.map_scale[label] = map_scale[0]
            combined = model._combine(z, map_scale)
            places = place[mine][scored]
            maps[:, places] = torch.stack([combined[name] for name in names])
            distance = global_distance[places].float()
            mean, std = _Moments.of(distance, reduce).mean_and_std()
            outlying = ((distance - mean) / std.clamp_min(1e-3)).float()
            values = [model._image_score(combined, name, outlying) for name in names]
            values = torch.stack([*values, distance], dim=1)
            moments = _Moments.of(values, reduce)
            mean, std = moments.mean_and_std()
            model.score_location[label], model.score_scale[label] = mean, std.clamp_min(1e-3)
            for k in folds:
                held_out = fold[scored] == k
                rest = moments - _Moments.of(values[held_out], reduce)
                mean, deviation = rest.mean_and_std(prior=std)
                scores[:, places[held_out]] = ((values[held_out] - mean) / deviation.clamp_min(1e-3)).T.float()
        model.register_to_config(pooled=tuple(pooled))

        # 4. Scores and pixels of held-out good images, pooled over the categories whose units they share
        model.good_scores.copy_(reduce(scores).sort().values)
        rank = np.round((1.0 - TAIL) * (maps[0].numel() - 1)).astype(int)
        for column, values in enumerate(maps):
            model.pixel_quantiles[column] = reduce(values).flatten().sort().values[rank]
        return model


class _Moments(NamedTuple):
    """Sums over images, float64: they add up over processes, and subtracting those of a fold leaves it out."""

    count: torch.Tensor
    first: torch.Tensor  # sum
    second: torch.Tensor  # sum of squares, or of outer products

    @classmethod
    def of(cls, x: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor], block: int = 0) -> "_Moments":
        """Of x [N, ...] on all processes: first and second [...]; with a block of features [N, P, g, g] the second is
        the sum of their outer products in each block x block positions, [(g / block) ** 2, P, P]."""
        first = second = 0
        for chunk in x.split(max(1, 2**24 // x.shape[1:].numel())):  # 128 MB of float64 at a time
            chunk = chunk.double()
            first = first + chunk.sum(0)
            if block:
                chunk = _blocks(chunk, x.shape[-1] // block)
                second = second + chunk @ chunk.mT
            else:
                second = second + chunk.square().sum(0)
        return cls(*(reduce(part) for part in (first.new_tensor(len(x)), first, second)))

    def __sub__(self, other: "_Moments") -> "_Moments":
        return _Moments(*(a - b for a, b in zip(self, other, strict=True)))

    def mean_and_std(self, prior: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A prior deviation counts as much as `PRIOR_IMAGES` images."""
        mean, weight = self.first / self.count, 0 if prior is None else PRIOR_IMAGES
        squares = (self.second - self.count * mean.square()).clamp_min(0)
        variance = (squares + (0 if prior is None else weight * prior.square())) / (self.count - 1 + weight)
        return mean, variance.sqrt()


def _tail(good: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Where the tail of good images' scores (float64, ascending) starts, its rate and its mean excess."""
    size = max(1, len(good) // 10)
    start = good[-size - 1] if len(good) > 1 else good[0]
    mean_excess = (good[-size:] - start).mean().clamp_min(1e-3)
    return start, (size + 1) / (len(good) + 1), mean_excess


def _p_value(scores: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """The p-value of scores [B] among those of good images, as `NormalityModel.p_value` explains it."""
    start, rate, mean_excess = _tail(good)
    scores = scores.to(good)
    above = (good[None] >= scores[:, None]).sum(1).double()  # in float32 a rate that is a rank would be missed
    rank = (1.0 + above) / (1.0 + len(good))
    tail = rate * torch.exp(-(scores - start) / mean_excess)
    return torch.where(scores > start, tail, rank).clamp(1e-12, 1.0)


def stack_raw_maps(kl: torch.Tensor, error: torch.Tensor, rgb: torch.Tensor, size: int, *others) -> torch.Tensor:
    """Raw score maps on one grid, [B, 3 T + len(others), size, size].

    KL and RGB difference are averaged down, then their logs taken: both are positive with a long tail.

    Args:
        kl, rgb: [B, T, H, W].
        error: [B, T, h, w].
        others: A discriminator's logits if there is one, then the distances of the residuals and of the features, each
            [B, g, g]; the distances are left out while fitting.
    """
    kl, rgb = (_resize(m, size).clamp_min(1e-6).log() for m in (kl, rgb))
    return torch.cat([kl, _resize(error, size), rgb, *(_resize(m, size) for m in others)], dim=1)


def _resize(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Maps [B, (M,) h, w] on a grid of `size`: averaged down or interpolated up, [B, M, size, size]."""
    maps = maps.float() if maps.ndim == 4 else maps[:, None].float()
    if maps.shape[-1] > size:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, (size, size), mode="bilinear")


def _weighted(maps: dict[str, torch.Tensor], weights: tuple[float, ...]) -> torch.Tensor:
    return sum(weight * maps[name] for weight, name in zip(weights, FUSED, strict=True) if name in maps)


def _blocks(x: torch.Tensor, count: int) -> torch.Tensor:
    """Vectors of x [N, P, g, g] in each of count x count blocks of positions, [count ** 2, P, N (g / count) ** 2]."""
    x = x.unflatten(3, (count, -1)).unflatten(2, (count, -1))
    return x.permute(2, 4, 1, 0, 3, 5).flatten(3).flatten(0, 1)


def _triangle(packed: torch.Tensor, side: int) -> torch.Tensor:
    """Lower triangular matrices [n, side, side] whose rows one after another are packed [n, side (side + 1) / 2]."""
    matrix = packed.new_zeros(len(packed), side, side)
    rows, columns = torch.tril_indices(side, side)
    matrix[:, rows, columns] = packed
    return matrix


def _fit_summaries(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and deviation [K, D] of each category's summaries x [N, D], float64, and one whitening matrix [D, D].

    There are more numbers in a summary than good images, so the covariance is drawn towards a multiple of the identity
    by Ledoit and Wolf's share (J. Multivariate Analysis 2004).
    """
    categories = range(int(labels.max()) + 1)
    mean = torch.stack([x[labels == k].mean(0) for k in categories])
    std = torch.stack([x[labels == k].std(0, correction=0) for k in categories]).clamp_min(1e-3)
    covariance, _ = ledoit_wolf(((x - mean[labels]) / std[labels]).numpy(), assume_centered=True)
    return mean, std, torch.from_numpy(inverse_cholesky(covariance + 0.01 * np.eye(len(covariance))))


def _distance(deviations: torch.Tensor, whitening: torch.Tensor) -> torch.Tensor:
    """Norms [N, g, g] of whitened deviations [N, P, g, g] from the mean, under blocks of matrices [b * b, P, P]."""
    number, size = len(deviations), deviations.shape[-1]
    blocks = int(round(len(whitening) ** 0.5))
    side = size // blocks
    squares = (whitening @ _blocks(deviations, blocks)).square().sum(1).view(blocks, blocks, number, side, side)
    return squares.permute(2, 0, 3, 1, 4).reshape(number, size, size).clamp_min(1e-12).sqrt()


def inverse_cholesky(covariance: np.ndarray) -> np.ndarray:
    """Matrices W [..., n, n] for which W^T W is the inverse of each covariance [..., n, n]."""
    # OpenBLAS's threads wait for each other over small matrices: several can be 50 times as slow as one
    with threadpool_limits(1, "blas"):
        roots = np.linalg.cholesky(covariance)
        for index in np.ndindex(roots.shape[:-2]):
            roots[index] = dtrtri(roots[index], lower=True)[0]
    return roots


def _fit_gaussian(moments: _Moments, pooled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [P, g, g] and whitening matrices [blocks, P, P], one if pooled, of features with these moments.

    RAN adds 0.01 I to each covariance. Each is also drawn towards the mean of all, which counts as much as
    `PRIOR_IMAGES` images.
    """
    count, mean, second = moments.count, moments.first / moments.count, moments.second
    if pooled:
        mean, second = mean.mean((1, 2), keepdim=True).expand_as(mean), second.sum(0, keepdim=True)
    means = _blocks(mean[None], int(round(len(second) ** 0.5)))
    covariance = (second / count - means @ means.mT) / means.shape[-1]
    covariance = covariance.lerp(covariance.mean(0), PRIOR_IMAGES / (count + PRIOR_IMAGES))
    covariance.diagonal(dim1=1, dim2=2).add_(0.01)
    whitening = torch.from_numpy(inverse_cholesky(covariance.cpu().numpy()))
    return mean.float(), whitening.float().to(mean.device)


def _fit_deviation(moments: _Moments, positioned: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Location and deviation at every position of maps with these moments, each [M, h, w].

    Moments are averaged over 3 x 3 neighbours and drawn towards those of all positions, which count as much as
    `PRIOR_IMAGES` images: few images say little of any one position. A map that is not positioned means the same
    everywhere already: one location and deviation serves all of its positions.
    """
    count, means = moments.count, torch.stack([moments.first, moments.second]) / moments.count
    everywhere = means.mean((-2, -1), keepdim=True).expand_as(means)
    means = F.avg_pool2d(means, 3, stride=1, padding=1, count_include_pad=False)
    location, square = (count * means + PRIOR_IMAGES * everywhere) / (count + PRIOR_IMAGES)
    alike = ~torch.tensor(positioned)
    location[alike], square[alike] = everywhere[:, alike]
    return location.float(), (square - location.square()).clamp_min(1e-12).sqrt().float()
