"""A pipeline on images whose truth is known: the test images of a data set, or good ones with defects pasted on."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from .data import AnomalyDataset
from .data.synthetic import DEFECTS, add_defect
from .image_processor import RADImageProcessor
from .metrics import aupro, image_auroc, pixel_ap, pixel_auroc
from .pipeline_rad import RADPipeline

METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")


def evenly(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` positions, evenly spread."""
    if limit is None or limit >= count:
        return list(range(count))
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def test_images(dataset: AnomalyDataset, size: tuple[int, int], limit: int | None = None) -> list[dict[str, Any]]:
    """Images of a test split: {"image", "mask" (bool [size], or None), "label", "category", "defect"}.

    Args:
        dataset: The test split.
        size: Height and width of the masks.
        limit: At most this many, evenly picked.
    """
    return [
        {
            "image": sample.image,
            "mask": dataset.mask(i, size),
            "label": sample.label,
            "category": sample.category,
            "defect": sample.defect,
        }
        for i in evenly(len(dataset), limit)
        for sample in [dataset[i]]
    ]


test_images.__test__ = False  # no test of pytest's


def pasted_defects(dataset: AnomalyDataset, count: int, size: tuple[int, int], seed: int = 0) -> list[dict[str, Any]]:
    """Like `test_images`, from `count` good images, each once as it is and once with a synthetic defect pasted on."""
    images = []
    for position, i in enumerate(evenly(len(dataset), count)):
        good, rng = RADImageProcessor().decode(dataset[i].image), np.random.default_rng([seed, i])
        kind = DEFECTS[position % len(DEFECTS)]
        bad, mask = add_defect(np.asarray(good), kind, rng.uniform(0.1, 1.0), rng)
        mask = np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
        common = {"category": dataset[i].category}
        images.append({"image": good, "mask": np.zeros(size, bool), "label": 0, "defect": "good", **common})
        images.append(
            {"image": Image.fromarray(bad), "mask": mask if mask.any() else None, "label": 1, "defect": kind, **common}
        )
    return images


def score_images(
    pipeline: RADPipeline,
    images: list[dict[str, Any]],
    map_size: int = 256,
    infer_category: bool = False,
    batch_size: int = 4,
    **kwargs: Any,
) -> dict[str, Any]:
    """Maps [N, map_size, map_size] and scores [N] of each score type, and the decisions.

    Args:
        images: From `test_images` or `pasted_defects`.
        infer_category: Let the pipeline guess each category.
        kwargs: Further arguments of the pipeline.
    """
    pipeline.set_progress_bar_config(disable=True)
    known = [] if pipeline.normality is None else pipeline.normality.config.categories
    maps, scores, alarms, categories = {}, {}, [], []
    for start in tqdm(range(0, len(images), batch_size), desc="Scoring"):
        batch = images[start : start + batch_size]
        named = not infer_category and all(item["category"] in known for item in batch)
        output = pipeline(
            [item["image"] for item in batch],
            class_labels=[item["category"] for item in batch] if named else None,
            batch_size=batch_size,
            **kwargs,
        )
        for name, values in output.scores.items():
            own_size = output.anomaly_map if name == "fused" else output[f"{name}_map"]
            resized = [
                F.interpolate(torch.from_numpy(m)[None, None], (map_size,) * 2, mode="bilinear", antialias=True)
                for m in own_size
            ]
            maps.setdefault(name, []).append(torch.cat(resized)[:, 0].numpy().astype(np.float32))
            scores.setdefault(name, []).append(values)
        if output.is_anomalous is not None:
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
