#!/usr/bin/env python
"""Ablations: what each choice in the score is worth, all in one command, with a table and a figure each.

    accelerate launch training/ablate.py --model mtd --data_dir MTD --dataset_format mtd --output_dir ablations-mtd

Every setting is measured on two sets: the test images, and good training images that the model held out, each also
with a defect drawn on it. Defaults are chosen by the second. Statistics of good images never come from an image that
they are measured on: one half of the images held out gets the defects, the other half gives the statistics for them.
The test images get the model's own statistics and, where a setting needs others, those of all images held out.

One pass over the images stores all raw maps on disk, so that an interrupted run goes on where it was.
"""

import argparse
import copy
import hashlib
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import raw_maps
import torch
from ablations import ABLATIONS, Ablation, Evaluation
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import parse_flag_from_env
from data_arguments import add_data_arguments, load_split, summarise_folder
from launching import share_cores
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from raw_maps import Passes, RawMaps, refit, split_good, store
from tqdm.auto import tqdm

from rad import RADPipeline, data
from rad.data import AnomalyDataset
from rad.data.dataset import evenly
from rad.data.drawn import DrawnDefects
from rad.evaluation import (
    METRICS,
    fingerprint,
    mean_metrics,
    measure,
    resize_square,
)
from rad.files import whole
from rad.image_processor import resize_map
from rad.models.evidence import SCORE_TYPES
from rad.pipeline_loading import EMBEDDED_MODELS
from rad.truths import Survey, Truth, read_truths, survey

RESPACED_STEPS = [5, 12, 25, 50, 75, 100, 150]  # of 250: 20, 48, 100, 201, 301, 401 and 602 of the full chain
PATHS = ("model", "data_dir", "output_dir", "raw_dir", "page")  # arguments that may tell of one's own disk
METRIC_TITLES = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO (FPR ≤ 0.3)",
    "score_std": "deviation of an image's score\nover seeds, in good images' deviations",
}
SETS = {"pasted": "pasted defects", "test": "test images"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito's, told apart by colour-blind readers


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic", help=f"Folder, Hub id or one of {', '.join(EMBEDDED_MODELS)}.")
    parser.add_argument(
        "--data_dir", type=expanduser, required=True, help="Folder of the data set that the model was trained on."
    )
    add_data_arguments(parser.add_argument, "Looked at by --dry_run; the ablations take the model's own.")
    parser.add_argument("--holdout_fraction", type=float, default=0.2, help="As it was in training.")
    parser.add_argument("--max_train_samples", type=int, help="As it was in training.")
    parser.add_argument("--seed", type=int, default=0, help="As it was in training; also of the pasted defects.")
    parser.add_argument(
        "--timesteps",
        type=int,
        nargs="+",
        help="Steps of the full chain, on the respaced one, to compare with the model's; seven from 20 to 602.",
    )
    parser.add_argument("--max_draws", type=int, default=8, help="Noise draws at each timestep, a power of 2.")
    parser.add_argument("--num_seeds", type=int, default=3, help="Of the noise, to see how far results vary.")
    parser.add_argument(
        "--max_draw_samples", type=int, default=100, help="Compare draws on this many images of each set."
    )
    parser.add_argument("--max_test_samples", type=int, help="Measure on this many test images, evenly picked.")
    parser.add_argument(
        "--max_good_samples",
        type=int,
        help="For a quick look: of each category, this many good images trained on and as many held out.",
    )
    parser.add_argument("--map_size", type=int, default=256, help="Maps and masks are compared at this square.")
    parser.add_argument("--batch_size", type=int, default=4, help="Images in one pass.")
    parser.add_argument(
        "--output_dir", type=expanduser, required=True, help="ablations.json, ablations.md and the figures go here."
    )
    parser.add_argument(
        "--raw_dir", type=expanduser, help="The raw maps go here, about 2 MB an image; by default --output_dir/raw."
    )
    parser.add_argument(
        "--page",
        help="Also put each table into this Markdown file, between <!-- NAME ABLATION --> and <!-- end -->; NAME is "
        "the name of --output_dir.",
    )
    args = parser.parse_args(argv)
    if args.max_draws < 1 or args.max_draws & (args.max_draws - 1):
        parser.error(f"--max_draws must be a power of 2, got {args.max_draws}.")
    if args.num_seeds < 1:
        parser.error(f"--num_seeds must be at least 1, got {args.num_seeds}.")
    return args


def measure_setting(x: RawMaps, maps: torch.Tensor | None, scores: torch.Tensor, map_size: int) -> dict[str, float]:
    """Means over categories of those of the four metrics that are defined, of image AUROC alone without maps.

    Maps go to each image's own size and then to `map_size`, as those of records do.
    """
    resized = None
    if maps is not None:
        sizes = [tuple(size) for size in x.load("size").tolist()]
        own_size = (resize_map(one[None], [size])[0] for one, size in zip(maps, sizes, strict=True))
        resized = [resize_square(one, map_size) for one in own_size]
    found = []
    for label in sorted(set(x.labels)):
        members = [i for i, other in enumerate(x.labels) if other == label]
        truths, own = [x.truths[i] for i in members], resized and [resized[i] for i in members]
        found.append(measure(truths, scores[members].numpy(), own))
    means = mean_metrics(found)
    return {name: means[name] for name in METRICS if name in means}


def summarise(metrics: list[dict[str, float]], scores: list[torch.Tensor]) -> dict:
    """Means over seeds, and for several seeds their standard deviations."""
    summary = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
    if len(metrics) > 1:
        summary["std"] = {name: float(np.std([m[name] for m in metrics], ddof=1)) for name in metrics[0]}
        summary["score_std"] = float(torch.stack(scores).var(0).mean().sqrt())
        summary["seeds"] = metrics
    return summary


def to_markdown(ablation: Ablation, rows: list[dict]) -> str:
    """The table; the default is bold."""
    names = [name for name in METRIC_TITLES if any(name in rows[0][part] for part in SETS)]
    short = {name: METRIC_TITLES[name].split(" (")[0] for name in METRICS} | {"score_std": "score's deviation"}
    heads = [*ablation.columns, *(f"{part}: {short[name]}" for part in SETS for name in names)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row[column] for column in ablation.columns]
        for part in SETS:
            std = row[part].get("std", {})
            cells += [
                f"{row[part][n]:.3f}" + (f" ± {std[n]:.3f}" if n in std else "") if n in row[part] else "-"
                for n in names
            ]
        lines.append("| " + " | ".join(f"**{cell}**" if row["default"] else cell for cell in cells) + " |")
    return "\n".join(lines)


def draw(ablation: Ablation, rows: list[dict]) -> Figure:
    """A panel for each metric: lines over a quantity, a colour for each series, or bars."""
    names = [name for name in METRIC_TITLES if any(name in rows[0][part] for part in SETS)]
    num_rows, num_columns = {1: (1, 1), 4: (2, 2), 5: (2, 3)}[len(names)]  # all are defined on drawn defects
    width, height = (4.6, 3.2) if ablation.sweep else (5.2, 0.8 + 0.4 * len(rows))
    figure = Figure(figsize=(max(8, width * num_columns), height * num_rows + 0.6), dpi=110, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, sharey=not ablation.sweep).flatten()
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes, names, strict=False):
        (draw_sweep if ablation.sweep else draw_bars)(axis, ablation, rows, name)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = len(SETS) if not ablation.sweep else (len(labels) + 1) // 2  # a series above the other set's
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(ablation.title)
    return figure


