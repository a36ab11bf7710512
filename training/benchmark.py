#!/usr/bin/env python
"""Times side by side, in one run: layouts of the U-Net, the training loop against a plain one in RAN's manner, and
pixel metrics against a plain loop; the work of each network, from which the cost of the paper's tables follows; and
the page under load.

    python training/benchmark.py layouts
    python training/benchmark.py loop
    python training/benchmark.py metrics
    python training/benchmark.py flops
    python training/benchmark.py page

A step is forward, losses, backward and update. Each figure is the median over rounds in which all candidates take
turns, so that a busy machine slows all of them alike; ratios are to the first row.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from diffusers.training_utils import EMAModel
from gradio_client import Client, handle_file
from PIL import Image
from scipy.ndimage import gaussian_filter, label
from sklearn.metrics import auc, average_precision_score, roc_auc_score
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from rad import RADFeatureExtractor, RADImageProcessor, RADScheduler, RADUNet2DModel
from rad.data import AnomalyDataset, Sample
from rad.data.batches import TrainingCollator, TrainingImages, TrainingSampler, to_pixels
from rad.data.synthetic import render
from rad.losses import compute_losses
from rad.metrics import pixel_metrics
from rad.models.unet_rad import NAMED_CONFIGS
from rad.pipeline_loading import EMBEDDED_DIR

LAYOUTS = {  # with about the parameters of "small", the first
    "patch 4, 64-128-192": {},
    "patch 4, 96-128-192": {"block_out_channels": (96, 128, 192)},
    "patch 2, 64-128-192": {"patch_size": 2, "feature_block": 1},
    "patch 8, 128-192, 2 levels": {
        "patch_size": 8,
        "block_out_channels": (128, 192),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "patch 4, 64-128-192, 2 blocks a level": {"layers_per_block": 2, "feature_block": 5},
}
RESOLUTION, CROP_SIZE, BATCH_SIZE = 256, 128, 8


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layouts", "loop", "metrics", "flops", "page"))
    parser.add_argument("--rounds", type=int, default=5, help="Each candidate is timed this often.")
    parser.add_argument("--compile", action="store_true", help="layouts: also torch.compile, minutes to start with.")
    parser.add_argument("--tflops", type=float, default=312.0, help="flops: peak of the GPU (A100, bf16: 312).")
    parser.add_argument("--utilisation", type=float, default=0.3, help="flops: share of it that is reached.")
    return parser.parse_args(argv)


def side_by_side(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, and a first round warms up."""
    seconds = {name: [] for name in candidates}
    for number in tqdm(range(rounds + 1), desc="Rounds"):
        for name, step in candidates.items():
            start = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


class Trainer:
    """A network with its optimiser and average, to be stepped on any batch."""

    def __init__(
        self,
        precision: torch.dtype = torch.float32,
        channels_last: bool = False,
        compiled: bool = False,
        **config: Any,
    ) -> None:
        torch.manual_seed(0)
        self.extractor = RADFeatureExtractor.from_pretrained(EMBEDDED_DIR / "tf_efficientnet_lite0")
        self.unet = RADUNet2DModel(feature_channels=self.extractor.num_channels, **config)
        self.scheduler, self.precision = RADScheduler(), precision
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.forward = torch.compile(self.unet) if compiled else self.unet
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4)
        self.ema = EMAModel(self.unet.parameters())

    def step(self, batch: dict[str, torch.Tensor], features: torch.Tensor | None = None) -> None:
        with torch.no_grad():
            features = self.extractor(batch["x_0"]) if features is None else features
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16):
            losses = compute_losses(self.forward, self.scheduler, batch, features)
        losses.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())


def random_batch(count: int, size: int) -> dict[str, torch.Tensor]:
    x_0 = torch.rand(count, 3, size, size) * 2 - 1
    return {"x_0": x_0, "noise": torch.randn_like(x_0), "timesteps": torch.randint(0, 500, (count,))}


