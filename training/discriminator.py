"""Training a discriminator on good images with artificial defects."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from rad import RADPipeline
from rad.data.pasting import artificial_batches
from rad.image_reader import PipelineImageInput
from rad.models.discriminator import RADDiscriminator, computes_bf16


def fit_discriminator(
    pipeline: RADPipeline,
    images: PipelineImageInput,
    categories: list[str] | None = None,
    num_steps: int = 3000,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    camera_prob: float = 0.25,
) -> RADPipeline:
    """Trains a pipeline's discriminator, or a new one if it has none, in place.

    What good images look like changes with it: call `fit_normality` afterwards. Where there are several processes,
    each does the same, as far as the device rounds alike.

    Args:
        images: Good images, at least two.
        categories: Category of each, by default one for all; texture is pasted within a category.
        num_steps, batch_size, learning_rate: Of the training.
        seed: Of weights and defects.
        camera_prob: Share of the images that are seen through another camera.

    Returns:
        The pipeline.

    Raises:
        ValueError: There are fewer images, no steps, or another number of categories than of images.
    """
    images = list(images) if isinstance(images, list | tuple) else [images]
    if len(images) < 2 or num_steps < 1:
        raise ValueError(f"Give at least two images and one step, got {len(images)} and {num_steps}.")
    categories = ["object"] * len(images) if categories is None else list(categories)
    if len(categories) != len(images):
        raise ValueError(f"{len(categories)} categories were given for {len(images)} images.")
    extractor, device = pipeline.feature_extractor, pipeline._execution_device
    pixels = [pipeline.image_processor.resize(image)[0] for image in images]
    if pipeline.discriminator is None:
        channels = extractor.network.feature_info.channels()[-3:]
        with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it was
            torch.default_generator.manual_seed(seed)
            discriminator = RADDiscriminator(stage_channels=tuple(channels))
        pipeline.register_modules(discriminator=discriminator.to(device))
    discriminator, bf16 = pipeline.discriminator.requires_grad_(True), computes_bf16(device)

    def batches() -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        for x_0, mask in artificial_batches(pixels, categories, batch_size, seed, camera_prob):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                stages = [stage.float() for stage in extractor.stages(x_0.to(device))]
            side = stages[-len(discriminator.config.stage_channels)].shape[-1]
            yield stages, F.adaptive_avg_pool2d(mask.to(device), side)

    with pipeline.progress_bar(total=num_steps) as progress:

        def report(loss: float) -> None:
            progress.set_postfix(loss=f"{loss:.3f}")
            progress.update()

        discriminator.fit(batches(), num_steps, learning_rate, report)
    discriminator.half().float()  # saved in half precision: what is used is what is saved
    return pipeline
