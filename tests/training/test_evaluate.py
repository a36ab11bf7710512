"""Evaluation as a user runs it: however often interrupted and on several processes, and what the report says."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import evaluate
import numpy as np
import pytest
from accelerate.state import PartialState
from conftest import size_of
from PIL import Image
from processes import run_script_twice
from safetensors.numpy import load_file
from scipy.stats import binom
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from rad import RADPipeline, evaluation
from rad.data import AnomalyDataset, Sample, load_dataset
from rad.data.defects import DEFECTS, add_defect
from rad.data.drawn import DrawnDefects
from rad.data.masks import resize_mask
from rad.data.synthetic import write_synthetic
from rad.evaluation import alpha_sweep, measure_decisions, score_dataset
from rad.metrics import aupro
from rad.report import draw_category

CATEGORIES = ("brick", "capsule")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Two categories; one defective image's name is an attack on the report, one has no mask."""
    root = write_synthetic(
        tmp_path_factory.mktemp("data") / "synthetic",
        categories=CATEGORIES,
        num_train=10,
        num_test_good=3,
        num_per_defect=1,
        size=64,
    )
    defects = sorted(path.name for path in (root / "brick" / "test").iterdir() if path.name != "good")
    folder, masks = root / "brick" / "test" / defects[0], root / "brick" / "ground_truth" / defects[0]
    (folder / "000.png").rename(folder / "<script>alert(1)<∕script>|.png")
    (masks / "000_mask.png").rename(masks / "<script>alert(1)<∕script>|_mask.png")
    (root / "capsule" / "ground_truth" / defects[1] / "000_mask.png").unlink()
    return root


@pytest.fixture(scope="module")
def model(two_category_pipeline, data_dir, tmp_path_factory):
    """A pipeline of those categories, saved."""
    folder = tmp_path_factory.mktemp("model")
    two_category_pipeline.save_pretrained(folder)
    pipeline = RADPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    samples = load_dataset(data_dir).samples
    pipeline.fit_normality(
        [sample.image for sample in samples],
        categories=[sample.category for sample in samples],
        gaussian_channels=16,
    )
    pipeline.save_pretrained(folder)
    return folder


def flags(model, data_dir, output_dir, *more) -> list[str]:
    common = ["--model", model, "--data_dir", data_dir, "--map_size", "32", "--output_dir", output_dir]
    return [str(flag) for flag in (*common, *more)]


def run(*args) -> dict:
    """The script in this process."""
    PartialState._reset_state()
    return evaluate.main(evaluate.parse_args(flags(*args)))


def records_of(folder) -> dict[str, dict[str, np.ndarray]]:
    """All tensors of all records, by file name."""
    return {path.name: load_file(path) for path in (folder / "records").iterdir()}


def assert_same_results(first, second, but=()) -> None:
    """results.json is the same but for times and the given entries."""
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (first, second))
    for results in (first, second):
        results["arguments"].pop("output_dir")
        for name in ("seconds_per_image", *but):
            results.pop(name)
    assert first == second


