"""The diffusion arithmetic against the published formulas, written out a second time with scalars in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.overrides import TorchFunctionMode

from rad import RADScheduler
from rad.scheduler_rad import discretized_gaussian_log_likelihood, gaussian_kl

SHAPE = (3, 4, 5)
FULL_STEPS = list(range(1000))
RESPACED_STEPS = [round(i * 999 / 249) for i in range(250)]
CHAIN_TIMESTEPS = [(False, t) for t in (0, 1, 20, 201, 401, 999)] + [(True, t) for t in (0, 4, 20, 201, 401, 999)]

scheduler = RADScheduler()


def abar(t: int) -> float:
    """Product of 1 - beta_s over s <= t, with 1000 betas on a line from 1e-4 to 0.02; 1 before the first step."""
    return math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(t + 1))


class Reference:
    """Section 3 of the paper at one timestep, in float64."""

    def __init__(self, t: int, respaced: bool):
        steps = RESPACED_STEPS if respaced else FULL_STEPS
        i = steps.index(t)
        self.t = t
        self.abar = abar(t)
        self.abar_prev = abar(steps[i - 1]) if i > 0 else 1.0
        self.beta = 1 - self.abar / self.abar_prev
        if i > 0:
            self.posterior_variance = self.beta * (1 - self.abar_prev) / (1 - self.abar)
        else:  # clipped to that of the next step
            following, here = abar(steps[1]), self.abar
            self.posterior_variance = (1 - following / here) * (1 - here) / (1 - following)

    def posterior_mean(self, x_0, x_t):
        alpha = 1 - self.beta
        return (
            self.beta * math.sqrt(self.abar_prev) / (1 - self.abar) * x_0
            + (1 - self.abar_prev) * math.sqrt(alpha) / (1 - self.abar) * x_t
        )

    def model(self, eps, v, x_t, clip):
        """Mean, variance and x0_hat of p(x_{t-1} | x_t)."""
        x0_hat = x_t / math.sqrt(self.abar) - math.sqrt(1 / self.abar - 1) * eps
        if clip:
            x0_hat = np.clip(x0_hat, -1, 1)
        fraction = (v + 1) / 2
        log_variance = fraction * math.log(self.beta) + (1 - fraction) * math.log(self.posterior_variance)
        return self.posterior_mean(x0_hat, x_t), np.exp(log_variance), x0_hat

    def score(self, x_0, x_t, eps, v, clip):
        """KL in bits or, at t = 0, the bits that code the 8-bit level of x_0."""
        mean, variance, _ = self.model(eps, v, x_t, clip)
        if self.t == 0:
            deviation = np.sqrt(variance)
            upper = np.where(x_0 > 0.999, 1.0, norm.cdf(x_0 + 1 / 255, mean, deviation))
            lower = np.where(x_0 < -0.999, 0.0, norm.cdf(x_0 - 1 / 255, mean, deviation))
            return -np.log2(upper - lower)
        nats = (
            np.log(np.sqrt(variance) / math.sqrt(self.posterior_variance))
            + (self.posterior_variance + (self.posterior_mean(x_0, x_t) - mean) ** 2) / (2 * variance)
            - 1 / 2
        )
        return nats / math.log(2)


def draw(batch: int, seed: int = 0):
    """8-bit images x_0 with both ends of their range, noise, and a network's imperfect eps and v."""
    rng = np.random.default_rng(seed)
    x_0 = rng.integers(0, 256, (batch, *SHAPE)) / 127.5 - 1
    x_0[:, 0, 0, :2] = [-1, 1]
    noise, error = rng.standard_normal((2, batch, *SHAPE))
    v = rng.uniform(-1, 1, (batch, *SHAPE))
    return [torch.from_numpy(x).float() for x in (x_0, noise, 0.8 * noise + 0.5 * error, v)]


def noised(t: int, batch: int = 2):
    """x_0, x_t, eps, v and [t] as float32 tensors."""
    x_0, noise, eps, v = draw(batch)
    timesteps = torch.tensor([t])
    return x_0, scheduler.add_noise(x_0, noise, timesteps), eps, v, timesteps


def in_float64(*tensors):
    return [x.double().numpy() for x in tensors]


# Tables


def test_respaced_steps_of_the_paper():
    assert scheduler.respaced_to_full([5, 50, 100]) == [20, 201, 401]
    assert scheduler.respaced_to_full([0, 1, 8, 249]) == [0, 4, 32, 999]


