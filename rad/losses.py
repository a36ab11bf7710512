"""What RAN's network is trained on: "Removing Anomalies as Noises for Industrial Defect Localization" (Lu et al., ICCV
2023), section 3."""

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr

from .models.unet_rad import RADUNet2DOutput
from .scheduler_rad import RADScheduler


def compute_losses(
    unet: torch.nn.Module,
    scheduler: RADScheduler,
    batch: dict[str, torch.Tensor],
    features: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """`ran_losses` of a pass of the network over a batch.

    Args:
        unet: The network, or what wraps it.
        scheduler: Noises the images.
        batch: As from `TrainingCollator`.
        features, snr_gamma: As in `ran_losses`.
    """
    x_t = scheduler.add_noise(batch["x_0"], batch["noise"], batch["timesteps"])
    output = unet(x_t, batch["timesteps"], batch.get("class_labels"))
    return ran_losses(output, scheduler, batch, x_t, features, snr_gamma)


def ran_losses(
    output: RADUNet2DOutput,
    scheduler: RADScheduler,
    batch: dict[str, torch.Tensor],
    x_t: torch.Tensor,
    features: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """The three terms of RAN's loss, which is their sum, [3]: MSE(eps, noise), L_vlb in bits, and L_feat.

    Of a network that improves on a Wiener filter the first term is MSE(x0_hat, x_0) in units of what that filter alone
    would make of it at each timestep, so that all of them count alike and 1 is where it starts.

    L_vlb is that of "Improved Denoising Diffusion Probabilistic Models" (Nichol and Dhariwal, 2021), which trains the
    variance alone.

    Args:
        output: Of the network at x_t.
        batch: x_0 and noise [B, 3, S, S], and timesteps [B], steps of the full chain.
        x_t: The noised images, [B, 3, S, S].
        features: The extractor's of x_0, [B, C, g, g], which the network predicts.
        snr_gamma: Clips the weight of high signal-to-noise ratios in the first term (min-SNR, Hang et al., ICCV 2023).
    """
    x_0, noise, t = batch["x_0"], batch["noise"], batch["timesteps"]
    predicts_noise = output.linear_error is None
    squares = (output.sample.float() - (noise if predicts_noise else x_0)).square().flatten(1).mean(1)
    if not predicts_noise:
        squares = squares / output.linear_error
    elif snr_gamma:
        snr = compute_snr(scheduler, t)
        squares = squares * snr.clamp_max(snr_gamma) / snr
    bound = scheduler.variational_bound(x_0, x_t, output.sample, output.variance, t)
    return torch.stack([squares.mean(), bound.mean(), F.mse_loss(output.features.float(), features)])
