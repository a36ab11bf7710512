"""Many pictures scored: one row each, whatever happens on the way."""

import csv
import json
import runpy
import sys
import zipfile
from itertools import islice

import numpy as np
import pytest
from conftest import rows_of
from PIL import Image
from processes import run_script_twice

from rad import command
from rad.data.inputs import list_inputs
from rad.image_reader import read
from rad.prediction import Outputs, Predictions, predict, settings_of, to_csv
from rad.visualization import encode_map


@pytest.fixture(scope="module")
def photos(good_images, tmp_path_factory):
    """Five good pictures, one of another size with a red patch, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(good_images[:5]):
        image.save(folder / f"{number}.png")
    pixels = np.array(good_images[0].resize((90, 50)))
    pixels[15:35, 20:50] = [250, 40, 40]
    Image.fromarray(pixels).save(folder / "5_bad.png")
    (folder / "6_broken.png").write_bytes(b"\x89PNG nothing")
    return folder


def run(*arguments):
    return command.main(command.parse_args([str(part) for part in arguments]))


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole_run(saved_pipeline, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(photos, "--model", saved_pipeline, "--output", folder, "--overlays", "--masks", "--maps", "png") == 4
    return folder


def test_rows_are_what_the_pipeline_says(pipeline, whole_run, photos):
    rows = rows_of(whole_run)
    assert [row["path"] for row in rows] == [str(path) for path in sorted(photos.iterdir())]
    for row in rows[:6]:
        output = pipeline(row["path"])
        assert row["verdict"] == ("defect" if output.is_anomalous[0] else "good") and row["error"] == ""
        assert row["score"] == pytest.approx(output.score[0], rel=1e-4, abs=1e-4)
        assert row["p_value"] == pytest.approx(output.p_value[0], rel=1e-2)
        assert len(row["regions"]) == len(output.regions[0]) and set(row["scores"]) == set(output.scores)
        assert row["anomalous_share"] == pytest.approx(output.mask[0].mean(), abs=1e-3) and row["seconds"] > 0
    assert rows[5]["verdict"] == "defect" and rows[5]["regions"][0]["area"] > 20


def test_a_file_that_is_no_picture_is_a_row_that_says_so(whole_run):
    row = rows_of(whole_run)[6]
    assert row["verdict"] == "error" and "is not an image" in row["error"] and row["score"] is None


def test_the_table_holds_the_same_rows(whole_run):
    with open(whole_run / "predictions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    rows = rows_of(whole_run)
    assert [row["path"] for row in table] == [row["path"] for row in rows]
    assert [row["verdict"] for row in table] == [row["verdict"] for row in rows]
    assert table[5]["regions"] == str(len(rows[5]["regions"])) and table[6]["p_value"] == ""


def test_pictures_are_written_at_the_picture_s_own_size(pipeline, whole_run, photos):
    output = pipeline(photos / "5_bad.png")
    shown = [read(whole_run / kind / photos.name / "5_bad.png") for kind in ("overlays", "masks", "maps")]
    assert shown[0].size == (90, 50)
    assert (np.asarray(shown[1])[..., 0] == 255 * output.mask[0]).mean() > 0.99
    expected = np.asarray(encode_map(output.anomaly_map[0])).astype(int)
    assert np.abs(shown[2][..., 0].astype(int) - expected).max() <= 2
    assert len(list(whole_run.glob("maps/**/*.png"))) == 6


def test_maps_can_be_arrays(pipeline, photos, tmp_path):
    sources = list_inputs([str(photos / "0.png"), str(photos / "1.png")]).sources
    rows = list(predict(pipeline, sources, folder=tmp_path, outputs=Outputs(maps="npy")))
    anomaly_map = np.load(tmp_path / "maps" / "1.npy")
    assert len(rows) == 2 and anomaly_map.dtype == np.float32 and anomaly_map.shape == (64, 64)


def test_good_pictures_alone_end_well(saved_pipeline, photos, tmp_path):
    assert run(photos / "0.png", photos / "5_bad.png", "--model", saved_pipeline, "--output", tmp_path) == 0
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("tail", ["", '{"path": "half of a ro'])
def test_an_interrupted_run_is_gone_on_with(pipeline, saved_pipeline, photos, whole_run, tmp_path, tail):
    """Killed after three rows, or while it wrote the fourth: no row is lost, and none is there twice."""
    outputs = Outputs(overlays=True, masks=True, maps="png")
    predictions = Predictions(tmp_path, settings_of(pipeline, None, None, outputs))
    with_rows = predictions.append(predict(pipeline, list_inputs([str(photos)]).sources))
    assert len(list(islice(with_rows, 3))) == 3
    with_rows.close()
    with open(tmp_path / "predictions.jsonl", "a") as file:
        file.write(tail)
    assert run(photos, "--model", saved_pipeline, "--output", tmp_path, "--overlays", "--masks", "--maps", "png") == 4
    rows = rows_of(tmp_path)
    assert [row["path"] for row in rows] == [row["path"] for row in rows_of(whole_run)]
    assert (tmp_path / "predictions.csv").read_text() == to_csv(rows, heading=True).replace("\r\n", "\n")


def test_several_processes_end_with_the_rows_of_one(pipeline, photos, whole_run, tmp_path):
    sources = list_inputs([str(photos)]).sources
    for rank in (0, 1):
        predictions = Predictions(tmp_path, {}, rank=rank, num_processes=2)
        assert len(list(predictions.append(predict(pipeline, sources[rank::2])))) == (4, 3)[rank]
    merged = Predictions(tmp_path, {}).merge([source.name for source in sources])
    assert merged == rows_of(tmp_path) and len(list(tmp_path.glob("*.jsonl"))) == 1
    for row, expected in zip(without_time(merged), without_time(rows_of(whole_run)), strict=True):
        assert row["path"] == expected["path"] and row["verdict"] == expected["verdict"]
        if row["verdict"] == "error":
            assert row == expected
        else:
            assert row["score"] == pytest.approx(expected["score"], rel=1e-4, abs=1e-4)


def test_two_processes_share_the_work(saved_pipeline, photos, whole_run, tmp_path):
    """The script as `accelerate launch` runs it."""
    pictures = sorted(photos.glob("[0-5]*.png"))
    run_script_twice(
        "training/predict.py", *pictures, "--model", saved_pipeline, "--output", tmp_path, "--device", "cpu"
    )
    rows, expected = rows_of(tmp_path), rows_of(whole_run)[:6]
    assert [(row["path"], row["verdict"]) for row in rows] == [(row["path"], row["verdict"]) for row in expected]
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in expected], rel=1e-3, abs=1e-3)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["predictions.jsonl"]


def test_two_runs_in_one_folder_are_one_too_many(saved_pipeline, photos, tmp_path):
    flags = (photos / "0.png", "--model", saved_pipeline, "--output", tmp_path)
    with command.only_run(tmp_path), pytest.raises(ValueError, match="Another run writes to .*: wait until it ends"):
        run(*flags)
    assert not list(tmp_path.glob("predictions*"))
    assert run(*flags) == 0


def test_predictions_of_another_model_are_not_mixed_in(saved_pipeline, photos, whole_run, tmp_path):
    flags = (photos / "0.png", "--model", saved_pipeline, "--output", tmp_path)
    run(*flags)
    with pytest.raises(ValueError, match="with another false_alarm_rate"):
        run(*flags, "--false_alarm_rate", 0.3)
    assert run(*flags, "--false_alarm_rate", 0.3, "--overwrite") == 0 and len(rows_of(tmp_path)) == 1


def test_a_picture_that_does_not_fit_costs_no_other_its_row(pipeline, good_images, tmp_path):
    """One of 12 bits among those of 8, for which this model has no range."""
    good_images[0].save(tmp_path / "0.png")
    Image.fromarray(np.full((64, 64), 3000, np.uint16)).save(tmp_path / "1.png")
    good_images[1].save(tmp_path / "2.png")
    rows = list(predict(pipeline, list_inputs([str(tmp_path)]).sources))
    alone = [pipeline(tmp_path / f"{i}.png").score[0] for i in (0, 2)]
    assert [rows[i]["score"] for i in (0, 2)] == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert [row["verdict"] == "error" for row in rows] == [False, True, False] and rows[1]["error"]


def test_pictures_of_another_run_keep_theirs(saved_pipeline, good_images, tmp_path):
    """Two folders of the same name, one after the other into the same output."""
    for number, place in enumerate(("monday", "tuesday")):
        (tmp_path / place / "line").mkdir(parents=True)
        good_images[number].save(tmp_path / place / "line" / "0.png")
        assert (
            run(tmp_path / place / "line", "--model", saved_pipeline, "--output", tmp_path / "out", "--overlays") == 0
        )
    rows = rows_of(tmp_path / "out")
    shown = [read(tmp_path / "out" / "overlays" / f"{row['place']}.png") for row in rows]
    assert len(rows) == 2 and not np.array_equal(np.asarray(shown[0]), np.asarray(shown[1]))


def test_what_failed_is_tried_again(saved_pipeline, good_images, tmp_path):
    """A picture that was being copied when it was read: its row gives way, and stands once."""
    good_images[0].save(tmp_path / "0.png")
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[:100])
    flags = (tmp_path / "0.png", tmp_path / "1.png", "--model", saved_pipeline, "--output", tmp_path / "out")
    assert run(*flags) == 4
    (tmp_path / "1.png").write_bytes(content)
    assert run(*flags) == 0
    rows = rows_of(tmp_path / "out")
    assert [row["verdict"] for row in rows] == [rows[0]["verdict"]] * 2 and not rows[1]["error"]
    assert (tmp_path / "out" / "predictions.csv").read_text().count("1.png") == 1


def test_an_unknown_category_is_refused_before_a_row_is_written(saved_pipeline, photos, tmp_path):
    with pytest.raises(ValueError, match="typo"):
        run(photos, "--model", saved_pipeline, "--output", tmp_path, "--category", "typo")
    assert not list(tmp_path.iterdir())


def test_names_of_no_encoding_are_rows_too(pipeline, good_images, tmp_path):
    good_images[0].save(tmp_path / "a.png")
    source = list_inputs([str(tmp_path / "a.png")]).sources[0]
    strange = type(source)("gr\udcfcn.png", source.fetch, "gr_n")
    predictions = Predictions(tmp_path / "out", {})
    assert len(list(predictions.append(predict(pipeline, [strange])))) == 1
    predictions.merge([strange.name])
    assert list(Predictions(tmp_path / "out", {}).rows()) == [strange.name]


def test_the_output_folder_is_no_input_and_other_files_in_it_stay(saved_pipeline, good_images, tmp_path):
    good_images[0].save(tmp_path / "0.png")
    out = tmp_path / "out"
    for _ in range(2):
        assert run(tmp_path, "--model", saved_pipeline, "--output", out, "--overlays", "--masks") == 0
        assert [row["path"] for row in rows_of(out)] == [str(tmp_path / "0.png")]
        (out / "predictions-backup.jsonl").write_text("mine")
    assert run(tmp_path, "--model", saved_pipeline, "--output", out, "--overwrite") == 0
    assert (out / "predictions-backup.jsonl").read_text() == "mine"


def test_names_lead_to_no_other_folder(pipeline, good_images, tmp_path):
    good_images[0].save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in ("../../../escape.png", "C:\\escape.png", "=cmd.png"):
            archive.write(tmp_path / "a.png", name)
    found = list_inputs([str(tmp_path / "photos.zip")])
    rows = list(predict(pipeline, found.sources, folder=tmp_path / "out", outputs=Outputs(masks=True)))
    found.close()
    assert len(rows) == 3 and len(list((tmp_path / "out").rglob("*.png"))) == 3
    assert len(list(tmp_path.rglob("*.png"))) == 4 and not list(tmp_path.parent.glob("*escape*"))
    assert to_csv([rows[0] | {"path": "=cmd"}]).startswith("'=cmd")


def test_memory_holds_a_few_batches(pipeline, photos):
    """However many pictures there are, those of three batches are read ahead at most."""
    sources = list_inputs([str(photos / f"{i % 5}.png") for i in range(5)]).sources * 20
    read = []
    counted = [type(source)(source.name, lambda s=source: (read.append(1), s.fetch())[1]) for source in sources]
    rows = predict(pipeline, counted, batch_size=2)
    next(rows)
    assert len(read) <= 3 * 2
    rows.close()


def test_the_command_line_knows_it(monkeypatch, photos, saved_pipeline, tmp_path):
    flags = ["--model", str(saved_pipeline), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["rad", "predict", str(photos / "0.png"), *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("rad", run_name="__main__")
    assert stop.value.code == 0 and len(rows_of(tmp_path)) == 1
    assert json.loads((tmp_path / "predictions-settings.json").read_text())["model"]


def test_a_model_without_statistics_is_refused(small_pipeline_without_normality):
    with pytest.raises(ValueError, match="fit_normality"):
        settings_of(small_pipeline_without_normality, 0.01, None, Outputs())
