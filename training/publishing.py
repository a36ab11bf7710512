"""The model that comes out: its folder, its card, and its repository on the Hub."""

import argparse
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from checkpoints import room_for
from huggingface_hub import CommitInfo, HfApi
from PIL import Image

from rad import RADPipeline
from rad.data.summary import DataSummary
from rad.denoising import DenoiserQuality, quality_table
from rad.files import whole
from rad.hub import CODE, list_files, one_sentence, upload
from rad.image_reader import ImageInput
from rad.model_card import create_model_card
from rad.pipeline_loading import COMPONENTS
from rad.visualization import results_figure

SHOWN = (
    "![An image, noised, denoised and compared](denoising.png)\n\n*A good image, held out if any are, with a drawn "
    "defect; what it is noised to, what the network makes of that, KL and feature error.*"
)


def create_repo(args: argparse.Namespace) -> str:
    """The repository to push to, "user/repo", created if need be.

    Raises:
        OSError: The Hub cannot or will not.
        ValueError: It is to be private and is public already.
    """
    repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
    with one_sentence(repo_id):
        api = HfApi(token=args.hub_token)
        repo_id = api.create_repo(repo_id, private=args.hub_private_repo, exist_ok=True).repo_id
        if args.hub_private_repo and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} is public already: make it private, or push elsewhere.")
    return repo_id


def save_model(pipeline: RADPipeline, output_dir: Path) -> None:
    """Saves half-precision weights beside, then moves them in place, the index last."""
    saving = room_for("The pipeline", output_dir / "model_index.json")
    with saving, tempfile.TemporaryDirectory(prefix=".partial-", dir=output_dir) as saved:
        models = [model for name, model in pipeline.components.items() if model is not None and name != "scheduler"]
        for model in models:
            model.half()
        pipeline.save_pretrained(saved)
        for model in models:
            model.float()
        (output_dir / "model_index.json").unlink(missing_ok=True)  # without it nobody loads half of each
        for path in sorted(Path(saved).iterdir(), key=lambda path: path.name == "model_index.json"):
            with whole(output_dir / path.name) as partial:
                path.rename(partial)


def write_card(
    args: argparse.Namespace,
    pipeline: RADPipeline,
    num_train: int,
    num_holdout: int,
    pictured: list[ImageInput],
    metrics: dict[str, float | str],
    summary: DataSummary | None = None,
    denoising: Sequence[DenoiserQuality] = (),
    denoised: Image.Image | None = None,
) -> None:
    """README.md, the model card, and the pictures in it, results.png and denoising.png.

    Args:
        num_train, num_holdout: Good images for training and held out.
        pictured: Images to show results on; without any there is no picture.
        metrics: Measured on the test split, by name, or why one is not defined; empty if there is none.
        summary: What was read of the data set.
        denoising, denoised: How the network denoises held-out good images, and the picture of it.
    """
    words = [word for i, word in enumerate(sys.argv) if "--hub_token" not in (word, sys.argv[i - 1])]
    words = [Path(word).name if Path(word).is_absolute() else word for word in words if "--hub_token=" not in word]
    start = Path(args.pretrained_model_name_or_path or args.init_from or "").name  # no local paths
    if args.fit_only:
        network = f"kept from {start or 'synthetic'}, only normality was fitted"
    else:
        start = start or f"random weights, configuration {args.model_config or 'small'}"
        network = f"{args.max_train_steps} steps from {start}"
    facts: dict[str, Any] = {
        "Command": f"`accelerate launch {shlex.join(words)}`",
        "Network": network,
        "Good images": f"{num_train} for training and {num_holdout} held out" if num_holdout else f"{num_train}",
        "Seed": args.seed,
        "Software": f"PyTorch {torch.__version__}, diffusers {diffusers.__version__}, on {platform.machine()}",
    }
    name = args.dataset_name or Path(args.train_data_dir).resolve().name
    output_dir = Path(args.output_dir)
    card = create_model_card(
        pipeline,
        repo_id=args.hub_model_id,
        title=None if args.hub_model_id else output_dir.resolve().name,
        metrics={name: metrics} if metrics else None,
        training=facts,
        summary=summary and summary.to_markdown(),
        denoising=quality_table(denoising) + ("\n\n" + SHOWN if denoised else "") if denoising else None,
        picture="results.png" if pictured else None,
        datasets=[args.dataset_name] if args.dataset_name and not Path(args.dataset_name).exists() else None,
    )
    figures = {"results.png": results_figure(pipeline, pictured) if pictured else None, "denoising.png": denoised}
    with room_for("The model card", output_dir / "README.md"):
        for file, figure in figures.items():
            if figure is not None:
                with whole(output_dir / file) as partial:
                    figure.save(partial)
        with whole(output_dir / "README.md") as partial:
            card.save(partial)


def push(args: argparse.Namespace, has_picture: bool) -> CommitInfo:
    """Uploads the pipeline, its code, its card and the pictures in it, and nothing else of the output directory."""
    saved = {"README.md", "model_index.json", f"{CODE}.py", *COMPONENTS}
    saved |= {"denoising.png", *(["results.png"] if has_picture else [])}
    files = {n: path for n, path in list_files(Path(args.output_dir)).items() if n.split("/")[0] in saved}
    private = args.hub_private_repo or None
    return upload(args.hub_model_id, files, "End of training", private=private, token=args.hub_token)
