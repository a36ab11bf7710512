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
from rad.denoising import mean_psnr
from rad.losses import ran_losses
from rad.visualization import denoising_figure

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
    """Reports losses of held-out images under fixed noise, averaged over RAN's timesteps, how well they are denoised
    at each, and a picture at the middle one.

    Args:
        unet: The pipeline's, as it is trained.
        x_0: The images [B, 3, S, S] in [-1, 1].
        labels: Their class labels, [B], for a network with categories.
        step: How many steps the optimiser has made.
    """
    scheduler, timesteps, losses = pipeline.scheduler, pipeline.scheduler.default_timesteps, []
    psnr = {}
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
    features = pipeline.feature_extractor(x_0)
    for timestep in timesteps:
        t = torch.full((len(x_0),), timestep, device=x_0.device)
        x_t = scheduler.add_noise(x_0, noise, t)
        output = unet(x_t, t, labels)  # on every process: a sharded network needs all of them
        batch = {"x_0": x_0, "noise": noise, "timesteps": t}
        losses.append(ran_losses(output, scheduler, batch, x_t, features))
        psnr[timestep] = mean_psnr(scheduler.predict_x0(output.sample, x_t, t).clamp(-1, 1), x_0)
        if timestep == timesteps[len(timesteps) // 2] and accelerator.is_main_process:
            kl, x0_hat = scheduler.kl_score(x_0, x_t, output.sample, output.variance, t)
            error = (output.features.float() - features).square().mean(1)
            picture = denoising_figure(x_0, x_t, x0_hat, kl.mean(1), error)
    noise_loss, bound, feature = torch.stack(losses).mean(0).tolist()
    values = {"validation_noise_loss": noise_loss, "validation_vlb_loss": bound, "validation_feature_loss": feature}
    accelerator.log(values | {f"validation_psnr_{t}": value for t, value in psnr.items()}, step=step)
    told = ", ".join(f"{value:.1f} dB at t = {t}" for t, value in psnr.items())
    logger.info(f"Step {step}: PSNR of x0_hat of held-out images {told}.")
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
