"""The arguments that name a data set on disk, the same for all commands, and what they read."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rad.data import DATASET_FORMATS, AnomalyDataset, load_dataset
from rad.data.summary import DataSummary, summarise
from rad.truths import survey


def add_data_arguments(add: Callable[..., Any], categories: str = "Categories to measure; by default all.") -> None:
    """Adds all but the folder's own: `add` is the `add_argument` of a parser or a group, `categories` a help text."""
    add("--dataset_format", default="auto", choices=("auto", *DATASET_FORMATS), help="Layout of the data folder.")
    add("--good", nargs="+", default=[], metavar="GLOB", help="Files or folders in the data folder that are good.")
    add("--bad", nargs="+", default=[], metavar="GLOB", help="Likewise of defects.")
    add("--masks", nargs="+", default=[], metavar="GLOB", help="Likewise of masks of defects.")
    add("--all_good", action="store_true", help="Every image in the data folder is good, whatever names say.")
    add("--category", nargs="+", help=categories)
    add("--dry_run", action="store_true", help="Say what is read as what, and stop.")


def data_folder(args: argparse.Namespace) -> Path:
    return Path(getattr(args, "train_data_dir", None) or args.data_dir).expanduser().resolve()


def load_split(args: argparse.Namespace, split: str, categories: list[str] | None = None) -> AnomalyDataset:
    """A split of the data set that the arguments name; arguments and errors as `rad.data.load_dataset`."""
    told = {name: getattr(args, name) for name in ("good", "bad", "masks", "all_good")}
    return load_dataset(data_folder(args), args.dataset_format, split, categories, **told)


def summarise_folder(
    args: argparse.Namespace, categories: list[str] | None = None, read_masks: bool = False
) -> DataSummary:
    """What the arguments read of the folder that they name.

    Args:
        read_masks: Also tell what the masks say, which takes a while.

    Raises:
        ValueError, FileNotFoundError: What `rad.data.load_dataset` raises, if there are no images for either split.
    """
    root, splits, errors = data_folder(args), {}, {}
    for split in ("train", "test"):
        try:
            splits[split] = load_split(args, split, categories)
        except ValueError as error:  # a folder of good images has no test split, a folder of tests nothing else
            errors[split] = error
    if not splits:
        raise errors["train"]
    notes = [f"No {s} split: {error}" for s, error in errors.items()]
    if read_masks and "test" in splits:
        notes += survey(splits["test"], range(len(splits["test"]))).all_sentences()
    return summarise(splits, root, notes=[without_folder(note, args) for note in notes])


def without_folder(note: str, args: argparse.Namespace) -> str:
    """A sentence to be published: it names files from the data folder on, not where that lies."""
    return (
        note if getattr(args, "dataset_name", None) else note.replace(str(data_folder(args)), data_folder(args).name)
    )