def draw_sweep(axis: Axes, ablation: Ablation, rows: list[dict], name: str) -> None:
    """One metric over the last column's values, evenly spaced; what is no number stands apart from the line."""
    series, quantity = ablation.columns
    values = list(dict.fromkeys(row[quantity] for row in rows))
    numbers = [value for value in values if value.split(" (")[0].replace(".", "").isdigit()]
    for i, title in enumerate(dict.fromkeys(row[series] for row in rows)):
        own = {row[quantity]: row for row in rows if row[series] == title}
        for k, (part, style, marker, fill) in enumerate((("test", "-", "o", "full"), ("pasted", "--", "s", "none"))):
            for group in (numbers, [value for value in values if value not in numbers]):
                error = [own[value][part].get("std", {}).get(name, 0.0) for value in group]
                shift = 0.03 * (2 * i + k - 2.5) if any(error) else 0.0  # so that error bars stand side by side
                axis.errorbar(
                    [values.index(value) + shift for value in group],
                    [own[value][part].get(name, np.nan) for value in group],
                    yerr=error if any(error) else None,
                    linestyle=style if group is numbers else "none",
                    marker=marker,
                    fillstyle=fill,
                    markersize=5,
                    capsize=3,
                    color=COLORS[i],
                    label=f"{title}, {SETS[part]}" if group is numbers else None,
                )
    for value in {row[quantity] for row in rows if row["default"]}:
        line = axis.axvline(values.index(value), color="0.6", linestyle=":", zorder=0)
        axis.errorbar([], [], color="0.6", linestyle=line.get_linestyle(), label="default")
    axis.set_xticks(range(len(values)), [value.replace(" ", "\n", 1).replace(" + ", "\n+ ") for value in values])
    axis.set(xlabel=quantity, ylabel=METRIC_TITLES[name], yscale="log" if name == "score_std" else "linear")
    axis.grid(alpha=0.3)


