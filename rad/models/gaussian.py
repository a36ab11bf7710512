"""Gaussians of good images: moments that add up over processes, covariances, Mahalanobis distances, and all of them
held out fold by fold, so that no image is judged by a fit that saw it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg.lapack import dtrtri
from sklearn.covariance import ledoit_wolf
from threadpoolctl import threadpool_limits

FEW_SCORED = 100  # good images of a category: of fewer each is held out by itself or with few others
MIN_SCORED = 2  # what a deviation needs
MIN_GOOD = 5  # of fewer each is judged by so few others that nothing bad stands out
PRIOR_IMAGES = 10  # weight of statistics over all positions in those of one position
MIRRORED_IMAGES = 20  # weight of all mirrored copies in the features' Gaussian: of few images they tell much
VIEW_IMAGES = 20  # weight of all views through another camera, or as much as there are
MAX_SUMMARIES = 2048  # numbers of whole images; their covariance has as many squared
Reduce = Callable[[torch.Tensor], torch.Tensor]  # sums a tensor over processes


@dataclass(frozen=True)
class Moments:
    """Sums over images, float64: they add up over processes, and subtracting those of a fold leaves it out."""

    count: torch.Tensor
    first: torch.Tensor  # sum
    second: torch.Tensor  # sum of squares, or of outer products

    @classmethod
    def of(cls, x: torch.Tensor, reduce: Reduce, block: int = 0) -> "Moments":
        """Of x [N, ...] on all processes: first and second [...]; with a block of features [N, P, g, g] the second is
        the sum of their outer products in each block x block positions, [(g / block) ** 2, P, P]."""
        first = second = x.new_zeros((), dtype=torch.float64)
        for chunk in x.split(max(1, 2**24 // x.shape[1:].numel())):  # 128 MB of float64 at a time
            chunk = chunk.double()
            first = first + chunk.sum(0)
            if block:
                chunk = split_blocks(chunk, x.shape[-1] // block)
                second = second + chunk @ chunk.mT
            else:
                second = second + chunk.square().sum(0)
        return cls(*(reduce(part) for part in (first.new_tensor(len(x)), first, second)))

    def less(self, other: "Moments") -> "Moments":
        """Of the images that are not among the others."""
        return Moments(self.count - other.count, self.first - other.first, self.second - other.second)

    def plus(self, other: "Moments", weight: float) -> "Moments":
        """With the others', which count as much as `weight` images, if there are any."""
        if not other.count:
            return self
        scale = weight / other.count
        return Moments(self.count + weight, self.first + scale * other.first, self.second + scale * other.second)

    def mean_and_std(self, prior: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A prior deviation counts as much as `PRIOR_IMAGES` images."""
        mean, weight = self.first / self.count, 0 if prior is None else PRIOR_IMAGES
        squares = (self.second - self.count * mean.square()).clamp_min(0)
        variance = (squares + (0 if prior is None else weight * prior.square())) / (self.count - 1 + weight)
        return mean, variance.sqrt()


def fit_gaussian(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [P, g, g] and whitening matrices [blocks, P, P] of features with these moments.

    RAN adds 0.01 I to each covariance. Each is also drawn towards the mean of all, which counts as much as
    `PRIOR_IMAGES` images.
    """
    count, mean, second = moments.count, moments.first / moments.count, moments.second
    means = split_blocks(mean[None], int(round(len(second) ** 0.5)))
    covariance = (second / count - means @ means.mT) / means.shape[-1]
    covariance = covariance.lerp(covariance.mean(0), PRIOR_IMAGES / (count + PRIOR_IMAGES))
    covariance.diagonal(dim1=1, dim2=2).add_(0.01)
    whitening = torch.from_numpy(inverse_cholesky(covariance.cpu().numpy()))
    return mean.float(), whitening.float().to(mean.device)


def fit_summaries(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and deviation [K, D] of each category's summaries x [N, D], float64, and one whitening matrix [D, D].

    There are more numbers in a summary than good images, so the covariance is drawn towards a multiple of the identity
    by Ledoit and Wolf's share (J. Multivariate Analysis 2004).
    """
    categories = range(int(labels.max()) + 1)
    mean = torch.stack([x[labels == k].mean(0) for k in categories])
    std = torch.stack([x[labels == k].std(0, correction=0) for k in categories]).clamp_min(1e-3)
    covariance, _ = ledoit_wolf(((x - mean[labels]) / std[labels]).numpy(), assume_centered=True)
    return mean, std, torch.from_numpy(inverse_cholesky(covariance + 0.01 * np.eye(len(covariance))))


def fit_deviation(moments: Moments, positioned: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
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


def num_folds(count: int) -> int:
    """In how many folds so many scored images of a category are held out: statistics without a large part of few
    images would judge it more harshly than those of all judge other images."""
    return min(count, 20) if count < FEW_SCORED else 5


def folds_of(parts: Sequence[int]) -> list[int]:
    """The fold of each of a category's scored images, of which photos of one part, a number, share theirs."""
    order = {part: place for place, part in enumerate(dict.fromkeys(parts))}
    return [order[part] % num_folds(len(order)) for part in parts]


def check_counts(categories: Sequence[str], num_scored: int, least: int = MIN_SCORED) -> None:
    """Raises ValueError unless there are enough good images to fit to.

    Args:
        categories: Of each image; the last `num_scored` of them are scored.
        least: Images that each category needs.
    """
    scored = Counter(categories[len(categories) - num_scored :])
    for category, count in sorted(Counter(categories).items()):
        if count < least:
            raise ValueError(f"Category {category!r} has {count} good images; it needs at least {least}.")
        if scored[category] < MIN_SCORED:
            held = f"{scored[category]} good images held out"
            raise ValueError(f"Category {category!r} has {held}; it needs at least {MIN_SCORED}.")


# -- held out -----------------------------------------------------------------------------------------------------
# `fold` [N] is that of each image in this process, -1 for those that only serve the fit; `folds` are all there are, in
# every process the same. Images that are not good are judged by what never saw their fold, and serve no fit.


def fit_held_out_gaussian(
    x: torch.Tensor,
    fold: torch.Tensor,
    good: torch.Tensor,
    folds: range,
    block: int,
    reduce: Reduce,
    more: Sequence[tuple[torch.Tensor, torch.Tensor, float]] = (),
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The Gaussian of features [N, P, g, g], as from `fit_gaussian`, and held-out distances [N, g, g]. More looks at
    good images, [M, P, g, g] with the fold of each, count as much as the number of images that is given with them."""

    def of_folds_but(k: int | None) -> Moments:
        parts = [
            total if k is None else total.less(Moments.of(of[folds_of == k], reduce, block))
            for total, (of, folds_of, _) in zip(totals, looks, strict=True)
        ]
        rest = parts[0]
        for part, (_, _, weight) in zip(parts[1:], looks[1:], strict=True):
            rest = rest.plus(part, weight)
        return rest

    looks = [(x[good], fold[good], 0.0), *more]
    totals, distances = [Moments.of(of, reduce, block) for of, _, _ in looks], x.new_empty(len(x), *x.shape[-2:])
    for k in folds:
        mean, whitening = fit_gaussian(of_folds_but(k))
        distances[fold == k] = mahalanobis(x[fold == k] - mean, whitening)
    return fit_gaussian(of_folds_but(None)), distances


def fit_held_out_summaries(
    x: torch.Tensor,
    labels: torch.Tensor,
    fold: torch.Tensor,
    judged: torch.Tensor,
    judged_labels: torch.Tensor,
    judged_fold: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """What `fit_summaries` gives of all processes' good images' summaries x [N, D], and held-out distances [n] of
    those that this one judges [n, D], 0 for images of no fold; all float64."""
    distances = judged.new_zeros(len(judged))
    for k in range(int(fold.max()) + 1):
        mean, std, whitening = fit_summaries(x[fold != k], labels[fold != k])
        held_out = judged_fold == k
        z = (judged[held_out] - mean[judged_labels[held_out]]) / std[judged_labels[held_out]]
        distances[held_out] = (z @ whitening.T).norm(dim=1)
    return fit_summaries(x, labels), distances


def fit_held_out_deviation(
    x: torch.Tensor, fold: torch.Tensor, good: torch.Tensor, folds: range, positioned: list[bool], reduce: Reduce
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Location and deviation of maps [N, M, h, w], as from `fit_deviation`, and the maps in units of those without
    their fold, [N, M, h, w]."""
    moments, z = Moments.of(x[good], reduce), torch.empty_like(x)
    for k in folds:
        location, scale = fit_deviation(moments.less(Moments.of(x[good & (fold == k)], reduce)), positioned)
        z[fold == k] = (x[fold == k] - location) / scale
    return *fit_deviation(moments, positioned), z


def fit_held_out_scores(
    x: torch.Tensor, fold: torch.Tensor, good: torch.Tensor, folds: range, reduce: Reduce
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and deviation of scores [N, M], each [M], and the scores in units of those without their fold, [N, M]."""
    moments, z = Moments.of(x[good], reduce), torch.empty_like(x, dtype=torch.float32)
    mean, std = moments.mean_and_std()
    for k in folds:
        rest = moments.less(Moments.of(x[good & (fold == k)], reduce))
        location, scale = rest.mean_and_std(prior=std)
        z[fold == k] = ((x[fold == k] - location) / scale.clamp_min(1e-3)).float()
    return mean, std.clamp_min(1e-3), z


def pick(summaries: torch.Tensor, count: int) -> torch.Tensor:
    """Evenly picked columns of summaries [N, D], [N, count]; raises ValueError if there are fewer."""
    if summaries.shape[1] < count:
        raise ValueError(f"The summaries must be {count} numbers of each image or more, got {summaries.shape[1]}.")
    return summaries[:, torch.arange(count) * summaries.shape[1] // count]


# -- matrices -----------------------------------------------------------------------------------------------------


def mahalanobis(deviations: torch.Tensor, whitening: torch.Tensor) -> torch.Tensor:
    """Norms [N, g, g] of whitened deviations [N, P, g, g] from the mean, under blocks of matrices [b * b, P, P]."""
    number, size = len(deviations), deviations.shape[-1]
    blocks = int(round(len(whitening) ** 0.5))
    side = size // blocks
    squares = (whitening @ split_blocks(deviations, blocks)).square().sum(1).view(blocks, blocks, number, side, side)
    return squares.permute(2, 0, 3, 1, 4).reshape(number, size, size).clamp_min(1e-12).sqrt()


def inverse_cholesky(covariance: np.ndarray) -> np.ndarray:
    """Matrices W [..., n, n] for which W^T W is the inverse of each covariance [..., n, n]."""
    # OpenBLAS's threads wait for each other over small matrices: several can be 50 times as slow as one
    with threadpool_limits(1, "blas"):
        roots = np.linalg.cholesky(covariance)
        for index in np.ndindex(roots.shape[:-2]):
            roots[index] = dtrtri(roots[index], lower=True)[0]
    return roots


def split_blocks(x: torch.Tensor, count: int) -> torch.Tensor:
    """Vectors of x [N, P, g, g] in each of count x count blocks of positions, [count ** 2, P, N (g / count) ** 2]."""
    x = x.unflatten(3, (count, -1)).unflatten(2, (count, -1))
    return x.permute(2, 4, 1, 0, 3, 5).flatten(3).flatten(0, 1)


def pack_triangle(matrices: torch.Tensor) -> torch.Tensor:
    """Lower triangles of matrices [..., side, side], their rows one after another, [..., side (side + 1) / 2]."""
    rows, columns = torch.tril_indices(*matrices.shape[-2:])
    return matrices[..., rows, columns]


def unpack_triangle(packed: torch.Tensor, side: int) -> torch.Tensor:
    """Lower triangular matrices [n, side, side] from what `pack_triangle` gives, [n, side (side + 1) / 2]."""
    matrix = packed.new_zeros(len(packed), side, side)
    rows, columns = torch.tril_indices(side, side)
    matrix[:, rows, columns] = packed
    return matrix
