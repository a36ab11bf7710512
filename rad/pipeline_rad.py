"""RADPipeline: find defects with a diffusion model that has seen good parts only, and show a good version.

RAN is "Removing Anomalies as Noises for Industrial Defect Localization" (Lu et al., ICCV 2023).
"""

import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from huggingface_hub import CommitInfo, HfApi, ModelCard
from PIL import Image
from safetensors import SafetensorError, safe_open
from scipy import ndimage

from .data.pasting import artificial_batches
from .hub import WEIGHTS, check_repo_id, download, list_files, one_sentence, upload, write_code
from .image_processor import ImageInput, PipelineImageInput, RADImageProcessor
from .model_card import create_model_card
from .models.discriminator import RADDiscriminator
from .models.feature_extractor import RADFeatureExtractor
from .models.normality import GLOBAL, NormalityModel, stack_raw_maps
from .models.unet_rad import RADUNet2DModel
from .scheduler_rad import RADScheduler

if TYPE_CHECKING:
    import accelerate  # not a plain import line: diffusers demands what those in a repository's code name

EMBEDDED_DIR = Path(__file__).parent / "pretrained"
EMBEDDED_MODELS = ("synthetic", "mtd")
COMPONENTS = {
    "unet": RADUNet2DModel,
    "scheduler": RADScheduler,
    "feature_extractor": RADFeatureExtractor,
    "normality": NormalityModel,
    "discriminator": RADDiscriminator,
}
# The largest settings of a pipeline that is loaded: what tables and buffers are made of before there are weights
LIMITS = {
    "resolution": 2048,
    "num_noise_samples": 64,
    "num_train_timesteps": 10_000,
    "num_respaced_timesteps": 10_000,
    "feature_channels": 4096,
    "num_summaries": 8192,
    "gaussian_size": 256,
    "gaussian_channels": 1024,
    "map_size": 512,
    "num_scores": 1_000_000,
}


