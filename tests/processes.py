"""Child processes that need not import the libraries: forks of a process that has them, and nothing of ours."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "torchvision",
        "timm",
        "gradio",
        "diffusers.models.unets.unet_2d",
        "diffusers.optimization",
        "diffusers.training_utils",
        "matplotlib.figure",
        "scipy.stats",
        "skimage.measure",
        "sklearn.covariance",
        "sklearn.metrics",
    ]
)


def start_script(script: str, *arguments: object) -> BaseProcess:
    """Starts `python script arguments` in the repository; its arithmetic is the same as here, bit for bit."""
    process = FORKS.Process(target=_run_script, args=(script, arguments, torch.get_num_threads()))
    process.start()
    return process


def run_script_twice(script: str, *arguments: object) -> None:
    """In two processes that work together, with the environment of `accelerate launch`."""
    run_twice(_run_script_of_two, script, arguments)


def run_twice(function: Callable, *arguments: Any) -> None:
    """Runs function(rank, *arguments) in two processes that work together, with one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _run_of_two, (port, function, arguments), nprocs=2, start_method="forkserver"
    )


def _run_of_two(rank: int, port: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    function(rank, *arguments)


def _run_script_of_two(rank: int, script: str, arguments: tuple) -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
    _run_script(script, arguments, 1)


def _run_script(script: str, arguments: tuple, threads: int) -> None:
    torch.set_num_threads(threads)
    os.chdir(ROOT)
    sys.path.insert(0, str(Path(script).parent.resolve()))
    sys.argv[:] = [script, *map(str, arguments)]
    runpy.run_path(script, run_name="__main__")
