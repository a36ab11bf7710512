"""What a product is judged by: weights of scores, chosen on its own good images with defects put on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .evidence import GLOBAL, SCORE_TYPES, weighted_sum
from .gaussian import Reduce

# Of defects, in turns, and how much each counts: pasted ones are of any size, but some hardly differ from the product
KINDS = {"drawn": 1.5, "pasted": 1.0}
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # weights that are tried
NUM_ROUNDS = 3  # through all scores
MIN_TWINS = 8  # fewer say too little: the prior stays
# Of the squared distance from the prior's direction, divided by the number of good images that got defects. What an
# image score gains is noisier than what a map does
PULL = {"weights": 0.25, "image_weights": 0.65}
STRANGE = 4.0  # times as much for the map's, where denoiser and discriminator were trained on other products
COST = 1e-3  # of a score: one that gains less is left out
FAR = 3.0  # good images' deviations from which on a defect is found anyway
RATES = np.geomspace(5e-4, 0.3, 30)  # of good positions called defective, at which defects are to be found
TOLD_RATES = (0.01, 0.05, 0.1)  # false-alarm rates at which it is told how many defects are found
COVERED = 0.25  # share of a position that is defective: from here on the position is


@dataclass(frozen=True)
class Twins:
    """Good images with defects, M in this process: what they are twins of.

    Attributes:
        masks: Shares of the maps' positions that are defective, [M, h, w] in [0, 1].
        sources: Of each, the place in this process's share of the scored good image that it was.
        numbers: Of each, among all processes' twins: each good image has one of each of `KINDS` in a row.
        total: Of all processes' twins.
    """

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

    def plus(self, other: "Look") -> "Look":
        """These images and the others."""
        maps = {name: torch.cat([values, other.maps[name]]) for name, values in self.maps.items()}
        return Look(maps, torch.cat([self.outlying, other.outlying]))

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
    views: tuple[Look, list[int], int] | None = None,
    is_trained: bool = True,
) -> dict[str, dict[str, float]]:
    """Weights by which a product's own good images are best told from the same images with defects.

    Weights of the map are those that find the largest share of each defect, on average over false-positive rates that
    are evenly spread in their logarithm: precise maps and whole defects count alike, and so do large and small ones.
    Weights of the image score are those of the highest image AUROC plus half the distance from good images, up to
    three of their deviations, which goes on counting once all are told apart. Kinds of defects count by `KINDS`. A
    prior counts the more the fewer good images there are, and a score that gains nothing is left out. The map's
    context, which no default has, is left out of account.

    Args:
        good: The images that got defects, one for each twin of this process.
        bad: The twins, likewise.
        twins: What else is known of them.
        priors: "weights" and "image_weights", as far as they are to be chosen: where the search starts.
        top_mean: What the image score takes of a map, [N, h, w] to [N].
        reduce: Sums a tensor over processes.
        views: Good images through another camera, which are to be told from defects as well: those of this process,
            their numbers among all processes', and how many those are.
        is_trained: Whether the networks were trained on this product. Those that were not find defects put on images,
            which they know, better than others: of the map's weights the prior counts more.

    Returns:
        Weights in the place of the priors; the priors where there are fewer than `MIN_TWINS` twins.
    """
    if not priors:
        return {}
    # 1. All processes choose alike
    masks = _gather(twins.masks, twins.numbers, twins.total, reduce)
    bad = bad.gather(twins.numbers, twins.total, reduce)
    good = good.gather([number // len(KINDS) for number in twins.numbers], twins.total // len(KINDS), reduce)
    seen = masks.flatten(1).any(1)
    kinds = [of.nonzero().flatten() for of in kinds_of(seen)]
    shares = [share for kind, share in zip(kinds, KINDS.values(), strict=True) if len(kind)]
    if int(seen.sum()) < MIN_TWINS:
        return {name: dict(prior) for name, prior in priors.items()}
    least = masks.flatten(1).amax(1).view(-1, 1, 1) / 2  # a thin scratch covers no position
    defective = masks > least.clamp_max(COVERED)
    pairs = [(bad.pick(kind), defective[kind].flatten(1).numpy()) for kind in kinds if len(kind)]

    num_good = len(good.outlying)
    if views is not None:
        good = good.plus(views[0].gather(*views[1:], reduce))

    # 2. How well weights do; what spills over a defect's edge counts as false
    def of_map(weights: Mapping[str, float]) -> float:
        clean, found = weighted_sum(good.maps, weights).flatten().numpy(), []
        for look, truth in pairs:
            maps = weighted_sum(look.maps, weights).flatten(1).numpy()
            outside = np.concatenate([clean, maps[~truth]])
            places = ((1 - RATES) * (len(outside) - 1)).astype(int)
            thresholds = np.partition(outside, places)[places]
            inside = [np.sort(values[mask]) for values, mask in zip(maps, truth, strict=True)]
            missed = [np.searchsorted(values, thresholds, side="right") / len(values) for values in inside]
            found.append(1 - np.mean(missed))
        return float(np.average(found, weights=shares))

    def of_image(weights: Mapping[str, float]) -> float:
        def score(look: Look) -> torch.Tensor:
            return top_mean(weighted_sum(look.maps, weights)) + weights.get(GLOBAL, 0.0) * look.outlying

        of_good, gains = score(good), []
        for look, _ in pairs:
            of_bad = score(look)
            distance = (of_bad - of_good.mean()) / of_good.std().clamp_min(1e-6)
            auroc = (torch.sign(of_bad[:, None] - of_good).mean() + 1) / 2  # thousands of times: not by scikit-learn
            gains.append(float(auroc) + 0.5 * float((distance / FAR).clamp(0, 1).mean()))
        return float(np.average(gains, weights=shares))

    # 3. Climb from the prior
    chosen = {}
    for argument, prior in priors.items():
        names = [name for name in (*good.maps, GLOBAL) if name in prior]
        start = np.array([prior[name] for name in names], float)
        pull = PULL[argument] / num_good * (STRANGE if argument == "weights" and not is_trained else 1.0)
        best = climb(of_map if argument == "weights" else of_image, names, start, pull)
        chosen[argument] = {**dict.fromkeys(prior, 0.0), **dict(zip(names, best.tolist(), strict=True))}
    return chosen


def kinds_of(seen: torch.Tensor) -> list[torch.Tensor]:
    """Which of all twins are of each kind, of those whose defect is seen, bool [M] each."""
    turns = torch.arange(len(seen)) % len(KINDS)
    return [seen & (turns == number) for number in range(len(KINDS))]


def count_found(p_values: torch.Tensor, twins: Twins, reduce: Reduce) -> dict[str, dict[str, int]]:
    """Of each kind of defect, how many there are ("of"), and how many are found at each of `TOLD_RATES` ("0.01"), from
    the p-values of this process's twins."""
    seen = _gather(twins.masks.flatten(1).any(1).long(), twins.numbers, twins.total, reduce) > 0
    p_values = _gather(p_values, twins.numbers, twins.total, reduce)
    return {
        kind: {"of": int(of.sum()), **{f"{rate:g}": int((p_values[of] <= rate).sum()) for rate in TOLD_RATES}}
        for kind, of in zip(KINDS, kinds_of(seen), strict=True)
    }


def judged_by(config: Mapping[str, Any]) -> list[str]:
    """Sentences on what a normality model of this configuration judges by, and what it finds."""
    titles = {name: score_type.title for name, score_type in SCORE_TYPES.items()}
    sentences = []
    for part, weights in (("map", config["weights"]), ("image score", config["image_weights"])):
        used = {name: weight for name, weight in weights.items() if weight}
        if not config["discriminator"]:
            used.pop("discriminator", None)
        named = ", ".join(f"{titles[name]} {used[name]:g}" for name in sorted(used, key=lambda name: -used[name]))
        sentences.append(f"Weights in the {part}: {named}.")
    if not config["found"]:
        return sentences
    num_different = config["num_different"] or config["num_scores"]
    rates = [f"{rate:g}" for rate in TOLD_RATES if rate >= 1 / (num_different + 1)] or [f"{TOLD_RATES[-1]:g}"]
    kinds = [
        f"{counts[rates[0]]} of {counts['of']} {kind}" for kind, counts in config["found"].items() if counts["of"]
    ]
    at = f"at a false-alarm rate of {float(rates[0]):.0%}"
    return [*sentences, f"Of defects put on its own good images it finds {' and '.join(kinds)} ones {at}."]


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
