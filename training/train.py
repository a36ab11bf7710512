#!/usr/bin/env python
"""Trains RAN's denoiser on good images only, fits normality, and saves a pipeline folder.

    accelerate launch training/train.py --train_data_dir my_good_photos --output_dir my-model

Loss (RAN, section 3): MSE(eps, noise) + L_vlb + L_feat, t uniform, EMA of the weights.
"""

import argparse
import logging
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

import rad
from rad import RADFeatureExtractor, RADImageProcessor, RADPipeline, RADScheduler, RADUNet2DModel
from rad.data import DATASET_FORMATS, load_dataset
from rad.models.unet_rad import NAMED_CONFIGS

EMBEDDED = Path(rad.__file__).parent / "pretrained"
logger = logging.getLogger("rad.train")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--train_data_dir", required=True, help="Folder of the data set; good images are trained on.")
    data.add_argument("--dataset_format", default="folder", choices=DATASET_FORMATS, help="Layout of that folder.")
    data.add_argument("--category", nargs="+", help="Categories to train on; by default all, as one unified model.")
    data.add_argument("--holdout_fraction", type=float, default=0.2, help="Good images kept for the thresholds.")
    data.add_argument("--resolution", type=int, default=256, help="Images are resized to this square.")
    data.add_argument("--crop_size", type=int, default=128, help="Side of the random crops of the cheaper batches.")
    data.add_argument("--crop_prob", type=float, default=0.75, help="Share of batches made of crops.")
    data.add_argument("--rotation", type=float, default=5.0, help="Rotate by up to this many degrees (RAN: 5).")
    data.add_argument("--rotation_prob", type=float, default=0.5, help="Share of images that are rotated.")
    data.add_argument("--random_flip", action="store_true", help="Flip images at random, both ways.")
    model = parser.add_argument_group("model")
    model.add_argument("--model_config", default="small", choices=NAMED_CONFIGS, help="Size of the U-Net.")
    model.add_argument("--backbone", help="timm backbone with ImageNet weights; by default the embedded extractor.")
    model.add_argument("--feature_stride", type=int, default=8, help="Pixels per position of --backbone's grid.")
    model.add_argument("--map_weights", type=float, nargs=4, help="KL, feature error, residual, Mahalanobis: map.")
    model.add_argument("--image_weights", type=float, nargs=4, help="The same four in the image score.")
    model.add_argument("--context", type=float, help="Weight of a wide neighbourhood in the map.")
    train = parser.add_argument_group("training")
    train.add_argument("--output_dir", default="rad-model", help="The pipeline and the checkpoints go here.")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--train_batch_size", type=int, default=8, help="Crops per batch; full images are fewer.")
    train.add_argument("--max_train_steps", type=int, default=3000)
    train.add_argument("--max_timestep", type=int, default=500, help="t is uniform below this; RAN: 1000.")
    train.add_argument("--learning_rate", type=float, default=4e-4)
    train.add_argument("--lr_scheduler", default="linear", help="As in diffusers; RAN anneals linearly to 0.")
    train.add_argument("--lr_warmup_steps", type=int, default=100)
    train.add_argument("--adam_weight_decay", type=float, default=0.0)
    train.add_argument("--max_grad_norm", type=float, default=1.0)
    train.add_argument("--ema_decay", type=float, default=0.997)
    train.add_argument("--feature_loss_weight", type=float, default=1.0)
    train.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="By default as accelerate says.")
    train.add_argument("--checkpointing_steps", type=int, default=500)
    train.add_argument("--resume_from_checkpoint", help='A checkpoint folder, or "latest" in --output_dir.')
    args = parser.parse_args(argv)
    if not 0 <= args.holdout_fraction < 1:
        parser.error(f"--holdout_fraction must lie in [0, 1), got {args.holdout_fraction}.")
    return args