@pytest.fixture(scope="module")
def whole(model, data_dir, tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(model, data_dir, folder)
    return folder


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_maps_on_disk(whole, model, data_dir):
    results, dataset = json.loads((whole / "results.json").read_text()), load_dataset(data_dir, split="test")
    same = {"map_size": 32, "mode": "calibrated", "num_noise_samples": None, "seed": None}
    pipeline, indices = RADPipeline.from_pretrained(model), range(len(dataset))
    stored = [load_file(r.path) for r in score_dataset(pipeline, dataset, indices, whole / "records", **same)]
    of = [i for i, sample in enumerate(dataset.samples) if sample.category == "capsule"]
    masks = {i: dataset.mask(i, (32, 32)) for i in of}
    of = [i for i in of if masks[i] is not None]
    truth = np.stack([masks[i] for i in of])
    for name in ("fused", "pixel", "feature", "mahalanobis", "rgb"):
        maps = np.stack([stored[i][name] for i in of]).astype(np.float32)
        row = results["scores"][name]["categories"]["capsule"]
        assert np.isclose(row["pixel_auroc"], roc_auc_score(truth.ravel(), maps.ravel()))
        assert np.isclose(row["pixel_ap"], average_precision_score(truth.ravel(), maps.ravel()))
        precision, recall, _ = precision_recall_curve(truth.ravel(), maps.ravel())
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        assert np.isclose(row["pixel_f1_max"], f1.max())
        assert np.isclose(row["aupro"], aupro(maps, truth), rtol=1e-9) and 0 < row["aupro_0.05"] < 1
        rows = results["scores"][name]["categories"].values()
        assert np.isclose(results["scores"][name]["mean"]["aupro"], np.mean([row["aupro"] for row in rows]))


def test_scores_and_decisions_are_the_pipelines_own(whole, model, data_dir):
    results, dataset = json.loads((whole / "results.json").read_text()), load_dataset(data_dir, split="test")
    pipeline = RADPipeline.from_pretrained(model)
    names = [sample.category for sample in dataset.samples]
    output = pipeline([s.image for s in dataset.samples], class_labels=names, false_alarm_rate=0.1)
    labels = np.array([sample.label for sample in dataset.samples])
    for i, category in enumerate(CATEGORIES):
        of = np.array(names) == category
        auroc = roc_auc_score(labels[of], output.score[of])
        assert np.isclose(results["scores"]["fused"]["categories"][category]["image_auroc"], auroc), i
    row = results["scores"]["fused"]["decisions"]["all"][-1]
    assert row["false_alarm_rate"] == 0.1 and row["num_good"] == 6
    assert row["false_alarms"] == output.is_anomalous[labels == 0].sum()
    assert row["found"] == output.is_anomalous[labels == 1].sum()
    assert np.isclose(results["thresholds"]["brick"]["fused"]["image"]["0.1"], output.threshold)


def test_kinds_of_defect_stand_beside_all_good_images(whole):
    results = json.loads((whole / "results.json").read_text())
    rows = results["scores"]["fused"]["defects"]["brick"]
    assert len(rows) > 2 and all({"image_auroc", "pixel_ap", "aupro"} <= set(row) for row in rows.values())
    without_mask = [row for row in results["scores"]["fused"]["defects"]["capsule"].values() if "aupro" not in row]
    assert len(without_mask) == 1 and "image_auroc" in without_mask[0]


@pytest.mark.parametrize(
    ("remove", "told", "missing"),
    [
        (
            "brick/test/[!g]*",
            "image AUROC, AP and F1, pixel AUROC, AP, F1 and AUPRO not defined: no defective image",
            7,
        ),
        ("brick/test/good", "image AUROC, AP and F1 not defined: no good image", 3),
        ("brick/ground_truth", "pixel AUROC, AP, F1 and AUPRO not defined: no defective image with a mask", 4),
    ],
    ids=["only good", "only bad", "no masks"],
)
def test_what_is_not_defined_is_said_in_every_result(model, data_dir, tmp_path, capsys, remove, told, missing):
    shutil.copytree(data_dir / "brick", tmp_path / "data" / "brick")
    for path in (tmp_path / "data").glob(remove):
        shutil.rmtree(path)
    run(model, tmp_path / "data", tmp_path / "out", *["--figures"] * (missing == 7))
    text = (tmp_path / "out" / "results.json").read_text()
    results, (report, table) = (
        json.loads(text),
        ((tmp_path / "out" / n).read_text() for n in ("report.html", "results.md")),
    )
    assert "NaN" not in text and "Infinity" not in text
    assert not re.search(r"\bnan\b", report + table, re.IGNORECASE)
    row = results["scores"]["fused"]["categories"]["brick"]
    assert sum(value is None for value in row.values()) >= missing and set(row) == set(
        results["scores"]["fused"]["mean"]
    )
    assert told.split(": ")[1] in results["truth"]["undefined"]["brick"].values()
    assert told in capsys.readouterr().out and told in report and told in table


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append(dict(attributes))


def test_the_report_stands_alone_and_escapes_names(whole):
    text = (whole / "report.html").read_text()
    page = Page(text)
    assert "&lt;script&gt;alert(1)" in text and "script" not in page.tags
    pictures = [a for tag, a in zip(page.tags, page.attributes, strict=True) if tag == "img"]
    assert len(pictures) > 20 and all(a["src"].startswith("data:image/") and a["alt"] for a in pictures)
    assert "link" not in page.tags and not any("href" in a for a in page.attributes) and "url(" not in text
    assert len(text) < 3_000_000


def test_names_cannot_break_a_markdown_table(whole):
    from rad.report import Table

    table = Table("a\n# b", "", ["name", "value"], [["<b>|\nx", "![](https://a.b/c_d.png)"]])
    assert table.to_markdown().splitlines()[0] == "## a # b"
    assert table.to_markdown().splitlines()[-1] == r"| &lt;b&gt;\| x | !\[\](https://a.b/c\_d.png) |"
    assert "| fused | " in (whole / "results.md").read_text()


# -- interruption, several processes ----------------------------------------------------------------------------------


def test_interrupted_and_resumed_gives_the_same(whole, model, data_dir, tmp_path, monkeypatch):
    saved, save_file = [], evaluation.save_file

    def failing(tensors, path, metadata):
        if len(saved) == 7:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        saved.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(evaluation, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        run(model, data_dir, tmp_path)
    monkeypatch.undo()
    assert len(list((tmp_path / "records").iterdir())) == 7 and not (tmp_path / "results.json").exists()
    (tmp_path / "records" / ".partial-7-a.safetensors").write_bytes(b"half")  # of a process that was killed

    run(model, data_dir, tmp_path)
    first, second = records_of(tmp_path), records_of(whole)
    assert first.keys() == second.keys()  # nothing half-written is left
    assert all(np.array_equal(first[name][k], second[name][k]) for name in second for k in second[name])
    assert_same_results(tmp_path, whole)


def test_a_second_run_scores_nothing_and_other_settings_do_not_mix(whole, model, data_dir, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "results")
    before = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    run(model, data_dir, folder, "--batch_size", "3", "--category", "brick")
    assert {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()} == before
    count = sum(s.category == "brick" for s in load_dataset(data_dir, split="test").samples)
    for number, seed in enumerate(("0", "1"), start=1):
        run(model, data_dir, folder, "--category", "brick", "--mode", "paper", "--seed", seed)
        assert len(list((folder / "records").iterdir())) - len(before) == number * count


def test_other_noise_than_the_statistics_have_is_refused_in_one_sentence(model, data_dir, tmp_path):
    for flag, value in (("--seed", "1"), ("--num_noise_samples", "2")):
        with pytest.raises(ValueError, match="fit"):
            run(model, data_dir, tmp_path, flag, value)


def test_a_record_depends_on_model_image_and_mask(two_category_pipeline, small_pipeline_without_normality, tmp_path):
    def names(pipeline, pixels, mask, **settings):
        dataset = AnomalyDataset([Sample(Image.fromarray(pixels), "brick", "bad", Image.fromarray(mask))])
        return score_dataset(pipeline, dataset, [0], tmp_path, map_size=16, **settings)[0].path.name

    PartialState._reset_state()
    pixels, mask = np.full((64, 64, 3), 100, np.uint8), np.eye(16, dtype=bool)
    same = names(two_category_pipeline, pixels, mask)
    assert names(two_category_pipeline, pixels.copy(), mask.copy()) == same
    others = [
        names(two_category_pipeline, pixels + 1, mask),
        names(two_category_pipeline, pixels, ~mask),
        names(two_category_pipeline, pixels, mask, infer_category=True),
        names(two_category_pipeline, pixels, mask, mode="paper"),
        names(small_pipeline_without_normality, pixels, mask, mode="paper"),
    ]
    assert len({same, *others}) == 6


def test_a_record_depends_on_code_and_libraries(two_category_pipeline, tmp_path, monkeypatch):
    def now() -> str:
        return evaluation.fingerprint(two_category_pipeline, []).hexdigest()

    source, seen = tmp_path / "rad", [now()]
    shutil.copytree(evaluation.SOURCE, source, ignore=shutil.ignore_patterns("pretrained", "__pycache__"))
    monkeypatch.setattr(evaluation, "SOURCE", source)
    assert now() == seen[0]
    for name in (
        "evaluation.py",
        "image_reader.py",
        "image_processor.py",
        "pipeline_rad.py",
        "pipeline_output.py",
        "scheduler_rad.py",
        "models/evidence.py",
        "models/normality.py",
        "models/gaussian.py",
        "models/false_alarms.py",
        "models/unet_rad.py",
        "models/feature_extractor.py",
        "models/discriminator.py",
    ):
        (source / name).write_text((source / name).read_text() + "# changed\n")
        seen.append(now())
    (source / "report.py").write_text("")  # shows numbers and makes none
    assert now() == seen[-1]
    for library in ("torch", "numpy", "pillow", "scipy", "scikit-learn", "timm", "diffusers"):
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "version", {**dict.fromkeys(evaluation.LIBRARIES, "1"), library: "2"}.get)
            seen.append(now())
    assert len(set(seen)) == len(seen) == 1 + 13 + 7


def test_a_damaged_record_is_named(whole, model, data_dir, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "results")
    path = sorted((folder / "records").iterdir())[0]
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(OSError, match=f"{path.name} is damaged .* delete it, and run again"):
        run(model, data_dir, folder)


def test_two_processes_do_what_one_does(whole, model, data_dir, tmp_path):
    run_script_twice("training/evaluate.py", *flags(model, data_dir, tmp_path, "--category", "brick"))
    first, second = records_of(tmp_path), records_of(whole)
    assert len(first) == sum(s.category == "brick" for s in load_dataset(data_dir, split="test").samples)
    for name, tensors in first.items():
        assert all(np.allclose(tensors[key], second[name][key], atol=0.02) for key in tensors), name
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, whole))
    assert "processes: 2" in first["device"]
    for name, score in first["scores"].items():
        row, alone = score["categories"]["brick"], second["scores"][name]["categories"]["brick"]
        assert row.keys() == alone.keys() and all(np.isclose(row[key], alone[key], atol=2e-3) for key in row)


