#!/usr/bin/env python
"""Trains RAN's denoiser on good images only, fits normality, and saves a pipeline folder.

    accelerate launch training/train.py --train_data_dir my_good_photos --output_dir my-model

Loss (RAN, section 3): MSE(eps, noise) + L_vlb + L_feat, t uniform, EMA of the weights.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    ProjectConfiguration,
    broadcast,
    get_int_from_env,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
    parse_flag_from_env,
    set_seed,
)
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from rad import RADFeatureExtractor, RADImageProcessor, RADPipeline, RADScheduler, RADUNet2DModel
from rad.data import DATASET_FORMATS, AnomalyDataset, detect_format, load_dataset, load_hub_dataset
from rad.data.batches import TrainingCollator, TrainingImages, TrainingSampler, from_uint8, to_uint8
from rad.evaluation import evenly, measure_categories, score_images, test_images
from rad.hub import CODE, list_files, one_sentence, upload
from rad.model_card import create_model_card
from rad.models.guided_diffusion import load_guided_diffusion
from rad.models.unet_rad import NAMED_CONFIGS
from rad.pipeline_rad import COMPONENTS, EMBEDDED_DIR, EMBEDDED_MODELS
from rad.visualization import denoising_figure, results_figure

logger = logging.getLogger("rad.train")

DEFAULT_STEPS = 3000
MIN_IMAGES = 10
LAUNCHED = "ACCELERATE_MIXED_PRECISION" in os.environ  # by `accelerate launch`
DEFAULT_RESOLUTION = 256
TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
# What may differ between a run and the one that continues it; all else must be as it was
FREE_ARGUMENTS = """train_data_dir cache_dir dataloader_num_workers cache_images skip_unreadable output_dir
    overwrite_output_dir train_batch_size gradient_accumulation_steps max_train_steps num_train_epochs
    gradient_checkpointing allow_tf32 mixed_precision checkpointing_steps checkpoints_total_limit
    resume_from_checkpoint logging_steps report_to validation_steps num_validation_images evaluate push_to_hub
    hub_model_id hub_token hub_private_repo map_weights image_weights context fit_only
    discriminator_steps""".split()


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0 .. 1, got {text}")
    return float(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="Folder of the data set; good images are trained on.")
    add("--dataset_format", default="auto", choices=("auto", *DATASET_FORMATS), help="Its layout.")
    add("--dataset_name", help="Hub id of a data set, in place of --train_data_dir.")
    add("--dataset_config_name", help="Configuration of the Hub data set.")
    add("--dataset_split", default="train", help="Split of the Hub data set.")
    add("--image_column", default="image", help="Column of the Hub data set with the images.")
    add("--category_column", help="Column that tells what an image shows; without, all show the same.")
    add("--label_column", help="Column with 0 or 'good' for good images; without, all are good.")
    add("--cache_dir", help="Where downloads from the Hub are kept.")
    add("--category", nargs="+", help="Categories to train on, as one unified model; by default all.")
    add("--max_train_samples", type=positive, help="Take this many good images at most, picked at random.")
    add("--holdout_fraction", type=fraction, help="Good images kept for the thresholds; 0.2 by default.")
    add("--skip_unreadable", action="store_true", help="Leave out files that are no readable images.")
    add("--cache_images", action=flag, default=True, help="Keep decoded images in memory.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that prepare batches.")

    add = parser.add_argument_group("resolution and augmentation").add_argument
    add("--resolution", type=positive, help="Images are resized to this square; 256 by default.")
    add("--crop_size", type=positive, default=128, help="Side of the crops of the cheaper batches.")
    add("--crop_prob", type=fraction, default=0.75, help="Share of batches made of crops.")
    add("--rotation", type=float, default=5.0, help="Rotate by up to this many degrees.")
    add("--rotation_prob", type=fraction, default=0.5, help="Share of images that are rotated.")
    add("--random_flip", action="store_true", help="Flip images at random, both ways.")

    add = parser.add_argument_group("model").add_argument
    add("--model_config", choices=NAMED_CONFIGS, help="Size of a new U-Net; small by default.")
    add(
        "--pretrained_model_name_or_path",
        help=f"Pipeline to start from: a folder, a Hub id, or {' or '.join(EMBEDDED_MODELS)}.",
    )
    add("--init_from", help="U-Net to start from: guided-diffusion's 256x256_diffusion.pt, or a folder.")
    add("--backbone", help="timm backbone with ImageNet weights; by default the embedded extractor.")
    add("--feature_stride", type=int, help="Pixels per position of --backbone's grid; 8 by default.")
    add("--gradient_checkpointing", action="store_true", help="Less memory, more time.")

    add = parser.add_argument_group("normality").add_argument
    add(
        "--fit_only",
        action="store_true",
        help="Train nothing: fit normality with a pretrained network, or 'synthetic'.",
    )
    add(
        "--discriminator_steps",
        type=int,
        default=3000,
        help="Of training the discriminator on artificial defects; 0 leaves out its score.",
    )
    add("--map_weights", type=float, nargs=5, help="KL, feature error, residual, Mahalanobis, discriminator: map.")
    add("--image_weights", type=float, nargs=6, help="The same five in the image score, and the global score's.")
    add("--context", type=float, help="Weight of a wide neighbourhood in the map.")

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="rad-model", help="The pipeline and the checkpoints go here.")
    add("--overwrite_output_dir", action="store_true", help="Replace the model that is there.")
    add("--seed", type=int, default=0, help="Of everything random.")
    add("--train_batch_size", type=positive, default=8, help="Crops per process; whole images are fewer.")
    add("--gradient_accumulation_steps", type=positive, default=1, help="Batches per step.")
    add("--max_train_steps", type=positive, help="3000 by default.")
    add("--num_train_epochs", type=positive, help="In place of --max_train_steps.")
    add("--max_timestep", type=positive, default=500, help="t is uniform below this; RAN: 1000.")
    add("--feature_loss_weight", type=float, default=1.0, help="Of L_feat.")
    add("--snr_gamma", type=float, help="Weigh the noise loss by min(SNR, gamma) / SNR; 5 is usual.")
    add(
        "--mixed_precision",
        default="auto",
        choices=("auto", "no", "fp16", "bf16"),
        help="auto: bf16 on a processor that computes it, else as accelerate is configured.",
    )
    add("--allow_tf32", action="store_true", help="Faster matrix products on Ampere GPUs.")

    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=float, default=4e-4, help="RAN: 1e-4.")
    add("--scale_lr", action="store_true", help="Times batch size, processes and accumulation.")
    add(
        "--lr_scheduler",
        default="linear",
        choices=[s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT],
        help="RAN anneals linearly to 0.",
    )
    add("--lr_warmup_steps", type=int, default=100, help="Steps up to the learning rate.")
    add("--lr_num_cycles", type=int, default=1, help="Of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Of polynomial.")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, with 8-bit states.")
    add("--adam_beta1", type=float, default=0.9, help="Of AdamW.")
    add("--adam_beta2", type=float, default=0.999, help="Of AdamW.")
    add("--adam_weight_decay", type=float, default=0.0, help="Of AdamW.")
    add("--adam_epsilon", type=float, default=1e-8, help="Of AdamW.")
    add("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    add("--use_ema", action=flag, default=True, help="Save an average of the weights.")
    add("--ema_max_decay", type=float, default=0.997, help="Of that average.")
    add("--ema_inv_gamma", type=float, default=1.0, help="Of its warm-up.")
    add("--ema_power", type=float, default=3 / 4, help="Of its warm-up.")

    add = parser.add_argument_group("checkpoints, logs and the Hub").add_argument
    add("--checkpointing_steps", type=positive, default=500, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=positive, default=2, help="Older ones are deleted.")
    add("--resume_from_checkpoint", help="A checkpoint folder, or 'latest' for the last good one.")
    add(
        "--report_to",
        default="none",
        choices=("tensorboard", "wandb", "trackio", "all", "none"),
        help="Where losses and validation pictures go, besides --output_dir.",
    )
    add("--logging_steps", type=positive, default=10, help="Steps between reports.")
    add("--validation_steps", type=positive, default=500, help="Steps between pictures of held-out images.")
    add("--num_validation_images", type=positive, default=4, help="Held-out images in them.")
    add("--evaluate", action=flag, default=True, help="Measure on the test split, if any, and picture results.")
    add("--push_to_hub", action="store_true", help="Push the pipeline and its model card.")
    add("--hub_model_id", help="user/repo to push to; by default the name of --output_dir.")
    add("--hub_token", help="By default the one of `hf auth login`.")
    add("--hub_private_repo", action="store_true", help="Make the repository private.")

    args = parser.parse_args(argv)
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give either --train_data_dir or --dataset_name.")
    if args.max_train_steps and args.num_train_epochs:
        parser.error("give either --max_train_steps or --num_train_epochs.")
    if args.discriminator_steps < 0:
        parser.error(f"--discriminator_steps must be at least 0, got {args.discriminator_steps}.")
    starts = ("pretrained_model_name_or_path", "init_from", "model_config")
    given = [f"--{name}" for name in starts if getattr(args, name)]
    if len(given) > 1:
        parser.error(f"give one of {' and '.join(given)}: each names the network to start from.")
    needless = "init_from model_config backbone resolution max_train_steps num_train_epochs holdout_fraction"
    for name in (needless + " resume_from_checkpoint").split():
        if args.fit_only and getattr(args, name) is not None:
            parser.error(f"--fit_only keeps a pretrained pipeline's networks and trains nothing: --{name} has no use.")
    if args.feature_stride and not args.backbone:
        parser.error("--feature_stride belongs to --backbone: the embedded extractor has its own.")
    if args.backbone and args.pretrained_model_name_or_path:
        parser.error("--backbone cannot be changed in a pretrained pipeline.")
    if args.hub_token and args.report_to in ("wandb", "all"):
        parser.error("--hub_token would be logged by wandb: use `hf auth login` in its place.")
    return args


# -- data -------------------------------------------------------------------------------------------------------------


def load_good_images(args: argparse.Namespace) -> AnomalyDataset:
    """The good images of the data set that the arguments name."""
    if args.dataset_name:
        return load_hub_dataset(
            args.dataset_name,
            args.dataset_config_name,
            args.dataset_split,
            args.image_column,
            args.category_column,
            args.label_column,
            args.category,
            args.hub_token,
            args.cache_dir,
        )
    data_dir, output_dir = (Path(folder).resolve() for folder in (args.train_data_dir, args.output_dir))
    if output_dir.is_relative_to(data_dir):
        raise ValueError(f"--output_dir {output_dir} lies in --train_data_dir: its pictures would be trained on.")
    dataset = load_dataset(data_dir, args.dataset_format, "train", args.category)
    if args.dataset_format == "auto":
        logger.info(f"{args.train_data_dir} is read as --dataset_format {detect_format(data_dir)}.")
    return dataset


def decode_images(
    args: argparse.Namespace,
    dataset: AnomalyDataset,
    indices: list[int],
    processor: RADImageProcessor,
    show_progress: bool,
) -> dict[int, torch.Tensor | None]:
    """Decodes images once, to [3, S, S] uint8, by index; without --cache_images only checks them, giving None.

    Raises:
        ValueError: Names the images that cannot be read, unless they are to be skipped.
    """

    def decode(index: int) -> tuple[torch.Tensor | None, tuple[int, int]] | Exception:
        try:
            x, sizes = processor.preprocess(dataset[index].image)
        except (ValueError, OSError) as error:
            return error
        return to_uint8(x[0]) if args.cache_images else None, sizes[0]

    with ThreadPoolExecutor() as pool:
        progress = tqdm(pool.map(decode, indices), "Decoding images", len(indices), disable=not show_progress)
        results = dict(zip(indices, progress, strict=True))
    unreadable = [str(result) for result in results.values() if isinstance(result, Exception)]
    if unreadable:
        named = " ".join(unreadable[:10]) + (" ..." if len(unreadable) > 10 else "")
        message = f"{len(unreadable)} of {len(indices)} images cannot be read: {named}"
        if not args.skip_unreadable:
            raise ValueError(f"{message} Remove them, or leave them out with --skip_unreadable.")
        logger.warning(f"Skipped: {message}")
    results = {index: result for index, result in results.items() if not isinstance(result, Exception)}
    sizes = Counter(size for _, size in results.values())
    if len(sizes) > 1:
        height, width = sizes.most_common(1)[0][0]
        logger.info(
            f"Images of {len(sizes)} different sizes, most often {width} x {height}, are all resized to "
            f"{processor.resolution} x {processor.resolution}, whatever their aspect ratio."
        )
    return {index: image for index, (image, _) in results.items()}


def split_holdout(dataset: AnomalyDataset, indices: list[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, the same share of each category.

    Raises:
        ValueError: A category has fewer than `MIN_IMAGES` images.
    """
    train, holdout = [], []
    for number, category in enumerate(dataset.categories):
        members = [i for i in indices if dataset.samples[i].category == category]
        if len(members) < MIN_IMAGES:
            raise ValueError(
                f"Category {category!r} has {len(members)} good images to train on; it needs at least {MIN_IMAGES}."
            )
        shuffled = np.random.default_rng([seed, number]).permutation(members).tolist()
        count = min(max(2, round(share * len(members))), len(members) - 2) if share else 0
        holdout += shuffled[:count]
        train += shuffled[count:]
    return sorted(train), sorted(holdout)


