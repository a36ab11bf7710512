"""Draws of what a look at good images gives, with no network."""

import numpy as np
import torch

CHANNELS, SIDE, MAP, TIMESTEPS = 6, 16, 16, (20, 201)


class GoodImages:
    """Draws of good images: features, residuals and raw maps with a mean and a deviation at each position."""

    def __init__(self, seed: int, offset: float = 0.0):
        self.rng = np.random.default_rng(seed)
        layout = np.random.default_rng(8)
        self.mixing = layout.standard_normal((2, CHANNELS, CHANNELS)) / CHANNELS**0.5 + np.eye(CHANNELS)
        self.mean = layout.normal(offset, 3.0, (CHANNELS, SIDE, SIDE))
        self.location = layout.uniform(1, 5, (3 * len(TIMESTEPS) + 1, MAP, MAP))
        self.deviation = layout.uniform(0.5, 1.5, (3 * len(TIMESTEPS) + 1, MAP, MAP))
        self.location[-1], self.deviation[-1] = -4.0, 2.0  # logits mean the same everywhere

    def _draw(self, count: int, mixing: np.ndarray, cell: int) -> np.ndarray:
        """Deviations that averaging over cells of this side leaves with about unit variance."""
        return np.einsum("cd,ndhw->nchw", mixing, cell * self.rng.standard_normal((count, CHANNELS, SIDE, SIDE)))

    def features(self, count: int) -> torch.Tensor:
        return torch.from_numpy(self._draw(count, self.mixing[0], 2) + self.mean).float()

    def residuals(self, count: int) -> torch.Tensor:
        return torch.from_numpy(self._draw(count, self.mixing[1], 4) + 0.2 * self.mean).float()

    def raw_maps(self, count: int) -> torch.Tensor:
        noise = self.rng.standard_normal((count, *self.location.shape))
        return torch.from_numpy(self.location + self.deviation * noise).float()

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.features(count), self.residuals(count), self.raw_maps(count)


def summarise(features: torch.Tensor) -> torch.Tensor:
    """Stands for the extractor's summaries: the mean over all positions, in other units, [N, CHANNELS]."""
    return 3 * features.mean((2, 3)) + 5
