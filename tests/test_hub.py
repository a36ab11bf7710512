"""Pushing to and loading from a Hub: real calls against the server of hub_server.py."""

import ast
import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, snapshot_download
from PIL import Image
from processes import FORKS

from rad import RADPipeline
from rad.model_card import create_model_card
from rad.visualization import results_figure

ROOT = Path(__file__).resolve().parent.parent
REPO = "user/rad-v1.0"  # a dot in the name, which diffusers' loader of remote code does not expect
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def load(name: str | Path = REPO, **kwargs) -> RADPipeline:
    pipeline = RADPipeline.from_pretrained(name, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def push(pipeline: RADPipeline, **kwargs) -> str:
    return pipeline.push_to_hub(REPO, **{"token": "hf_user"} | kwargs).oid


def assert_same_output(first: RADPipeline, second: RADPipeline, image: Image.Image) -> None:
    a, b = first(image), second(image)
    assert a.keys() == b.keys()
    for name in ("anomaly_map", "mask", "score", "p_value"):
        assert np.array_equal(a[name], b[name]), name
    for name in ("pixel", "mahalanobis", "rgb"):
        assert np.array_equal(a.maps[name], b.maps[name]), name


def assert_same_weights(first: RADPipeline, second: RADPipeline) -> None:
    for name in ("unet", "feature_extractor", "normality"):
        a, b = (getattr(pipeline, name).state_dict() for pipeline in (first, second))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


@contextlib.contextmanager
def one_sentence(*words: str, error: type[Exception] = OSError):
    """The block fails with one sentence, or two short ones, that has these words."""
    with pytest.raises(error) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and all(word in text for word in words), text


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def changed(small_pipeline_without_normality, pipeline) -> RADPipeline:
    """Like `pipeline`, with other weights."""
    changed = small_pipeline_without_normality
    changed.register_modules(normality=pipeline.normality)
    with torch.no_grad():
        changed.unet.unet.conv_out.weight.mul_(1.5)
    return changed


@pytest.fixture
def no_waiting(monkeypatch):
    """Retries follow each other at once."""
    # For this module alone: other threads, such as those of the page's servers, would spin
    hurried = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", hurried)


# -- push and load ------------------------------------------------------------------------------------------------


def test_push_then_load_elsewhere_gives_the_same_output(hub, pipeline, good_images, tmp_path):
    push(pipeline, commit_message="First model")
    repo = hub.repos["model", REPO]
    assert [title for title, _ in repo.commits.values()] == ["initial commit", "First model"]
    assert repo.files()[WEIGHTS].lfs and not repo.files()["README.md"].lfs
    hub.requests.clear()
    elsewhere = tmp_path / "elsewhere"
    assert_same_output(pipeline, load(cache_dir=elsewhere), good_images[0])
    fetched = [path.split("/resolve/")[1].split("/", 1)[1] for method, path in hub.requests if "/resolve/" in path]
    assert {Path(path).suffix for path in fetched} == {".json", ".safetensors"}
    assert not (tmp_path / "cache").exists()


def test_save_pretrained_pushes_too(hub, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id=REPO, token="hf_user", private=True)
    assert hub.repos["model", REPO].private
    assert (tmp_path / "mine" / WEIGHTS).read_bytes() == hub.repos["model", REPO].files()[WEIGHTS].data


def test_a_folder_pushed_by_other_means_loads(hub, saved, pipeline):
    """With checkpoints and pictures in the repository, which are not downloaded."""
    api = HfApi(token="hf_user")
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=saved)
    api.upload_folder(repo_id=REPO, folder_path=saved / "unet", path_in_repo="checkpoint-500/unet")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"picture", path_in_repo="results.png")
    assert_same_weights(pipeline, load())
    assert not any("checkpoint" in path or ".png" in path for method, path in hub.requests if method == "GET")


def test_components_that_are_passed_are_not_downloaded(hub, pipeline):
    push(pipeline)
    assert load(unet=pipeline.unet).unet is pipeline.unet
    assert not any(path.endswith(WEIGHTS) for _, path in hub.requests)


def test_a_pipeline_without_normality(hub, small_pipeline_without_normality):
    push(small_pipeline_without_normality)
    assert load().normality is None


