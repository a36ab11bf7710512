"""What the finished pipeline does on the data set's own test split."""

import argparse
import logging
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from data_arguments import load_split
from safetensors import SafetensorError

from rad import RADPipeline
from rad.evaluation import mean_metrics, measure_records, score_dataset
from rad.image_processor import ImageInput, decode
from rad.model_card import METRICS

logger = logging.getLogger("rad.train")


def measure_test_split(
    args: argparse.Namespace, accelerator: Accelerator, pipeline: RADPipeline
) -> tuple[dict[str, float], list[ImageInput]]:
    """Metrics of the fused score on the test split, means over categories, and its defective images.

    Each process scores its share, the main one gets the metrics. There are none where there is no such split, or a
    category of it lacks good images or masks. Images that cannot be read are named and left out.

    Raises:
        OSError: There is no room for the maps in --output_dir, where they are kept meanwhile.
    """
    if args.dataset_name:
        return {}, []
    try:
        tests = load_split(args, "test", args.category)
    except ValueError as error:
        logger.info(f"There is no test split to measure on: {error}")
        return {}, []

    def has_mask(index: int) -> bool | str:
        """Or why the image or its mask cannot be read."""
        try:
            decode(tests[index].image)
            return tests.mask(index) is not None
        except (ValueError, OSError) as error:
            return str(error)

    own = range(len(tests))[accelerator.process_index :: accelerator.num_processes]
    masked = dict(sorted(gather_object([(i, has_mask(i)) for i in own])))
    for error in [found for found in masked.values() if isinstance(found, str)]:
        logger.warning(f"Not measured: {error}")
    masked = {i: found for i, found in masked.items() if not isinstance(found, str)}
    defective = [tests[i].image for i in masked if tests[i].label]
    for category in sorted({tests[i].category for i in masked}):
        members = [i for i in masked if tests[i].category == category]
        if all(tests[i].label for i in members) or not any(tests[i].label and masked[i] for i in members):
            logger.info(f"Not measured: the test split of {category!r} has no good images, or none with a mask.")
            return {}, defective

    if not masked:
        return {}, []

    folder = Path(args.output_dir) / ".partial-records"
    try:
        records = score_dataset(pipeline, tests, list(masked), folder)
    except SafetensorError as error:
        raise OSError(f"What test images score could not be kept in {folder} ({error}).") from error
    categories = sorted({record.category for record in records})
    means = {}
    if accelerator.is_main_process:
        members = ([record for record in records if record.category == category] for category in categories)
        means = mean_metrics(measure_records(own, "fused") for own in members)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder)
    return {name: value for name, value in means.items() if name in METRICS}, defective
