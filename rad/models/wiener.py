"""The best linear denoiser of good images, which a network has only to improve on."""

import math
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

QUANTISATION = (2 / 255) ** 2 / 12  # variance of 8-bit rounding of pixels in [-1, 1]: no frequency has less


class WienerFilter(nn.Module):
    """Preconditions a network by the spectrum of good images.

    EDM (Karras et al., NeurIPS 2022) lets the network F give x0_hat = c_skip x + c_out F with x = x_t / sqrt(abar),
    sigma^2 = (1 - abar) / abar, c_skip = S / (S + sigma^2) and c_out^2 = S sigma^2 / (S + sigma^2), where S is the
    variance of the data, one number. Images have most of theirs in low frequencies. So here S is a spectrum: the
    variance of each coefficient of good images' cosine transform, along the axes of their colours. Then c_skip x is
    the Wiener filter, the best linear denoiser, and F adds what that leaves, in units of its error.

    Unfitted it is EDM's with S = 1.

    Args:
        channels: Of the images.
        sample_size: Side of the images whose spectrum is kept; that of others is resized.
        num_train_timesteps: Length of the diffusion chain.
    """

    mean: torch.Tensor
    axes: torch.Tensor
    log_spectrum: torch.Tensor
    log_snr: torch.Tensor

    def __init__(self, channels: int = 3, sample_size: int = 256, num_train_timesteps: int = 1000) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("axes", torch.eye(channels))
        # Its logarithm, which half precision holds; the spectrum itself spans ten orders of magnitude
        self.register_buffer("log_spectrum", torch.zeros(channels, sample_size, sample_size))
        alphas_cumprod = np.cumprod(1.0 - np.linspace(1e-4, 0.02, num_train_timesteps))
        self.register_buffer("log_snr", _log_snr(alphas_cumprod))

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor], alphas_cumprod: np.ndarray) -> "WienerFilter":
        """Measures the spectrum of good images.

        Args:
            batches: Images [B, C, S, S] in [-1, 1]; of another size than the spectrum's, theirs is resized.
            alphas_cumprod: Of the chain that images are noised by, [num_train_timesteps].

        Returns:
            Itself.

        Raises:
            ValueError: There is no batch.
        """
        count, mean, cross = 0, torch.zeros(()), torch.zeros(())  # `cross` is between colours, at each frequency
        for images in batches:
            images = images.double().cpu()
            coefficients = dct(images)
            cross = cross + torch.einsum("bihw,bjhw->ijhw", coefficients, coefficients)
            mean = mean + images.mean((2, 3)).sum(0)
            count += len(images)
        if count == 0:
            raise ValueError("fit needs at least one batch of good images, got none.")
        mean, cross = mean / count, cross / count
        cross[:, :, 0, 0] -= cross.shape[-2] * cross.shape[-1] * torch.outer(mean, mean)
        axes = torch.linalg.eigh(cross.mean((2, 3))).eigenvectors
        spectrum = torch.einsum("ik,ijhw,jk->khw", axes, cross, axes)
        self.mean.copy_(mean)
        self.axes.copy_(axes)
        self.log_spectrum.copy_(_resize(spectrum.clamp_min(QUANTISATION), self.log_spectrum.shape[-2:]).log())
        self.log_snr.copy_(_log_snr(alphas_cumprod))
        return self

    def forward(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, correction: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x0_hat, and the mean squared error that the filter alone is expected to make of good images.

        Args:
            x_t: Noised images [B, C, H, W].
            timesteps: Steps of the full chain, [B].
            correction: F, what the network adds, [B, C, H, W].

        Returns:
            [B, C, H, W] and [B], float32.
        """
        with torch.autocast(x_t.device.type, enabled=False):  # differences of fine images need all of float32
            return self._forward(x_t.float(), timesteps, correction.float())

    def scale(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t / sqrt(abar), which is x_0 and noise, and abar / (1 - abar), one over that noise's variance
        [B, 1, 1, 1], float32; arguments as in `forward`."""
        snr = self.log_snr[timesteps].float().view(-1, 1, 1, 1).exp()
        return x_t.float() / (snr / (1 + snr)).sqrt(), snr

    def _forward(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, correction: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        axes, mean = self.axes.float(), self.mean.float().view(-1, 1, 1)
        x, snr = self.scale(x_t, timesteps)
        spectrum = _resize(self.log_spectrum.float().exp(), x_t.shape[-2:])
        skip = spectrum * snr / (spectrum * snr + 1)
        error = skip / snr
        along_axes = torch.einsum("ck,bchw->bkhw", axes, x - mean)
        coefficients = skip * dct(along_axes) + error.sqrt() * dct(correction)
        return torch.einsum("ck,bkhw->bchw", axes, idct(coefficients)) + mean, error.mean((1, 2, 3))


def _log_snr(alphas_cumprod: np.ndarray) -> torch.Tensor:
    """log(abar / (1 - abar)), float32, [T]."""
    return torch.from_numpy(np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)).float()


def _resize(spectrum: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A spectrum [C, h, w] for images of another size: each coefficient stands for as many more or fewer of them."""
    if spectrum.shape[-2:] == tuple(size):
        return spectrum
    smaller = size[0] <= spectrum.shape[-2] and size[1] <= spectrum.shape[-1]
    return F.interpolate(spectrum[None], tuple(size), mode="area" if smaller else "bilinear")[0]


def dct(images: torch.Tensor) -> torch.Tensor:
    """Orthonormal cosine transform (DCT-II) over the last two axes, which mirrors images at their borders."""
    rows, columns = (_cosines(side, images.dtype, images.device) for side in images.shape[-2:])
    return rows @ images @ columns.T


def idct(coefficients: torch.Tensor) -> torch.Tensor:
    """The inverse of `dct`."""
    rows, columns = (_cosines(side, coefficients.dtype, coefficients.device) for side in coefficients.shape[-2:])
    return rows.T @ coefficients @ columns


@cache
def _cosines(side: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The transform as a matrix [side, side]: products of matrices run fast everywhere, and in any precision."""
    with torch.inference_mode(False):  # others use it, too
        return _cosine_matrix(side).to(device, dtype)


def _cosine_matrix(side: int) -> torch.Tensor:
    place, frequency = torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi * (2 * place + 1) * frequency / (2 * side)) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
