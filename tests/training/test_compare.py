"""Peers against independent computations, and the whole comparison on a tiny data set."""

import importlib.util
import json
import os
import runpy
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import compare
import numpy as np
import peers
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from processes import FORKS
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import cdist, mahalanobis
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from rad import RADPipeline, evaluation
from rad.data import load_dataset
from rad.data.batches import to_pixels
from rad.data.synthetic import write_synthetic
from rad.image_processor import to_input

NEEDS_ANOMALIB = "anomalib is not installed: pip install -r requirements-bench.txt"


def new_peer(method, pipeline, *flags):
    return peers.METHODS[method](pipeline, compare.parse_args(["--data_dir", "none", *flags]))


@pytest.fixture(scope="module")
def images(pipeline, good_images):
    """Good images, uint8 [12, 3, 64, 64]."""
    return torch.stack([to_pixels(pipeline.image_processor.resize(image)[0]) for image in good_images])


@pytest.fixture(scope="module")
def padim(pipeline, images):
    return new_peer("padim", pipeline).fit(images[:10])


@pytest.fixture(scope="module")
def patchcore(pipeline, images):
    torch.manual_seed(0)
    return new_peer("patchcore", pipeline, "--coreset_ratio", "0.1").fit(images[:10])


def test_embedding_is_the_extractors_own_stages(pipeline, images):
    x = to_input(images[:1])
    stages = pipeline.feature_extractor.network((x + 1) / 2 * 2 - 1)  # this backbone's mean and deviation are 0.5
    found = peers.Embedding(pipeline, (8, 16), 8, average=True, mode="bilinear")(x)
    channels = stages[2].shape[1]
    assert found.shape == (1, channels + stages[3].shape[1], 8, 8)
    assert torch.allclose(found[0, :, 3, 3][:channels], stages[2][0, :, 2:5, 2:5].mean((1, 2)), atol=1e-5)
    found = peers.Embedding(pipeline, (4, 8, 16), 4, average=False, mode="nearest")(x)
    assert torch.equal(found[0, -stages[3].shape[1] :, 13, 6], stages[3][0, :, 3, 1])
    found = peers.Embedding(pipeline, (4, 8), 8, average=False, mode="bilinear")(x)
    assert torch.allclose(found[0, : stages[1].shape[1], 3, 5], stages[1][0, :, 6:8, 10:12].mean((1, 2)), atol=1e-5)


def test_padims_distance_is_scipys(padim, images):
    found = padim.distance(to_input(images[11:]))
    good, bad = padim.embedding(to_input(images[:10])).double(), padim.embedding(to_input(images[11:])).double()
    for row, column in ((0, 0), (5, 9), (15, 15)):
        at = good[:, :, row, column].numpy()
        inverse = np.linalg.inv(np.cov(at.T) + 0.01 * np.eye(at.shape[1]))
        expected = mahalanobis(bad[0, :, row, column].numpy(), at.mean(0), inverse)
        assert found[0, row, column].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("pool_size", [2, 8, 256])
def test_the_coreset_takes_the_farthest_point_each_time(pool_size):
    torch.manual_seed(0)
    points = torch.randn(200, 5)
    chosen = peers.k_center_greedy(points, 30, pool_size).tolist()
    distances = cdist(points, points)
    assert len(set(chosen)) == 30
    for i in range(1, 30):
        gaps = distances[:, chosen[:i]].min(1)
        assert gaps[chosen[i]] == pytest.approx(gaps.max(), abs=1e-4)


def test_a_coreset_of_everything_has_each_point_once():
    assert sorted(peers.k_center_greedy(torch.randn(20, 3), 20, 5).tolist()) == list(range(20))


