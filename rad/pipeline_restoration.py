"""Restoration: what a good part in the place of a bad one would look like (RAN, algorithm 1)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .image_processor import paste, to_pil
from .image_reader import PipelineImageInput, decode
from .models.evidence import FUSED
from .pipeline_arguments import (
    as_seed,
    batches,
    check_images,
    check_labels,
    check_output_type,
    check_restoration,
    in_own_mode,
)
from .pipeline_output import Pictures, RADRestorationOutput, pictures_as


class RADRestorationMixin:
    """`RADPipeline.restore`, by the pipeline's networks and statistics."""

    @in_own_mode
    def restore(
        self: Any,
        image: PipelineImageInput,
        num_steps: int = 150,
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
    ) -> RADRestorationOutput | tuple[Any, ...]:
        """Gradient denoising (RAN, algorithm 1): the gradient of the Mahalanobis distance removes the anomaly, the
        diffusion model removes the gradient's noise. The distance is squared here, so that the worst positions weigh
        most, and the steps shrink, so that they settle; RAN does neither.

        An image's restoration ends when it is as close to normal as a typical good one, at once when there is nothing
        to change; the others of its batch go on.

        Args:
            image: One image or several, as in scoring.
            num_steps: Steps at most (RAN: 500).
            step_size: s; each step scales the image by sqrt(1 - s^2) and moves it by s standardised gradients, so that
                it is a diffusion step of variance s^2.
            denoise_every: Denoise after this many steps.
            anneal: The step size and the timestep of the denoising, RAN's 8 of 250, fall linearly to this fraction.
            class_labels: As in scoring.
            keep_normal: Leave what the anomaly map calls normal as it was.
            pixel_rate: What it calls so: all below the value that this share of good images' pixels exceeds.
            seed: Of the noise that tells what is normal, as in scoring; the steps themselves draw none.
            batch_size: Images that are restored together.
            output_type: Of the pictures: "pil"; "np" for float32 [B, H, W, 3] in [0, 1], "pt" for [B, 3, H, W], or a
                list where sizes differ.
            return_dict: False for a tuple of the output's fields.
            generator: In the place of `seed`, as in scoring.

        Raises:
            ValueError: A bad image or argument; the message names it and what is accepted.
        """
        # 0. Check inputs
        num_steps, step_size, denoise_every, anneal, pixel_rate = check_restoration(
            self.normality, num_steps, step_size, denoise_every, anneal, pixel_rate
        )
        check_output_type(output_type)
        (images, batch_size), processor = check_images(image, batch_size), self.image_processor
        labels, seed = check_labels(class_labels, len(images), self.categories), as_seed(seed, generator)

        restored: list[Image.Image] = []
        intermediates: list[Pictures] = []
        distances: list[np.ndarray] = []
        for batch in batches(len(images), batch_size):
            # 1. Look at it: what is normal stays as it was
            x_0, _ = processor.preprocess(images[batch])
            x_0 = x_0.to(self._execution_device)
            evidence = self.measure(x_0, labels[batch], seed=seed)
            numbers = self.normality.labels_of(evidence.categories)
            keep = torch.zeros_like(x_0[:, :1])
            if keep_normal:
                maps, _ = self.normality(evidence, numbers)
                keep = self.normality.normal_weight(maps[FUSED], pixel_rate, self.config.resolution).to(x_0)

            # 2. Move it towards good images, step by step
            x, running = x_0.clone(), list(range(len(x_0)))
            steps: list[list[torch.Tensor]] = [[one] for one in x_0]
            found: list[list[float]] = [[] for _ in x_0]
            with self.progress_bar(total=num_steps) as progress:
                for step in range(num_steps + 1):
                    distance, gradient = self._distance_gradient(x[running], [numbers[i] for i in running])
                    for i, value in zip(running, distance.tolist(), strict=True):
                        found[i].append(value)
                    may = [bool(d > 0.0) and bool((keep[i] < 1).any()) for i, d in zip(running, distance, strict=True)]
                    running = [i for i, go in zip(running, may, strict=True) if go]
                    if step == num_steps or not running:
                        break
                    # A diffusion step whose noise is the gradient, and a denoising step now and then
                    fraction, free = 1 + (anneal - 1) * step / num_steps, 1 - keep[running]
                    s, gradient = step_size * fraction, gradient[may] * free
                    # Standard deviation of a zero-mean gradient, over the pixels that may change
                    squares, count = gradient.square().sum((1, 2, 3), True), 3 * free.sum((1, 2, 3), True)
                    moved = (1 - s**2) ** 0.5 * x[running] - s * gradient / (squares / count).clamp_min(1e-24).sqrt()
                    if (step + 1) % denoise_every == 0:
                        t = torch.tensor(self.scheduler.steps_of_250([round(8 * fraction)]), device=x.device)
                        unet_labels = self.unet.labels_of([evidence.categories[i] for i in running])
                        output = self.unet(moved.to(self.unet.dtype), t, unet_labels)
                        moved, _, _ = self.scheduler.model_distribution(output.sample, output.variance, moved, t)
                    x[running] = keep[running] * x_0[running] + free * moved.to(x_0.dtype).clamp(-1, 1)
                    for i in running:
                        steps[i].append(x[i].clone())
                    progress.update()

            # 3. Back to each image's own size
            originals = [decode(one, processor.pixel_range) for one in images[batch]]
            restored += [paste(*parts) for parts in zip(originals, x, keep, strict=True)]
            intermediates += [pictures_as(to_pil(torch.stack(one)), output_type) for one in steps]
            distances += [np.array(one, dtype=np.float32) for one in found]
        output = RADRestorationOutput(pictures_as(restored, output_type), intermediates, distances)
        return output if return_dict else output.to_tuple()

    def _distance_gradient(self: Any, x: torch.Tensor, labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mahalanobis scores [B] of images [B, 3, S, S], and the gradient of their mean squared distances."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            distance = self.normality.distance(self.feature_extractor(x), labels)
            (gradient,) = torch.autograd.grad(distance.square().mean((1, 2)).sum(), x)
        return self.normality.distance_score(distance.detach(), labels), gradient
