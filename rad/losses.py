"""What RAN's network is trained on: "Removing Anomalies as Noises for Industrial Defect Localization" (Lu et al., ICCV
2023), section 3."""

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr

from .models.unet_rad import RADUNet2DOutput
from .scheduler_rad import RADScheduler

TOLERATED = 10.0  # times a linear filter's error: from here on an image's loss grows with its root


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
    x_t = scheduler.add_noise(batch.get("defective", batch["x_0"]), batch["noise"], batch["timesteps"])
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

    Anomalies as noises, literally: what is noised may be an image with pasted defects. All targets are those of the
    good image below, so that the network learns to remove defects together with the noise; RAN pastes none. Variance
    is learned where nothing was pasted.

    Of a network that improves on a Wiener filter the first term is MSE(x0_hat, x_0) in units of what that filter alone
    would make of it at each timestep, so that all of them count alike and 1 is where it starts. Errors far beyond
    that, of defects under little noise, count less (the pseudo-Huber loss of each image's error).

    L_vlb is that of "Improved Denoising Diffusion Probabilistic Models" (Nichol and Dhariwal, 2021), which trains the
    variance alone.

    Args:
        output: Of the network at x_t.
        batch: x_0 and noise [B, 3, S, S], timesteps [B], steps of the full chain, and perhaps `defective`, what was
            noised in the place of x_0.
        x_t: The noised images, [B, 3, S, S].
        features: The extractor's of x_0, [B, C, g, g], which the network predicts.
        snr_gamma: Clips the weight of high signal-to-noise ratios in the first term (min-SNR, Hang et al., ICCV 2023).
    """
    x_0, noise, t = batch["x_0"], batch["noise"], batch["timesteps"]
    defective, where = batch.get("defective"), None
    if defective is not None:
        where = (defective == x_0).all(1, keepdim=True)
    if output.linear_error is not None:
        ratio = (output.sample.float() - x_0).square().flatten(1).mean(1) / output.linear_error
        losses = 2 * TOLERATED * ((1 + ratio / TOLERATED).sqrt() - 1)
    else:
        snr = compute_snr(scheduler, t)
        if defective is not None:  # the noise that would lead from the good image to x_t
            noise = noise + snr.sqrt().view(-1, 1, 1, 1) * (defective - x_0)
        losses = (output.sample.float() - noise).square().flatten(1).mean(1)
        if snr_gamma:
            losses = losses * snr.clamp_max(snr_gamma) / snr
    bound = scheduler.variational_bound(x_0, x_t, output.sample, output.variance, t, where)
    return torch.stack([losses.mean(), bound.mean(), F.mse_loss(output.features.float(), features)])