# -- models -----------------------------------------------------------------------------------------------------------


def initial_pipeline(args: argparse.Namespace, categories: list[str]) -> RADPipeline:
    """What to start from: a pretrained pipeline, or new networks without normality."""
    labels = tuple(categories) if len(categories) > 1 else ()
    pretrained = args.pretrained_model_name_or_path or ("synthetic" if args.fit_only else None)
    if pretrained:
        pipeline = RADPipeline.load(pretrained, token=args.hub_token, cache_dir=args.cache_dir)
        if args.fit_only:
            return pipeline
        components = pipeline.components | {"unet": pipeline.unet.with_categories(labels)}
        pipeline = RADPipeline(
            **components,
            resolution=args.resolution or pipeline.config.resolution,
            num_noise_samples=pipeline.config.num_noise_samples,
        )
        check_resolution(pipeline)
        return pipeline

    if args.backbone:
        extractor = RADFeatureExtractor.from_timm(args.backbone, feature_stride=args.feature_stride or 8)
    else:
        extractor = RADFeatureExtractor.from_pretrained(EMBEDDED_DIR / "tf_efficientnet_lite0")
    extractor.register_to_config(_name_or_path=extractor.config["backbone"])  # a name, not a local path
    resolution = args.resolution or DEFAULT_RESOLUTION
    head = {"feature_channels": extractor.num_channels, "feature_stride": extractor.config.feature_stride}
    if args.init_from and Path(args.init_from).is_dir():
        unet = RADUNet2DModel.from_pretrained(args.init_from).with_categories(labels)
        made_for = {name: unet.config[name] for name in head}
        if made_for != head:
            raise ValueError(f"--init_from {args.init_from} was made for {made_for}, but the extractor has {head}.")
    elif args.init_from:
        unet = load_guided_diffusion(args.init_from, labels, sample_size=resolution, **head)
    else:
        unet = RADUNet2DModel.from_named_config(
            args.model_config or "small", categories=labels, sample_size=resolution, **head
        )
    pipeline = RADPipeline(unet, RADScheduler(), extractor, resolution=resolution)
    check_resolution(pipeline)
    return pipeline