# -- the paper --------------------------------------------------------------------------------------------------------


def test_the_alpha_sweep_meets_the_pipelines_own_fused_score(two_category_pipeline, data_dir, tmp_path):
    PartialState._reset_state()
    dataset = load_dataset(data_dir, split="test", categories=["brick"])
    indices = range(len(dataset))
    records = score_dataset(
        two_category_pipeline, dataset, indices, tmp_path, map_size=64, mode="paper", at_resolution=True
    )
    output = two_category_pipeline(
        [s.image for s in dataset.samples], class_labels=[s.category for s in dataset.samples], mode="paper"
    )
    fused = np.stack([0.5 * r.map("pixel") + 0.5 * r.map("feature") for r in records])
    assert np.allclose(fused, output.anomaly_map, rtol=2e-3, atol=2e-3)
    own = roc_auc_score([s.label for s in dataset.samples], output.score)
    masks = np.stack([dataset.mask(i, (64, 64)) for i in indices])
    found = alpha_sweep(records, 0.5)
    assert np.isclose(found["image_auroc"], own)
    assert np.isclose(found["aupro"], aupro(output.anomaly_map, masks), atol=1e-3)
    assert np.isclose(
        alpha_sweep(records, 1.0)["pixel_auroc"], roc_auc_score(masks.ravel(), output.maps["pixel"].ravel()), atol=1e-3
    )


