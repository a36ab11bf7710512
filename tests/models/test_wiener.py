"""The Wiener filter against SciPy's cosine transform, the theory of Gaussians, and the plainest denoiser: a blur."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter

from rad import RADPipeline, RADScheduler, RADUNet2DModel
from rad.models.wiener import QUANTISATION, WienerFilter, dct, idct

SIDE = 32
CHAIN = RADScheduler().full_chain.alphas_cumprod
TIMESTEPS = (20, 100, 201, 401)


def gaussian_images(count: int, seed: int) -> torch.Tensor:
    """Grey-blue images [count, 3, SIDE, SIDE] of a known spectrum that falls with frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.mgrid[:SIDE, :SIDE])
    deviation = 0.6 / (1 + frequency / 2) ** 1.5
    grey, blue = (idctn(rng.normal(size=(count, SIDE, SIDE)) * deviation, axes=(1, 2), norm="ortho") for _ in range(2))
    return torch.from_numpy(np.stack([grey, grey, grey + 0.5 * blue], axis=1) + 0.1).float()


@pytest.fixture(scope="module")
def fitted() -> WienerFilter:
    return WienerFilter(3, SIDE).fit(gaussian_images(400, 0).split(50), CHAIN)


def noised(x_0: torch.Tensor, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.full((len(x_0),), timestep)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(timestep))
    return RADScheduler().add_noise(x_0, noise, t), t


def test_the_cosine_transform_is_scipys():
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = dctn(x.numpy(), axes=(2, 3), norm="ortho")
    assert np.allclose(dct(x).numpy(), expected, atol=1e-12)
    assert torch.allclose(idct(dct(x)), x, atol=1e-12)


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_it_is_the_linear_estimate_of_least_squares(fitted, timestep):
    """Coefficient by coefficient, by an independent computation in float64."""
    x_0 = gaussian_images(3, 1)
    x_t, t = noised(x_0, timestep)
    found, error = fitted(x_t, t, torch.zeros_like(x_t))

    train = gaussian_images(400, 0).double().numpy()
    mean = train.mean((0, 2, 3))
    covariance = np.cov((train - mean[:, None, None]).transpose(1, 0, 2, 3).reshape(3, -1))
    axes = np.linalg.eigh(covariance)[1]
    along = np.einsum("ck,bchw->bkhw", axes, train - mean[:, None, None])
    spectrum = np.maximum((dctn(along, axes=(2, 3), norm="ortho") ** 2).mean(0), QUANTISATION)
    variance = (1 - CHAIN[timestep]) / CHAIN[timestep]
    x = np.einsum("ck,bchw->bkhw", axes, x_t.double().numpy() / np.sqrt(CHAIN[timestep]) - mean[:, None, None])
    filtered = dctn(x, axes=(2, 3), norm="ortho") * spectrum / (spectrum + variance)
    expected = np.einsum("ck,bkhw->bchw", axes, idctn(filtered, axes=(2, 3), norm="ortho")) + mean[:, None, None]
    assert np.allclose(found.numpy(), expected, atol=1e-4)
    assert np.allclose(error.numpy(), (spectrum * variance / (spectrum + variance)).mean(), rtol=1e-4)


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_its_error_is_what_it_says_and_below_that_of_any_blur(fitted, timestep):
    x_0 = gaussian_images(200, 2)
    x_t, t = noised(x_0, timestep)
    found, expected = fitted(x_t, t, torch.zeros_like(x_t))
    error = float((found - x_0).square().mean())
    assert error == pytest.approx(float(expected[0]), rel=0.05)
    scaled = x_t / CHAIN[timestep] ** 0.5
    blurs = [gaussian_filter(scaled.numpy(), (0, 0, b, b)) for b in (0, 0.5, 1, 1.5, 2, 3, 4, 6, 8)]
    assert error < 0.9 * min(float((torch.from_numpy(blur) - x_0).square().mean()) for blur in blurs)