def check_resolution(pipeline: RADPipeline) -> None:
    step = math.lcm(pipeline.unet.stride, pipeline.feature_extractor.config.feature_stride)
    if pipeline.config.resolution % step:
        raise ValueError(f"--resolution must be a multiple of {step} pixels, got {pipeline.config.resolution}.")


def create_optimizer(args: argparse.Namespace, unet: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError("--use_8bit_adam needs `pip install bitsandbytes`.") from error
        optimizer_class = bitsandbytes.optim.AdamW8bit
    return optimizer_class(
        unet.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def compute_losses(
    unet: torch.nn.Module,
    scheduler: RADScheduler,
    batch: dict[str, torch.Tensor],
    features: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """The three terms of the loss, [3]: MSE(eps, noise), L_vlb in bits, and L_feat.

    Args:
        batch: As from `TrainingCollator`.
        features: The extractor's of x_0, [B, C, g, g].
        snr_gamma: Clips the weight of high signal-to-noise ratios (min-SNR, Hang et al., 2023).
    """
    x_0, noise, t = batch["x_0"], batch["noise"], batch["timesteps"]
    x_t = scheduler.add_noise(x_0, noise, t)
    output = unet(x_t, t, batch.get("class_labels"))
    squares = (output.sample.float() - noise).square().flatten(1).mean(1)
    if snr_gamma:
        snr = compute_snr(scheduler, t)
        squares = squares * snr.clamp_max(snr_gamma) / snr
    bound = scheduler.variational_bound(x_0, x_t, output.sample, output.variance, t)
    return torch.stack([squares.mean(), bound.mean(), F.mse_loss(output.features.float(), features)])


class Stopwatch:
    """Seconds spent in named parts of a step. Waits for the device, so `on` should be set for some steps only."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.on = device, Counter(), True

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = self._now() if self.on else 0.0
        yield
        if self.on:
            self.seconds[name] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


# -- checkpoints ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_whole(target: Path, what: str):
    """A folder beside `target` to write to, whose content the caller moves; it is removed if writing fails.

    Raises:
        OSError: In one sentence, where the disk is full or cannot be written to.
    """
    partial = target.parent / f".partial-{target.name}"
    try:
        yield partial
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' writers have their own
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(target.parent).free / 1e6
        raise OSError(f"{what} could not be written to {target} ({error}); {free:,.0f} MB are free there.") from error


def move_in_place(partial: Path, folder: Path) -> None:
    """Moves the content of `partial` to `folder`, replacing what is there; a pipeline's index comes last."""
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):
        shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    partial.rmdir()


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, run: dict, limit: int | None) -> None:
    """Saves the training state beside, then renames it: a checkpoint folder is always whole."""
    target = output_dir / f"checkpoint-{step}"
    with written_whole(target, f"The checkpoint of step {step}") as partial:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            manifest = {"step": step, "run": run, "files": {p.name: fingerprint(p) for p in files_of(partial)}}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in checkpoints_of(output_dir)[:-limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name != "manifest.json")


def fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the oldest first."""
    numbered = [(path.name.removeprefix("checkpoint-"), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(n), path) for n, path in numbered if n.isdigit())]


def find_checkpoint(args: argparse.Namespace, run: dict) -> Path | None:
    """The checkpoint to resume from: the one named, or the last that is whole; None if there is none yet.

    Raises:
        OSError: It, or every one of them, is damaged.
        ValueError: It belongs to a run with other settings.
    """
    latest = args.resume_from_checkpoint == "latest"
    candidates = checkpoints_of(Path(args.output_dir))[::-1] if latest else [Path(args.resume_from_checkpoint)]
    for folder in candidates:
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            damaged = [name for name, digest in manifest["files"].items() if fingerprint(folder / name) != digest]
            fault = f"{', '.join(damaged)} changed since it was written" if damaged else ""
        except (OSError, ValueError, KeyError) as error:
            fault = str(error)
        if fault:
            logger.warning(f"The checkpoint {folder} is damaged and cannot be used: {fault}.")
            continue
        differing = [
            "the list of training images is another one"
            if name == "list of images"
            else f"{name} was {manifest['run'].get(name)!r} and is now {value!r}"
            for name, value in json.loads(json.dumps(run)).items()
            if manifest["run"].get(name) != value
        ]
        if differing:
            raise ValueError(f"{folder} belongs to a run with other settings: {'; '.join(differing)}.")
        return folder
    if candidates:
        raise OSError(f"There is no checkpoint to resume from that is whole: {', '.join(map(str, candidates))}.")
    logger.info(f"There is no checkpoint in {args.output_dir} yet: the run starts at step 0.")
    return None


def check_output_dir(args: argparse.Namespace) -> None:
    """Raises ValueError if the output directory holds another model, which would be lost."""
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file.")
    checkpoints = checkpoints_of(output_dir)
    held = [*output_dir.glob("model_index.json"), *checkpoints]
    if held and not (args.resume_from_checkpoint and checkpoints) and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {output_dir} holds a model ({held[0].name}): choose another, continue it with "
            "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir."
        )


class StopSignal:
    """SIGTERM and Ctrl-C ask the run to finish its step, save a checkpoint and stop; Ctrl-C twice stops at once."""

    def __enter__(self) -> "StopSignal":
        self._received, self._parent = None, os.getppid()
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _receive(self, number: int, frame) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    @property
    def received(self) -> int | None:
        # accelerate's launcher of one process dies of a SIGTERM without passing it on
        if LAUNCHED and os.getppid() != self._parent:
            return signal.SIGTERM
        return self._received

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """For processes that prepare batches: the run stops them itself, after its checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# -- what a run tells -------------------------------------------------------------------------------------------------


def estimate_time(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: RADPipeline,
    unet: torch.nn.Module,
    num_images: int,
    num_steps: int = 0,
    sampler: TrainingSampler | None = None,
) -> None:
    """Times both sorts of batches and the scoring of an image, and says how long the run will take."""

    def seconds(count: int, size: int, train: bool) -> float:
        x = torch.rand(count, 3, size, size, device=accelerator.device) * 2 - 1
        t = torch.randint(0, args.max_timestep, (count,), device=accelerator.device)
        batch = {"x_0": x, "noise": torch.randn_like(x), "timesteps": t}
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            with torch.set_grad_enabled(train):
                losses = compute_losses(unet, pipeline.scheduler, batch, pipeline.feature_extractor(x))
                if train:
                    losses.sum().backward()
            losses.tolist()  # waits for the device
        unet.zero_grad()
        return time.perf_counter() - start

    with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):  # leaves no trace
        if args.discriminator_steps and not args.fit_only:
            probe = RADPipeline(pipeline.unet, pipeline.scheduler, pipeline.feature_extractor)
            probe.set_progress_bar_config(disable=True)
            noise, elapsed = torch.randint(256, (2, 3, *[args.resolution] * 2), dtype=torch.uint8), []
            for count in (1, 3):
                start = time.perf_counter()
                probe.fit_discriminator(list(noise), num_steps=count)
                elapsed.append(time.perf_counter() - start)
            discriminator = max(0.0, elapsed[1] - elapsed[0]) / 2 * args.discriminator_steps
        fit = 1.3 * seconds(3, args.resolution, False) * num_images / accelerator.num_processes  # three timesteps
        text = f"{fit / 60:.0f} minutes for normality"
        if args.discriminator_steps and not args.fit_only:
            text = f"{discriminator / 60:.0f} minutes for {args.discriminator_steps} of the discriminator, then {text}"
        if num_steps:
            crop = seconds(sampler.batch_size, sampler.crop_size, True)
            whole = seconds(sampler.num_whole, args.resolution, True)
            step = args.gradient_accumulation_steps * (args.crop_prob * crop + (1 - args.crop_prob) * whole)
            text = f"{1.1 * step * num_steps / 60:.0f} minutes for {num_steps} steps, then {text}"
    logger.info(f"Estimated: {text}, and measuring if there are test images.")


