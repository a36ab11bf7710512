#!/usr/bin/env python
"""Measures a pipeline on a data set: image AUROC, pixel AUROC, pixel AP and AUPRO (FPR <= 0.3) of each score.

accelerate launch training/evaluate.py --model mtd --data_dir MTD --dataset_format mtd
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import binary_dilation
from tqdm.auto import tqdm

from rad import RADPipeline
from rad.data import DATASET_FORMATS, load_dataset
from rad.evaluation import METRICS, evenly, measure_categories, pasted_defects, score_images, test_images
from rad.metrics import psnr
from rad.pipeline_rad import EMBEDDED_MODELS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic", help=f"Folder, Hub id or one of {', '.join(EMBEDDED_MODELS)}.")
    parser.add_argument("--data_dir", required=True, help="Folder of the data set.")
    parser.add_argument(
        "--dataset_format", default="auto", choices=("auto", *DATASET_FORMATS), help="Layout of that folder."
    )
    parser.add_argument("--category", nargs="+", help="Categories to measure; by default all.")
    parser.add_argument("--mode", default="calibrated", choices=("calibrated", "paper"))
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
    parser.add_argument("--false_alarm_rate", type=float, default=0.01)
    parser.add_argument("--map_size", type=int, default=256, help="Maps and masks are compared at this square.")
    parser.add_argument("--restore", type=int, default=0, metavar="N", help="Also restore N anomalous images.")
    parser.add_argument("--max_test_samples", type=int, help="Measure on this many images, evenly picked.")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="By default a GPU if there is one.")
    parser.add_argument("--output_dir", help="Write results.json and results.md here.")
    return parser.parse_args(argv)


def measure_restoration(args: argparse.Namespace, pipeline: RADPipeline, images: list[dict]) -> dict[str, float]:
    """Restores anomalous images: how many then pass as good, and how much changed outside the true defect.

    The true mask is dilated by 1/16 of the side, because a defect's edge has no sharp end.
    """
    anomalous = [item for item in images if item["label"] and item["mask"] is not None]
    anomalous = [anomalous[i] for i in evenly(len(anomalous), args.restore)]
    known = [] if args.infer_category else pipeline.normality.config.categories
    passed, fidelity, steps = [], [], []
    for item in tqdm(anomalous, desc="Restoring"):
        image = pipeline.image_processor.decode(item["image"])
        label = item["category"] if item["category"] in known else None
        restored = pipeline.restore(image, class_labels=label, seed=args.seed)
        again = pipeline(restored.images[0], class_labels=label, seed=args.seed, false_alarm_rate=0.01)
        passed.append(not again.is_anomalous[0])
        steps.append(len(restored.distances[0]) - 1)
        mask = np.asarray(Image.fromarray(item["mask"]).resize(image.size, Image.Resampling.NEAREST))
        outside = ~binary_dilation(mask, np.ones((3, 3)), iterations=max(image.size) // 16)
        before, after = (np.asarray(x, np.float64) / 255 for x in (image, restored.images[0]))
        if outside.any():
            fidelity.append(min(psnr(before, after, mask=outside), 100.0))  # equal pixels count as 100 dB
    return {
        "num_images": len(anomalous),
        "share_below_1_percent_threshold": float(np.mean(passed)),
        "psnr_outside_mask_median_db": float(np.median(fidelity)),
        "share_psnr_at_least_35_db": float(np.mean(np.array(fidelity) >= 35)),
        "mean_steps": float(np.mean(steps)),
    }


def to_markdown(results: dict) -> str:
    """One row for each score, means over categories; for several categories then those of the fused score."""
    lines = ["| score | image AUROC | pixel AUROC | pixel AP | AUPRO |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | " + " | ".join(f"{rows['mean'][m]:.3f}" for m in METRICS) + " |" for name, rows in results.items()
    ]
    fused = {name: row for name, row in results["fused"].items() if name != "mean"}
    if len(fused) > 1:
        lines += ["", "| category (fused) | image AUROC | pixel AUROC | pixel AP | AUPRO |", "|---|---|---|---|---|"]
        lines += [f"| {name} | " + " | ".join(f"{row[m]:.3f}" for m in METRICS) + " |" for name, row in fused.items()]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> dict:
    pipeline = RADPipeline.load(args.model)
    pipeline.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    split, size = "train" if args.pasted_defects else "test", (args.map_size, args.map_size)
    dataset = load_dataset(args.data_dir, args.dataset_format, split, args.category)
    if args.pasted_defects:
        images = pasted_defects(dataset, args.pasted_defects, size, args.seed)
    else:
        images = test_images(dataset, size, args.max_test_samples)
    start = time.monotonic()
    found = score_images(
        pipeline,
        images,
        map_size=args.map_size,
        infer_category=args.infer_category,
        mode=args.mode,
        num_noise_samples=args.num_noise_samples,
        false_alarm_rate=args.false_alarm_rate,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    seconds = time.monotonic() - start

    results = measure_categories(images, found)
    labels = np.array([item["label"] for item in images])
    print(to_markdown(results))
    report = {
        "arguments": vars(args),
        "num_good": int((labels == 0).sum()),
        "num_anomalous": int(labels.sum()),
        "seconds_per_image": seconds / len(images),
        "metrics": results,
    }
    if found["alarms"] is not None:
        report["false_alarms_on_good"] = float(found["alarms"][labels == 0].mean())
        report["detected_anomalous"] = float(found["alarms"][labels == 1].mean())
        report["category_accuracy"] = float(
            np.mean([a == item["category"] for a, item in zip(found["categories"], images, strict=True)])
        )
        print(
            f"\nAt a false-alarm rate of {args.false_alarm_rate:.1%}: {report['false_alarms_on_good']:.1%} of "
            f"{report['num_good']} good and {report['detected_anomalous']:.1%} of {report['num_anomalous']} anomalous "
            "images are called anomalous."
        )
    if args.restore:
        report["restoration"] = measure_restoration(args, pipeline, images)
        print("\nRestoration: " + json.dumps(report["restoration"]))
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(report, indent=2))
        (folder / "results.md").write_text(to_markdown(results) + "\n")
    return report


if __name__ == "__main__":
    main(parse_args())
