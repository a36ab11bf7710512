"""What `train.py` can be told."""

import argparse
from os.path import expanduser

from data_arguments import add_data_arguments
from diffusers.optimization import SchedulerType

from rad.models.normality import IMAGE_WEIGHTS, MAP_WEIGHTS
from rad.models.unet_rad import NAMED_CONFIGS
from rad.pipeline_loading import EMBEDDED_MODELS

# What may differ between a run and the one that continues it; all else must be as it was
FREE_ARGUMENTS = """train_data_dir dry_run cache_dir dataloader_num_workers cache_images skip_unreadable output_dir
    overwrite_output_dir train_batch_size gradient_accumulation_steps max_train_steps num_train_epochs
    gradient_checkpointing allow_tf32 mixed_precision checkpointing_steps checkpoints_total_limit
    resume_from_checkpoint logging_steps report_to validation_steps num_validation_images evaluate push_to_hub
    hub_model_id hub_token hub_private_repo map_weights image_weights context gaussian_size gaussian_channels fit_only
    discriminator_steps""".split()


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0 .. 1, got {text}")
    return float(text)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults, below a description as it is written."""


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The arguments of a run, checked as far as they can be without a look at data and models."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", type=expanduser, help="Folder of the data set; good images are trained on.")
    add_data_arguments(add, "Categories to train on, as one unified model; by default all.")
    add("--dataset_name", help="Hub id of a data set, in place of --train_data_dir.")
    add("--dataset_config_name", help="Configuration of the Hub data set.")
    add("--dataset_split", default="train", help="Split of the Hub data set.")
    add("--image_column", default="image", help="Column of the Hub data set with the images.")
    add("--category_column", help="Column that tells what an image shows; without, all show the same.")
    add("--label_column", help="Column with 0, 'good', 'OK' or the like for good images; without, all are good.")
    add("--cache_dir", type=expanduser, help="Where downloads from the Hub are kept.")
    add("--max_train_samples", type=positive, help="Take this many good images at most, picked at random.")
    add("--holdout_fraction", type=fraction, help="Good images kept for the thresholds; 0.2 by default.")
    add(
        "--pixel_range",
        type=int,
        nargs=2,
        metavar=("BLACK", "WHITE"),
        help="What 16-bit images hold, 0 4095 for 12 bits; by default found in them.",
    )
    add("--skip_unreadable", action="store_true", help="Leave out files that are no readable images.")
    add("--cache_images", action=flag, default=True, help="Keep decoded images in memory.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that prepare batches.")

    add = parser.add_argument_group("resolution and augmentation").add_argument
    add("--resolution", type=positive, help="Images are resized to this square; 256 by default.")
    add("--crop_size", type=positive, default=128, help="Side of the crops of the cheaper batches.")
    add("--crop_prob", type=fraction, default=0.75, help="Share of batches made of crops.")
    add("--rotation", type=float, default=5.0, help="Rotate by up to this many degrees; 0 for none.")
    add("--rotation_prob", type=fraction, default=0.5, help="Share of images that are rotated.")
    add("--random_flip", action="store_true", help="Flip images at random, both ways.")
    add(
        "--paste_prob",
        type=fraction,
        help="Share of images with a pasted defect to remove with the noise; 0.5, or 0 where the noise is predicted.",
    )
    add(
        "--camera_prob",
        type=fraction,
        help="Share of images seen through another camera (exposure, focus, noise, compression); 0.25, or 0 likewise. "
        "With 0 the fit sees none, either.",
    )
    add(
        "--label_dropout",
        type=fraction,
        default=0.1,
        help="Share of images whose category is withheld, so that the network can do without; RAN: 0.",
    )

    add = parser.add_argument_group("model").add_argument
    add("--model_config", choices=NAMED_CONFIGS, help="Size of a new U-Net; small by default.")
    add(
        "--pretrained_model_name_or_path",
        help=f"Pipeline to start from: a folder, a Hub id, or {' or '.join(EMBEDDED_MODELS)}.",
    )
    add(
        "--init_from",
        type=expanduser,
        help="U-Net to start from: guided-diffusion's 256x256_diffusion.pt, or a folder.",
    )
    add("--backbone", help="timm backbone with ImageNet weights; by default the embedded extractor.")
    add("--feature_stride", type=int, help="Pixels per position of --backbone's grid; 8 by default, of ViTs 16.")
    add(
        "--standardise_channels",
        action=flag,
        default=True,
        help="Bring the channels of a new extractor to one scale, so that each counts alike in L_feat; RAN does not.",
    )
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
    add(
        "--map_weights",
        type=float,
        nargs=len(MAP_WEIGHTS),
        help=f"In the map, of {', '.join(MAP_WEIGHTS)}; by default chosen on good images with defects put on them.",
    )
    add(
        "--image_weights",
        type=float,
        nargs=len(IMAGE_WEIGHTS),
        help=f"In the image score, of {', '.join(IMAGE_WEIGHTS)}; likewise.",
    )
    add("--context", type=float, help="Weight of a wide neighbourhood in the map.")
    add(
        "--gaussian_size",
        type=positive,
        help="Side of the grid of the features' Gaussian, the features' own by default; of many photos of a texture a "
        "coarser one may tell more.",
    )
    add(
        "--gaussian_channels",
        type=positive,
        help="Directions of the Gaussians, 140 or 192 of several categories by default; fewer make a smaller model.",
    )

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", type=expanduser, default="rad-model", help="The pipeline and the checkpoints go here.")
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
    add("--resume_from_checkpoint", type=expanduser, help="A checkpoint folder, or 'latest' for the last good one.")
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
    if not args.standardise_channels and (args.pretrained_model_name_or_path or args.fit_only):
        parser.error("--no-standardise_channels belongs to a new extractor: a pretrained pipeline's keeps its scale.")
    if args.hub_token and args.report_to in ("wandb", "all"):
        parser.error("--hub_token would be logged by wandb: use `hf auth login` in its place.")
    return args
