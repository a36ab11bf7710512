#!/usr/bin/env python
"""Measures RAD and its peers on several data sets and averages over them: what holds on one may fail on another.

    python training/suite.py --data_root datasets --output_dir suite

On each set: a model trained for it, one that was only fitted to it (`train.py --fit_only`: the synthetic set's
networks, this set's good images), every score of both alone, PaDiM and PatchCore, all by `compare.py`. A set counts
once in the averages, whatever its size; one of several categories is the mean of these.

The sets are folders below --data_root: MTD, mvtec_ad (bottle and grid), piped (eight papers), and synthetic, which is
made if it is not there. Magnetic tiles, papers and synthetic have embedded models; for the others give --trained
bottle=FOLDER, or --train for `train.py` with its defaults, which takes an hour each on two cores. A set without is
told by a dash. On the synthetic set RAD has an advantage: its weights are chosen on defects drawn as that set's are,
and what is fitted to it was trained on it.

What is fitted and measured stays in the output folder, and the same command goes on where it stopped; after the code
or a model has changed, --refit measures RAD anew beside its peers.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

import compare
import numpy as np
from ablate import insert
from matplotlib.figure import Figure

from rad.data.synthetic import write_synthetic
from rad.evaluation import METRICS
from rad.files import whole

PEERS = ("padim", "patchcore")
TITLES = {"trained": "RAD", "fitted": "RAD fitted", "peers": ""}  # kinds of models, and what tables call RAD's


@dataclass(frozen=True)
class Set:
    """A data set of the suite.

    Attributes:
        title: As tables have it.
        folder: Below --data_root.
        dataset_format: Its layout.
        categories: Those that count; None for all.
        trained: The embedded model for it, if there is one.
    """

    title: str
    folder: str
    dataset_format: str
    categories: tuple[str, ...] | None = None
    trained: str | None = None


SETS = {
    "mtd": Set("MTD", "MTD", "mtd", trained="mtd"),
    "synthetic": Set("synthetic", "synthetic", "mvtec", trained="synthetic"),
    "bottle": Set("bottle", "mvtec_ad", "mvtec", ("bottle",)),
    "grid": Set("grid", "mvtec_ad", "mvtec", ("grid",)),
    "papers": Set("papers", "piped", "mvtec", trained="paper"),
}


def named_model(text: str) -> tuple[str, str]:
    """NAME=MODEL, as --trained takes it."""
    name, equals, model = text.partition("=")
    if name not in SETS or not equals or not model:
        raise argparse.ArgumentTypeError(f"must be SET=MODEL with a set of {', '.join(SETS)}, got {text!r}")
    return name, model


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=expanduser, required=True, help="Folder of the data sets' folders.")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="Sets to measure.")
    parser.add_argument(
        "--trained", nargs="+", type=named_model, default=[], metavar="SET=MODEL", help="Models trained for a set."
    )
    parser.add_argument("--train", action="store_true", help="Train those that are missing, by train.py's defaults.")
    parser.add_argument("--fit_model", default="synthetic", help="Whose networks serve where nothing is trained.")
    parser.add_argument(
        "--refit", action="store_true", help="Fit and measure RAD anew; peers and what --train trained stay."
    )
    parser.add_argument(
        "--max_test_samples", type=int, help="For a quick look: this many test images of each category, evenly picked."
    )
    parser.add_argument("--max_train_samples", type=int, help="Likewise: fit to this many good images of each set.")
    parser.add_argument("--device", help="By default a GPU if there is one.")
    parser.add_argument("--output_dir", type=expanduser, default="suite", help="For all that is made and measured.")
    parser.add_argument(
        "--page",
        help="Also put table and figure into this Markdown file, between <!-- suite --> and <!-- end -->.",
    )
    return parser.parse_args(argv)


# -- measuring --------------------------------------------------------------------------------------------------------


def data_flags(name: str, args: argparse.Namespace, flag: str) -> list[str]:
    """What names a set's images to `train.py` and `compare.py`, which call the folder differently."""
    own = SETS[name]
    flags = [flag, str(Path(args.data_root) / own.folder), "--dataset_format", own.dataset_format]
    return [*flags, "--category", *own.categories] if own.categories else flags


def train(name: str, args: argparse.Namespace, output_dir: Path, *flags: object) -> Path:
    """A model of `train.py`, unless the folder has it already; one that is half trained is finished.

    Raises:
        OSError: The training failed; it has said why.
    """
    if not (output_dir / "model_index.json").exists():
        script = Path(__file__).with_name("train.py")
        command = [sys.executable, script, *data_flags(name, args, "--train_data_dir"), "--output_dir", output_dir]
        command += ["--no-evaluate", *flags]
        command += ["--max_train_samples", args.max_train_samples] if args.max_train_samples else []
        if subprocess.run([str(part) for part in command]).returncode:
            raise OSError(f"Training for the set {name} failed; its own message stands above.")
    return output_dir


