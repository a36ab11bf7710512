"""Does the network denoise? What it makes of noised good images, beside the plainest denoiser there is, a blur; and
whether its KL tells defects from good pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from .data.defects import DEFECTS, add_defect
from .image_processor import to_pil
from .metrics import psnr
from .pipeline_rad import RADPipeline
from .scheduler_rad import RADScheduler, antithetic_noise
from .visualization import denoising_figure

BLURS = (0.0, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # standard deviations in pixels
RESPACED_STEPS = (5, 25, 50, 100)  # of 250: 20, 100, 201 and 401 of the full chain


@dataclass(frozen=True)
class DenoiserQuality:
    """How a network denoises good images at one timestep.

    Attributes:
        timestep: Of the full chain.
        psnr: Of x0_hat, in dB, mean over images; the range of pixels, [-1, 1], is the peak.
        blur_psnr: Likewise of the best Gaussian blur of x_t / sqrt(abar_t), of its channels or of their mean.
        calibration: Mean of (x_{t-1} - mu_theta)^2 in units of Sigma_theta; where the learned variance is right it is
            1, above it the network is surer than it may be.
        kl_good: Mean KL on the good images, in bits.
        kl_defect: Likewise on defects drawn on them; NaN where none can be.
    """

    timestep: int
    psnr: float
    blur_psnr: float
    calibration: float
    kl_good: float
    kl_defect: float

    @property
    def gain(self) -> float:
        """How much better than the blur it is, in dB."""
        return self.psnr - self.blur_psnr


@torch.no_grad()
def measure_denoiser(
    pipeline: RADPipeline,
    x_0: torch.Tensor,
    categories: Sequence[str | None],
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
) -> list[DenoiserQuality]:
    """Of good images that the network was not trained on, under the noise of one seed.

    Args:
        x_0: Good images [B, 3, S, S] in [-1, 1].
        categories: Of each, None for unknown.
        timesteps: Of the full chain, on the respaced one; by default 5, 25, 50 and 100 of RAN's 250.
    """
    scheduler, unet = pipeline.scheduler, pipeline.unet
    pairs = [_with_defect(image, number, seed) for number, image in enumerate(x_0)]
    found = []
    for timestep in timesteps or scheduler.steps_of_250(list(RESPACED_STEPS)):
        rows, blurred, odd = [], [], []
        for (pair, mask), category in zip(pairs, categories, strict=True):
            pair = pair.to(unet.device)
            image, t = pair[:1], torch.full((len(pair),), timestep, device=pair.device)
            noise = antithetic_noise(seed, timestep, 1, image).expand_as(pair)
            x_t = scheduler.add_noise(pair, noise, t)
            output = unet(x_t, t, unet.labels_of([category] * len(pair)))
            mean, log_variance, x0_hat = scheduler.model_distribution(output.sample, output.variance, x_t, t)
            true_mean, true_log_variance = scheduler.posterior(pair, x_t, t)
            squares = true_log_variance.exp() + (mean - true_mean) ** 2
            ratio = (squares * (-log_variance).exp())[0].mean()
            kl = scheduler.kl_score(pair, x_t, output.sample, output.variance, t)[0].mean(1)
            rows.append([mean_psnr(x0_hat[:1], image), float(ratio), float(kl[0].mean())])
            odd += [] if mask is None else [float(kl[1].cpu()[mask].mean())]
            blurred.append(blur_psnr(scheduler, image, x_t[:1], timestep))
        best = np.mean(blurred, axis=0).max()  # one blur for all images
        denoised, ratio, kl_good = np.mean(rows, axis=0).tolist()
        kl_defect = float(np.mean(odd)) if odd else float("nan")
        found.append(DenoiserQuality(timestep, denoised, float(best), ratio, kl_good, kl_defect))
    return found


def draw_denoising(
    pipeline: RADPipeline,
    image: torch.Tensor,
    category: str | None = None,
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
) -> Image.Image:
    """The picture beside these figures: a good image [3, S, S] with a defect drawn on it, if any can be seen, noised,
    denoised and compared at each timestep; arguments as in `measure_denoiser`."""
    timesteps = list(timesteps or pipeline.scheduler.steps_of_250(list(RESPACED_STEPS)))
    x_0 = _with_defect(image, 0, seed)[0][-1:]
    found = pipeline.measure(x_0, [category], timesteps, 1, seed)
    shown = x_0.expand(len(timesteps), -1, -1, -1)
    return denoising_figure(timesteps, shown, found.x_t[0], found.x0_hat[0], found.kl[0], found.error[0])


def _with_defect(image: torch.Tensor, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An image [3, S, S] and the same with a defect, [2, 3, S, S], and the defect's mask, bool [S, S]; the image alone
    where none can be seen on it."""
    pixels = np.asarray(to_pil(image[None])[0])
    try:
        bad, mask = add_defect(pixels, DEFECTS[number % len(DEFECTS)], 0.5, np.random.default_rng([seed, number]))
    except ValueError:
        return image[None], None
    mask = torch.from_numpy(mask)
    bad = torch.from_numpy(bad).permute(2, 0, 1).to(image) / 127.5 - 1
    return torch.stack([image, torch.where(mask.to(image.device), bad, image)]), mask


def blur_psnr(scheduler: RADScheduler, x_0: torch.Tensor, x_t: torch.Tensor, timestep: int) -> list[float]:
    """PSNR of each blur of an image [1, 3, S, S] that is noised to x_t: of its channels, then of their mean."""
    scaled, target = x_t / scheduler.full_chain.alphas_cumprod[timestep] ** 0.5, x_0.float().cpu()
    sources = [source.float().cpu().numpy() for source in (scaled, scaled.mean(1, keepdim=True))]
    blurs = (gaussian_filter(source, (0, 0, blur, blur)) for source in sources for blur in BLURS)
    return [mean_psnr(torch.from_numpy(blurred).clamp(-1, 1).expand_as(target), target) for blurred in blurs]


def quality_table(found: Sequence[DenoiserQuality]) -> str:
    """The table in Markdown, with the sentence that it asks for below it."""
    lines = [
        "| timestep | PSNR of x0_hat, dB | best blur, dB | gain, dB | calibration (1 is right) "
        "| KL on good pixels, bits | KL on drawn defects, bits |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {q.timestep} | {q.psnr:.1f} | {q.blur_psnr:.1f} | {q.gain:+.1f} | {q.calibration:.2f} "
        f"| {q.kl_good:.2g} | {q.kl_defect:.2g} |"
        for q in found
    ]
    return "\n".join([*lines, "", verdict(found)])


def verdict(found: Sequence[DenoiserQuality]) -> str:
    """One sentence: whether the network does its own job."""
    lost = [str(q.timestep) for q in found if q.gain <= 0]
    if lost:
        return (
            f"At t = {', '.join(lost)} a blur denoises better than this network does: do not rely on its KL and RGB "
            "scores there; more steps or images may mend it."
        )
    return f"It denoises better than any blur, by {min(q.gain for q in found):.1f} dB or more."


def mean_psnr(found: torch.Tensor, target: torch.Tensor) -> float:
    """Of images [B, 3, S, S] in [-1, 1], in dB, mean over them."""
    pairs = zip(found.float().cpu().numpy(), target.float().cpu().numpy(), strict=True)
    return float(np.mean([psnr(one, other, data_range=2.0) for one, other in pairs]))
