"""RADPipeline: find defects with a diffusion model that has seen good parts only, and show a good version.

RAN is "Removing Anomalies as Noises for Industrial Defect Localization" (Lu et al., ICCV 2023).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .image_processor import RADImageProcessor, overlay, to_pil
from .image_reader import PipelineImageInput, decode
from .models.discriminator import RADDiscriminator
from .models.evidence import FUSED, Evidence, paper_scores
from .models.feature_extractor import RADFeatureExtractor
from .models.normality import NormalityModel
from .models.unet_rad import RADUNet2DModel
from .pipeline_arguments import (
    as_integer,
    as_list,
    as_seed,
    batches,
    check_images,
    check_labels,
    check_noise,
    check_output_type,
    check_scoring,
    in_own_mode,
)
from .pipeline_fitting import RADFittingMixin
from .pipeline_loading import RADLoaderMixin
from .pipeline_output import RADDenoisingOutput, RADPipelineOutput, pictures_as
from .pipeline_restoration import RADRestorationMixin
from .scheduler_rad import RADScheduler, antithetic_noise


class RADPipeline(RADLoaderMixin, RADFittingMixin, RADRestorationMixin):
    """Anomaly localisation with a diffusion model trained on good images.

    Args:
        unet: Predicts noise, variance and features in one pass.
        scheduler: The diffusion arithmetic.
        feature_extractor: Frozen ImageNet features.
        normality: Statistics of good images; None until `fit_normality`, and then only `mode="paper"` works.
        discriminator: Has learned from artificial defects; RAN has none.
        resolution: Images are resized to this square; maps are resized back.
        num_noise_samples: Noise draws at each timestep by default, antithetic pairs from two on.
    """

    _optional_components = ["normality", "discriminator"]

    def __init__(
        self,
        unet: RADUNet2DModel,
        scheduler: RADScheduler,
        feature_extractor: RADFeatureExtractor,
        normality: NormalityModel | None = None,
        discriminator: RADDiscriminator | None = None,
        resolution: int = 256,
        num_noise_samples: int = 1,
    ) -> None:
        super().__init__()
        for part in (feature_extractor, normality, discriminator):  # diffusers alone loads all in one type
            if part is not None:
                part.float()
        predicts = "epsilon" if unet.wiener_filter is None else "sample"
        if scheduler.config.prediction_type != predicts:
            raise ValueError(
                f"The scheduler's prediction_type is {scheduler.config.prediction_type!r}, but this U-Net predicts "
                f"{predicts!r}."
            )
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            normality=normality,
            discriminator=discriminator,
        )
        self.register_to_config(
            resolution=as_integer(resolution, "resolution", 1),
            num_noise_samples=as_integer(num_noise_samples, "num_noise_samples", 1),
        )
        if normality is not None and normality.config.num_noise_samples is None:  # saved before it was stored
            normality.register_to_config(num_noise_samples=num_noise_samples)

    @property
    def image_processor(self) -> RADImageProcessor:
        """Takes images to the resolution, in the range of pixel values that good images have."""
        known = {} if self.normality is None else self.normality.config
        range_of_good = {name: known[name] for name in ("pixel_range", "darkest_peak") if name in known}
        return RADImageProcessor(self.config.resolution, **range_of_good)

    @property
    def categories(self) -> list[str]:
        """Names of those that are known: of good images or, where there are none, of the U-Net."""
        return list((self.unet if self.normality is None else self.normality).config.categories)

    def _noise(
        self, timesteps: Sequence[int] | None, draws: int | None, seed: int | None, calibrated: bool = False
    ) -> tuple[list[int], int, int]:
        """Timesteps, draws and seed; by default those of the scores of good images, whose units hold for no others."""
        fitted = {"timesteps": self.scheduler.default_timesteps, "num_noise_samples": self.config.num_noise_samples}
        if self.normality is not None:
            fitted = {name: self.normality.config[name] for name in (*fitted, "seed")}
        return check_noise(timesteps, draws, seed, fitted, calibrated)

    # -- scoring --------------------------------------------------------------------------------------------------

    @in_own_mode
    def __call__(
        self,
        image: PipelineImageInput,
        timesteps: Sequence[int] | None = None,
        num_noise_samples: int | None = None,
        class_labels: str | int | Sequence[str | int] | None = None,
        mode: str = "calibrated",
        score_type: str = FUSED,
        false_alarm_rate: float | None = None,
        seed: int | None = None,
        batch_size: int = 4,
        output_type: str = "np",
        map_size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> RADPipelineOutput | tuple[Any, ...]:
        """Scores images: noise them, denoise one step, compare with the true posterior and with good images.

        An image's numbers depend on the image and the seed alone, not on its batch or its place in it.

        Args:
            image: One image (see `image_reader.read` for what is accepted); or several in a list, a tuple, an iterator
                or a column of a data set, an array [B, H, W, C] or a tensor [B, C, H, W].
            timesteps: Steps of the full chain on the respaced one; by default those of the normality model, or RAN's
                20, 201, 401. Calibrated scores are fitted to theirs, and so to the next two: others are refused.
            num_noise_samples: Noise draws at each timestep, antithetic pairs from two on; by default as fitted, or the
                pipeline's own.
            seed: Of the noise; by default as fitted, or 0.
            class_labels: Category of each image, or one for all, by name or number; by default the category whose good
                images each one resembles most.
            mode: "calibrated" (units of good-image deviation; the maps of `NormalityModel` fused by its weights) or
                "paper" (RAN to the letter: per-image z-scores, alpha = 0.5, no smoothing).
            score_type: Which map decides: "fused", "pixel" (KL), "feature" (error), "residual" (Mahalanobis distance
                of what the prediction of features leaves), "mahalanobis" (of the features), "discriminator" or "rgb".
            false_alarm_rate: Share of good images that may be called anomalous; by default 0.01, or the smallest of
                0.02, 0.05, 0.1 and 0.2 that as many held-out good images as there are can tell.
            batch_size: Images in one stacked pass of the U-Net; each counts timesteps x draws times.
            output_type: "np" for NumPy arrays, "pt" for CPU tensors, "pil" for pictures: heat over each image in the
                place of `anomaly_map`, and masks of 0 and 255; all else is as with "np".
            map_size: Height and width of maps, masks and regions; by default each image's own. At the normality
                model's `map_size` maps are as they were computed; `image_processor.resize_map` takes them on later.
            generator: In the place of `seed`, as in diffusers: the seed it was made with counts, its state does not.
            return_dict: False for a tuple of the output's fields that are not None, in their order.

        Raises:
            ValueError: A bad image or argument; the message names it and what is accepted.
        """
        # 0. Check inputs
        false_alarm_rate, map_size = check_scoring(
            mode, score_type, self.normality, false_alarm_rate, output_type, map_size
        )
        seed = as_seed(seed, generator)
        noise = self._noise(timesteps, num_noise_samples, seed, calibrated=mode == "calibrated")
        images, batch_size = check_images(image, batch_size)
        labels = check_labels(class_labels, len(images), self.categories)

        found_maps: dict[str, list[torch.Tensor]] = {}
        scores: dict[str, list[torch.Tensor]] = {}
        categories: list[str | None] = []
        map_sizes: list[tuple[int, int]] = []
        with self.progress_bar(total=len(images)) as progress:
            for batch in batches(len(images), batch_size):
                # 1. Decode and resize, every image by itself
                x_0, sizes = self.image_processor.preprocess(images[batch])
                # 2. Look at it: one stacked pass of the U-Net
                evidence = self.measure(x_0, labels[batch], *noise)
                # 3. Judge by what good images look like
                if mode == "paper":
                    found = paper_scores(evidence)
                else:
                    found = self.normality(evidence, self.normality.labels_of(evidence.categories))
                for kept, results in zip((found_maps, scores), found, strict=True):
                    for name, values in results.items():
                        kept.setdefault(name, []).append(values.float().cpu())
                map_sizes += [map_size or size for size in sizes]
                categories += evidence.categories
                progress.update(len(x_0))

        # 4. Decide, on maps at each image's own size
        maps = {name: torch.cat(values) for name, values in found_maps.items()}
        of_all = {name: torch.cat(values).numpy() for name, values in scores.items()}
        decider = self.normality.decider(score_type) if mode == "calibrated" else None
        output = RADPipelineOutput.of(maps, map_sizes, of_all, score_type, categories, decider, false_alarm_rate)
        if output_type == "pt":
            output = output.to_tensors()
        elif output_type == "pil":
            pixel_range, heat_range = self.image_processor.pixel_range, self.normality.heat_range(score_type)
            pairs = zip(images, output.anomaly_map, strict=True)
            heat = [overlay(decode(one, pixel_range).resize(m.shape[::-1]), m, *heat_range) for one, m in pairs]
            output = output.to_pictures(heat)
        return output if return_dict else output.to_tuple()

    @in_own_mode
    def measure(
        self,
        x_0: torch.Tensor,
        labels: Sequence[str | None] | None = None,
        timesteps: Sequence[int] | None = None,
        draws: int | None = None,
        seed: int | None = None,
    ) -> Evidence:
        """Looks at images: a pass of the extractor, then one of the U-Net for all timesteps and draws. All scores and
        fits are made of what this finds.

        Args:
            x_0: Images [B, 3, S, S] in [-1, 1], on any device.
            labels: Category of each image by name; None where it is to be found out, as far as good images are known.
            timesteps, draws, seed: As in scoring, with the same defaults; nothing is refused here.

        Raises:
            ValueError: There are no draws or timesteps, a timestep is not on the respaced chain, or the U-Net is in
                float16 on the CPU.
        """
        timesteps, draws, seed = self._noise(timesteps, draws, seed)
        if self.unet.dtype == torch.float16 and self._execution_device.type == "cpu":
            raise ValueError(
                "float16 takes many times as long as float32 on the CPU: use pipe.to(torch.bfloat16) or "
                "pipe.to(torch.float32), or a GPU with pipe.to('cuda')."
            )
        x_0 = x_0.to(self._execution_device, torch.float32)

        # 1. What the frozen networks say
        stages = self.feature_extractor.stages(x_0)
        features, summaries = self.feature_extractor.join(stages, x_0), self.feature_extractor.summary(x_0, stages)
        logits = None if self.discriminator is None else self.discriminator(stages)
        categories: list[str | None] = [None] * len(x_0) if labels is None else list(labels)
        if self.normality is not None and None in categories:
            known, guesses = self.normality.config.categories, self.normality.classify(features)
            categories = [known[i] if name is None else name for name, i in zip(categories, guesses, strict=True)]

        # 2. Noise the images, denoise them one step: all timesteps and draws of all images in one pass
        stack = (len(x_0), len(timesteps), draws)
        noise = torch.cat(
            [antithetic_noise(seed, t, draws, x_0) for t in timesteps]
        )  # [T D, 3, S, S], the same for each image
        t = torch.tensor(timesteps, device=x_0.device).repeat_interleave(draws).repeat(len(x_0))
        noise = noise.repeat(len(x_0), 1, 1, 1)
        unet_labels = self.unet.labels_of(categories)
        if unet_labels is not None:
            unet_labels = unet_labels.repeat_interleave(len(timesteps) * draws)
        x_0 = x_0.repeat_interleave(len(timesteps) * draws, dim=0)
        x_t = self.scheduler.add_noise(x_0, noise, t)
        output = self.unet(x_t, t, unet_labels)

        # 3. Compare with the images and their features
        kl, x0_hat = self.scheduler.kl_score(x_0, x_t, output.sample, output.variance, t)
        rgb = (x0_hat - x_0.float()).abs().mean(1)
        residuals = features.float()[:, None] - output.features.float().unflatten(0, (len(features), -1))
        squared = residuals.square()
        raw = squared * self.feature_extractor.channel_std.float().square().view(-1, 1, 1)
        return Evidence(
            kl=kl.mean(1).unflatten(0, stack).mean(2),
            error=squared.mean(2).unflatten(1, stack[1:]).mean(2),
            raw_error=raw.mean(2).unflatten(1, stack[1:]).mean(2),
            rgb=rgb.unflatten(0, stack).mean(2),
            features=features,
            residuals=residuals.mean(1),
            summaries=summaries,
            logits=logits,
            x_t=x_t.unflatten(0, stack)[:, :, 0],
            x0_hat=x0_hat.unflatten(0, stack)[:, :, 0],
            categories=categories,
        )

    @in_own_mode
    def denoise(
        self,
        image: PipelineImageInput,
        timesteps: Sequence[int] | None = None,
        class_labels: str | int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> RADDenoisingOutput | tuple[Any, ...]:
        """The intermediate denoising step of one image made visible: what scores are computed from.

        Args:
            image: One image.
            timesteps: Steps of the full chain; by default those of scoring.
            class_labels: Category of the image, by name or number; by default the one it resembles most.
            seed: Of the noise, by default that of scoring.
            generator: In its place, as in scoring.
            output_type: Of the pictures: "pil", "np" for float32 [T, S, S, 3] in [0, 1], "pt" for [T, 3, S, S].
            return_dict: False for a tuple of the output's fields.

        Raises:
            ValueError: A bad image or argument; the message names it and what is accepted.
        """
        check_output_type(output_type)
        images = [image] if image is None else as_list(image)
        if len(images) != 1:
            raise ValueError(f"Give one image, not a list of {len(images)}.")
        x_0, _ = self.image_processor.preprocess(images)
        timesteps, _, seed = self._noise(timesteps, 1, as_seed(seed, generator))
        evidence = self.measure(x_0, check_labels(class_labels, 1, self.categories), timesteps, 1, seed)
        output = RADDenoisingOutput(
            timesteps=timesteps,
            noise_levels=np.sqrt(1.0 - self.scheduler.full_chain.alphas_cumprod[timesteps]),
            x_t=pictures_as(to_pil(evidence.x_t[0]), output_type),
            x0_hat=pictures_as(to_pil(evidence.x0_hat[0]), output_type),
            pixel_map=evidence.kl[0].cpu().numpy(),
            feature_map=evidence.error[0].cpu().numpy(),
            rgb_map=evidence.rgb[0].cpu().numpy(),
        )
        return output if return_dict else output.to_tuple()
