"""The command that scores many pictures: `python -m rad predict` and, for several processes, `training/predict.py`."""

import argparse
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from .data.inputs import Source, list_inputs
from .models.false_alarms import rate_note
from .pipeline_arguments import as_integer
from .pipeline_loading import EMBEDDED_MODELS
from .pipeline_rad import RADPipeline
from .prediction import Outputs, Predictions, predict, settings_of

logger = logging.getLogger("rad.predict")

DESCRIPTION = """Scores many pictures: predictions.jsonl and predictions.csv get a row for each as it comes.

    python -m rad predict photos --model my-model --output results
    accelerate launch --multi_gpu training/predict.py photos --model my-model --output results

The same command goes on where it stopped. Exit status: 0 if all pictures were judged, 4 if some could not be (their
rows say why), 2 for an error.
"""
SOME_FAILED = 4


def parse_args(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    return create_parser(prog, DESCRIPTION).parse_args(argv)


def create_parser(prog: str | None, description: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=raw)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="Pictures, folders, globs, zip or tar archives, text files that list them, or URLs (s3://, gs://, hf://).",
    )
    parser.add_argument("--model", default="synthetic", help=f"Folder, Hub id or one of {', '.join(EMBEDDED_MODELS)}.")
    parser.add_argument("--output", default="predictions", help="Folder for rows and pictures.")
    parser.add_argument("--category", help="What the pictures show; by default the pipeline finds out.")
    parser.add_argument(
        "--false_alarm_rate", type=float, help="On good parts; by default 1 %%, or what so few can tell."
    )
    parser.add_argument("--batch_size", type=int, default=4, help="Pictures in one pass.")
    parser.add_argument(
        "--num_threads", type=int, default=2, help="Threads that decode pictures ahead of the networks."
    )
    parser.add_argument("--device", help="By default a GPU if there is one.")
    parser.add_argument("--overlays", action="store_true", help="Write the heat over each picture, PNG.")
    parser.add_argument("--masks", action="store_true", help="Write the regions of each picture, PNG of 0 and 255.")
    parser.add_argument("--maps", choices=("png", "npy"), help="Write anomaly maps, as 16-bit PNG or float32 npy.")
    parser.add_argument(
        "--overwrite", action="store_true", help="Begin anew where the folder holds rows with other settings."
    )
    return parser


def predict_here(
    args: argparse.Namespace, pipeline: RADPipeline, sources: Sequence[Source]
) -> Iterator[dict[str, Any]]:
    """Rows of the pictures, scored by this process."""
    return predict(
        pipeline,
        sources,
        args.false_alarm_rate,
        args.category,
        args.batch_size,
        args.num_threads,
        Path(args.output).expanduser(),
        outputs_of(args),
    )


def outputs_of(args: argparse.Namespace) -> Outputs:
    return Outputs(args.overlays, args.masks, args.maps)


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Holds a folder's lock, which ends with this process however it ends; raises ValueError if another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".predictions.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"Another run writes to {folder}: wait until it ends, or give another --output.") from error


def main(args: argparse.Namespace, scoring: Callable[..., Iterator[dict[str, Any]]] = predict_here) -> int:
    """Scores what the arguments name and writes what they ask for; returns the exit status.

    Args:
        args: From `parse_args`.
        scoring: Gives the rows of pictures, in any order: see `predict_here`.

    Raises:
        ValueError, OSError: There is nothing to score, or a bad argument or model; the message names it.
    """
    logging.basicConfig(format="%(message)s")
    args.batch_size, args.num_threads = (as_integer(getattr(args, n), n, 1) for n in ("batch_size", "num_threads"))
    state = PartialState(cpu=args.device == "cpu")  # or what `training/predict.py` has made of it
    is_main, folder = state.is_main_process, Path(args.output).expanduser()
    logger.setLevel(logging.INFO if is_main else logging.ERROR)

    # 1. What there is to do
    found = list_inputs(args.inputs)
    with contextlib.closing(found), contextlib.ExitStack() as stack:
        found.leave_out(folder)
        for reason, names in found.left_out.items():
            logger.info(
                f"Left out, {reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}."
            )
        pipeline = RADPipeline.load(args.model).to(args.device or state.device)
        pipeline.set_progress_bar_config(disable=True)
        settings = settings_of(pipeline, args.false_alarm_rate, args.category, outputs_of(args))
        rate = args.false_alarm_rate = settings["false_alarm_rate"]
        if is_main:
            stack.enter_context(only_run(folder))
        predictions = Predictions(folder, settings, args.overwrite, state.process_index, state.num_processes)
        state.wait_for_everyone()
        before = predictions.rows()
        found.keep_apart({row["place"]: name for name, row in before.items()})
        done = {name for name, row in before.items() if not row["error"]}
        remaining = [source for source in found.sources if source.name not in done]
        if state.num_processes > 1:  # a file that comes while all list them must shift nobody's share
            (names,) = broadcast_object_list([[source.name for source in remaining]])
            by_name = {source.name: source for source in remaining}
            remaining = [by_name[name] for name in names if name in by_name]
        if num_done := len(found.sources) - len(remaining):
            logger.info(f"{num_done} of {len(found.sources)} pictures are there already.")
        state.wait_for_everyone()  # before anyone writes

        # 2. This process's share of it
        own = remaining[state.process_index :: state.num_processes]
        rows = predictions.append(scoring(args, pipeline, own))
        for _ in tqdm(rows, total=len(own), desc="Scoring", unit="picture", disable=not is_main):
            pass
        state.wait_for_everyone()

        # 3. One table of all
        if not is_main:
            return 0
        merged = predictions.merge([source.name for source in found.sources])
    names = {source.name for source in found.sources}
    verdicts = [row["verdict"] for row in merged if row["path"] in names]
    bad, failed = verdicts.count("defect"), verdicts.count("error") + len(names) - len(verdicts)
    told = f" {failed} could not be judged: see their errors." if failed else ""
    logger.info(
        f"{bad} of {len(names) - failed} pictures are defective, at a false-alarm rate of "
        f"{rate:.2%}.{told} Rows: {folder.resolve()}/predictions.csv and .jsonl"
    )
    if note := rate_note(rate, pipeline.normality.num_different):
        logger.info(note)
    return SOME_FAILED if failed else 0