def test_patchcore_finds_the_nearest_patches_and_weighs_the_worst(patchcore, images):
    x = to_input(images[11:])
    maps, score = patchcore(x)
    memory, patches = patchcore.memory.double(), patchcore.embedding(x)[0].flatten(1).T.double()
    assert len(memory) == 64  # a tenth of ten images' 8 x 8 patches

    search = NearestNeighbors(algorithm="brute").fit(memory)
    distances, nearest = (found[:, 0] for found in search.kneighbors(patches, 1))
    expected, _ = peers.smooth(torch.from_numpy(distances).float().view(1, 8, 8), x)
    assert torch.allclose(maps, expected, rtol=1e-3)
    worst = distances.argmax()
    around = search.kneighbors(memory[nearest[worst]][None], 9, return_distance=False)[0]
    powers = np.exp(cdist(patches[worst][None], memory[around])[0])
    assert float(score) == pytest.approx((1 - np.exp(distances[worst]) / powers.sum()) * distances[worst], rel=1e-3)


def test_smoothing_keeps_the_mean_and_finds_the_place():
    x, distance = torch.zeros(1, 3, 64, 64), torch.zeros(1, 16, 16)
    distance[0, 8, 4] = 1
    maps, score = peers.smooth(distance, x)
    assert maps.shape == (1, 64, 64) and score == maps.max()
    assert maps.mean().item() == pytest.approx(distance.mean().item(), rel=0.01)
    row, column = divmod(int(maps.argmax()), 64)
    assert abs(row - 33.5) < 1 and abs(column - 17.5) < 1


@pytest.mark.parametrize("method", ["autoencoder", "denoising_autoencoder"])
def test_autoencoders_learn(method, pipeline, images):
    peer = new_peer(method, pipeline, "--max_train_steps", "40", "--train_batch_size", "4")
    assert peer.fit(images) is peer
    assert np.mean(peer.losses[-5:]) < 0.5 * np.mean(peer.losses[:5])


def test_the_denoising_autoencoder_removes_noise(pipeline, images):
    peer = new_peer("denoising_autoencoder", pipeline, "--max_train_steps", "75", "--train_batch_size", "4")
    peer.fit(images)
    x = to_input(images)
    noisy = x + peer.noise_std * peers.coarse_noise(x)
    with torch.no_grad():
        left = (peer.network(noisy) - x).square().mean()
    assert left < 0.5 * (noisy - x).square().mean()


def test_an_autoencoder_whose_bottleneck_is_open_sees_nothing(pipeline, images):
    """The map is the reconstruction's error: none where the network returns its input."""
    peer = new_peer("autoencoder", pipeline)
    peer.network = torch.nn.Identity()
    maps, score = peer(to_input(images[:1]))
    assert maps.shape == (1, 64, 64) and maps.abs().max() == 0 and score == 0


def test_peak_memory_starts_anew():
    compare.peak_memory()
    block = np.ones(50_000_000)  # 400 MB
    del block
    high, low = compare.peak_memory(), compare.peak_memory()
    assert 390 < high - low < 450


@pytest.fixture(scope="module")
def folders(pipeline, tmp_path_factory):
    """A saved pipeline and a data set of two categories, of which it knows neither."""
    root = tmp_path_factory.mktemp("compare")
    pipeline.save_pretrained(root / "model")
    write_synthetic(root / "data", ("brick", "gravel"), num_train=4, num_test_good=2, num_per_defect=1, size=64)
    return root


@pytest.fixture(scope="module")
def flags(folders):
    names = ("--model", "model"), ("--data_dir", "data"), ("--output_dir", "output")
    paths = [part for flag, name in names for part in (flag, str(folders / name))]
    return [
        *paths,
        "--methods",
        "rad",
        "padim",
        "--max_train_samples",
        "3",
        "--latency_images",
        "3",
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="module")
def rows(flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.multiprocessing, "get_context", {"spawn": FORKS}.get)  # faster
        return compare.main(compare.parse_args(flags))


