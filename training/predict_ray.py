#!/usr/bin/env python
"""`python -m rad predict` on the workers of a Ray cluster."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from rad import RADPipeline, command
from rad.data.inputs import Source, list_inputs

DESCRIPTION = """Scores many pictures on the workers of a Ray cluster, with the rows of `python -m rad predict`.

    python training/predict_ray.py s3://bucket/photos --model my-model --output results --num_workers 8

Every worker reads the pictures and the model itself, and writes overlays, masks and maps: inputs, model and output
must be there for all of them under the same name. Rows are written here. What a worker that dies was doing is done
again by another; the same command goes on where it stopped.
"""


class Scorer:
    """Scores batches of pictures; each worker of `ray.data.Dataset.map_batches` keeps one.

    Args:
        args: From `parse_args`, with the false-alarm rate that is decided at.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.sources = {source.name: source for source in list_inputs(args.inputs).sources}
        self.pipeline = RADPipeline.load(args.model).to(args.device or ("cuda" if args.gpus_per_worker else "cpu"))
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Rows, each as JSON, of pictures: their names and places in the output folders, likewise."""
        sources = [self._source(*json.loads(picture)) for picture in batch["picture"]]
        return {"row": [json.dumps(row) for row in command.predict_here(self.args, self.pipeline, sources)]}

    def _source(self, name: str, place: str) -> Source:
        def gone() -> Path:
            raise FileNotFoundError(f"{name} is not there for this worker.")

        return replace(self.sources.get(name) or Source(name, gone), place=place)


def predict_on_workers(
    args: argparse.Namespace, pipeline: RADPipeline, sources: Sequence[Source]
) -> Iterator[dict[str, Any]]:
    """Rows of the pictures, in the order in which workers finish them."""
    import ray

    pictures = [{"picture": json.dumps([source.name, source.place])} for source in sources]
    if not pictures:
        return
    if not ray.is_initialized():  # here, where all that may be wrong has been told
        ray.init(args.address, log_to_driver=False)
    # As many blocks as batches: what a worker that dies takes with it is one of them
    num_blocks = -(-len(pictures) // args.batch_size)
    blocks = ray.data.from_items(pictures, override_num_blocks=num_blocks)
    scored = blocks.map_batches(
        Scorer,
        fn_constructor_args=[args],
        batch_size=args.batch_size,
        compute=ray.data.ActorPoolStrategy(size=min(args.num_workers, num_blocks)),
        num_cpus=args.cpus_per_worker,
        num_gpus=args.gpus_per_worker,
    )
    for row in scored.iter_rows():
        yield json.loads(row["row"])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.create_parser(None, DESCRIPTION)
    parser.add_argument("--address", help="Of a cluster that runs; by default RAY_ADDRESS, or one on this machine.")
    parser.add_argument("--num_workers", type=int, default=2, help="That score at a time.")
    parser.add_argument("--cpus_per_worker", type=float, default=1, help="That Ray sets aside for each.")
    parser.add_argument("--gpus_per_worker", type=float, default=0, help="Likewise; 0 scores on the CPU.")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """As `rad.command.main`.

    Raises:
        ImportError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise ImportError("Ray is not installed: pip install 'rad-diffusion[ray]'.")
    return command.main(args, predict_on_workers)


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
