"""Processes: how many there are, on what, and with how many cores each."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    ProjectConfiguration,
    get_int_from_env,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
    parse_flag_from_env,
)

from rad.models.discriminator import computes_bf16

logger = logging.getLogger("rad.train")

TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}


def launched() -> bool:
    """Whether `accelerate launch` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def num_launched() -> int:
    """How many processes were started, on all machines together."""
    return get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)


def share_cores() -> None:
    """Gives this process its share of the cores of its own machine.

    Only where `accelerate launch` left it a single thread, as it does unless OMP_NUM_THREADS says otherwise.
    """
    if not launched() or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(torch.cpu.get_capabilities()["num_physical_cores"], usable)
    names = ["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"]
    torch.set_num_threads(max(1, cores // get_int_from_env(names, num_launched())))


def join_processes(**kwargs: Any) -> PartialState:
    """What the processes know of each other, each with its share of the cores.

    Args:
        kwargs: Of `PartialState`.

    Raises:
        ValueError: `accelerate launch` was asked for several processes and started one.
    """
    if launched() and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and num_launched() == 1:
        raise ValueError(
            "accelerate launch starts several CPU processes only with MPI, or with "
            "--config_file training/accelerate_configs/multi_cpu.yaml (and --num_processes, if not 2)."
        )
    state = PartialState(cpu=is_told_cpu(), **kwargs)
    share_cores()
    return state


def is_told_cpu() -> bool:
    """Whether accelerate must be told that processes run on the CPU: several and no accelerator it joins only so."""
    several = num_launched() > 1
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator, on as many processes and processor cores as were asked for.

    Raises:
        ValueError: `accelerate launch` was asked for several processes and started one, or for FSDP with --use_ema.
        ImportError: --report_to names a package that is not installed.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not args.fit_only:
        if args.use_ema:
            raise ValueError("FSDP cannot shard the averaged weights of --use_ema: add --no-use_ema.")
        if os.environ.get("FSDP_VERSION") != "2":
            raise ValueError("FSDP needs fsdp_version: 2, as in training/accelerate_configs/multi_node_fsdp.yaml.")
    on_cpu = join_processes().device.type == "cpu"
    mixed_precision = None if args.mixed_precision == "auto" else args.mixed_precision
    emulates = not computes_bf16(torch.device("cpu"))
    if on_cpu and args.mixed_precision == "auto" and not emulates:
        mixed_precision = "bf16"
    if on_cpu and mixed_precision == "bf16" and emulates:
        logger.warning("This processor only emulates bfloat16, which is many times slower: --mixed_precision auto.")
    trackers = [name for name in TRACKERS if args.report_to in (name, "all") and TRACKERS[name]()]
    if args.report_to != "none" and not trackers:
        wanted = "tensorboard" if args.report_to == "all" else args.report_to
        raise ImportError(f"--report_to {args.report_to} needs `pip install {wanted}`.")
    return Accelerator(
        cpu=is_told_cpu(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=trackers or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir) / "logs")),
    )
