"""The suite on two tiny sets, of which one has no trained model."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import compare
import pytest
import suite
import train
from accelerate.state import AcceleratorState
from PIL import Image

from rad.data.synthetic import write_synthetic


@pytest.fixture(scope="module")
def root(pipeline, tmp_path_factory):
    """A saved pipeline, a synthetic set of one category, and a bottle that is a brick."""
    root = tmp_path_factory.mktemp("suite")
    pipeline.save_pretrained(root / "model")
    write_synthetic(root / "synthetic", ("brick",), num_train=10, num_test_good=2, num_per_defect=1, size=64)
    write_synthetic(root / "mvtec_ad", ("brick",), num_train=10, num_test_good=2, num_per_defect=1, size=64)
    (root / "mvtec_ad" / "brick").rename(root / "mvtec_ad" / "bottle")
    return root


@pytest.fixture
def at_once(monkeypatch):
    """Trainings run in this process and measurements in threads, which need not import the libraries again."""

    def run(command):
        AcceleratorState._reset_state(reset_partial_state=True)  # of another test's precision
        try:
            train.main(train.parse_args(command[2:]))
        except (ValueError, OSError) as error:
            print(error)
            return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(suite.subprocess, "run", run)
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))


def run(root, *flags):
    model = str(root / "model")
    needed = ["--data_root", str(root), "--output_dir", str(root / "output"), "--device", "cpu", "--fit_model", model]
    return suite.main(suite.parse_args([*needed, "--sets", "synthetic", "bottle", *flags]))


def test_the_suite_measures_each_set_and_goes_on_where_it_was(root, at_once, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before\n\n<!-- suite -->\n\n<!-- end -->\n")
    flags = ("--trained", f"synthetic={root / 'model'}", "--page", str(page))
    results = run(root, *flags)

    assert list(results) == ["synthetic", "bottle"]
    assert {"RAD", "RAD fitted", "RAD, pixel alone", "RAD fitted, pixel alone", "PaDiM"} <= set(results["synthetic"])
    assert "RAD" not in results["bottle"] and results["bottle"]["PatchCore"]["image_auroc"] >= 0
    means = json.loads((root / "output" / "suite.json").read_text())["mean"]
    both = [results[name]["RAD fitted"]["aupro"] for name in results]
    assert means["RAD fitted"]["aupro"] == pytest.approx(sum(both) / 2)
    assert means["RAD"]["aupro"] is None  # one set lacks it
    table = page.read_text()
    assert (root / "output" / "suite.md").read_text().strip() in table and "Before" in table
    lines = [line for line in table.splitlines() if line.startswith("| RAD |")]
    assert len(lines) == 1 and lines[0].endswith("| - / - | - / - / - / - |")
    with Image.open(root / "output" / "suite.png") as picture:
        assert picture.width > 1000

    made = [path for path in (root / "output").rglob("*.json") if path.name.startswith(("rad-", "padim-", "model_"))]
    times = [path.stat().st_mtime_ns for path in made]
    assert run(root, *flags) == results
    assert [path.stat().st_mtime_ns for path in made] == times


def test_what_is_missing_is_named_before_anything_is_computed(root):
    with pytest.raises(FileNotFoundError, match="There is no piped in .*: put it there, or leave it out of --sets."):
        suite.main(
            suite.parse_args(
                ["--data_root", str(root), "--output_dir", str(root / "none"), "--sets", "synthetic", "papers"]
            )
        )
    assert not (root / "none").exists()


def test_a_training_that_fails_is_told_of(root, at_once, tmp_path):
    flags = ["--data_root", str(root), "--output_dir", str(tmp_path), "--sets", "bottle", "--fit_model", "nowhere"]
    with pytest.raises(OSError, match="Training for the set bottle failed"):
        suite.main(suite.parse_args(flags))


@pytest.mark.parametrize("text", ["tile=mtd", "mtd", "mtd="])
def test_trained_models_need_a_set(text, capsys):
    with pytest.raises(SystemExit):
        suite.parse_args(["--data_root", "x", "--trained", text])
    assert "must be SET=MODEL with a set of mtd, synthetic" in capsys.readouterr().err


def test_the_synthetic_set_is_made_if_it_is_not_there(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(suite, "write_synthetic", lambda folder, num_train: asked.append((folder, num_train)))
    monkeypatch.setattr(suite, "train", lambda *args: sys.exit(0))
    with pytest.raises(SystemExit):
        suite.main(
            suite.parse_args(["--data_root", str(tmp_path), "--output_dir", str(tmp_path), "--sets", "synthetic"])
        )
    assert asked == [(tmp_path / "synthetic", 150)]