def test_respaced_chain_has_evenly_spaced_steps():
    assert scheduler.respaced_chain.timesteps.tolist() == RESPACED_STEPS
    assert scheduler.full_chain.timesteps.tolist() == FULL_STEPS


def test_respaced_betas_lead_to_the_same_noise():
    chain = scheduler.respaced_chain
    expected = [1 - abar(t) / (abar(RESPACED_STEPS[i - 1]) if i else 1.0) for i, t in enumerate(RESPACED_STEPS)]
    np.testing.assert_allclose(chain.betas, expected, rtol=1e-9)
    np.testing.assert_allclose(np.cumprod(1 - chain.betas), scheduler.full_chain.alphas_cumprod[RESPACED_STEPS])


def test_full_betas_are_linear():
    np.testing.assert_allclose(scheduler.full_chain.betas, np.linspace(1e-4, 0.02, 1000), rtol=1e-9)


def test_another_length_of_the_respaced_chain():
    short = RADScheduler(num_train_timesteps=100, num_respaced_timesteps=10)
    assert short.respaced_to_full(list(range(10))) == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


def test_default_timesteps_are_the_papers():
    assert scheduler.default_timesteps == [20, 201, 401]
    assert scheduler.steps_of_250([8, 249]) == [32, 999]


@pytest.mark.parametrize(("full", "respaced"), [(1000, 2), (1000, 50), (100, 10), (100, 100), (4000, 500)])
def test_steps_of_250_are_as_far_along_a_chain_of_another_length(full, respaced):
    other = RADScheduler(num_train_timesteps=full, num_respaced_timesteps=respaced)
    for step, t in zip((5, 50, 100), (20, 201, 401), strict=True):
        (found,) = other.steps_of_250([step])
        assert found in other.respaced_chain.timesteps
        assert abs(found / (full - 1) - t / 999) <= 1 / (respaced - 1)
    assert other.default_timesteps == sorted(set(other.default_timesteps))
    assert other.steps_of_250(list(range(250)))[-1] == full - 1


# Forward process


@pytest.mark.parametrize(("t", "deviation"), [(20, 0.08), (201, 0.59), (401, 0.90)])
def test_add_noise(t, deviation):
    x_0, noise, _, _ = draw(2)
    x_t = scheduler.add_noise(x_0, noise, torch.tensor([t]))
    expected = math.sqrt(abar(t)) * x_0.double() + math.sqrt(1 - abar(t)) * noise.double()
    np.testing.assert_allclose(x_t, expected, rtol=1e-5, atol=1e-6)
    assert math.sqrt(1 - abar(t)) == pytest.approx(deviation, abs=0.005)  # as the paper's steps are meant


def test_add_noise_takes_a_timestep_for_each_image():
    x_0, noise, _, _ = draw(3)
    together = scheduler.add_noise(x_0, noise, torch.tensor([0, 401, 999]))
    for i, t in enumerate((0, 401, 999)):
        alone = scheduler.add_noise(x_0[i : i + 1], noise[i : i + 1], torch.tensor([t]))
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_add_noise_keeps_the_dtype(dtype):
    x_0, noise, _, _ = draw(1)
    assert scheduler.add_noise(x_0.to(dtype), noise.to(dtype), torch.tensor([20])).dtype == dtype


@pytest.mark.parametrize("t", [0, 20, 999])
def test_predict_x0_inverts_add_noise(t):
    x_0, noise, _, _ = (x.double() for x in draw(2))
    x_t = scheduler.add_noise(x_0, noise, torch.tensor([t]))
    np.testing.assert_allclose(scheduler.predict_x0(noise, x_t, torch.tensor([t])), x_0, atol=1e-9)


# Posterior, model distribution and KL against the reference


@pytest.mark.parametrize(("respaced", "t"), CHAIN_TIMESTEPS)
def test_posterior(respaced, t):
    x_0, x_t, _, _, timesteps = noised(t)
    mean, log_variance = scheduler.posterior(x_0, x_t, timesteps, respaced)
    reference = Reference(t, respaced)
    np.testing.assert_allclose(mean, reference.posterior_mean(*in_float64(x_0, x_t)), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(log_variance.exp(), reference.posterior_variance, rtol=1e-7)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("respaced", "t"), CHAIN_TIMESTEPS)
