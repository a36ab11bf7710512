"""The good images to train on: listed, checked and decoded before anything else is begun."""

import argparse
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from data_arguments import load_split, summarise_folder, without_folder
from measuring import survey_test_split
from tqdm.auto import tqdm

from rad import RADImageProcessor
from rad.data import AnomalyDataset, detect_format, load_hub_dataset
from rad.data.batches import DecodedImages, to_pixels
from rad.data.dataset import MIN_IMAGES
from rad.data.duplicates import check_different, fingerprint, sketch
from rad.data.summary import DataSummary, summarise
from rad.image_processor import FULL_SCALE, find_pixel_range, to_input
from rad.image_reader import name_of, peak
from rad.truths import Survey

logger = logging.getLogger("rad.train")


def load_good_images(args: argparse.Namespace) -> AnomalyDataset:
    """The good images of the data set that the arguments name."""
    if args.dataset_name:
        return load_hub_dataset(
            args.dataset_name,
            args.dataset_config_name,
            args.dataset_split,
            args.image_column,
            args.category_column,
            args.label_column,
            args.category,
            args.hub_token,
            args.cache_dir,
        )
    data_dir, output_dir = (Path(folder).resolve() for folder in (args.train_data_dir, args.output_dir))
    if output_dir.is_relative_to(data_dir):
        raise ValueError(f"--output_dir {output_dir} lies in --train_data_dir: its pictures would be trained on.")
    dataset = load_split(args, "train", args.category)
    if args.dataset_format == "auto" and not (args.good or args.bad or args.masks or args.all_good):
        logger.info(f"{args.train_data_dir} is read as --dataset_format {detect_format(data_dir)}.")
    return dataset


@dataclass(frozen=True)
class GoodImages:
    """What a run is made of, read and checked.

    Attributes:
        dataset: The good images.
        processor: Knows their size and range.
        readable: Indices of the images that can be read, of which `decoded` has all or, without --cache_images, none.
        sizes: Own height and width of each of them.
        train, holdout: Indices of the images to train on and of those held out.
        summary: What was read as what.
        tested: The test split and what it can be measured by, if it is to be measured.
    """

    dataset: AnomalyDataset
    processor: RADImageProcessor
    readable: list[int]
    decoded: DecodedImages
    sizes: dict[int, tuple[int, int]]
    train: list[int]
    holdout: list[int]
    summary: DataSummary
    tested: tuple[AnomalyDataset, Survey] | None


def read_images(args: argparse.Namespace, dataset: AnomalyDataset, resolution: int, show_progress: bool) -> GoodImages:
    """Looks at every image of a run before its first step, and says what is read as what.

    Args:
        dataset: From `load_good_images`.
        resolution: Of the network.

    Raises:
        ValueError: Images cannot be read, are of two ranges or of one colour, or are too few.
    """
    if args.dataset_name:
        summary = summarise({"train": dataset}, name=Path(args.dataset_name).name)
    else:
        summary = summarise_folder(args, args.category)
    logger.info(summary.to_text())
    chosen = np.random.default_rng(args.seed).permutation(len(dataset))[: args.max_train_samples].tolist()
    pixel_range, darkest_peak = find_range(args, dataset, chosen)
    processor = RADImageProcessor(resolution, pixel_range, darkest_peak)
    tested = survey_test_split(args, processor.resize) if args.evaluate else None
    told = tested[1].all_sentences() if tested else []
    notes = summary.notes + [without_folder(sentence, args) for sentence in told]
    summary = replace(summary, notes=notes, pixel_range=pixel_range)
    readable, decoded, sizes = decode_images(args, dataset, sorted(chosen), processor, show_progress)
    fraction = 0.0 if args.fit_only else 0.2 if args.holdout_fraction is None else args.holdout_fraction
    train, holdout = dataset.split_holdout(fraction, args.seed, readable)
    return GoodImages(dataset, processor, readable, decoded, sizes, train, holdout, summary, tested)


