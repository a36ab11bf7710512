#!/usr/bin/env python
"""Measures a pipeline and other methods side by side: the same images, resolution, frozen backbone and machine.

    python training/compare.py --model mtd --data_dir MTD --dataset_format mtd --output_dir comparison

Each method is fitted to each category by itself and measured, one after another, each step in a process of its own:
memory is what that process holds in RAM. Then one process times all methods in turns on the same images, so that other
work on the machine slows all of them alike. Settings are the published ones as far as one CPU allows, and are written
below the table. DRAEM needs anomalib: pip install -r requirements-bench.txt.

What is fitted and measured stays in the output folder, <method>-<category>.safetensors and .json: the same command
goes on where it was stopped, and methods can be added. Peers depend on the pipeline's frozen backbone and resolution
alone; after the pipeline itself has changed, --refit rad measures it anew beside them.
"""

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm.auto import tqdm

from rad import RADPipeline
from rad.data import DATASET_FORMATS, load_dataset
from rad.data.batches import from_uint8, to_uint8
from rad.evaluation import measure, resize_map, test_images
from rad.models.normality import GLOBAL, inverse_cholesky
from rad.pipeline_rad import EMBEDDED_MODELS

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
ACCURACY = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
PRECISION = {"no": "fp32", "bf16": "bf16"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic", help=f"Folder, Hub id or one of {', '.join(EMBEDDED_MODELS)}.")
    parser.add_argument("--data_dir", required=True, help="Folder of the data set.")
    parser.add_argument(
        "--dataset_format", default="auto", choices=("auto", *DATASET_FORMATS), help="Layout of that folder."
    )
    parser.add_argument("--category", nargs="+", help="Categories to measure; by default all.")
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="By default a GPU if there is one.")
    parser.add_argument(
        "--output_dir", default="comparison", help="For results.json, results.md, comparison.png and what is fitted."
    )
    return parser.parse_args(argv)


