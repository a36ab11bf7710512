"""The diffusion arithmetic of RAN, in one place: training, scoring and restoration all call it.

RAN is "Removing Anomalies as Noises for Industrial Defect Localization" (Lu et al., ICCV 2023); the learned-range
variance and the variational bound are those of "Improved Denoising Diffusion Probabilistic Models" (Nichol and
Dhariwal, 2021).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin  # noqa: F401  diffusers looks for the mixin's name here
from diffusers.configuration_utils import register_to_config

# An array is not copied between devices, for which a GPU has to be waited for
Timesteps = torch.Tensor | np.ndarray


@dataclass(frozen=True)
class DiffusionChain:
    """Float64 tables of a diffusion chain over steps i = 0 .. len(timesteps) - 1.

    `timesteps[i]` is the step of the full chain that step i stands for. A respaced chain keeps the full chain's
    alphas_cumprod at its own timesteps and derives its betas from them: beta'_i = 1 - abar_{t_i} / abar_{t_{i-1}}.
    """

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    betas: np.ndarray
    posterior_mean_coef_x0: np.ndarray
    posterior_mean_coef_xt: np.ndarray
    posterior_log_variance: np.ndarray

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: np.ndarray, timesteps: np.ndarray) -> "DiffusionChain":
        abar = alphas_cumprod[timesteps]
        abar_prev = np.append(1.0, abar[:-1])
        alphas = abar / abar_prev
        betas = 1.0 - alphas
        variance = betas * (1.0 - abar_prev) / (1.0 - abar)
        variance[0] = variance[1]  # zero at t = 0, where its log is clipped to that of step 1
        return cls(
            timesteps=timesteps,
            alphas_cumprod=abar,
            alphas_cumprod_prev=abar_prev,
            betas=betas,
            posterior_mean_coef_x0=betas * np.sqrt(abar_prev) / (1.0 - abar),
            posterior_mean_coef_xt=(1.0 - abar_prev) * np.sqrt(alphas) / (1.0 - abar),
            posterior_log_variance=np.log(variance),
        )


class RADScheduler(DDPMScheduler):
    """DDPM scheduler that also knows the true posterior, the model's distribution and the KL between them.

    Every method that takes `timesteps` means steps of the full chain (0 .. num_train_timesteps - 1). With
    `respaced=True` the tables are those of the respaced chain, and each timestep must be one of its steps:
    RAN's {5, 50, 100} of 250 are 20, 201 and 401 of 1000.

    The arithmetic runs in float64 (float32 where the device has no float64) and returns float32, because the KL
    divides small differences of means by variances down to 1e-5.

    Args:
        num_train_timesteps: Length of the full chain.
        beta_start, beta_end, beta_schedule: As in `DDPMScheduler`; RAN uses linear betas 1e-4 .. 0.02.
        variance_type: Only "learned_range": log Sigma = f log beta_t + (1 - f) log b~_t, f = (v + 1) / 2.
        clip_sample: Clamp x0_hat to [-1, 1] when scoring and restoring.
        prediction_type: What the network predicts: "epsilon", the noise, as RAN's, or "sample", x_0.
        num_respaced_timesteps: Length of the respaced chain, evenly spaced from the first to the last full step.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        variance_type: str = "learned_range",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        num_respaced_timesteps: int = 250,
    ) -> None:
        if variance_type != "learned_range" or prediction_type not in ("epsilon", "sample"):
            raise ValueError(
                "RADScheduler needs variance_type='learned_range' and prediction_type='epsilon' or 'sample', "
                f"got {variance_type!r} and {prediction_type!r}."
            )
        if beta_schedule != "linear":
            raise ValueError(f"RADScheduler supports beta_schedule='linear', got {beta_schedule!r}.")
        if not 2 <= num_respaced_timesteps <= num_train_timesteps:
            raise ValueError(
                f"num_respaced_timesteps must lie in 2 .. {num_train_timesteps}, got {num_respaced_timesteps}."
            )
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            variance_type=variance_type,
            clip_sample=clip_sample,
            prediction_type=prediction_type,
        )
        betas = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
        alphas_cumprod = np.cumprod(1.0 - betas)
        spaced = np.linspace(0, num_train_timesteps - 1, num_respaced_timesteps).round().astype(int)
        self.full_chain = DiffusionChain.from_alphas_cumprod(alphas_cumprod, np.arange(num_train_timesteps))
        self.respaced_chain = DiffusionChain.from_alphas_cumprod(alphas_cumprod, spaced)

    # -- tables ---------------------------------------------------------------------------------------------------

    def respaced_to_full(self, indices: list[int]) -> list[int]:
        """Steps of the full chain that respaced steps stand for: [5, 50, 100] -> [20, 201, 401]."""
        return [int(self.respaced_chain.timesteps[i]) for i in indices]

    def steps_of_250(self, indices: list[int]) -> list[int]:
        """Steps of the full chain that stand where those of RAN's 250 respaced ones do, first to last, on a respaced
        chain of any length; on a short one fewer than were asked for."""
        last = len(self.respaced_chain.timesteps) - 1
        return list(dict.fromkeys(self.respaced_to_full([round(i * last / 249) for i in indices])))

    def chain_to(self, timestep: int, num_steps: int) -> DiffusionChain:
        """A chain to sample from, of two or more steps, evenly spaced from 0 to a step of the full chain."""
        timesteps = np.unique(np.linspace(timestep, 0, num_steps).round().astype(int))
        return DiffusionChain.from_alphas_cumprod(self.full_chain.alphas_cumprod, timesteps)

    @property
    def default_timesteps(self) -> list[int]:
        """Where RAN scores: 5, 50 and 100 of 250, which are 20, 201 and 401 of 1000; on another chain the nearest."""
        return self.steps_of_250([5, 50, 100])

    def _chain(self, timesteps: Timesteps, respaced: bool) -> tuple[DiffusionChain, np.ndarray]:
        """The chain and the positions of `timesteps` in it."""
        steps = _on_cpu(timesteps)
        if steps.min() < 0 or steps.max() >= self.config.num_train_timesteps:
            raise ValueError(f"timesteps must lie in 0 .. {self.config.num_train_timesteps - 1}, got {steps}.")
        chain = self.respaced_chain if respaced else self.full_chain
        index = np.searchsorted(chain.timesteps, steps)
        missing = sorted(set(steps[chain.timesteps[index] != steps].tolist()))
        if missing:
            raise ValueError(f"timesteps {missing} are not among the {len(chain.timesteps)} respaced timesteps.")
        return chain, index

    @staticmethod
    def _table(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        """Values of a table, one for each image, shaped to multiply `like` [B, C, H, W]."""
        return torch.from_numpy(values).to(like.device, like.dtype).view(-1, *(1,) * (like.ndim - 1))

    @staticmethod
    def _precise(x: torch.Tensor) -> torch.Tensor:
        return x.float() if x.device.type == "mps" else x.double()  # MPS has no float64

    # -- forward process ------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. Both chains share abar_t, so there is one forward process.

        Args:
            original_samples: x_0 [B, C, H, W] in [-1, 1].
            noise: Standard normal, same shape.
            timesteps: [B] or [1] integers, steps of the full chain.
        """
        chain, index = self._chain(timesteps, respaced=False)
        abar = chain.alphas_cumprod[index]
        signal, sigma = (self._table(np.sqrt(a), original_samples) for a in (abar, 1.0 - abar))
        return signal * original_samples + sigma * noise

    def posterior(
        self, x_0: torch.Tensor, x_t: torch.Tensor, timesteps: Timesteps, respaced: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q(x_{t-1} | x_t, x_0) = N(mu~_t, b~_t I): mean [B, C, H, W] and log-variance [B, 1, 1, 1], nats, float64."""
        chain, index = self._chain(timesteps, respaced)
        x_0, x_t = self._precise(x_0), self._precise(x_t)
        mean = (
            self._table(chain.posterior_mean_coef_x0[index], x_0) * x_0
            + self._table(chain.posterior_mean_coef_xt[index], x_t) * x_t
        )
        return mean, self._table(chain.posterior_log_variance[index], x_0)

    def predict_x0(self, prediction: torch.Tensor, x_t: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """x0_hat = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps, or what the network predicts if that is x_0 itself;
        not clamped, float64. Shapes [B, C, H, W]."""
        chain, index = self._chain(timesteps, respaced=False)
        if self.config.prediction_type == "sample":
            return self._precise(prediction)
        noise, x_t = self._precise(prediction), self._precise(x_t)
        abar = self._table(chain.alphas_cumprod[index], x_t)
        return x_t / abar.sqrt() - (1.0 / abar - 1.0).sqrt() * noise

    def model_distribution(
        self,
        prediction: torch.Tensor,
        variance: torch.Tensor,
        x_t: torch.Tensor,
        timesteps: Timesteps,
        respaced: bool = True,
        clip: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """p(x_{t-1} | x_t) = N(mu_theta, Sigma_theta) with a variance in the learned range.

        Args:
            prediction, variance: The network's, [B, C, H, W]: eps or x_0, as `prediction_type` says, and v.
            x_t: The network's input, [B, C, H, W].
            clip: Clamp x0_hat to [-1, 1]; by default as `clip_sample` says. Training does not clamp.

        Returns:
            Mean, log-variance (nats) and x0_hat, each [B, C, H, W], float64.
        """
        x0_hat = self.predict_x0(prediction, x_t, timesteps)
        if self.config.clip_sample if clip is None else clip:
            x0_hat = x0_hat.clamp(-1.0, 1.0)
        mean, min_log_variance = self.posterior(x0_hat, x_t, timesteps, respaced)
        chain, index = self._chain(timesteps, respaced)
        max_log_variance = self._table(np.log(chain.betas[index]), mean)
        fraction = (self._precise(variance) + 1.0) / 2.0
        return mean, fraction * max_log_variance + (1.0 - fraction) * min_log_variance, x0_hat

    # -- scores and losses ----------------------------------------------------------------------------------------

    def kl_score(
        self,
        x_0: torch.Tensor,
        x_t: torch.Tensor,
        prediction: torch.Tensor,
        variance: torch.Tensor,
        timesteps: Timesteps,
        respaced: bool = True,
        clip: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """s_t, RAN's pixel-level score: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or at t = 0 the NLL of x_0.

        Args:
            x_0, x_t: Clean and noised images [B, C, H, W].
            prediction, variance: The network's at x_t, as in `model_distribution`.

        Returns:
            The score in bits, per pixel and colour channel [B, C, H, W], and x0_hat [B, C, H, W], both float32.
        """
        timesteps = _on_cpu(timesteps)  # once for all that follows
        posterior_mean, posterior_log_variance = self.posterior(x_0, x_t, timesteps, respaced)
        mean, log_variance, x0_hat = self.model_distribution(prediction, variance, x_t, timesteps, respaced, clip)
        bits = gaussian_kl(posterior_mean, posterior_log_variance, mean, log_variance) / math.log(2.0)
        if (timesteps == 0).any():
            nll = -discretized_gaussian_log_likelihood(self._precise(x_0), mean, 0.5 * log_variance) / math.log(2.0)
            bits = torch.where(self._table(timesteps == 0, bits).bool(), nll, bits)
        return bits.float(), x0_hat.float()

    def variational_bound(
        self,
        x_0: torch.Tensor,
        x_t: torch.Tensor,
        prediction: torch.Tensor,
        variance: torch.Tensor,
        timesteps: Timesteps,
        where: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """L_vlb of the training loss in bits, [B]: over the full chain, x0_hat not clamped, the prediction detached
        so that it trains only v (Nichol and Dhariwal, 2021).

        Args:
            x_0, x_t, prediction, variance, timesteps: As in `kl_score`.
            where: Pixels that count, bool [B, 1, H, W]; all by default.
        """
        bits, _ = self.kl_score(x_0, x_t, prediction.detach(), variance, timesteps, respaced=False, clip=False)
        if where is None:
            return bits.flatten(1).mean(1)
        return (bits.mean(1, keepdim=True) * where).flatten(1).sum(1) / where.flatten(1).sum(1).clamp_min(1)


def _on_cpu(timesteps: Timesteps) -> np.ndarray:
    return np.atleast_1d(timesteps.cpu().numpy() if isinstance(timesteps, torch.Tensor) else timesteps)


def antithetic_noise(seed: int, timestep: int, draws: int, like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise [draws, C, H, W] for images `like` [B, C, H, W], on their device and in their type.

    It follows from the seed and the timestep alone; each second draw mirrors the one before it, which cancels errors
    of odd order.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + timestep) % 2**64)
    noise = torch.randn((draws + 1) // 2, *like.shape[1:], generator=generator)
    return torch.stack([noise, -noise], dim=1).flatten(0, 1)[:draws].to(like)


def gaussian_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL( N(mean1, e^log_variance1) || N(mean2, e^log_variance2) ) in nats, element by element."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1.0
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats of the 8-bit level that x in [-1, 1] stands for, element by element.

    The levels are 2/255 apart; the outermost two reach to infinity (Ho et al., 2020, equation 13).
    """
    inverse_std = torch.exp(-log_std)
    upper = torch.special.ndtr((x - mean + 1.0 / 255.0) * inverse_std)
    lower = torch.special.ndtr((x - mean - 1.0 / 255.0) * inverse_std)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp_min(1e-12).log()  # the floor keeps training finite far out in the tails
