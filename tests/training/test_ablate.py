"""Ablations from end to end on a tiny data set, against what the pipeline itself gives."""

import json
import shutil
from pathlib import Path

import ablate
import ablations
import numpy as np
import pytest
import raw_maps
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import new_pipeline
from discriminator import fit_discriminator
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from rad import RADPipeline, RADScheduler
from rad.data import AnomalyDataset, load_dataset
from rad.data.drawn import DrawnDefects
from rad.data.synthetic import write_synthetic
from rad.metrics import aupro
from rad.models.evidence import SCORE_TYPES
from rad.truths import Truth, read_truths

CATEGORIES = ("brick", "capsule")
SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set and a pipeline that was fitted to it as training does."""
    root = tmp_path_factory.mktemp("ablate")
    write_synthetic(root / "data", CATEGORIES, num_train=20, num_test_good=3, num_per_defect=1, size=SIZE)
    dataset = load_dataset(root / "data", "mvtec", "train")
    train, holdout = dataset.split_holdout(0.2, 0)
    images, names = zip(*((sample.image, sample.category) for sample in dataset.samples), strict=True)
    pipeline = new_pipeline(CATEGORIES, [images[i] for i in train[:4]])
    fit_discriminator(pipeline, [images[i] for i in train], [names[i] for i in train], num_steps=2)
    pipeline.fit_normality(
        [images[i] for i in train],
        holdout_images=[images[i] for i in holdout],
        categories=[names[i] for i in train],
        holdout_categories=[names[i] for i in holdout],
        gaussian_channels=16,
        num_views=0,
    )
    pipeline.save_pretrained(root / "model")
    return root


def run(folder, output_dir, *flags):
    """The script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    given = ["--model", folder / "model", "--data_dir", folder / "data", "--output_dir", folder / output_dir]
    given += ["--timesteps", 20, 100, "--max_draws", 4, "--num_seeds", 2, "--map_size", SIZE]
    return ablate.main(ablate.parse_args([str(flag) for flag in (*given, *flags)]))


@pytest.fixture(scope="module")
def results(folder):
    return run(folder, "output")


@pytest.fixture(scope="module")
def pipeline(folder, results):
    pipeline = RADPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def test_set(folder):
    return load_dataset(folder / "data", "mvtec", "test")


def stored_maps(folder, name, dataset, output_dir="output"):
    """What the run stored of one of its sets."""
    (stored,) = (folder / output_dir / "raw").iterdir()
    truths = read_truths(dataset, range(len(dataset)), SIZE)
    labels = [CATEGORIES.index(truth.category) for truth in truths]
    return raw_maps.RawMaps(truths, labels, stored / name, list(range(len(truths))))


def score_all(pipeline, dataset, **kwargs):
    """The pipeline's own output of all images, which are SIZE x SIZE."""
    images = [dataset[i].image for i in range(len(dataset))]
    return pipeline(images, class_labels=[sample.category for sample in dataset.samples], **kwargs)


def metrics_of(output, dataset, name):
    """Means over categories of what scikit-learn makes of an output."""
    rows = []
    for category in CATEGORIES:
        members = [i for i, sample in enumerate(dataset.samples) if sample.category == category]
        row = {"image_auroc": roc_auc_score([dataset.samples[i].label for i in members], output.scores[name][members])}
        if name in output.maps:
            masks = {i: dataset.mask(i, (SIZE, SIZE)) for i in members}
            known = [i for i in members if masks[i] is not None]
            truth, maps = np.stack([masks[i] for i in known]), np.stack([output.maps[name][i] for i in known])
            row["pixel_auroc"] = roc_auc_score(truth.ravel(), maps.ravel())
            row["pixel_ap"] = average_precision_score(truth.ravel(), maps.ravel())
            row["aupro"] = aupro(maps, truth)
        rows.append(row)
    return {metric: np.mean([row[metric] for row in rows]) for metric in rows[0]}


def row_of(rows, *values):
    (row,) = [row for row in rows if all(value in row.values() for value in values)]
    return row


def assert_same(row, expected):
    for name in expected:
        assert row[name] == pytest.approx(expected[name], abs=5e-3), name


def test_each_ablation_has_a_table_and_a_figure(folder, results):
    output_dir = folder / "output"
    content = json.loads((output_dir / "ablations.json").read_text())
    assert str(folder) not in (output_dir / "ablations.json").read_text()
    assert content["ablations"] == json.loads(json.dumps(results)) and list(results) == list(ablate.ABLATIONS)
    sections = (output_dir / "ablations.md").read_text().split("\n## ")[1:]
    for section, (name, rows) in zip(sections, results.items(), strict=True):
        cells = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
        assert len(cells) == 2 + len(rows) and len({len(row) for row in cells}) == 1
        assert sum("**" in line for line in section.splitlines()) == sum(row["default"] for row in rows)
        for row in rows:
            mapless = name == "image_score" or "whole image" == row.get("score") or "the image score" == row.get("of")
            metrics = ["image_auroc"] if mapless else ablate.METRICS
            assert all(0 <= row[part][metric] <= 1 for part in ablate.SETS for metric in metrics)
        with Image.open(output_dir / f"{name}.png") as picture:
            assert picture.width > 500
    assert [row["timestep of 1000"] for row in results["timesteps"]][:6] == [
        "20",
        "100",
        "201",
        "401",
        "20 + 201 + 401",
        "all",
    ]


