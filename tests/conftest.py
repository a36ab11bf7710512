"""Small real pipelines with random weights, fitted to crops of photographs. Shared: a test must not change them."""

import json
import os
from pathlib import Path

from hub_server import HOME, HUB, HubServer

# Read once, when the libraries are imported
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["HF_DATASETS_OFFLINE"] = "0"  # checks what HF_HUB_OFFLINE was at import, which the fixture hub changes
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = HOME.name
os.environ["HF_TOKEN"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave a shared core to others
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

import gradio as gr
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from skimage import data

import app
from rad import RADFeatureExtractor, RADPipeline, RADScheduler, RADUNet2DModel
from rad.page import models
from rad.pipeline_loading import EMBEDDED_DIR

RESOLUTION = 64


def texture(name: str, seed: int) -> Image.Image:
    """A random crop of one of scikit-image's photographs, slightly tinted, RGB, 64 x 64."""
    rng = np.random.default_rng(seed)
    photograph = Image.fromarray(getattr(data, name)())
    left, top = (int(x) for x in rng.integers(0, 512 - 2 * RESOLUTION, 2))
    crop = photograph.resize((RESOLUTION, RESOLUTION), box=(left, top, left + 2 * RESOLUTION, top + 2 * RESOLUTION))
    pixels = np.asarray(crop, np.float32)[..., None] * [1.0, 0.9, 0.8] * rng.uniform(0.95, 1.05)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture."""
    with Image.open(path) as picture:
        return picture.size


def rows_of(folder: Path) -> list[dict]:
    """What `predict` has written there."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def new_pipeline(categories: tuple[str, ...], images: list[Image.Image]) -> RADPipeline:
    """A pipeline with random weights that knows no good images yet; its extractor is fitted as in training."""
    torch.manual_seed(0)
    extractor = RADFeatureExtractor.from_pretrained(EMBEDDED_DIR / "tf_efficientnet_lite0")
    unet = RADUNet2DModel(
        sample_size=RESOLUTION,
        block_out_channels=(32, 32, 32),
        attention_head_dim=8,
        norm_num_groups=8,
        feature_channels=extractor.num_channels,
        categories=categories,
    ).eval()
    pipeline = RADPipeline(unet, RADScheduler(), extractor, resolution=RESOLUTION)
    pipeline.set_progress_bar_config(disable=True)
    extractor.fit([pipeline.image_processor.preprocess(images)[0]])
    return pipeline


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> HubServer:
    """An empty Hub that can be reached, and an empty cache."""
    HUB.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return HUB


@pytest.fixture(scope="session")
def good_images() -> list[Image.Image]:
    return [texture("brick", seed) for seed in range(12)]


@pytest.fixture(scope="session")
def two_category_images() -> tuple[list[Image.Image], list[str]]:
    """Good images of two categories and the category of each."""
    names = ["brick"] * 6 + ["gravel"] * 6
    return [texture(name, seed) for seed, name in enumerate(names)], names


@pytest.fixture(scope="session")
def pipeline(good_images) -> RADPipeline:
    pipeline = new_pipeline((), good_images)
    pipeline.fit_normality(good_images, gaussian_channels=16)
    return pipeline


@pytest.fixture(scope="session")
def saved_pipeline(pipeline, tmp_path_factory) -> Path:
    """The folder of the small pipeline, saved."""
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_category_pipeline(two_category_images) -> RADPipeline:
    images, names = two_category_images
    pipeline = new_pipeline(("brick", "gravel"), images)
    pipeline.fit_normality(images, categories=names, gaussian_channels=16)
    return pipeline


@pytest.fixture(scope="session")
def part(two_category_images, tmp_path_factory) -> str:
    """A piece of gravel with a white patch, 120 x 90."""
    picture = two_category_images[0][-1].resize((120, 90))
    picture.paste("white", (30, 20, 60, 50))
    path = tmp_path_factory.mktemp("part") / "part.png"
    picture.save(path)
    return str(path)


@pytest.fixture(scope="module")
def page_model(two_category_pipeline, tmp_path_factory) -> str:
    """The name on the page of a small pipeline that knows brick and gravel, and which the page offers first."""
    folder = tmp_path_factory.mktemp("page")
    two_category_pipeline.save_pretrained(folder / "model")
    models._loaded.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAD_MODEL", str(folder / "model"))
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "files"))
        patch.setenv("GRADIO_IS_E2E_TEST", "1")  # the server notices at once, not in 15 s, that a visitor left
        yield "model"


@pytest.fixture(scope="module")
def served(page_model) -> gr.Blocks:
    """The page on a free port, as `python app.py` serves it."""
    demo = app.build_demo()
    demo.launch(**app.LAUNCH, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield demo
    demo.close()


@pytest.fixture
def small_pipeline_without_normality(good_images) -> RADPipeline:
    """A fresh pipeline, the test's own to change."""
    return new_pipeline((), good_images)