def test_the_table_has_every_column_and_each_row_its_place(rows, folders):
    titles = [row["method"] for row in rows]
    assert titles[0] == "RAD" and titles[-1] == "PaDiM" and "RAD, feature alone" in titles
    by_title = {row["method"]: row for row in rows}
    for row in rows:
        assert set(row) == {"method", "settings", "fit_threads", *compare.COLUMNS}
        assert all(0 <= row[name] <= 1 for name in compare.METRICS)
        assert row["latency_ms"] > 0 and row["memory_mb"] > 100 and row["size_mb"] > 0
    assert by_title["RAD"]["fit_seconds"] is None and by_title["PaDiM"]["fit_seconds"] > 0
    assert by_title["PaDiM"]["fit_memory_mb"] > 100

    output_dir = folders / "output"
    results = json.loads((output_dir / "results.json").read_text())
    assert results["rows"] == rows
    rad, padim = (results["seconds"][method] for method in ("rad", "padim"))
    assert len(rad) == len(padim) == 3
    assert by_title["RAD"]["latency_ratio"] == 1
    assert by_title["PaDiM"]["latency_ratio"] == sorted(b / a for a, b in zip(rad, padim, strict=True))[1]
    lines = (output_dir / "results.md").read_text().splitlines()
    cells = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    assert [cell.strip() for cell in cells[0]] == ["method", *(heading for heading, _ in compare.COLUMNS.values())]
    assert len(cells) == 2 + len(rows) and len({len(row) for row in cells}) == 1
    assert sum(line.startswith("- ") for line in lines) == 2  # one line of settings for each method
    with Image.open(output_dir / "comparison.png") as picture:
        assert picture.width > 500


def test_rows_are_the_metrics_of_the_methods_own_maps(rows, folders):
    """RAD's and PaDiM's, of both categories, against scikit-learn's of what each gives."""
    pipeline = RADPipeline.load(folders / "model")
    args = compare.parse_args(["--data_dir", "none", "--output_dir", str(folders / "output"), "--device", "cpu"])
    found = {title: {"image_auroc": [], "pixel_ap": []} for title in ("RAD", "RAD, feature alone", "PaDiM")}
    for category in ("brick", "gravel"):
        test = load_dataset(folders / "data", "mvtec", "test", [category])
        labels = [sample.label for sample in test.samples]
        masks = np.stack([test.mask(i, (256, 256)) for i in range(len(test))])
        for method in ("rad", "padim"):
            peer = compare.load_peer(method, category, pipeline, args)
            scored = peer.score([sample.image for sample in test.samples], category)
            for title in found.keys() & scored.maps:
                maps = [torch.from_numpy(m)[None, None] for m in scored.maps[title]]
                maps = torch.cat([F.interpolate(m, (256, 256), mode="bilinear", antialias=True) for m in maps])
                found[title]["image_auroc"].append(roc_auc_score(labels, scored.scores[title]))
                found[title]["pixel_ap"].append(average_precision_score(masks.ravel(), maps.numpy().ravel()))
    for title, metrics in found.items():
        (row,) = [row for row in rows if row["method"] == title]
        for name, values in metrics.items():
            assert row[name] == pytest.approx(np.mean(values), rel=2e-3), (title, name)


def test_a_rerun_keeps_what_is_fitted_and_a_changed_pipeline_is_measured_anew(rows, flags, folders, monkeypatch):
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))  # faster
    output = folders / "output"
    stored = [output / f"padim-{name}.{end}" for name in ("brick", "gravel") for end in ("safetensors", "json")]
    written = [path.stat().st_mtime_ns for path in stored]
    with pytest.raises(ValueError, match="rad-brick.json was made with other seed: give --refit rad"):
        compare.main(compare.parse_args([*flags, "--seed", "1"]))

    pipeline = RADPipeline.load(folders / "model")
    next(pipeline.unet.parameters()).data.mul_(1.5)
    pipeline.save_pretrained(folders / "model")
    with pytest.raises(ValueError, match="rad-brick.json was made with other weights: give --refit rad"):
        compare.main(compare.parse_args(flags))
    again = compare.main(compare.parse_args([*flags, "--refit", "rad"]))

    assert [path.stat().st_mtime_ns for path in stored] == written
    assert [row["method"] for row in again] == [row["method"] for row in rows]
    old, new = ([found[0]["pixel_ap"], found[-1]["pixel_ap"]] for found in (rows, again))
    assert old[0] != new[0] and old[1] == new[1]  # RAD and PaDiM
    assert json.loads((output / "results.json").read_text())["rows"] == again


