"""Whether a network denoises: figures against independent ones, and a verdict that names one that does not."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from rad.data.defects import DEFECTS, add_defect
from rad.denoising import BLURS, DenoiserQuality, measure_denoiser, quality_table, verdict
from rad.image_processor import to_input
from rad.models.unet_rad import RADUNet2DOutput
from rad.scheduler_rad import antithetic_noise


@pytest.fixture(scope="module")
def x_0(pipeline, good_images):
    return pipeline.image_processor.preprocess(good_images[:3])[0]


@pytest.fixture
def oracle(pipeline, x_0, monkeypatch):
    """A network that knows the noise but for a share of it, and says nothing of its variance."""

    def answer(share):
        truth = {}

        def predict(x_t, t, labels=None):
            image = x_0[truth["next"] % len(x_0)]
            truth["next"] += 1
            abar = pipeline.scheduler.full_chain.alphas_cumprod[int(t[0])]
            noise = (x_t - abar**0.5 * image) / (1 - abar) ** 0.5
            return RADUNet2DOutput((1 - share) * noise.float(), torch.full_like(x_t, -1.0))

        truth["next"] = 0
        monkeypatch.setattr(pipeline.unet, "forward", predict)

    return answer


def test_psnr_is_that_of_x0_hat(pipeline, x_0, oracle):
    """A tenth of the noise is left: its variance follows from the chain."""
    oracle(0.1)
    for q in measure_denoiser(pipeline, x_0, [None] * 3, [20, 100]):
        abar = pipeline.scheduler.full_chain.alphas_cumprod[q.timestep]
        expected = 10 * np.log10(4 / (0.01 * (1 - abar) / abar))
        assert q.psnr == pytest.approx(expected, abs=0.3)


def test_the_blur_is_the_best_of_all(pipeline, x_0, oracle):
    oracle(0.0)
    (q,) = measure_denoiser(pipeline, x_0, [None] * 3, [201], seed=5)
    abar, rows = pipeline.scheduler.full_chain.alphas_cumprod[201], []
    for image in x_0:
        noise = antithetic_noise(5, 201, 1, image[None])[0]
        x = ((abar**0.5 * image + (1 - abar) ** 0.5 * noise) / abar**0.5).numpy()
        both = (x, np.repeat(x.mean(0, keepdims=True), 3, 0))
        blurs = [gaussian_filter(s, (0, b, b)).clip(-1, 1) for s in both for b in BLURS]
        rows.append([10 * np.log10(4 / ((blur - image.numpy()) ** 2).mean()) for blur in blurs])
    assert q.blur_psnr == pytest.approx(np.mean(rows, 0).max(), abs=0.01)


def test_calibration_is_1_where_the_variance_is_right(pipeline, x_0, oracle):
    """A network that knows x_0 and says the posterior's variance."""
    oracle(0.0)
    found = measure_denoiser(pipeline, x_0, [None] * 3)
    assert [q.timestep for q in found] == [20, 100, 201, 401]
    assert all(q.calibration == pytest.approx(1, abs=0.02) for q in found if q.psnr > 60)


def test_a_network_that_is_too_sure_is_above_1(pipeline, x_0, oracle):
    """By its error's part in x_{t-1}, which its variance leaves out."""
    oracle(0.5)
    chain = pipeline.scheduler.respaced_chain
    for q in measure_denoiser(pipeline, x_0, [None] * 3, [20, 100]):
        i = list(chain.timesteps).index(q.timestep)
        error = 4 / 10 ** (q.psnr / 10)
        expected = 1 + chain.posterior_mean_coef_x0[i] ** 2 * error / np.exp(chain.posterior_log_variance[i])
        assert q.calibration == pytest.approx(expected, rel=0.1) and expected > 1.01


def test_kl_is_large_on_defects_that_the_network_removes(pipeline, x_0, oracle):
    """It knows the good image below: KL is 0 there, and on a defect what the difference of the means says."""
    oracle(0.0)
    (q,) = measure_denoiser(pipeline, x_0, [None] * 3, [201])
    assert q.kl_good == pytest.approx(0, abs=1e-6) and q.kl_defect > 1e-3
    chain, expected = pipeline.scheduler.respaced_chain, []
    i = list(chain.timesteps).index(201)
    for number, image in enumerate(x_0):
        pixels = ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        bad, mask = add_defect(pixels, DEFECTS[number], 0.5, np.random.default_rng([0, number]))
        moved = chain.posterior_mean_coef_x0[i] * ((bad.astype(float) - pixels) / 127.5)[mask]
        expected.append((moved**2 / np.exp(chain.posterior_log_variance[i])).mean() / 2 / np.log(2))
    assert q.kl_defect == pytest.approx(np.mean(expected), rel=0.05)


def test_a_network_that_loses_to_a_blur_is_named():
    found = [DenoiserQuality(20, 35.5, 36.4, 1.0, 0.5, 2.25), DenoiserQuality(100, 32.0, 31.1, 1.0, 0.1, 0.4)]
    assert verdict(found).startswith("At t = 20 a blur denoises better than this network does")
    assert "| 20 | 35.5 | 36.4 | -0.9 | 1.00 | 0.5 | 2.2 |" in quality_table(found) and verdict(
        found
    ) in quality_table(found)
    assert verdict(found[1:]) == "It denoises better than any blur, by 0.9 dB or more."


def test_images_are_measured_one_by_one(pipeline, good_images):
    """What is measured of an image does not depend on its neighbours."""
    x_0 = to_input(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in good_images[:2]]))
    both = measure_denoiser(pipeline, x_0, [None] * 2, [100])[0]
    alone = [measure_denoiser(pipeline, one, [None], [100])[0] for one in x_0.split(1)]
    assert both.psnr == pytest.approx(np.mean([q.psnr for q in alone]), abs=1e-4)
    assert both.calibration == pytest.approx(np.mean([q.calibration for q in alone]), rel=1e-4)
