"""What one look at images gives, and the scores that are made of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ScoreType:
    """A score that images get.

    Attributes:
        name: As arguments, outputs and files have it.
        title: As tables and figures have it.
        weighted: Whether it has a weight in the fused score.
        in_paper: Whether RAN has it too.
        has_map: Whether it says where; if not it is of an image as a whole.
    """

    name: str
    title: str
    weighted: bool = True
    in_paper: bool = False
    has_map: bool = True


FUSED, GLOBAL = "fused", "global"
# The one order of scores: that of the rows of a normality model's buffers, which a discriminator may be missing from
SCORE_TYPES = {
    score_type.name: score_type
    for score_type in (
        ScoreType(FUSED, "fused", weighted=False, in_paper=True),
        ScoreType("pixel", "KL", in_paper=True),
        ScoreType("feature", "feature error", in_paper=True),
        ScoreType("residual", "feature residual"),
        ScoreType("mahalanobis", "Mahalanobis"),
        ScoreType("rgb", "RGB difference", weighted=False, in_paper=True),
        ScoreType("discriminator", "discriminator"),
        ScoreType(GLOBAL, "whole image", has_map=False),
    )
}
WEIGHTED = [name for name, score_type in SCORE_TYPES.items() if score_type.weighted]


@dataclass(frozen=True)
class Evidence:
    """What `RADPipeline.measure` finds on B images of side S at T timesteps; nothing of it knows what is good.

    Attributes:
        kl: KL in bits, mean over colour channels and noise draws, [B, T, S, S]; RAN's pixel-level score s_t.
        error: Squared error of the predicted features, mean over channels and draws, [B, T, g, g].
        raw_error: The same of the extractor's raw channels, before each is brought to one scale; RAN's s^f_t.
        rgb: |x0_hat - x_0|, mean over colour channels and draws, [B, T, S, S].
        features: The extractor's, [B, C, g, g].
        residuals: The features less their prediction, mean over timesteps and draws, [B, C, g, g].
        summaries: What the extractor says of each image as a whole, [B, D].
        logits: The discriminator's, [B, h, w]; None without one.
        x_t: The noised images of the first draw, [B, T, 3, S, S].
        x0_hat: What the denoiser makes of them, likewise.
        categories: What each image was taken to show; None where nobody knows.
    """

    kl: torch.Tensor
    error: torch.Tensor
    raw_error: torch.Tensor
    rgb: torch.Tensor
    features: torch.Tensor
    residuals: torch.Tensor
    summaries: torch.Tensor
    logits: torch.Tensor | None
    x_t: torch.Tensor
    x0_hat: torch.Tensor
    categories: list[str | None]

    def stack(self, size: int) -> torch.Tensor:
        """The maps that are there before good images are known, on one grid: log KL, feature error and log RGB
        difference at each timestep, then the logits if there are any, [B, 3 T (+ 1), size, size].

        KL and RGB difference are averaged down, then their logs taken: both are positive with a long tail.
        """
        kl, rgb = (to_grid(maps, size).clamp_min(1e-6).log() for maps in (self.kl, self.rgb))
        logits = [] if self.logits is None else [to_grid(self.logits, size)]
        return torch.cat([kl, to_grid(self.error, size), rgb, *logits], dim=1)


def to_grid(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Maps [B, (M,) h, w] on a grid of `size`: averaged down or interpolated up, [B, M, size, size]."""
    maps = maps.float() if maps.ndim == 4 else maps[:, None].float()
    if maps.shape[-1] > size:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, (size, size), mode="bilinear")


def weighted_sum(maps: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """The maps that have a weight and are there, in the registry's order: sums round alike whoever asks."""
    zero = torch.zeros_like(next(iter(maps.values())))
    return sum((weights[name] * maps[name] for name in SCORE_TYPES if name in weights and name in maps), start=zero)


def paper_scores(evidence: Evidence, alpha: float = 0.5) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """RAN's maps [B, S, S] and scores [B] by name: A = mean over t of alpha z(s_t) + (1 - alpha) s^f_t, where z is the
    z-score within each image; an image's score is the mean of the 64 largest values."""
    kl = evidence.kl
    z = (kl - kl.mean((2, 3), keepdim=True)) / kl.std((2, 3), keepdim=True)
    error = F.interpolate(evidence.raw_error, kl.shape[-2:], mode="bilinear")
    maps = {
        FUSED: (alpha * z + (1 - alpha) * error).mean(1),
        "pixel": z.mean(1),
        "feature": error.mean(1),
        "rgb": evidence.rgb.mean(1),
    }
    return maps, {name: values.flatten(1).topk(64).values.mean(1) for name, values in maps.items()}