def measure(name: str, kind: str, model: str | Path, args: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Metrics of the rows of `compare.py` of one kind on one set, {row: {metric: value}}."""
    methods, output_dir = PEERS if kind == "peers" else ("rad",), Path(args.output_dir) / name / kind
    flags = ["--model", model, *data_flags(name, args, "--data_dir"), "--output_dir", output_dir]
    flags += ["--latency_images", 1, "--methods", *methods]
    for flag in ("max_train_samples", "max_test_samples", "device"):
        flags += [f"--{flag}", getattr(args, flag)] if getattr(args, flag) else []
    flags += ["--refit", "rad"] if args.refit and kind != "peers" else []
    rows = compare.main(compare.parse_args([str(part) for part in flags]))
    titles = {row["method"]: row["method"].replace("RAD", TITLES[kind]) for row in rows}
    return {titles[row["method"]]: {metric: row[metric] for metric in METRICS} for row in rows}


# -- showing ----------------------------------------------------------------------------------------------------------


def averages(results: Mapping[str, Mapping[str, dict]]) -> dict[str, dict[str, float | None]]:
    """Means over sets of each row of {set: {row: {metric: value}}}; None for a row that not all sets have."""
    rows = dict.fromkeys(row for found in results.values() for row in found)
    means: dict[str, dict[str, float | None]] = {}
    for row in rows:
        of_sets = [found.get(row, {}) for found in results.values()]
        values = {metric: [one.get(metric) for one in of_sets] for metric in METRICS}
        means[row] = {m: None if None in each else float(np.mean(each)) for m, each in values.items()}
    return means


def to_markdown(results: Mapping[str, Mapping[str, dict]]) -> str:
    """A table of each set's image AUROC and AUPRO, and of all four metrics' means over sets."""

    def cell(values: Mapping[str, float | None], metrics: Sequence[str]) -> str:
        return " / ".join("-" if values.get(m) is None else f"{values[m]:.3f}" for m in metrics)

    means = averages(results)
    heading = [
        "method",
        *(SETS[name].title for name in results),
        "mean: " + " / ".join(compare.COLUMNS[m][0] for m in METRICS),
    ]
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for row, mean in means.items():
        cells = [cell(found.get(row, {}), ("image_auroc", "aupro")) for found in results.values()]
        lines.append("| " + " | ".join([row, *cells, cell(mean, METRICS)]) + " |")
    told = "Each set: image AUROC / AUPRO (FPR <= 0.3). A set counts once in the mean; a dash where a set lacks a row."
    return "\n".join([*lines, "", told])


def draw(results: Mapping[str, Mapping[str, dict]]) -> Figure:
    """Image AUROC, pixel AP and AUPRO of whole methods, a panel each: a point on each set, a bar for the mean."""
    means = averages(results)
    rows = [row for row in means if not row.endswith("alone")]
    figure = Figure(figsize=(13, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, metric in zip(axes, ("image_auroc", "pixel_ap", "aupro"), strict=True):
        for place, row in enumerate(rows):
            shift = 0.8 * ((place + 0.5) / len(rows) - 0.5)
            values = [found.get(row, {}).get(metric) for found in results.values()]
            at = [i + shift for i, value in enumerate(values) if value is not None]
            axis.plot(at, [v for v in values if v is not None], "o", color=f"C{place}", label=row)
            if means[row][metric] is not None:
                axis.plot(len(results) + shift, means[row][metric], "_", color=f"C{place}", markersize=14, mew=3)
        axis.set_xticks(range(len(results) + 1), [*(SETS[name].title for name in results), "mean"], rotation=30)
        axis.set_ylabel(compare.COLUMNS[metric][0])
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rows), frameon=False)
    return figure


def main(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float | None]]]:
    folder, trained = Path(args.output_dir), dict(args.trained)
    if args.page:  # before hours of work
        insert(Path(args.page).read_text(encoding="utf-8"), "suite", "")
    missing = [name for name in args.sets if not (Path(args.data_root) / SETS[name].folder).is_dir()]
    if folders := ", ".join(SETS[name].folder for name in missing if name != "synthetic"):
        raise FileNotFoundError(f"There is no {folders} in {args.data_root}: put it there, or leave it out of --sets.")
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        write_synthetic(Path(args.data_root) / SETS["synthetic"].folder, num_train=150)

    results: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in args.sets:
        # 1. Models: one trained for the set, and one that is fitted to it only
        told = f"{Path(args.fit_model).name}-{args.max_train_samples or 'all'}"  # what else the fit depends on
        fitted_dir = folder / name / f"model-fitted-{told}"
        if args.refit:
            (fitted_dir / "model_index.json").unlink(missing_ok=True)
        fit_flags = ("--fit_only", "--pretrained_model_name_or_path", args.fit_model, "--overwrite_output_dir")
        models = {"fitted": train(name, args, fitted_dir, *fit_flags), "peers": args.fit_model}
        if model := trained.get(name) or SETS[name].trained:
            models["trained"] = model
        elif args.train:
            models["trained"] = train(name, args, folder / name / "model", "--resume_from_checkpoint", "latest")

        # 2. Measure
        found = {kind: measure(name, kind, models[kind], args) for kind in TITLES if kind in models}
        results[name] = {row: metrics for rows in found.values() for row, metrics in rows.items()}
        texts = {"suite.json": json.dumps({"sets": results, "mean": averages(results)}, indent=2)}
        texts["suite.md"] = to_markdown(results) + "\n"
        for file, text in texts.items():
            with whole(folder / file) as partial:
                partial.write_text(text, encoding="utf-8")
    figure = draw(results)
    for path in [folder / "suite.png", *([Path(args.page).with_name("suite.png")] if args.page else [])]:
        with whole(path) as partial:
            figure.savefig(partial)
    if args.page:
        page = Path(args.page)
        shown = f"{to_markdown(results)}\n\n![Image AUROC, pixel AP and AUPRO on each set and their means](suite.png)"
        text = insert(page.read_text(encoding="utf-8"), "suite", shown)
        with whole(page) as partial:
            partial.write_text(text, encoding="utf-8")
    print(to_markdown(results))
    return results


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