def test_what_the_network_adds_is_in_units_of_its_error(fitted):
    """White noise as correction has the error's own size and spectrum."""
    x_t, t = noised(gaussian_images(50, 3), 100)
    correction = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    plain, error = fitted(x_t, t, torch.zeros_like(x_t))
    corrected, _ = fitted(x_t, t, correction)
    assert float((corrected - plain).square().mean()) == pytest.approx(float(error[0]), rel=0.05)


def test_each_image_is_filtered_at_its_own_timestep(fitted):
    x_0 = gaussian_images(2, 4)
    both, _ = fitted(x_0, torch.tensor([20, 401]), torch.zeros_like(x_0))
    for i, timestep in enumerate((20, 401)):
        alone, _ = fitted(x_0[i : i + 1], torch.tensor([timestep]), torch.zeros_like(x_0[:1]))
        assert torch.allclose(both[i], alone[0], atol=1e-5)


def test_crops_are_filtered_by_the_same_spectrum(fitted):
    """A crop has the statistics of the image, so its filter errs as much."""
    x_0 = gaussian_images(200, 5)[..., :16, :16]
    x_t, t = noised(x_0, 100)
    found, expected = fitted(x_t, t, torch.zeros_like(x_t))
    assert float((found - x_0).square().mean()) == pytest.approx(float(expected[0]), rel=0.2)


def test_unfitted_it_is_edms_with_one_variance():
    x_t, t = noised(gaussian_images(2, 6), 100)
    x, variance = x_t / CHAIN[100] ** 0.5, (1 - CHAIN[100]) / CHAIN[100]
    found, error = WienerFilter(3, SIDE)(x_t, t, torch.ones_like(x_t))
    expected = x / (1 + variance) + (variance / (1 + variance)) ** 0.5
    assert torch.allclose(found, expected.float(), atol=1e-5)
    assert torch.allclose(error, torch.full((2,), variance / (1 + variance), dtype=torch.float32), rtol=1e-5)


def test_half_precision_and_autocast_keep_what_it_knows(fitted):
    x_t, t = noised(gaussian_images(4, 7), 20)
    expected, _ = fitted(x_t, t, torch.zeros_like(x_t))
    rounded = WienerFilter(3, SIDE)
    rounded.load_state_dict({name: value.half() for name, value in fitted.state_dict().items()})
    assert torch.allclose(rounded(x_t, t, torch.zeros_like(x_t))[0], expected, atol=5e-3)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = fitted(x_t, t, torch.zeros_like(x_t))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one batch of good images"):
        WienerFilter(3, SIDE).fit([], CHAIN)


def test_a_network_starts_at_the_filter_and_predicts_x_0():
    torch.manual_seed(0)
    unet = RADUNet2DModel(
        sample_size=SIDE, block_out_channels=(32, 32, 32), attention_head_dim=8, feature_channels=8, wiener=True
    )
    unet.wiener_filter.fit(gaussian_images(50, 0).split(10), CHAIN)
    x_t, t = noised(gaussian_images(2, 8), 100)
    output = unet(x_t, t)
    expected, error = unet.wiener_filter(x_t, t, torch.zeros_like(x_t))
    assert torch.equal(output.sample, expected) and torch.equal(output.linear_error, error)
    scheduler = RADScheduler(prediction_type="sample")
    assert torch.equal(scheduler.predict_x0(output.sample, x_t, t).float(), output.sample)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_scheduler_and_network_must_predict_the_same(pipeline, prediction_type):
    wiener = prediction_type == "epsilon"
    unet = RADUNet2DModel(**{**pipeline.unet.config, "wiener": wiener})
    scheduler = RADScheduler(prediction_type=prediction_type)
    with pytest.raises(ValueError, match="The scheduler's prediction_type is"):
        RADPipeline(unet, scheduler, pipeline.feature_extractor, resolution=64)