class Embedding(nn.Module):
    """Stages of the pipeline's own frozen extractor, resized to one grid and concatenated.

    Args:
        strides: The stages to take.
        grid: Pixels per position of the grid.
        average: Average each stage over 3 x 3 positions first, as PatchCore does.
        mode: How `F.interpolate` resizes.
    """

    def __init__(self, pipeline: RADPipeline, strides: tuple[int, ...], grid: int, average: bool, mode: str):
        super().__init__()
        self.extractor, self.grid, self.average, self.mode = pipeline.feature_extractor, grid, average, mode
        self.stages = [i for i, s in enumerate(self.extractor.network.feature_info.reduction()) if s in strides]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, C, h, w] of images [B, 3, S, S] in [-1, 1]."""
        outputs = self.extractor.network(((x + 1) / 2 - self.extractor.pixel_mean) / self.extractor.pixel_std)
        stages = [outputs[i] for i in self.stages]
        if self.average:
            stages = [F.avg_pool2d(stage, 3, stride=1, padding=1) for stage in stages]
        size = [side // self.grid for side in x.shape[-2:]]
        return torch.cat([F.interpolate(stage, size, mode=self.mode) for stage in stages], 1)


class Peer(nn.Module):
    """A method to compare with.

    A subclass gives `fit(images)` for good images [N, 3, S, S], uint8, and `forward(x)` for one image [1, 3, S, S] in
    [-1, 1]: its map [1, h, w] and its score, a number.

    Attributes:
        flags: The arguments of the command line that `fit` depends on.
        found: The buffers that `fit` adds.
    """

    flags: tuple[str, ...] = ()
    found: tuple[str, ...] = ()

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace):
        super().__init__()
        self.processor, self.args, self.device = pipeline.image_processor, args, pipeline.device

    def load(self, state_dict: dict[str, torch.Tensor]) -> None:
        """What `fit` has made, of a peer that was fitted before."""
        for name in self.found:
            self.register_buffer(name, torch.empty_like(state_dict[name], device=self.device))
        self.load_state_dict(state_dict)
        self.eval()

    def autocast(self) -> torch.autocast:
        """Networks are trained under it; losses are computed outside, in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16")

    def chunks(self, images: torch.Tensor, size: int = 16) -> Iterator[torch.Tensor]:
        """The images once, in order, in [-1, 1] and on the device."""
        for chunk in tqdm(images.split(size), desc=type(self).__name__):
            yield from_uint8(chunk.to(self.device))

    def train_steps(
        self,
        images: torch.Tensor,
        network: nn.Module,
        loss_of: Callable,
        steps: int,
        lr: float,
        milestones: list[float],
    ) -> list[float]:
        """Trains `network` with Adam on random batches, lr / 10 from each milestone (a share of the steps) on.

        `loss_of` gives the loss of a batch in [-1, 1]. Returns the loss of each step.
        """
        losses, optimizer = [], torch.optim.Adam(network.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(m * steps) for m in milestones])
        network.train()
        progress = tqdm(range(steps), desc=type(self).__name__)
        for _ in progress:
            picked = torch.randint(len(images), (self.args.train_batch_size,))
            loss = loss_of(from_uint8(images[picked].to(self.device)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
        network.eval()
        return losses

    @torch.no_grad()
    def score(self, item: dict) -> dict[str, tuple[np.ndarray, float]]:
        """{name of the row: (map [H, W] at the image's own size, score)} of one of `test_images`."""
        x, sizes = self.processor.preprocess(item["image"])
        maps, score = self(x.to(self.device))
        return {self.title: (self.processor.resize_map(maps, sizes)[0], float(score))}


class RAD(Peer):
    """The pipeline itself, as `training/train.py` left it: its fused score and each single one."""

    title, fit = "RAD", None

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace):
        super().__init__(pipeline, args)
        self.settings = f"the model {args.model}, trained beforehand; single scores come from the same pass."
        self.pipeline = pipeline
        self.parts = nn.ModuleList(part for part in pipeline.components.values() if isinstance(part, nn.Module))
        pipeline.set_progress_bar_config(disable=True)

    def score(self, item: dict) -> dict[str, tuple[np.ndarray, float]]:
        known = [] if self.pipeline.normality is None else self.pipeline.normality.config.categories
        label = item["category"] if item["category"] in known else None
        output = self.pipeline(item["image"], class_labels=label, seed=self.args.seed)
        results = {self.title: (output.anomaly_map[0], float(output.score[0]))}
        for name, value in output.scores.items():
            if name not in ("fused", GLOBAL):
                results[f"{self.title}, {name} alone"] = output[f"{name}_map"][0], float(value[0])
        return results


class PaDiM(Peer):
    """A Gaussian of features at every position: Defard et al., "PaDiM", ICPR Workshops 2021."""

    title, found = "PaDiM", ("mean", "whitening")
    grid, average, mode = 4, False, "nearest"
    settings = (
        "strides 4, 8 and 16 on the grid of stride 4, all channels, covariance + 0.01 I; map smoothed by a Gaussian "
        "of sigma 4, image score = its maximum."
    )

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace):
        super().__init__(pipeline, args)
        self.embedding = Embedding(pipeline, (4, 8, 16), self.grid, self.average, self.mode)

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> None:
        total, squares = 0.0, None
        for x in self.chunks(images):
            features = self.embedding(x).flatten(2).permute(2, 0, 1).double()  # [positions, B, C]
            total = total + features.sum(1)
            if squares is None:
                squares = features.mT @ features
            else:
                squares.baddbmm_(features.mT, features)
        mean = total / len(images)
        whitening = []  # W^T W is the inverse of the covariance
        for m, square in zip(mean.split(256), squares.split(256), strict=True):
            covariance = (square - len(images) * m[:, :, None] * m[:, None, :]) / (len(images) - 1)
            covariance.diagonal(dim1=1, dim2=2).add_(0.01)
            whitening.append(torch.from_numpy(inverse_cholesky(covariance.cpu().numpy())).float())
        self.register_buffer("mean", mean.float()[..., None])
        self.register_buffer("whitening", torch.cat(whitening).to(mean.device))

    def distance(self, x: torch.Tensor) -> torch.Tensor:
        """Mahalanobis distance at each position, [1, h, w]."""
        features = self.embedding(x)
        deviation = features[0].flatten(1).T[..., None] - self.mean  # [positions, C, 1]
        return (self.whitening @ deviation).norm(dim=1).view(1, *features.shape[2:])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return smooth(self.distance(x), x)