def test_on_test_images_scores_are_the_pipelines(pipeline, test_set, results):
    output = score_all(pipeline, test_set)
    assert len(output.scores) == len(results["score"]) == 8
    for name in output.scores:
        assert_same(row_of(results["score"], SCORE_TYPES[name].title)["test"], metrics_of(output, test_set, name))


def test_on_pasted_defects_scores_are_those_of_a_pipeline_that_saw_the_other_half(folder, results):
    dataset = load_dataset(folder / "data", "mvtec", "train")
    pipeline = RADPipeline.from_pretrained(folder / "model")
    args = ablate.parse_args(["--data_dir", "none", "--output_dir", "none"])
    train, statistics, others = raw_maps.split_good(args, dataset, num_scores=8)
    assert len(statistics) == len(others) == 4 and len({*train, *statistics, *others}) == len(dataset)
    fitted, scored = ([dataset.samples[i].image for i in part] for part in (train, statistics))
    names, scored_names = ([dataset.samples[i].category for i in part] for part in (train, statistics))
    kept = {name: pipeline.normality.config[name] for name in ("weights", "image_weights")}
    pipeline.fit_normality(fitted, scored, names, scored_names, gaussian_channels=16, **kept, num_views=0)
    images = DrawnDefects(AnomalyDataset([dataset.samples[i] for i in others]), 4)
    output = score_all(pipeline, images)
    for name in output.scores:
        assert_same(row_of(results["score"], SCORE_TYPES[name].title)["pasted"], metrics_of(output, images, name))


@pytest.mark.parametrize("part", ablate.SETS)
def test_every_table_has_the_same_default(results, part):
    score = {title: row_of(results["score"], title)[part] for title in ("KL", "feature error", "fused")}
    for name in ("timesteps", "normalisation", "draws"):
        for row in results[name]:
            if row["default"]:
                found = row[part]["seeds"][0] if name == "draws" else row[part]
                assert_same(found, {metric: score[row["score"]][metric] for metric in ablate.METRICS})
    (row,) = [row for row in results["whitening"] if row["default"]]
    assert_same(row[part], {metric: score["feature error"][metric] for metric in ablate.METRICS})
    for row in results["image_score"] + results["weights"]:
        if row["default"] and row.get("of") == "the map":
            assert_same(row[part], {metric: score["fused"][metric] for metric in ("pixel_ap", "aupro")})
        elif row["default"]:
            assert_same(row[part], {"image_auroc": score["fused"]["image_auroc"]})


def test_half_of_each_is_the_paper_to_the_letter(folder, pipeline, test_set, results):
    output = score_all(pipeline, test_set, mode="paper")
    expected = metrics_of(output, test_set, "fused")
    assert_same(row_of(results["alpha"], "each image (RAN)", "0.5")["test"], expected)
    x = ablations.Evaluation(stored_maps(folder, "test", test_set), None, None, None, pipeline.normality, [])
    rows = {setting: variants for setting, _, variants in ablations.ablate_alpha(x)}
    ((_, scores),) = rows["each image (RAN)", "0.5"]
    assert scores.numpy() == pytest.approx(output.scores["fused"], rel=2e-3)


def test_draws_are_the_pipelines(folder, pipeline, test_set):
    stored = stored_maps(folder, "test-draws", test_set)
    x_0, _ = pipeline.image_processor.preprocess([test_set[i].image for i in range(4)])
    names, timesteps = [sample.category for sample in test_set.samples[:4]], [20, 201, 401]
    for draws in (1, 2):
        expected = pipeline.normality.raw_maps(pipeline.measure(x_0, names, timesteps, draws), stored.labels[:4])
        torch.testing.assert_close(stored.load(f"{draws}-0")[:4], expected, rtol=1e-3, atol=1e-3)
    # Four draws are two seeds' pairs; a second seed shares no noise with the first
    pairs = [pipeline.measure(x_0, names, timesteps, 2, seed) for seed in (2, 3)]
    kl, error, rgb = (torch.stack([getattr(p, name) for p in pairs]).mean(0) for name in ("kl", "error", "rgb"))
    kl, rgb = (F.adaptive_avg_pool2d(maps, 16).clamp_min(1e-6).log() for maps in (kl, rgb))
    expected = torch.cat([kl, F.interpolate(error, (16, 16), mode="bilinear"), rgb], dim=1)
    of_unet = [stored.load("4-1")[:4, pipeline.normality.channels[name]] for name in ablations.UNET]
    torch.testing.assert_close(torch.cat(of_unet, dim=1), expected, rtol=1e-3, atol=1e-3)