def test_figures_and_the_papers_table(model, data_dir, tmp_path, capsys):
    results = run(model, data_dir, tmp_path, "--mode", "paper", "--figures", "--category", "brick")
    assert list(results["alpha_sweep"]) == [f"{alpha:g}" for alpha in np.arange(11) / 10]
    for name in ("methods", "kl_and_fused", "alpha_sweep", "restoration"):
        assert size_of(tmp_path / "figures" / f"{name}.png")[0] > 400
    told = capsys.readouterr().out
    assert "| RAN | 96.7 | 93.7 | published, MVTec-AD |" in told
    assert "cannot be compared" in told and "this run, OTHER DATA" in told
    mean = results["scores"]["fused"]["mean"]
    assert f"| {100 * mean['pixel_auroc']:.1f} | {100 * mean['aupro']:.1f} | this run" in told


def test_a_model_for_each_category(model, data_dir, tmp_path):
    for category in CATEGORIES:
        (tmp_path / f"model-{category}").symlink_to(model)
    results = run(tmp_path / "model-{category}", data_dir, tmp_path / "results", "--max_test_samples", "8")
    assert list(results["thresholds"]) == list(CATEGORIES)
    with pytest.raises(SystemExit):
        evaluate.parse_args(flags(tmp_path / "model-{category}", data_dir, tmp_path, "--unified"))


# -- details ----------------------------------------------------------------------------------------------------------


