"""What the pipeline accepts, of Python, NumPy and torch alike: one clear sentence for each bad argument."""

import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .image_reader import MAX_SIDE, ImageInput, PipelineImageInput
from .models.evidence import SCORE_TYPES
from .models.false_alarms import DEFAULT_RATES, check_rate
from .models.normality import NormalityModel

RESTORATION_STEPS = {"denoising": 20, "gradient": 150}  # by method, unless they are given

# -- images and numbers -----------------------------------------------------------------------------------------------


def as_list(images: PipelineImageInput | None) -> list[ImageInput]:
    """One image, several or none as a list.

    Args:
        images: What `image_reader.read` takes; or several of them in a list, a tuple, an iterator or a column of a
            data set, an array [B, H, W, C] or a tensor [B, C, H, W].
    """
    found: Any = images
    if found is None:
        return []
    if isinstance(found, np.ndarray | torch.Tensor):
        several = found.ndim == 4 or (isinstance(found, np.ndarray) and found.dtype.kind in "OU")
    else:
        one = str, bytes, bytearray, memoryview, Mapping, Set  # the last two are no images, and are named as such
        several = isinstance(found, Iterable) and not isinstance(found, one) and not hasattr(found, "read")
    return [_again(image) for image in found] if several else [_again(found)]


def _again(image: Any) -> ImageInput:
    """An image that can be read more than once, of a type that `image_reader.read` knows."""
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, os.PathLike):
        return Path(image)
    if hasattr(image, "read") and not (hasattr(image, "seekable") and image.seekable()):
        return image.read()  # a pipe or a download
    return image


def as_integer(value: Any, name: str, least: int, most: int | None = None) -> int:
    """An integer of Python, NumPy or torch, or an array or tensor of one; raises ValueError for all else."""
    number = _index(value)
    if number is None:
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if number < least or (most is not None and number > most):
        span = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {span}, got {number}.")
    return number


def as_integers(values: Any, name: str, least: int, most: int | None = None) -> list[int]:
    """Likewise of one or several of them, in a list, range, array or tensor."""
    values = values.tolist() if isinstance(values, np.ndarray | torch.Tensor) else values
    several = isinstance(values, Iterable) and not isinstance(values, str)
    return [as_integer(value, name, least, most) for value in (values if several else [values])]


def as_seed(seed: Any, generator: Any = None) -> int | None:
    """The seed of the noise as an int; None where neither is given.

    Args:
        seed: An integer that torch takes as a seed.
        generator: A `torch.Generator`, as in diffusers: the seed that it was made with is taken, whatever it has drawn
            since, and it is left as it is.

    Raises:
        ValueError: Both are given, or are something else.
    """
    if generator is None:
        return None if seed is None else as_integer(seed, "seed", -(2**63), 2**64 - 1)
    if seed is not None:
        raise ValueError("Give a seed or a generator, not both.")
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be one torch.Generator, whose seed is that of all images, not {type(generator).__name__}."
        )
    return generator.initial_seed()


def _index(value: Any) -> int | None:
    """An integer as an int; None for anything else, truth values too."""
    if "bool" in str(getattr(value, "dtype", type(value))):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # torch's tensors raise both
        return None


