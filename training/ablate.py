#!/usr/bin/env python
"""Ablations: what each choice in the score is worth, all in one command, with a table and a figure each.

    accelerate launch training/ablate.py --model mtd --data_dir MTD --dataset_format mtd --output_dir ablations-mtd

Every setting is measured on two sets: the test images, and good training images that the model held out, each also
with a defect pasted on. Defaults are chosen by the second. Statistics of good images never come from an image that
they are measured on: one half of the images held out gets the defects, the other half gives the statistics for them.
The test images get the model's own statistics and, where a setting needs others, those of all images held out.

One pass over the images stores all raw maps on disk, so that an interrupted run goes on where it was.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import parse_flag_from_env
from launching import share_cores
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from rad import RADPipeline
from rad.data import DATASET_FORMATS, AnomalyDataset, load_dataset
from rad.evaluation import METRICS, evenly, fingerprint, pasted_defects, resize_map, test_images, write
from rad.metrics import image_auroc, pixel_metrics
from rad.models.normality import FUSED, GLOBAL, NormalityModel, stack_raw_maps
from rad.pipeline_rad import EMBEDDED_MODELS

RESPACED_STEPS = [5, 12, 25, 50, 75, 100, 150]  # 20, 48, 100, 201, 301, 401 and 602 of the full chain
PIXELS = (1, 4, 16, 64, 256, 1024)  # of the map, in the image score
PATHS = ("model", "data_dir", "output_dir", "raw_dir", "page")  # arguments that may tell of one's own disk
TITLES = {
    "fused": "fused",
    "pixel": "KL",
    "feature": "feature error",
    "residual": "feature residual",
    "mahalanobis": "Mahalanobis",
    "discriminator": "discriminator",
    "rgb": "RGB difference",
    GLOBAL: "whole image",
}
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
    parser.add_argument("--data_dir", required=True, help="Folder of the data set that the model was trained on.")
    parser.add_argument(
        "--dataset_format", default="auto", choices=("auto", *DATASET_FORMATS), help="Layout of that folder."
    )
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
    parser.add_argument("--output_dir", required=True, help="ablations.json, ablations.md and the figures go here.")
    parser.add_argument("--raw_dir", help="The raw maps go here, about 2 MB an image; by default --output_dir/raw.")
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


# -- images and their raw maps ----------------------------------------------------------------------------------------


def split_good(args: argparse.Namespace, dataset: AnomalyDataset, num_scores: int) -> tuple[list[int], ...]:
    """Indices of the good images: those trained on, and two halves of those held out.

    Raises:
        ValueError: This is not the split that the model was trained with, or a category has too few images.
    """
    chosen = np.random.default_rng(args.seed).permutation(len(dataset))[: args.max_train_samples]
    train, holdout = dataset.split_holdout(args.holdout_fraction, args.seed, sorted(chosen.tolist()))
    if len(holdout) != num_scores:
        raise ValueError(
            f"The model's statistics come from {num_scores} good images held out, but this split holds out "
            f"{len(holdout)} of {len(chosen)}: give --holdout_fraction, --max_train_samples and --seed as in training."
        )
    parts = [], [], []
    for category in dataset.categories:
        kept, held = ([i for i in split if dataset.samples[i].category == category] for split in (train, holdout))
        kept, held = ([split[i] for i in evenly(len(split), args.max_good_samples)] for split in (kept, held))
        if len(held) < 3:
            raise ValueError(f"Category {category!r} has {len(held)} good images held out; 3 are needed.")
        for part, indices in zip(parts, (kept, held[::2], held[1::2]), strict=True):
            part.extend(indices)
    return parts


def check_classes(images: list[dict], name: str) -> None:
    """Raises ValueError unless each category has good images and defects, some with a mask."""
    for category in sorted({item["category"] for item in images}):
        members = [item for item in images if item["category"] == category]
        masked = any(item["label"] and item["mask"] is not None for item in members)
        if not masked or all(item["label"] for item in members):
            raise ValueError(
                f"The {len(images)} {name} have no good image or no known mask of category {category!r}: take more."
            )


@dataclass
class RawMaps:
    """Images of known truth and what one pass stored of them.

    Attributes:
        images: As from `rad.evaluation.test_images`.
        folder: Its safetensors files, in order, hold the images' tensors.
        labels: Class label of each image.
        picked: Which of the folder's images these are.
    """

    images: list[dict]
    folder: Path
    labels: list[int]
    picked: list[int]

    def load(self, name: str) -> torch.Tensor:
        """[N, ...], float32 unless integers."""
        chunks = []
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                chunks.append(file.get_tensor(name))
        tensor = torch.cat(chunks)[self.picked]
        return tensor.float() if tensor.is_floating_point() else tensor

    def pick(self, positions: list[int]) -> "RawMaps":
        images, labels, picked = ([of[i] for i in positions] for of in (self.images, self.labels, self.picked))
        return RawMaps(images, self.folder, labels, picked)


@dataclass
class Evaluation:
    """One of the two sets that settings are measured on.

    Attributes:
        images, good: All raw maps but those of several draws, of the images and of the good ones that give statistics.
        draws, good_draws: Raw maps of several draws, of some of the images and of the same good ones.
        normality: Fitted to images that are not measured on; on the CPU.
        timesteps: All that were scored, ascending.
    """

    images: RawMaps
    good: RawMaps
    draws: RawMaps
    good_draws: RawMaps
    normality: NormalityModel
    timesteps: list[int]


class Passes:
    """What the tables need of a batch of images, from few passes of the U-Net.

    Args:
        pipeline: Scores them.
        timesteps: Further steps to score at beside the model's own.
        max_draws: A power of 2.
    """

    def __init__(self, pipeline: RADPipeline, timesteps: list[int], max_draws: int):
        self.pipeline, self.further, self.max_draws = pipeline, timesteps, max_draws
        self.timesteps = list(pipeline.normality.config.timesteps)

    def _prepare(self, images: list[dict], normality: NormalityModel) -> tuple[Callable, Callable, tuple]:
        """The pipeline's raw scores, and its stack of raw maps, as functions; features, summaries, sizes, labels."""
        pipeline = self.pipeline
        x_0, sizes = pipeline.image_processor.preprocess([item["image"] for item in images])
        x_0 = x_0.to(pipeline.device, pipeline.unet.dtype)
        features, logits, summaries = pipeline._features(x_0)
        labels = [normality.config.categories.index(item["category"]) for item in images]
        unet_labels = pipeline._unet_labels(labels)

        def raw_scores(
            timesteps: list[int], draws: int | None = None, seed: int = 0, raw_channels: bool = False
        ) -> tuple:
            return pipeline.raw_scores(x_0, features, unet_labels, timesteps, draws, seed, raw_channels)

        def stack(scores: list[tuple]) -> torch.Tensor:
            """Raw maps of the mean of several draws' scores."""
            kl, error, rgb, residuals = (torch.stack(parts).mean(0) for parts in zip(*scores, strict=True))
            distances = normality.distance(residuals, labels, "residual"), normality.distance(features, labels)
            return stack_raw_maps(kl, error, rgb, normality.config.map_size, *logits, *distances)

        return raw_scores, stack, (features, summaries, torch.tensor(sizes, dtype=torch.int32), labels)

    def base(self, images: list[dict], normality: NormalityModel) -> dict[str, torch.Tensor]:
        """All but several draws.

        Returns:
            raw: All maps as the pipeline stacks them, [B, M, m, m]; size [B, 2]; global: distance of the summaries,
            [B]; further: KL, feature error and RGB
            maps at further timesteps; raw_channels: feature error of channels that are not standardised, [B, T, m, m];
            ran_kl: RAN's mean of z(s_t), [B, S, S], and ran_error [B, g, g]; features and residuals on a coarse grid.
        """
        raw_scores, stack, (features, summaries, sizes, labels) = self._prepare(images, normality)
        map_size, num_timesteps = normality.config.map_size, len(self.timesteps)
        own = raw_scores(self.timesteps)
        kl, error, rgb, _ = raw_scores(self.timesteps, raw_channels=True)
        tensors = {
            "raw": stack([own]),
            "size": sizes,
            "global": normality.global_distance(summaries, labels),
            "raw_channels": stack_raw_maps(kl, error, rgb, map_size)[:, num_timesteps : 2 * num_timesteps],
            "ran_kl": ((kl - kl.mean((2, 3), keepdim=True)) / kl.std((2, 3), keepdim=True)).mean(1),
            "ran_error": error.mean(1),
            "features": F.adaptive_avg_pool2d(features.float(), 2),
            "residuals": F.adaptive_avg_pool2d(own[3], 1),
        }
        if self.further:
            tensors["further"] = stack_raw_maps(*raw_scores(self.further)[:3], map_size)
        return tensors

    def draws(self, images: list[dict], normality: NormalityModel, num_seeds: int) -> dict[str, torch.Tensor]:
        """Maps as the pipeline stacks them, "1-0" for one draw and the first seed.

        Two draws are an antithetic pair. 4 and 8 average 2 and 4 pairs of as many noise seeds: 9 draws in all, where
        scoring each number of draws by itself would take 15.
        """
        raw_scores, stack, (_, summaries, sizes, labels) = self._prepare(images, normality)
        tensors, num_pairs = {"size": sizes}, max(1, self.max_draws // 2)
        tensors["global"] = normality.global_distance(summaries, labels)
        for seed in range(num_seeds):
            first = seed * num_pairs
            tensors[f"1-{seed}"] = stack([raw_scores(self.timesteps, 1, first)])
            pairs = [raw_scores(self.timesteps, 2, first + i) for i in range(num_pairs)] if self.max_draws > 1 else []
            for draws in numbers_of_draws(self.max_draws)[1:]:
                tensors[f"{draws}-{seed}"] = stack(pairs[: draws // 2])
        return tensors


def numbers_of_draws(max_draws: int) -> list[int]:
    """1, 2, 4 .. max_draws."""
    return [2**i for i in range(max_draws.bit_length())]


@torch.no_grad()
def store(
    accelerator: Accelerator,
    folder: Path,
    images: list[dict],
    categories: list[str],
    batch_size: int,
    compute: Callable[[list[dict]], dict[str, torch.Tensor]],
) -> RawMaps:
    """Computes the batches that are not in the folder yet, every process its share."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(images), batch_size)[accelerator.process_index :: accelerator.num_processes]
    for start in tqdm(starts, desc=f"Scoring, {folder.name}", disable=not accelerator.is_local_main_process):
        path = folder / f"{start:06d}.safetensors"
        if not path.exists():
            tensors = compute(images[start : start + batch_size])
            tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            save_file(tensors, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
    accelerator.wait_for_everyone()
    labels = [categories.index(item["category"]) for item in images]
    return RawMaps(images, folder, labels, list(range(len(images))))


def refit(
    accelerator: Accelerator, pipeline: RADPipeline, folder: Path, train: list[dict], good: list[dict], batch_size: int
) -> NormalityModel:
    """The normality of the same settings whose statistics come from fewer images held out."""
    original, path = pipeline.normality, folder / "normality"
    if path.exists():
        return NormalityModel.from_pretrained(path).to(pipeline.device)
    pipeline.set_progress_bar_config(
        desc="Fitting normality without the pasted images", disable=not accelerator.is_local_main_process
    )
    pipeline.fit_normality(
        [item["image"] for item in train],
        holdout_images=[item["image"] for item in good],
        categories=[item["category"] for item in train],
        holdout_categories=[item["category"] for item in good],
        batch_size=batch_size,
        accelerator=accelerator,
        **{name: original.config[name] for name in ("gaussian_size", "gaussian_channels", "gaussian_block")},
    )
    normality = pipeline.normality
    pipeline.register_modules(normality=original)
    if accelerator.is_main_process:
        partial = Path(tempfile.mkdtemp(dir=folder))
        normality.save_pretrained(partial)
        partial.rename(path)
    accelerator.wait_for_everyone()
    return normality


# -- the ablations ----------------------------------------------------------------------------------------------------
# Each yields (setting, is it the default, [(maps [N, h, w] or None, scores [N]) for each seed]).

Rows = Iterator[tuple[tuple[str, ...], bool, list[tuple[torch.Tensor | None, torch.Tensor]]]]


def top_mean(maps: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of the `count` largest values of each map, [N]."""
    return maps.flatten(1).topk(min(count, maps[0].numel())).values.mean(1)


def fit_statistics(good: RawMaps, raw: torch.Tensor, categories: list[str], timesteps: list[int]) -> NormalityModel:
    """Statistics of good images' KL, feature error and RGB maps [N, 3 T, m, m], as the pipeline fits them.

    The Gaussians, which are not asked for, are made as small as they can be.
    """
    features, residuals = good.load("features"), good.load("residuals")
    channels = min(8, features.shape[1])
    model = NormalityModel.fit(
        features,
        residuals,
        features.mean((2, 3)),  # in place of summaries, likewise
        good.labels,
        raw,
        categories,
        timesteps=tuple(timesteps),
        gaussian_size=2,
        gaussian_channels=channels,
    )
    return model.half().float()  # saved in half precision, as the pipeline's own


def deviations(model: NormalityModel, raw: torch.Tensor, labels: list[int]) -> tuple[torch.Tensor, ...]:
    """KL, feature error and RGB maps in units of good images' deviation at each position, each [N, T, m, m]."""
    location, scale = (buffer[labels, : raw.shape[1]] for buffer in (model.location, model.scale))
    return ((raw - location) / scale).chunk(3, dim=1)


def calibrated(x: Evaluation) -> dict[str, torch.Tensor]:
    return x.normality.calibrate(x.images.load("raw"), x.images.labels)


def ablate_score(x: Evaluation) -> Rows:
    maps = calibrated(x)
    for name in (*x.normality.score_types, GLOBAL):
        scores = x.normality.image_scores(maps, x.images.labels, name, x.images.load("global"))
        yield (TITLES.get(name, name),), name == "fused", [(maps.get(name), scores)]


def ablate_weights(x: Evaluation) -> Rows:
    maps, normality = calibrated(x), copy.deepcopy(x.normality)

    def settings(weights: tuple[float, ...], names: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
        """The default first."""
        written = ", ".join(f"{weight:g}" for weight in weights)
        found = {f"as they are: {written}": tuple(weights)}
        for i, name in enumerate(names):
            if weights[i] and (name == GLOBAL or name in maps):
                found[f"without {TITLES[name]}"] = (*weights[:i], 0.0, *weights[i + 1 :])
        return found | {"all 1": (1.0,) * len(weights)}

    of_map = settings(normality.config.weights, FUSED)
    for setting, weights in of_map.items():
        normality.register_to_config(weights=weights)
        fused = normality.calibrate(x.images.load("raw"), x.images.labels)["fused"]
        yield ("the map", setting), setting == next(iter(of_map)), [(fused, top_mean(fused, normality.config.top_k))]
    of_score = settings(normality.config.image_weights, (*FUSED, GLOBAL))
    for setting, weights in of_score.items():
        normality.register_to_config(image_weights=weights)
        scores = normality.image_scores(maps, x.images.labels, global_distance=x.images.load("global"))
        yield ("the image score", setting), setting == next(iter(of_score)), [(None, scores)]


def ablate_timesteps(x: Evaluation) -> Rows:
    own, top_k = list(x.normality.config.timesteps), x.normality.config.top_k

    def at_all_timesteps(maps: RawMaps) -> torch.Tensor:
        """KL, feature error and RGB difference at all timesteps, [N, 3 T, m, m]."""
        parts = maps.load("raw")[:, : 3 * len(own)].unflatten(1, (3, -1))
        order = [*own]
        if x.timesteps != sorted(own):
            parts = torch.cat([parts, maps.load("further").unflatten(1, (3, -1))], dim=2)
            order += [t for t in x.timesteps if t not in own]
        return parts[:, :, [order.index(t) for t in x.timesteps]].flatten(1, 2)

    model = fit_statistics(x.good, at_all_timesteps(x.good), list(x.normality.config.categories), x.timesteps)
    found = deviations(model, at_all_timesteps(x.images), x.images.labels)
    settings = {str(t): [t] for t in x.timesteps}
    settings[" + ".join(map(str, own))] = own
    if x.timesteps != sorted(own):
        settings["all"] = x.timesteps
    for name, z in zip(("pixel", "feature"), found[:2], strict=True):
        for setting, timesteps in settings.items():
            maps = z[:, [x.timesteps.index(t) for t in timesteps]].mean(1)
            yield (TITLES[name], setting), timesteps == own, [(maps, top_mean(maps, top_k))]


def ablate_draws(x: Evaluation, max_draws: int, num_seeds: int, default: int) -> Rows:
    count, refitted = 3 * len(x.normality.config.timesteps), ("pixel", "feature", "rgb")
    for draws in numbers_of_draws(max_draws):
        # 1. Statistics of good images under as many draws; those of the distances stay
        fitted = fit_statistics(
            x.good,
            x.good_draws.load(f"{draws}-0")[:, :count],
            list(x.normality.config.categories),
            list(x.normality.config.timesteps),
        )
        normality = copy.deepcopy(x.normality)
        normality.location[:, :count] = fitted.location[:, :count]
        normality.scale[:, :count] = fitted.scale[:, :count]
        for name in ("map_scale", "score_location", "score_scale"):
            for score_type in refitted:
                column = fitted.get_buffer(name)[:, fitted.score_types.index(score_type)]
                normality.get_buffer(name)[:, normality.score_types.index(score_type)] = column
        # 2. The scores of each seed
        found = []
        for seed in range(num_seeds):
            maps = normality.calibrate(x.draws.load(f"{draws}-{seed}"), x.draws.labels)
            distance = x.draws.load("global")
            scores = [normality.image_scores(maps, x.draws.labels, n, distance) for n in ("fused", *refitted[:2])]
            found.append((maps, scores))
        for i, name in enumerate(("fused", *refitted[:2])):
            yield (TITLES[name], str(draws)), draws == default, [(maps[name], scores[i]) for maps, scores in found]


def ablate_normalisation(x: Evaluation) -> Rows:
    num_timesteps, top_k = len(x.normality.config.timesteps), x.normality.config.top_k
    raw, good, by_position = x.images.load("raw"), x.good.load("raw"), calibrated(x)
    good_labels = torch.tensor(x.good.labels)
    for i, name in enumerate(("pixel", "feature")):
        part = slice(i * num_timesteps, (i + 1) * num_timesteps)
        s = raw[:, part]
        of_category = [good[good_labels == label, part] for label in range(len(x.normality.config.categories))]
        location = torch.stack([maps.mean((0, 2, 3)) for maps in of_category])[x.images.labels][..., None, None]
        scale = torch.stack([maps.std((0, 2, 3)) for maps in of_category])[x.images.labels][..., None, None]
        settings = {
            "none": s.mean(1),
            "each image (RAN)": ((s - s.mean((2, 3), keepdim=True)) / s.std((2, 3), keepdim=True)).mean(1),
            "good images": ((s - location) / scale).mean(1),
            "good images, each position": by_position[name],
        }
        for setting, maps in settings.items():
            yield (TITLES[name], setting), maps is by_position[name], [(maps, top_mean(maps, top_k))]


def ablate_whitening(x: Evaluation) -> Rows:
    timesteps, top_k = list(x.normality.config.timesteps), x.normality.config.top_k
    middle = slice(len(timesteps), 2 * len(timesteps))

    def unscaled(maps: RawMaps) -> torch.Tensor:
        """The raw maps with the error of raw channels in its place."""
        raw = maps.load("raw")[:, : 3 * len(timesteps)]
        raw[:, middle] = maps.load("raw_channels")
        return raw

    model = fit_statistics(x.good, unscaled(x.good), list(x.normality.config.categories), timesteps)
    settings = {
        ("raw", "none"): x.images.load("raw_channels").mean(1),
        ("standardised", "none"): x.images.load("raw")[:, middle].mean(1),
        ("raw", "good images"): deviations(model, unscaled(x.images), x.images.labels)[1].mean(1),
        ("standardised", "good images"): calibrated(x)["feature"],
    }
    for setting, maps in settings.items():
        yield setting, setting == ("standardised", "good images"), [(maps, top_mean(maps, top_k))]


def ablate_alpha(x: Evaluation) -> Rows:
    kl, error = x.images.load("ran_kl"), x.images.load("ran_error")
    error, maps = F.interpolate(error[:, None], kl.shape[-2:], mode="bilinear")[:, 0], calibrated(x)
    for alpha in (i / 10 for i in range(11)):
        fused = alpha * kl + (1 - alpha) * error
        yield ("each image (RAN)", f"{alpha:g}"), False, [(fused, top_mean(fused, 64))]
        fused = alpha * maps["pixel"] + (1 - alpha) * maps["feature"]
        yield ("good images", f"{alpha:g}"), False, [(fused, top_mean(fused, x.normality.config.top_k))]


def ablate_image_score(x: Evaluation) -> Rows:
    maps, default = calibrated(x), x.normality.config.top_k
    num_pixels, normality = maps["fused"][0].numel(), copy.deepcopy(x.normality)
    counts = sorted({*PIXELS, default, num_pixels})
    for count in [count for count in counts if count <= num_pixels]:
        setting = {1: "1 (max)", num_pixels: f"{count} (mean)"}.get(count, str(count))
        yield ("the anomaly map", setting), False, [(None, top_mean(maps["fused"], count))]
        normality.register_to_config(top_k=count)
        scores = normality.image_scores(maps, x.images.labels, global_distance=x.images.load("global"))
        yield ("the image score's own map", setting), count == default, [(None, scores)]


@dataclass(frozen=True)
class Ablation:
    title: str
    question: str
    columns: tuple[str, ...]
    rows: Callable[..., Rows]
    sweep: bool  # the last column is a quantity


ABLATIONS = {
    "score": Ablation(
        "Score",
        "How good is each score alone, and what does fusing them give?",
        ("score",),
        ablate_score,
        False,
    ),
    "weights": Ablation(
        "Weights",
        "What does each map add to the fused map, and each to the image score? The weights are those of "
        "{weights}; the image score has one more, of the whole image's score.",
        ("of", "weights"),
        ablate_weights,
        False,
    ),
    "timesteps": Ablation(
        "Timesteps",
        "How much noise? One timestep by itself, the model's together, and all together, in units of good images' "
        "deviation at each position.",
        ("score", "timestep of 1000"),
        ablate_timesteps,
        True,
    ),
    "draws": Ablation(
        "Noise draws",
        "What does averaging noise draws at each timestep bring? Two draws are an antithetic pair. Means over noise "
        "seeds ± their standard deviation; the last columns give the standard deviation of an image's score over "
        "seeds, in units of the deviation between good images.",
        ("score", "draws at each timestep"),
        ablate_draws,
        True,
    ),
    "normalisation": Ablation(
        "Normalisation",
        "A score's z-score within each image, as RAN takes it, or against good images, with one mean and deviation "
        "for all positions or one for each.",
        ("score", "normalised by"),
        ablate_normalisation,
        False,
    ),
    "whitening": Ablation(
        "Channel scale",
        "Feature error of the extractor's raw channels, which RAN weighs equally, or of channels scaled to unit "
        "deviation, as it is and against good images at each position.",
        ("channels", "normalised by"),
        ablate_whitening,
        False,
    ),
    "alpha": Ablation(
        "Alpha",
        "RAN's A = alpha z(KL) + (1 - alpha) feature error: to the letter, with each image's own z-score and raw "
        "channels, and with both scores in units of good images' deviation at each position.",
        ("z-score against", "alpha"),
        ablate_alpha,
        True,
    ),
    "image_score": Ablation(
        "Image score",
        "Over how many of a map's largest values should the image score be the mean? Of the anomaly map, and of the "
        "map with the weights of the image score. Maps have {map_size} x {map_size} values.",
        ("map", "largest values"),
        ablate_image_score,
        True,
    ),
}


# -- measuring and reporting ------------------------------------------------------------------------------------------


def measure(
    x: RawMaps, maps: torch.Tensor | None, scores: torch.Tensor, map_size: int, pipeline: RADPipeline
) -> dict[str, float]:
    """Means over categories of the four metrics, of image AUROC alone without maps.

    Maps go to each image's own size and then to `map_size`, as from the pipeline in `rad.evaluation.score_images`.
    """
    found = []
    sizes = [tuple(size) for size in x.load("size").tolist()] if maps is not None else []
    for label in sorted(set(x.labels)):
        members = [i for i, other in enumerate(x.labels) if other == label]
        truth = np.array([x.images[i]["label"] for i in members])
        row = {"image_auroc": image_auroc(scores[members].numpy(), truth)}
        if maps is not None:
            masked = [i for i in members if x.images[i]["mask"] is not None]
            own_size = pipeline.image_processor.resize_map(maps[masked], [sizes[i] for i in masked])
            resized = np.stack([resize_map(m, map_size) for m in own_size])
            row |= pixel_metrics(resized, np.stack([x.images[i]["mask"] for i in masked]), (0.3,))
        found.append(row)
    return {name: float(np.mean([row[name] for row in found])) for name in METRICS if name in found[0]}


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
    names = [name for name in METRIC_TITLES if name in rows[0]["test"]]
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
    names = [name for name in METRIC_TITLES if name in rows[0]["test"]]
    num_rows, num_columns = {1: (1, 1), 4: (2, 2), 5: (2, 3)}[len(names)]
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
                    [own[value][part][name] for value in group],
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
        values = [row[part].get(name, np.nan) for row in rows]  # the whole image has no map
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
    write(folder / "ablations.json", json.dumps({**facts, "arguments": settings, "ablations": results}, indent=2))
    tables = {name: to_markdown(ABLATIONS[name], rows) for name, rows in results.items()}
    last = list(results)[-1]
    draw(ABLATIONS[last], results[last]).savefig(folder / f"{last}.png")
    lines = [
        f"# Ablations of {facts['model']} on {facts['data']}",
        f"{facts['num_test']} test images; {facts['num_pasted']} with pasted defects and without, of "
        f"{facts['num_pasted'] // 2} good images held out; statistics for these from {facts['num_good']} others. "
        f"Draws are compared on {facts['num_test_draws']} test and {facts['num_pasted_draws']} pasted images with "
        f"{args.num_seeds} noise seeds. Maps and masks at {args.map_size} x {args.map_size}, AUPRO up to a "
        "false-positive rate of 0.3, means over categories. Bold: the default.",
    ]
    for name, table in tables.items():
        ablation = ABLATIONS[name]
        question = ablation.question.format(
            map_size=facts["map_size"], weights=", ".join(TITLES[name] for name in FUSED)
        )
        lines += [f"## {ablation.title}", question, table, f"![{ablation.title}]({name}.png)"]
    write(folder / "ablations.md", "\n\n".join(lines) + "\n")
    if args.page:
        page, text = Path(args.page), Path(args.page).read_text(encoding="utf-8")
        figures = os.path.relpath(folder, page.parent)
        for name, table in tables.items():
            picture = f"![{ABLATIONS[name].title}]({figures}/{name}.png)"
            text = insert(text, f"{folder.resolve().name} {name}", f"{table}\n\n{picture}")
        write(page, text)


# -- the whole --------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> dict[str, list[dict]] | None:
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
    timesteps = args.timesteps or pipeline.scheduler.respaced_to_full(RESPACED_STEPS)
    further = sorted(set(timesteps) - set(own))
    chain = pipeline.scheduler.respaced_chain.timesteps
    nearest = [int(chain[np.abs(chain - t).argmin()]) for t in further]
    if nearest != further:
        raise ValueError(f"--timesteps {further} are not all on the respaced chain; the nearest that are: {nearest}.")

    # 1. Images: of those held out, one half gives statistics to the other, which gets defects
    size = (args.map_size, args.map_size)
    test_set = load_dataset(args.data_dir, args.dataset_format, "test", categories)
    test = test_images(test_set, size, args.max_test_samples)
    dataset = load_dataset(args.data_dir, args.dataset_format, "train", categories)
    train, statistics, others = split_good(args, dataset, normality.config.num_scores)
    holdout = sorted(statistics + others)
    train, good, fitted = (
        [{"image": dataset.samples[i].image, "category": dataset.samples[i].category} for i in part]
        for part in (train, holdout, statistics)
    )
    pasted = pasted_defects(AnomalyDataset([dataset.samples[i] for i in others]), len(others), size, args.seed)
    picked = {
        "test": evenly(len(test), args.max_draw_samples),
        "pasted": [2 * i + j for i in evenly(len(others), args.max_draw_samples // 2) for j in (0, 1)],
    }
    for name, images in (("test", test), ("pasted", pasted)):
        check_classes(images, f"{name} images")
        check_classes([images[i] for i in picked[name]], f"{name} images to compare draws on")

    # 2. Raw maps, each with the Gaussians of its set
    files = [(str(sample.image), sample.image.stat().st_size) for sample in [*test_set.samples, *dataset.samples]]
    settings = [files, further, args.max_draws, args.num_seeds, args.max_draw_samples, args.max_test_samples]
    settings += [args.max_good_samples, args.holdout_fraction, args.max_train_samples, args.seed, args.batch_size]
    folder = Path(args.raw_dir or output_dir / "raw") / fingerprint(pipeline, settings).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    fewer = refit(accelerator, pipeline, folder, train, fitted, args.batch_size)
    passes = Passes(pipeline, further, args.max_draws)

    def stored(name: str, images: list[dict], compute: Callable) -> RawMaps:
        return store(accelerator, folder / name, images, categories, args.batch_size, compute)

    maps = stored("good", good, lambda batch: passes.base(batch, normality))
    draws = stored("good-draws", good, lambda batch: passes.draws(batch, normality, 1))
    half = [holdout.index(i) for i in statistics]
    evaluations = {}
    for name, images, model in (("pasted", pasted, fewer), ("test", test, normality)):
        base = stored(name, images, lambda batch, model=model: passes.base(batch, model))
        some = [images[i] for i in picked[name]]
        several = stored(f"{name}-draws", some, lambda batch, m=model: passes.draws(batch, m, args.num_seeds))
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
        "num_test": len(test),
        "num_pasted": len(pasted),
        "num_good": len(fitted),
        "num_test_draws": len(picked["test"]),
        "num_pasted_draws": len(picked["pasted"]),
    }
    options = {"draws": (args.max_draws, args.num_seeds, pipeline.config.num_noise_samples)}
    results = {}
    for ablation_name, ablation in ABLATIONS.items():
        rows = {}
        for name, x in evaluations.items():
            of = x.draws if ablation_name == "draws" else x.images
            with torch.no_grad():
                progress = tqdm(ablation.rows(x, *options.get(ablation_name, ())), f"{ablation.title}, {SETS[name]}")
                for setting, default, variants in progress:
                    metrics = [measure(of, *variant, args.map_size, pipeline) for variant in variants]
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
