"""What the pipeline accepts: one clear sentence for each bad argument."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .image_reader import ImageInput, PipelineImageInput
from .models.evidence import SCORE_TYPES
from .models.false_alarms import check_rate
from .models.normality import NormalityModel


def as_list(images: PipelineImageInput | None) -> list[ImageInput]:
    """One image, several or none as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]


def check_images(images: PipelineImageInput, batch_size: int) -> list[ImageInput]:
    """One image or several as a list; raises ValueError if there is none or nothing fits in a batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    found = [images] if images is None else as_list(images)  # None is a bad image, named as such
    if not found:
        raise ValueError("The list of images is empty: give at least one image.")
    return found


def batches(count: int, size: int) -> Iterator[slice]:
    """The positions of `count` items, `size` at a time."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def check_scoring(
    mode: str,
    score_type: str,
    normality: NormalityModel | None,
    false_alarm_rate: float,
    output_type: str,
    map_size: tuple[int, int] | None,
) -> None:
    """Raises ValueError unless images can be scored so, with these statistics of good images."""
    if mode not in ("calibrated", "paper"):
        raise ValueError(f"mode must be 'calibrated' or 'paper', got {mode!r}.")
    accepted: Sequence[str] = [name for name, score in SCORE_TYPES.items() if score.in_paper]
    if mode == "calibrated":
        if normality is None:
            raise ValueError("This pipeline has no normality model: call fit_normality(images) or use mode='paper'.")
        accepted = normality.score_types
    if score_type not in accepted:
        raise ValueError(f"score_type must be one of {', '.join(accepted)} in {mode} mode, got {score_type!r}.")
    check_rate(false_alarm_rate)
    if output_type not in ("np", "pt"):
        raise ValueError(f"output_type must be 'np' or 'pt', got {output_type!r}.")
    if map_size is not None and (len(map_size) != 2 or min(map_size) < 1):
        raise ValueError(f"map_size must be a height and a width of at least 1, got {map_size}.")


def check_noise(
    timesteps: Sequence[int] | None,
    draws: int | None,
    seed: int | None,
    fitted: Mapping[str, Any],
    calibrated: bool,
) -> tuple[list[int], int, int]:
    """Timesteps, number of draws and seed, by default as `fitted` says.

    Raises:
        ValueError: There are no timesteps or draws, or calibrated scores are wanted under others than the fitted ones.
    """
    fitted = {"seed": 0, **fitted, "timesteps": list(fitted["timesteps"])}
    given = {
        "timesteps": None if timesteps is None else list(timesteps),
        "num_noise_samples": draws,
        "seed": seed,
    }
    chosen: dict[str, Any] = {name: fitted[name] if value is None else value for name, value in given.items()}
    if not chosen["timesteps"]:
        raise ValueError("The list of timesteps is empty: give at least one.")
    if chosen["num_noise_samples"] < 1:
        raise ValueError(f"num_noise_samples must be at least 1, got {draws}.")
    for name, value in chosen.items():
        if calibrated and value != fitted[name]:
            raise ValueError(
                f"Calibrated scores are fitted to the {name} {fitted[name]}, got {value}: "
                f"call fit_normality(images, {name}=...) or use mode='paper'."
            )
    return chosen["timesteps"], chosen["num_noise_samples"], chosen["seed"]


def check_restoration(
    normality: NormalityModel | None,
    num_steps: int,
    step_size: float,
    denoise_every: int,
    anneal: float,
    pixel_rate: float,
) -> None:
    """Raises ValueError unless images can be moved towards good ones so."""
    if normality is None:
        raise ValueError("This pipeline has no normality model: call fit_normality(images) first.")
    if num_steps < 1 or denoise_every < 1 or not 0 < step_size < 1 or not 0 < anneal <= 1:
        raise ValueError(
            "num_steps and denoise_every must be at least 1 and step_size and anneal between 0 and 1, "
            f"got {num_steps}, {denoise_every}, {step_size} and {anneal}."
        )
    check_rate(pixel_rate, "pixel_rate")


def check_labels(
    class_labels: str | int | Sequence[str | int] | None, count: int, categories: Sequence[str]
) -> list[str | None]:
    """The category of each of `count` images by name, from names or numbers; None where it is to be found out.

    Raises:
        ValueError: There is no such category, or another number of them.
    """
    if class_labels is None:
        return [None] * count
    labels = [class_labels] * count if isinstance(class_labels, str | int) else list(class_labels)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} class_labels were given for {count} images.")
    names: list[str | None] = []
    for label in labels:
        if isinstance(label, int) and 0 <= label < len(categories):
            names.append(categories[label])
        elif isinstance(label, str) and label in categories:
            names.append(label)
        else:
            raise ValueError(f"There is no category {label!r}; this pipeline knows {', '.join(categories) or 'none'}.")
    return names


def check_categories(
    images: Sequence[ImageInput],
    holdout_images: Sequence[ImageInput],
    categories: Sequence[str] | None,
    holdout_categories: Sequence[str] | None,
) -> list[str]:
    """The category of each image and then of each held out; "object" where none are given.

    Raises:
        ValueError: There is another number of them than of images.
    """
    if not categories and not holdout_categories:
        return ["object"] * (len(images) + len(holdout_images))
    categories, holdout_categories = list(categories or []), list(holdout_categories or [])
    for kind, given, of in (("", categories, images), ("holdout_", holdout_categories, holdout_images)):
        if len(given) != len(of):
            raise ValueError(f"{len(given)} {kind}categories were given for {len(of)} {kind}images.")
    return categories + holdout_categories