REMOTE = """
import sys
import time
import types

sys.modules["rad"] = None  # any import of the package fails
import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

try:
    import rad
    sys.exit("rad can be imported")
except ImportError:
    pass
image = Image.open("image.png")
for number, source in enumerate(sys.argv[1:]):
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    out, fixed = pipe(image), pipe.restore(image, num_steps=2)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    pipe.with_normality(None).fit_normality(list(pixels), gaussian_channels=4)
    np.savez(f"{number}.npz", map=out.anomaly_map, score=out.score, fixed=np.asarray(fixed.images[0]))
pipe.save_pretrained("again")
assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe).__module__
"""


def test_remote_code_works_where_the_package_is_not_importable(hub, pipeline, saved, good_images, tmp_path):
    push(pipeline)
    good_images[0].save(tmp_path / "image.png")
    (tmp_path / "remote.py").write_text(REMOTE)
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-I", "remote.py", REPO, str(saved)]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "not found in your environment" not in result.stderr and "Expected types" not in result.stderr
    output, fixed = pipeline(good_images[0]), pipeline.restore(good_images[0], num_steps=2)
    for number in range(2):  # from the Hub, and from a folder
        found = np.load(tmp_path / f"{number}.npz")
        assert np.array_equal(found["map"], output.anomaly_map) and np.array_equal(found["score"], output.score)
        assert np.array_equal(found["fixed"], np.asarray(fixed.images[0]))
    # What it saved is what we save, and loads here
    code = [(folder / "pipeline_rad.py").read_text() for folder in (tmp_path / "again", saved)]
    assert code[0] == code[1]
    assert_same_weights(pipeline, load(tmp_path / "again"))


def test_standalone_code_defines_every_name_once(saved):
    """The modules share one namespace in the repository's code file."""
    names = []
    for node in ast.parse((saved / "pipeline_rad.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    assert {"RADPipeline", "COMPONENTS"} < set(names) and len(names) == len(set(names))


# -- safety -------------------------------------------------------------------------------------------------------


def plant(folder: Path, marker: Path) -> None:
    """Code that leaves a marker when it runs, in every place where diffusers looks for code."""
    payload = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for name in ("pipeline_rad.py", "pipeline.py", "rad/__init__.py", *folder.glob("*/*.py")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(payload)


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": True}])
def test_code_of_a_repository_is_never_run(hub, saved, pipeline, tmp_path, kwargs):
    hostile, marker = tmp_path / "hostile", tmp_path / "marker"
    shutil.copytree(saved, hostile)
    plant(hostile, marker)
    api = HfApi(token="hf_user")
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=hostile)
    snapshot_download(REPO)  # even when the code has been downloaded before
    assert_same_weights(pipeline, load(**kwargs))
    assert_same_weights(pipeline, load(hostile, **kwargs))
    assert not marker.exists()
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(REPO)
    assert not marker.exists()
    for name in ("None.py", "unet/rad.models.unet_rad.py"):  # what diffusers would take for the class we name
        (hostile / name).write_text((hostile / "pipeline_rad.py").read_text())
        with pytest.raises(ValueError, match="custom code"):
            load(hostile, **kwargs)
        (hostile / name).unlink()
        assert not marker.exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"unet": ["subprocess", "Popen"]},
        {"unet": ["diffusers", "UNet2DModel"]},
        {"unet": "RADUNet2DModel.exe"},
        {"tokenizer": ["transformers", "AutoTokenizer"]},
        {"_class_name": ["pipeline_evil", "EvilPipeline"]},
        {"_class_name": "DDPMPipeline"},
    ],
    ids=str,
)
def test_classes_other_than_ours_are_refused(hub, saved, tmp_path, entry):
    shutil.copytree(saved, tmp_path / "hostile")
    index = tmp_path / "hostile" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | entry))
    with one_sentence("refused", "hostile"):
        load(tmp_path / "hostile")
    api = HfApi(token="hf_user")
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "hostile")
    with one_sentence("refused", REPO):
        load()


def test_weights_other_than_safetensors_are_refused(hub, saved, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(saved, pickled)
    (pickled / WEIGHTS).rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    api = HfApi(token="hf_user")
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=pickled)
    with one_sentence(REPO, "safetensors"):
        load()
    with pytest.raises(ValueError, match="use_safetensors"):
        load(use_safetensors=False)
    assert not any(path.endswith(".bin") and method == "GET" for method, path in hub.requests)


# -- as in diffusers ----------------------------------------------------------------------------------------------


