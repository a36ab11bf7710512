"""The training loss: what it is 0 for, and which pixels count."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rad import RADScheduler
from rad.losses import ran_losses
from rad.models.unet_rad import RADUNet2DOutput


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
def test_a_network_that_removes_defects_with_the_noise_has_no_loss(prediction_type):
    """What is noised has a defect; targets are the good image's, and variance is learned where nothing was pasted."""
    scheduler, generator = RADScheduler(prediction_type=prediction_type), torch.Generator().manual_seed(0)
    timesteps = np.array([30, 300])
    x_0 = torch.rand(2, 3, 16, 16, generator=generator) - 0.5
    noise = torch.randn(x_0.shape, generator=generator)
    is_pasted = torch.zeros(16, 16, dtype=torch.bool)
    is_pasted[4:9, 4:9] = True
    defective = x_0 + 0.4 * is_pasted
    batch = {"x_0": x_0, "defective": defective, "noise": noise, "timesteps": torch.from_numpy(timesteps)}

    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timesteps].reshape(2, 1, 1, 1)
    x_t = torch.from_numpy(np.sqrt(abar) * defective.double().numpy() + np.sqrt(1 - abar) * noise.double().numpy())
    eps = (x_t - torch.from_numpy(np.sqrt(abar)) * x_0) / torch.from_numpy(np.sqrt(1 - abar))
    is_sample, variance, features = prediction_type == "sample", torch.zeros_like(x_0), torch.zeros(2, 4, 2, 2)
    right = RADUNet2DOutput(
        x_0 if is_sample else eps.float(), variance, features, torch.tensor([0.01, 0.1]) if is_sample else None
    )
    assert ran_losses(right, scheduler, batch, x_t.float(), features)[0] < 1e-6

    wrong = replace(right, sample=defective if is_sample else noise)  # removes the noise alone
    loss, bound, _ = ran_losses(wrong, scheduler, batch, x_t.float(), features)
    bits, _ = scheduler.kl_score(x_0, x_t.float(), wrong.sample, variance, timesteps, respaced=False, clip=False)
    assert loss > 0.01
    assert torch.isclose(bound, bits[..., ~is_pasted].mean(), rtol=1e-4) and bits.mean() > 2 * bound


def test_errors_far_beyond_a_linear_filters_count_with_their_root():
    scheduler, x_0 = RADScheduler(prediction_type="sample"), torch.zeros(1, 3, 8, 8)
    batch = {"x_0": x_0, "noise": x_0, "timesteps": torch.tensor([20])}
    features = torch.zeros(1, 4, 1, 1)

    def loss(ratio):
        output = RADUNet2DOutput(x_0 + (ratio * 0.01) ** 0.5, x_0, features, torch.tensor([0.01]))
        return float(ran_losses(output, scheduler, batch, x_0, features)[0])

    assert np.isclose(loss(0.01), 0.01, rtol=1e-3) and np.isclose(loss(1.0), 1.0, rtol=0.05)
    assert np.isclose(loss(40_000.0) / loss(10_000.0), 2.0, rtol=0.05)