def test_peers_depend_on_the_backbone_alone(folders, pipeline, small_pipeline_without_normality, monkeypatch):
    args = compare.parse_args(["--data_dir", str(folders / "data"), "--device", "cpu"])

    def mark(method, of):
        return compare.marks_of(method, "brick", of, args)

    other = small_pipeline_without_normality
    other.feature_extractor.load_state_dict(pipeline.feature_extractor.state_dict())
    assert mark("rad", other) != mark("rad", pipeline)
    assert mark("padim", other) == mark("padim", pipeline)
    next(other.feature_extractor.network.parameters()).data.mul_(2)
    assert mark("padim", other) != mark("padim", pipeline)

    more = compare.parse_args(["--data_dir", str(folders / "data"), "--device", "cpu", "--max_train_steps", "5"])
    for method, same in (("padim", True), ("patchcore", True), ("autoencoder", False)):
        assert (compare.marks_of(method, "brick", pipeline, more) == mark(method, pipeline)) is same

    before = {method: mark(method, pipeline) for method in ("rad", "padim")}
    monkeypatch.setattr(evaluation, "version", lambda name: "another")
    assert {name for name, value in mark("rad", pipeline).items() if value != before["rad"][name]} == {"code"}
    assert mark("padim", pipeline) == before["padim"]


@pytest.mark.parametrize("method", ["padim", "padim_coarse", "patchcore", "autoencoder", "denoising_autoencoder"])
def test_a_reloaded_peer_gives_the_same_maps(method, pipeline, images, tmp_path):
    flags = ("--coreset_ratio", "0.1", "--max_train_steps", "2")
    peer, fresh = new_peer(method, pipeline, *flags), new_peer(method, pipeline, *flags)
    peer.fit(images)
    save_file(peer.state_dict(), tmp_path / "peer.safetensors")
    fresh.load(load_file(tmp_path / "peer.safetensors"))
    with torch.no_grad():
        (maps, score), (again, score_again) = (p(to_input(images[:1])) for p in (peer, fresh))
    assert torch.equal(maps, again) and score == score_again


def test_a_run_repeats_itself(folders, tmp_path):
    flags = ["--model", str(folders / "model"), "--data_dir", str(folders / "data"), "--device", "cpu"]
    args = compare.parse_args([*flags, "--output_dir", str(tmp_path), "--coreset_ratio", "0.1"])
    records = []
    for _ in range(2):
        compare.fit("patchcore", {"brick": {}}, args)
        compare.score("patchcore", {"brick": {}}, args)
        records.append(json.loads((tmp_path / "patchcore-brick.json").read_text()))
    assert records[0]["accuracy"] == records[1]["accuracy"]
    assert {path.name for path in tmp_path.iterdir()} == {"patchcore-brick.safetensors", "patchcore-brick.json"}


def test_the_figures_names_do_not_overlap():
    rows = [
        {"method": f"method {i}", "latency_ms": 10.0 * (i + 1), "aupro": 0.7, "image_auroc": 0.9 + 0.001 * i}
        for i in range(12)
    ]
    figure = compare.draw(rows)
    FigureCanvasAgg(figure).draw()
    for axis in figure.axes:
        assert sorted(text.get_text()[:9].strip() for text in axis.texts) == sorted(row["method"] for row in rows)
        boxes = sorted((Text.get_window_extent(text) for text in axis.texts), key=lambda box: box.y0)  # without lines
        assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))
        assert max(box.x1 for box in boxes) <= figure.bbox.x1


def test_methods_to_refit_must_be_among_those_to_measure(tmp_path):
    flags = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path), "--methods", "rad", "--refit", "padim"]
    with pytest.raises(ValueError, match="--refit names padim, but --methods only rad"):
        compare.main(compare.parse_args(flags))


def test_without_anomalib_one_sentence_before_anything_is_computed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = compare.parse_args(["--data_dir", str(tmp_path / "none"), "--methods", "padim", "draem"])
    with pytest.raises(ImportError, match="draem needs anomalib: pip install -r requirements-bench.txt"):
        compare.main(args)


