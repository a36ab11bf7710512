#!/usr/bin/env python
"""Trains RAN's denoiser on good images only, fits normality, and saves a pipeline folder.

    accelerate launch training/train.py --train_data_dir my_good_photos --output_dir my-model

Loss (RAN, section 3): MSE(eps, noise) + L_vlb + L_feat, t uniform, EMA of the weights. A new small or base network
predicts x_0 instead, beginning at the Wiener filter of good images (`rad.models.wiener`).
"""

import argparse
import hashlib
import logging
import math
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from arguments import FREE_ARGUMENTS, parse_args
from checkpoints import (
    StopSignal,
    check_finite,
    check_output_dir,
    checkpoints_of,
    ignore_signals,
    resume,
    save_checkpoint,
)
from discriminator import fit_discriminator
from estimates import Stopwatch, check_space, estimate_time
from good_images import load_good_images, read_images
from launching import create_accelerator
from measuring import measure_test_split
from optimisation import create_average, create_lr_scheduler, create_optimizer
from publishing import create_repo, push, save_model, write_card
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from validation import averaged, validate

from rad import RADFeatureExtractor, RADImageProcessor, RADPipeline, RADScheduler, RADUNet2DModel
from rad.data import AnomalyDataset
from rad.data.batches import DecodedImages, TrainingCollator, TrainingImages, TrainingSampler
from rad.data.dataset import evenly
from rad.denoising import draw_denoising, measure_denoiser, quality_table
from rad.files import remove_partials
from rad.losses import compute_losses
from rad.models.fusion import judged_by
from rad.models.guided_diffusion import load_guided_diffusion
from rad.models.normality import IMAGE_WEIGHTS, MAP_WEIGHTS
from rad.pipeline_loading import EMBEDDED_DIR, LIMITS

logger = logging.getLogger("rad.train")

DEFAULT_STEPS = 3000
DEFAULT_RESOLUTION = 256
NUM_DENOISED = 10  # held-out images that show whether the network denoises

# -- networks ---------------------------------------------------------------------------------------------------------


def initial_pipeline(args: argparse.Namespace, categories: list[str]) -> RADPipeline:
    """What to start from: a pretrained pipeline, or new networks without normality."""
    labels = tuple(categories) if len(categories) > 1 else ()
    pretrained = args.pretrained_model_name_or_path or ("synthetic" if args.fit_only else None)
    if pretrained:
        pipeline = RADPipeline.load(pretrained, token=args.hub_token, cache_dir=args.cache_dir)
        if args.fit_only:
            return pipeline
        components = pipeline.components | {"unet": pipeline.unet.with_categories(labels)}
        return RADPipeline(
            **components,
            resolution=args.resolution or pipeline.config.resolution,
            num_noise_samples=pipeline.config.num_noise_samples,
        )

    resolution = args.resolution or DEFAULT_RESOLUTION
    if args.backbone:
        stride = {"feature_stride": args.feature_stride} if args.feature_stride else {}
        extractor = RADFeatureExtractor.from_timm(args.backbone, resolution, **stride)
    else:
        extractor = RADFeatureExtractor.from_pretrained(EMBEDDED_DIR / "tf_efficientnet_lite0")
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
    scheduler = RADScheduler(prediction_type="epsilon" if unet.wiener_filter is None else "sample")
    return RADPipeline(unet, scheduler, extractor, resolution=resolution)


