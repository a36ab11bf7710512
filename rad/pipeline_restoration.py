"""Restoration: what a good part in the place of a bad one would look like."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .image_processor import paste, to_pil
from .image_reader import PipelineImageInput, decode
from .models.evidence import FUSED
from .pipeline_arguments import (
    RESTORATION_STEPS,
    as_seed,
    batches,
    check_images,
    check_labels,
    check_output_type,
    check_restoration,
    in_own_mode,
)
from .pipeline_output import Pictures, RADRestorationOutput, pictures_as
from .scheduler_rad import antithetic_noise

# What is done to an image while it is anomalous, and the Mahalanobis score at which the gradient stops: 0 is that of a
# typical good image. What still looks odd after one round is removed by the next
ROUNDS = {
    "denoising": [("denoising", 0.0)] * 3 + [("gradient", 0.0), ("gradient", -1.0)],
    "gradient": [("gradient", 0.0)],
}
NUM_ESTIMATES = 2  # means of what may be below the noise, before anything is sampled
RESTORED_STEP = 100  # of 250: what is noised so far keeps its layout, and no defect


class RADRestorationMixin:
    """`RADPipeline.restore`, by the pipeline's networks and statistics."""

    @in_own_mode
    def restore(
        self: Any,
        image: PipelineImageInput,
        num_steps: int | None = None,
        step_size: float = 0.02,
        denoise_every: int = 5,
        anneal: float = 0.2,
        class_labels: str | int | Sequence[str | int] | None = None,
        keep_normal: bool = True,
        pixel_rate: float = 0.005,
        seed: int | None = None,
        batch_size: int = 4,
        output_type: str = "pil",
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        method: str | None = None,
        false_alarm_rate: float | None = None,
    ) -> RADRestorationOutput | tuple[Any, ...]:
        """Good images in the place of these; what comes out is inspected again.

        "denoising" suits networks that have learned to remove defects together with the noise: estimates of the good
        image, noised and sampled from the diffusion model, of which only what is not normal is taken at every step (as
        in RePaint, Lugmayr et al., CVPR 2022). While an image still is anomalous, this is done again, in up to three
        rounds, with other noise and also where it looks odd now; then the gradient finishes it. What makes an image no
        better is not taken.

        "gradient" is RAN's gradient denoising (algorithm 1): the gradient of the Mahalanobis distance removes the
        anomaly, the diffusion model removes the gradient's noise. The distance is squared here, so that the worst
        positions weigh most, and the steps shrink, so that they settle; RAN does neither. It ends when an image is as
        close to normal as a typical good one.

        Where all of an image is normal nothing is changed.

        Args:
            image: One image or several, as in scoring.
            num_steps: Of sampling in a round, by default 20; or of the gradient at most, by default 150 (RAN: 500).
            step_size: s of the gradient; each step scales the image by sqrt(1 - s^2) and moves it by s standardised
                gradients, so that it is a diffusion step of variance s^2.
            denoise_every: Denoise after this many steps of the gradient.
            anneal: The step size and the timestep of that denoising, RAN's 8 of 250, fall linearly to this fraction.
            class_labels: As in scoring.
            keep_normal: Leave what the anomaly map calls normal as it was.
            pixel_rate: What it calls so: all below the value that this share of good images' pixels exceeds.
            seed: Of the noise that is sampled from, by default that of scoring; the gradient draws none.
            batch_size: Images that are restored together.
            output_type: Of the pictures: "pil"; "np" for float32 [B, H, W, 3] in [0, 1], "pt" for [B, 3, H, W], or a
                list where sizes differ.
            return_dict: False for a tuple of the output's fields.
            generator: In the place of `seed`, as in scoring.
            method: "denoising" or "gradient"; by default "denoising" for networks that predict x_0 and "gradient" for
                those that predict noise.
            false_alarm_rate: At which what comes out is inspected; by default as in scoring.

        Raises:
            ValueError: A bad image or argument; the message names it and what is accepted.
        """
        # 0. Check inputs
        if method is None:
            method = "denoising" if self.scheduler.config.prediction_type == "sample" else "gradient"
        num_steps, *settings, pixel_rate, false_alarm_rate = check_restoration(
            self.normality, method, num_steps, step_size, denoise_every, anneal, pixel_rate, false_alarm_rate
        )
        check_output_type(output_type)
        (images, batch_size), processor = check_images(image, batch_size), self.image_processor
        labels = check_labels(class_labels, len(images), self.categories)
        seed = self._noise(None, None, as_seed(seed, generator))[2]

        restored: list[Image.Image] = []
        intermediates: list[Pictures] = []
        distances: list[np.ndarray] = []
        p_values: list[np.ndarray] = []
        for batch in batches(len(images), batch_size):
            # 1. Look at it: what is normal stays as it was
            x_0, _ = processor.preprocess(images[batch])
            x_0 = x_0.to(self._execution_device)
            categories, odd, p_value = self._look(x_0, labels[batch], pixel_rate)
            change = odd if keep_normal else torch.ones_like(odd)
            changed = torch.zeros_like(odd)
            steps: list[list[torch.Tensor]] = [[one] for one in x_0]

            # 2. Move it towards good images, step by step
            for number, (way, goal) in enumerate(ROUNDS[method]):
                wanted = change.flatten(1).any(1).cpu().numpy() & ((p_value <= false_alarm_rate) | (number == 0))
                running = np.flatnonzero(wanted).tolist()
                if not running:
                    break
                names, x = [categories[i] for i in running], torch.stack([steps[i][-1] for i in running])
                count = num_steps if way == method else RESTORATION_STEPS[way]
                if way == "denoising":
                    moves = self._sample(x_0[running], change[running], names, count, x, seed + number)
                else:
                    moves = self._follow_gradient(x, change[running], names, count, goal, *settings)
                made: list[list[torch.Tensor]] = [[] for _ in running]
                with self.progress_bar(total=count) as progress:
                    for moved in moves:
                        for place, one in moved.items():
                            made[place].append(one)
                        progress.update()

                # 3. Look again: what makes an image no better is not taken, and what is odd now may change too
                x = torch.stack([[x[place], *own][-1] for place, own in enumerate(made)])
                _, odd, found = self._look(x, names, pixel_rate)
                for place, i in enumerate(running):
                    if method == "gradient" or found[place] > p_value[i]:
                        steps[i] += made[place]
                        p_value[i], changed[i] = found[place], change[i]
                        change[i] = torch.maximum(change[i], odd[place])
            p_values.append(p_value)

            # 4. Back to each image's own size
            originals = [decode(one, processor.pixel_range) for one in images[batch]]
            last = [one[-1] for one in steps]
            restored += [paste(*parts) for parts in zip(originals, last, 1 - changed, strict=True)]
            intermediates += [pictures_as(to_pil(torch.stack(one)), output_type) for one in steps]
            distances += [self._distances(one, name) for one, name in zip(steps, categories, strict=True)]
        p = np.concatenate(p_values)
        output = RADRestorationOutput(
            pictures_as(restored, output_type), intermediates, distances, p, p <= false_alarm_rate
        )
        return output if return_dict else output.to_tuple()

    # -- the two methods ------------------------------------------------------------------------------------------

    def _sample(
        self: Any,
        x_0: torch.Tensor,
        change: torch.Tensor,
        categories: Sequence[str],
        num_steps: int,
        x: torch.Tensor,
        seed: int,
    ) -> Iterator[dict[int, torch.Tensor]]:
        """Estimates of good images, then samples of the diffusion model from there.

        Args:
            x_0: The images [B, 3, S, S] in [-1, 1].
            change: How much each pixel may change, [B, 1, S, S] in [0, 1].
            categories: Of each.
            num_steps: In all.
            x: Where to start, as `x_0`.
            seed: Of the noise.

        Yields:
            The images after each step, by position in the batch.
        """
        labels, first = self.unet.labels_of(categories), self.scheduler.steps_of_250([RESTORED_STEP])[0]

        def estimate(x_t: torch.Tensor, timestep: int) -> torch.Tensor:
            """x0_hat where the image may change."""
            t = torch.full((len(x_t),), timestep, device=x_t.device)
            output = self.unet(x_t, t, labels)
            _, _, x0_hat = self.scheduler.model_distribution(output.sample, output.variance, x_t, t, respaced=False)
            return change * x0_hat.to(x_0.dtype) + (1 - change) * x_0

        def draw(timestep: int) -> torch.Tensor:
            return antithetic_noise(seed, timestep, 2, x_0)

        # 1. The mean of what may be below the noise, twice: the second time what was odd has faded
        num_samples = num_steps - NUM_ESTIMATES
        for _ in range(NUM_ESTIMATES if num_samples > 1 else num_steps):
            noised = [self.scheduler.add_noise(x, noise.expand_as(x), np.array([first])) for noise in draw(first)]
            x = torch.stack([estimate(x_t, first) for x_t in noised]).mean(0)
            yield dict(enumerate(x))
        if num_samples < 2:
            return

        # 2. Texture, which the mean has not: x_{t-1} is drawn from q(x_{t-1} | x_t, x0_hat), down to t = 0
        chain = self.scheduler.chain_to(first, num_samples)
        x_t = self.scheduler.add_noise(x, draw(first)[0].expand_as(x), np.array([first]))
        for i in reversed(range(len(chain.timesteps))):
            x = estimate(x_t, int(chain.timesteps[i]))
            yield dict(enumerate(x))
            if i > 0:
                mean = float(chain.posterior_mean_coef_x0[i]) * x + float(chain.posterior_mean_coef_xt[i]) * x_t
                deviation = float(np.exp(0.5 * chain.posterior_log_variance[i]))
                x_t = mean + deviation * draw(int(chain.timesteps[i - 1]))[0]

    def _follow_gradient(
        self: Any,
        x_0: torch.Tensor,
        change: torch.Tensor,
        categories: Sequence[str],
        num_steps: int,
        goal: float,
        step_size: float,
        denoise_every: int,
        anneal: float,
    ) -> Iterator[dict[int, torch.Tensor]]:
        """Gradient denoising until the Mahalanobis score is below a goal; arguments as in `_sample` and `restore`.

        Yields:
            The images after each step, by position in the batch, of those that are not typical good ones yet.
        """
        x, numbers, running = x_0.clone(), self.normality.labels_of(categories), list(range(len(x_0)))
        for step in range(num_steps):
            distance, gradient = self._distance_gradient(x[running], [numbers[i] for i in running])
            far = (distance > goal).tolist()
            running = [i for i, go in zip(running, far, strict=True) if go]
            if not running:
                break
            # A diffusion step whose noise is the gradient, and a denoising step now and then
            fraction, free = 1 + (anneal - 1) * step / num_steps, change[running]
            s, gradient = step_size * fraction, gradient[far] * free
            # Standard deviation of a zero-mean gradient, over the pixels that may change
            squares, count = gradient.square().sum((1, 2, 3), True), 3 * free.sum((1, 2, 3), True)
            moved = (1 - s**2) ** 0.5 * x[running] - s * gradient / (squares / count).clamp_min(1e-24).sqrt()
            if (step + 1) % denoise_every == 0:
                t = torch.tensor(self.scheduler.steps_of_250([round(8 * fraction)]), device=x.device)
                labels = self.unet.labels_of([categories[i] for i in running])
                output = self.unet(moved, t, labels)
                moved, _, _ = self.scheduler.model_distribution(output.sample, output.variance, moved, t)
            x[running] = (1 - free) * x_0[running] + free * moved.to(x_0.dtype).clamp(-1, 1)
            yield {i: x[i].clone() for i in running}

    def _distance_gradient(self: Any, x: torch.Tensor, labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mahalanobis scores [B] of images [B, 3, S, S], and the gradient of their mean squared distances."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            distance = self.normality.distance(self.feature_extractor(x), labels)
            (gradient,) = torch.autograd.grad(distance.square().mean((1, 2)).sum(), x)
        return self.normality.distance_score(distance.detach(), labels), gradient

    # -- looking at what there is ---------------------------------------------------------------------------------

    def _look(
        self: Any, x: torch.Tensor, labels: Sequence[str | None], pixel_rate: float
    ) -> tuple[list[str], torch.Tensor, np.ndarray]:
        """Categories of images [B, 3, S, S], how odd each pixel is [B, 1, S, S], in [0, 1], and p-values [B]."""
        evidence = self.measure(x, labels)
        maps, scores = self.normality(evidence, self.normality.labels_of(evidence.categories))
        normal = self.normality.normal_weight(maps[FUSED], pixel_rate, self.config.resolution).to(x)
        return evidence.categories, 1 - normal, self.normality.p_value(scores[FUSED].float().cpu()).numpy()

    def _distances(self: Any, steps: list[torch.Tensor], category: str) -> np.ndarray:
        """Mahalanobis scores, float32 [N], of N pictures [3, S, S] of one category."""
        labels, found = self.normality.labels_of([category]), []
        for part in torch.stack(steps).split(8):
            own = labels * len(part)
            found.append(
                self.normality.distance_score(self.normality.distance(self.feature_extractor(part), own), own)
            )
        return torch.cat(found).float().cpu().numpy()