def test_any_method_can_keep_records(data_dir, tmp_path):
    """Maps of any size, as exact as asked for; what was found once is not looked for again."""
    PartialState._reset_state()
    dataset, asked = load_dataset(data_dir, split="test", categories=["brick"]), []

    def score(images, category):
        asked.append((len(images), category))
        maps = [np.full((8, 16), 1 + 1e-6, np.float32) for _ in images]
        return evaluation.Scored({"even": maps}, {"even": np.arange(len(images)), "global": np.ones(len(images))})

    given = (score, hashlib.sha256(b"a method"), dataset, range(5), tmp_path)
    records = evaluation.keep_records(*given, map_size=32, batch_size=3, dtype=np.float32)
    assert asked == [(3, "brick"), (2, "brick")] and [r.index for r in records] == [0, 1, 2, 3, 4]
    for record, number in zip(records, (0, 1, 2, 0, 1), strict=True):
        assert record.scores == {"even": number, "global": 1} and record.p_values == {} and not record.used_category
        assert record.map("even").shape == (32, 32) and (record.map("even") == np.float32(1 + 1e-6)).all()
        assert np.array_equal(record.mask(), dataset.mask(record.index, (32, 32)))
    assert evaluation.keep_records(*given, map_size=32, batch_size=2, dtype=np.float32) == records and len(asked) == 2
    evaluation.keep_records(*given, map_size=32)
    assert len(asked) == 4  # half precision is another record


def test_metrics_of_images_some_of_whose_masks_are_not_known():
    rng = np.random.default_rng(0)
    masks = [np.zeros((8, 8), bool), rng.random((8, 8)) > 0.7, None, np.zeros((8, 8), bool)]
    truths = [evaluation.Truth(i, "a", ("good", "hole", "hole", "good")[i], mask) for i, mask in enumerate(masks)]
    maps, scores = rng.random((4, 8, 8)), [0.1, 0.4, 0.3, 0.35]
    found, known = evaluation.measure(truths, scores, maps), [0, 1, 3]
    truth = np.stack([masks[i] for i in known])
    assert found["image_auroc"] == 0.75
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(truth.ravel(), maps[known].ravel()))
    assert found["aupro"] == pytest.approx(aupro(maps[known], truth))
    assert set(evaluation.measure(truths, scores)) == {"image_auroc", "image_ap", "image_f1_max"}
    assert evaluation.measure([truths[0], truths[3]], scores[:2], maps[:2]) == {}


def test_drawn_defects_stand_beside_the_good_images_that_they_are_drawn_on(data_dir):
    good = load_dataset(data_dir, split="train", categories=["brick"])
    drawn = DrawnDefects(good, 4, seed=3)
    picked = [0, 3, 6, 9]
    assert [sample.defect for sample in drawn.samples] == [x for kind in DEFECTS[:4] for x in ("good", kind)]
    for position, i in enumerate(picked):
        assert drawn[2 * position].image == good.samples[i].image and not drawn.mask(2 * position, (48, 32)).any()
        rng, pixels = np.random.default_rng([3, i]), np.asarray(Image.open(good.samples[i].image).convert("RGB"))
        bad, mask = add_defect(pixels, DEFECTS[position], rng.uniform(0.1, 1.0), rng)
        found = drawn[2 * position + 1]
        assert np.array_equal(np.asarray(found.image), bad) and found.category == "brick"
        assert np.array_equal(drawn.mask(2 * position + 1), mask)
        assert np.array_equal(drawn.mask(2 * position + 1, (48, 32)), resize_mask(mask, (48, 32)))


def test_the_report_claims_no_rarer_p_value_than_the_good_images_bear_out(whole, model, data_dir):
    results, normality = json.loads((whole / "results.json").read_text()), RADPipeline.from_pretrained(model).normality
    resolution = normality.p_value_resolution
    for thresholds in results["thresholds"].values():
        assert thresholds["p_value_resolution"] == resolution == 1 / (10 * normality.config.num_scores)
        for name in normality.score_types:
            assert thresholds[name]["heat_range"] == list(normality.heat_range(name))
        assert "heat_range" not in thresholds["global"]
    dataset = load_dataset(data_dir, split="test")
    bad = [i for i, sample in enumerate(dataset.samples) if sample.label]
    same = {"map_size": 32, "mode": "calibrated", "num_noise_samples": None, "seed": None}
    records = score_dataset(RADPipeline.from_pretrained(model), dataset, bad, whole / "records", **same)
    records = [replace(r, p_values={"fused": p}) for r, p in zip(records[:2], (1e-9, 0.031), strict=True)]
    pictures = draw_category(dataset, records, {}, results["thresholds"]["brick"], 0.05)["Clearest defects"]
    assert sorted(re.search("found, (.*), score", picture.caption)[1] for picture in pictures) == [
        "p < 0.005",
        "p = 0.031",
    ]


