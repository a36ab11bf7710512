"""What is finer than a patch: convolutions at the images' own resolution that finish what patches began."""

import torch
import torch.nn.functional as F
from torch import nn


class DetailBranch(nn.Module):
    """Improves an estimate of x_0 where all of it lies between pixels.

    A network that holds 4 x 4 pixels in each position passes fine texture through few channels, and under little noise
    that is all there is to tell noise from. A few plain convolutions (as in DnCNN, Zhang et al., TIP 2017) see the
    estimate and, in units of the noise, what it takes for noise; what they add is in units of the estimate's expected
    error, so that it counts alike at every timestep. Untrained they add nothing.

    Args:
        channels: Of the images.
        width: Of the hidden layers.
        num_layers: Convolutions of 3 x 3, at least two.
        embedding_dim: Of the network's embedding of timestep and category, which scales and shifts each hidden layer.
    """

    def __init__(self, channels: int, width: int, num_layers: int, embedding_dim: int) -> None:
        super().__init__()
        widths = [2 * channels, *[width] * (num_layers - 1)]
        self.hidden = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, padding_mode="reflect")
            for before, after in zip(widths, widths[1:], strict=False)
        )
        self.conditions = nn.Linear(embedding_dim, 2 * width * len(self.hidden))
        self.out = nn.Conv2d(width, channels, 3, padding=1, padding_mode="reflect")
        for parameter in (*self.conditions.parameters(), *self.out.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self, x0_hat: torch.Tensor, x: torch.Tensor, noise_std: torch.Tensor, error: torch.Tensor, emb: torch.Tensor
    ) -> torch.Tensor:
        """A better x0_hat.

        Args:
            x0_hat: What there is, float32 [B, C, H, W].
            x: x_t / sqrt(abar), which is x_0 and noise, likewise.
            noise_std: Of that noise, [B, 1, 1, 1].
            error: Mean squared error to expect of x0_hat, [B].
            emb: Timestep and category, [B, embedding_dim].
        """
        noise, dtype = (x - x0_hat) / noise_std, self.out.weight.dtype
        # At this resolution convolutions on a CPU take a third less time with channels last
        hidden = torch.cat([x0_hat, noise], dim=1).to(dtype, memory_format=torch.channels_last)
        conditions = self.conditions(F.silu(emb.to(dtype)))[:, :, None, None].chunk(len(self.hidden), dim=1)
        for layer, condition in zip(self.hidden, conditions, strict=True):
            scale, shift = condition.chunk(2, dim=1)
            hidden = F.silu(layer(hidden) * (1 + scale) + shift)
        return x0_hat + error.sqrt().view(-1, 1, 1, 1) * self.out(hidden).float()
