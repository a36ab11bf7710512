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
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import binary_dilation
from tqdm.auto import tqdm

from rad import RADPipeline
from rad.data import DATASET_FORMATS, AnomalyDataset, load_dataset
from rad.data.synthetic import DEFECTS, add_defect
from rad.metrics import aupro, image_auroc, pixel_ap, pixel_auroc, psnr
from rad.pipeline_rad import EMBEDDED_MODELS

METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic", help=f"Folder, Hub id or one of {', '.join(EMBEDDED_MODELS)}.")
    parser.add_argument("--data_dir", required=True, help="Folder of the data set.")
    parser.add_argument("--dataset_format", default="mvtec", choices=DATASET_FORMATS, help="Layout of that folder.")
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


def load_pipeline(name: str) -> RADPipeline:
    """An embedded model by its name, or a folder or Hub id."""
    return RADPipeline.from_embedded(name) if name in EMBEDDED_MODELS else RADPipeline.from_pretrained(name)


def evenly(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` positions, evenly spread."""
    return (
        list(range(count))
        if limit is None or limit >= count
        else np.linspace(0, count - 1, limit).round().astype(int).tolist()
    )


def load_test_images(args: argparse.Namespace, pipeline: RADPipeline) -> list[dict]:
    """Test images: {"image", "mask" (bool at map_size, or None), "label", "category", "defect"}."""
    decode, size = pipeline.image_processor.decode, (args.map_size, args.map_size)
    if not args.pasted_defects:
        dataset = load_dataset(args.data_dir, args.dataset_format, "test", args.category)
        return [
            {
                "image": s.image,
                "mask": dataset.mask(i, size),
                "label": s.label,
                "category": s.category,
                "defect": s.defect,
            }
            for i in evenly(len(dataset), args.max_test_samples)
            for s in [dataset[i]]
        ]
    dataset: AnomalyDataset = load_dataset(args.data_dir, args.dataset_format, "train", args.category)
    images = []
    for position, i in enumerate(evenly(len(dataset), args.pasted_defects)):
        good, rng = decode(dataset[i].image), np.random.default_rng([args.seed, i])
        kind = DEFECTS[position % len(DEFECTS)]
        bad, mask = add_defect(np.asarray(good), kind, rng.uniform(0.1, 1.0), rng)
        mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        common = {"category": dataset[i].category}
        images.append({"image": good, "mask": np.zeros(size, bool), "label": 0, "defect": "good", **common})
        images.append(
            {"image": Image.fromarray(bad), "mask": mask if mask.any() else None, "label": 1, "defect": kind, **common}
        )
    return images


def score_images(
    args: argparse.Namespace, pipeline: RADPipeline, images: list[dict]
) -> dict[str, dict[str, np.ndarray]]:
    """Maps [N, map_size, map_size] and scores [N] of each score type, and the decisions."""
    pipeline.set_progress_bar_config(disable=True)
    known = [] if pipeline.normality is None else pipeline.normality.config.categories
    maps, scores, alarms, categories = {}, {}, [], []
    for start in tqdm(range(0, len(images), args.batch_size), desc="Scoring"):
        batch = images[start : start + args.batch_size]
        named = not args.infer_category and all(item["category"] in known for item in batch)
        output = pipeline(
            [item["image"] for item in batch],
            class_labels=[item["category"] for item in batch] if named else None,
            mode=args.mode,
            num_noise_samples=args.num_noise_samples,
            false_alarm_rate=args.false_alarm_rate,
            seed=args.seed,
            batch_size=args.batch_size,
        )
        for name, values in output.scores.items():
            own_size = output.anomaly_map if name == "fused" else output[f"{name}_map"]
            resized = [
                F.interpolate(torch.from_numpy(m)[None, None], (args.map_size,) * 2, mode="bilinear", antialias=True)
                for m in own_size
            ]
            maps.setdefault(name, []).append(torch.cat(resized)[:, 0].numpy().astype(np.float32))
            scores.setdefault(name, []).append(values)
        if args.mode == "calibrated":
            alarms.append(output.is_anomalous)
            categories += output.category
    return {
        "maps": {name: np.concatenate(m) for name, m in maps.items()},
        "scores": {name: np.concatenate(s) for name, s in scores.items()},
        "alarms": np.concatenate(alarms) if alarms else None,
        "categories": categories,
    }


def measure(images: list[dict], maps: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """The four metrics of one score; images without a known mask count at image level only."""
    labels = np.array([item["label"] for item in images])
    masked = [i for i, item in enumerate(images) if item["mask"] is not None]
    masks = np.stack([images[i]["mask"] for i in masked])
    return {
        "image_auroc": image_auroc(scores, labels),
        "pixel_auroc": pixel_auroc(maps[masked], masks),
        "pixel_ap": pixel_ap(maps[masked], masks),
        "aupro": aupro(maps[masked], masks, max_fpr=0.3),
    }


def measure_categories(images: list[dict], found: dict) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of each score for each category, and their means over categories as "mean"."""
    names = sorted({item["category"] for item in images})
    results = {}
    for score_type in found["scores"]:
        rows = {}
        for name in names:
            members = [i for i, item in enumerate(images) if item["category"] == name]
            rows[name] = measure(
                [images[i] for i in members], found["maps"][score_type][members], found["scores"][score_type][members]
            )
        rows["mean"] = {metric: float(np.mean([row[metric] for row in rows.values()])) for metric in METRICS}
        results[score_type] = rows
    return results


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
    pipeline = load_pipeline(args.model)
    pipeline.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images = load_test_images(args, pipeline)
    start = time.monotonic()
    found = score_images(args, pipeline, images)
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
