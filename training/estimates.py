"""How long a run will take and how much room it needs, told before it starts; and where its time went."""

import argparse
import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from checkpoints import checkpoints_of
from discriminator import fit_discriminator

from rad import RADPipeline
from rad.data.batches import TrainingSampler
from rad.losses import compute_losses
from rad.models.fusion import KINDS
from rad.pipeline_fitting import MAX_SOURCES, MAX_VIEWED

logger = logging.getLogger("rad.train")


def estimate_time(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: RADPipeline,
    unet: torch.nn.Module,
    num_images: int,
    num_steps: int = 0,
    sampler: TrainingSampler | None = None,
) -> None:
    """Times both sorts of batches and the scoring of an image, and says how long the run will take.

    Args:
        unet: The pipeline's, as it is trained.
        num_images: That normality is fitted to.
        num_steps: Of training, on the batches of `sampler`.
    """

    def seconds(count: int, size: int, train: bool) -> float:
        x = torch.rand(count, 3, size, size, device=accelerator.device) * 2 - 1
        t = torch.randint(0, args.max_timestep, (count,), device=accelerator.device)
        batch = {"x_0": x, "noise": torch.randn_like(x), "timesteps": t}
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            with torch.set_grad_enabled(train):
                losses = compute_losses(unet, pipeline.scheduler, batch, pipeline.feature_extractor(x))
                if train:
                    losses.sum().backward()
            losses.tolist()  # waits for the device
        unet.zero_grad()
        return time.perf_counter() - start

    with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):  # leaves no trace
        # Some of them also through another camera, and with defects
        looks = num_images + min(num_images, MAX_VIEWED) + len(KINDS) * min(num_images, MAX_SOURCES)
        fit = 1.3 * seconds(3, args.resolution, False) * looks / accelerator.num_processes  # three timesteps
        text = f"{fit / 60:.0f} minutes for normality"
        if args.discriminator_steps and not args.fit_only:
            networks = pipeline.unet, pipeline.scheduler, pipeline.feature_extractor
            probe = RADPipeline(*networks, resolution=args.resolution)
            probe.set_progress_bar_config(disable=True)
            noise, elapsed = torch.randint(256, (2, 3, *[args.resolution] * 2), dtype=torch.uint8), []
            for count in (1, 3):
                start = time.perf_counter()
                fit_discriminator(probe, list(noise), num_steps=count)
                elapsed.append(time.perf_counter() - start)
            minutes = max(0.0, elapsed[1] - elapsed[0]) / 2 * args.discriminator_steps / 60
            text = f"{minutes:.0f} minutes for {args.discriminator_steps} of the discriminator, then {text}"
        if num_steps:
            crop = seconds(sampler.batch_size, sampler.crop_size, True)
            whole = seconds(sampler.num_whole, args.resolution, True)
            step = args.gradient_accumulation_steps * (args.crop_prob * crop + (1 - args.crop_prob) * whole)
            text = f"{1.1 * step * num_steps / 60:.0f} minutes for {num_steps} steps, then {text}"
    logger.info(f"Estimated: {text}, and measuring if there are test images.")


def check_space(output_dir: Path, num_parameters: int, num_checkpoints: int) -> None:
    """Raises OSError before the run if the disk has no room for its checkpoints: weights, two moments, the average."""
    new = num_checkpoints + 1 - len(checkpoints_of(output_dir))  # a new one is written before the oldest goes
    needed = 16 * num_parameters * new
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise OSError(
            f"The checkpoints need about {needed / 1e6:,.0f} MB, but {output_dir} has {free / 1e6:,.0f} MB free: "
            "make room or lower --checkpoints_total_limit."
        )


class Stopwatch:
    """Seconds spent in named parts of a step. Waits for the device, so `on` should be set for some steps only."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.on = device, Counter(), True

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now() if self.on else 0.0
        yield
        if self.on:
            self.seconds[name] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
