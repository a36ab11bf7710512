"""What a data set says of its images, read before any is scored: its masks, and what cannot be measured by them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from accelerate.state import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .data import AnomalyDataset
from .data.masks import INVERTED_SHARE
from .image_reader import ImageInput
from .metrics import IMAGE_METRICS, PIXEL_METRICS

GROUPS = {"image AUROC, AP and F1": IMAGE_METRICS[0], "pixel AUROC, AP, F1 and AUPRO": PIXEL_METRICS[0]}
MASKED, EMPTY, NONE = "masks", "empty masks", "no masks"  # what a defective image has


class Known(Protocol):
    """An image of which it is known whether it is good, and where not."""

    @property
    def label(self) -> int:
        """0 for good, 1 for anomalous."""

    @property
    def has_mask(self) -> bool:
        """False for a defective image without a mask, or with an empty one: it counts at image level only."""

    @property
    def has_good_pixels(self) -> bool:
        """Whether the mask leaves any."""


@dataclass(frozen=True)
class Truth:
    """What a data set says of one of its images: `pixels` is its mask, bool [S, S], None where none is known."""

    index: int
    category: str
    defect: str
    pixels: np.ndarray | None

    @property
    def label(self) -> int:
        """0 for good, 1 for anomalous."""
        return int(self.defect != "good")

    @property
    def has_mask(self) -> bool:
        return self.pixels is not None

    @property
    def has_good_pixels(self) -> bool:
        return self.pixels is not None and not self.pixels.all()

    def mask(self) -> np.ndarray | None:
        return self.pixels


def read_truths(dataset: AnomalyDataset, indices: Iterable[int], size: int) -> list[Truth]:
    """Of these images, with masks at a square."""
    samples = {i: dataset.samples[i] for i in indices}
    return [Truth(i, s.category, s.defect, dataset.mask(i, (size, size))) for i, s in samples.items()]


@dataclass(frozen=True)
class Seen:
    """What reading an image's mask gave.

    Attributes:
        state: Of a defective image one of `MASKED`, `EMPTY` and `NONE`; None for a good one.
        share: Of the pixels that are defect.
        rules: As in `Mask`.
    """

    index: int
    category: str
    label: int
    state: str | None = None
    share: float = 0.0
    rules: tuple[str, ...] = ()

    @property
    def has_mask(self) -> bool:
        return self.state in (None, MASKED)

    @property
    def has_good_pixels(self) -> bool:
        return self.has_mask and self.share < 1


@dataclass(frozen=True)
class Survey:
    """What a test set can be measured by; surveys of several can be added.

    Attributes:
        seen: Its images, all that can be read.
        errors: Why others cannot.
    """

    seen: tuple[Seen, ...] = ()
    errors: tuple[str, ...] = ()

    def __add__(self, other: "Survey") -> "Survey":
        return Survey(self.seen + other.seen, self.errors + other.errors)

    @property
    def categories(self) -> list[str]:
        return sorted({one.category for one in self.seen})

    def counts(self) -> dict[str, dict[str, int]]:
        """For each category how many images are `good` and `defective`, and how many of these have `masks`,
        `empty masks` and `no masks`."""
        found = {}
        for category in self.categories:
            own = [one for one in self.seen if one.category == category]
            states = Counter(one.state for one in own)
            bad = sum(one.label for one in own)
            found[category] = {"good": len(own) - bad, "defective": bad} | {
                state: states[state] for state in (MASKED, EMPTY, NONE)
            }
        return found

    def undefined(self) -> dict[str, dict[str, str]]:
        """For each category that has any, the metrics that it does not define, and why."""
        found = {c: undefined([one for one in self.seen if one.category == c]) for c in self.categories}
        return {category: reasons for category, reasons in found.items() if reasons}

    def notes(self) -> list[str]:
        """Sentences on how masks were read, and which are doubtful."""
        rules = Counter(rule for one in self.seen for rule in one.rules)
        notes = [f"{_count(count, 'mask')} read by the rule: {rule}." for rule, count in sorted(rules.items())]
        large = [one for one in self.seen if one.share > INVERTED_SHARE]
        if large:
            notes.append(
                f"{_count(len(large), 'mask')} cover more than half of their images, as inverted ones do: they were "
                "taken as they are, bright for defect."
            )
        return notes

    def sentences(self) -> list[str]:
        """All that is to be told: the masks, the notes, and what is not defined."""
        counts, totals, told = self.counts(), Counter(), []
        for own in counts.values():
            totals.update(own)
        if totals["defective"]:
            told.append(f"{_masks_used(totals)}.")
        lacking = [c for c, own in counts.items() if own[EMPTY] or own[NONE]]
        if len(counts) > 1:
            told += [f"{category}: {_masks_used(counts[category])}." for category in lacking]
        return told + self.notes() + undefined_sentences(self.undefined())

    def all_sentences(self) -> list[str]:
        """These, and why images or masks cannot be read."""
        return [*(f"Not measured: {error}" for error in self.errors), *self.sentences()]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"counts": self.counts(), "notes": self.notes(), "undefined": self.undefined()}

    def check(self, decides: bool = False, skip_errors: bool = False) -> None:
        """Raises ValueError unless all images could be read and some metric is defined.

        Args:
            decides: Decisions are counted too, which need no image of both kinds.
            skip_errors: Some that can be read are enough.
        """
        if self.errors and not (skip_errors and self.seen):
            first, *others = self.errors
            raise ValueError(first + (f" So it is with {len(others)} others." if others else ""))
        reasons = self.undefined()
        if not decides and all(
            set(IMAGE_METRICS + PIXEL_METRICS) <= reasons.get(c, {}).keys() for c in self.categories
        ):
            raise ValueError(f"Nothing can be measured on these images. {' '.join(undefined_sentences(reasons))}")


def survey(
    dataset: AnomalyDataset, indices: Iterable[int], check_image: Callable[[ImageInput], Any] | None = None
) -> Survey:
    """Reads the masks of images, shared among the processes; all get all of it.

    Args:
        check_image: Called with each image; its ValueError or OSError says why that one cannot be judged.
    """

    def see(index: int) -> Seen | str:
        """Or why it cannot be read."""
        sample, mask = dataset.samples[index], None
        try:
            if check_image:
                check_image(dataset[index].image)
            if sample.label:
                mask = dataset.read_mask(index)
        except (ValueError, OSError) as error:
            return str(error)
        if mask is None:
            return Seen(index, sample.category, sample.label, NONE if sample.label else None)
        share = float(mask.pixels.mean())
        return Seen(index, sample.category, 1, MASKED if share else EMPTY, share, mask.rules if share else ())

    found = share_work(list(indices), see, "Reading masks")
    return Survey(
        tuple(one for one in found if isinstance(one, Seen)), tuple(one for one in found if isinstance(one, str))
    )


def undefined(truths: Sequence[Known]) -> dict[str, str]:
    """The metrics that these images do not define, and why."""
    reasons, labels = {}, {truth.label for truth in truths}
    lacking = [name for label, name in ((0, "no good image"), (1, "no defective image")) if label not in labels]
    if lacking:
        reasons |= dict.fromkeys(IMAGE_METRICS, lacking[0])
    masked = [truth for truth in truths if truth.has_mask]
    if 1 not in labels:
        reasons |= dict.fromkeys(PIXEL_METRICS, "no defective image")
    elif not any(truth.label for truth in masked):
        reasons |= dict.fromkeys(PIXEL_METRICS, "no defective image with a mask")
    elif not any(truth.has_good_pixels for truth in masked):
        reasons |= dict.fromkeys(PIXEL_METRICS, "no pixel that is good")
    return reasons


def undefined_sentences(reasons: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One for each category and reason, of what `undefined` gave for each category."""
    told = []
    for category, own in reasons.items():
        for reason in dict.fromkeys(own.values()):
            kinds = [kind for kind, name in GROUPS.items() if own.get(name) == reason]
            told.append(f"{category}: {', '.join(kinds)} not defined: {reason}.")
    return told


def share_work(jobs: Sequence, work: Callable[[Any], Any], description: str) -> list:
    """`work(job)` of each job, in order; each process does its part, all get all of it."""
    state = PartialState()
    own = list(enumerate(jobs))[state.process_index :: state.num_processes]
    progress = tqdm(own, description, disable=not state.is_local_main_process)
    return [found for _, found in sorted(gather_object([(i, work(job)) for i, job in progress]), key=lambda x: x[0])]


def _masks_used(counts: Mapping[str, int]) -> str:
    """How many defective images have a mask that is used, and what the others have."""
    return (
        f"{counts[MASKED]} of {counts['defective']} defective images have a mask that is used"
        + (f", {counts[EMPTY]} an empty one" if counts[EMPTY] else "")
        + (f", {counts[NONE]} none" if counts[NONE] else "")
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
