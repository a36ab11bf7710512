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
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env
from data_arguments import add_data_arguments, load_split, summarise_folder, without_folder
from launching import share_cores
from PIL import Image
from scipy.ndimage import binary_dilation
from tqdm.auto import tqdm

from rad import RADPipeline, __version__
from rad.data import AnomalyDataset, load_hub_dataset
from rad.data.dataset import evenly
from rad.data.drawn import DrawnDefects
from rad.data.masks import resize_mask
from rad.data.summary import DataSummary, summarise
from rad.evaluation import (
    LIBRARIES,
    Record,
    alpha_sweep,
    curves_of_records,
    mean_metrics,
    measure_decisions,
    measure_records,
    score_dataset,
)
from rad.files import whole
from rad.image_reader import decode
from rad.metrics import IMAGE_METRICS, PIXEL_METRICS, psnr
from rad.models.evidence import SCORE_TYPES
from rad.pipeline_loading import EMBEDDED_MODELS
from rad.report import PUBLISHED, Picture, draw_category, draw_figures, summary_tables, to_html, to_markdown
from rad.truths import Survey, share_work, survey
from rad.visualization import OUTLINE, outline, restoration_sheet

RATES = (0.01, 0.05, 0.1)  # false-alarm rates that are checked
ALPHAS = [i / 10 for i in range(11)]
CATEGORY = "{category}"
SHEET_SIDE = 160  # pixels of a picture on the contact sheet of restorations


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="synthetic",
        help=f"Folder, Hub id or one of {', '.join(EMBEDDED_MODELS)}; {CATEGORY} stands for the category's name "
        "where each has its own.",
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data_dir", type=expanduser, help="Folder of the data set.")
    data.add_argument("--dataset_name", help="Data set of the Hub.")
    add_data_arguments(parser.add_argument)
    parser.add_argument("--skip_unreadable", action="store_true", help="Leave out images that cannot be read.")
    parser.add_argument("--dataset_config_name", help="Hub: configuration of the data set.")
    parser.add_argument("--dataset_split", default="test", help="Hub: split to measure on.")
    parser.add_argument("--image_column", default="image", help="Hub: column with the images.")
    parser.add_argument("--mask_column", help="Hub: column with the masks.")
    parser.add_argument("--label_column", help="Hub: column that tells good images from others.")
    parser.add_argument("--category_column", help="Hub: column with the categories.")
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
            "Measure on N good training images, each also with a drawn defect, and leave the test set alone. The "
            "model has seen them: to choose settings, use ablate.py."
        ),
    )
    parser.add_argument("--num_noise_samples", type=int)
    parser.add_argument("--false_alarm_rate", type=float, default=0.01, help="Of the verdicts in the report.")
    parser.add_argument("--map_size", type=int, default=256, help="Maps and masks are compared at this square.")
    parser.add_argument("--figures", action="store_true", help="Also draw the paper's figures; scores in paper mode.")
    parser.add_argument(
        "--restore", type=int, default=0, metavar="N", help="Also restore N anomalous images, of each model."
    )
    parser.add_argument("--max_test_samples", type=int, help="Measure on this many images, evenly picked.")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument(
        "--seed",
        type=int,
        help="Of the noise, by default that of the model's statistics, or 0 without any; and of drawn defects, 0.",
    )
    parser.add_argument("--device", help="By default a GPU if there is one.")
    parser.add_argument("--output_dir", type=expanduser, required=True, help="Where everything is written.")
    args = parser.parse_args(argv)
    if args.unified and CATEGORY in args.model:
        parser.error(f"--unified measures one model for all categories, but --model has {CATEGORY} in it.")
    if args.dataset_name and not args.label_column:
        parser.error("--dataset_name needs --label_column, the column that tells good images from others.")
    if args.dataset_name and args.pasted_defects:
        parser.error("--pasted_defects takes the training images of --data_dir, not of --dataset_name.")
    if not 0 < args.false_alarm_rate < 1:
        parser.error(f"--false_alarm_rate must lie between 0 and 1, got {args.false_alarm_rate}.")
    return args


def load_data(args: argparse.Namespace) -> AnomalyDataset:
    """The test split, or good training images with drawn defects."""
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
            good_only=False,
        )
    split = "train" if args.pasted_defects else "test"
    dataset = load_split(args, split, args.category)
    if args.pasted_defects:
        return DrawnDefects(dataset, args.pasted_defects, args.seed or 0)
    return dataset