def check_space(output_dir: Path, num_parameters: int, num_checkpoints: int) -> None:
    """Raises OSError before the run if the disk has no room for its checkpoints: weights, two moments, the average."""
    new = num_checkpoints + 1 - len(checkpoints_of(output_dir))  # a new one is written before the oldest goes
    needed = 16 * num_parameters * new
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise OSError(
            f"The checkpoints need about {needed / 1e6:,.0f} MB, but {output_dir} has {free / 1e6:,.0f} MB free: "
            "make room or lower --checkpoints_total_limit."
        )


@contextlib.contextmanager
def averaged(ema: EMAModel | None, unet: torch.nn.Module) -> Iterator[None]:
    """Inside, the U-Net has the averaged weights."""
    if ema:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
    unet.eval()
    yield
    unet.train()
    if ema:
        ema.restore(unet.parameters())


@torch.no_grad()
def validate(accelerator: Accelerator, pipeline: RADPipeline, unet, x_0: torch.Tensor, step: int) -> None:
    """Losses of held-out images under fixed noise, averaged over RAN's timesteps, and a picture at the middle one."""
    scheduler, losses, timesteps = pipeline.scheduler, [], pipeline.scheduler.respaced_to_full([5, 50, 100])
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
    features = pipeline.feature_extractor(x_0)
    for timestep in timesteps:
        t = torch.full((len(x_0),), timestep, device=x_0.device)
        losses.append(compute_losses(unet, scheduler, {"x_0": x_0, "noise": noise, "timesteps": t}, features))
    noise_loss, bound, feature = torch.stack(losses).mean(0).tolist()
    values = {"validation_noise_loss": noise_loss, "validation_vlb_loss": bound, "validation_feature_loss": feature}
    accelerator.log(values, step=step)
    t = torch.full((len(x_0),), timesteps[1], device=x_0.device)
    x_t = scheduler.add_noise(x_0, noise, t)
    output = unet(x_t, t)  # on every process: a sharded network needs all of them
    if accelerator.is_main_process:
        kl, x0_hat = scheduler.kl_score(x_0, x_t, output.sample, output.variance, t)
        error = (output.features.float() - features).square().mean(1)
        picture = denoising_figure(x_0, x_t, x0_hat, kl.mean(1), error)
        folder = Path(accelerator.project_dir) / "validation"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step-{step:06d}.png")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", np.asarray(picture), step, dataformats="HWC")
            else:  # wandb and trackio share this interface
                module = __import__(tracker.name)
                module.log({"validation": module.Image(picture)}, step=step)