def test_model_distribution(respaced, t, clip):
    _, x_t, eps, v, timesteps = noised(t)
    mean, log_variance, x0_hat = scheduler.model_distribution(eps, v, x_t, timesteps, respaced, clip)
    expected = Reference(t, respaced).model(*in_float64(eps, v, x_t), clip)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(log_variance.exp(), expected[1], rtol=1e-7)
    np.testing.assert_allclose(x0_hat, expected[2], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("respaced", "t"), CHAIN_TIMESTEPS)
def test_kl_score(respaced, t, clip):
    x_0, x_t, eps, v, timesteps = noised(t)
    bits, x0_hat = scheduler.kl_score(x_0, x_t, eps, v, timesteps, respaced, clip)
    reference, arrays = Reference(t, respaced), in_float64(x_0, x_t, eps, v)
    np.testing.assert_allclose(bits, reference.score(*arrays, clip), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x0_hat, reference.model(*arrays[2:], arrays[1], clip)[2], rtol=1e-5, atol=1e-6)
    assert bits.dtype == x0_hat.dtype == torch.float32


def test_clamping_is_the_schedulers_by_default():
    arguments = noised(401)
    for clip in (True, False):
        by_default = RADScheduler(clip_sample=clip).kl_score(*arguments)[0]
        assert torch.equal(by_default, scheduler.kl_score(*arguments, clip=clip)[0])
    assert not torch.equal(scheduler.kl_score(*arguments, clip=True)[0], scheduler.kl_score(*arguments, clip=False)[0])


def test_variance_spans_the_learned_range():
    """v = 1 is log beta_t, v = -1 log b~_t."""
    _, x_t, eps, _, timesteps = noised(201)
    reference = Reference(201, True)
    for v, variance in ((1.0, reference.beta), (-1.0, reference.posterior_variance)):
        _, log_variance, _ = scheduler.model_distribution(eps, torch.full_like(eps, v), x_t, timesteps)
        np.testing.assert_allclose(log_variance, math.log(variance), rtol=1e-7)


@pytest.mark.parametrize("t", [4, 20, 201, 401, 999])
def test_kl_is_never_negative(t):
    x_0, x_t, eps, v, timesteps = noised(t, batch=50)
    bits, _ = scheduler.kl_score(x_0, x_t, eps, 1.5 * v, timesteps)  # v may leave its range a little
    assert bits.min() >= 0


@pytest.mark.parametrize("t", [4, 20, 201, 401, 999])
def test_kl_of_a_perfect_prediction_is_zero(t):
    x_0, noise, _, v = (x.double() for x in draw(2))
    x_t = scheduler.add_noise(x_0, noise, torch.tensor([t]))
    bits, x0_hat = scheduler.kl_score(x_0, x_t, noise, torch.full_like(v, -1.0), torch.tensor([t]))
    np.testing.assert_allclose(bits, 0.0, atol=1e-6)
    np.testing.assert_allclose(x0_hat, x_0, atol=1e-6)


def test_gaussian_kl_against_integration():
    m1, l1, m2, l2 = 0.3, -1.0, -0.4, 0.5
    x = np.linspace(-12, 12, 200_001)
    p, q = norm.pdf(x, m1, math.exp(l1 / 2)), norm.pdf(x, m2, math.exp(l2 / 2))
    expected = np.trapezoid(p * (np.log(p + 1e-300) - np.log(q + 1e-300)), x)
    assert gaussian_kl(*(torch.tensor(value) for value in (m1, l1, m2, l2))).item() == pytest.approx(
        expected, rel=1e-5
    )


# Discretised Gaussian


def test_discretised_gaussian_against_scipy():
    levels = np.array([0, 1, 100, 254, 255])
    x, mean, deviation = levels / 127.5 - 1, np.array([-0.98, -1.0, -0.21, 1.01, 0.97]), 0.02
    edges = (levels[:, None] + [-0.5, 0.5]) / 127.5 - 1
    edges[0, 0], edges[-1, 1] = -np.inf, np.inf
    expected = np.log(norm.cdf(edges[:, 1], mean, deviation) - norm.cdf(edges[:, 0], mean, deviation))
    log_deviation = torch.full((5,), math.log(deviation), dtype=torch.float64)
    actual = discretized_gaussian_log_likelihood(torch.from_numpy(x), torch.from_numpy(mean), log_deviation)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("mean", [-1.2, -1.0, 0.0, 0.123, 0.999])
