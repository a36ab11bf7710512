"""How `RADPipeline` learns what good images look like, and what to judge a product by."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from .data.camera import through_another_camera
from .data.duplicates import SIDE, check_different, fingerprint, sketch
from .data.twins import defective_twins
from .image_processor import RADImageProcessor, find_pixel_range
from .image_reader import PipelineImageInput, peak
from .models.fitting import Mirrored, Views
from .models.fusion import KINDS, Twins
from .models.gaussian import MIN_GOOD, MIRRORED_IMAGES, check_counts, folds_of
from .models.normality import NormalityModel
from .pipeline_arguments import (
    as_integer,
    as_list,
    as_seed,
    batches,
    check_categories,
    check_config,
    check_images,
    in_own_mode,
)

if TYPE_CHECKING:
    import accelerate  # not a plain import line: diffusers demands what those in a repository's code name

MAX_SOURCES = 48  # good images that get defects
MAX_VIEWED = 200  # that are also seen through another camera


class RADFittingMixin:
    """`fit_normality` of a pipeline that has `measure`."""

    @in_own_mode
    def fit_normality(
        self: Any,
        images: PipelineImageInput,
        holdout_images: PipelineImageInput | None = None,
        categories: str | Sequence[str] | None = None,
        holdout_categories: str | Sequence[str] | None = None,
        timesteps: Sequence[int] | None = None,
        seed: int | None = None,
        batch_size: int = 4,
        accelerator: "accelerate.Accelerator | None" = None,
        num_noise_samples: int | None = None,
        generator: torch.Generator | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        num_views: int = MAX_VIEWED,
        **config: Any,
    ) -> Any:
        """Fits what good images look like, in place and with no training: less than a second an image. Where this
        pipeline is to stay as it is, fit the one that `with_normality` gives.

        Args:
            images: Good images, with the held-out ones at least five different ones of each category, better ten.
            holdout_images: Good images that the network was not trained on, at least two of each category. When given,
                the score statistics and the thresholds come from them alone, and `images` serve the Gaussians only;
                otherwise `images` serve both, fold by fold.
            categories, holdout_categories: Category of each image, or one for all; by default "object".
            timesteps: Steps of the full chain to score at; by default the present ones, or RAN's 20, 201, 401.
            seed: Of the noise, here and then in scoring; by default the present one, or 0.
            batch_size: Images in one stacked pass of the U-Net.
            accelerator: Of several processes, all of which pass the same lists: each scores its share of the images,
                and all get the same statistics.
            num_noise_samples: Draws at each timestep, likewise; by default the present number, or the pipeline's own.
            generator: In the place of `seed`, as in scoring.
            sizes: Of photos that come resized: their own (height, width), the held-out ones' last.
            num_views: How many of the scored images are also seen through another camera (`rad.data.camera`), at most;
                0 for a fit that knows this camera alone.
            config: Further arguments of `NormalityModel`. `weights` and `image_weights` that are not given are chosen
                on some of these images with defects put on them; `pixel_range` is found in the images; others are by
                default those of the present one. Up to 96 looks at such defects are taken in any case, to tell how
                many are found.

        Returns:
            Itself.

        Raises:
            TypeError: `NormalityModel` has no such argument.
            ValueError: A bad image or argument, images of several ranges of pixel values or of one colour, or too few
                different images of a category; the message names it.
        """
        # 0. Check inputs
        check_config(config)
        (good, batch_size), held_out = check_images(images, batch_size), as_list(holdout_images)
        names = check_categories(good, held_out, categories, holdout_categories)
        check_counts(names, len(held_out) or len(good), MIN_GOOD)
        known = sorted(set(names))
        if self.normality is not None:
            config = {key: self.normality.config[key] for key in ("context", "top_k")} | config
        timesteps, draws, seed = self._noise(timesteps, num_noise_samples, as_seed(seed, generator))
        config = {name: v.item() if isinstance(v, np.generic) else v for name, v in config.items()}  # as JSON has them
        config |= {"timesteps": timesteps, "num_noise_samples": draws, "seed": seed}
        config["discriminator"] = self.discriminator is not None
        stride = self.feature_extractor.config.feature_stride
        size = config.setdefault("gaussian_size", self.config.resolution // stride)
        map_size = self.config.resolution // 4  # RAN's 64 x 64

        # 1. Every world-th image is this process's; the statistics, float64, are made on the CPU
        rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        share = slice(rank, None, world)
        own, own_names = (good + held_out)[share], names[share]
        if sizes is not None and len(sizes) != len(names):
            raise ValueError(f"{len(sizes)} sizes were given for {len(names)} images.")
        unscored = len(good[share]) if held_out else 0

        def reduce(part: torch.Tensor) -> torch.Tensor:
            if accelerator is None:
                return part
            return accelerator.reduce(part.to(accelerator.device), "sum").to(part.device)

        # 2. What the numbers in the pictures mean
        peaks = torch.zeros(len(names), dtype=torch.int64)
        peaks[share] = torch.tensor([-1 if (found := peak(image)) is None else found for image in own]) + 1
        shared = [value - 1 if value else None for value in reduce(peaks).tolist()]
        try:
            pixel_range, darkest = find_pixel_range(shared, config.get("pixel_range"))
        except ValueError as error:
            advice = "" if config.get("pixel_range") is not None else " Or say by pixel_range what their numbers mean."
            raise ValueError(f"{error}{advice}") from error
        darkest = config.get("darkest_peak", darkest)  # given where the images are no longer of 16 bits
        normality = NormalityModel(**config | {"pixel_range": pixel_range, "darkest_peak": darkest})
        processor = RADImageProcessor(self.config.resolution, pixel_range, darkest)

        # 3. Look at it, keeping no more than the Gaussians and the maps need; rows of views and then of images with
        # defects come last
        chosen = [name for name in ("weights", "image_weights") if name not in config]
        num_scored = len(held_out) or len(good)
        sources = spread(names, num_scored, MAX_SOURCES)
        own_sources = [(number, i) for number, i in enumerate(sources) if i % world == rank]
        viewed = spread(names, num_scored, as_integer(num_views, "num_views", 0))
        own_viewed = [(number, i) for number, i in enumerate(viewed) if i % world == rank]
        num_looks, num_twins = len(own) + len(own_viewed), len(KINDS) * len(own_sources)
        features = torch.empty(
            num_looks + num_twins, self.feature_extractor.num_channels, size, size, dtype=torch.half
        )
        residuals = torch.empty(*features.shape[:2], size // 2, size // 2, dtype=torch.half)
        summaries = torch.empty(len(features), self.feature_extractor.num_summaries)
        num_maps = 3 * len(timesteps) + config["discriminator"]
        raw_maps = torch.empty(len(features) - unscored, num_maps, map_size, map_size)

        def look(x_0: torch.Tensor, categories: list[str], start: int) -> None:
            evidence, rows = self.measure(x_0, categories, timesteps, draws, seed), slice(start, start + len(x_0))
            features[rows] = F.adaptive_avg_pool2d(evidence.features.float(), size)
            residuals[rows] = F.adaptive_avg_pool2d(evidence.residuals, size // 2)
            summaries[rows] = evidence.summaries
            if rows.stop > unscored:
                maps = evidence.stack(map_size)[max(unscored - start, 0) :]
                raw_maps[max(start - unscored, 0) : rows.stop - unscored] = maps

        copies, copied = [features[:0]], []  # mirrored ones, and the places of what they are copies of
        to_mirror = mirror_sources(names)
        prints, sketches = torch.zeros(len(names), dtype=torch.int64), torch.zeros(len(names), SIDE, SIDE)
        masks = torch.zeros(num_twins, map_size, map_size)
        with self.progress_bar(total=len(features)) as progress:
            for batch in batches(len(own), batch_size):
                x_0, own_sizes = processor.preprocess(own[batch])
                prints[share][batch] = torch.tensor([fingerprint(one.numpy()) for one in x_0])
                sketches[share][batch] = sketch(x_0)
                look(x_0, own_names[batch], batch.start)
                for place, x in enumerate(x_0, batch.start):
                    if place * world + rank in to_mirror:
                        rng = np.random.default_rng([2, place * world + rank])
                        shape = sizes[place * world + rank] if sizes else own_sizes[place - batch.start]
                        turned = mirror(x)
                        if num_views:
                            turned = torch.stack([through_another_camera(one, rng, shape) for one in turned])
                        views = self.feature_extractor(turned.to(self._execution_device))
                        copies.append(F.adaptive_avg_pool2d(views.float(), size).to(features))
                        copied += [place] * len(views)
                progress.update(len(x_0))
            parts = check_different(reduce(prints).tolist(), reduce(sketches), names, MIN_GOOD)
            if num_copies := len(parts) - len(set(parts)):
                warnings.warn(
                    f"{num_copies} of {len(names)} good images are copies of others or show the same part: they are "
                    "held out together, and count as one where it is said what thresholds rest on.",
                    stacklevel=3,
                )

            # 4. Look at some again, through another camera, and with defects on them
            for batch in batches(len(own_viewed), batch_size):
                picked = own_viewed[batch]
                x_0, own_sizes = processor.preprocess([(good + held_out)[i] for _, i in picked])
                shapes = [sizes[i] for _, i in picked] if sizes else own_sizes
                rngs = (np.random.default_rng([1, number]) for number, _ in picked)
                x_0 = torch.stack(list(map(through_another_camera, x_0, rngs, shapes)))
                look(x_0, [names[i] for _, i in picked], len(own) + batch.start)
                progress.update(len(x_0))
            for place, (number, i) in enumerate(own_sources):
                other = texture_of(i, names, num_scored, parts)
                (x_0, texture), _ = processor.preprocess([(good + held_out)[j] for j in (i, other)])
                x_0, mask = with_defects(x_0, texture, number)
                start = len(KINDS) * place
                masks[start : start + len(KINDS)] = F.adaptive_avg_pool2d(mask, map_size)
                for part in batches(len(x_0), batch_size):
                    look(x_0[part], [names[i]] * len(x_0[part]), num_looks + start + part.start)
                progress.update(len(x_0))

        # 5. Fit
        numbers = [len(KINDS) * number + k for number, _ in own_sources for k in range(len(KINDS))]
        places = [i // world for _, i in own_sources for _ in KINDS]
        twins = Twins(masks, places, numbers, len(KINDS) * len(sources))
        labels = [known.index(name) for name in names]
        more = {
            "mirrored": Mirrored(torch.cat(copies), copied),
            "parts": parts,
            "views": Views([i // world for _, i in own_viewed], [number for number, _ in own_viewed], len(viewed)),
        }
        normality.fit(features, residuals, summaries, labels, raw_maps, known, share, reduce, twins, chosen, **more)
        normality.half().float()  # saved in half precision: what is used is what is saved
        self.register_modules(normality=normality.to(self._execution_device))
        return self


def spread(names: Sequence[str], num_scored: int, most: int) -> list[int]:
    """Some of the last `num_scored` images, in turn of each category as many, evenly spread."""
    members = [scored_of(name, names, num_scored) for name in sorted(set(names))]
    counts = [0] * len(members)
    while sum(counts) < min(most, num_scored):
        for k, own in enumerate(members):
            if counts[k] < len(own) and sum(counts) < most:
                counts[k] += 1
    picked = [np.linspace(0, len(own) - 1, count).round() for own, count in zip(members, counts, strict=True)]
    return sorted(own[int(i)] for own, places in zip(members, picked, strict=True) for i in places)


def mirror_sources(names: Sequence[str]) -> set[int]:
    """Which images also count mirrored: of each category at most `MIRRORED_IMAGES`, picked at random."""
    rng = np.random.default_rng(0)
    members = (scored_of(name, names, len(names)) for name in sorted(set(names)))
    return {int(i) for own in members for i in rng.permutation(own)[:MIRRORED_IMAGES]}


def mirror(x_0: torch.Tensor) -> torch.Tensor:
    """An image [3, S, S] mirrored, upside down, and both, [3, 3, S, S]."""
    return torch.stack([x_0.flip(2), x_0.flip(1), x_0.flip(1, 2)])


def texture_of(image: int, names: Sequence[str], num_scored: int, parts: Sequence[int]) -> int:
    """Which image's texture to paste on a scored one: of its category, another part and, if there is one, its fold, so
    that what judges it knows neither."""
    members = scored_of(names[image], names, num_scored)
    folds = dict(zip(members, folds_of([parts[i] for i in members]), strict=True))
    others = [i for i in members if parts[i] != parts[image]] or [i for i in members if i != image]
    others = [i for i in others if folds[i] == folds[image]] or others
    return next((i for i in others if i > image), others[0])


def scored_of(name: str, names: Sequence[str], num_scored: int) -> list[int]:
    """Places of a category's images among the last `num_scored`."""
    return [i for i in range(len(names) - num_scored, len(names)) if names[i] == name]


def with_defects(x_0: torch.Tensor, texture: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image [3, S, S] in [-1, 1] with a defect of each of `KINDS`, [2, 3, S, S], and their masks [2, S, S]."""
    shown, other = (((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for x in (x_0, texture))
    bad, masks = (np.stack(part) for part in zip(*defective_twins(shown, other, number), strict=True))
    # The change alone is of 8 bits: elsewhere the picture keeps all of its own
    change = torch.from_numpy(bad - shown.astype(np.float32)).permute(0, 3, 1, 2) / 127.5
    return (x_0 + change).clamp(-1, 1), torch.from_numpy(masks).float()
