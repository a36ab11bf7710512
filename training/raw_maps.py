"""Raw maps of images, computed once and kept on disk, for settings that differ only in what is made of them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from rad import RADPipeline
from rad.data import AnomalyDataset
from rad.data.dataset import evenly
from rad.evaluation import Truth
from rad.files import remove_partials, whole
from rad.image_reader import ImageInput
from rad.models.evidence import Evidence, paper_scores, to_grid
from rad.models.normality import NormalityModel

KEPT = ("gaussian_size", "gaussian_channels", "gaussian_block", "weights", "image_weights")  # settings of a refit


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


@dataclass
class RawMaps:
    """Images and what one pass stored of them.

    Attributes:
        truths: What is known of each image.
        labels: Its class label.
        folder: Its safetensors files, in order, hold the images' tensors.
        picked: Which of the folder's images these are.
    """

    truths: list[Truth]
    labels: list[int]
    folder: Path
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
        """Some of the images."""
        truths, labels, picked = ([of[i] for i in positions] for of in (self.truths, self.labels, self.picked))
        return RawMaps(truths, labels, self.folder, picked)


@torch.no_grad()
def store(
    accelerator: Accelerator,
    folder: Path,
    truths: list[Truth],
    categories: Sequence[str],
    batch_size: int,
    compute: Callable[[list[Truth]], dict[str, torch.Tensor]],
) -> RawMaps:
    """Computes the batches that are not in the folder yet, every process its share."""
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_partials(folder)
    accelerator.wait_for_everyone()
    starts = range(0, len(truths), batch_size)[accelerator.process_index :: accelerator.num_processes]
    for start in tqdm(starts, desc=f"Scoring, {folder.name}", disable=not accelerator.is_local_main_process):
        path = folder / f"{start:06d}.safetensors"
        if not path.exists():
            tensors = compute(truths[start : start + batch_size])
            with whole(path) as partial:
                save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
    accelerator.wait_for_everyone()
    labels = [categories.index(truth.category) for truth in truths]
    return RawMaps(truths, labels, folder, list(range(len(truths))))


def refit(
    accelerator: Accelerator,
    pipeline: RADPipeline,
    folder: Path,
    dataset: AnomalyDataset,
    train: list[int],
    holdout: list[int],
    batch_size: int,
) -> NormalityModel:
    """The normality of the same settings whose statistics come from these images held out, kept in the folder.

    Its weights stay the model's, which are what is compared; they may have been chosen on images that get defects.
    """
    path = folder / "normality"
    if path.exists():
        return NormalityModel.from_pretrained(path).to(pipeline.device)
    config = pipeline.normality.config
    refitted = pipeline.with_normality(pipeline.normality)
    refitted.set_progress_bar_config(
        desc="Fitting normality without the images that get defects", disable=not accelerator.is_local_main_process
    )
    refitted.fit_normality(
        [dataset[i].image for i in train],
        holdout_images=[dataset[i].image for i in holdout],
        categories=[dataset.samples[i].category for i in train],
        holdout_categories=[dataset.samples[i].category for i in holdout],
        batch_size=batch_size,
        accelerator=accelerator,
        num_views=0,  # as the ablations' own statistics
        **{name: config[name] for name in KEPT},
    )
    if accelerator.is_main_process:
        with whole(path) as partial:
            refitted.normality.save_pretrained(partial)
    accelerator.wait_for_everyone()
    return refitted.normality


class Passes:
    """What the ablations need of a batch of images, from few passes of the U-Net.

    Args:
        pipeline: Measures them.
        timesteps: Further steps to measure at beside the model's own.
        max_draws: A power of 2.
    """

    def __init__(self, pipeline: RADPipeline, timesteps: list[int], max_draws: int) -> None:
        self.pipeline, self.further, self.max_draws = pipeline, timesteps, max_draws
        self.timesteps = list(pipeline.normality.config.timesteps)

    def base(
        self, images: list[ImageInput], categories: list[str], normality: NormalityModel
    ) -> dict[str, torch.Tensor]:
        """All but several draws.

        Returns:
            raw: `NormalityModel.raw_maps`, [B, M, m, m]; size [B, 2]; global: distance of the summaries, [B]; further:
            KL, feature error and RGB maps at further timesteps; raw_channels: feature error of channels that are not
            standardised, [B, T, m, m]; ran_pixel and ran_feature: RAN's mean of z(s_t) and of s^f_t, [B, S, S];
            features and residuals on a coarse grid.
        """
        x_0, sizes = self.pipeline.image_processor.preprocess(images)
        labels = [normality.config.categories.index(name) for name in categories]
        evidence = self.pipeline.measure(x_0, categories, self.timesteps)
        map_size, (ran, _) = normality.config.map_size, paper_scores(evidence)
        tensors = {
            "raw": normality.raw_maps(evidence, labels),
            "size": torch.tensor(sizes, dtype=torch.int32),
            "global": normality.global_distance(evidence.summaries, labels),
            "raw_channels": to_grid(evidence.raw_error, map_size),
            "ran_pixel": ran["pixel"],
            "ran_feature": ran["feature"],
            "features": F.adaptive_avg_pool2d(evidence.features.float(), 2),
            "residuals": F.adaptive_avg_pool2d(evidence.residuals, 1),
        }
        if self.further:
            further = self.pipeline.measure(x_0, categories, self.further)
            tensors["further"] = further.stack(map_size)[:, : 3 * len(self.further)]
        return tensors

    def draws(
        self, images: list[ImageInput], categories: list[str], normality: NormalityModel, num_seeds: int
    ) -> dict[str, torch.Tensor]:
        """Raw maps of several draws, "1-0" of one draw and the first seed, beside size and global as in `base`.

        Two draws are an antithetic pair. 4 and 8 average 2 and 4 pairs of as many noise seeds: 9 draws in all, where
        measuring each number of draws by itself would take 15.
        """
        x_0, sizes = self.pipeline.image_processor.preprocess(images)
        labels = [normality.config.categories.index(name) for name in categories]

        def measure(draws: int, seed: int) -> Evidence:
            return self.pipeline.measure(x_0, categories, self.timesteps, draws, seed)

        tensors, num_pairs = {"size": torch.tensor(sizes, dtype=torch.int32)}, max(1, self.max_draws // 2)
        for seed in range(num_seeds):
            first = seed * num_pairs
            one = measure(1, first)
            tensors[f"1-{seed}"] = normality.raw_maps(one, labels)
            pairs = [measure(2, first + i) for i in range(num_pairs)] if self.max_draws > 1 else []
            for draws in numbers_of_draws(self.max_draws)[1:]:
                tensors[f"{draws}-{seed}"] = normality.raw_maps(mean_evidence(pairs[: draws // 2]), labels)
        return tensors | {"global": normality.global_distance(one.summaries, labels)}


def mean_evidence(evidences: list[Evidence]) -> Evidence:
    """Of the same images under other noise: the mean of all that depends on it."""
    names = ("kl", "error", "rgb", "residuals")
    means = {name: torch.stack([getattr(evidence, name) for evidence in evidences]).mean(0) for name in names}
    return replace(evidences[0], **means)


def numbers_of_draws(max_draws: int) -> list[int]:
    """1, 2, 4 .. max_draws."""
    return [2**i for i in range(max_draws.bit_length())]
