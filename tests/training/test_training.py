"""Training as a user runs it: from a data set on disk or the Hub to a pipeline folder, however often interrupted."""

import argparse
import importlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial, partialmethod
from pathlib import Path

import good_images
import numpy as np
import pytest
import torch
import train
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from checkpoints import checkpoints_of
from conftest import new_pipeline, size_of, texture
from huggingface_hub import HfApi, ModelCard
from launching import TRACKERS
from measuring import measure_test_split, survey_test_split
from optimisation import create_average, create_lr_scheduler, create_optimizer
from PIL import Image
from processes import start_script
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from validation import validate

from rad import RADFeatureExtractor, RADImageProcessor, RADPipeline, RADScheduler, RADUNet2DModel
from rad.data import load_dataset
from rad.data.synthetic import write_synthetic
from rad.losses import compute_losses
from rad.model_card import create_model_card
from rad.pipeline_loading import EMBEDDED_DIR

ROOT = Path(__file__).parent.parent.parent
SMALL = ["--resolution", "64", "--crop_size", "32", "--train_batch_size", "8", "--lr_scheduler"]
SMALL += [
    "constant_with_warmup",
    "--lr_warmup_steps",
    "3",
    "--mixed_precision",
    "no",
    "--no-evaluate",
    "--logging_steps",
    "1",
    "--discriminator_steps",
    "0",
    "--num_validation_images",
    "1",
]
STEPS = ["--max_train_steps", "4", "--checkpointing_steps", "2"]
NETWORK = tempfile.TemporaryDirectory()  # to start from: smaller than any by name


@pytest.fixture(autouse=True, scope="module")
def network():
    new_pipeline(("brick", "capsule"), [texture("brick", 0)]).unet.save_pretrained(NETWORK.name)


@pytest.fixture(autouse=True)
def short_restoration(monkeypatch):
    """For the pictures of restored images, which need not look well here."""
    monkeypatch.setattr(RADPipeline, "restore", partialmethod(RADPipeline.restore, num_steps=5))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_synthetic(
        tmp_path_factory.mktemp("data") / "synthetic",
        categories=("brick", "capsule"),
        num_train=10,
        num_test_good=2,
        num_per_defect=1,
        size=64,
    )


@pytest.fixture(scope="module")
def photos(data_dir, tmp_path_factory):
    """A plain folder of good photos."""
    folder = tmp_path_factory.mktemp("photos") / "bricks"
    shutil.copytree(data_dir / "brick" / "train" / "good", folder)
    return folder


def run(*flags, namespace=argparse.Namespace) -> None:
    """The training script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    train.main(namespace(**vars(train.parse_args([str(flag) for flag in flags]))))


def train_on(data_dir, output_dir, *flags) -> Path:
    run(*command(data_dir, output_dir, *flags)[1:])
    return output_dir


def command(data_dir, output_dir, *flags) -> list[str]:
    small = [*SMALL, "--init_from", NETWORK.name]
    return ["training/train.py", "--train_data_dir", data_dir, "--output_dir", output_dir, *small, *flags]


def environment() -> dict[str, str]:
    """For a child process whose arithmetic is to be the same, bit for bit."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    first, second = weights(first), weights(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert first.keys() == second.keys() and not different


def scalars(folder: Path) -> dict[str, list[float]]:
    """What the run reported to TensorBoard."""
    events = EventAccumulator(str(folder / "logs" / "rad"), size_guidance={"images": 0}).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """A run that nothing interrupts."""
    flags = [*STEPS, "--report_to", "tensorboard", "--discriminator_steps", "2", "--num_validation_images", "4"]
    return train_on(data_dir, tmp_path_factory.mktemp("whole"), *flags)


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_training_ends_in_a_pipeline_that_scores(whole, data_dir):
    pipeline = RADPipeline.from_pretrained(whole)
    assert list(pipeline.unet.config.categories) == ["brick", "capsule"]
    assert list(pipeline.normality.config.categories) == ["brick", "capsule"]
    output = pipeline(data_dir / "capsule" / "test" / "good" / "000.png", class_labels="capsule")
    assert output.anomaly_map.shape == (1, 64, 64) and 0 < output.p_value[0] <= 1


def test_checkpoints_are_whole_and_nothing_else_is_left(whole):
    assert [path.name for path in checkpoints_of(whole)] == ["checkpoint-2", "checkpoint-4"]
    assert not list(whole.glob(".partial*"))