def augment(images: torch.Tensor, size: int, rotation: float, rotation_prob: float, flip: bool) -> torch.Tensor:
    """Random crop, rotation and flip of a batch in one resampling.

    Args:
        images: [B, C, H, W]; the crop is taken anywhere inside.
        size: Side of the result in pixels; a crop keeps the scale.
        rotation: Largest angle in degrees; what turns in from outside is mirrored.
    """
    batch, _, height, width = images.shape
    angle = (torch.rand(batch) * 2 - 1) * math.radians(rotation) * (torch.rand(batch) < rotation_prob)
    # Whole pixels, so that an image that is not rotated is not resampled either
    top = torch.randint(0, height - size + 1, (batch,))
    left = torch.randint(0, width - size + 1, (batch,))
    mirror = torch.where(torch.rand(2, batch) < 0.5, -1.0, 1.0) if flip else torch.ones(2, batch)
    scale = torch.tensor([size / width, size / height])
    center = torch.stack([(2 * left + size) / width - 1, (2 * top + size) / height - 1], dim=1)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([scale[0] * cos * mirror[0], -scale[0] * sin * mirror[1], center[:, 0]], dim=1),
            torch.stack([scale[1] * sin * mirror[0], scale[1] * cos * mirror[1], center[:, 1]], dim=1),
        ],
        dim=1,
    ).to(images)
    grid = F.affine_grid(theta, [batch, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)


def load_extractor(args: argparse.Namespace) -> RADFeatureExtractor:
    """The extractor named by --backbone, or the embedded one."""
    if args.backbone is None:
        return RADFeatureExtractor.from_pretrained(EMBEDDED / "tf_efficientnet_lite0")
    return RADFeatureExtractor.from_timm(args.backbone, feature_stride=args.feature_stride)


def latest_checkpoint(output_dir: Path) -> Path:
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not checkpoints:
        raise FileNotFoundError(f"There is no checkpoint-* folder in {output_dir} to resume from.")
    return checkpoints[-1]


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, project_config=ProjectConfiguration(project_dir=str(output_dir))
    )
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    set_seed(args.seed)

    # 1. Data: decoded once; a share of the good images is kept away from training, for the thresholds
    dataset = load_dataset(args.train_data_dir, args.dataset_format, "train", args.category)
    categories = dataset.categories
    for category in categories:
        count = sum(sample.category == category for sample in dataset.samples)
        if count < 10:
            raise ValueError(f"Category {category!r} has {count} good images; training needs at least 10.")
    processor = RADImageProcessor(args.resolution)
    shuffled = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed)).tolist()
    num_holdout = int(args.holdout_fraction * len(dataset))
    holdout = [dataset[i] for i in sorted(shuffled[:num_holdout])]
    train = [dataset[i] for i in sorted(shuffled[num_holdout:])]
    show_progress = accelerator.is_local_main_process
    images = torch.cat(
        [
            ((processor.preprocess(sample.image)[0] + 1) * 127.5).round().byte()
            for sample in tqdm(train, desc="Decoding images", disable=not show_progress)
        ]
    )
    labels = torch.tensor([categories.index(sample.category) for sample in train])
    loader = DataLoader(
        TensorDataset(images, labels),
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=len(train) >= args.train_batch_size,
    )

    # 2. Models
    extractor = load_extractor(args).to(accelerator.device)
    extractor.register_to_config(_name_or_path=extractor.config["backbone"])  # a name, not a local path
    extractor.calibrate((images[i : i + 16].to(accelerator.device) / 127.5 - 1) for i in range(0, len(images), 16))
    scheduler = RADScheduler()
    num_classes = len(categories) if len(categories) > 1 else 0
    unet = RADUNet2DModel.from_named_config(
        args.model_config,
        sample_size=args.resolution,
        feature_channels=extractor.num_channels,
        feature_stride=extractor.config.feature_stride,
        categories=tuple(categories) if num_classes else (),
    )
    ema = EMAModel(
        unet.parameters(),
        decay=args.ema_decay,
        use_ema_warmup=True,
        power=3 / 4,
        model_cls=RADUNet2DModel,
        model_config=unet.config,
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=args.adam_weight_decay)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)

    # 3. Training
    step = 0
    if args.resume_from_checkpoint:
        latest = args.resume_from_checkpoint == "latest"
        checkpoint = latest_checkpoint(output_dir) if latest else Path(args.resume_from_checkpoint)
        accelerator.load_state(str(checkpoint))
        ema.to(accelerator.device)  # accelerate loads it to the CPU
        step = int(checkpoint.name.split("-")[1])
    num_parameters = sum(p.numel() for p in unet.parameters())
    logger.info(
        f"{len(train)} good images for training, {len(holdout)} held out, {len(categories)} categories, "
        f"{num_parameters / 1e6:.1f} M parameters, steps {step} to {args.max_train_steps}."
    )
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="Training", disable=not show_progress, dynamic_ncols=True
    )
    averages = None
    start = time.monotonic()
    while step < args.max_train_steps:
        for x_0, class_labels in loader:
            # Crops cost less and bring more noise levels to a batch; full images keep the network at home on them
            if torch.rand(()) < args.crop_prob:
                size = min(args.crop_size, args.resolution)
            else:
                size = args.resolution
                few = max(1, round(len(x_0) * (args.crop_size / args.resolution) ** 2))
                x_0, class_labels = x_0[:few], class_labels[:few]
            x_0 = augment(x_0 / 127.5 - 1, size, args.rotation, args.rotation_prob, args.random_flip)
            if num_classes:  # one in ten learns the "unknown category" embedding
                unknown = torch.rand(len(x_0), device=x_0.device) < 0.1
                class_labels = torch.where(unknown, num_classes, class_labels)
            noise = torch.randn_like(x_0)
            timesteps = torch.randint(0, args.max_timestep, (len(x_0),), device=x_0.device)
            x_t = scheduler.add_noise(x_0, noise, timesteps)

            with accelerator.autocast():
                output = unet(x_t, timesteps, class_labels if num_classes else None)
            noise_loss = F.mse_loss(output.sample.float(), noise)
            bound_loss = scheduler.variational_bound(x_0, x_t, output.sample, output.variance, timesteps).mean()
            feature_loss = F.mse_loss(output.features.float(), extractor(x_0))
            loss = noise_loss + bound_loss + args.feature_loss_weight * feature_loss

            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())

            step += 1
            losses = torch.stack([noise_loss, bound_loss, feature_loss]).detach()
            averages = losses if averages is None else 0.98 * averages + 0.02 * losses
            noise_average, bound_average, feature_average = averages.tolist()
            progress.set_postfix(
                noise=f"{noise_average:.4f}", vlb=f"{bound_average:.3f}", feat=f"{feature_average:.4f}"
            )
            progress.update()
            if step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, output_dir, step)
            if step == args.max_train_steps:
                break
    progress.close()
    logger.info(f"Trained to step {step} in {(time.monotonic() - start) / 60:.1f} minutes.")

    # 4. Normality of the averaged weights, rounded to half precision first: what is measured is what is saved
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unet = accelerator.unwrap_model(unet)
        ema.copy_to(unet.parameters())
        pipeline = RADPipeline(
            unet=unet.half().float().eval(),
            scheduler=scheduler,
            feature_extractor=extractor.half().float(),
            normality=None,
            resolution=args.resolution,
        ).to(accelerator.device)
        fusion = {"weights": args.map_weights, "image_weights": args.image_weights, "context": args.context}
        pipeline.fit_normality(
            [sample.image for sample in train],
            holdout_images=[sample.image for sample in holdout] or None,
            categories=[sample.category for sample in train],
            holdout_categories=[sample.category for sample in holdout] or None,
            **{name: value for name, value in fusion.items() if value is not None},
        )
        for model in (pipeline.unet, pipeline.feature_extractor, pipeline.normality):
            model.half()
        pipeline.save_pretrained(output_dir)
        logger.info(f"Saved the pipeline to {output_dir}.")
    accelerator.end_training()


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int) -> None:
    """Saves the training state beside, then renames it: a checkpoint folder is always whole."""
    folder = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".partial-{step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(parse_args())
