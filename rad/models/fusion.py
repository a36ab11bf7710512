"""What a product is judged by: weights of scores, chosen on its own good images with defects put on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..metrics import image_auroc, pixel_metrics
from .evidence import GLOBAL, weighted_sum
from .gaussian import Reduce

KINDS = ("drawn", "pasted")  # of defects, in turns
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # weights that are tried
NUM_ROUNDS = 3  # through all scores
MIN_TWINS = 8  # fewer say too little: the prior stays
PRIOR_WEIGHT = 1.3  # of the squared distance from the prior's direction, divided by the number of twins
COST = 1e-3  # of a score: one that gains less is left out
FAR = 3.0  # good images' deviations from which on a defect is found anyway
COVERED = 0.25  # share of a position that is defective: from here on the position is


@dataclass(frozen=True)
class Twins:
    """What is known of M good images with defects: those of one process.

    Attributes:
        features, residuals, summaries, raw_maps: As `NormalityModel.fit` takes them of good images, [M, ...].
        masks: Shares of the maps' positions that are defective, [M, h, w] in [0, 1].
        sources: Of each, its good image's place in this process's share.
        numbers: Of each, among all processes' twins: each good image has one of each of `KINDS` in a row.
        total: Of all processes' twins.
    """

    features: torch.Tensor
    residuals: torch.Tensor
    summaries: torch.Tensor
    raw_maps: torch.Tensor
    masks: torch.Tensor
    sources: list[int]
    numbers: list[int]
    total: int


@dataclass(frozen=True)
class Look:
    """How odd images are.

    Attributes:
        maps: Of each score, [N, h, w] in units of good images' deviation.
        outlying: Of each image as a whole, [N], likewise.
    """

    maps: Mapping[str, torch.Tensor]
    outlying: torch.Tensor

    def gather(self, numbers: list[int], total: int, reduce: Reduce) -> "Look":
        """All processes' images, of which these have the given numbers."""
        maps = {name: _gather(values, numbers, total, reduce) for name, values in self.maps.items()}
        return Look(maps, _gather(self.outlying, numbers, total, reduce))

    def pick(self, of: torch.Tensor) -> "Look":
        """Some of the images."""
        return Look({name: values[of] for name, values in self.maps.items()}, self.outlying[of])


def choose_weights(
    good: Look,
    bad: Look,
    twins: Twins,
    priors: Mapping[str, Mapping[str, float]],
    top_mean: Callable[[torch.Tensor], torch.Tensor],
    reduce: Reduce,
) -> dict[str, dict[str, float]]:
    """Weights by which a product's own good images are best told from the same images with defects.

    Weights of the map are those of the highest AUPRO and pixel AP, weights of the image score those of the highest
    image AUROC and, once all are told apart, of the largest distance; means over drawn and pasted defects. A prior
    counts the more the fewer twins there are, and a score that gains nothing is left out.

    Args:
        good: The images that got defects, one for each twin of this process.
        bad: The twins, likewise.
        twins: What else is known of them.
        priors: "weights" and "image_weights", as far as they are to be chosen: where the search starts.
        top_mean: What the image score takes of a map, [N, h, w] to [N].
        reduce: Sums a tensor over processes.

    Returns:
        Weights in the place of the priors; the priors where there are fewer than `MIN_TWINS` twins.
    """
    # 1. All processes choose alike
    masks = _gather(twins.masks, twins.numbers, twins.total, reduce)
    bad = bad.gather(twins.numbers, twins.total, reduce)
    good = good.gather([number // len(KINDS) for number in twins.numbers], twins.total // len(KINDS), reduce)
    seen = masks.flatten(1).any(1)
    kinds = [(seen & (torch.arange(len(masks)) % len(KINDS) == k)).nonzero().flatten() for k in range(len(KINDS))]
    kinds = [kind for kind in kinds if len(kind)]
    if int(seen.sum()) < MIN_TWINS:
        return {name: dict(prior) for name, prior in priors.items()}
    least = masks.flatten(1).amax(1).view(-1, 1, 1) / 2  # a thin scratch covers no position
    defective = masks > least.clamp_max(COVERED)
    clean = np.zeros(good.outlying.shape + masks.shape[1:], bool)
    pairs = [(bad.pick(kind), np.concatenate([defective[kind].numpy(), clean])) for kind in kinds]

    # 2. How well weights do, less what they cost
    def of_map(weights: Mapping[str, float]) -> float:
        fused, gains = weighted_sum(good.maps, weights), []
        for look, truth in pairs:
            maps = torch.cat([weighted_sum(look.maps, weights), fused]).numpy()
            metrics = pixel_metrics(maps, truth, (0.3,))
            gains.append(metrics["aupro"] + metrics["pixel_ap"])
        return float(np.mean(gains))

    def of_image(weights: Mapping[str, float]) -> float:
        def score(look: Look) -> torch.Tensor:
            return top_mean(weighted_sum(look.maps, weights)) + weights.get(GLOBAL, 0.0) * look.outlying

        of_good, gains = score(good), []
        for look, _ in pairs:
            of_bad = score(look)
            labels = np.repeat([1, 0], [len(of_bad), len(of_good)])
            distance = (of_bad - of_good.mean()) / of_good.std().clamp_min(1e-6)
            auroc = image_auroc(torch.cat([of_bad, of_good]).numpy(), labels)
            gains.append(auroc + 0.5 * float((distance / FAR).clamp(0, 1).mean()))
        return float(np.mean(gains))

    # 3. Climb from the prior
    pull, chosen = PRIOR_WEIGHT / int(seen.sum()), {}
    for argument, prior in priors.items():
        names = [name for name in (*good.maps, GLOBAL) if name in prior]
        start = np.array([prior[name] for name in names], float)
        best = climb(of_map if argument == "weights" else of_image, names, start, pull)
        chosen[argument] = {**dict.fromkeys(prior, 0.0), **dict(zip(names, best.tolist(), strict=True))}
    return chosen


def climb(
    objective: Callable[[dict[str, float]], float], names: Sequence[str], start: np.ndarray, pull: float
) -> np.ndarray:
    """Weights [K] that no change of one to one of `STEPS` betters, from a start, towards which they are pulled.

    Args:
        objective: What weights by name are worth.
        names: Of the scores.
        start: Weights, [K].
        pull: Of the squared distance between directions.
    """

    def value(weights: np.ndarray) -> float:
        away = weights / np.linalg.norm(weights) - start / np.linalg.norm(start)
        worth = objective(dict(zip(names, weights.tolist(), strict=True)))
        return worth - pull * float(np.square(away).sum()) - COST * np.count_nonzero(weights)

    best, highest = start, value(start)
    for _ in range(NUM_ROUNDS):
        before = best
        for i in range(len(start)):
            for step in STEPS:
                tried = best.copy()
                tried[i] = step
                if step != best[i] and tried.any() and (found := value(tried)) > highest:
                    best, highest = tried, found
        if before is best:
            break
    return best


def _gather(values: torch.Tensor, numbers: list[int], total: int, reduce: Reduce) -> torch.Tensor:
    """Rows of all processes, of which this one has those with the given numbers."""
    everyone = values.new_zeros(total, *values.shape[1:])
    everyone[numbers] = values
    return reduce(everyone)