def batches(count: int, size: int) -> Iterator[slice]:
    """The positions of `count` items, `size` at a time."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def in_own_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the pipeline that computes alike in whatever mode its caller is: without gradients, outside of
    inference mode, whose tensors let none through, and in its networks' own types, since autocast moves scores by half
    a deviation."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        own_types = torch.autocast(self._execution_device.type, enabled=False)
        with own_types, torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return wrapped


# -- checks -----------------------------------------------------------------------------------------------------------


def check_images(images: PipelineImageInput, batch_size: Any) -> tuple[list[ImageInput], int]:
    """One image or several as a list, and how many to look at together; raises ValueError if there is none."""
    found = [images] if images is None else as_list(images)  # None is a bad image, named as such
    if not found:
        raise ValueError("The list of images is empty: give at least one image.")
    return found, as_integer(batch_size, "batch_size", 1)


def check_output_type(output_type: Any) -> None:
    """Raises ValueError unless results can be given so."""
    if output_type not in ("np", "pt", "pil"):
        raise ValueError(f"output_type must be 'np', 'pt' or 'pil', got {output_type!r}.")


def check_scoring(
    mode: str,
    score_type: str,
    normality: NormalityModel | None,
    false_alarm_rate: Any,
    output_type: str,
    map_size: Any,
) -> tuple[float, tuple[int, int] | None]:
    """The rate and the size of maps; raises ValueError unless images can be scored so, with these statistics of good
    images."""
    if mode not in ("calibrated", "paper"):
        raise ValueError(f"mode must be 'calibrated' or 'paper', got {mode!r}.")
    accepted: Sequence[str] = [name for name, score in SCORE_TYPES.items() if score.in_paper]
    if mode == "calibrated":
        if normality is None:
            raise ValueError("This pipeline has no normality model: call fit_normality(images) or use mode='paper'.")
        accepted = normality.score_types
    if score_type not in accepted:
        raise ValueError(f"score_type must be one of {', '.join(accepted)} in {mode} mode, got {score_type!r}.")
    check_output_type(output_type)
    if output_type == "pil" and mode == "paper":
        raise ValueError("output_type='pil' draws maps in good images' range, and paper mode knows none: use 'np'.")
    if map_size is not None:
        sides = as_integers(map_size, "Each side of map_size", 1, MAX_SIDE)
        if len(sides) != 2:
            raise ValueError(f"map_size must be a height and a width of at least 1, got {map_size}.")
        map_size = sides[0], sides[1]
    return rate_of(false_alarm_rate, normality), map_size


def check_noise(
    timesteps: Any, draws: Any, seed: Any, fitted: Mapping[str, Any], calibrated: bool
) -> tuple[list[int], int, int]:
    """Timesteps, number of draws and seed, by default as `fitted` says.

    Raises:
        ValueError: There are no timesteps or draws, or calibrated scores are wanted under others than the fitted ones.
    """
    fitted = {"seed": 0, **fitted, "timesteps": list(fitted["timesteps"])}
    given = {
        "timesteps": None if timesteps is None else as_integers(timesteps, "Each of the timesteps", 0),
        "num_noise_samples": None if draws is None else as_integer(draws, "num_noise_samples", 1),
        "seed": as_seed(seed),
    }
    chosen: dict[str, Any] = {name: fitted[name] if value is None else value for name, value in given.items()}
    if not chosen["timesteps"]:
        raise ValueError("The list of timesteps is empty: give at least one.")
    for name, value in chosen.items():
        if calibrated and value != fitted[name]:
            raise ValueError(
                f"Calibrated scores are fitted to the {name} {fitted[name]}, got {value}: "
                f"call fit_normality(images, {name}=...) or use mode='paper'."
            )
    return chosen["timesteps"], chosen["num_noise_samples"], chosen["seed"]


def check_restoration(
    normality: NormalityModel | None,
    method: Any,
    num_steps: Any,
    step_size: Any,
    denoise_every: Any,
    anneal: Any,
    pixel_rate: Any,
    false_alarm_rate: Any,
) -> tuple[int, float, int, float, float, float]:
    """The numbers, the first by default as the method has it; raises ValueError unless images can be restored so."""
    if normality is None:
        raise ValueError("This pipeline has no normality model: call fit_normality(images) first.")
    if method not in RESTORATION_STEPS:
        raise ValueError(f"method must be one of {', '.join(RESTORATION_STEPS)}, got {method!r}.")
    return (
        RESTORATION_STEPS[method] if num_steps is None else as_integer(num_steps, "num_steps", 1),
        check_rate(step_size, "step_size"),
        as_integer(denoise_every, "denoise_every", 1),
        1.0 if anneal == 1 else check_rate(anneal, "anneal"),
        check_rate(pixel_rate, "pixel_rate"),
        rate_of(false_alarm_rate, normality),
    )


def rate_of(false_alarm_rate: Any, normality: NormalityModel | None) -> float:
    """The false-alarm rate, by default the one that these statistics can tell; raises ValueError for a bad one."""
    if false_alarm_rate is None:
        return DEFAULT_RATES[0] if normality is None else normality.default_rate
    return check_rate(false_alarm_rate)


def check_labels(class_labels: Any, count: int, categories: Sequence[str]) -> list[str | None]:
    """The category of each of `count` images by name, from names or numbers; None where it is to be found out.

    Raises:
        ValueError: There is no such category, or another number of them.
    """
    if class_labels is None:
        return [None] * count
    if isinstance(class_labels, np.ndarray | np.generic | torch.Tensor):
        class_labels = class_labels.tolist()
    one = isinstance(class_labels, str) or not isinstance(class_labels, Iterable)
    labels = [class_labels] * count if one else list(class_labels)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} class_labels were given for {count} images.")
    names: list[str | None] = []
    for label in labels:
        number = _index(label)
        if number is not None and 0 <= number < len(categories):
            names.append(categories[number])
        elif isinstance(label, str) and label in categories:
            names.append(label)
        else:
            raise ValueError(f"There is no category {label!r}; this pipeline knows {', '.join(categories) or 'none'}.")
    return names


def check_categories(
    images: Sequence[ImageInput],
    holdout_images: Sequence[ImageInput],
    categories: Any,
    holdout_categories: Any,
) -> list[str]:
    """The category of each image and then of each held out; "object" where none are given.

    Args:
        categories, holdout_categories: Names, or one name for all.

    Raises:
        ValueError: There is another number of them than of images, or one is no name.
    """
    if categories is None and holdout_categories is None:
        return ["object"] * (len(images) + len(holdout_images))
    names: list[str] = []
    for kind, given, of in (("", categories, images), ("holdout_", holdout_categories, holdout_images)):
        several = [given] * len(of) if isinstance(given, str) else [] if given is None else list(given)
        if len(several) != len(of):
            raise ValueError(f"{len(several)} {kind}categories were given for {len(of)} {kind}images.")
        wrong = [name for name in several if not isinstance(name, str)]
        if wrong:
            raise ValueError(f"Each of {kind}categories must be a name, got {wrong[0]!r}.")
        names += (str(name) for name in several)
    return names


def check_config(config: Mapping[str, Any]) -> None:
    """Raises TypeError, as Python does, for arguments of `fit_normality` that neither it nor `NormalityModel` has."""
    accepted = list(inspect.signature(NormalityModel).parameters)
    for name in config:
        if name not in accepted:
            raise TypeError(
                f"fit_normality() got an unexpected keyword argument {name!r}; of NormalityModel's it takes "
                f"{', '.join(accepted)}."
            )
