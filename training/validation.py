"""How the network does on held-out images while it is trained."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from rad import RADPipeline
from rad.denoising import draw_denoising, measure_denoiser, quality_table
from rad.losses import ran_losses

logger = logging.getLogger("rad.train")


@contextlib.contextmanager
def averaged(ema: EMAModel | None, unet: torch.nn.Module) -> Iterator[None]:
    """Inside, the U-Net has the averaged weights."""
    if ema:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
    unet.eval()
    yield
    unet.train()
    if ema:
        ema.restore(unet.parameters())


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    pipeline: RADPipeline,
    unet: torch.nn.Module,
    x_0: torch.Tensor,
    labels: torch.Tensor | None,
    step: int,
) -> None:
    """Reports losses of held-out images under fixed noise, averaged over RAN's timesteps, whether the network denoises
    them better than a blur does, and a picture of one with a drawn defect.

    Args:
        unet: The pipeline's, as it is trained.
        x_0: The images [B, 3, S, S] in [-1, 1].
        labels: Their class labels, [B], for a network with categories.
        step: How many steps the optimiser has made.
    """
    scheduler, losses = pipeline.scheduler, []
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
    features = pipeline.feature_extractor(x_0)
    for timestep in scheduler.default_timesteps:
        t = torch.full((len(x_0),), timestep, device=x_0.device)
        x_t = scheduler.add_noise(x_0, noise, t)
        output = unet(x_t, t, labels)  # on every process: a sharded network needs all of them
        losses.append(ran_losses(output, scheduler, {"x_0": x_0, "noise": noise, "timesteps": t}, x_t, features))
    known = list(pipeline.unet.config.categories)
    categories = [None] * len(x_0) if labels is None else [known[label] for label in labels.tolist()]
    quality = measure_denoiser(pipeline, x_0, categories)
    picture = draw_denoising(pipeline, x_0[0], categories[0])

    noise_loss, bound, feature = torch.stack(losses).mean(0).tolist()
    values = {"validation_noise_loss": noise_loss, "validation_vlb_loss": bound, "validation_feature_loss": feature}
    for q in quality:
        values |= {f"validation_psnr_{q.timestep}": q.psnr, f"validation_gain_{q.timestep}": q.gain}
    accelerator.log(values, step=step)
    logger.info(f"Step {step}, {len(x_0)} held-out images:\n{quality_table(quality)}")
    if accelerator.is_main_process:
        folder = Path(accelerator.project_dir) / "validation"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step-{step:06d}.png")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", np.asarray(picture), step, dataformats="HWC")
            else:  # wandb and trackio share this interface
                module = __import__(tracker.name)
                module.log({"validation": module.Image(picture)}, step=step)