def test_revision(hub, pipeline, changed):
    old = push(pipeline)
    HfApi(token="hf_user").create_tag(REPO, tag="v1")
    push(changed)
    assert_same_weights(load(), changed)
    for revision in (old, "v1"):
        assert_same_weights(load(revision=revision), pipeline)
    with one_sentence(REPO, "'v2'"):
        load(revision="v2")


def test_variant_and_dtype(hub, pipeline, saved, tmp_path):
    half = load(saved, dtype=torch.float16)
    push(pipeline)
    with one_sentence(REPO, "variant"):
        load(variant="fp16")
    push(half, variant="fp16")  # beside the other weights
    hub.requests.clear()
    loaded = load(variant="fp16", dtype=torch.float16, cache_dir=tmp_path / "elsewhere")
    assert loaded.unet.dtype == torch.float16
    assert_same_weights(loaded, half)
    assert not any(path.endswith(WEIGHTS) for _, path in hub.requests)
    assert_same_weights(load(), pipeline)


def test_a_sharded_model(hub, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1
    assert_same_weights(load(tmp_path / "shards"), pipeline)
    api = HfApi(token="hf_user")
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "shards")
    assert_same_weights(load(), pipeline)


def test_token(hub, pipeline):
    push(pipeline, private=True)
    for token in (None, "hf_reader"):  # nobody, and somebody else
        with one_sentence(REPO, "token", "hf auth login"):
            load(token=token)
    with one_sentence(REPO, "refuses this token", "401"):
        load(token="hf_wrong")
    assert_same_weights(load(token="hf_user"), pipeline)


def test_gated(hub, pipeline):
    push(pipeline)
    hub.repos["model", REPO].gated = True
    for token in (None, "hf_reader"):
        with one_sentence("gated", f"{hub.url}/{REPO}"):
            load(token=token)


def test_cache_dir_and_local_files_only(hub, pipeline, tmp_path):
    push(pipeline)
    with one_sentence(REPO, "not wholly, in the cache"):
        load(local_files_only=True)
    load(cache_dir=tmp_path / "mine")
    with one_sentence(REPO, "not wholly, in the cache"):
        load(local_files_only=True)
    hub.requests.clear()
    assert_same_weights(load(cache_dir=tmp_path / "mine", local_files_only=True), pipeline)
    assert not hub.requests
    with hub.stopped():
        assert_same_weights(load(cache_dir=tmp_path / "mine"), pipeline)  # as in diffusers: the cache serves
        with one_sentence(REPO, "connection"):
            load()


def test_offline(hub, pipeline, monkeypatch):
    push(pipeline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with one_sentence(REPO, "HF_HUB_OFFLINE"):
        load()


@pytest.mark.parametrize("name", ["user/nothing", "nothing", "no/such/folder", "/no/such", "../x", Path("no/such")])
def test_what_is_neither_a_folder_nor_a_repository(hub, name):
    with one_sentence(str(name)):
        load(name)
    with one_sentence(str(name)):
        RADPipeline.load(name)


def test_an_embedded_model_by_name_or_path():
    with one_sentence("synthetic, mtd", "'bottle'", error=ValueError):
        RADPipeline.from_embedded(Path("bottle"))
    assert RADPipeline.load("mtd").config.resolution == 256


# -- refusals and broken connections ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "words"), [("hf_wrong", "401"), ("hf_reader", "403"), ("hf_other", "403"), (None, "401")]
)
def test_a_push_that_is_not_allowed(hub, pipeline, token, words):
    with one_sentence(REPO, "refuses this token", words):
        push(pipeline, token=token)
    assert not hub.repos


@pytest.mark.parametrize("where", ["GET /cdn/", f"GET /{REPO}/resolve/.*/config.json", f"GET /api/models/{REPO}"])
def test_a_connection_that_breaks_during_the_download(hub, pipeline, no_waiting, where):
    push(pipeline)
    with hub.dropping(where), one_sentence(REPO, "connection"):
        load()
    assert_same_weights(load(), pipeline)


@pytest.mark.parametrize("where", ["PUT /lfs/", "POST .*/commit/", "POST .*/preupload/", "POST /api/repos/create"])
def test_a_connection_that_breaks_during_the_upload(hub, pipeline, changed, no_waiting, where):
    before = push(pipeline)
    with hub.dropping(where), one_sentence(REPO, "connection"):
        push(changed)
    assert hub.repos["model", REPO].refs["main"] == before
    assert_same_weights(load(), pipeline)
    push(changed)
    assert_same_weights(load(), changed)


