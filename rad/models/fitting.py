"""How a normality model is fitted: Gaussians, units, weights and thresholds, none of them from an image's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .evidence import FUSED, to_grid
from .false_alarms import TAIL, p_values
from .fusion import Look, Twins, choose_weights, count_found
from .gaussian import (
    MAX_SUMMARIES,
    MIN_SCORED,
    MIRRORED_IMAGES,
    VIEW_IMAGES,
    Moments,
    Reduce,
    check_counts,
    fit_held_out_deviation,
    fit_held_out_gaussian,
    fit_held_out_scores,
    fit_held_out_summaries,
    folds_of,
    pack_triangle,
    pick,
)


@dataclass(frozen=True)
class Mirrored:
    """Mirrored copies of good images, M in this process: more of what good parts look like, where these are few.

    Attributes:
        features: As those of `fit`, [M, feature_channels, h, w].
        sources: Of each, the place in this process's share of the image that it is a copy of.
    """

    features: torch.Tensor
    sources: list[int]


@dataclass(frozen=True)
class Views:
    """Scored good images through another camera, M in this process.

    Attributes:
        sources: Of each, the place in this process's share of the image that it is a view of.
        numbers: Of each, among all processes' views.
        total: Of all processes' views.
    """

    sources: list[int]
    numbers: list[int]
    total: int


class FittingMixin:
    """The fit of a `NormalityModel`, to its buffers and its configuration."""

    @torch.no_grad()
    def fit(
        self: Any,
        features: torch.Tensor,
        residuals: torch.Tensor,
        summaries: torch.Tensor,
        labels: list[int],
        raw_maps: torch.Tensor,
        categories: Sequence[str],
        share: slice = slice(None),
        reduce: Reduce = lambda part: part,
        twins: Twins | None = None,
        chosen: Sequence[str] = ("weights", "image_weights"),
        mirrored: Mirrored | None = None,
        views: Views | None = None,
        parts: Sequence[int] | None = None,
    ) -> Any:
        """Fits on good images, in place; every score that enters a threshold is held out of Gaussians and units.

        All N images serve the Gaussians; those with raw maps, the last ones, are also scored. Those are split into
        folds: the Gaussians and the deviations that score a fold never saw it, nor another photo of a part in it. When
        the scored images were kept from the network's training as well, their scores are those of fresh images.

        Twins, scored images with a defect, are judged as their good ones are, by Gaussians and units of the other
        folds. By both the weights are chosen, a few numbers for all images; twins enter nothing else. Views serve
        Gaussians and units as their images do, and thresholds hold for both.

        Everything is made of sums over images, so that several processes can fit together: each holds the features and
        maps of its own share alone, and all end with the same model.

        Args:
            features: The extractor's on this share of the images, [n, feature_channels, h, w], any float type. Both
                may have been averaged down to their Gaussian's grid, if `gaussian_size` is given. Of all four, rows of
                views and then of twins follow.
            residuals: What their prediction leaves, likewise.
            summaries: The extractor's, of the same images, [n, D].
            labels: Class label of each image of all shares, [N].
            raw_maps: From `Evidence.stack`, of the scored images in this share, [m, 3 T (+ 1), h, w].
            categories: Their names; each needs at least two scored images.
            share: Which of all images these are.
            reduce: Sums a tensor over processes, with the sum as its result on each.
            twins: Of scored images in this share; without them, on any process, the weights stay as they are, and how
                much is found is not known.
            chosen: Which weights are chosen.
            mirrored: Copies of images in this share, some of each category, that serve the features' Gaussian too;
                every process gives some or none does.
            views: Through another camera, of scored images in this share; on all processes or on none.
            parts: Of each image of all shares, a number that photos of the same part have in common; by default each
                shows one of its own.

        Returns:
            Itself.

        Raises:
            ValueError: A category has fewer scored images or parts, or statistics are not finite.
        """
        # 1. Which images are scored, and their folds; they follow from the place, whatever the number of processes
        views, num_twins = views or Views([], [], 0), 0 if twins is None else len(twins.sources)
        num_extra = len(views.sources) + num_twins
        label_of, num_scored = torch.tensor(labels), int(reduce(torch.tensor(len(raw_maps) - num_extra)))
        check_counts([categories[label] for label in labels], num_scored, least=MIN_SCORED)
        place = torch.arange(len(labels)) - (len(labels) - num_scored)  # among the scored images; others are below 0
        fold_of, counts, parts = torch.full_like(label_of, -1), [], range(len(labels)) if parts is None else parts
        for label, category in enumerate(categories):
            of_label = (label_of == label).nonzero().flatten().tolist()
            held_out = [parts[i] for i in of_label if place[i] >= 0]
            fold_of_part = dict(zip(held_out, folds_of(held_out), strict=True))
            counts.append(max(fold_of_part.values(), default=-1) + 1)
            if counts[-1] < MIN_SCORED:
                raise ValueError(
                    f"Category {category!r}: the good images held out must show at least {MIN_SCORED} parts."
                )
            fold_of[of_label] = torch.tensor([fold_of_part.get(parts[i], -1) for i in of_label])
        self._resize(features, summaries, raw_maps, categories, num_scored)
        num_different = len({parts[i] for i in range(len(labels) - num_scored, len(labels))})
        self.register_to_config(found=None, num_different=num_different)  # not those of an earlier fit

        # 2. The Gaussian of whole images
        summaries = pick(summaries, self.config.num_summaries)
        shown = torch.arange(len(labels))[share]
        of_own = torch.stack([label_of, fold_of, place], dim=1)[shown]
        of_own = torch.cat([of_own, of_own[views.sources], of_own[twins.sources if twins else []]])
        numbers = torch.tensor(views.numbers, dtype=torch.long)
        sort = torch.arange(3).repeat_interleave(torch.tensor([len(shown), len(views.sources), num_twins]))
        is_good, is_view, is_twin = (sort == k for k in range(3))
        of_own[is_view, 2] = num_scored + numbers
        good_rows = torch.cat([shown, len(labels) + numbers])
        everyone = torch.zeros(len(labels) + views.total, summaries.shape[1], dtype=torch.float64)
        of_all = torch.zeros(len(everyone), 2, dtype=torch.long)
        everyone[good_rows], of_all[good_rows] = summaries[~is_twin].double(), of_own[~is_twin, :2]
        everyone, of_all = reduce(everyone), reduce(of_all)
        label_of, fold_of, place = of_own.unbind(1)
        gaussian, distance = fit_held_out_summaries(
            everyone, of_all[:, 0], of_all[:, 1], summaries.double(), label_of, fold_of
        )
        for buffer, value in zip(("global_mean", "global_std"), gaussian, strict=False):
            self.get_buffer(buffer).copy_(value)
        self.global_whitening.copy_(pack_triangle(gaussian[2]))

        # 3. Each category's Gaussians, and each map's deviation from good images, of this process's scored rows
        scored, size, block = place >= 0, self.config.map_size, self.config.gaussian_block
        rows = torch.cumsum(scored, 0) - 1  # of an image among them
        z = raw_maps.new_zeros(int(scored.sum()), self.location.shape[1], size, size, dtype=torch.float32)
        outlying = z.new_zeros(len(z))
        for label, count in enumerate(counts):
            mine, folds = (label_of == label).nonzero().flatten(), range(count)
            fold, good, view, held = fold_of[mine], is_good[mine], is_view[mine], scored[mine]
            num_views, grids = int((of_all[len(labels) :, 0] == label).sum()), []
            for kind, looks in (("residual", residuals), ("feature", features)):
                x = torch.cat([self.project(looks[chunk], kind) for chunk in mine.split(64)])
                more = [(x[view], fold[view], min(VIEW_IMAGES, num_views))]
                if kind == "feature" and mirrored is not None:
                    of = label_of[mirrored.sources] == label
                    copies = self.project(mirrored.features[of]), fold_of[mirrored.sources][of]
                    more.append((*copies, MIRRORED_IMAGES))
                (mean, whitening), grid = fit_held_out_gaussian(x, fold, good, folds, block, reduce, more)
                self.get_buffer(f"{kind}_mean")[label] = mean
                self.get_buffer(f"{kind}_whitening")[label] = pack_triangle(whitening)
                grids.append(grid)
            mean, std = Moments.of(x[good].mean((2, 3)), reduce).mean_and_std()
            self.category_mean[label], self.category_std[label] = mean, std.clamp_min(1e-3)
            # Logits mean the same everywhere, and so do distances under a covariance of a position or its neighbours
            own = rows[mine][held]
            raw = torch.cat([raw_maps[own].float(), *(to_grid(grid[held], size) for grid in grids)], dim=1)
            alike = {"discriminator"} if block > 2 else {"discriminator", "residual", "mahalanobis"}
            positioned = [name not in alike for name, span in self.channels.items() for _ in range(raw.shape[1])[span]]
            usual = (good | view)[held]
            *deviation, z[own] = fit_held_out_deviation(raw, fold[held], usual, folds, positioned, reduce)
            self.location[label], self.scale[label] = deviation
            # Unit deviation for each combined map, and for how odd an image is as a whole
            combined = self._combine(z[own[usual]], raw.new_ones(1, len(self.score_types)))
            deviating = torch.stack([combined[name].flatten() for name in self.score_types[1:]], dim=1)
            self.map_scale[label, 1:] = Moments.of(deviating, reduce).mean_and_std()[1]
            mean, std = Moments.of(distance[mine][held][usual].float(), reduce).mean_and_std()
            outlying[own] = ((distance[mine][held] - mean) / std.clamp_min(1e-3)).float()

        # 4. What to judge by
        row_label, row_good, row_fold = label_of[scored], is_good[scored], fold_of[scored]
        is_twin = is_twin[scored]
        if twins is not None:
            broken = reduce((~torch.stack([z.isfinite().all(), outlying.isfinite().all()])).long())
            if broken.any():
                raise ValueError("These good images give no finite statistics (maps): give other ones.")
            before, seen, after = (
                Look(self._combine(z[of], self.map_scale[row_label[of]]), outlying[of])
                for of in (
                    rows[torch.tensor(twins.sources, dtype=torch.long)],
                    is_view[scored].nonzero().flatten(),
                    is_twin.nonzero().flatten(),
                )
            )
            priors, is_trained = {name: self._asked[name] for name in chosen}, num_scored < len(labels)
            self.register_to_config(
                **choose_weights(
                    before,
                    after,
                    twins,
                    priors,
                    self._top_mean,
                    reduce,
                    (seen, views.numbers, views.total),
                    is_trained,
                )
            )

        # 5. Unit deviation of the fused map and of image scores
        names = self.score_types
        maps = z.new_zeros(len(names), num_scored + views.total, size, size)
        scores = z.new_zeros(len(names) + 1, num_scored + views.total)
        fused_scores = z.new_zeros(len(z))
        for label, count in enumerate(counts):
            mine = (row_label == label).nonzero().flatten()
            good = row_good[mine]
            self.map_scale[label, 0] = 1.0
            fused = self._combine(z[mine[good]], self.map_scale[[label]])[FUSED].flatten()  # in units of images alone
            self.map_scale[label, 0] = Moments.of(fused, reduce).mean_and_std()[1]
            combined = self._combine(z[mine], self.map_scale[[label]])
            whole = distance[scored][mine].float()
            image_scores = [*(self._image_score(combined, name, outlying[mine]) for name in names), whole]
            folds = range(count)
            usual, values = good | is_view[scored][mine], torch.stack(image_scores, dim=1)
            *units, held = fit_held_out_scores(values, row_fold[mine], usual, folds, reduce)
            self.score_location[label], self.score_scale[label] = units
            fused_scores[mine], places = held[:, 0], place[scored][mine][usual]
            maps[:, places] = torch.stack([combined[name][usual] for name in names])
            scores[:, places] = held[usual].T

        # 6. Scores, peaks and pixels of held-out good images and of views, whichever are the higher at a rate, pooled
        # over the categories whose units they share
        self.good_scores.copy_(higher(reduce(scores), num_scored))
        self.good_peaks.copy_(higher(reduce(maps.amax((2, 3))), num_scored))
        for column, of_type in enumerate(maps):
            pixels = [part.flatten().sort().values for part in reduce(of_type).split([num_scored, views.total])]
            of_rates = [np.round((1.0 - TAIL) * (len(part) - 1)).astype(int) for part in pixels if len(part)]
            found = [part[rank] for part, rank in zip(pixels, of_rates, strict=False)]
            self.pixel_quantiles[column] = torch.stack(found).amax(0)
        if twins is not None:
            p_value = p_values(fused_scores[is_twin], self.good_scores[0].double())
            self.register_to_config(found=count_found(p_value, twins, reduce))
        if dead := [name for name, buffer in self.named_buffers() if not buffer.isfinite().all()]:
            raise ValueError(f"These good images give no finite statistics ({', '.join(dead)}): give other ones.")
        return self

    def half(self: Any) -> Any:
        """To half precision, but for statistics that would overflow there, as those of images much alike do."""
        for name, buffer in self.named_buffers():
            if buffer.half().isfinite().all():
                setattr(self, name, buffer.half())
        return self

    def _resize(
        self: Any,
        features: torch.Tensor,
        summaries: torch.Tensor,
        raw_maps: torch.Tensor,
        categories: Sequence[str],
        num_scored: int,
    ) -> None:
        """Takes sizes from what it is to be fitted to, and those that nobody chose by the defaults."""
        config, asked, several = self.config, self._asked, len(categories) > 1
        if raw_maps.shape[1] != (num_maps := 3 * len(config.timesteps) + config.discriminator):
            raise ValueError(f"The raw maps must be {num_maps} of each image, got {raw_maps.shape[1]}.")
        if not any(config.weights.get(name) for name in self.score_types):
            raise ValueError(f"weights must name a score that has a map here, got {dict(config.weights)}.")
        size = asked["gaussian_size"] or features.shape[-1]
        block = max(1, size // (4 if several else 16))
        fits = size % block == size // 2 % block == 0
        self.register_to_config(
            categories=list(categories),
            feature_channels=features.shape[1],
            num_summaries=min(summaries.shape[1], MAX_SUMMARIES),
            gaussian_size=size,
            gaussian_channels=asked["gaussian_channels"] or min(192 if several else 140, features.shape[1]),
            gaussian_block=asked["gaussian_block"] or (block if fits else 1),
            map_size=raw_maps.shape[-1],
            num_scores=num_scored,
        )
        self._register_buffers()
        self.to(raw_maps.device)
        # A fixed random orthonormal basis: it keeps directions of small variance, which principal components lose
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(features.shape[1], features.shape[1], generator=generator))[0]
        self.projection.copy_(basis[:, : self.projection.shape[1]])


def higher(values: torch.Tensor, count: int) -> torch.Tensor:
    """Of values [M, N + V] of `count` = N images and V views, what both exceed no more often than a rank says: their
    sorted values [M, N], at each rank the higher ones."""
    images, views = (part.sort(dim=1).values for part in values.tensor_split([count], dim=1))
    if not views.shape[1]:
        return images
    return images.maximum(F.interpolate(views[None], count, mode="linear", align_corners=True)[0])