def check_networks(args: argparse.Namespace, pipeline: RADPipeline) -> None:
    """Raises ValueError unless the networks fit each other, the resolution and the chain, before any is trained."""
    size, extractor, scheduler = pipeline.config.resolution, pipeline.feature_extractor, pipeline.scheduler
    step, backbone = math.lcm(pipeline.unet.stride, extractor.config.feature_stride), extractor.config.backbone
    if size % step:
        raise ValueError(f"--resolution must be a multiple of {step} pixels, got {size}.")
    least = 4 * max(extractor.network.feature_info.reduction())  # images are also looked at at a quarter of their size
    if size < least:
        raise ValueError(f"--resolution must be at least {least} pixels with the backbone {backbone}, got {size}.")
    if not args.fit_only and args.max_timestep > scheduler.config.num_train_timesteps:
        most = scheduler.config.num_train_timesteps
        raise ValueError(f"--max_timestep must be at most {most}, the chain's length, got {args.max_timestep}.")
    if extractor.num_channels > LIMITS["feature_channels"]:
        most, own = LIMITS["feature_channels"], extractor.num_channels
        raise ValueError(f"--backbone may have {most:,} channels in all its stages, but {backbone} has {own:,}.")
    try:
        x_0 = torch.zeros(1, 3, size, size)
        stages = extractor.stages(x_0)
        if extractor.join(stages, x_0).shape[1] != extractor.num_channels:
            raise ValueError("its stages have other channels than it says")
        extractor.summary(x_0, stages)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ValueError(f"The backbone {backbone} cannot be used at {size} x {size} pixels: {error}.") from error


# -- the loop ---------------------------------------------------------------------------------------------------------


def train_unet(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: RADPipeline,
    processor: RADImageProcessor,
    dataset: AnomalyDataset,
    decoded: DecodedImages,
    train: list[int],
    holdout: list[int],
) -> None:
    """Trains the pipeline's U-Net in place.

    Args:
        processor: Of the images.
        decoded: Images that are kept in memory; the loader decodes others again.
        train, holdout: Indices of the images to train on and of those held out.
    """
    output_dir, device, scheduler = Path(args.output_dir), accelerator.device, pipeline.scheduler
    extractor = pipeline.feature_extractor
    categories = list(pipeline.unet.config.categories)
    if extractor.config.image_size and args.crop_prob:
        logger.warning("The backbone takes images of one size alone: batches hold whole images, no crops.")
        args.crop_prob = 0.0

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
        label_dropout=args.label_dropout,
        rotation=args.rotation,
        rotation_prob=args.rotation_prob,
        random_flip=args.random_flip,
    )
    labels = [categories.index(dataset.samples[i].category) if categories else 0 for i in range(len(dataset))]
    predicts_noise = scheduler.config.prediction_type == "epsilon"  # it would have to predict large ones of a defect
    args.paste_prob = (0.0 if predicts_noise else 0.5) if args.paste_prob is None else args.paste_prob
    args.camera_prob = (0.0 if predicts_noise else 0.25) if args.camera_prob is None else args.camera_prob
    training_images = TrainingImages(dataset, train, labels, processor, decoded, args.paste_prob, args.camera_prob)
    if args.standardise_channels and not args.pretrained_model_name_or_path:
        extractor.fit(chunk.to(device) for chunk in training_images.chunks())
    if pipeline.unet.wiener_filter is not None:
        pipeline.unet.wiener_filter.fit(training_images.chunks(), scheduler.full_chain.alphas_cumprod)
    # Features are computed once where batches hold whole images as they are, else in each batch's own pass
    cropped = args.crop_prob > 0 and args.crop_size < args.resolution
    augmented = cropped or args.rotation * args.rotation_prob + args.camera_prob > 0 or args.random_flip
    cached_features = None
    if not augmented and args.cache_images:
        with torch.no_grad():
            chunks = [extractor(chunk.to(device)) for chunk in training_images.chunks()]
        cached_features = torch.cat(chunks)
    shown = [(holdout or train)[i] for i in evenly(len(holdout or train), args.num_validation_images)]
    validation_images = TrainingImages(dataset, shown, labels, processor, decoded)
    validation_x_0 = next(validation_images.chunks(len(shown))).to(device)
    validation_labels = torch.tensor([labels[i] for i in shown], device=device) if categories else None

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
    ema = create_average(args, unet)
    if ema:
        accelerator.register_for_checkpointing(ema)
    optimizer = create_optimizer(args, unet)
    lr_scheduler = create_lr_scheduler(args, optimizer)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # not prepared: it steps alike on any number of processes

    # 3. Where an earlier run stopped
    run = {name: value for name, value in vars(args).items() if name not in FREE_ARGUMENTS}
    root = str(Path(args.train_data_dir).resolve()) if args.train_data_dir else ""
    names = "\n".join(str(dataset.samples[i].image).removeprefix(root) for i in train)
    run |= {"global_batch_size": global_batch_size, "num_images": len(train)}
    run |= {"list of images": hashlib.sha256(names.encode()).hexdigest()[:16]}
    step = resume(accelerator, output_dir, args.resume_from_checkpoint, run) if args.resume_from_checkpoint else 0
    if ema:
        ema.to(device)  # accelerate loads it to the CPU
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
                    norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                    if accelerator.scaler is None:  # which leaves out steps of infinite gradients
                        check_finite(accelerator, norm, step + 1, output_dir)
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
                check_finite(accelerator, losses, step, output_dir)
                noise, bound, feature = (accelerator.reduce(losses, "mean") / num_logged).tolist()
                losses, num_logged = torch.zeros_like(losses), 0
                progress.set_postfix(noise=f"{noise:.4f}", vlb=f"{bound:.3f}", feat=f"{feature:.4f}")
                named = {"noise_loss": noise, "vlb_loss": bound, "feature_loss": feature}
                loss = noise + bound + args.feature_loss_weight * feature
                accelerator.log({"loss": loss, **named, "lr": lr_scheduler.get_last_lr()[0]}, step=step)
            if step % args.validation_steps == 0 or step == args.max_train_steps:
                with averaged(ema, unet):
                    validate(accelerator, pipeline, unet, validation_x_0, validation_labels, step)
            if stop.received:
                accelerator.set_trigger()
            stopping = accelerator.check_trigger()
            if stopping or step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                check_finite(accelerator, [losses, *unet.parameters()], step, output_dir)
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
        weights = trained.state_dict()  # of buffers each process has all
        weights = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in weights.items()}
        trained = RADUNet2DModel.from_config(trained.config).to(device)
        trained.load_state_dict(weights)
    trained.disable_gradient_checkpointing()
    if ema:
        ema.copy_to(trained.parameters())
    pipeline.register_modules(unet=trained)


