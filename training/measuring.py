"""What the finished pipeline does on the data set's own test split."""

import argparse
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from data_arguments import load_split
from safetensors import SafetensorError

from rad import RADPipeline
from rad.data import AnomalyDataset
from rad.evaluation import mean_metrics, measure_records, score_dataset
from rad.image_reader import ImageInput
from rad.model_card import METRICS
from rad.truths import Survey, survey

logger = logging.getLogger("rad.train")


def survey_test_split(
    args: argparse.Namespace, check_image: Callable[[ImageInput], Any]
) -> tuple[AnomalyDataset, Survey] | None:
    """The test split, if there is one, and what it can be measured by, which is logged; arguments as `survey`."""
    if args.dataset_name:
        return None
    try:
        tests = load_split(args, "test", args.category)
    except ValueError as error:
        logger.info(f"There is no test split to measure on: {error}")
        return None
    seen = survey(tests, range(len(tests)), check_image)
    for sentence in seen.all_sentences():
        logger.info(sentence)
    return tests, seen


def measure_test_split(
    args: argparse.Namespace, accelerator: Accelerator, pipeline: RADPipeline, tests: AnomalyDataset, seen: Survey
) -> tuple[dict[str, float | str], list[ImageInput]]:
    """Metrics of the fused score on the test split, means over categories, and its defective images.

    Each process scores its share, the main one gets the metrics; in place of one that no category defines stands why.
    Images and masks that cannot be read are left out.

    Args:
        tests, seen: From `survey_test_split`.

    Raises:
        OSError: There is no room for the maps in --output_dir, where they are kept meanwhile.
    """
    defective = [tests[one.index].image for one in seen.seen if one.label]
    reasons = seen.undefined()
    lacking = {
        name: f"not defined: {'; '.join(dict.fromkeys(reasons[category][name] for category in seen.categories))}"
        for name in METRICS
        if seen.seen and all(name in reasons.get(category, ()) for category in seen.categories)
    }
    if len(lacking) == len(METRICS) or not seen.seen:
        return lacking, defective

    folder = Path(args.output_dir) / ".partial-records"
    try:
        records = score_dataset(pipeline, tests, [one.index for one in seen.seen], folder)
    except SafetensorError as error:
        raise OSError(f"What test images score could not be kept in {folder} ({error}).") from error
    means = {}
    if accelerator.is_main_process:
        members = ([record for record in records if record.category == category] for category in seen.categories)
        means = mean_metrics(measure_records(own, "fused") for own in members)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder)
    means = {**lacking, **means}
    return {name: means[name] for name in METRICS if name in means}, defective
