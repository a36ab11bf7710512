"""Checkpoints: whole or not there, checked before a run goes on from them, and saved when it is asked to stop."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from launching import launched
from safetensors import SafetensorError

from rad.files import whole

logger = logging.getLogger("rad.train")


@contextlib.contextmanager
def room_for(what: str, target: Path) -> Iterator[None]:
    """Inside, something is written to `target`.

    Raises:
        OSError: In one sentence, where the disk is full or cannot be written to.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' writers have their own
        free = shutil.disk_usage(target.parent).free / 1e6
        raise OSError(f"{what} could not be written to {target} ({error}); {free:,.0f} MB are free there.") from error


def check_finite(
    accelerator: Accelerator, values: torch.Tensor | Iterable[torch.Tensor], step: int, folder: Path
) -> None:
    """Raises ValueError on all processes if a run has diverged, before anything of it is written.

    Args:
        values: Losses, a gradient's norm or weights of this process.
        step: How many steps the optimiser has made or is about to have made.
        folder: Of the run's checkpoints.
    """
    values = [values] if isinstance(values, torch.Tensor) else list(values)
    finite = torch.stack([value.detach().isfinite().all() for value in values]).all()
    if accelerator.num_processes > 1:
        finite = accelerator.reduce((~finite).float(), "sum") == 0
    if not finite:
        good = checkpoints_of(folder)
        last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        raise ValueError(
            f"Training diverged at step {step}: losses, gradients or weights are not finite. Nothing of it was saved, "
            f"{last}. Try a smaller --learning_rate."
        )


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, run: dict[str, Any], limit: int | None
) -> None:
    """Saves the training state: a checkpoint folder is always whole.

    Args:
        step: How many steps the optimiser has made.
        run: What a run that goes on from here must have in common with this one.
        limit: Older checkpoints than the last `limit` are deleted.
    """
    target, main = output_dir / f"checkpoint-{step}", accelerator.is_main_process
    writing = whole(target) if main else contextlib.nullcontext()
    with room_for(f"The checkpoint of step {step}", target), writing as partial:
        (shared,) = broadcast_object_list([str(partial)])  # all processes write to the main one's
        accelerator.save_state(shared)
        accelerator.wait_for_everyone()
        if main:
            manifest = {"step": step, "run": run, "files": {p.name: fingerprint(p) for p in files_of(partial)}}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
    if main:
        for old in checkpoints_of(output_dir)[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def files_of(folder: Path) -> list[Path]:
    """Those of a checkpoint that its manifest lists."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name != "manifest.json")


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the oldest first."""
    numbered = [(path.name.removeprefix("checkpoint-"), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(n), path) for n, path in numbered if n.isdigit())]


def find_checkpoint(output_dir: Path, named: str, run: dict[str, Any]) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step: the one named, or the last that is whole; None and 0 if there is none
    yet.

    Args:
        output_dir: Of the run.
        named: A folder, or "latest".
        run: As in `save_checkpoint`.

    Raises:
        OSError: It, or every one of them, is damaged.
        ValueError: It belongs to a run with other settings.
    """
    candidates = checkpoints_of(output_dir)[::-1] if named == "latest" else [Path(named)]
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
        return folder, manifest["step"]
    if candidates:
        raise OSError(f"There is no checkpoint to resume from that is whole: {', '.join(map(str, candidates))}.")
    logger.info(f"There is no checkpoint in {output_dir} yet: the run starts at step 0.")
    return None, 0


def resume(accelerator: Accelerator, output_dir: Path, named: str, run: dict[str, Any]) -> int:
    """Loads the checkpoint that `find_checkpoint` finds, if any, and returns its step. Later ones, damaged or of a
    course that this run does not follow, are deleted."""
    checkpoint, step = find_checkpoint(output_dir, named, run)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for later in checkpoints_of(output_dir):
                if int(later.name.removeprefix("checkpoint-")) > step:
                    shutil.rmtree(later)
    return step


def check_output_dir(output_dir: Path, resume: bool, overwrite: bool) -> None:
    """Raises ValueError if the output directory holds another model, which would be lost."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file.")
    checkpoints = checkpoints_of(output_dir)
    held = [*output_dir.glob("model_index.json"), *checkpoints]
    if held and not (resume and checkpoints) and not overwrite:
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

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    @property
    def received(self) -> int | None:
        """The signal that asked, if any did."""
        # accelerate's launcher of one process dies of a SIGTERM without passing it on
        if launched() and os.getppid() != self._parent:
            return signal.SIGTERM
        return self._received

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """For processes that prepare batches: the run stops them itself, after its checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
