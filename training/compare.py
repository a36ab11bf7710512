#!/usr/bin/env python
"""Measures a pipeline and other methods side by side: the same images, resolution, frozen backbone and machine.

    python training/compare.py --model mtd --data_dir MTD --dataset_format mtd --output_dir comparison

Each method is fitted to each category by itself and measured, one after another, each step in a process of its own:
memory is what that process holds in RAM. Then one process times all methods in turns on the same images, so that other
work on the machine slows all of them alike. Settings are the published ones as far as one CPU allows, and are written
below the table. DRAEM needs anomalib: pip install -r requirements-bench.txt.

What is fitted and measured stays in the output folder, <method>-<category>.safetensors and .json: the same command
goes on where it was stopped, and methods can be added. Peers depend on the pipeline's frozen backbone and resolution
alone; after the pipeline or the code of rad has changed, --refit rad measures it anew beside them.
"""

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_arguments import add_data_arguments, data_folder, load_split, summarise_folder
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from peers import METHODS, RAD, Peer
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tqdm.auto import tqdm

from rad import RADPipeline
from rad.data.batches import to_pixels
from rad.data.dataset import evenly
from rad.evaluation import (
    METRICS,
    hash_code,
    hash_pipeline,
    keep_records,
    mean_metrics,
    measure_records,
)
from rad.files import remove_partials, whole
from rad.pipeline_loading import EMBEDDED_MODELS
from rad.truths import Survey, survey

COLUMNS = {  # of the table: heading, and how a value is written
    "image_auroc": ("image AUROC", "{:.3f}"),
    "pixel_auroc": ("pixel AUROC", "{:.3f}"),
    "pixel_ap": ("pixel AP", "{:.3f}"),
    "aupro": ("AUPRO", "{:.3f}"),
    "fit_seconds": ("fit, s", "{:.0f}"),
    "latency_ms": ("latency, ms", "{:.0f}"),
    "latency_ratio": ("latency / RAD's", "{:.2f}"),
    "fit_memory_mb": ("peak memory to fit, MB", "{:.0f}"),
    "memory_mb": ("peak memory to score, MB", "{:.0f}"),
    "size_mb": ("size, MB", "{:.0f}"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic", help=f"Folder, Hub id or one of {', '.join(EMBEDDED_MODELS)}.")
    parser.add_argument("--data_dir", type=expanduser, required=True, help="Folder of the data set.")
    add_data_arguments(parser.add_argument)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[m for m in METHODS if m != "draem"])
    parser.add_argument("--refit", nargs="+", choices=METHODS, default=[], help="Methods to fit and measure anew.")
    parser.add_argument("--map_size", type=int, default=256, help="Maps and masks are compared at this square.")
    parser.add_argument("--coreset_ratio", type=float, default=0.01, help="PatchCore: share of the patches to keep.")
    parser.add_argument("--max_train_steps", type=int, default=2000, help="Of the autoencoders.")
    parser.add_argument("--draem_train_steps", type=int, default=2000, help="Of DRAEM, each ten times as long.")
    parser.add_argument("--train_batch_size", type=int, default=8, help="Of all three.")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="Of all three's training.")
    parser.add_argument(
        "--draem_width",
        type=float,
        default=0.25,
        help="DRAEM: its networks' width; 1 as published, 16 times the work.",
    )
    parser.add_argument(
        "--texture_dir", help="DRAEM: folder of texture images (published: DTD); by default anomalib's noise."
    )
    parser.add_argument("--max_train_samples", type=int, help="Fit on this many good images, picked at random.")
    parser.add_argument(
        "--max_test_samples", type=int, help="Measure on this many images of a category, evenly picked."
    )
    parser.add_argument("--latency_images", type=int, default=30, help="Time the methods on this many, evenly picked.")
    parser.add_argument("--seed", type=int, default=0, help="Of the peers; the model's noise is as it was fitted.")
    parser.add_argument("--device", help="By default a GPU if there is one.")
    parser.add_argument(
        "--output_dir",
        type=expanduser,
        default="comparison",
        help="For results.json, results.md, comparison.png and what is fitted.",
    )
    return parser.parse_args(argv)