# -- the model that comes out -----------------------------------------------------------------------------------------


def save_model(pipeline: RADPipeline, output_dir: Path) -> None:
    """Saves half-precision weights beside, then moves them in place, the index last."""
    with written_whole(output_dir / "model", "The pipeline") as partial:
        pipeline.register_to_config(_name_or_path="")
        models = [model for name, model in pipeline.components.items() if model is not None and name != "scheduler"]
        for model in models:
            model.half().register_to_config(_name_or_path="")  # no local paths in what may be published
        pipeline.save_pretrained(partial)
        (output_dir / "model_index.json").unlink(missing_ok=True)  # without it nobody loads half of each
        move_in_place(partial, output_dir)
    for model in models:
        model.float()


def load_test_split(args: argparse.Namespace) -> list[dict]:
    """Test images with their masks, where the data set has any."""
    if args.dataset_name:
        return []
    try:
        images = test_images(load_dataset(args.train_data_dir, args.dataset_format, "test", args.category), (256, 256))
    except ValueError as error:
        logger.info(f"There is no test split to measure on: {error}")
        return []
    readable = []
    for item in images:
        try:
            RADImageProcessor().decode(item["image"])
            readable.append(item)
        except (ValueError, OSError) as error:
            logger.warning(f"Not measured: {error}")
    return readable


def measure(pipeline: RADPipeline, images: list[dict]) -> dict[str, float]:
    """Metrics of the fused score, means over categories; none where a category lacks good images or masks."""
    for category in {item["category"] for item in images}:
        members = [item for item in images if item["category"] == category]
        if len({item["label"] for item in members}) < 2 or not any(
            m["label"] and m["mask"] is not None for m in members
        ):
            logger.info(f"Not measured: the test split of {category!r} has no good images, or none with a mask.")
            return {}
    return measure_categories(images, score_images(pipeline, images))["fused"]["mean"] if images else {}


