"""The embedded checkpoints: what works with no network, out of the box."""

import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import size_of
from PIL import Image
from safetensors.numpy import load_file

from rad import RADPipeline
from rad.data.synthetic import CATEGORIES, render
from rad.pipeline_loading import EMBEDDED_DIR, EMBEDDED_MODELS

EXAMPLES = sorted((EMBEDDED_DIR / "examples").glob("*.png"))
PAPERS = sorted((EMBEDDED_DIR / "examples" / "paper").glob("*.png"))
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def synthetic():
    pipeline = RADPipeline.from_embedded("synthetic")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def paper():
    pipeline = RADPipeline.from_embedded("paper")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_size_and_card(name):
    folder = EMBEDDED_DIR / name
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) <= 24 * MEGABYTE
    assert (folder / "normality" / "diffusion_pytorch_model.safetensors").stat().st_size <= 10 * MEGABYTE
    card = (folder / "README.md").read_text()
    assert "accelerate launch training/train.py" in card and "--seed" in card and "AUPRO" in card


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_are_judged_right(synthetic, path):
    category, kind = path.stem.rsplit("_", 1)
    output = synthetic(path)
    assert output.category == [category]
    assert output.is_anomalous[0] == (kind != "good")
    assert bool(output.regions[0]) == (kind != "good")


@pytest.mark.parametrize("quality", [95, 60])
def test_good_parts_stay_good_as_jpeg(synthetic, paper, quality):
    """Pictures that no model has seen, one of each category, and the papers' good examples: one alarm at most."""
    rendered = [Image.fromarray(render(name, np.random.default_rng(99))[0]) for name in CATEGORIES]
    papers = [Image.open(path).convert("RGB") for path in PAPERS if path.stem.endswith("good")]
    alarms = 0
    for pipeline, images in ((synthetic, rendered), (paper, papers)):
        files = [io.BytesIO() for _ in images]
        for image, file in zip(images, files, strict=True):
            image.save(file, "JPEG", quality=quality)
        alarms += int(pipeline(files).is_anomalous.sum())
    assert len(rendered) == 8 and papers and alarms <= 1


def test_one_scratch_is_one_region(synthetic):
    output = synthetic(EMBEDDED_DIR / "examples" / "hex_nut_scratch.png")
    assert len(output.regions[0]) == 1 and output.mask[0].mean() < 0.05


@pytest.mark.parametrize("path", PAPERS, ids=[path.stem for path in PAPERS])
def test_papers_are_judged_right(paper, path):
    output = paper(path)
    assert output.is_anomalous[0] == (not path.stem.endswith("good"))
    assert bool(output.regions[0]) == (not path.stem.endswith("good"))


def test_photographs_of_others_are_named_with_their_licence():
    """CC BY asks for it wherever they are passed on."""
    for folder in (EMBEDDED_DIR / "examples" / "paper", EMBEDDED_DIR / "paper"):
        text = (folder / "README.md").read_text()
        assert "CC BY 4.0" in text and "Bianconi" in text and "Computers in Industry" in text


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
@pytest.mark.parametrize("mode", ["calibrated", "paper"])
def test_scores_and_maps_are_those_written_down(name, mode):
    """golden.safetensors holds what the code that saved each model gave of three examples: scores, and means of each
    map over 8 x 8 blocks. Other processors round otherwise, which log and variances magnify."""
    golden = load_file(Path(__file__).parent / "golden.safetensors")
    pipeline = RADPipeline.from_embedded(name)
    images = [EMBEDDED_DIR / "examples" / f"{stem}.png" for stem in ("brick_stain", "hex_nut_good", "hex_nut_scratch")]
    output = pipeline(images, mode=mode, map_size=(64, 64))
    known = [key.split("/")[-1] for key in golden if key.startswith(f"{name}/{mode}/score/")]
    assert set(output.scores) == set(known) and len(known) == {"calibrated": 8, "paper": 4}[mode]
    for score, values in output.scores.items():
        np.testing.assert_allclose(values, golden[f"{name}/{mode}/score/{score}"], rtol=1e-2, atol=1e-2)
    for score, values in output.maps.items():
        means = values.reshape(3, 8, 8, 8, 8).mean((2, 4))
        np.testing.assert_allclose(means, golden[f"{name}/{mode}/map/{score}"], rtol=1e-2, atol=1e-2)
    if mode == "calibrated":
        np.testing.assert_allclose(np.log(output.p_value), np.log(golden[f"{name}/p_value"]), rtol=1e-2, atol=1e-2)
        thresholds = [output.threshold, output.pixel_threshold, *output.false_alarm_interval]
        np.testing.assert_allclose(thresholds, golden[f"{name}/thresholds"], rtol=1e-6)


def test_mtd_model_finds_a_blot_on_a_plain_tile():
    pipeline = RADPipeline.from_embedded("mtd")
    tile = Image.fromarray(np.random.default_rng(0).normal(110, 3, (200, 160)).clip(0, 255).astype(np.uint8))
    blot = tile.copy()
    blot.paste(10, (60, 80, 90, 110))
    clean, spoiled = pipeline(tile), pipeline(blot)
    assert spoiled.score[0] > clean.score[0] and spoiled.is_anomalous[0]
    row, column = np.unravel_index((spoiled.anomaly_map[0] - clean.anomaly_map[0]).argmax(), (200, 160))
    assert 60 <= row <= 130 and 40 <= column <= 110


def command_line(monkeypatch, *arguments: object) -> int:
    """The exit status of `python -m rad`."""
    monkeypatch.setattr(sys, "argv", ["rad", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("rad", run_name="__main__")
    return stop.value.code


def test_the_exit_status_tells_a_good_part_from_an_error(tmp_path, monkeypatch, capsys):
    good = next(path for path in EXAMPLES if path.stem.endswith("good"))
    assert command_line(monkeypatch, good, "--output", tmp_path / "heatmap.png") == 0
    for wrong in (["nowhere.png"], [good, "--model", tmp_path], [good, "--false_alarm_rate", 2]):
        assert command_line(monkeypatch, *wrong, "--output", tmp_path / "other.png") == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "Error: " in line]
    assert len(told) == 3 and told[0] == "FileNotFoundError: There is no image file at nowhere.png."
    assert not (tmp_path / "other.png").exists()
    monkeypatch.setattr(RADPipeline, "load", lambda *_: 1 / 0)  # what nobody thought of
    assert command_line(monkeypatch, good) == 2 and "ZeroDivisionError" in capsys.readouterr().err


def test_command_line_scores_a_picture(tmp_path, monkeypatch, capsys):
    bad = next(path for path in EXAMPLES if not path.stem.endswith("good"))
    assert command_line(monkeypatch, bad, "--output", tmp_path / "out" / "heatmap.png") == 3
    told = capsys.readouterr().out
    assert "DEFECT" in told and "pixels, 8-bit" in told and str(tmp_path / "out" / "heatmap.png") in told
    assert size_of(tmp_path / "out" / "heatmap.png") == size_of(bad)