def test_a_metric_that_the_images_do_not_define_is_a_dash_and_has_no_panel(rows):
    lacking = [row | dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro")) for row in rows]
    lines = compare.to_markdown(lacking, 2, ["gravel: AUPRO not defined: no mask."]).splitlines()
    assert lines[2].split(" | ")[2:5] == ["-", "-", "-"] and "gravel: AUPRO not defined: no mask." in lines
    figure = compare.draw(lacking)
    FigureCanvasAgg(figure).draw()
    assert [axis.get_ylabel() for axis in figure.axes] == ["image AUROC"]


def test_what_is_wrong_is_said_in_one_sentence(tmp_path, monkeypatch):
    flags = ["--data_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "output")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(compare.__file__, run_name="__main__")
    assert stopped.value.code == f"FileNotFoundError: The data folder {tmp_path / 'none'} does not exist."


def test_images_that_cannot_all_be_measured_are_refused_before_anything_is_computed(folders, tmp_path):
    data = shutil.copytree(folders / "data", tmp_path / "data")
    for path in (*data.glob("*/ground_truth"), *data.glob("*/test/good")):
        shutil.rmtree(path)
    flags = ["--model", str(folders / "model"), "--data_dir", str(data), "--output_dir", str(tmp_path / "output")]
    with pytest.raises(
        ValueError, match=r"Nothing can be measured .* gravel: image AUROC, AP and F1 not defined: no good image\."
    ):
        compare.main(compare.parse_args(flags))
    assert not list((tmp_path / "output").iterdir())


def test_a_process_that_is_killed_is_told_of(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "fit", kill_oneself)
    monkeypatch.setattr(compare.multiprocessing, "get_context", {"spawn": FORKS}.get)
    flags = ["--model", str(folders / "model"), "--data_dir", str(folders / "data"), "--methods", "padim"]
    with pytest.raises(OSError, match="The process for padim was killed"):
        compare.main(compare.parse_args([*flags, "--output_dir", str(tmp_path)]))


def kill_oneself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_draem_trains_and_scores(pipeline, images):
    pytest.importorskip("anomalib", reason=NEEDS_ANOMALIB)
    flags = ("--draem_width", "0.125", "--draem_train_steps", "3", "--train_batch_size", "2")
    peer = new_peer("draem", pipeline, *flags)
    before = [p.clone() for p in peer.model.parameters()]
    peer.fit(images)
    assert np.isfinite(peer.losses).all() and len(peer.losses) == 3
    assert all((p != q).any() for p, q in zip(peer.model.parameters(), before, strict=True) if p.ndim > 1)
    scored = peer.score([Image.new("RGB", (50, 40))], "brick")
    (maps,), (score,) = scored.maps["DRAEM"], scored.scores["DRAEM"]
    assert maps.shape == (40, 50) and 0 <= maps.min() and maps.max() <= 1 and 0 <= score <= 1
    again = new_peer("draem", pipeline, *flags)
    again.load(peer.state_dict())
    assert np.array_equal(again.score([Image.new("RGB", (50, 40))], "brick").maps["DRAEM"][0], maps)


def test_distances_are_those_of_anomalib(padim, patchcore, images):
    pytest.importorskip("anomalib", reason=NEEDS_ANOMALIB)
    from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    x = to_input(images[11:])
    inverse = padim.whitening.mT @ padim.whitening
    expected = AnomalyMapGenerator.compute_distance(padim.embedding(x), [padim.mean[..., 0].T, inverse])[:, 0]
    assert torch.allclose(padim.distance(x), expected, rtol=1e-3)

    model = PatchcoreModel(["blocks.1"], "tf_efficientnet_lite0", pre_trained=False)
    model.memory_bank = patchcore.memory
    patches = patchcore.patches(patchcore.embedding(x))
    distances, locations = model.nearest_neighbors(patches, 1)
    expected = model.compute_anomaly_score(distances[None], locations[None], patches)
    assert torch.allclose(patchcore(x)[1], expected, rtol=1e-3)
