#!/usr/bin/env python
"""Measures a pipeline on a data set and writes results.json, results.md and report.html.

accelerate launch training/evaluate.py --model mtd --data_dir MTD --dataset_format mtd --output_dir results

Each image's maps and scores are kept in OUTPUT_DIR/records as soon as they are there: the same command run again goes
on where the last one stopped, and several processes share the work (--config_file training/accelerate_configs/...).
"""

import argparse
import json
import os
import platform
import sys
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from PIL import Image
from scipy.ndimage import binary_dilation
from tqdm.auto import tqdm

from rad import RADImageProcessor, RADPipeline, __version__
from rad.data import DATASET_FORMATS, AnomalyDataset, load_dataset, load_hub_dataset
from rad.evaluation import (
    PastedDataset,
    Record,
    alpha_sweep,
    evenly,
    maps_and_masks,
    mean_metrics,
    measure_decisions,
    measure_records,
    pasted_defects,
    score_dataset,
)
from rad.metrics import pixel_curves, psnr
from rad.pipeline_rad import EMBEDDED_MODELS
from rad.report import COLUMNS, PUBLISHED, Picture, summary_tables, to_html, to_markdown
from rad.visualization import (
    curves_figure,
    histogram_figure,
    maps_figure,
    restoration_figure,
    sweep_figure,
    verdict_picture,
)

RATES = (0.01, 0.05, 0.1)  # false-alarm rates that are checked
ALPHAS = [i / 10 for i in range(11)]
NUM_PICTURED = 4  # of each sort in a category
CATEGORY = "{category}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="synthetic",
        help=f"Folder, Hub id or one of {', '.join(EMBEDDED_MODELS)}; {CATEGORY} stands for the category's name "
        "where each has its own.",
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data_dir", help="Folder of the data set.")
    data.add_argument("--dataset_name", help="Data set of the Hub.")
    parser.add_argument(
        "--dataset_format", default="auto", choices=("auto", *DATASET_FORMATS), help="Layout of --data_dir."
    )
    parser.add_argument("--dataset_config_name", help="Hub: configuration of the data set.")
    parser.add_argument("--dataset_split", default="test", help="Hub: split to measure on.")
    parser.add_argument("--image_column", default="image", help="Hub: column with the images.")
    parser.add_argument("--mask_column", help="Hub: column with the masks.")
    parser.add_argument("--label_column", help="Hub: column that tells good images from others.")
    parser.add_argument("--category_column", help="Hub: column with the categories.")
    parser.add_argument("--category", nargs="+", help="Categories to measure; by default all.")
    parser.add_argument(
        "--mode", default="calibrated", choices=("calibrated", "paper"), help="paper: RAN to the letter."
    )
    parser.add_argument("--unified", action="store_true", help="One model for all categories: RAN's table 2, not 1.")
    parser.add_argument("--infer_category", action="store_true", help="Let the pipeline guess each category.")
    parser.add_argument(
        "--pasted_defects",
        type=int,
        default=0,
        metavar="N",
        help=(
            "Measure on N good training images, each also with a pasted defect, and leave the test set alone: "
            "for choosing settings."
        ),
    )
    parser.add_argument("--num_noise_samples", type=int)
    parser.add_argument("--false_alarm_rate", type=float, default=0.01, help="Of the verdicts in the report.")
    parser.add_argument("--map_size", type=int, default=256, help="Maps and masks are compared at this square.")
    parser.add_argument("--figures", action="store_true", help="Also draw the paper's figures; scores in paper mode.")
    parser.add_argument("--restore", type=int, default=0, metavar="N", help="Also restore N anomalous images.")
    parser.add_argument("--max_test_samples", type=int, help="Measure on this many images, evenly picked.")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="By default a GPU if there is one.")
    parser.add_argument("--output_dir", required=True, help="Where everything is written.")
    args = parser.parse_args(argv)
    if args.unified and CATEGORY in args.model:
        parser.error(f"--unified measures one model for all categories, but --model has {CATEGORY} in it.")
    if not 0 < args.false_alarm_rate < 1:
        parser.error(f"--false_alarm_rate must lie between 0 and 1, got {args.false_alarm_rate}.")
    return args