def test_averaging_draws_makes_scores_vary_less(results):
    rows = [row["test"]["score_std"] for row in results["draws"] if row["score"] == "KL"]
    assert rows[0] > rows[-1] > 0


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    truths, asked = [Truth(i, "brick", "good", None) for i in range(5)], []

    def compute(batch):
        asked.append([float(truth.index) for truth in batch])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"maps": torch.tensor(asked[-1])}

    given = (Accelerator(cpu=True), tmp_path / "maps", truths, ["brick"], 2, compute)
    with pytest.raises(KeyboardInterrupt):
        raw_maps.store(*given)
    (tmp_path / "maps" / ".partial-7-000004.safetensors").write_bytes(b"half")  # of a process that was killed
    stored = raw_maps.store(*given)
    assert asked == [[0, 1], [2, 3], [4], [4]]
    assert stored.load("maps").tolist() == [0, 1, 2, 3, 4] and stored.pick([3, 1]).load("maps").tolist() == [3, 1]


def test_raw_maps_of_other_weights_or_settings_are_not_taken(folder):
    pipeline = RADPipeline.from_pretrained(folder / "model")
    before, same, other = (ablate.fingerprint(pipeline, settings).hexdigest() for settings in ([1], [1], [2]))
    assert before == same != other
    pipeline.normality.location[0, 0, 0, 0] += 1
    assert ablate.fingerprint(pipeline, [1]).hexdigest() != before
    pipeline.normality.location[0, 0, 0, 0] -= 1
    assert ablate.fingerprint(pipeline, [1]).hexdigest() == before
    pipeline.register_to_config(num_noise_samples=2)
    assert ablate.fingerprint(pipeline, [1]).hexdigest() != before


def test_tables_go_into_a_page(tmp_path, results):
    rows = results["score"]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- mine score -->\nold\n<!-- end -->\nafter\n<!-- mine alpha -->\n<!-- end -->\n")
    args = ablate.parse_args(
        ["--data_dir", "none", "--output_dir", str(tmp_path / "figures" / "mine"), "--page", str(page)]
    )
    (tmp_path / "figures" / "mine").mkdir(parents=True)
    facts = ("num_test", "num_pasted", "num_good", "num_test_draws", "num_pasted_draws", "map_size")
    ablate.report(args, {"model": "mine", "data": "parts", "told": [], **dict.fromkeys(facts, 2)}, {"score": rows})
    table = ablate.to_markdown(ablate.ABLATIONS["score"], rows)
    assert page.read_text() == (
        f"before\n<!-- mine score -->\n\n{table}\n\n![Score](figures/mine/score.png)\n\n<!-- end -->\nafter\n"
        "<!-- mine alpha -->\n<!-- end -->\n"
    )


def test_the_documentation_has_a_place_for_each_table():
    page = (Path(ablate.__file__).parent / "docs" / "ablations.md").read_text()
    for name in ablate.ABLATIONS:
        for data in ("mtd", "synthetic"):
            assert ablate.insert(page, f"{data} {name}", "a table") != page


def test_a_page_without_a_place_is_refused_before_anything_is_computed(folder, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- refused score -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="<!-- refused weights -->"):
        run(folder, "refused", "--page", page)
    assert not (folder / "refused").exists()


def test_another_split_than_in_training_is_refused(folder):
    with pytest.raises(ValueError, match="8 good images held out, but this split holds out 16 of 40"):
        run(folder, "refused", "--holdout_fraction", "0.4")


def test_timesteps_off_the_chain_are_refused(folder):
    with pytest.raises(ValueError, match=r"\[50\] are not all .* nearest that are: \[48\]|nearest that are: \[52\]"):
        run(folder, "refused", "--timesteps", "50")


def test_a_chain_shorter_than_rans_has_timesteps_to_compare():
    for length in (3, 50, 250, 1000):
        scheduler = RADScheduler(num_respaced_timesteps=length)
        steps = scheduler.steps_of_250(ablate.RESPACED_STEPS)
        assert set(steps) <= set(scheduler.respaced_chain.timesteps.tolist())
    assert RADScheduler().steps_of_250(ablate.RESPACED_STEPS) == [20, 48, 100, 201, 301, 401, 602]


def test_what_the_test_images_do_not_define_is_said(folder):
    results = run(
        folder, "one", "--max_test_samples", "1", "--timesteps", "20", "--max_draws", "1", "--num_seeds", "1"
    )
    text = (folder / "one" / "ablations.md").read_text()
    assert "brick: image AUROC, AP and F1 not defined: no good image." in text
    assert all("image_auroc" not in row["test"] and row["pasted"]["image_auroc"] >= 0 for row in results["score"])
    assert "nan" not in text.lower() and "NaN" not in (folder / "one" / "ablations.json").read_text()


def test_images_that_define_nothing_are_refused_before_anything_is_computed(folder, tmp_path):
    data = shutil.copytree(folder / "data", tmp_path / "data")
    for path in data.glob("*/test/[!g]*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="Nothing can be measured on these images. brick: .* no defective image"):
        run(folder, "refused", "--data_dir", str(data))
    assert not (folder / "refused" / "raw").exists()