class CoarsePaDiM(PaDiM):
    """PaDiM with the features that PatchCore takes: averages over 3 x 3 on a grid half as fine."""

    title = "PaDiM, coarse"
    grid, average, mode = 8, True, "bilinear"
    settings = (
        "PaDiM with its strides averaged over 3 x 3 on the grid of stride 8; of three such variants the one with the "
        "highest image AUROC on MTD's test images."
    )


class PatchCore(Peer):
    """Distance to the nearest of stored patches: Roth et al., "Towards Total Recall", CVPR 2022."""

    title, flags, found = "PatchCore", ("coreset_ratio",), ("memory",)

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace):
        super().__init__(pipeline, args)
        self.embedding = Embedding(pipeline, (8, 16), grid=8, average=True, mode="bilinear")
        self.settings = (
            "strides 8 and 16, averaged over 3 x 3, on the grid of stride 8; greedy k-center coreset of "
            f"{args.coreset_ratio:.1%} of all patches; map smoothed by a Gaussian of sigma 4, image score reweighted "
            "by 9 neighbours (the paper's equation 7)."
        )

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> None:
        patches = torch.cat([self.patches(self.embedding(x)) for x in self.chunks(images)])
        count = max(1, round(self.args.coreset_ratio * len(patches)))
        self.register_buffer("memory", patches[k_center_greedy(patches, count)])

    @staticmethod
    def patches(features: torch.Tensor) -> torch.Tensor:
        """Features [B, C, h, w] as rows [B h w, C]."""
        return features.permute(0, 2, 3, 1).flatten(0, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.embedding(x)
        patches = self.patches(features)
        distance, nearest = torch.cdist(patches, self.memory).min(1)
        worst = distance.argmax()
        to_nearest = torch.cdist(self.memory[nearest[worst], None], self.memory)[0]
        neighbours = to_nearest.topk(min(9, len(self.memory)), largest=False).indices
        around = torch.cdist(patches[worst, None], self.memory[neighbours])[0]  # its first is distance[worst]
        score = (1 - around.softmax(0)[0]) * distance[worst]
        return smooth(distance.view(1, *features.shape[2:]), x)[0], score


def k_center_greedy(points: torch.Tensor, count: int, pool_size: int = 256) -> torch.Tensor:
    """Indices of `count` of the points [N, C]: a random one, then each time the one farthest from all chosen.

    Gaps only shrink, so the farthest point is known to be among the `pool_size` farthest until their gaps have fallen
    below the next one's: so long, all other points can wait and then be compared with several new ones at once.
    """
    squares = points.square().sum(1)
    gap = torch.full_like(squares, torch.inf)  # squared distance to the nearest chosen one, -inf for these themselves
    chosen, known = [int(torch.randint(len(points), ()))], 0
    progress = tqdm(total=count, initial=1, desc="Coreset")
    while len(chosen) < count:
        new, known = chosen[known:], len(chosen)
        for part, square, rows in zip(gap.split(2**14), squares.split(2**14), points.split(2**14), strict=True):
            products = torch.addmm(squares[new], rows, points[new].T, alpha=-2)
            torch.minimum(part, products.amin(1).add_(square), out=part)
        gap[chosen] = -torch.inf

        near, pool = gap.topk(min(pool_size, len(points)))
        rest = near[-1].item() if len(pool) < len(points) else -torch.inf
        between = torch.cdist(points[pool], points[pool]).square()
        while len(chosen) < count and (len(chosen) == known or near.max() > rest):
            picked = near.argmax()
            chosen.append(int(pool[picked]))
            near = torch.minimum(near, between[picked])
            near[picked] = -torch.inf
        progress.update(len(chosen) - known)
    return torch.tensor(chosen, device=points.device)


def smooth(distance: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A map [1, h, w] at the resolution of the images x and smoothed, as PaDiM and PatchCore do, and its maximum."""
    maps = F.interpolate(distance[None], x.shape[-2:], mode="bilinear")
    maps = gaussian_blur(maps, [33, 33], [4.0, 4.0])[0]
    return maps, maps.max()


class Autoencoder(Peer):
    """Error of a reconstruction through a bottleneck: Bergmann et al., VISAPP 2019, the L2 kind."""

    title, flags = "autoencoder", ("max_train_steps", "train_batch_size", "mixed_precision")
    skip, noise_std = False, 0.0

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace):
        super().__init__(pipeline, args)
        self.network = ConvAutoencoder(self.skip, pipeline.config.resolution).to(self.device)
        kind = (
            f"skip connections, coarse noise of deviation {self.noise_std}"
            if self.skip
            else "bottleneck of 100 numbers"
        )
        self.settings = (
            f"{kind}; {args.max_train_steps} steps of {args.train_batch_size} in {PRECISION[args.mixed_precision]} "
            "with Adam at 1e-3, the last fifth at 1e-4; map = squared error smoothed by a Gaussian of sigma 4, image "
            "score = its maximum."
        )

    def fit(self, images: torch.Tensor) -> None:
        self.losses = self.train_steps(
            images, self.network, self.loss, self.args.max_train_steps, lr=1e-3, milestones=[0.8]
        )

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            reconstruction = self.network(x + self.noise_std * coarse_noise(x))
        return F.mse_loss(reconstruction.float(), x)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return smooth((self.network(x) - x).square().mean(1), x)


class DenoisingAutoencoder(Autoencoder):
    """Error of what removes coarse noise: Kascenas et al., "Denoising Autoencoders", MIDL 2022."""

    title = "denoising autoencoder"
    skip, noise_std = True, 0.4  # the paper's 0.2 is for images in [0, 1]


class ConvAutoencoder(nn.Module):
    """Five strided convolutions and their mirror image, with a vector of 100 numbers or skip connections between."""

    def __init__(self, skip: bool, resolution: int, widths: tuple[int, ...] = (3, 32, 64, 128, 128, 128)):
        super().__init__()
        self.skip, pairs = skip, list(zip(widths, widths[1:], strict=False))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b * (1 + skip), a, 4, stride=2, padding=1) for a, b in pairs)
        if not skip:
            side = resolution // 2 ** len(pairs)
            self.encode, self.decode = nn.Conv2d(widths[-1], 100, side), nn.ConvTranspose2d(100, widths[-1], side)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stages = []
        for down in self.down:
            x = F.leaky_relu(down(x), 0.2)
            stages.append(x)
        if not self.skip:
            x = F.leaky_relu(self.decode(self.encode(x)), 0.2)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat([x, stages[level]], 1) if self.skip else x)
            x = F.leaky_relu(x, 0.2) if level else x
        return x


def coarse_noise(x: torch.Tensor) -> torch.Tensor:
    """Standard normal noise of a grid of 1/8 of the resolution, resized to the images x and rolled at random."""
    noise = torch.randn(*x.shape[:2], x.shape[2] // 8, x.shape[3] // 8, device=x.device)
    shift = [int(torch.randint(side, ())) for side in x.shape[2:]]
    return F.interpolate(noise, x.shape[2:], mode="bilinear").roll(shift, (2, 3))


class DRAEM(Peer):
    """Finds what a reconstruction repairs, trained on pasted textures: Zavrtanik et al., ICCV 2021; from anomalib."""

    title, flags = "DRAEM", ("draem_train_steps", "train_batch_size", "mixed_precision", "draem_width", "texture_dir")

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace):
        from anomalib.models.image.draem import torch_model

        super().__init__(pipeline, args)
        self.model = torch_model.DraemModel()
        if args.draem_width != 1:
            reconstructive, discriminative = int(128 * args.draem_width), int(64 * args.draem_width)
            self.model.reconstructive_subnetwork = torch_model.ReconstructiveSubNetwork(base_width=reconstructive)
            self.model.discriminative_subnetwork = torch_model.DiscriminativeSubNetwork(6, 2, discriminative)
        self.to(self.device)
        self.settings = (
            f"anomalib's, {args.draem_width:g} of its width, {args.draem_train_steps} steps of "
            f"{args.train_batch_size} in {PRECISION[args.mixed_precision]} with Adam at 1e-4, "
            f"textures: {args.texture_dir or 'Perlin noise'}; image score = maximum of the map averaged over 21 x 21. "
            "Published: full width, 700 epochs of batch 8, DTD's textures."
        )

    def fit(self, images: torch.Tensor) -> None:
        from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
        from anomalib.models.image.draem.loss import DraemLoss

        augment, loss = PerlinAnomalyGenerator(anomaly_source_path=self.args.texture_dir), DraemLoss()

        def loss_of(x: torch.Tensor) -> torch.Tensor:
            clean = (x + 1) / 2
            augmented, mask = augment(clean)
            with self.autocast():
                reconstruction, prediction = self.model(augmented)
            return loss(clean, reconstruction.float(), mask, prediction.float())

        self.losses = self.train_steps(
            images, self.model, loss_of, self.args.draem_train_steps, lr=1e-4, milestones=[4 / 7, 6 / 7]
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.model((x + 1) / 2).anomaly_map
        return maps, F.avg_pool2d(maps, 21, stride=1, padding=10).max()


METHODS = {
    "rad": RAD,
    "padim": PaDiM,
    "padim_coarse": CoarsePaDiM,
    "patchcore": PatchCore,
    "autoencoder": Autoencoder,
    "denoising_autoencoder": DenoisingAutoencoder,
    "draem": DRAEM,
}


def peak_memory() -> float:
    """Largest resident memory of this process in MB since the last call (Linux)."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    Path("/proc/self/clear_refs").write_text("5")  # starts anew
    return int(peak) * 1024 / 1e6


def fingerprint(method: str, category: str, pipeline: RADPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """All that a method's numbers for one category depend on, beside the code."""
    files = [
        (os.path.relpath(sample.image, args.data_dir), sample.image.stat().st_size, sample.defect)
        for split in ("train", "test")
        for sample in load_dataset(args.data_dir, args.dataset_format, split, [category]).samples
    ]
    weights = hashlib.sha256()
    if method == "rad":
        for component in (pipeline, *pipeline.components.values()):
            if component is not None:
                config = {name: value for name, value in component.config.items() if not name.startswith("_")}
                weights.update(json.dumps(config, sort_keys=True, default=str).encode())
            if isinstance(component, nn.Module):
                weights.update(save(component.state_dict()))
    else:
        weights.update(save(pipeline.feature_extractor.network.state_dict()))
    names = ("seed", "map_size", "max_train_samples", "max_test_samples", "device", *METHODS[method].flags)
    return {
        "weights": weights.hexdigest(),
        "resolution": pipeline.config.resolution,
        "data": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        **{name: getattr(args, name) for name in names},
    }


def paths(method: str, category: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """Where a fitted peer and its measurements are stored."""
    folder = Path(args.output_dir)
    return folder / f"{method}-{category}.safetensors", folder / f"{method}-{category}.json"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write to, which becomes `path` once it is complete."""
    part = path.with_name(f"{path.name}.part")
    yield part
    part.replace(path)


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
        samples = load_dataset(args.data_dir, args.dataset_format, "train", [category]).samples
        picked = np.random.default_rng(args.seed).permutation(len(samples))[: args.max_train_samples]
        images = torch.cat(
            [to_uint8(peer.processor.preprocess(samples[i].image)[0]) for i in tqdm(picked, desc="Decoding")]
        )
        peak_memory()
        start = time.perf_counter()
        peer.fit(images)
        found = {
            "fit_seconds": time.perf_counter() - start,
            "fit_memory_mb": peak_memory(),
            "fit_threads": torch.get_num_threads(),
        }
        with whole(paths(method, category, args)[0]) as part:
            save_file(peer.state_dict(), part, {"fit": json.dumps({"fingerprint": mark, **found})})


def load_peer(method: str, category: str, pipeline: RADPipeline, args: argparse.Namespace) -> Peer:
    """A method as `fit` left it for one category."""
    peer = METHODS[method](pipeline, args)
    if peer.fit is not None:
        peer.load(load_file(paths(method, category, args)[0], args.device))
    return peer


def score(method: str, marks: dict[str, dict], args: argparse.Namespace) -> None:
    """Measures a fitted method on each category of `marks`, {category: fingerprint}, and stores what it finds."""
    pipeline = RADPipeline.load(args.model).to(args.device)
    for category, mark in marks.items():
        peer = load_peer(method, category, pipeline, args)
        test = load_dataset(args.data_dir, args.dataset_format, "test", [category])
        items = test_images(test, (args.map_size,) * 2, args.max_test_samples)
        maps, scores = {}, {}
        peak_memory()
        for item in tqdm(items, desc=f"Scoring, {method}"):
            for title, (own_size, value) in peer.score(item).items():
                maps.setdefault(title, []).append(resize_map(own_size, args.map_size))
                scores.setdefault(title, []).append(value)
        memory = peak_memory()
        accuracy = {title: measure(items, np.stack(maps[title]), np.array(scores[title])) for title in maps}
        no_fit = {"fit_seconds": None, "fit_memory_mb": None, "fit_threads": None}
        record = {
            **(no_fit if peer.fit is None else read_fit(paths(method, category, args)[0])),
            "fingerprint": mark,
            "memory_mb": memory,
            "size_mb": sum(t.numel() * t.element_size() for t in peer.state_dict().values()) / 1e6,
            "settings": peer.settings,
            "accuracy": accuracy,
        }
        with whole(paths(method, category, args)[1]) as part:
            part.write_text(json.dumps(record, indent=2))


def time_in_turns(categories: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds from file to map, batch 1, of each method on the same images, which all methods take in turns."""
    pipeline, seconds = RADPipeline.load(args.model).to(args.device), {method: [] for method in args.methods}
    for number, category in enumerate(categories):
        peers = {method: load_peer(method, category, pipeline, args) for method in args.methods}
        share = len(range(number, args.latency_images, len(categories)))  # of the images
        test = load_dataset(args.data_dir, args.dataset_format, "test", [category])
        items = test_images(test, (args.map_size,) * 2, share)
        for peer in peers.values():  # the first pass is slower
            peer.score({"image": test.samples[0].image, "category": category})
        for turn, item in enumerate(tqdm(items, desc="Timing")):
            for method in np.roll(args.methods, turn):
                start = time.perf_counter()
                peers[method].score(item)
                seconds[method].append(time.perf_counter() - start)
    return seconds


def table(records: dict[str, list[dict]], seconds: dict[str, list[float]]) -> list[dict]:
    """The rows, one dict each, of {method: records of its categories} and `time_in_turns`.

    Accuracy is the mean over categories, latency the median over images, and so is its ratio; times to fit are summed;
    memory is the largest, and size that of one category's model.
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
            means = {name: float(np.mean([r["accuracy"][title][name] for r in found])) for name in ACCURACY}
            rows.append({"method": title, **means, **common})
    return rows


def to_markdown(rows: list[dict], num_images: int) -> str:
    """The table, and below it how it was timed and the settings of each method."""
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
    return "\n".join([*lines, "", timing, "", *settings])


def draw(rows: list[dict]) -> Figure:
    """AUPRO and image AUROC against latency, names beside the axes; the pipeline's single scores are hollow."""
    figure = Figure(figsize=(13, 1.5 + 0.3 * max(10, len(rows))), dpi=120, layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("aupro", "image_auroc"), strict=True):
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

    # 1. What is there already; all of it must come from the same arguments
    pipeline = RADPipeline.load(args.model)
    categories = load_dataset(args.data_dir, args.dataset_format, "test", args.category).categories
    marks = {m: {c: fingerprint(m, c, pipeline, args) for c in categories} for m in args.methods}
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
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()

    def report(seconds: dict[str, list[float]]) -> list[dict]:
        done = [m for m in args.methods if all(paths(m, c, args)[1].exists() for c in categories)]
        records = {m: [json.loads(paths(m, c, args)[1].read_text()) for c in categories] for m in done}
        rows = table(records, seconds)
        results = {
            "arguments": vars(args),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "rows": rows,
            "seconds": seconds,
        }
        (folder / "results.json").write_text(json.dumps(results, indent=2))
        (folder / "results.md").write_text(to_markdown(rows, args.latency_images) + "\n")
        return rows

    for method in args.methods:
        for step, number in ((fit, 0), (score, 1)):
            if METHODS[method].fit is None and step is fit:
                continue
            missing = {c: mark for c, mark in marks[method].items() if not paths(method, c, args)[number].exists()}
            if missing:
                in_a_process(step, method, missing, args)
        report({})  # without latencies yet

    # 3. Time them side by side
    rows = report(time_in_turns(categories, args))
    draw(rows).savefig(folder / "comparison.png")
    print((folder / "results.md").read_text())
    return rows


if __name__ == "__main__":
    main(parse_args())