def load_data(args: argparse.Namespace) -> AnomalyDataset:
    """The test split, or good training images with pasted defects."""
    if args.dataset_name:
        return load_hub_dataset(
            args.dataset_name,
            args.dataset_config_name,
            split=args.dataset_split,
            image_column=args.image_column,
            mask_column=args.mask_column,
            label_column=args.label_column,
            category_column=args.category_column,
            categories=args.category,
            only_good=False,
        )
    split = "train" if args.pasted_defects else "test"
    dataset = load_dataset(args.data_dir, args.dataset_format, split, args.category)
    if args.pasted_defects:
        return PastedDataset(pasted_defects(dataset, args.pasted_defects, (args.map_size,) * 2, args.seed))
    return dataset


def restore(
    args: argparse.Namespace, pipeline: RADPipeline, dataset: AnomalyDataset, record: Record
) -> dict[str, Any]:
    """Restores an anomalous image: does it then pass as good, and how much changed outside the true defect?

    The true mask is dilated by 1/16 of the side, because a defect's edge has no sharp end.
    """
    image = pipeline.image_processor.decode(dataset[record.index].image)
    known = [] if args.infer_category else pipeline.normality.config.categories
    label = record.category if record.category in known else None
    restored = pipeline.restore(image, class_labels=label, seed=args.seed)
    again = pipeline(restored.images[0], class_labels=label, seed=args.seed, false_alarm_rate=0.01)
    mask = np.asarray(Image.fromarray(record.mask()).resize(image.size, Image.Resampling.NEAREST))
    outside = ~binary_dilation(mask, np.ones((3, 3)), iterations=max(image.size) // 16)
    before, after = (np.asarray(x, np.float64) / 255 for x in (image, restored.images[0]))
    found = {"passed": not again.is_anomalous[0], "steps": len(restored.distances[0]) - 1}
    if outside.any():
        found["psnr"] = min(psnr(before, after, mask=outside), 100.0)  # equal pixels count as 100 dB
    return found


def measure_category(records: list[Record], score_type: str) -> dict[str, Any]:
    """Metrics of a score in a category, of each kind of defect beside the good images, and its curves."""
    main, has_masks = score_type == "fused", any(record.label and record.has_mask for record in records)
    good, defects = [record for record in records if not record.label], {}
    for defect in sorted({record.defect for record in records if record.label}):
        own = [record for record in records if record.defect == defect]
        defects[defect] = measure_records(good + own, score_type, pixels=main)
    masked = [record for record in records if record.has_mask]
    return {
        "metrics": measure_records(records, score_type),
        "defects": defects,
        "curves": pixel_curves(*maps_and_masks(masked, score_type), num_points=300) if has_masks else None,
    }


def share(jobs: list, work, description: str) -> list:
    """`work(job)` of each job, in order; each process does its part, all get all of it."""
    state = PartialState()
    own = list(enumerate(jobs))[state.process_index :: state.num_processes]
    progress = tqdm(own, description, disable=not state.is_local_main_process)
    return [found for _, found in sorted(gather_object([(i, work(job)) for i, job in progress]), key=lambda x: x[0])]


def write(path: Path, text: str) -> None:
    """The file is there as a whole or as it was."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def draw_category(
    args: argparse.Namespace,
    dataset: AnomalyDataset,
    records: list[Record],
    curves: dict[str, dict[str, np.ndarray]],
    thresholds: dict[str, dict] | None,
) -> dict[str, list[Picture]]:
    """What the report shows of a category: curves, score histogram, and the images that say most."""
    labels = np.array([record.label for record in records])
    scores = {name: np.array([record.scores[name] for record in records]) for name in records[0].scores}
    rate = f"{args.false_alarm_rate:g}"
    groups = {}
    if len(set(labels.tolist())) == 2:
        groups["Curves"] = [Picture(curves_figure(scores, labels, curves), "Curves of each score type.")]
    threshold = thresholds and thresholds["fused"]["image"][rate]
    good, bad = (scores["fused"][labels == label] for label in (0, 1))
    drawn = histogram_figure(good, bad, threshold, args.false_alarm_rate)
    groups["Scores of good and defective images"] = [Picture(drawn, "Histogram of the fused image scores.")]

    def picture(record: Record) -> Picture:
        source, verdict, alarm = dataset.samples[record.index].image, "", False
        name = "/".join(source.parts[-2:]) if isinstance(source, Path) else f"image {record.index}"
        if thresholds:
            alarm = record.p_values["fused"] <= args.false_alarm_rate
            verdict = ("false alarm", "found")[record.label] if alarm else ("passed", "missed")[record.label]
            verdict = f"{verdict}, p = {record.p_values['fused']:.2g}, "
        drawn = verdict_picture(
            RADImageProcessor().decode(dataset[record.index].image),
            record.map("fused"),
            record.mask(),
            thresholds and thresholds["fused"]["pixel"][rate],
            alarm,
        )
        return Picture(drawn, f"{name} ({record.defect}): {verdict}score {record.scores['fused']:.2f}", lossless=False)

    ranked = sorted(records, key=lambda record: record.scores["fused"])
    for heading, label, order in (
        ("Good images that look worst", 0, ranked[::-1]),
        ("Defective images that look best", 1, ranked),
        ("Clearest defects", 1, ranked[::-1]),
    ):
        shown = [record for record in order if record.label == label][:NUM_PICTURED]
        if shown:
            groups[heading] = [picture(record) for record in shown]
    return groups


def draw_figures(
    dataset: AnomalyDataset, records: list[Record], paper_records: list[Record], restored: list[tuple]
) -> dict[str, Picture]:
    """RAN's figures 1, 5, 6 and 7 on these images, by file name."""
    bad = [record for record in records if record.label and record.has_mask]
    shown = [bad[i] for i in evenly(len(bad), 5)]
    in_paper_mode = {record.index: record for record in paper_records}
    figures = {}
    if shown:
        pictures = [RADImageProcessor().decode(dataset[record.index].image) for record in shown]
        names = sorted(shown[0].scores, key=lambda name: (name == "fused", name != "rgb"))
        columns = {"truth": [record.mask() for record in shown]}
        columns |= {name: [record.map(name) for record in shown] for name in names}
        drawn = maps_figure(pictures, columns)
        figures["methods"] = Picture(drawn, "Score types side by side, as RAN's figure 1.")
        paper = [in_paper_mode[record.index] for record in shown]
        columns = {"truth": [record.mask() for record in paper]}
        columns |= {name: [record.map(name) for record in paper] for name in ("pixel", "feature", "fused")}
        drawn = maps_figure(pictures, columns)
        figures["kl_and_fused"] = Picture(
            drawn, "KL, feature error and their fusion in paper mode, as RAN's figure 6."
        )
    if restored:
        drawn = restoration_figure(*zip(*restored, strict=True))
        caption = "Restoration step by step and the distance to good images, as RAN's figure 7."
        figures["restoration"] = Picture(drawn, caption)
    return figures


def main(args: argparse.Namespace) -> dict[str, Any]:
    cpu = args.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))
    device, folder, rates = args.device or state.device, Path(args.output_dir), sorted({*RATES, args.false_alarm_rate})
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, os.cpu_count() // state.num_processes))  # accelerate launch allows each one only
    if state.is_local_main_process:
        folder.mkdir(parents=True, exist_ok=True)

    # 1. Score: one model after another, each on its categories
    dataset = load_data(args)
    indices = evenly(len(dataset), args.max_test_samples)
    categories = sorted({dataset.samples[i].category for i in indices})
    models = {}
    for category in categories:
        models.setdefault(args.model.replace(CATEGORY, category), []).append(category)
    records, paper_records, thresholds, restorations, restored = [], [], {}, [], []
    for number, (model, own_categories) in enumerate(models.items()):
        pipeline = RADPipeline.load(model).to(device)
        members = [i for i in indices if dataset.samples[i].category in own_categories]
        common = {"infer_category": args.infer_category, "batch_size": args.batch_size}
        common |= {"num_noise_samples": args.num_noise_samples, "seed": args.seed, "folder": folder / "records"}
        found = score_dataset(pipeline, dataset, members, map_size=args.map_size, mode=args.mode, **common)
        records += found
        bad = [record for record in found if record.label and record.has_mask]
        if args.mode == "calibrated":
            normality = pipeline.normality
            own = {"num_scores": normality.config.num_scores}
            for name in found[0].scores:
                own[name] = {
                    "image": {f"{rate:g}": normality.score_threshold(rate, name) for rate in rates},
                    "pixel": {f"{rate:g}": normality.pixel_threshold(rate, name) for rate in rates},
                }
            thresholds |= dict.fromkeys(own_categories, own)
        if args.restore:
            chosen = [bad[i] for i in evenly(len(bad), args.restore)]
            restorations += share(
                chosen, lambda record, pipeline=pipeline: restore(args, pipeline, dataset, record), "Restoring"
            )
        if args.figures:
            size = pipeline.config.resolution
            paper_records += score_dataset(
                pipeline, dataset, members, map_size=size, mode="paper", at_resolution=True, **common
            )

            def steps(record: Record, pipeline: RADPipeline = pipeline) -> tuple[list[Image.Image], np.ndarray]:
                label = record.used_category
                found = pipeline.restore(dataset[record.index].image, class_labels=label, seed=args.seed)
                return found.intermediates[0], found.distances[0]

            if number == 0 and pipeline.normality is not None:
                restored = share([bad[i] for i in evenly(len(bad), 3)], steps, "Restoring")

    # 2. Measure
    by_category = {name: [record for record in records if record.category == name] for name in categories}
    jobs = [(category, name) for name in records[0].scores for category in categories]
    measured = share(jobs, lambda job: measure_category(by_category[job[0]], job[1]), "Measuring")
    measured = dict(zip(jobs, measured, strict=True))
    scores = {}
    for name in records[0].scores:
        rows = {category: measured[category, name] for category in categories}
        decided = {}
        if thresholds:
            groups = {None: records} | by_category
            for group, of in groups.items():
                num_scores = min(thresholds[record.category]["num_scores"] for record in of)
                decided[group] = measure_decisions(of, name, rates, num_scores)
            decided = {"all": decided.pop(None), "categories": decided}
        scores[name] = {
            "mean": mean_metrics(row["metrics"] for row in rows.values()),
            "categories": {category: row["metrics"] for category, row in rows.items()},
            "defects": {category: row["defects"] for category, row in rows.items()},
            "decisions": decided,
        }
    labels = np.array([record.label for record in records])
    results = {
        "data": Path(args.data_dir or args.dataset_name).name,
        "arguments": vars(args),
        "published": list(PUBLISHED)[args.unified] if args.unified or args.mode == "paper" else None,
        "versions": {"rad": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "timm", "numpy", "scikit-learn")},
        "device": f"{device}, {state.num_processes} processes, {torch.get_num_threads()} threads",
        "categories": categories,
        "num_good": int((labels == 0).sum()),
        "num_anomalous": int(labels.sum()),
        "seconds_per_image": float(np.mean([record.seconds for record in records])),
        "thresholds": thresholds,
        "scores": scores,
    }
    if records[0].used_category is not None:
        hits = [record.used_category == record.category for record in records]
        results["category_accuracy"] = float(np.mean(hits))
    if restorations:
        fidelity = [found["psnr"] for found in restorations if "psnr" in found]
        results["restoration"] = {
            "num_images": len(restorations),
            "share_below_1_percent_threshold": float(np.mean([found["passed"] for found in restorations])),
            "psnr_outside_mask_median_db": float(np.median(fidelity)),
            "share_psnr_at_least_35_db": float(np.mean(np.array(fidelity) >= 35)),
            "mean_steps": float(np.mean([found["steps"] for found in restorations])),
        }
    if paper_records:
        of = {name: [record for record in paper_records if record.category == name] for name in categories}
        jobs = [(alpha, category) for alpha in ALPHAS for category in categories]
        found = share(jobs, lambda job: alpha_sweep(of[job[1]], job[0]), "Sweeping alpha")
        results["alpha_sweep"] = {
            f"{alpha:g}": mean_metrics(row for (a, _), row in zip(jobs, found, strict=True) if a == alpha)
            for alpha in ALPHAS
        }
    if not state.is_main_process:
        return results

    # 3. Write
    figures = draw_figures(dataset, records, paper_records, restored) if args.figures else {}
    if paper_records:
        rows = results["alpha_sweep"].values()
        names = [name for name in ("image_auroc", "pixel_auroc", "aupro") if all(name in row for row in rows)]
        drawn = sweep_figure(ALPHAS, {COLUMNS[name]: [row[name] for row in rows] for name in names})
        figures["alpha_sweep"] = Picture(
            drawn, "The weight of KL beside the feature error in paper mode, as RAN's figure 5."
        )
    for name, picture in figures.items():
        (folder / "figures").mkdir(exist_ok=True)
        picture.image.save(folder / "figures" / f"{name}.png")
    sections = {
        category: draw_category(
            args,
            dataset,
            by_category[category],
            {name: measured[category, name]["curves"] for name in scores if measured[category, name]["curves"]},
            thresholds.get(category),
        )
        for category in tqdm(categories, "Drawing")
    }
    write(folder / "results.json", json.dumps(results, indent=2))
    write(folder / "results.md", to_markdown(results))
    write(folder / "report.html", to_html(results, sections, figures.values()))
    print("\n\n".join(table.to_markdown() for table in summary_tables(results)))
    for name in ("category_accuracy", "restoration"):
        if name in results:
            print(f"\n{name.replace('_', ' ').capitalize()}: {json.dumps(results[name])}")
    print(f"\nThe report: {folder / 'report.html'}")
    return results


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