@dataclass(frozen=True)
class AnomalyRegion:
    """One connected region of a mask.

    Attributes:
        box: Left, top, right and bottom in pixels of the input; right and bottom are exclusive.
        area: Pixels.
        peak: Largest value of the anomaly map inside.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float


@dataclass
class RADPipelineOutput(BaseOutput):
    """Scores of a list of B images. Maps are float32 [B, H, W] at the inputs' own size, or a list of B arrays [H, W]
    when the sizes differ.

    Attributes:
        anomaly_map: The map of the chosen score. In calibrated mode in units of good-image deviation: about 0 on good
            images, 1 a standard deviation above.
        score: [B], one number for each image, likewise.
        scores: The same for every score type, and for "global", how odd the image is as a whole, which has no map.
        p_value: [B] in (0, 1], how often a good image scores as high; None in paper mode.
        is_anomalous: [B] bool, p_value <= false_alarm_rate; None in paper mode.
        mask: [B, H, W] bool, pixels above the pixel threshold of the same rate; empty for images judged good. None in
            paper mode.
        regions: For each image the connected regions of its mask, largest peak first; None in paper mode.
        pixel_map, feature_map, residual_map, mahalanobis_map, discriminator_map, rgb_map: Each score alone: KL,
            feature error, Mahalanobis distance of the feature residual and of the features, the discriminator's logits
            (these three None in paper mode, RAN has none of them; the last also without a discriminator), and the RGB
            difference that RAN compares with.
        category: The category whose normality was used, for each image.
        threshold: The image score at which false_alarm_rate lies; None in paper mode.
        false_alarm_interval: 95 % confidence interval of the rate that this threshold really has, wide where it rests
            on few good images; None in paper mode.
        pixel_threshold: The map value at which it lies; None in paper mode.
    """

    anomaly_map: np.ndarray | list[np.ndarray]
    score: np.ndarray
    scores: dict[str, np.ndarray] | None = None
    p_value: np.ndarray | None = None
    is_anomalous: np.ndarray | None = None
    mask: np.ndarray | list[np.ndarray] | None = None
    regions: list[list[AnomalyRegion]] | None = None
    pixel_map: np.ndarray | list[np.ndarray] | None = None
    feature_map: np.ndarray | list[np.ndarray] | None = None
    residual_map: np.ndarray | list[np.ndarray] | None = None
    mahalanobis_map: np.ndarray | list[np.ndarray] | None = None
    discriminator_map: np.ndarray | list[np.ndarray] | None = None
    rgb_map: np.ndarray | list[np.ndarray] | None = None
    category: list[str] | None = None
    threshold: float | None = None
    false_alarm_interval: tuple[float, float] | None = None
    pixel_threshold: float | None = None


@dataclass
class RADDenoisingOutput(BaseOutput):
    """One step of the denoiser at each of T timesteps, at the model's resolution S.

    Attributes:
        timesteps: Steps of the full chain, [T].
        noise_levels: Standard deviation of the noise in x_t, sqrt(1 - alphas_cumprod), [T] in (0, 1).
        x_t: The noised image at each timestep, RGB.
        x0_hat: What the denoiser makes of it, RGB.
        pixel_map: KL in bits, mean over colour channels, float32 [T, S, S].
        feature_map: Squared error of the predicted features, mean over channels, float32 [T, g, g].
        rgb_map: |x0_hat - x_0|, mean over colour channels, float32 [T, S, S].
    """

    timesteps: list[int]
    noise_levels: np.ndarray
    x_t: list[Image.Image]
    x0_hat: list[Image.Image]
    pixel_map: np.ndarray
    feature_map: np.ndarray
    rgb_map: np.ndarray


@dataclass
class RADRestorationOutput(BaseOutput):
    """What good parts in the place of these would look like.

    Attributes:
        images: The restored images, RGB at the inputs' own size.
        intermediates: For each image the input and the image after each step, RGB at the model's resolution.
        distances: For each image the Mahalanobis score before the first and after each step, in units of good-image
            deviation: 0 is a typical good image.
    """

    images: list[Image.Image]
    intermediates: list[list[Image.Image]]
    distances: list[np.ndarray]


class RADPipeline(DiffusionPipeline):
    """Anomaly localisation with a diffusion model trained on good images.

    Args:
        unet: Predicts noise, variance and features in one pass.
        scheduler: The diffusion arithmetic.
        feature_extractor: Frozen ImageNet features.
        normality: Statistics of good images; None until `fit_normality`, and then only `mode="paper"` works.
        discriminator: Has learned from artificial defects, see `fit_discriminator`; RAN has none.
        resolution: Images are resized to this square; maps are resized back.
        num_noise_samples: Noise draws at each timestep by default, antithetic pairs from two on.
    """

    model_cpu_offload_seq = "feature_extractor->discriminator->unet->normality"
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
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            normality=normality,
            discriminator=discriminator,
        )
        self.register_to_config(resolution=resolution, num_noise_samples=num_noise_samples)
        self.image_processor = RADImageProcessor(resolution)

    # -- loading --------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, name_or_path: str | os.PathLike, **kwargs: Any) -> "RADPipeline":
        """An embedded model by its name, or else a folder or Hub id."""
        return (cls.from_embedded if name_or_path in EMBEDDED_MODELS else cls.from_pretrained)(name_or_path, **kwargs)

    @classmethod
    def from_embedded(cls, name: str = "synthetic", **kwargs: Any) -> "RADPipeline":
        """A pipeline that comes with the package: "synthetic" (eight categories) or "mtd" (magnetic tiles)."""
        if name not in EMBEDDED_MODELS:
            raise ValueError(
                f"The embedded models are {', '.join(EMBEDDED_MODELS)}; got {str(name)!r}. "
                "Folders and Hub ids go to from_pretrained."
            )
        return cls.from_pretrained(EMBEDDED_DIR / name, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "RADPipeline":
        """As in diffusers, from a folder or the Hub, with two promises: weights are read from safetensors only, and no
        code of the folder or repository is ever run, whatever `trust_remote_code` says.

        Raises:
            OSError: A file is missing or damaged, the pipeline names classes other than this package's, or the Hub can
                not or will not deliver; one sentence says which.
        """
        name = os.fspath(pretrained_model_name_or_path)
        kwargs["trust_remote_code"] = False
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("use_safetensors must be True: other weights can run code when they are read.")
        if Path(name).is_dir():
            check_pipeline_folder(Path(name), kwargs.get("variant"), passed=kwargs)
        else:
            check_repo_id(name)
        return super().from_pretrained(name, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Downloads the configurations and the weights of one variant to the cache; returns their folder.

        Args:
            pretrained_model_name: "user/repo".
            kwargs: variant, revision, token, cache_dir, local_files_only and force_download; components by name are
                not downloaded, what else `from_pretrained` takes is left alone.
        """
        options = ("variant", "revision", "token", "cache_dir", "local_files_only", "force_download")
        options = {name: kwargs[name] for name in options if kwargs.get(name) is not None}
        folder = download(pretrained_model_name, [name for name in COMPONENTS if name not in kwargs], **options)
        check_pipeline_folder(folder, kwargs.get("variant"), pretrained_model_name, passed=kwargs)
        return str(folder)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """As in diffusers, with this package's classes in the place of a repository's own code for them."""
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        config["_class_name"] = cls.__name__
        for name, component in COMPONENTS.items():
            if config.get(name, [None])[0] is not None:
                config[name] = [component.__module__, component.__name__]
        return config

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in diffusers: weights, configurations, and the code with which diffusers loads them without this package.

        Args:
            save_directory: Created if need be.
            variant: Part of the weights' file names, such as "fp16"; convert the pipeline itself first.
            push_to_hub: Also push to `repo_id`, by default the folder's name; further arguments as in `push_to_hub`.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True: other weights can run code when they are read.")
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        components = {name: type(module) for name, module in self.components.items() if module is not None}
        # One file where this class itself was loaded from a repository
        contents = (
            upload,
            RADImageProcessor,
            artificial_batches,
            create_model_card,
            *COMPONENTS.values(),
            RADPipeline,
        )
        write_code(
            Path(save_directory), list(dict.fromkeys(sys.modules[item.__module__] for item in contents)), components
        )
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), variant=variant, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        card: ModelCard | None = None,
        files: dict[str, Path] | None = None,
    ) -> CommitInfo:
        """Uploads all that `save_pretrained` writes and a model card in one commit: a reader sees all of it or none.

        Args:
            repo_id: "user/repo"; created if need be.
            commit_message, private, token, create_pr, variant: As in diffusers.
            card: From `create_model_card`. By default the repository's own stays, and a new one gets a card without
                metrics.
            files: Further files, such as the card's picture: where each goes in the repository, and where it is.

        Raises:
            OSError: In one sentence, whatever went wrong.
        """
        if card is None:
            with one_sentence(repo_id):
                keep = HfApi(token=token).file_exists(repo_id, "README.md")
            card = None if keep else create_model_card(self, repo_id=repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            if card is not None:
                card.save(Path(folder) / "README.md")
            return upload(
                repo_id,
                list_files(Path(folder)) | (files or {}),
                commit_message or f"Upload {type(self).__name__}",
                private=private,
                token=token,
                create_pr=create_pr,
            )

    # -- scoring --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        timesteps: list[int] | None = None,
        num_noise_samples: int | None = None,
        class_labels: str | int | list[str | int] | None = None,
        mode: str = "calibrated",
        score_type: str = "fused",
        false_alarm_rate: float = 0.01,
        seed: int = 0,
        batch_size: int = 4,
        output_type: str = "np",
        map_size: tuple[int, int] | None = None,
    ) -> RADPipelineOutput:
        """Scores images: noise them, denoise one step, compare with the true posterior and with good images.

        An image's numbers depend on the image and the seed alone, not on its batch or its place in it.

        Args:
            image: One image or a list; see `RADImageProcessor.decode` for what is accepted.
            timesteps: Steps of the full chain on the respaced one; by default those of the normality model, which
                calibrated scores are fitted to, or RAN's 20, 201, 401.
            num_noise_samples: Noise draws at each timestep, antithetic pairs from two on. Calibrated KL, RGB and
                residual scores are in units of good images under the draws they were fitted with: others shift them.
            class_labels: Category of each image, or one for all, by name or number; by default the category whose good
                images each one resembles most.
            mode: "calibrated" (units of good-image deviation; the maps of `NormalityModel` fused by its weights) or
                "paper" (RAN to the letter: per-image z-scores, alpha = 0.5, no smoothing).
            score_type: Which map decides: "fused", "pixel" (KL), "feature" (error), "residual" (Mahalanobis distance
                of what the prediction of features leaves), "mahalanobis" (of the features), "discriminator" or "rgb".
            false_alarm_rate: Share of good images that may be called anomalous.
            seed: Of the noise; the one `fit_normality` used (0) unless you refit with another.
            batch_size: Images in one stacked pass of the U-Net; each counts timesteps x draws times.
            output_type: "np" for NumPy arrays, "pt" for CPU tensors.
            map_size: Height and width of maps, masks and regions; by default each image's own. At the normality
                model's `map_size` maps are as they were computed, and `image_processor.resize_map` takes them to any
                size later.

        Raises:
            ValueError: A bad image or argument; the message names it and what is accepted.
        """
        # 0. Check inputs
        if mode not in ("calibrated", "paper"):
            raise ValueError(f"mode must be 'calibrated' or 'paper', got {mode!r}.")
        if mode == "calibrated" and self.normality is None:
            raise ValueError("This pipeline has no normality model: call fit_normality(images) or use mode='paper'.")
        accepted = self.normality.score_types if mode == "calibrated" else ("fused", "pixel", "feature", "rgb")
        if score_type not in accepted:
            raise ValueError(f"score_type must be one of {', '.join(accepted)} in {mode} mode, got {score_type!r}.")
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate must lie between 0 and 1, got {false_alarm_rate}.")
        if output_type not in ("np", "pt"):
            raise ValueError(f"output_type must be 'np' or 'pt', got {output_type!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if map_size is not None and (len(map_size) != 2 or min(map_size) < 1):
            raise ValueError(f"map_size must be a height and a width of at least 1, got {map_size}.")
        default = self._default_timesteps()
        timesteps = default if timesteps is None else list(timesteps)
        if mode == "calibrated" and timesteps != default:
            raise ValueError(
                f"Calibrated scores are fitted to the timesteps {default}, got {timesteps}: "
                "call fit_normality(images, timesteps=...) or use mode='paper'."
            )

        # 1. Decode and resize; every image by itself
        images = list(image) if isinstance(image, list | tuple) else [image]
        if not images:
            raise ValueError("The list of images is empty: give at least one image.")
        labels = self._check_labels(class_labels, len(images))

        # 2. Score in stacked passes
        chunks, sizes, categories = [], [], []
        with self.progress_bar(total=len(images)) as progress:
            for start in range(0, len(images), batch_size):
                x_0, chunk_sizes = self.image_processor.preprocess(images[start : start + batch_size])
                chunk_sizes = chunk_sizes if map_size is None else [tuple(map_size)] * len(x_0)
                x_0 = x_0.to(self._execution_device, self.unet.dtype)
                features, logits, summaries = self._features(x_0)
                chunk_labels = labels[start : start + batch_size]
                if self.normality is not None:
                    guesses = self.normality.classify(features)
                    chunk_labels = [g if n is None else n for n, g in zip(chunk_labels, guesses, strict=True)]
                    categories += [self.normality.config.categories[label] for label in chunk_labels]
                kl, error, rgb, residuals = self.raw_scores(
                    x_0, features, self._unet_labels(chunk_labels), timesteps, num_noise_samples, seed, mode == "paper"
                )
                if mode == "paper":
                    maps = _paper_maps(kl, error, rgb)
                    scores = {name: m.flatten(1).topk(64).values.mean(1) for name, m in maps.items()}
                else:
                    distances = (
                        self.normality.distance(residuals, chunk_labels, "residual"),
                        self.normality.distance(features, chunk_labels),
                    )
                    raw = stack_raw_maps(kl, error, rgb, self.normality.config.map_size, *logits, *distances)
                    maps = self.normality.calibrate(raw, chunk_labels)
                    distance = self.normality.global_distance(summaries, chunk_labels)
                    scores = {
                        name: self.normality.image_scores(maps, chunk_labels, name, distance)
                        for name in (*maps, GLOBAL)
                    }
                resized = {name: self.image_processor.resize_map(m, chunk_sizes) for name, m in maps.items()}
                chunks.append((resized, {name: s.float().cpu() for name, s in scores.items()}))
                sizes += chunk_sizes
                progress.update(len(x_0))

        # 3. Decide
        maps = {name: [m for resized, _ in chunks for m in resized[name]] for name in chunks[0][0]}
        all_scores = {name: torch.cat([scores[name] for _, scores in chunks]) for name in chunks[0][1]}
        score = all_scores[score_type]
        decision = {}
        if mode == "calibrated":
            p_value = self.normality.p_value(score, score_type)
            pixel_threshold = self.normality.pixel_threshold(false_alarm_rate, score_type)
            is_anomalous = (p_value <= false_alarm_rate).numpy()
            masks = [(m > pixel_threshold) & bad for m, bad in zip(maps[score_type], is_anomalous, strict=True)]
            decision = {
                "p_value": p_value.numpy(),
                "is_anomalous": is_anomalous,
                "mask": _stack(masks),
                "regions": [find_regions(k, m) for k, m in zip(masks, maps[score_type], strict=True)],
                "threshold": self.normality.score_threshold(false_alarm_rate, score_type),
                "false_alarm_interval": self.normality.false_alarm_interval(false_alarm_rate, score_type),
                "pixel_threshold": pixel_threshold,
            }
        output = RADPipelineOutput(
            anomaly_map=_stack(maps[score_type]),
            score=score.numpy(),
            scores={name: s.numpy() for name, s in all_scores.items()},
            category=categories or None,
            **{f"{name}_map": _stack(m) for name, m in maps.items() if name != "fused"},
            **decision,
        )
        return _to_tensors(output) if output_type == "pt" else output

    def _default_timesteps(self) -> list[int]:
        """Those that the normality model was fitted to, or RAN's."""
        if self.normality is None:
            return self.scheduler.respaced_to_full([5, 50, 100])
        return list(self.normality.config.timesteps)

    def _features(self, x_0: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """The extractor's features of images, a list of the discriminator's logits, empty if there is none, and the
        extractor's summaries."""
        stages = self.feature_extractor.stages(x_0)
        logits = [] if self.discriminator is None else [self.discriminator(stages)]
        return self.feature_extractor.join(stages), logits, self.feature_extractor.summary(x_0, stages)

    def raw_scores(
        self,
        x_0: torch.Tensor,
        features: torch.Tensor,
        unet_labels: torch.Tensor | None,
        timesteps: list[int],
        num_noise_samples: int | None = None,
        seed: int = 0,
        raw_channels: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """RAN's two scores, the RGB difference and the feature residual: one pass of the U-Net for all timesteps.

        Args:
            x_0: Images [B, 3, S, S] in [-1, 1].
            features: The extractor's, [B, C, g, g].
            unet_labels: Class labels [B] of the U-Net, None if it has none.
            raw_channels: Weigh the extractor's raw channels equally, as RAN does, not the standardised ones.

        Returns:
            KL in bits, mean over colour channels [B, T, S, S]; squared feature error, mean over channels
            [B, T, g, g]; |x0_hat - x_0|, mean over colour channels [B, T, S, S], each averaged over noise draws; and
            the features less their prediction, averaged over timesteps and draws [B, C, g, g].
        """
        draws = self.config.num_noise_samples if num_noise_samples is None else num_noise_samples
        if draws < 1:
            raise ValueError(f"num_noise_samples must be at least 1, got {draws}.")
        noise = torch.cat([_noise(seed, t, draws, x_0) for t in timesteps])  # [T D, 3, S, S], the same for each image
        t = torch.tensor(timesteps, device=x_0.device).repeat_interleave(draws).repeat(len(x_0))
        noise = noise.repeat(len(x_0), 1, 1, 1)
        x_0 = x_0.repeat_interleave(len(timesteps) * draws, dim=0)
        if unet_labels is not None:
            unet_labels = unet_labels.repeat_interleave(len(timesteps) * draws)

        _, x0_hat, kl, predicted = self._step_back(x_0, noise, unet_labels, t)
        residuals = features.float()[:, None] - predicted.unflatten(0, (len(features), -1))
        squared = residuals.square()
        if raw_channels:
            squared = squared * self.feature_extractor.channel_std.float().square().view(-1, 1, 1)
        error = squared.mean(2).unflatten(1, (len(timesteps), draws)).mean(2)
        kl, rgb = (
            m.unflatten(0, (len(features), len(timesteps), draws)).mean(2)
            for m in (kl, (x0_hat - x_0.float()).abs().mean(1))
        )
        return kl, error, rgb, residuals.mean(1)

    def _step_back(
        self, x_0: torch.Tensor, noise: torch.Tensor, unet_labels: torch.Tensor | None, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise images, denoise them one step: x_t, x0_hat, KL in bits [B, S, S] and predicted features, float32."""
        x_t = self.scheduler.add_noise(x_0, noise, t)
        output = self.unet(x_t, t, unet_labels)
        kl, x0_hat = self.scheduler.kl_score(x_0, x_t, output.sample, output.variance, t)
        return x_t, x0_hat, kl.mean(1), output.features.float()

    @torch.no_grad()
    def denoise(
        self,
        image: ImageInput,
        timesteps: list[int] | None = None,
        class_labels: str | int | None = None,
        seed: int = 0,
    ) -> RADDenoisingOutput:
        """The intermediate denoising step of one image made visible: what scores are computed from.

        Args:
            image: One image.
            timesteps: Steps of the full chain; by default those of scoring.
            class_labels: Category of the image, by name or number; by default the one it resembles most.
            seed: Of the noise, which is that of scoring.

        Raises:
            ValueError: A bad image or argument; the message names it and what is accepted.
        """
        if isinstance(image, list | tuple):
            raise ValueError(f"Give one image, not a list of {len(image)}.")
        x_0, _ = self.image_processor.preprocess(image)
        x_0 = x_0.to(self._execution_device, self.unet.dtype)
        timesteps = self._default_timesteps() if timesteps is None else list(timesteps)
        if not timesteps:
            raise ValueError("The list of timesteps is empty: give at least one.")
        features = self.feature_extractor(x_0)
        labels = self._check_labels(class_labels, 1)
        if self.normality is not None and labels == [None]:
            labels = self.normality.classify(features)
        unet_labels = self._unet_labels(labels)
        if unet_labels is not None:
            unet_labels = unet_labels.repeat(len(timesteps))

        noise = torch.cat([_noise(seed, timestep, 1, x_0) for timestep in timesteps])
        t = torch.tensor(timesteps, device=x_0.device)
        x_t, x0_hat, kl, predicted = self._step_back(x_0.repeat(len(t), 1, 1, 1), noise, unet_labels, t)
        maps = kl, (features.float() - predicted).square().mean(1), (x0_hat - x_0.float()).abs().mean(1)
        kl, error, rgb = (m.float().cpu().numpy() for m in maps)
        return RADDenoisingOutput(
            timesteps=timesteps,
            noise_levels=np.sqrt(1.0 - self.scheduler.full_chain.alphas_cumprod[timesteps]),
            x_t=self.image_processor.to_pil(x_t),
            x0_hat=self.image_processor.to_pil(x0_hat),
            pixel_map=kl,
            feature_map=error,
            rgb_map=rgb,
        )

    # -- fitting --------------------------------------------------------------------------------------------------

    def fit_discriminator(
        self,
        images: PipelineImageInput,
        categories: list[str] | None = None,
        num_steps: int = 3000,
        batch_size: int = 8,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        """Trains a discriminator, from the present one if there is one, on good images with artificial defects
        (`paste_defects`). What good images look like changes with it: call `fit_normality` afterwards. Where there are
        several processes, each does the same, as far as the device rounds alike.

        Args:
            images: Good images, at least two.
            categories: Category of each, by default one for all; texture is pasted within a category.
            num_steps, batch_size, learning_rate: Of the training.
            seed: Of weights and defects.
        """
        images = list(images) if isinstance(images, list | tuple) else [images]
        if len(images) < 2 or num_steps < 1:
            raise ValueError(f"Give at least two images and one step, got {len(images)} and {num_steps}.")
        categories = ["object"] * len(images) if categories is None else list(categories)
        if len(categories) != len(images):
            raise ValueError(f"{len(categories)} categories were given for {len(images)} images.")
        device = self._execution_device
        pixels = [self.image_processor.preprocess([image])[0][0] for image in images]
        pixels = [((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for x in pixels]
        if self.discriminator is None:
            torch.manual_seed(seed)
            channels = self.feature_extractor.network.feature_info.channels()[-3:]
            self.register_modules(discriminator=RADDiscriminator(stage_channels=tuple(channels)).to(device))
        discriminator = self.discriminator.requires_grad_(True)

        def batches() -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
            for x_0, mask in artificial_batches(pixels, categories, batch_size, seed):
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                    stages = [stage.float() for stage in self.feature_extractor.stages(x_0.to(device))]
                side = stages[-len(discriminator.config.stage_channels)].shape[-1]
                yield stages, F.adaptive_avg_pool2d(mask.to(device), side)

        with self.progress_bar(total=num_steps) as progress:

            def report(loss: float) -> None:
                progress.set_postfix(loss=f"{loss:.3f}")
                progress.update()

            discriminator.fit(batches(), num_steps, learning_rate, report)
        discriminator.half().float()  # saved in half precision: what is used is what is saved

    @torch.no_grad()
    def fit_normality(
        self,
        images: PipelineImageInput,
        holdout_images: PipelineImageInput | None = None,
        categories: list[str] | None = None,
        holdout_categories: list[str] | None = None,
        timesteps: list[int] | None = None,
        seed: int = 0,
        batch_size: int = 4,
        accelerator: "accelerate.Accelerator | None" = None,
        **config: Any,
    ) -> None:
        """Fits what good images look like, with no training: seconds for tens of images.

        Args:
            images: Good images, at least two for each category.
            holdout_images: Good images that the network was not trained on. When given, the score statistics and the
                thresholds come from them alone, and `images` serve the Gaussians only; otherwise `images` serve both,
                fold by fold.
            categories, holdout_categories: Category of each image; by default one, "object".
            timesteps: Steps of the full chain to score at; by default the present ones, or RAN's 20, 201, 401.
            seed: Of the noise.
            batch_size: Images in one stacked pass of the U-Net.
            accelerator: Of several processes, all of which pass the same lists: each scores its share of the images,
                and all get the same statistics.
            config: Further arguments of `NormalityModel`, such as `weights`; by default those of the present one.

        Raises:
            ValueError: A bad image or argument, or too few images of a category; the message names it.
        """
        images = list(images) if isinstance(images, list | tuple) else [images]
        holdout_images = list(holdout_images or [])
        if not images:
            raise ValueError("The list of good images is empty: give at least two.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        names = ["object"] * len(images + holdout_images)
        if categories or holdout_categories:
            categories, holdout_categories = list(categories or []), list(holdout_categories or [])
            for kind, given, of in (("", categories, images), ("holdout_", holdout_categories, holdout_images)):
                if len(given) != len(of):
                    raise ValueError(f"{len(given)} {kind}categories were given for {len(of)} {kind}images.")
            names = categories + holdout_categories
        known = sorted(set(names))
        labels = [known.index(name) for name in names]
        if self.normality is not None:
            kept = ("weights", "image_weights", "context", "top_k", "timesteps")
            config = {key: self.normality.config[key] for key in kept} | config
        if timesteps is not None or "timesteps" not in config:
            config["timesteps"] = timesteps or self.scheduler.respaced_to_full([5, 50, 100])
        config["timesteps"] = list(config["timesteps"])
        channels, stride = self.feature_extractor.num_channels, self.feature_extractor.config.feature_stride
        size = config.setdefault("gaussian_size", self.config.resolution // stride // 2)
        map_size = self.config.resolution // 4  # RAN's 64 x 64

        # 1. Every world-th image is this process's; the statistics, float64, are made on the CPU
        rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        share = slice(rank, None, world)
        own, own_names = (images + holdout_images)[share], names[share]
        unscored = len(images[share]) if holdout_images else 0

        def reduce(part: torch.Tensor) -> torch.Tensor:
            return part if world == 1 else accelerator.reduce(part.to(accelerator.device), "sum").to(part.device)

        # 2. Score it, keeping no more than the Gaussians and the maps need
        features = torch.empty(len(own), channels, size, size, dtype=torch.half)
        residuals = torch.empty(len(own), channels, size // 2, size // 2, dtype=torch.half)
        summaries = torch.empty(len(own), self.feature_extractor.num_summaries)
        num_maps = 3 * len(config["timesteps"]) + (self.discriminator is not None)
        raw_maps = torch.empty(len(own) - unscored, num_maps, map_size, map_size)
        with self.progress_bar(total=len(own)) as progress:
            for start in range(0, len(own), batch_size):
                stop = start + batch_size
                x_0, _ = self.image_processor.preprocess(own[start:stop])
                x_0 = x_0.to(self._execution_device, self.unet.dtype)
                f, logits, summaries[start:stop] = self._features(x_0)
                unet_labels = self._unet_labels_of_names(own_names[start:stop])
                kl, error, rgb, residual = self.raw_scores(x_0, f, unet_labels, config["timesteps"], seed=seed)
                features[start:stop] = F.adaptive_avg_pool2d(f.float(), size)
                residuals[start:stop] = F.adaptive_avg_pool2d(residual, size // 2)
                if stop > unscored:
                    maps = stack_raw_maps(kl, error, rgb, map_size, *logits)[max(unscored - start, 0) :]
                    raw_maps[max(start - unscored, 0) : stop - unscored] = maps
                progress.update(len(x_0))

        # 3. Fit
        normality = NormalityModel.fit(
            features, residuals, summaries, labels, raw_maps, known, share, reduce, **config
        )
        normality.half().float()  # saved in half precision: what is used is what is saved
        self.register_modules(normality=normality.to(self._execution_device))

    def _check_labels(self, class_labels: str | int | list[str | int] | None, count: int) -> list[int | None]:
        """Class labels of the normality model, one for each image; None where it shall find out."""
        if class_labels is None or self.normality is None:
            return [None] * count
        class_labels = list(class_labels) if isinstance(class_labels, list | tuple) else [class_labels] * count
        if len(class_labels) != count:
            raise ValueError(f"{len(class_labels)} class_labels were given for {count} images.")
        categories = list(self.normality.config.categories)
        labels = [categories.index(name) if name in categories else name for name in class_labels]
        for label in labels:
            if not isinstance(label, int) or not 0 <= label < len(categories):
                raise ValueError(f"There is no category {label!r}; this pipeline knows {', '.join(categories)}.")
        return labels

    def _unet_labels(self, labels: list[int | None]) -> torch.Tensor | None:
        if self.normality is None:
            return self._unet_labels_of_names([None] * len(labels))
        return self._unet_labels_of_names([self.normality.config.categories[label] for label in labels])

    def _unet_labels_of_names(self, names: list[str | None]) -> torch.Tensor | None:
        """Class labels of the U-Net: a category it was not trained on gets the "unknown category" embedding."""
        trained = list(self.unet.config.categories)
        if not trained:
            return None
        labels = [trained.index(name) if name in trained else len(trained) for name in names]
        return torch.tensor(labels, device=self._execution_device)

    # -- restoration ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(
        self,
        image: PipelineImageInput,
        num_steps: int = 150,
        step_size: float = 0.02,
        denoise_every: int = 5,
        anneal: float = 0.2,
        class_labels: str | int | list[str | int] | None = None,
        keep_normal: bool = True,
        seed: int = 0,
    ) -> RADRestorationOutput:
        """Gradient denoising (RAN, algorithm 1): the gradient of the Mahalanobis distance removes the anomaly, the
        diffusion model removes the gradient's noise. The distance is squared here, so that the worst positions weigh
        most, and the steps shrink, so that they settle; RAN does neither.

        Stops when the image is as close to normal as a typical good one, at once when there is nothing to change.

        Args:
            image: One image or a list.
            num_steps: Steps at most (RAN: 500).
            step_size: s; each step scales the image by sqrt(1 - s^2) and moves it by s standardised gradients, so that
                it is a diffusion step of variance s^2.
            denoise_every: Denoise after this many steps.
            anneal: The step size and the timestep of the denoising, RAN's 8 of 250, fall linearly to this fraction.
            class_labels: As in scoring.
            keep_normal: Leave what the anomaly map calls normal as it was.
            seed: Of the noise in scoring.
        """
        if self.normality is None:
            raise ValueError("This pipeline has no normality model: call fit_normality(images) first.")
        if num_steps < 1 or denoise_every < 1 or not 0 < step_size < 1 or not 0 < anneal <= 1:
            raise ValueError(
                "num_steps and denoise_every must be at least 1 and step_size and anneal between 0 and 1, "
                f"got {num_steps}, {denoise_every}, {step_size} and {anneal}."
            )
        images = list(image) if isinstance(image, list | tuple) else [image]
        if not images:
            raise ValueError("The list of images is empty: give at least one image.")
        labels = self._check_labels(class_labels, len(images))

        output = RADRestorationOutput(images=[], intermediates=[], distances=[])
        for one, label in zip(images, labels, strict=True):
            decoded = self.image_processor.decode(one)
            x_0, sizes = self.image_processor.preprocess(decoded)
            x_0 = x_0.to(self._execution_device, self.unet.dtype)
            label = self.normality.classify(self.feature_extractor(x_0))[0] if label is None else label
            unet_labels = self._unet_labels([label])
            keep = self._normal_weight(decoded, label, seed) if keep_normal else torch.zeros_like(x_0[:, :1])

            x, intermediates, distances = x_0, [x_0], []
            with self.progress_bar(total=num_steps) as progress:
                for step in range(num_steps + 1):
                    # 1. Distance to good images, and its gradient
                    with torch.enable_grad():
                        x = x.detach().requires_grad_()
                        distance = self.normality.distance(self.feature_extractor(x), [label])
                        (gradient,) = torch.autograd.grad(distance.square().mean(), x)
                    distances.append(float(self._distance_score(distance.detach(), label)))
                    if distances[-1] <= 0.0 or step == num_steps or bool((keep == 1).all()):
                        break
                    # 2. A diffusion step whose noise is the gradient
                    fraction = 1 + (anneal - 1) * step / num_steps
                    s, gradient = step_size * fraction, gradient * (1 - keep)
                    x = (1 - s**2) ** 0.5 * x.detach() - s * gradient / _std(gradient, 1 - keep)
                    # 3. Denoise now and then
                    if (step + 1) % denoise_every == 0:
                        t = self.scheduler.respaced_to_full([round(8 * fraction)])
                        t = torch.tensor(t, device=self._execution_device)
                        prediction = self.unet(x, t, unet_labels)
                        x, _, _ = self.scheduler.model_distribution(
                            prediction.sample, prediction.variance, x, t, respaced=True
                        )
                    x = keep * x_0 + (1 - keep) * x.to(x_0.dtype).clamp(-1, 1)
                    intermediates.append(x)
                    progress.update()
            output.images.append(self._paste(decoded, x.detach(), keep, sizes))
            output.intermediates.append(self.image_processor.to_pil(torch.cat(intermediates).detach()))
            output.distances.append(np.array(distances, dtype=np.float32))
        return output

    def _distance_score(self, distance: torch.Tensor, label: int) -> torch.Tensor:
        """Mahalanobis image score of distances [1, g, g], as scoring gives it."""
        raw = torch.zeros_like(self.normality.location[[label]], dtype=torch.float32)
        raw[:, -1:] = F.interpolate(distance[:, None].float(), raw.shape[-2:], mode="bilinear")
        maps = self.normality.calibrate(raw, [label])
        return self.normality.image_scores(maps, [label], "mahalanobis")[0]

    def _normal_weight(self, image: Image.Image, label: int, seed: int) -> torch.Tensor:
        """Soft mask [1, 1, S, S] of what is left as it was: 1 where the anomaly map is normal, 0 at defects."""
        resolution = self.config.resolution
        found = self(image, class_labels=label, seed=seed)
        anomalous = torch.from_numpy(found.anomaly_map > self.normality.pixel_threshold(0.005))[None].float()
        anomalous = F.interpolate(anomalous, (resolution, resolution), mode="nearest")
        radius = max(2, resolution // 64)
        anomalous = F.max_pool2d(anomalous, 2 * radius + 1, stride=1, padding=radius)
        blur = radius // 2
        anomalous = F.avg_pool2d(anomalous, 2 * blur + 1, stride=1, padding=blur, count_include_pad=False)
        return (1 - anomalous).to(self._execution_device, self.unet.dtype)

    def _paste(
        self, image: Image.Image, x: torch.Tensor, keep: torch.Tensor, sizes: list[tuple[int, int]]
    ) -> Image.Image:
        """The restored image at the input's size; kept pixels are the input's own, not resized twice."""
        restored = self.image_processor.to_pil(x, sizes)[0]
        weight = Image.fromarray((keep[0, 0].float().cpu().numpy() * 255).round().astype(np.uint8))
        return Image.composite(image, restored, weight.resize(image.size, Image.Resampling.BILINEAR))


def find_regions(mask: np.ndarray, anomaly_map: np.ndarray) -> list[AnomalyRegion]:
    """8-connected regions of a mask [H, W], those with the largest peak in the map [H, W] first."""
    labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
    index = range(1, count + 1)
    areas = ndimage.sum_labels(mask, labelled, index)
    peaks = ndimage.maximum(anomaly_map, labelled, index)
    regions = [
        AnomalyRegion((columns.start, rows.start, columns.stop, rows.stop), int(area), float(peak))
        for (rows, columns), area, peak in zip(ndimage.find_objects(labelled), areas, peaks, strict=True)
    ]
    return sorted(regions, key=lambda region: -region.peak)


def check_pipeline_folder(
    folder: Path, variant: str | None = None, name: str | None = None, passed: Collection[str] = ()
) -> None:
    """Raises OSError with one sentence if a saved pipeline is damaged, incomplete or of other classes than ours.

    Args:
        folder: Of the pipeline.
        variant: Of the weights.
        name: What to call it; by default the folder.
        passed: Components that need not be there.
    """
    name = str(folder) if name is None else name
    index = _read_json(folder / "model_index.json", f"{name} is no pipeline: it has no model_index.json.")
    _check_class(name, "pipeline", index.get("_class_name"), RADPipeline)
    _check_limits(name, index)
    for component, entry in index.items():
        if component not in COMPONENTS and not isinstance(entry, list):
            continue  # a number such as the resolution
        if component.startswith("_") or component in passed or entry == [None, None]:
            continue
        _check_class(name, component, entry, COMPONENTS.get(component))
        config = "scheduler_config.json" if component == "scheduler" else "config.json"
        missing = f"The pipeline {name} is incomplete: {component}/{config} is missing."
        settings = _read_json(folder / component / config, missing)
        _check_limits(name, settings)
        if component == "scheduler":
            continue
        dot = "" if variant is None else f".{variant}"
        weights = [*(folder / component).glob(f"{WEIGHTS}{dot}.safetensors")]
        weights += (folder / component).glob(f"{WEIGHTS}{dot}-*.safetensors")
        if not weights:
            raise OSError(
                f"The pipeline {name} is incomplete: {component}/ has no {WEIGHTS}{dot}.safetensors; give the variant "
                "it was saved with, if any. Other formats are not read."
            )
        shapes = {}
        for path in weights:
            try:
                with safe_open(path, framework="pt") as file:
                    shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}
            except (SafetensorError, OSError) as error:
                raise OSError(f"{path} is damaged and cannot be read ({error}).") from error
        if component == "normality":  # all of it is buffers, which are made before weights are read
            with torch.device("meta"):
                expected = NormalityModel.from_config(settings).state_dict()
            if shapes != {key: list(value.shape) for key, value in expected.items()}:
                raise OSError(f"{name} is refused: the weights of its normality model do not fit its settings.")


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OSError(missing) from error
    except ValueError as error:
        raise OSError(f"{path} is damaged: it is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} is damaged: it holds no JSON object.")
    return content


def _check_limits(name: str, settings: dict[str, Any]) -> None:
    """Refuses what would fill the memory before a weight is read."""
    for key, most in LIMITS.items():
        value = settings.get(key, 1)
        if not isinstance(value, int) or not 1 <= value <= most:
            raise OSError(f"{name} is refused: its {key} is {value!r}, and must be a number from 1 to {most:,}.")


def _check_class(name: str, part: str, entry: Any, expected: type | None) -> None:
    """An entry of model_index.json is a class name or a module and a class name; ours is used, whatever the module."""
    if expected is None or (entry[-1] if isinstance(entry, list) and entry else entry) != expected.__name__:
        raise OSError(f"{name} is refused: its {part} is {entry!r}, which is no class of this package.")


def _noise(seed: int, timestep: int, draws: int, like: torch.Tensor) -> torch.Tensor:
    """Noise [draws, 3, S, S] from the seed and the timestep alone; each second draw mirrors the one before it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + timestep)
    noise = torch.randn((draws + 1) // 2, *like.shape[1:], generator=generator)
    return torch.stack([noise, -noise], dim=1).flatten(0, 1)[:draws].to(like)


def _paper_maps(kl: torch.Tensor, error: torch.Tensor, rgb: torch.Tensor) -> dict[str, torch.Tensor]:
    """RAN's maps [B, S, S]: A = mean over t of alpha z(s_t) + (1 - alpha) s^f_t with the z-score of each image."""
    z = (kl - kl.mean((2, 3), keepdim=True)) / kl.std((2, 3), keepdim=True)
    error = F.interpolate(error, kl.shape[-2:], mode="bilinear")
    return {
        "fused": (0.5 * z + 0.5 * error).mean(1),
        "pixel": z.mean(1),
        "feature": error.mean(1),
        "rgb": rgb.mean(1),
    }


def _std(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Standard deviation of a zero-mean gradient over the pixels that may change."""
    count = (weight.sum() * gradient.shape[1]).clamp_min(1)  # nothing may change where all is normal
    return (gradient.square().sum() / count).clamp_min(1e-24).sqrt()


def _stack(maps: list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    return np.stack(maps) if len({m.shape for m in maps}) == 1 else maps


def _to_tensors(output: RADPipelineOutput) -> RADPipelineOutput:
    for name, value in list(output.items()):
        if isinstance(value, np.ndarray):
            output[name] = torch.from_numpy(value)
        elif isinstance(value, list) and value and isinstance(value[0], np.ndarray):
            output[name] = [torch.from_numpy(v) for v in value]
    return output
