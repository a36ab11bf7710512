"""Scoring by Ray: rows are those of a single process, also when a worker dies on the way."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import rows_of
from PIL import Image

from rad import command

ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
predict_ray = pytest.importorskip("predict_ray")
ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}  # nothing is written to HOME, or sent
    paths = os.pathsep.join([str(ROOT), str(ROOT / "training")])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def photos(good_images, tmp_path_factory):
    """36 pictures, one of which is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(36):
        pixels = np.array(good_images[number % 12])
        pixels[: number + 1, :4] = 255
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (folder / "07.png").write_bytes(b"no picture")
    return folder


def arguments(photos, saved_pipeline, folder):
    given = [photos, "--model", saved_pipeline, "--output", folder, "--masks", "--batch_size", 2, "--device", "cpu"]
    return [str(part) for part in given]


def told(rows):
    """What does not depend on the number of threads."""
    return [(row["path"], row["place"], row["verdict"], row["error"], len(row["regions"] or [])) for row in rows]


def scores(rows):
    return [row["score"] for row in rows if not row["error"]]


def kill_a_worker(rows_at, killed):
    """Once the first rows are there."""
    while not rows_at.exists() or not rows_at.read_bytes():
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        if "MapWorker" in "".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)
            return


def test_rows_are_those_of_one_process_though_a_worker_dies(cluster, photos, saved_pipeline, tmp_path):
    assert command.main(command.parse_args(arguments(photos, saved_pipeline, tmp_path / "one"))) == 4
    killed = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray" / "predictions.jsonl", killed), daemon=True)
    killer.start()
    flags = arguments(photos, saved_pipeline, tmp_path / "ray")
    assert predict_ray.main(predict_ray.parse_args(flags)) == 4
    killer.join(1)
    assert killed, "no worker was killed"
    rows, expected = rows_of(tmp_path / "ray"), rows_of(tmp_path / "one")
    assert told(rows) == told(expected) and len(rows) == 36
    assert scores(rows) == pytest.approx(scores(expected), abs=1e-3)
    assert len(list((tmp_path / "ray").rglob("*.png"))) == 35

    # Again: what is there is not scored again, and the picture that was none is tried
    Image.new("RGB", (64, 64), "white").save(photos / "07.png")
    assert predict_ray.main(predict_ray.parse_args(flags)) == 0
    after = rows_of(tmp_path / "ray")
    assert after[7]["error"] == "" and after[:7] + after[8:] == rows[:7] + rows[8:]