def summarise_data(
    args: argparse.Namespace, dataset: AnomalyDataset | None = None, read_masks: bool = False
) -> DataSummary:
    """What is read of the data set that the arguments name; `dataset` is what `load_data` gave, if it was asked."""
    if not args.dataset_name:
        return summarise_folder(args, args.category, read_masks)
    return summarise({"test": dataset or load_data(args)}, name=Path(args.dataset_name).name)


def false_alarm_rates(args: argparse.Namespace) -> list[float]:
    """Those that are checked."""
    return sorted({*RATES, args.false_alarm_rate})


def restore(
    args: argparse.Namespace, pipeline: RADPipeline, dataset: AnomalyDataset, record: Record
) -> dict[str, Any]:
    """Restores an anomalous image: does it pass as good, how much changed outside the true defect, and how near is the
    inside to the image without it, where that is known?

    The true mask is dilated by 1/16 of the side, because a defect's edge has no sharp end.
    """
    image = dataset[record.index].image
    known = [] if args.infer_category else pipeline.categories
    label = record.category if record.category in known else None
    restored = pipeline.restore(image, class_labels=label, false_alarm_rate=0.01)
    pixel_range = pipeline.image_processor.pixel_range
    pair = decode(image, pixel_range), restored.images[0]
    before, after = (np.asarray(picture, np.float64) / 255 for picture in pair)
    mask = resize_mask(record.mask(), before.shape[:2])
    outside = ~binary_dilation(mask, np.ones((3, 3)), iterations=max(mask.shape) // 16)
    found = {
        "was_found": record.p_values.get("fused", 1.0) <= 0.01,
        "passed": not restored.is_anomalous[0],
        "steps": len(restored.distances[0]) - 1,
    }
    for picture in pair:
        picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
    found["pair"] = (outline(pair[0], resize_mask(record.mask(), pair[0].size[::-1]), OUTLINE), pair[1])
    if outside.any():
        found["psnr"] = min(psnr(before, after, mask=outside), 100.0)  # equal pixels count as 100 dB
    if isinstance(dataset, DrawnDefects):
        good = np.asarray(decode(dataset.original(record.index), pixel_range), np.float64) / 255
        found["psnr_inside"] = min(psnr(good, after, mask=mask), 100.0)
    return found


def draw_restorations(restorations: list[dict[str, Any]]) -> Picture:
    """All of them on one sheet."""
    captions = []
    for restored in restorations:
        before = "found" if restored["was_found"] else "not found"
        captions.append(f"{before}, {'good' if restored['passed'] else 'still odd'} afterwards")
    sheet = restoration_sheet([restored["pair"] for restored in restorations], captions, SHEET_SIDE)
    words = "Images with the outline of their defects, and what they were restored to; verdicts at 1 %."
    return Picture(sheet, words, lossless=False)


def measure_category(records: list[Record], score_type: str) -> dict[str, Any]:
    """Metrics of a score in a category, None where not defined, of each kind of defect beside the good images, and its
    curves."""
    good, defects = [record for record in records if not record.label], {}
    names = IMAGE_METRICS + (PIXEL_METRICS if SCORE_TYPES[score_type].has_map else ())
    for defect in sorted({record.defect for record in records if record.label}):
        own = [record for record in records if record.defect == defect]
        defects[defect] = measure_records(good + own, score_type, pixels=score_type == "fused")
    return {
        "metrics": dict.fromkeys(names) | measure_records(records, score_type),
        "defects": defects,
        "curves": curves_of_records(records, score_type),
    }


@dataclass
class Found:
    """What scoring gave.

    Attributes:
        records: Of all images.
        paper_records: Likewise in paper mode at the pipeline's resolution, for the paper's figures.
        thresholds: For each category the image and pixel thresholds of each score type, by false-alarm rate, the range
            of its heat's colours, and the smallest p-value that good images bear out.
        restorations: From `restore`.
        restored: For a few images the intermediate pictures and the distances of their restoration.
    """

    records: list[Record] = field(default_factory=list)
    paper_records: list[Record] = field(default_factory=list)
    thresholds: dict[str, dict[str, Any]] = field(default_factory=dict)
    restorations: list[dict[str, Any]] = field(default_factory=list)
    restored: list[tuple[list[Image.Image], np.ndarray]] = field(default_factory=list)


def score(
    args: argparse.Namespace, pipeline: RADPipeline, dataset: AnomalyDataset, indices: list[int], found: Found
) -> None:
    """Scores images that one pipeline is for, and adds what was found."""
    common = {"folder": Path(args.output_dir) / "records", "batch_size": args.batch_size, "seed": args.seed}
    common |= {"infer_category": args.infer_category, "num_noise_samples": args.num_noise_samples}
    if pipeline.normality is None and args.restore:
        raise ValueError(f"--restore needs statistics of good images, and {args.model} has none.")
    records = score_dataset(pipeline, dataset, indices, map_size=args.map_size, mode=args.mode, **common)
    bad, normality = [record for record in records if record.label and record.has_mask], pipeline.normality
    if args.mode == "calibrated":
        thresholds = {"num_scores": normality.config.num_scores, "p_value_resolution": normality.p_value_resolution}
        rates = {f"{rate:g}": rate for rate in false_alarm_rates(args)}
        for name in records[0].scores:
            thresholds[name] = {"image": {k: normality.score_threshold(rate, name) for k, rate in rates.items()}}
            if SCORE_TYPES[name].has_map:
                thresholds[name]["pixel"] = {k: normality.pixel_threshold(rate, name) for k, rate in rates.items()}
                thresholds[name]["heat_range"] = list(normality.heat_range(name))
        found.thresholds |= dict.fromkeys(sorted({record.category for record in records}), thresholds)
    if args.restore:
        chosen = [bad[i] for i in evenly(len(bad), args.restore)]
        found.restorations += share_work(chosen, lambda record: restore(args, pipeline, dataset, record), "Restoring")
    if args.figures:
        size = pipeline.config.resolution
        found.paper_records += score_dataset(
            pipeline, dataset, indices, map_size=size, mode="paper", at_resolution=True, **common
        )
    if args.figures and not found.restored and normality is not None:  # of the first model only

        def steps(record: Record) -> tuple[list[Image.Image], np.ndarray]:
            image = dataset[record.index].image
            output = pipeline.restore(image, class_labels=record.used_category)
            return output.intermediates[0], output.distances[0]

        found.restored += share_work([bad[i] for i in evenly(len(bad), 3)], steps, "Restoring")
    found.records += records


def measure(args: argparse.Namespace, found: Found) -> tuple[dict[str, Any], dict[str, dict[str, dict]]]:
    """What results.json says of the records, and the curves of each category and score type."""
    # 1. Each score in each category, and their means
    categories, score_types = sorted({r.category for r in found.records}), list(found.records[0].scores)
    members = {name: [record for record in found.records if record.category == name] for name in categories}
    jobs = [(name, category) for name in score_types for category in categories]
    rows = share_work(jobs, lambda job: measure_category(members[job[1]], job[0]), "Measuring")
    rows = dict(zip(jobs, rows, strict=True))
    scores = {}
    for name in score_types:
        decisions = {}
        if found.thresholds:

            def decide(records: list[Record], name: str = name) -> list[dict[str, Any]]:
                num_scores = min(found.thresholds[record.category]["num_scores"] for record in records)
                return measure_decisions(records, name, false_alarm_rates(args), num_scores)

            decisions = {"all": decide(found.records), "categories": {c: decide(members[c]) for c in categories}}
        scores[name] = {
            "mean": mean_metrics(rows[name, category]["metrics"] for category in categories),
            "categories": {category: rows[name, category]["metrics"] for category in categories},
            "defects": {category: rows[name, category]["defects"] for category in categories},
            "decisions": decisions,
        }
    labels = [record.label for record in found.records]
    results = {
        "categories": categories,
        "num_good": labels.count(0),
        "num_anomalous": labels.count(1),
        "seconds_per_image": float(np.mean([record.seconds for record in found.records])),
        "thresholds": found.thresholds,
        "scores": scores,
    }
    curves = {c: {n: rows[n, c]["curves"] for n in score_types if rows[n, c]["curves"]} for c in categories}

    # 2. What was asked for beside them
    if args.infer_category and found.records[0].used_category is not None:
        hits = [record.used_category == record.category for record in found.records]
        results["category_accuracy"] = float(np.mean(hits))
    if found.restorations:
        fidelity = [restored["psnr"] for restored in found.restorations if "psnr" in restored]
        inside = [restored["psnr_inside"] for restored in found.restorations if "psnr_inside" in restored]
        of_found = [restored["passed"] for restored in found.restorations if restored["was_found"]]
        results["restoration"] = {
            "num_images": len(found.restorations),
            "num_found": len(of_found),
            "share_of_found_below_1_percent_threshold": float(np.mean(of_found)) if of_found else None,
            "share_below_1_percent_threshold": float(np.mean([r["passed"] for r in found.restorations])),
            # Where each image is defect all over, none
            "psnr_outside_mask_median_db": float(np.median(fidelity)) if fidelity else None,
            "share_psnr_at_least_35_db": float(np.mean(np.array(fidelity) >= 35)) if fidelity else None,
            "psnr_inside_mask_median_db": float(np.median(inside)) if inside else None,
            "share_psnr_inside_at_least_25_db": float(np.mean(np.array(inside) >= 25)) if inside else None,
            "mean_steps": float(np.mean([r["steps"] for r in found.restorations])),
        }
    if found.paper_records:
        members = {name: [r for r in found.paper_records if r.category == name] for name in categories}
        jobs = [(alpha, category) for alpha in ALPHAS for category in categories]
        rows = share_work(jobs, lambda job: alpha_sweep(members[job[1]], job[0]), "Sweeping alpha")
        results["alpha_sweep"] = {
            f"{alpha:g}": mean_metrics(row for job, row in zip(jobs, rows, strict=True) if job[0] == alpha)
            for alpha in ALPHAS
        }
    return results, curves


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.dry_run:
        print(summarise_data(args, read_masks=True).to_text())
        return {}
    cpu = args.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state, folder = PartialState(cpu=cpu, timeout=timedelta(days=1)), Path(args.output_dir)
    share_cores()

    # 1. What can be measured, before anything is scored
    dataset, models, found = load_data(args), {}, Found()
    picked = evenly(len(dataset), args.max_test_samples)
    if state.is_main_process:
        print(summarise_data(args, dataset).to_text(), flush=True)
    for i in picked:
        models.setdefault(args.model.replace(CATEGORY, dataset.samples[i].category), []).append(i)
    pipelines = {model: RADPipeline.load(model) for model in models}
    surveyed = Survey()
    for model, indices in models.items():
        surveyed += survey(dataset, indices, pipelines[model].image_processor.resize)
    surveyed.check(args.mode == "calibrated", skip_errors=args.skip_unreadable)
    readable = {one.index for one in surveyed.seen}
    models = {model: [i for i in indices if i in readable] for model, indices in models.items()}
    models = {model: indices for model, indices in models.items() if indices}
    if args.restore and not any(one.label and one.has_mask for one in surveyed.seen):
        raise ValueError("--restore takes defective images with a mask, and there are none.")
    if state.is_main_process:
        print("\n".join(surveyed.all_sentences()), flush=True)

    # 2. Score: one model after another, each on its categories
    for model, indices in models.items():
        score(args, pipelines.pop(model).to(args.device or state.device), dataset, indices, found)

    # 3. Measure
    measured, curves = measure(args, found)
    threads = f"processes: {state.num_processes}, threads: {torch.get_num_threads()}"
    results = {
        "data": Path(args.data_dir or args.dataset_name).name,
        # Reports are passed on: they name folders, not where these are
        "arguments": {k: Path(v).name if os.path.isabs(str(v)) else v for k, v in vars(args).items()},
        "published": list(PUBLISHED)[args.unified] if args.unified or args.mode == "paper" else None,
        "versions": {"rad": __version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
        "device": f"{args.device or state.device}, {threads}",
        "truth": surveyed.to_dict() | {"unreadable": [without_folder(error, args) for error in surveyed.errors]},
        **measured,
    }
    if not state.is_main_process:
        return results

    # 4. Write
    figures = {}
    if args.figures:
        sweep = results["alpha_sweep"]
        figures = draw_figures(dataset, found.records, found.paper_records, sweep, found.restored)
    if found.restorations:
        figures["restored"] = draw_restorations(found.restorations)
    for name, picture in figures.items():
        (folder / "figures").mkdir(exist_ok=True)
        with whole(folder / "figures" / f"{name}.png") as partial:
            picture.image.save(partial)
    sections = {}
    for category in tqdm(results["categories"], "Drawing"):
        records = [record for record in found.records if record.category == category]
        thresholds = found.thresholds.get(category)
        sections[category] = draw_category(dataset, records, curves[category], thresholds, args.false_alarm_rate)
    texts = {
        "results.json": json.dumps(results, indent=2),
        "results.md": to_markdown(results),
        "report.html": to_html(results, sections, figures.values()),
    }
    for name, text in texts.items():
        with whole(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
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