def find_range(args: argparse.Namespace, dataset: AnomalyDataset, indices: list[int]) -> tuple[tuple[int, int], int]:
    """What the numbers in images mean, as `find_pixel_range` says, or as --pixel_range does."""

    def peak_of(index: int) -> int | None:
        try:
            return peak(dataset[index].image)
        except (ValueError, OSError):  # told when it is decoded
            return None

    with ThreadPoolExecutor() as pool:
        peaks = list(pool.map(peak_of, indices))
    try:
        pixel_range, darkest_peak = find_pixel_range(peaks, args.pixel_range)
    except ValueError as error:
        advice = "" if args.pixel_range else " Or say by --pixel_range what their numbers mean."
        raise ValueError(f"{error}{advice}") from error
    if pixel_range != FULL_SCALE and not args.pixel_range:
        logger.info(f"Pixels of 16-bit images are read as 0 to {pixel_range[1]:,}; --pixel_range would set it.")
    return pixel_range, darkest_peak


def decode_images(
    args: argparse.Namespace,
    dataset: AnomalyDataset,
    indices: list[int],
    processor: RADImageProcessor,
    show_progress: bool,
) -> tuple[list[int], DecodedImages, dict[int, tuple[int, int]]]:
    """Decodes images once; gives the indices of those that can be read, ascending, what is kept of them, which without
    --cache_images is nothing, and each one's own height and width.

    Raises:
        ValueError: Names the images that cannot be read, unless they are to be skipped; images are of one colour, or
            most of a category are copies.
    """

    def read(index: int) -> tuple[torch.Tensor | None, tuple[int, int], int, torch.Tensor] | Exception:
        try:
            pixels, size = processor.resize(dataset[index].image)
        except (ValueError, OSError) as error:
            return error
        kept, image = args.cache_images and not args.dry_run, to_pixels(pixels)
        return image if kept else None, size, fingerprint(pixels), sketch(to_input(image)[None])[0]

    with ThreadPoolExecutor() as pool:
        progress = tqdm(pool.map(read, indices), "Decoding images", len(indices), disable=not show_progress)
        results = dict(zip(indices, progress, strict=True))
    unreadable = [str(result) for result in results.values() if isinstance(result, Exception)]
    if unreadable:
        named = " ".join(unreadable[:10]) + (" ..." if len(unreadable) > 10 else "")
        message = f"{len(unreadable)} of {len(indices)} images cannot be read: {named}"
        if not args.skip_unreadable:
            raise ValueError(f"{message} Remove them, or leave them out with --skip_unreadable.")
        logger.warning(f"Skipped: {message}")
    results = {index: result for index, result in results.items() if not isinstance(result, Exception)}
    samples = [dataset.samples[index] for index in results]
    categories, names = [sample.category for sample in samples], [name_of(sample.image) for sample in samples]
    prints, sketches = ([result[part] for result in results.values()] for part in (2, 3))
    parts = check_different(prints, sketches, categories, MIN_IMAGES, names)
    if copies := [(names[i], names[part]) for i, part in enumerate(parts) if part != i]:
        named = ", ".join(f"{one} (as {other})" for one, other in copies[:3]) + (", ..." if len(copies) > 3 else "")
        logger.warning(
            f"{len(copies)} of {len(samples)} good images are copies of others or show the same part: {named}. "
            "They are held out together, and say no more than one of them."
        )
    sizes = Counter(result[1] for result in results.values())
    if len(sizes) > 1:
        height, width = sizes.most_common(1)[0][0]
        logger.info(
            f"Images of {len(sizes)} different sizes, most often {width} x {height}, are all resized to "
            f"{processor.resolution} x {processor.resolution}, whatever their aspect ratio."
        )
    readable = sorted(results)
    own_sizes = {index: result[1] for index, result in results.items()}
    kept = {index: results.pop(index)[0] for index in readable}
    decoded = DecodedImages({index: image for index, image in kept.items() if image is not None})
    return readable, decoded, own_sizes