# -- the card -----------------------------------------------------------------------------------------------------


def test_card(hub, two_category_pipeline, two_category_images, tmp_path):
    images, names = two_category_images
    figure = results_figure(two_category_pipeline, images[:2], class_labels=names[:2], restore=False)
    assert figure.mode == "RGB" and figure.width > figure.height / 2
    figure.save(tmp_path / "results.png")
    card = create_model_card(
        two_category_pipeline,
        REPO,
        metrics={"Magnetic Tile Defects": {"image_auroc": 0.967, "aupro": 0.761}, "Mine": {"image_auroc": 1.0}},
        training={"Command": "`accelerate launch training/train.py`", "Steps": 3500, "Seed": 0},
        picture="results.png",
        datasets=["user/parts"],
        tags=["mtd"],
    )
    push(two_category_pipeline, card=card, files={"results.png": tmp_path / "results.png"})
    push(two_category_pipeline, variant="fp16")  # keeps the card

    loaded = ModelCard.load(REPO)
    loaded.validate()
    data = loaded.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "image-segmentation", "apache-2.0")
    assert {"anomaly-detection", "diffusion", "mtd"} <= set(data.tags) and data.datasets == ["user/parts"]
    results = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    assert results == {
        ("Magnetic Tile Defects", "image AUROC"): 0.967,
        ("Magnetic Tile Defects", "AUPRO (FPR <= 0.3)"): 0.761,
        ("Mine", "image AUROC"): 1.0,
    }
    assert HfApi().model_info(REPO).card_data.eval_results == data.eval_results
    for words in ("brick, gravel", "| Mine | 1.000 |  |", "](results.png)", "- Steps: 3500", f'("{REPO}")'):
        assert words in loaded.text, words
    for words in ("Intended use", "Limits", "12 held-out good photos, shared by 2 categories", "64 x 64"):
        assert words in loaded.text, words
    assert hub.repos["model", REPO].files()["results.png"].lfs


def test_a_pipeline_pushed_without_a_card_claims_nothing(hub, pipeline):
    push(pipeline)
    card = ModelCard.load(REPO)
    assert card.data.library_name == "diffusers" and card.data.eval_results is None and "Measured" not in card.text


# -- scripts and data sets ----------------------------------------------------------------------------------------


def test_space(hub, tmp_path, monkeypatch):
    arguments = ["user/page", "--model", REPO, "--hub_token", "hf_user", "--private"]
    monkeypatch.setattr(sys, "argv", ["push_space.py", *arguments])
    runpy.run_path(str(ROOT / "training" / "push_space.py"), run_name="__main__")
    repo = hub.repos["space", "user/page"]
    assert (repo.sdk, repo.private, len(repo.commits)) == ("gradio", True, 2)
    assert repo.variables["RAD_MODEL"]["value"] == REPO
    tops = {path.split("/")[0] for path in repo.files()}
    assert tops == {".gitattributes", "README.md", "app.py", "requirements.txt", "rad"}
    assert not any("__pycache__" in path for path in repo.files())
    assert "rad/pretrained/mtd/unet/diffusion_pytorch_model.safetensors" in repo.files()

    folder = Path(snapshot_download("user/page", repo_type="space", token="hf_user"))
    code = f"""
import os, sys
assert "rad" not in sys.modules
os.chdir({str(folder)!r})
ours = {[str(ROOT), str(ROOT / "tests"), str(ROOT / "training")]!r}  # which the Space has not
sys.path[:] = ["", *(path for path in sys.path if path not in ours)]
import app, rad
assert callable(app.build_demo)
assert rad.__file__.startswith({str(folder)!r}), rad.__file__
"""
    process = FORKS.Process(target=exec, args=(code, {}))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_data_sets_are_served_too(hub, good_images, tmp_path):
    datasets = pytest.importorskip("datasets")
    for split, label in (("train", "good"), ("test", "good"), ("test", "scratch")):
        (tmp_path / "parts" / split / label).mkdir(parents=True)
        good_images[0].save(tmp_path / "parts" / split / label / "0.png")
    api = HfApi(token="hf_user")
    api.create_repo("user/parts", repo_type="dataset", private=True)
    api.upload_folder(repo_id="user/parts", folder_path=tmp_path / "parts", repo_type="dataset")
    test = datasets.load_dataset("user/parts", split="test", token="hf_user")
    assert test["label"] == [0, 1] and test[0]["image"].size == good_images[0].size