def write_card(
    args: argparse.Namespace, pipeline: RADPipeline, num_train: int, num_holdout: int, pictured: list, metrics: dict
) -> None:
    """README.md, the model card, and the picture in it."""
    words = [word for i, word in enumerate(sys.argv) if "--hub_token" not in (word, sys.argv[i - 1])]
    words = [Path(word).name if Path(word).is_absolute() else word for word in words if "--hub_token=" not in word]
    start = Path(args.pretrained_model_name_or_path or args.init_from or "").name  # no local paths
    if args.fit_only:
        network = f"kept from {start or 'synthetic'}, only normality was fitted"
    else:
        start = start or f"random weights, configuration {args.model_config or 'small'}"
        network = f"{args.max_train_steps} steps from {start}"
    facts = {
        "Command": f"`accelerate launch {shlex.join(words)}`",
        "Network": network,
        "Good images": f"{num_train} for training and {num_holdout} held out" if num_holdout else f"{num_train}",
        "Seed": args.seed,
        "Software": f"PyTorch {torch.__version__}, diffusers {diffusers.__version__}, on {platform.machine()}",
    }
    name = args.dataset_name or Path(args.train_data_dir).resolve().name
    figure = results_figure(pipeline, pictured) if pictured else None
    with written_whole(Path(args.output_dir) / "card", "The model card") as partial:
        partial.mkdir()
        if figure:
            figure.save(partial / "results.png")
        card = create_model_card(
            pipeline,
            repo_id=args.hub_model_id,
            title=None if args.hub_model_id else Path(args.output_dir).resolve().name,
            metrics={name: metrics} if metrics else None,
            training=facts,
            picture="results.png" if pictured else None,
            datasets=[args.dataset_name] if args.dataset_name and not Path(args.dataset_name).exists() else None,
        )
        card.save(partial / "README.md")
        move_in_place(partial, Path(args.output_dir))