def test_losses_and_pictures_of_held_out_images_are_reported(whole):
    reported = scalars(whole)
    assert {"loss", "lr", "validation_noise_loss", "validation_feature_loss"} <= set(reported)
    assert len(reported["loss"]) == 4 and np.isfinite(reported["loss"]).all()
    events = EventAccumulator(str(whole / "logs" / "rad"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("validation")] == [4]
    assert size_of(whole / "validation" / "step-000004.png")[0] > 500


def test_the_estimate_and_the_speed_are_told_and_that_no_checkpoint_is_there_yet(data_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = [*SMALL, "--max_train_steps", "1", "--resume_from_checkpoint", "latest"]
    run("--train_data_dir", data_dir, "--output_dir", tmp_path / "model", *flags)
    told = caplog.text
    assert "There is no checkpoint in" in told
    assert "Estimated:" in told and "minutes for 1 steps" in told
    assert "images/s" in told and "of the time in the U-Net" in told
    assert told.index("Estimated:") < told.index("Trained to step 1")
    unet = RADPipeline.from_pretrained(tmp_path / "model").unet
    assert list(unet.config.categories) == ["brick", "capsule"] and tuple(unet.config.block_out_channels) == (
        64,
        128,
        192,
    )


def test_validation_takes_each_image_with_its_own_category(two_category_pipeline, tmp_path, caplog):
    AcceleratorState._reset_state(reset_partial_state=True)
    caplog.set_level(logging.INFO)
    unet, passes = two_category_pipeline.unet, []
    x_0, labels = torch.rand(2, 3, 64, 64) * 2 - 1, torch.tensor([0, 1])
    hook = unet.register_forward_hook(lambda module, inputs, output: passes.append(inputs))
    try:
        validate(Accelerator(cpu=True, project_dir=tmp_path), two_category_pipeline, unet, x_0, labels, 7)
    finally:
        hook.remove()
    assert [int(t[0]) for _, t, _ in passes[:3]] == [20, 201, 401]  # of the losses
    assert all(torch.equal(given, labels) for *_, given in passes[:3])
    assert [given.unique().tolist() for *_, given in passes[3:]] == 4 * [[0], [1]] + [[0]]
    assert "Step 7, 2 held-out images:" in caplog.text and "| best blur, dB |" in caplog.text
    with Image.open(tmp_path / "validation" / "step-000007.png") as picture:
        assert picture.width > 500 and picture.height > 800  # a row for each timestep


def measured(data_dir, output_dir, pipeline) -> tuple[dict[str, float], list]:
    AcceleratorState._reset_state(reset_partial_state=True)
    args = train.parse_args(
        ["--train_data_dir", str(data_dir), "--output_dir", str(output_dir), "--category", "brick"]
    )
    tested = survey_test_split(args, pipeline.image_processor.resize)
    return measure_test_split(args, Accelerator(cpu=True), pipeline, *tested)


def test_test_images_and_masks_that_cannot_be_read_are_left_out(pipeline, data_dir, tmp_path, caplog):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    expected, defective = measured(folder, tmp_path, pipeline)
    assert set(expected) == {"image_auroc", "pixel_auroc", "pixel_ap", "aupro"}
    kind = defective[0].parent
    (kind / "broken.png").write_bytes(b"no image")
    shutil.copy(defective[0], kind / "other.png")
    (folder / "brick" / "ground_truth" / kind.name / "other_mask.png").write_bytes(b"no mask")
    found, still = measured(folder, tmp_path, pipeline)
    assert found == expected and still == defective
    assert f"Not measured: {kind / 'broken.png'}" in caplog.text and "other.png cannot be read" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("without", "lacking", "reason"),
    [
        ("test/good", ["image_auroc"], "no good image"),
        ("ground_truth", ["pixel_auroc", "pixel_ap", "aupro"], "no defective image with a mask"),
        ("test/[!g]*", ["image_auroc", "pixel_auroc", "pixel_ap", "aupro"], "no defective image"),
    ],
)
def test_what_a_test_split_does_not_define_is_said(pipeline, data_dir, tmp_path, caplog, without, lacking, reason):
    caplog.set_level(logging.INFO)
    folder = shutil.copytree(data_dir, tmp_path / "data")
    for path in (folder / "brick").glob(without):
        shutil.rmtree(path)
    metrics, defective = measured(folder, tmp_path, pipeline)
    assert sorted(defective) == sorted(folder.glob("brick/test/[!g]*/*.png"))
    assert set(metrics) == {"image_auroc", "pixel_auroc", "pixel_ap", "aupro"}
    told = {name: value for name, value in metrics.items() if isinstance(value, str)}
    assert told == dict.fromkeys(lacking, f"not defined: {reason}")
    assert re.search(f"brick: .* not defined: {reason}[.]", caplog.text)
    card = create_model_card(pipeline, "user/bricks", metrics={"bricks": metrics})
    assert len(card.data.eval_results or []) == 4 - len(lacking) and f"not defined: {reason}" in card.text


def test_the_card_tells_what_was_measured_on_the_test_split(data_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["training/train.py", "--train_data_dir", "bricks", "--hub_token", "hf_secret"])
    folder = train_on(data_dir, tmp_path / "model", "--max_train_steps", "1", "--evaluate", "--category", "brick")
    log = caplog.text
    assert -1 < log.find("defective images have a mask that is used") < log.find("Fitted normality")
    card = ModelCard.load(folder / "README.md")
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert set(measured) == {"image AUROC", "pixel AUROC", "pixel AP", "AUPRO (FPR <= 0.3)"}
    assert all(0 <= value <= 1 for value in measured.values())
    assert "| 10 | train, good | `brick/train/good` |" in card.text and str(data_dir) not in card.content
    assert "8 for training and 2 held out" in card.text and "hf_secret" not in card.content
    assert size_of(folder / "results.png")[0] > 500 and size_of(folder / "denoising.png")[0] > 500
    assert "](denoising.png)" in (folder / "README.md").read_text()


# -- interruption -----------------------------------------------------------------------------------------------------


def test_killed_and_resumed_gives_the_very_same_weights(whole, data_dir, tmp_path):
    flags = ["--max_train_steps", "1000", "--checkpointing_steps", "2"]
    process = start_script(*command(data_dir, tmp_path, *flags))
    while not (tmp_path / "checkpoint-2").is_dir() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    checkpoints = checkpoints_of(tmp_path)
    assert checkpoints and process.exitcode == -signal.SIGKILL
    for later in checkpoints[1:]:  # it may have got further before it was killed
        shutil.rmtree(later)
    (tmp_path / ".partial-7-checkpoint-4").mkdir()
    (tmp_path / ".partial-7-checkpoint-4" / "model.safetensors").write_bytes(b"half")
    train_on(data_dir, tmp_path, *STEPS, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path, whole)
    assert not list(tmp_path.glob(".partial*"))


def test_a_signal_saves_a_checkpoint_to_go_on_from(whole, data_dir, tmp_path, monkeypatch):
    for number, start, end in ((signal.SIGTERM, 0, 1), (signal.SIGINT, 1, 3)):
        calls = []

        def interrupting(unet, *args, number=number, calls=calls, step=end - start):
            if unet.training and torch.is_grad_enabled():
                calls.append(1)
                if len(calls) == step:
                    os.kill(os.getpid(), number)
            return compute_losses(unet, *args)

        monkeypatch.setattr(train, "compute_losses", interrupting)
        with pytest.raises(SystemExit) as stopped:
            train_on(data_dir, tmp_path, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
        assert stopped.value.code == 128 + number
        assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-1", "checkpoint-3"][: 1 + start]
    monkeypatch.undo()
    train_on(data_dir, tmp_path, *STEPS, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path, whole)


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(data_dir, tmp_path, monkeypatch):
    calls = []

    def diverging(unet, *args):
        calls.append(1)
        return compute_losses(unet, *args) * (float("nan") if len(calls) > 3 else 1.0)

    monkeypatch.setattr(train, "compute_losses", diverging)
    flags = ["--max_train_steps", "9", "--checkpointing_steps", "2", "--logging_steps", "100"]
    with pytest.raises(ValueError, match="diverged at step 4: .* the last good checkpoint is .*checkpoint-2"):
        train_on(data_dir, tmp_path, *flags)
    assert not (tmp_path / "model_index.json").exists()
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_learning_rate_that_is_far_too_large_leaves_no_model(data_dir, tmp_path):
    with pytest.raises(ValueError, match="Training diverged at step .* there is no checkpoint yet. Try a smaller"):
        train_on(data_dir, tmp_path, "--learning_rate", "1e30", "--lr_warmup_steps", "0", "--max_train_steps", "20")
    assert not checkpoints_of(tmp_path) and not (tmp_path / "model_index.json").exists()


def test_a_launcher_that_is_stopped_stops_the_run(data_dir, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    flags = ["--max_train_steps", "5000", "--checkpointing_steps", "2", "--dataloader_num_workers", "1"]
    arguments = [*launch, *map(str, command(data_dir, tmp_path, *flags))]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=log)
    while not checkpoints_of(tmp_path) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # accelerate's launcher does not pass it on
    process.wait()
    end = time.monotonic() + 60
    while "Stopped at step" not in (tmp_path / "log").read_text() and time.monotonic() < end:
        time.sleep(0.1)
    step = (tmp_path / "log").read_text().split("Stopped at step ")[1].split(":")[0]
    assert checkpoints_of(tmp_path)[-1].name == f"checkpoint-{step}"


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(whole, data_dir, tmp_path, caplog):
    folder = shutil.copytree(whole, tmp_path / "model")
    path = folder / "checkpoint-4" / "optimizer.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    train_on(data_dir, folder, *STEPS, "--resume_from_checkpoint", "latest")
    assert "checkpoint-4 is damaged" in caplog.text and "optimizer.bin" in caplog.text
    assert_same_weights(folder, whole)
    with pytest.raises(OSError, match="no checkpoint to resume from that is whole"):
        path.write_bytes(content[:100])
        train_on(data_dir, folder, *STEPS, "--resume_from_checkpoint", folder / "checkpoint-4")


def test_a_full_disk_leaves_the_last_checkpoint_alone(whole, data_dir, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    kept = {path.name: path.read_bytes() for path in (folder / "checkpoint-4").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # no file can grow beyond this
    try:
        with pytest.raises(OSError, match="checkpoint of step 6 could not be written"):
            train_on(data_dir, folder, "--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (folder / "checkpoint-4").iterdir()} == kept
    assert not list(folder.glob(".partial*")) and not (folder / "checkpoint-6").exists()
    RADPipeline.from_pretrained(folder)


def test_too_little_space_is_told_before_the_run(data_dir, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(OSError, match=r"need about \d+ MB, but .* has 1 MB free"):
        train_on(data_dir, tmp_path / "model", *STEPS)


def test_a_checkpoint_of_another_run_is_refused(whole, data_dir, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    flags = [*STEPS, "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="learning_rate was 0.0004 and is now 0.001"):
        train_on(data_dir, folder, *flags, "--learning_rate", "1e-3")
    with pytest.raises(ValueError, match="category was None and is now .'brick'"):
        train_on(data_dir, folder, *flags, "--category", "brick")


def test_going_back_to_an_earlier_checkpoint_drops_the_later_ones(whole, data_dir, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    flags = ["--max_train_steps", "3", "--checkpoints_total_limit", "1"]
    train_on(data_dir, folder, *flags, "--resume_from_checkpoint", folder / "checkpoint-2")
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-3"]


def test_data_may_move_between_runs(whole, data_dir, tmp_path):
    folder, moved = shutil.copytree(whole, tmp_path / "model"), shutil.copytree(data_dir, tmp_path / "moved")
    shutil.rmtree(folder / "checkpoint-4")
    train_on(moved, folder, *STEPS, "--resume_from_checkpoint", "latest")
    assert_same_weights(folder, whole)
    (moved / "brick" / "train" / "good" / "000.png").rename(moved / "brick" / "train" / "good" / "other.png")
    with pytest.raises(ValueError, match="the list of training images is another one"):
        train_on(moved, folder, *STEPS, "--resume_from_checkpoint", "latest")


# -- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_do_what_one_does(whole, data_dir, tmp_path):
    flags = [*STEPS, "--train_batch_size", "4", "--report_to", "tensorboard", "--discriminator_steps", "2"]
    flags += ["--evaluate"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", "training/accelerate_configs/multi_cpu.yaml"]
    result = subprocess.run(
        [*launch, *map(str, command(data_dir, tmp_path, *flags))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 processes on cpu" in result.stderr and result.stderr.count("Saved the pipeline") == 1
    assert np.allclose(scalars(tmp_path)["loss"], scalars(whole)["loss"], rtol=1e-4)
    picture = data_dir / "brick" / "test" / "good" / "000.png"
    together, alone = (
        RADPipeline.from_pretrained(folder)(picture, class_labels="brick") for folder in (tmp_path, whole)
    )
    assert np.allclose(together.anomaly_map, alone.anomaly_map, atol=0.05)
    assert np.isclose(together.threshold, alone.threshold, atol=0.05)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    pipeline, args = RADPipeline.from_pretrained(tmp_path), train.parse_args(["--train_data_dir", str(data_dir)])
    args.output_dir = tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)
    tested = survey_test_split(args, pipeline.image_processor.resize)
    by_one, _ = measure_test_split(args, Accelerator(cpu=True), pipeline, *tested)
    assert np.allclose(sorted(by_one.values()), sorted(result.metric_value for result in results), atol=1e-3)


def test_fsdp_with_averaged_weights_is_refused(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--no-use_ema"):
        train_on(photos, tmp_path / "model", "--max_train_steps", "1")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training" / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_reads_the_ready_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]


# -- flags ------------------------------------------------------------------------------------------------------------


class Watched(argparse.Namespace):
    """Arguments that remember which of them were read."""

    read = set()

    def __getattribute__(self, name):
        type(self).read.add(name)
        return super().__getattribute__(name)


def test_every_flag_is_read_by_a_run_and_reaches_what_it_is_for(hub, photos, tmp_path, monkeypatch):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "broken.png").write_bytes(b"no image")
    given = {}

    def load_hub_dataset(*columns):
        given["data"] = columns
        return load_dataset(folder, "folder", "train")

    def from_timm(*backbone, **grid):
        given["backbone"] = (*backbone, grid)
        return RADFeatureExtractor.from_pretrained(EMBEDDED_DIR / "tf_efficientnet_lite0")

    monkeypatch.setattr(good_images, "load_hub_dataset", load_hub_dataset)
    monkeypatch.setattr(RADFeatureExtractor, "from_timm", from_timm)
    monkeypatch.setattr(Watched, "read", set())
    data = "--dataset_name name --dataset_config_name config --dataset_split split --image_column image"
    data += " --category_column kind --label_column label --category a b --cache_dir cache"
    flags = "--push_to_hub --hub_model_id user/rad --hub_token hf_user --backbone net --feature_stride 8"
    flags += " --no-standardise_channels --context 0.5 --gaussian_size 4 --gaussian_channels 12"
    flags += " --map_weights 1 2 3 4 5 --image_weights 6 5 4 3 2 1"
    args = [*data.split(), "--output_dir", tmp_path / "model", *SMALL, *flags.split(), "--max_train_steps", "1"]
    run(*args, "--skip_unreadable", namespace=Watched)
    local = train.parse_args(["--train_data_dir", str(photos), "--dataset_format", "folder"])
    assert len(good_images.load_good_images(Watched(**vars(local)))) == 10

    assert not set(vars(local)) - Watched.read
    assert given["data"] == ("name", "config", "split", "image", "kind", "label", ["a", "b"], "hf_user", "cache")
    pipeline = RADPipeline.from_pretrained(tmp_path / "model")
    assert given["backbone"] == ("net", pipeline.config.resolution, {"feature_stride": 8})
    assert (pipeline.feature_extractor.channel_std == 1).all() and not pipeline.feature_extractor.channel_mean.any()
    config = pipeline.normality.config
    names = ["pixel", "feature", "residual", "mahalanobis", "discriminator"]
    assert config.context == 0.5 and (config.gaussian_size, config.gaussian_channels) == (4, 12)
    assert config.weights == dict(zip(names, (1, 2, 3, 4, 5), strict=True))
    assert config.image_weights == dict(zip([*names, "global"], (6, 5, 4, 3, 2, 1), strict=True))


def test_flags_of_the_optimiser_reach_it():
    flags = "--learning_rate 0.5 --adam_beta1 0.1 --adam_beta2 0.2 --adam_weight_decay 0.3 --adam_epsilon 0.4"
    flags += " --lr_scheduler polynomial --lr_warmup_steps 2 --lr_power 2 --max_train_steps 12"
    flags += " --ema_max_decay 0.9 --ema_inv_gamma 2 --ema_power 0.5"
    args, network = train.parse_args(["--train_data_dir", "x", *flags.split()]), torch.nn.Linear(1, 1)
    network.config = {}
    optimizer = create_optimizer(args, network)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.1, 0.2), 0.3, 0.4)
    schedule, rates = create_lr_scheduler(args, optimizer), []
    for _ in range(12):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert np.allclose(rates[:3], [0, 0.25, 0.5]) and np.isclose(rates[7], 0.5 * 0.5**2, rtol=1e-3)
    average = create_average(args, network)
    assert (average.decay, average.inv_gamma, average.power) == (0.9, 2, 0.5)
    assert create_average(train.parse_args(["--train_data_dir", "x", "--no-use_ema"]), network) is None


def test_help_shows_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(group in shown for group in ("data:", "model:", "training:", "optimizer:", "the Hub:"))
    assert "(default: 0.0004)" in shown


def test_images_not_kept_in_memory_and_workers_give_the_same_weights(whole, data_dir, tmp_path):
    train_on(data_dir, tmp_path, *STEPS, "--no-cache_images", "--dataloader_num_workers", "1")
    assert_same_weights(tmp_path, whole)


def test_cached_features_give_the_same_losses(data_dir, tmp_path):
    flags = ["--crop_prob", "0", "--rotation", "0", "--max_train_steps", "3", "--report_to", "tensorboard"]
    cached = train_on(data_dir, tmp_path / "cached", *flags)
    each_step = train_on(data_dir, tmp_path / "each", *flags, "--no-cache_images")
    assert np.allclose(scalars(cached)["feature_loss"], scalars(each_step)["feature_loss"], rtol=1e-4)


def test_settings_of_the_optimisation(data_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--num_train_epochs", "1", "--gradient_accumulation_steps", "2", "--scale_lr", "--snr_gamma", "5"]
    flags += ["--gradient_checkpointing", "--no-use_ema", "--allow_tf32", "--crop_prob", "1", "--random_flip"]
    flags += [
        "--lr_scheduler",
        "cosine",
        "--lr_warmup_steps",
        "0",
        "--report_to",
        "tensorboard",
        "--max_train_samples",
        "20",
    ]
    folder = train_on(data_dir, tmp_path / "model", *flags)
    assert "steps 0 to 1" in caplog.text and "16 images a step" in caplog.text  # 16 of 20 images are trained on
    assert scalars(folder)["lr"] == [0.0]  # cosine ends at 0
    assert json.loads((folder / "checkpoint-1" / "manifest.json").read_text())["run"]["learning_rate"] == 16 * 4e-4


def test_snr_gamma_weighs_clean_images_less(pipeline):
    x_0 = torch.rand(2, 3, 64, 64) * 2 - 1
    batch = {"x_0": x_0, "noise": torch.randn_like(x_0), "timesteps": torch.tensor([20, 20])}
    features = pipeline.feature_extractor(x_0)
    with torch.no_grad():
        plain = compute_losses(pipeline.unet, pipeline.scheduler, batch, features)
        weighed = compute_losses(pipeline.unet, pipeline.scheduler, batch, features, 5.0)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[20]
    assert np.isclose(float(weighed[0] / plain[0]), 5 / (abar / (1 - abar)), rtol=1e-4)
    assert torch.equal(weighed[1:], plain[1:])


def test_fine_tuning_starts_from_a_pipeline(whole, photos, tmp_path, caplog):
    flags = [
        "--pretrained_model_name_or_path",
        whole,
        "--learning_rate",
        "0",
        "--max_train_steps",
        "1",
        "--no-use_ema",
    ]
    run("--train_data_dir", photos, "--output_dir", tmp_path / "model", *SMALL, *flags)
    tuned = RADPipeline.from_pretrained(tmp_path / "model")
    assert list(tuned.unet.config.categories) == [] and list(tuned.normality.config.categories) == ["bricks"]
    before, x = RADPipeline.from_pretrained(whole), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = before.unet(x, 50).sample, tuned.unet(x, 50).sample  # as on an unknown category
    assert torch.allclose(expected, got, atol=2e-2)


def test_fit_only_keeps_the_network(whole, photos, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "model"
    run("--train_data_dir", photos, "--output_dir", folder, "--fit_only", "--pretrained_model_name_or_path", whole)
    assert_same_weights(folder, whole)
    pipeline = RADPipeline.from_pretrained(folder)
    assert list(pipeline.normality.config.categories) == ["bricks"] and pipeline.normality.config.num_scores == 10
    assert not checkpoints_of(folder) and "Estimated: 0 minutes for normality" in caplog.text
    assert "only normality was fitted" in (folder / "README.md").read_text() and (folder / "results.png").exists()


def test_init_from_a_folder(photos, tmp_path):
    torch.manual_seed(1)
    unet = RADUNet2DModel.from_named_config("small", sample_size=64)
    unet.save_pretrained(tmp_path / "init")
    flags = ["--init_from", tmp_path / "init", "--learning_rate", "0", "--max_train_steps", "1", "--no-use_ema"]
    saved = weights(train_on(photos, tmp_path / "model", *flags))
    assert all(torch.equal(saved[name], value.half()) for name, value in unet.named_parameters())
    spectrum = unet.wiener_filter.log_spectrum.half()  # that of the photos takes its place
    assert not torch.equal(saved["wiener_filter.log_spectrum"], spectrum)


@pytest.mark.parametrize("module", ["wandb", "trackio", "bitsandbytes", "datasets"])
def test_a_missing_package_is_named(photos, tmp_path, monkeypatch, module):
    flags = {"bitsandbytes": ["--use_8bit_adam"], "datasets": ["--dataset_name", "x"]}.get(
        module, ["--report_to", module]
    )
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(TRACKERS, module, lambda: False)
    data = [] if module == "datasets" else ["--train_data_dir", photos]
    with pytest.raises(ImportError, match=f"pip install {module}"):
        run(*data, "--output_dir", tmp_path / "model", *SMALL, *flags)


# -- data and bad input -----------------------------------------------------------------------------------------------


def test_mixed_sizes_are_trained_on_and_unreadable_images_are_skipped_only_when_asked(photos, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = shutil.copytree(photos, tmp_path / "some")
    Image.open(folder / "000.png").resize((80, 50)).save(folder / "000.png")
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 11 images cannot be read: .*broken.png"):
        train_on(folder, tmp_path / "model", "--max_train_steps", "1")
    assert not (tmp_path / "model" / "model_index.json").exists()
    train_on(folder, tmp_path / "model", "--max_train_steps", "1", "--skip_unreadable")
    assert "broken.png" in caplog.text
    assert "Images of 2 different sizes, most often 64 x 64" in caplog.text
    RADPipeline.from_pretrained(tmp_path / "model")


def test_few_or_no_images_are_refused(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "000.png", tmp_path / "one")
    with pytest.raises(ValueError, match="No images for split 'train'"):
        train_on(tmp_path / "empty", tmp_path / "model")
    with pytest.raises(ValueError, match="'one' has 1 good images to train on; it needs at least 10"):
        train_on(tmp_path / "one", tmp_path / "model")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (
            "000.png",
            "'bricks' has 12 good images, 11 of which are copies of others or show the same part; it needs at",
        ),
        ("black.png", r"12 of 12 good images \(the first is .*00.png\) are of one colour"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--no-cache_images"]])
def test_odd_sets_are_refused_before_the_first_step(photos, tmp_path, picture, message, flags):
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    (tmp_path / "bricks").mkdir()
    for i in range(12):
        shutil.copy(
            tmp_path / picture if picture == "black.png" else photos / picture, tmp_path / f"bricks/{i:02d}.png"
        )
    with pytest.raises(ValueError, match=message):
        train_on(tmp_path / "bricks", tmp_path / "model", *flags)
    assert not list((tmp_path / "model").iterdir())


def test_copies_among_enough_images_are_told(photos, tmp_path, caplog):
    folder = shutil.copytree(photos, tmp_path / "some")
    shutil.copy(folder / "000.png", folder / "copy.png")
    args = train.parse_args(["--train_data_dir", str(folder), "--output_dir", str(tmp_path / "model")])
    dataset = good_images.load_good_images(args)
    good_images.decode_images(args, dataset, list(range(len(dataset))), RADImageProcessor(64), show_progress=False)
    assert "1 of 11 good images are copies of others" in caplog.text


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", "--train_data_dir --output_dir --init_from --cache_dir --resume_from_checkpoint"),
        ("evaluate", "--data_dir --output_dir"),
        ("compare", "--data_dir --output_dir"),
        ("ablate", "--data_dir --output_dir --raw_dir"),
        ("convert_guided_diffusion", "checkpoint --output_dir"),
    ],
)
def test_a_tilde_is_the_home_folder(command, flags, monkeypatch):
    """No shell expands it in --data_dir=~/photos or in a file of settings."""
    monkeypatch.setenv("HOME", "/home/somebody")
    given = [f"{flag}=~/{flag.strip('-')}" if flag.startswith("--") else f"~/{flag}" for flag in flags.split()]
    args = importlib.import_module(command).parse_args(given)
    for flag in flags.split():
        name = flag.strip("-")
        assert getattr(args, name) == f"/home/somebody/{name}"


def test_another_model_is_not_overwritten(whole, photos, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model .*--overwrite_output_dir"):
        train_on(photos, folder, "--max_train_steps", "1")
    for checkpoint in checkpoints_of(folder):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="holds a model"):  # "latest" would start at step 0
        train_on(photos, folder, "--max_train_steps", "1", "--resume_from_checkpoint", "latest")
    assert_same_weights(folder, whole)
    train_on(photos, folder, "--max_train_steps", "1", "--overwrite_output_dir")
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-1"]
    assert list(RADPipeline.from_pretrained(folder).normality.config.categories) == ["bricks"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--category", "bottle"], "it has brick, capsule"),
        (["--dataset_format", "mtd"], "not in MTD layout"),
        (["--holdout_fraction", "1.5"], "must lie in 0 .. 1"),
        (["--train_batch_size", "0"], "must be at least 1"),
        (["--discriminator_steps", "-5"], "--discriminator_steps must be at least 0"),
        (["--fit_only", "--resolution", "128"], "--resolution has no use"),
        (["--fit_only", "--resume_from_checkpoint", "latest"], "--resolution has no use"),
        (["--hub_tok", "hf_secret"], "unrecognized arguments"),
        (["--model_config", "ran", "--init_from", "x.pt"], "give one of --init_from and --model_config"),
        (["--no-standardise_channels", "--pretrained_model_name_or_path", "mtd"], "belongs to a new extractor"),
        (["--feature_stride", "4"], "--feature_stride belongs to --backbone"),
        (["--dataset_name", "user/data"], "give either --train_data_dir or --dataset_name"),
        (["--max_train_steps", "1", "--num_train_epochs", "1"], "give either --max_train_steps"),
        (["--pretrained_model_name_or_path", "mtd", "--init_from", "x.pt"], "give one of"),
        (["--pretrained_model_name_or_path", "no/such/folder"], "no Hub id"),
        (["--resolution", "40"], "multiple of 16 pixels, got 40"),
    ],
)
def test_bad_arguments_are_named(data_dir, tmp_path, flags, message, capsys):
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        run("--train_data_dir", data_dir, "--output_dir", tmp_path / "model", *SMALL, *flags)
    assert message in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "model" / "model_index.json").exists()


def test_the_output_does_not_go_into_the_data(photos):
    with pytest.raises(ValueError, match="its pictures would be trained on"):
        train_on(photos, photos / "model", "--max_train_steps", "1")


def test_only_the_training_images_of_a_category_folder_are_trained_on(data_dir, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train_on(data_dir / "brick", tmp_path / "model", "--dry_run")
    assert [line.split()[1:] for line in caplog.text.splitlines() if "train, " in line] == [
        ["train,", "good", "train/good"]
    ]


# -- the Hub ----------------------------------------------------------------------------------------------------------


def test_training_on_a_hub_data_set_ends_on_the_hub(hub, photos, tmp_path):
    api = HfApi(token="hf_user")
    api.create_repo("user/bricks", repo_type="dataset")
    api.upload_folder(repo_id="user/bricks", repo_type="dataset", folder_path=photos, path_in_repo="train")
    flags = [
        "--dataset_name",
        "user/bricks",
        "--cache_dir",
        tmp_path / "cache",
        "--max_train_steps",
        "1",
        "--evaluate",
    ]
    flags += ["--push_to_hub", "--hub_model_id", "user/rad-bricks", "--hub_private_repo"]
    flags += ["--hub_token", "hf_user"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "private.txt").write_text("not for publication")
    run("--output_dir", tmp_path / "model", *SMALL, *flags)
    for path in (tmp_path / "model").rglob("*.json"):
        assert "checkpoint" in str(path) or str(tmp_path) not in path.read_text(), path
    files = api.list_repo_files("user/rad-bricks")
    assert {"README.md", "results.png", "model_index.json", "pipeline_rad.py"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoint", "logs", "validation", "private"))]
    assert api.model_info("user/rad-bricks").private
    assert api.model_info("user/rad-bricks").card_data.datasets == ["user/bricks"]
    pushed = RADPipeline.from_pretrained("user/rad-bricks", cache_dir=tmp_path / "elsewhere", token="hf_user")
    local = RADPipeline.from_pretrained(tmp_path / "model")
    assert np.array_equal(pushed(photos / "000.png").anomaly_map, local(photos / "000.png").anomaly_map)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, photos, tmp_path):
    HfApi(token="hf_user").create_repo("user/rad-bricks")
    flags = ["--push_to_hub", "--hub_model_id", "user/rad-bricks", "--hub_token", "hf_user", "--hub_private_repo"]
    with pytest.raises(ValueError, match="user/rad-bricks is public already"):
        train_on(photos, tmp_path / "model", *flags)


def test_a_refused_token_costs_no_training(hub, photos, tmp_path):
    with pytest.raises(OSError, match="refuses this token for 'user/rad-bricks'"):
        train_on(
            photos, tmp_path / "model", "--push_to_hub", "--hub_model_id", "user/rad-bricks", "--hub_token", "hf_no"
        )
    assert not checkpoints_of(tmp_path / "model")


# -- networks that do not fit are refused before the first step -------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "40"], "--resolution must be a multiple of 16 pixels, got 40"),
        (["--resolution", "16"], "at least 64 pixels with the backbone tf_efficientnet_lite0, got 16"),
        (["--resolution", "32"], "at least 64 pixels .* got 32"),
        (["--resolution", "48"], "at least 64 pixels .* got 48"),
        (["--max_timestep", "1001"], "--max_timestep must be at most 1000, the chain's length, got 1001"),
    ],
)
def test_what_would_fail_late_is_refused_before_the_first_step(photos, tmp_path, flags, message, monkeypatch):
    monkeypatch.setattr(train, "read_images", lambda *_: pytest.fail("images are read first"))
    with pytest.raises(ValueError, match=message):
        run("--train_data_dir", photos, "--output_dir", tmp_path / "model", *SMALL, *flags)


def test_a_backbone_that_cannot_be_read_at_this_size_is_refused():
    extractor = RADFeatureExtractor("convnext_atto")
    unet = RADUNet2DModel.from_pretrained(NETWORK.name)
    config = dict(unet.config) | {"feature_channels": extractor.num_channels, "wiener": False}
    scheduler = RADScheduler(prediction_type="epsilon")
    pipeline = RADPipeline(RADUNet2DModel(**config), scheduler, extractor, resolution=64)
    with pytest.raises(ValueError, match="at least 128 pixels with the backbone convnext_atto, got 64"):
        train.check_networks(argparse.Namespace(max_timestep=500, fit_only=False), pipeline)


@pytest.mark.parametrize("backbone", ["swin_tiny_patch4_window7_224", "mambaout_femto", "deit_tiny_patch16_224"])
def test_transformers_and_channels_last_networks_are_trained_saved_and_loaded(photos, tmp_path, monkeypatch, backbone):
    from_timm = partial(RADFeatureExtractor.from_timm, pretrained=False)  # there is no network
    monkeypatch.setattr(RADFeatureExtractor, "from_timm", from_timm)
    flags = [
        "--resolution",
        "128",
        "--max_train_steps",
        "2",
        "--discriminator_steps",
        "2",
        "--gaussian_channels",
        "16",
    ]
    run("--train_data_dir", photos, "--output_dir", tmp_path, *SMALL, *flags, "--backbone", backbone)
    loaded = RADPipeline.from_pretrained(tmp_path)
    assert loaded.feature_extractor.config.backbone == backbone
    output = loaded(sorted(Path(photos).rglob("*.png"))[:2])
    assert np.isfinite(output.score).all() and {"discriminator", "mahalanobis"} <= set(output.scores)


def test_a_backbone_with_many_channels_is_fitted_saved_and_loaded(good_images, tmp_path):
    """ResNets give 11,136 numbers of an image as a whole."""
    extractor = RADFeatureExtractor("resnet26")
    unet = RADUNet2DModel.from_pretrained(NETWORK.name)
    config = dict(unet.config) | {"feature_channels": extractor.num_channels, "wiener": False}
    pipeline = RADPipeline(RADUNet2DModel(**config), RADScheduler(prediction_type="epsilon"), extractor, resolution=64)
    train.check_networks(argparse.Namespace(max_timestep=500, fit_only=False), pipeline)
    pipeline.fit_normality(good_images[:6], gaussian_channels=16)
    pipeline.save_pretrained(tmp_path)
    loaded = RADPipeline.from_pretrained(tmp_path)
    assert loaded.normality.config.num_summaries == 2048 < extractor.num_summaries == 11136
    assert loaded(good_images[0]).score[0] == pytest.approx(pipeline(good_images[0]).score[0], abs=1e-4)
