"""Training and evaluation as a user runs them: from a data set on disk to a pipeline folder with measured numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rad import RADPipeline
from rad.data.synthetic import write_synthetic
from training import evaluate, train

ROOT = Path(__file__).parent.parent


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


def launch_training(data_dir, output_dir, *flags):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["training/train.py", "--train_data_dir", str(data_dir), "--output_dir", str(output_dir), *flags]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)


SMALL = ["--dataset_format", "mvtec", "--resolution", "64", "--crop_size", "32", "--train_batch_size", "4"]


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("model")
    result = launch_training(data_dir, output_dir, *SMALL, "--max_train_steps", "3", "--checkpointing_steps", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    return output_dir


def test_training_ends_in_a_pipeline_that_scores(trained, data_dir):
    pipeline = RADPipeline.from_pretrained(trained)
    assert list(pipeline.unet.config.categories) == ["brick", "capsule"]
    assert list(pipeline.normality.config.categories) == ["brick", "capsule"]
    output = pipeline(data_dir / "capsule" / "test" / "good" / "000.png", class_labels="capsule")
    assert output.anomaly_map.shape == (1, 64, 64) and 0 < output.p_value[0] <= 1


def test_checkpoints_are_written_and_resumed(trained, data_dir):
    assert (trained / "checkpoint-2").is_dir() and not list(trained.glob(".partial*"))
    before = RADPipeline.from_pretrained(trained).unet.state_dict()
    flags = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"]
    result = launch_training(data_dir, trained, *SMALL, *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "steps 2 to 4" in result.stderr + result.stdout
    after = RADPipeline.from_pretrained(trained).unet.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_format", "mvtec", "--category", "bottle"], "it has brick, capsule"),
        (["--dataset_format", "mtd"], "not in MTD layout"),
        (["--holdout_fraction", "1.5"], "--holdout_fraction must lie in"),
    ],
)
def test_bad_arguments_are_named(data_dir, tmp_path, flags, message, capsys):
    arguments = ["--train_data_dir", str(data_dir), "--output_dir", str(tmp_path / "model"), *flags]
    with pytest.raises((ValueError, SystemExit)) as error:
        train.main(train.parse_args(arguments))
    assert message in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "model" / "model_index.json").exists()


def test_augmentation_crops_without_resampling():
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    crops = train.augment(images, 16, rotation=0.0, rotation_prob=1.0, flip=False)
    for image, crop in zip(images, crops, strict=True):
        windows = image.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
        assert (windows - crop).abs().amax((1, 2, 3)).min() < 1e-4


def test_augmentation_rotates_by_the_angle_asked_for():
    torch.manual_seed(0)
    rows = torch.linspace(-0.7, 0.7, 64).view(1, 1, 64, 1).expand(32, 1, 64, 64)  # a gradient from top to bottom
    turned = train.augment(rows, 64, rotation=5.0, rotation_prob=1.0, flip=False)[:, 0, 16:48, 16:48]
    down = (turned[:, 1:] - turned[:, :-1]).mean((1, 2))
    right = (turned[:, :, 1:] - turned[:, :, :-1]).mean((1, 2))
    angles = torch.rad2deg(torch.atan2(right, down))
    assert angles.abs().max() <= 5.1 and angles.abs().max() > 3.5  # within +-5 degrees, and really applied
    assert angles.min() < -1 and angles.max() > 1


def test_augmentation_flips_only_when_asked():
    torch.manual_seed(0)
    images = torch.rand(16, 3, 16, 16)
    same = train.augment(images, 16, 0.0, 0.0, flip=False)
    flipped = train.augment(images, 16, 0.0, 0.0, flip=True)
    assert torch.allclose(same, images, atol=1e-4)
    candidates = torch.stack([images, images.flip(2), images.flip(3), images.flip(2, 3)])
    assert (candidates - flipped).abs().amax((2, 3, 4)).min(0).values.max() < 1e-4
    assert not torch.allclose(flipped, images, atol=1e-2)


@pytest.fixture(scope="module")
def report(trained, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    arguments = ["--model", str(trained), "--data_dir", str(data_dir), "--map_size", "64", "--restore", "1"]
    return evaluate.main(evaluate.parse_args([*arguments, "--output_dir", str(folder)])), folder


def test_evaluation_reports_every_score_and_category(report):
    metrics = report[0]["metrics"]
    assert set(metrics) == {"fused", "pixel", "feature", "residual", "mahalanobis", "rgb"}
    assert all(set(rows) == {"brick", "capsule", "mean"} for rows in metrics.values())
    assert all(0 <= value <= 1 for rows in metrics.values() for row in rows.values() for value in row.values())
    assert report[0]["num_good"] == 4 and report[0]["num_anomalous"] == 12
    assert report[0]["restoration"]["num_images"] == 1


def test_evaluation_writes_a_table_and_json(report):
    result, folder = report
    assert json.loads((folder / "results.json").read_text())["metrics"] == result["metrics"]
    assert "| fused |" in (folder / "results.md").read_text()


def test_evaluation_agrees_with_the_pipeline_itself(report, trained, data_dir):
    from sklearn.metrics import roc_auc_score

    pipeline = RADPipeline.from_pretrained(trained)
    paths = sorted((data_dir / "brick" / "test").rglob("*.png"))
    scores = pipeline(paths, class_labels="brick").score
    labels = [path.parent.name != "good" for path in paths]
    assert np.isclose(report[0]["metrics"]["fused"]["brick"]["image_auroc"], roc_auc_score(labels, scores), atol=1e-9)


def test_pasted_defects_leave_the_test_set_alone(trained, data_dir, capsys):
    arguments = ["--model", str(trained), "--data_dir", str(data_dir), "--map_size", "64", "--pasted_defects", "6"]
    result = evaluate.main(evaluate.parse_args([*arguments, "--category", "brick"]))
    assert result["num_good"] == result["num_anomalous"] == 6