@pytest.mark.parametrize("deviation", [0.002, 0.01, 0.3])
def test_probabilities_of_all_levels_sum_to_one(mean, deviation):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_deviation = torch.full_like(x, mean), torch.full_like(x, math.log(deviation))
    total = discretized_gaussian_log_likelihood(x, mean, log_deviation).exp().sum().item()
    assert total == pytest.approx(1.0, abs=1e-8)


def test_a_hopeless_prediction_at_the_first_step_stays_finite():
    x_0 = torch.full((1, *SHAPE), -1.0)
    x_t, eps = torch.full_like(x_0, 1.0), torch.full_like(x_0, -5.0)
    v = torch.zeros_like(x_0, requires_grad=True)
    bits, _ = scheduler.kl_score(x_0, x_t, eps, v, torch.tensor([0]))
    bits.sum().backward()
    assert bits.isfinite().all() and v.grad.isfinite().all()


# Losses and batches


def test_variational_bound_is_the_unclamped_score_of_the_full_chain():
    x_0, noise, eps, v = draw(3)
    timesteps = torch.tensor([0, 21, 401])
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    bound = scheduler.variational_bound(x_0, x_t, eps, v, timesteps)
    arrays = in_float64(x_0, x_t, eps, v)
    expected = [
        Reference(int(t), False).score(*(a[i] for a in arrays), clip=False).mean() for i, t in enumerate(timesteps)
    ]
    np.testing.assert_allclose(bound, expected, rtol=1e-5)


def test_variational_bound_trains_only_v():
    x_0, noise, eps, v = draw(3)
    timesteps = torch.tensor([0, 21, 401])
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    eps.requires_grad_(), v.requires_grad_()
    scheduler.variational_bound(x_0, x_t, eps, v, timesteps).sum().backward()
    assert eps.grad is None
    assert v.grad.isfinite().all() and (v.grad.flatten(1).abs().sum(1) > 0).all()


def test_a_score_copies_its_timesteps_to_the_cpu_once():
    """Each copy waits for the GPU."""

    class Copies(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__)
            return func(*args, **(kwargs or {}))

    x_0, noise, eps, v = draw(3)
    timesteps = torch.tensor([0, 20, 401])
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    with Copies() as copies:
        scheduler.kl_score(x_0, x_t, eps, v, timesteps)
    assert copies.count == 1


def test_scores_do_not_depend_on_the_batch():
    x_0, noise, eps, v = draw(5)
    timesteps = torch.tensor([20, 0, 401, 20, 201])
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    together, _ = scheduler.kl_score(x_0, x_t, eps, v, timesteps)
    for i in range(5):
        alone, _ = scheduler.kl_score(*(x[i : i + 1] for x in (x_0, x_t, eps, v, timesteps)))
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)


# Configuration and errors


def test_save_and_load(tmp_path):
    saved = RADScheduler(num_train_timesteps=500, beta_end=0.03, clip_sample=False, num_respaced_timesteps=50)
    saved.save_pretrained(tmp_path)
    loaded = RADScheduler.from_pretrained(tmp_path)
    own = {key: value for key, value in saved.config.items() if not key.startswith("_")}
    assert {key: loaded.config[key] for key in own} == own
    assert np.array_equal(loaded.respaced_chain.betas, saved.respaced_chain.betas)


@pytest.mark.parametrize("t", [1, 21, 998])
def test_a_timestep_outside_the_respaced_chain_is_refused(t):
    x_0, x_t, eps, v, timesteps = noised(t)
    with pytest.raises(ValueError, match=rf"\[{t}\] are not among the 250 respaced timesteps"):
        scheduler.kl_score(x_0, x_t, eps, v, timesteps)


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_out_of_range_is_refused(t):
    x_0, noise, eps, v = draw(1)
    with pytest.raises(ValueError, match=r"must lie in 0 \.\. 999"):
        scheduler.add_noise(x_0, noise, torch.tensor([t]))
    with pytest.raises(ValueError, match=r"must lie in 0 \.\. 999"):
        scheduler.kl_score(x_0, noise, eps, v, torch.tensor([t]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variance_type": "fixed_small"}, "'fixed_small'"),
        ({"prediction_type": "v_prediction"}, "'v_prediction'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "'squaredcos_cap_v2'"),
        ({"num_respaced_timesteps": 1}, r"2 \.\. 1000, got 1"),
        ({"num_respaced_timesteps": 1001}, r"2 \.\. 1000, got 1001"),
    ],
)
def test_other_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RADScheduler(**arguments)