# -- main -------------------------------------------------------------------------------------------------------------


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator, on as many processes and processor cores as were asked for.

    Raises:
        ValueError: `accelerate launch` was asked for several processes and started one, or for FSDP with --use_ema.
        ImportError: --report_to names a package that is not installed.
    """
    started = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    if LAUNCHED and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and started == 1:
        raise ValueError(
            "accelerate launch starts several CPU processes only with MPI, or with "
            "--config_file training/accelerate_configs/multi_cpu.yaml (and --num_processes, if not 2)."
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not args.fit_only:
        if args.use_ema:
            raise ValueError("FSDP cannot shard the averaged weights of --use_ema: add --no-use_ema.")
        if os.environ.get("FSDP_VERSION") != "2":
            raise ValueError("FSDP needs fsdp_version: 2, as in training/accelerate_configs/multi_node_fsdp.yaml.")
    # Several processes and no accelerator: accelerate joins them only when told that they run on the CPU
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (started > 1 and not torch.accelerator.is_available())
    on_cpu = PartialState(cpu=cpu).device.type == "cpu"
    mixed_precision = None if args.mixed_precision == "auto" else args.mixed_precision
    if on_cpu:
        processor = torch.cpu.get_capabilities()
        if LAUNCHED and os.environ.get("OMP_NUM_THREADS") == "1":  # what accelerate launch sets unless it is told
            usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            cores = min(processor["num_physical_cores"], usable)
            torch.set_num_threads(max(1, cores // get_int_from_env(["LOCAL_WORLD_SIZE"], started)))
        if args.mixed_precision == "auto" and (processor.get("avx512_bf16") or processor.get("amx_bf16")):
            mixed_precision = "bf16"
    trackers = [name for name in TRACKERS if args.report_to in (name, "all") and TRACKERS[name]()]
    if args.report_to != "none" and not trackers:
        wanted = "tensorboard" if args.report_to == "all" else args.report_to
        raise ImportError(f"--report_to {args.report_to} needs `pip install {wanted}`.")
    return Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=trackers or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir) / "logs")),
    )


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    accelerator = create_accelerator(args)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    show_progress = accelerator.is_local_main_process
    check_output_dir(args)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        leftovers = [*output_dir.glob(".partial-*")]  # of a run that was killed
        if args.overwrite_output_dir and not args.resume_from_checkpoint:
            leftovers += checkpoints_of(output_dir)
        for leftover in leftovers:
            shutil.rmtree(leftover)
        if args.push_to_hub:  # first of all, so that a refused token costs no training
            repo_id = args.hub_model_id or output_dir.resolve().name
            with one_sentence(repo_id):
                api = HfApi(token=args.hub_token)
                args.hub_model_id = api.create_repo(repo_id, private=args.hub_private_repo, exist_ok=True).repo_id
                if args.hub_private_repo and not api.model_info(args.hub_model_id).private:
                    raise ValueError(f"{args.hub_model_id} is public already: make it private, or push elsewhere.")
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32

    # 1. Good images: decoded once; a share is kept away from training, for the thresholds
    dataset = load_good_images(args)
    pipeline = initial_pipeline(args, dataset.categories)
    args.resolution = pipeline.config.resolution
    chosen = np.random.default_rng(args.seed).permutation(len(dataset))[: args.max_train_samples]
    decoded = decode_images(args, dataset, sorted(chosen.tolist()), pipeline.image_processor, show_progress)
    holdout_fraction = 0.2 if args.holdout_fraction is None else args.holdout_fraction
    holdout_fraction = 0.0 if args.fit_only else holdout_fraction
    train, holdout = split_holdout(dataset, sorted(decoded), holdout_fraction, args.seed)

    # 2. Training
    pipeline.to(accelerator.device)
    if args.fit_only:
        estimate_time(args, accelerator, pipeline, pipeline.unet, len(train))
    else:
        train_unet(args, accelerator, pipeline, dataset, decoded, train, holdout)

    # 3. The discriminator, on the network's own images: those held out stay unseen. Weights are rounded to half
    # precision first: what is measured is what is saved
    pipeline.unet.half().float().eval()
    pipeline.feature_extractor.half().float()
    image = {i: dataset[i].image if pixels is None else pixels for i, pixels in decoded.items()}
    category = {i: dataset.samples[i].category for i in decoded}
    if not args.fit_only:
        pipeline.register_modules(discriminator=None)
    if args.discriminator_steps and not args.fit_only:
        pipeline.set_progress_bar_config(desc="Training the discriminator", disable=not show_progress)
        start = time.monotonic()
        pipeline.fit_discriminator(
            [image[i] for i in train],
            [category[i] for i in train],
            num_steps=args.discriminator_steps,
            seed=args.seed,
        )
        for tensor in pipeline.discriminator.state_dict().values():  # GPUs do not round alike
            broadcast(tensor)
        logger.info(f"Trained the discriminator in {(time.monotonic() - start) / 60:.1f} minutes.")

    # 4. Normality
    pipeline.set_progress_bar_config(desc="Fitting normality", disable=not show_progress)
    fusion = {"weights": args.map_weights, "image_weights": args.image_weights, "context": args.context}
    start = time.monotonic()
    pipeline.fit_normality(
        [image[i] for i in train],
        holdout_images=[image[i] for i in holdout] or None,
        categories=[category[i] for i in train],
        holdout_categories=[category[i] for i in holdout] or None,
        accelerator=accelerator,
        **{name: value for name, value in fusion.items() if value is not None},
    )
    logger.info(f"Fitted normality in {(time.monotonic() - start) / 60:.1f} minutes.")
    num_scores = pipeline.normality.config.num_scores
    logger.info(
        f"Thresholds rest on {num_scores} good images that the fit did not see: false-alarm rates below "
        f"{1 / (num_scores + 1):.1%} are extrapolated."
    )

    # 5. The pipeline, its card, and what it can do; one process writes
    if accelerator.is_main_process:
        save_model(pipeline, output_dir)
        logger.info(f"Saved the pipeline to {output_dir}.")
        metrics, pictured = {}, []
        if args.evaluate:
            tested = load_test_split(args)
            metrics = measure(pipeline, tested)
            bad = [item["image"] for item in tested if item["label"]]
            shown = bad or [dataset[i].image for i in holdout or train]
            pictured = [shown[i] for i in evenly(len(shown), 3)]
        write_card(args, pipeline, len(train), len(holdout), pictured, metrics)
        if args.push_to_hub:
            saved = {"README.md", "model_index.json", f"{CODE}.py", *COMPONENTS}
            saved |= {"results.png"} if pictured else set()
            files = {name: path for name, path in list_files(output_dir).items() if name.split("/")[0] in saved}
            private = args.hub_private_repo or None
            commit = upload(args.hub_model_id, files, "End of training", private=private, token=args.hub_token)
            logger.info(f"Pushed to {commit.commit_url}.")
    accelerator.end_training()


def train_unet(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: RADPipeline,
    dataset: AnomalyDataset,
    decoded: dict[int, torch.Tensor],
    train: list[int],
    holdout: list[int],
) -> None:
    """Trains the pipeline's U-Net in place.

    Args:
        decoded: Images [3, S, S] uint8 by index; unless they are to be cached, the loader decodes them again.
        train, holdout: Indices of the images to train on and of those held out.
    """
    output_dir, device, scheduler = Path(args.output_dir), accelerator.device, pipeline.scheduler
    extractor = pipeline.feature_extractor
    categories = list(pipeline.unet.config.categories)

    # 1. Batches: what they hold depends on the seed and their number alone
    sampler = TrainingSampler(
        len(train),
        args.train_batch_size,
        args.resolution,
        min(args.crop_size, args.resolution),
        args.crop_prob,
        args.seed,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    collate = TrainingCollator(
        args.max_timestep,
        unknown_label=len(categories) if categories else None,
        rotation=args.rotation,
        rotation_prob=args.rotation_prob,
        random_flip=args.random_flip,
    )
    labels = [categories.index(dataset.samples[i].category) if categories else 0 for i in range(len(dataset))]
    training_images = TrainingImages(dataset, train, labels, pipeline.image_processor, decoded)
    if not args.pretrained_model_name_or_path:
        extractor.calibrate(from_uint8(chunk.to(device)) for chunk in training_images.chunks())
    # Features are computed once where batches hold whole images as they are, else in each batch's own pass
    cropped = args.crop_prob > 0 and args.crop_size < args.resolution
    augmented = cropped or args.rotation * args.rotation_prob > 0 or args.random_flip
    cached_features = None
    if not augmented and args.cache_images:
        with torch.no_grad():
            chunks = [extractor(from_uint8(chunk.to(device))) for chunk in training_images.chunks()]
        cached_features = torch.cat(chunks)
    shown = [(holdout or train)[i] for i in evenly(len(holdout or train), args.num_validation_images)]
    validation_images = TrainingImages(dataset, shown, labels, pipeline.image_processor, decoded)
    validation_x_0 = from_uint8(next(validation_images.chunks(len(shown))).to(device))

    # 2. Optimisation
    unet = pipeline.unet.train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    per_step = sampler.images_per_batch * args.gradient_accumulation_steps
    if args.num_train_epochs:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(train) / per_step)
    args.max_train_steps = args.max_train_steps or DEFAULT_STEPS
    global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.scale_lr:
        args.learning_rate *= global_batch_size
    ema = None
    if args.use_ema:
        ema = EMAModel(
            unet.parameters(),
            decay=args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=args.ema_inv_gamma,
            power=args.ema_power,
            model_cls=RADUNet2DModel,
            model_config=unet.config,
        )
        ema.to(device)
        accelerator.register_for_checkpointing(ema)
    optimizer = create_optimizer(args, unet)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # not prepared: it steps alike on any number of processes

    # 3. Where an earlier run stopped
    run = {name: value for name, value in vars(args).items() if name not in FREE_ARGUMENTS}
    root = str(Path(args.train_data_dir).resolve()) if args.train_data_dir else ""
    names = "\n".join(str(dataset.samples[i].image).removeprefix(root) for i in train)
    run |= {"global_batch_size": global_batch_size, "num_images": len(train)}
    run |= {"list of images": hashlib.sha256(names.encode()).hexdigest()[:16]}
    step = 0
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(args, run)
        if checkpoint:
            accelerator.load_state(str(checkpoint))
            accelerator.wait_for_everyone()
            step = json.loads((checkpoint / "manifest.json").read_text())["step"]
            if ema:
                ema.to(device)  # accelerate loads it to the CPU
            if accelerator.is_main_process:
                for later in checkpoints_of(output_dir):  # damaged, or of a course that this run does not follow
                    if int(later.name.removeprefix("checkpoint-")) > step:
                        shutil.rmtree(later)
    sampler.start = step * args.gradient_accumulation_steps
    loader = DataLoader(
        training_images,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # its own, to leave the global one to the run
        pin_memory=device.type == "cuda",
    )
    num_parameters = sum(p.numel() for p in unet.parameters())
    logger.info(
        f"{len(train)} good images for training, {len(holdout)} held out, {len(dataset.categories)} categories, "
        f"{num_parameters / 1e6:.1f} M parameters, {global_batch_size} images a step, steps {step} to "
        f"{args.max_train_steps}, {accelerator.num_processes} processes on {device.type}"
        f"{f' with {torch.get_num_threads()} threads each' if device.type == 'cpu' else ''}, "
        f"precision {accelerator.mixed_precision}."
    )
    if step < args.max_train_steps:
        num_images = len(train) + len(holdout)
        estimate_time(args, accelerator, pipeline, unet, num_images, args.max_train_steps - step, sampler)
    check_space(output_dir, num_parameters, args.checkpoints_total_limit)
    if accelerator.log_with:
        settings = {
            name: v for name, v in vars(args).items() if isinstance(v, int | float | str) and "token" not in name
        }
        accelerator.init_trackers("rad", settings, {"wandb": {"dir": accelerator.logging_dir}})

    # 4. The loop
    progress = tqdm(
        total=args.max_train_steps,
        initial=step,
        desc="Training",
        disable=not accelerator.is_local_main_process,
        dynamic_ncols=True,
    )
    stopwatch, batches = Stopwatch(device), iter(loader)
    losses, num_logged, num_seen, start = torch.zeros(3, device=device), 0, 0, time.monotonic()
    with StopSignal() as stop:
        while step < args.max_train_steps:
            stopwatch.on = device.type == "cpu" or step % 20 == 0
            with stopwatch("step"), accelerator.accumulate(unet):
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
                with torch.no_grad():
                    cached = cached_features is not None
                    features = cached_features[batch["indices"]].float() if cached else extractor(batch["x_0"])
                with stopwatch("U-Net"):
                    terms = compute_losses(unet, scheduler, batch, features, args.snr_gamma)
                    accelerator.backward(terms[0] + terms[1] + args.feature_loss_weight * terms[2])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    lr_scheduler.step()
                optimizer.zero_grad()
                losses, num_logged = losses + terms.detach(), num_logged + 1
                num_seen += len(batch["x_0"])
                if ema and accelerator.sync_gradients:
                    ema.step(unet.parameters())
            if not accelerator.sync_gradients:
                continue

            step += 1
            progress.update()
            if step % args.logging_steps == 0 or step == args.max_train_steps:
                noise, bound, feature = (accelerator.reduce(losses, "mean") / num_logged).tolist()
                losses, num_logged = torch.zeros_like(losses), 0
                progress.set_postfix(noise=f"{noise:.4f}", vlb=f"{bound:.3f}", feat=f"{feature:.4f}")
                named = {"noise_loss": noise, "vlb_loss": bound, "feature_loss": feature}
                loss = noise + bound + args.feature_loss_weight * feature
                accelerator.log({"loss": loss, **named, "lr": lr_scheduler.get_last_lr()[0]}, step=step)
            if step % args.validation_steps == 0 or step == args.max_train_steps:
                with averaged(ema, unet):
                    validate(accelerator, pipeline, unet, validation_x_0, step)
            if stop.received:
                accelerator.set_trigger()
            stopping = accelerator.check_trigger()
            if stopping or step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                save_checkpoint(accelerator, output_dir, step, run, args.checkpoints_total_limit)
            if stopping:
                progress.close()
                logger.info(f"Stopped at step {step}: continue with --resume_from_checkpoint latest.")
                accelerator.end_training()
                raise SystemExit(128 + (stop.received or signal.SIGTERM))
    progress.close()
    if num_seen:
        seconds = time.monotonic() - start
        rate = num_seen * accelerator.num_processes / seconds
        share = stopwatch.seconds["U-Net"] / stopwatch.seconds["step"]
        logger.info(
            f"Trained to step {step} in {seconds / 60:.1f} minutes: {rate:.1f} images/s (crops count as images), "
            f"{share:.0%} of the time in the U-Net and its losses."
        )
    trained = accelerator.unwrap_model(unet, keep_fp32_wrapper=False, keep_torch_compile=False)
    if accelerator.is_fsdp2:  # from here on every process has the whole network, which is needed to fit normality
        weights = {name: shard.full_tensor() for name, shard in trained.state_dict().items()}
        trained = RADUNet2DModel.from_config(trained.config).to(device)
        trained.load_state_dict(weights)
    trained.disable_gradient_checkpointing()
    if ema:
        ema.copy_to(trained.parameters())
    pipeline.register_modules(unet=trained)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
