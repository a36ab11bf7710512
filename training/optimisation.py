"""What moves the weights: the optimiser, its learning rate, and the average of the weights."""

import argparse

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from rad import RADUNet2DModel


def create_optimizer(args: argparse.Namespace, unet: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW, with 8-bit states if so asked; raises ImportError where these are not installed."""
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


def create_lr_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of each of --max_train_steps."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def create_average(args: argparse.Namespace, unet: RADUNet2DModel) -> EMAModel | None:
    """The average of the U-Net's weights, if one is wanted."""
    if not args.use_ema:
        return None
    return EMAModel(
        unet.parameters(),
        decay=args.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        model_cls=RADUNet2DModel,
        model_config=unet.config,
    )