# -- the whole --------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    if args.dry_run:
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        logger.setLevel(logging.INFO)
        read_images(args, load_good_images(args), args.resolution or DEFAULT_RESOLUTION, show_progress=True)
        return
    accelerator = create_accelerator(args)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    show_progress = accelerator.is_local_main_process
    check_output_dir(output_dir, bool(args.resume_from_checkpoint), args.overwrite_output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_partials(output_dir)
        if args.overwrite_output_dir and not args.resume_from_checkpoint:
            for checkpoint in checkpoints_of(output_dir):
                shutil.rmtree(checkpoint)
        if args.push_to_hub:  # first of all, so that a refused token costs no training
            args.hub_model_id = create_repo(args)
    set_seed(args.seed % 2**32)  # NumPy's takes no more
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32

    # 1. Good images: decoded once; a share is kept away from training, for the thresholds
    dataset = load_good_images(args)
    pipeline = initial_pipeline(args, dataset.categories)
    check_networks(args, pipeline)
    args.resolution = pipeline.config.resolution
    data = read_images(args, dataset, args.resolution, show_progress)
    processor, decoded, train, holdout = data.processor, data.decoded, data.train, data.holdout

    # 2. Training
    pipeline.to(accelerator.device)
    if args.fit_only:
        estimate_time(args, accelerator, pipeline, pipeline.unet, len(train))
    else:
        train_unet(args, accelerator, pipeline, processor, dataset, decoded, train, holdout)

    # 3. The discriminator, on the network's own images: those held out stay unseen. Weights are rounded to half
    # precision first: what is measured is what is saved
    pipeline.unet.half().float().eval()
    pipeline.feature_extractor.half().float()
    image = {i: decoded[i] if i in decoded else dataset[i].image for i in data.readable}
    category = {i: dataset[i].category for i in data.readable}
    shown = [(holdout or train)[i] for i in evenly(len(holdout or train), NUM_DENOISED)]
    x_0, _ = processor.preprocess([image[i] for i in shown])
    denoising, denoised = [], None
    if accelerator.is_main_process:
        denoising = measure_denoiser(pipeline, x_0, [category[i] for i in shown])
        denoised = draw_denoising(pipeline, x_0[0], category[shown[0]])
        told = f"Denoising {len(shown)} {'held-out' if holdout else 'of the'} good images:"
        logger.info(f"{told}\n{quality_table(denoising)}")
    if not args.fit_only:
        pipeline.register_modules(discriminator=None)
    if args.discriminator_steps and not args.fit_only:
        pipeline.set_progress_bar_config(desc="Training the discriminator", disable=not show_progress)
        start, names = time.monotonic(), [category[i] for i in train]
        good = [processor.resize(image[i])[0] for i in train]
        fit_discriminator(
            pipeline, good, names, args.discriminator_steps, seed=args.seed, camera_prob=args.camera_prob
        )
        for tensor in pipeline.discriminator.state_dict().values():  # GPUs do not round alike
            broadcast(tensor)
        logger.info(f"Trained the discriminator in {(time.monotonic() - start) / 60:.1f} minutes.")

    # 4. Statistics of good images
    pipeline.set_progress_bar_config(desc="Fitting normality", disable=not show_progress)
    fusion = {
        "weights": args.map_weights and dict(zip(MAP_WEIGHTS, args.map_weights, strict=True)),
        "image_weights": args.image_weights and dict(zip(IMAGE_WEIGHTS, args.image_weights, strict=True)),
        "context": args.context,
        "gaussian_size": args.gaussian_size,
        "gaussian_channels": args.gaussian_channels,
        "num_views": 0 if args.camera_prob == 0 else None,
    }
    start = time.monotonic()
    warnings.filterwarnings("ignore", message=".* are copies of others")  # told when they were decoded
    pipeline.fit_normality(
        [image[i] for i in train],
        holdout_images=[image[i] for i in holdout] or None,
        categories=[category[i] for i in train],
        holdout_categories=[category[i] for i in holdout] or None,
        sizes=[data.sizes[i] for i in train + holdout],
        accelerator=accelerator,
        pixel_range=processor.pixel_range,
        darkest_peak=processor.darkest_peak,
        **{name: value for name, value in fusion.items() if value is not None},
    )
    logger.info(f"Fitted normality in {(time.monotonic() - start) / 60:.1f} minutes.")
    for sentence in judged_by(pipeline.normality.config):
        logger.info(sentence)
    num_scores = pipeline.normality.config.num_scores
    logger.info(
        f"Thresholds rest on {num_scores} good images that the fit did not see: false-alarm rates below "
        f"{1 / (num_scores + 1):.1%} are extrapolated."
    )

    # 5. The pipeline, what it can do, and its card; all processes measure, one writes
    if accelerator.is_main_process:
        save_model(pipeline, output_dir)
        logger.info(f"Saved the pipeline to {output_dir}.")
    metrics, pictured = {}, []
    if args.evaluate:
        defective = []
        if data.tested:
            metrics, defective = measure_test_split(args, accelerator, pipeline, *data.tested)
        shown = defective or [dataset[i].image for i in holdout or train]
        pictured = [shown[i] for i in evenly(len(shown), 3)]
    if accelerator.is_main_process:
        write_card(args, pipeline, len(train), len(holdout), pictured, metrics, data.summary, denoising, denoised)
        if args.push_to_hub:
            logger.info(f"Pushed to {push(args, has_picture=bool(pictured)).commit_url}.")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args(description=__doc__))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