def peak_memory() -> float:
    """Largest resident memory of this process in MB since the last call (Linux)."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    Path("/proc/self/clear_refs").write_text("5")  # starts anew
    return int(peak) * 1024 / 1e6


def marks_of(method: str, category: str, pipeline: RADPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """All that a method's numbers for one category depend on: of a peer beside the code, of the pipeline with it."""
    files = [
        (os.path.relpath(sample.image, data_folder(args)), sample.image.stat().st_size, sample.defect)
        for split in ("train", "test")
        for sample in load_split(args, split, [category]).samples
    ]
    if method == "rad":
        model = {"weights": hash_pipeline(pipeline).hexdigest(), "code": hash_code().hexdigest()}
    else:
        model = {"weights": hashlib.sha256(save(pipeline.feature_extractor.network.state_dict())).hexdigest()}
    names = ("seed", "map_size", "max_train_samples", "max_test_samples", "device", *METHODS[method].flags)
    return {
        **model,
        "resolution": pipeline.config.resolution,
        "data": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        **{name: getattr(args, name) for name in names},
    }


def paths(method: str, category: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """Where a fitted peer and its measurements are stored."""
    folder = Path(args.output_dir)
    return folder / f"{method}-{category}.safetensors", folder / f"{method}-{category}.json"


def read_fit(path: Path) -> dict[str, Any]:
    """What `fit` stored beside a peer's tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fit"])


def fit(method: str, marks: dict[str, dict], args: argparse.Namespace) -> None:
    """Fits a peer to each category of `marks`, {category: fingerprint}, and stores it at once."""
    pipeline = RADPipeline.load(args.model).to(args.device)
    for category, mark in marks.items():
        torch.manual_seed(args.seed)
        peer = METHODS[method](pipeline, args)
        samples = load_split(args, "train", [category]).samples
        picked = np.random.default_rng(args.seed).permutation(len(samples))[: args.max_train_samples]
        resize = peer.processor.resize
        images = torch.stack([to_pixels(resize(samples[i].image)[0]) for i in tqdm(picked, desc="Decoding")])
        peak_memory()
        start = time.perf_counter()
        peer.fit(images)
        found = {
            "fit_seconds": time.perf_counter() - start,
            "fit_memory_mb": peak_memory(),
            "fit_threads": torch.get_num_threads(),
        }
        with whole(paths(method, category, args)[0]) as partial:
            save_file(peer.state_dict(), partial, {"fit": json.dumps({"fingerprint": mark, **found})})


def load_peer(method: str, category: str, pipeline: RADPipeline, args: argparse.Namespace) -> Peer:
    """A method as `fit` left it for one category."""
    peer = METHODS[method](pipeline, args)
    if method != "rad":
        peer.load(load_file(paths(method, category, args)[0], args.device))
    return peer


def score(method: str, marks: dict[str, dict], args: argparse.Namespace) -> None:
    """Measures a fitted method on each category of `marks`, {category: fingerprint}, and stores what it finds."""
    pipeline = RADPipeline.load(args.model).to(args.device)
    for category, mark in marks.items():
        peer = load_peer(method, category, pipeline, args)
        test = load_split(args, "test", [category])
        picked = evenly(len(test), args.max_test_samples)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=args.output_dir) as folder:
            peak_memory()
            records = keep_records(
                peer.score, hashlib.sha256(), test, picked, folder, args.map_size, batch_size=1, dtype=np.float32
            )
            memory = peak_memory()
            found = {title: measure_records(records, title) for title in records[0].scores}
        accuracy = {title: {name: metrics.get(name) for name in METRICS} for title, metrics in found.items()}
        no_fit = {"fit_seconds": None, "fit_memory_mb": None, "fit_threads": None}
        record = {
            **(no_fit if method == "rad" else read_fit(paths(method, category, args)[0])),
            "fingerprint": mark,
            "memory_mb": memory,
            "size_mb": sum(t.numel() * t.element_size() for t in peer.state_dict().values()) / 1e6,
            "settings": peer.settings,
            "accuracy": accuracy,
        }
        with whole(paths(method, category, args)[1]) as partial:
            partial.write_text(json.dumps(record, indent=2))


def time_in_turns(categories: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds from file to map, batch 1, of each method on the same images, which all methods take in turns."""
    pipeline, seconds = RADPipeline.load(args.model).to(args.device), {method: [] for method in args.methods}
    for number, category in enumerate(categories):
        peers = {method: load_peer(method, category, pipeline, args) for method in args.methods}
        share = len(range(number, args.latency_images, len(categories)))  # of the images
        test = load_split(args, "test", [category])
        for peer in peers.values():  # the first pass is slower
            peer.score([test.samples[0].image], category)
        for turn, i in enumerate(tqdm(evenly(len(test), share), desc="Timing")):
            for method in np.roll(args.methods, turn):
                start = time.perf_counter()
                peers[method].score([test.samples[i].image], category)
                seconds[method].append(time.perf_counter() - start)
    return seconds


def table(records: dict[str, list[dict]], seconds: dict[str, list[float]]) -> list[dict]:
    """The rows, one dict each, of {method: records of its categories} and `time_in_turns`.

    Accuracy is the mean over categories that define it, latency the median over images, and so is its ratio; times to
    fit are summed; memory is the largest, and size that of one category's model.
    """
    rows = []
    for method, found in records.items():
        common = {
            "fit_seconds": None if found[0]["fit_seconds"] is None else sum(r["fit_seconds"] for r in found),
            "fit_memory_mb": None if found[0]["fit_seconds"] is None else max(r["fit_memory_mb"] for r in found),
            "fit_threads": found[0]["fit_threads"],
            "latency_ms": 1000 * float(np.median(seconds[method])) if seconds else None,
            "latency_ratio": (
                float(np.median(np.divide(seconds[method], seconds["rad"]))) if "rad" in seconds else None
            ),
            "memory_mb": max(r["memory_mb"] for r in found),
            "size_mb": found[0]["size_mb"],
            "settings": found[0]["settings"],
        }
        for title in found[0]["accuracy"]:
            rows.append({"method": title, **mean_metrics(r["accuracy"][title] for r in found), **common})
    return rows


def to_markdown(rows: list[dict], num_images: int, told: list[str]) -> str:
    """The table, and below it what is to be `told`, how it was timed and the settings of each method."""
    lines = ["| method | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |"]
    lines.append("|---" * (1 + len(COLUMNS)) + "|")
    for row in rows:
        values = ["-" if row[name] is None else form.format(row[name]) for name, (_, form) in COLUMNS.items()]
        lines.append(f"| {row['method']} | " + " | ".join(values) + " |")
    threads = sorted({str(row["fit_threads"]) for row in rows if row["fit_threads"] is not None})
    timing = f"Latency: batch 1, from file to map, median of {num_images} images, which all methods take in turns"
    timing += f"; {torch.get_num_threads()} threads" + (f", {' or '.join(threads)} to fit." if threads else ".")
    first = {row["settings"]: row["method"] for row in reversed(rows)}  # rows of one method share them
    settings = [f"- {method}: {settings}" for settings, method in reversed(first.items())]
    return "\n".join([*lines, "", *told, "", timing, "", *settings])


def draw(rows: list[dict]) -> Figure:
    """AUPRO and image AUROC, as far as they are defined, against latency, names beside the axes; the pipeline's single
    scores are hollow."""
    names = [name for name in ("aupro", "image_auroc") if any(row[name] is not None for row in rows)]
    figure = Figure(figsize=(6.5 * len(names), 1.5 + 0.3 * max(10, len(rows))), dpi=120, layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, row in enumerate(rows):
            alone = row["method"].endswith("alone")
            axis.plot(
                row["latency_ms"],
                row[name],
                marker="*" if row["method"].startswith(RAD.title) else "o",
                markersize=12,
                fillstyle="none" if alone else "full",
                linestyle="none",
                zorder=2 if alone else 3,
                color=f"C{number}",
            )
        axis.set(xscale="log", xlabel="latency of one image, ms", ylabel=COLUMNS[name][0])
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.margins(y=0.08)

        # Names in a column to the right, ordered as the points are and a line apart
        order = np.argsort([row[name] for row in rows], kind="stable")
        low, high = axis.get_ylim()
        heights, gap = (np.array([rows[i][name] for i in order]) - low) / (high - low), 1 / max(10, len(rows))
        for i in range(1, len(order)):
            heights[i] = max(heights[i], heights[i - 1] + gap)
        heights[-1] = min(heights[-1], 1)
        for i in reversed(range(len(order) - 1)):
            heights[i] = min(heights[i], heights[i + 1] - gap)
        for i, height in zip(order, heights, strict=True):
            axis.annotate(
                f"{rows[i]['method']}  {rows[i][name]:.3f}",
                (rows[i]["latency_ms"], rows[i][name]),
                (1.04, height),
                textcoords="axes fraction",
                va="center",
                fontsize=9,
                arrowprops={"arrowstyle": "-", "color": f"C{i}", "alpha": 0.5, "relpos": (0, 0.5)},
            )
    return figure


def main(args: argparse.Namespace) -> list[dict]:
    if args.dry_run:
        print(summarise_folder(args, args.category, read_masks=True).to_text())
        return []
    if "draem" in args.methods and importlib.util.find_spec("anomalib") is None:
        raise ImportError(
            "The method draem needs anomalib: pip install -r requirements-bench.txt, or leave draem out of --methods."
        )
    if not set(args.refit) <= set(args.methods):
        raise ValueError(f"--refit names {', '.join(args.refit)}, but --methods only {', '.join(args.methods)}.")
    if args.latency_images < 1:
        raise ValueError(f"--latency_images must be at least 1, got {args.latency_images}.")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder)

    print(summarise_folder(args, args.category).to_text(), flush=True)

    # 1. What is there already; all of it must come from the same arguments
    pipeline = RADPipeline.load(args.model)
    categories, seen = load_split(args, "test", args.category).categories, Survey()
    for category in categories:
        test = load_split(args, "test", [category])
        seen += survey(test, evenly(len(test), args.max_test_samples), pipeline.image_processor.resize)
    seen.check()
    print("\n".join(seen.sentences()), flush=True)
    marks = {m: {c: marks_of(m, c, pipeline, args) for c in categories} for m in args.methods}
    for method in args.methods:
        for category, mark in marks[method].items():
            for path in paths(method, category, args):
                if method in args.refit:
                    path.unlink(missing_ok=True)
                if path.exists():
                    stored = json.loads(path.read_text()) if path.suffix == ".json" else read_fit(path)
                    other = [name for name in mark if stored["fingerprint"].get(name) != mark[name]]
                    if other:
                        raise ValueError(
                            f"{path} was made with other {', '.join(other)}: "
                            f"give --refit {method} to replace it, or another --output_dir."
                        )
    del pipeline

    # 2. Fit and measure what is not: a process each, so that each one's memory is its own
    def in_a_process(function: Callable, *arguments: Any) -> Any:
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            method = arguments[0]
            raise OSError(f"The process for {method} was killed, most likely for want of memory.") from error

    def report(seconds: dict[str, list[float]]) -> list[dict]:
        done = [m for m in args.methods if all(paths(m, c, args)[1].exists() for c in categories)]
        records = {m: [json.loads(paths(m, c, args)[1].read_text()) for c in categories] for m in done}
        rows = table(records, seconds)
        results = {
            "arguments": vars(args),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "rows": rows,
            "truth": seen.to_dict(),
            "seconds": seconds,
        }
        told = seen.sentences()
        texts = {"json": json.dumps(results, indent=2), "md": to_markdown(rows, args.latency_images, told) + "\n"}
        for suffix, text in texts.items():
            with whole(folder / f"results.{suffix}") as partial:
                partial.write_text(text)
        return rows

    for method in args.methods:
        for step, number in ((fit, 0), (score, 1)):
            if method == "rad" and step is fit:
                continue
            missing = {c: mark for c, mark in marks[method].items() if not paths(method, c, args)[number].exists()}
            if missing:
                in_a_process(step, method, missing, args)
        report({})  # without latencies yet

    # 3. Time them side by side
    rows = report(time_in_turns(categories, args))
    with whole(folder / "comparison.png") as partial:
        draw(rows).savefig(partial)
    print((folder / "results.md").read_text())
    return rows


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