def draw_bars(axis: Axes, ablation: Ablation, rows: list[dict], name: str) -> None:
    """One metric of each row, both sets, with the numbers."""
    for i, part in enumerate(("test", "pasted")):
        places = np.arange(len(rows)) + (0.2 if i else -0.2)
        values = [row[part].get(name, np.nan) for row in rows]  # no map, or not defined
        bars = axis.barh(places, values, 0.38, color=COLORS[i], label=SETS[part])
        axis.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
    titles = [", ".join(row[column] for column in ablation.columns) for row in rows]
    titles = [f"{title} (default)" if row["default"] else title for title, row in zip(titles, rows, strict=True)]
    axis.set_yticks(range(len(rows)), titles)
    axis.set(xlim=(0, 1.12), ylim=(len(rows) - 0.5, -0.5), xlabel=METRIC_TITLES[name])
    axis.set_xticks(np.arange(0, 1.01, 0.2))
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def insert(page: str, marker: str, text: str) -> str:
    """The page with this text between a marker and the next end.

    Raises:
        ValueError: The page has no such marker.
    """
    before, found, rest = page.partition(f"<!-- {marker} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not found or not end:
        raise ValueError(f"The page has no place for a table: <!-- {marker} --> and <!-- end -->, a line each.")
    return f"{before}{found}\n{text}\n\n{end}{after}"


def report(args: argparse.Namespace, facts: dict, results: dict[str, list[dict]]) -> None:
    """Writes ablations.json, ablations.md, the last result's figure, and the page if there is one."""
    folder = Path(args.output_dir)
    settings = {name: value for name, value in vars(args).items() if name not in PATHS}
    content = json.dumps({**facts, "arguments": settings, "ablations": results}, indent=2)
    tables = {name: to_markdown(ABLATIONS[name], rows) for name, rows in results.items()}
    last = list(results)[-1]
    with whole(folder / f"{last}.png") as partial:
        draw(ABLATIONS[last], results[last]).savefig(partial)
    lines = [
        f"# Ablations of {facts['model']} on {facts['data']}",
        f"{facts['num_test']} test images; {facts['num_pasted']} with pasted defects and without, of "
        f"{facts['num_pasted'] // 2} good images held out; statistics for these from {facts['num_good']} others. "
        f"Draws are compared on {facts['num_test_draws']} test and {facts['num_pasted_draws']} pasted images with "
        f"{args.num_seeds} noise seeds. Maps and masks at {args.map_size} x {args.map_size}, AUPRO up to a "
        "false-positive rate of 0.3, means over categories. Bold: the default.",
        " ".join(facts["told"]),
    ]
    for name, table in tables.items():
        ablation = ABLATIONS[name]
        question = ablation.question.format(
            map_size=facts["map_size"], weights=", ".join(s.title for s in SCORE_TYPES.values() if s.weighted)
        )
        lines += [f"## {ablation.title}", question, table, f"![{ablation.title}]({name}.png)"]
    texts = {folder / "ablations.json": content, folder / "ablations.md": "\n\n".join(lines) + "\n"}
    if args.page:
        page, text = Path(args.page), Path(args.page).read_text(encoding="utf-8")
        figures = os.path.relpath(folder, page.parent)
        for name, table in tables.items():
            picture = f"![{ABLATIONS[name].title}]({figures}/{name}.png)"
            text = insert(text, f"{folder.resolve().name} {name}", f"{table}\n\n{picture}")
        texts[page] = text
    for path, text in texts.items():
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8")


# -- the whole --------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> dict[str, list[dict]] | None:
    if args.dry_run:
        print(summarise_folder(args, args.category, read_masks=True).to_text())
        return None
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))  # of processes whose share is done
    accelerator, output_dir = Accelerator(cpu=cpu, kwargs_handlers=[patience]), Path(args.output_dir)
    share_cores()
    if args.page:  # before hours of work
        for name in ABLATIONS:
            insert(Path(args.page).read_text(encoding="utf-8"), f"{output_dir.resolve().name} {name}", "")
    pipeline = RADPipeline.load(args.model).to(accelerator.device)
    if pipeline.normality is None:
        raise ValueError(f"The model {args.model} has no normality: train it, or call fit_normality.")
    normality, categories = pipeline.normality, list(pipeline.normality.config.categories)
    own = list(normality.config.timesteps)
    timesteps = args.timesteps or pipeline.scheduler.steps_of_250(RESPACED_STEPS)
    further = sorted(set(timesteps) - set(own))
    chain = pipeline.scheduler.respaced_chain.timesteps
    nearest = [int(chain[np.abs(chain - t).argmin()]) for t in further]
    if nearest != further:
        raise ValueError(f"--timesteps {further} are not all on the respaced chain; the nearest that are: {nearest}.")

    # 1. Images: of those held out, one half gives statistics to the other, which gets defects
    dataset = load_split(args, "train", categories)
    if accelerator.is_main_process:
        print(summarise_folder(args, categories).to_text(), flush=True)
    train, statistics, others = split_good(args, dataset, normality.config.num_scores)
    good = [Truth(i, dataset.samples[i].category, "good", None) for i in sorted(statistics + others)]
    sets = {
        "pasted": DrawnDefects(AnomalyDataset([dataset.samples[i] for i in others]), len(others), args.seed),
        "test": load_split(args, "test", categories),
    }
    picked = {
        "pasted": range(2 * len(others)),
        "test": evenly(len(sets["test"]), args.max_test_samples),
    }
    seen = survey(sets["test"], picked["test"], pipeline.image_processor.resize)
    seen.check()
    accelerator.print("\n".join(seen.sentences()), flush=True)
    truths = {name: read_truths(sets[name], indices, args.map_size) for name, indices in picked.items()}
    picked = {
        "pasted": [2 * i + j for i in evenly(len(others), args.max_draw_samples // 2) for j in (0, 1)],
        "test": evenly(len(truths["test"]), args.max_draw_samples),
    }
    some = {name: [truths[name][i] for i in positions] for name, positions in picked.items()}
    compared = {truth.index for truth in some["test"]}
    Survey(tuple(one for one in seen.seen if one.index in compared)).check()

    # 2. Raw maps, each with the Gaussians of its set
    files = [(str(sample.image), sample.image.stat().st_size) for sample in [*sets["test"].samples, *dataset.samples]]
    settings = [files, further, args.max_draws, args.num_seeds, args.max_draw_samples, args.max_test_samples]
    settings += [args.max_good_samples, args.holdout_fraction, args.max_train_samples, args.seed, args.batch_size]
    sources = [Path(raw_maps.__file__), *sorted(Path(data.__file__).parent.glob("*.py"))]  # that draw defects, too
    settings += [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    folder = Path(args.raw_dir or output_dir / "raw") / fingerprint(pipeline, settings).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    fewer = refit(accelerator, pipeline, folder, dataset, train, statistics, args.batch_size)
    passes = Passes(pipeline, further, args.max_draws)

    def stored(name: str, of: AnomalyDataset, images: list[Truth], measure: Callable, *options: Any) -> RawMaps:
        def compute(batch: list[Truth]) -> dict[str, torch.Tensor]:
            return measure([of[t.index].image for t in batch], [t.category for t in batch], *options)

        return store(accelerator, folder / name, images, categories, args.batch_size, compute)

    maps = stored("good", dataset, good, passes.base, normality)
    draws = stored("good-draws", dataset, good, passes.draws, normality, 1)
    places = {truth.index: place for place, truth in enumerate(good)}
    half = [places[i] for i in statistics]
    evaluations = {}
    for name, model in (("pasted", fewer), ("test", normality)):
        base = stored(name, sets[name], truths[name], passes.base, model)
        several = stored(f"{name}-draws", sets[name], some[name], passes.draws, model, args.num_seeds)
        good_maps, good_draws = (maps.pick(half), draws.pick(half)) if name == "pasted" else (maps, draws)
        cpu_model = copy.deepcopy(model).cpu()
        evaluations[name] = Evaluation(base, good_maps, several, good_draws, cpu_model, sorted({*further, *own}))
    if not accelerator.is_main_process:
        return None

    # 3. Measure, and write what there is after each table
    facts = {
        "model": Path(args.model).resolve().name if Path(args.model).is_dir() else args.model,
        "data": Path(args.data_dir).resolve().name,
        "map_size": normality.config.map_size,
        "num_test": len(truths["test"]),
        "num_pasted": len(truths["pasted"]),
        "num_good": len(statistics),
        "num_test_draws": len(some["test"]),
        "num_pasted_draws": len(some["pasted"]),
        "truth": seen.to_dict(),
        "told": seen.sentences(),
    }
    options = {"draws": (args.max_draws, args.num_seeds, normality.config.num_noise_samples)}
    results = {}
    for ablation_name, ablation in ABLATIONS.items():
        rows = {}
        for name, x in evaluations.items():
            of = x.draws if ablation_name == "draws" else x.images
            with torch.no_grad():
                progress = tqdm(ablation.rows(x, *options.get(ablation_name, ())), f"{ablation.title}, {SETS[name]}")
                for setting, default, variants in progress:
                    metrics = [measure_setting(of, *variant, args.map_size) for variant in variants]
                    row = dict(zip(ablation.columns, setting, strict=True)) | {"default": default}
                    rows.setdefault(setting, row)[name] = summarise(metrics, [scores for _, scores in variants])
        results[ablation_name] = list(rows.values())
        report(args, facts, results)
        print(f"\n{ablation.title}\n\n{to_markdown(ablation, results[ablation_name])}\n", flush=True)
    return results


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