def time_layouts(args: argparse.Namespace) -> None:
    """Seconds of a step on crops and on whole images, for each layout and way to compute it."""
    ways = {
        "fp32": {},
        "bf16": {"precision": torch.bfloat16},
        "bf16, channels_last": {"precision": torch.bfloat16, "channels_last": True},
    }
    if args.compile:
        ways["bf16, compiled"] = {"precision": torch.bfloat16, "compiled": True}
    trainers = {f"{layout} | {way}": Trainer(**LAYOUTS[layout], **ways[way]) for layout in LAYOUTS for way in ways}
    crops, whole = random_batch(BATCH_SIZE, CROP_SIZE), random_batch(BATCH_SIZE // 4, RESOLUTION)
    candidates = {}
    for name, trainer in trainers.items():
        candidates[f"{name} | crops"] = lambda trainer=trainer: trainer.step(crops)
        candidates[f"{name} | whole"] = lambda trainer=trainer: trainer.step(whole)
    seconds = side_by_side(candidates, args.rounds)
    print(f"Seconds a step: {BATCH_SIZE} crops of {CROP_SIZE}, or {BATCH_SIZE // 4} images of {RESOLUTION} pixels")
    print("| layout | computed in | M parameters | crops | whole | speed |\n|---|---|---|---|---|---|")
    first = None
    for name, trainer in trainers.items():
        both = seconds[f"{name} | crops"], seconds[f"{name} | whole"]
        first = first or sum(both)
        parameters = sum(p.numel() for p in trainer.unet.parameters()) / 1e6
        print(f"| {name} | {parameters:.1f} | {both[0]:.3f} | {both[1]:.3f} | {first / sum(both):.2f} x |")


def time_loops(args: argparse.Namespace) -> None:
    """Steps a second of the plain loop and of ours, on the same network and images."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.png" for i in range(16)]
        for i, path in enumerate(paths):
            Image.fromarray(render("brick", np.random.default_rng(i), size=512)[0]).save(path)
        processor, dataset = RADImageProcessor(RESOLUTION), AnomalyDataset([Sample(path, "brick") for path in paths])
        decoded = {i: to_pixels(processor.resize(path)[0]) for i, path in enumerate(paths)}
        images = TrainingImages(dataset, list(range(16)), [0] * 16, processor, decoded)
        plain, cached, default = Trainer(), Trainer(torch.bfloat16), Trainer(torch.bfloat16)
        with torch.no_grad():
            features = torch.cat([cached.extractor(chunk) for chunk in images.chunks()])

        def batches(crop_prob: float, **augmentation: float) -> Iterator[dict[str, torch.Tensor]]:
            batch_size = BATCH_SIZE if crop_prob else BATCH_SIZE // 4
            sampler = TrainingSampler(16, batch_size, RESOLUTION, CROP_SIZE, crop_prob)
            return iter(DataLoader(images, batch_sampler=sampler, collate_fn=TrainingCollator(500, **augmentation)))

        whole, recipe = batches(0.0), batches(0.75, rotation=5.0, rotation_prob=0.5)
        names = cycle(paths)

        def plain_step() -> None:  # decodes and computes features at each step, in fp32
            x_0 = torch.cat([processor.preprocess(next(names))[0] for _ in range(BATCH_SIZE // 4)])
            plain.step(random_batch(BATCH_SIZE // 4, RESOLUTION) | {"x_0": x_0})

        def cached_step() -> None:
            batch = next(whole)
            cached.step(batch, features[batch["indices"]])

        candidates = {
            "plain, in RAN's manner: whole images": plain_step,
            "ours, whole images, features cached": cached_step,
            "ours, default: crops and rotations": lambda: default.step(next(recipe)),
        }
        seconds = side_by_side(candidates, args.rounds)
    first = next(iter(seconds.values()))
    print("| loop | steps/s | speed |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {1 / value:.2f} | {first / value:.2f} x |")


def random_maps(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth maps [N, size, size] and masks: three discs in every second image, where the map is a little higher."""
    rng = np.random.default_rng(0)
    maps = np.stack([gaussian_filter(rng.normal(size=(size, size)).astype(np.float32), 2) for _ in range(count)])
    masks = np.zeros(maps.shape, bool)
    rows, columns = np.indices((size, size))
    for mask in masks[::2]:
        for y, x, radius in rng.uniform((0, 0, size / 32), (size, size, size / 8), (3, 3)):
            mask |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    return maps + 0.1 * masks.astype(np.float32), masks


def plain_pixel_metrics(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """The metrics as they are defined: every region at every threshold."""
    good, defect, regions = maps[~masks], maps[masks], []
    for m, mask in zip(maps, masks, strict=True):
        labels, count = label(mask, np.ones((3, 3)))
        regions += [m[labels == i] for i in range(1, count + 1)]
    fpr, pro, f1 = [0.0], [0.0], []
    for threshold in np.unique(maps)[::-1]:
        hits, alarms = np.sum(defect >= threshold), np.sum(good >= threshold)
        f1.append(2 * hits / (hits + alarms + defect.size))
        fpr.append(alarms / good.size)
        pro.append(np.mean([np.mean(region >= threshold) for region in regions]))
    results = {
        "pixel_auroc": roc_auc_score(masks.ravel(), maps.ravel()),
        "pixel_ap": average_precision_score(masks.ravel(), maps.ravel()),
        "pixel_f1_max": max(f1),
    }
    for name, limit in (("aupro", 0.3), ("aupro_0.05", 0.05)):
        count = np.searchsorted(fpr, limit)
        x, y = [*fpr[:count], limit], [*pro[:count], np.interp(limit, fpr, pro)]
        results[name] = auc(x, y) / limit
    return results


def time_metrics(args: argparse.Namespace) -> None:
    """Seconds of all pixel metrics together, beside the plain loop on a set small enough for it."""
    small, large = random_maps(4, 64), random_maps(500, 256)
    plain, ours = plain_pixel_metrics(*small), pixel_metrics(*small)
    seconds = side_by_side(
        {
            "plain loop, 4 images of 64 x 64": lambda: plain_pixel_metrics(*small),
            "ours, the same": lambda: pixel_metrics(*small),
            "ours, 500 images of 256 x 256": lambda: pixel_metrics(*large),
        },
        args.rounds,
    )
    first = next(iter(seconds.values()))
    print(f"Largest difference between the two: {max(abs(plain[name] - ours[name]) for name in plain):.1e}")
    print("| all pixel metrics | s | speed, by pixel |\n|---|---|---|")
    for (name, value), (maps, _) in zip(seconds.items(), (small, small, large), strict=True):
        print(f"| {name} | {value:.3f} | {first / value * maps.size / small[0].size:,.0f} x |")


def time_page(args: argparse.Namespace, num_visitors: int = 20, batch_size: int = 200) -> None:
    """The page of app.py in a process of its own: start, one visitor, 20 at once, a batch of 200; and its memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, page = f"http://127.0.0.1:{port}/", Path(__file__).resolve().parent.parent / "app.py"
    start, quiet = time.perf_counter(), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, page], env={**os.environ, "GRADIO_SERVER_PORT": str(port)}, **quiet)
    peak, process = 0, psutil.Process(server.pid)

    def answer() -> float:
        """Seconds until the page is there."""
        nonlocal peak
        peak, began = max(peak, process.memory_info().rss), time.perf_counter()
        with urllib.request.urlopen(url, timeout=60) as response:
            response.read()
        return time.perf_counter() - began

    def inspect(client: Client, picture: Path) -> float:
        began = time.perf_counter()
        result = client.predict(image=handle_file(picture), api_name="/inspect")[0]
        assert result["picture"] == picture.name, "somebody else's result"
        return time.perf_counter() - began

    try:
        while server.poll() is None:
            try:
                answer()
                break
            except OSError:
                time.sleep(0.1)
        print(f"start to the page's first answer: {time.perf_counter() - start:.1f} s")
        examples = sorted((EMBEDDED_DIR / "examples").glob("*.png"))
        clients = [Client(url, verbose=False) for _ in tqdm(range(num_visitors), desc="visitors")]
        print(f"first inspection, with loading the model: {inspect(clients[0], examples[0]):.1f} s")
        alone = np.median([inspect(clients[0], examples[0]) for _ in range(args.rounds)])
        with ThreadPoolExecutor(num_visitors) as threads:
            jobs = [threads.submit(inspect, client, examples[i % len(examples)]) for i, client in enumerate(clients)]
            answers = []
            while not all(job.done() for job in jobs):
                answers.append(answer())
                time.sleep(0.2)
        waits = [job.result() for job in jobs]
        print(
            f"an inspection alone {alone:.2f} s; {num_visitors} at once: median {np.median(waits):.1f} s, last "
            f"{max(waits):.1f} s, {max(waits) / alone:.1f} times one alone; meanwhile the page answers in "
            f"{max(answers):.2f} s at most"
        )
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "pictures.zip"
            with zipfile.ZipFile(archive, "w") as file:
                for i in range(batch_size):
                    file.write(examples[i % len(examples)], f"{i:03d}.png")
            began = time.perf_counter()
            job = clients[0].submit(archive=handle_file(archive), api_name="/inspect_batch")
            beside = []
            while not job.done():
                beside.append(inspect(clients[1], examples[1]))
                answer()
                time.sleep(2)
            rows = job.result()[0]["pictures"]
        print(
            f"a batch of {len(rows)}: {time.perf_counter() - began:.0f} s, while another visitor inspects one picture "
            f"after the other in {np.median(beside):.1f} s each"
        )
        print(f"most memory: {peak / 1e9:.2f} GB")
    finally:
        server.terminate()


def estimate_cost(args: argparse.Namespace) -> None:
    """Floating-point operations of a forward pass (a multiplication and an addition count as two), counted on no
    data, and hours for RAN's tables on a GPU that is assumed, not measured."""
    gflop_an_hour = args.tflops * args.utilisation * 1000 * 3600
    print(f"Estimates, not measurements: a GPU of {args.tflops:g} TFLOP/s used to {args.utilisation:.0%}.")
    print(
        "| network | M parameters | GFLOP a pass, 256 x 256 | RAN's training, 10,000 steps of 2, h | 1725 images, h |"
    )
    print("|---|---|---|---|---|")
    for name in NAMED_CONFIGS:
        with torch.device("meta"):
            unet = RADUNet2DModel.from_named_config(name)
            with FlopCounterMode(display=False) as counter:
                unet(torch.empty(1, 3, 256, 256), torch.empty(1, dtype=torch.long))
        gflop = counter.get_total_flops() / 1e9
        parameters = sum(p.numel() for p in unet.parameters()) / 1e6
        training = 10_000 * 2 * 3 * gflop / gflop_an_hour  # a backward pass is as much as two forward passes
        scoring = 1725 * 3 * gflop / gflop_an_hour  # three timesteps
        print(f"| {name} | {parameters:.1f} | {gflop:.0f} | {training:.2f} | {scoring:.3f} |")


if __name__ == "__main__":
    arguments = parse_args()
    candidates = {"layouts": time_layouts, "loop": time_loops, "metrics": time_metrics, "flops": estimate_cost}
    (candidates | {"page": time_page})[arguments.what](arguments)