def test_defects_pasted_on_training_images_and_the_papers_figures_of_calibrated_scores(model, data_dir, tmp_path):
    more = ("--pasted_defects", "4", "--category", "brick", "--restore", "1", "--figures", "--map_size", "48")
    results = run(model, data_dir, tmp_path, *more)
    assert results["num_good"] == results["num_anomalous"] == 4 and results["alpha_sweep"]["0.5"]["aupro"] > 0
    restored = results["restoration"]
    assert size_of(tmp_path / "figures" / "restored.png") == (2 * 160 + 20, 160 + 40)
    assert restored["num_images"] == 1 and 0 < restored["psnr_inside_mask_median_db"] < 60
    assert restored["psnr_inside_mask_median_db"] < restored["psnr_outside_mask_median_db"]
    methods, paper = (size_of(tmp_path / "figures" / f"{name}.png") for name in ("methods", "kl_and_fused"))
    assert methods[0] > paper[0]  # more scores than the paper's


def test_unreadable_images_are_left_out_only_when_asked_and_named_from_the_data_folder_on(
    model, data_dir, tmp_path, capsys
):
    root = tmp_path / "parts"
    shutil.copytree(data_dir / "capsule", root / "capsule")
    cut = root / "capsule" / "test" / "good" / "001.png"
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"capsule/test/good/001\.png is truncated"):
        run(model, root, tmp_path / "results")
    assert not (tmp_path / "results" / "results.json").exists()
    results = run(model, root, tmp_path / "results", "--skip_unreadable")
    assert results["num_good"] == 2
    (told,) = results["truth"]["unreadable"]
    assert told.startswith("parts/capsule/test/good/001.png is truncated") and str(tmp_path) not in told
    assert f"Not measured: {cut} is truncated" in capsys.readouterr().out
    for name in ("results.md", "report.html"):
        assert "cannot be read: 1 images or masks" in (tmp_path / "results" / name).read_text()


def test_a_data_set_of_the_hub(whole, model, data_dir, tmp_path):
    datasets = pytest.importorskip("datasets")
    tree = load_dataset(data_dir, split="test", categories=["brick"])
    kinds = sorted({sample.defect for sample in tree.samples}, key=lambda kind: (kind != "good", kind))
    columns = {
        "photo": [{"bytes": sample.image.read_bytes(), "path": None} for sample in tree.samples],
        "truth": [s.mask and {"bytes": s.mask.read_bytes(), "path": None} for s in tree.samples],
        "kind": [kinds.index(sample.defect) for sample in tree.samples],
        "part": ["brick"] * len(tree),
    }
    features = datasets.Features(
        photo=datasets.Image(),
        truth=datasets.Image(),
        kind=datasets.ClassLabel(names=kinds),
        part=datasets.Value("string"),
    )
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "rows" / "test.parquet")
    of = ["--dataset_name", tmp_path / "rows", "--image_column", "photo", "--mask_column", "truth"]
    of += ["--label_column", "kind", "--category_column", "part", "--map_size", "32"]
    PartialState._reset_state()
    flags = ["--model", model, *of, "--output_dir", tmp_path / "results"]
    results = evaluate.main(evaluate.parse_args([str(flag) for flag in flags]))
    alone = json.loads((whole / "results.json").read_text())["scores"]["fused"]
    assert results["scores"]["fused"]["categories"]["brick"] == alone["categories"]["brick"]
    assert results["scores"]["fused"]["defects"]["brick"] == alone["defects"]["brick"]


def test_intervals_of_decisions():
    def records(p_values, defect):
        return [evaluation.Record(Path(), 0, "a", defect, {}, {"fused": p}, "a", True, 0.0) for p in p_values]

    p_values = (np.arange(200) + 0.5) / 200  # uniform, as p-values of good images are
    rows = measure_decisions(records(p_values, "good") + records([1e-3, 0.5], "hole"), "fused", (0.05, 0.1), 30)
    for row, rate in zip(rows, (0.05, 0.1), strict=True):
        assert row["false_alarms"] == round(200 * rate) and row["inside"] and row["found"] == 1
        low, high = row["interval"]
        assert binom.cdf(high, 200, rate) - binom.cdf(low - 1, 200, rate) >= 0.95
        assert row["interval_few"][0] < low and row["interval_few"][1] > high
    flat = measure_decisions(records(p_values / 2, "good"), "fused", (0.1,), 30)[0]
    assert flat["false_alarms"] == 40 and not flat["inside"]
