"""The models of the page: where they come from, where they run, and what is known about them."""

import copy
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from rad import NormalityModel, RADPipeline
from rad.hub import one_sentence
from rad.pipeline_arguments import rate_of
from rad.pipeline_loading import EMBEDDED_DIR, EMBEDDED_MODELS

from . import visitors

try:
    import spaces
except ImportError:  # anywhere but on a Space

    def gpu(function: Callable) -> Callable:
        return function
else:
    gpu = spaces.GPU  # does nothing where there is no ZeroGPU

AUTO = "Detect automatically"
NAMES = {"synthetic": "Eight synthetic products", "mtd": "Magnetic tiles (MTD)", "paper": "Eight papers (PIPED)"}
DEFAULT_MODEL = EMBEDDED_MODELS[0]
MAX_DOWNLOAD = 300e6  # bytes of weights that a visitor may have downloaded
MAX_LOADED = 4  # models of the Hub; those offered to everybody stay
MAX_CARD = 100_000  # characters


class Loaded(NamedTuple):
    pipeline: RADPipeline  # on the CPU: what the page itself asks, which on ZeroGPU has no GPU
    working: RADPipeline  # where models run; on the CPU the same one
    card: str  # Markdown without the front matter
    results: list[tuple[str, str, float]]  # data set, metric, value


_loaded: OrderedDict[str, Loaded] = OrderedDict()
_loading: dict[str, threading.Lock] = {}  # who waits for a download waits for that one only
_lock = threading.Lock()


def offered() -> dict[str, str]:
    """The models that everybody may choose, the one of RAD_MODEL first: their names, and what to load."""
    first = os.environ.get("RAD_MODEL") or DEFAULT_MODEL
    name = Path(first).resolve().name if Path(first).is_dir() else first  # no path of this machine is shown
    return {name: first} | {model: model for model in EMBEDDED_MODELS if model != name}


def load(model: str) -> Loaded:
    """An offered model or one of the Hub; the last few stay in memory.

    Raises:
        ValueError: It is neither.
        OSError: It cannot be had or read; one sentence says why.
    """
    with _lock:
        loading = _loading.setdefault(model, threading.Lock())
    try:
        with loading:
            loaded = _loaded.get(model) or _load(model)
            with _lock:
                _loaded[model] = loaded
                _loaded.move_to_end(model)
                others = [name for name in _loaded if name not in offered()]
                for name in others[:-MAX_LOADED]:
                    del _loaded[name]
    finally:
        with _lock:
            _loading.pop(model, None)
    return loaded


def _load(model: str) -> Loaded:
    if model in offered():
        source = offered()[model]
        # By its name an embedded model is meant, with its card, whatever folder of that name stands beside the page
        embedded = source in EMBEDDED_MODELS
        pipeline = (RADPipeline.from_embedded if embedded else RADPipeline.from_pretrained)(source)
        folder = EMBEDDED_DIR / source if embedded else Path(source)
        path = folder / "README.md" if folder.is_dir() else _download_card(source)
        return Loaded(pipeline, _on_device(pipeline), *_read_card(path))
    if model.count("/") != 1 or model.startswith(("/", ".")) or model.endswith("/"):
        raise ValueError(
            f"There is no model {model!r}: choose {', '.join(offered())}, or give a Hub id such as user/repo."
        )
    # A visitor's wish: from the Hub only, never a folder of this machine, and without this machine's rights there
    with one_sentence(model):
        api = HfApi(token=False)
        commit = api.model_info(model).sha
        files = api.list_repo_tree(model, recursive=True, revision=commit)
        sizes = {file.path: file.size for file in files if isinstance(file, RepoFile)}
    size = sum(size for path, size in sizes.items() if path.endswith((".safetensors", ".json", "README.md")))
    if size > MAX_DOWNLOAD:
        raise ValueError(f"{model} has {size / 1e6:,.0f} MB; this page loads up to {MAX_DOWNLOAD / 1e6:.0f} MB.")
    with tempfile.TemporaryDirectory() as cache:
        options = {"revision": commit, "token": False, "cache_dir": cache}
        pipeline = RADPipeline.from_pretrained(RADPipeline.download(model, **options))
        return Loaded(pipeline, _on_device(pipeline), *_read_card(_download_card(model, **options)))


def device() -> torch.device:
    """Where models run: RAD_DEVICE, or a GPU if there is one.

    Raises:
        ValueError: RAD_DEVICE is no device of this machine.
    """
    name = os.environ.get("RAD_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device is None or (device.index or 0) >= there.get(device.type, 1):
        raise ValueError(f"RAD_DEVICE is {name!r}, which this machine does not have; cpu always works.")
    return device


def _on_device(pipeline: RADPipeline) -> RADPipeline:
    return pipeline if device().type == "cpu" else copy.deepcopy(pipeline).to(device())


def _download_card(model: str, **kwargs: Any) -> Path | None:
    try:
        with one_sentence(model):
            return Path(hf_hub_download(model, "README.md", **kwargs))
    except EntryNotFoundError:
        return None


def _read_card(path: Path | None) -> tuple[str, list[tuple[str, str, float]]]:
    if path is None or not path.is_file():
        return "This model has no card.", []
    try:
        card = ModelCard(path.read_text(encoding="utf-8")[:MAX_CARD], ignore_metadata_errors=True)
    except ValueError as error:
        return f"The model's card cannot be read ({error}).", []
    results = card.data.eval_results or []
    return card.text, [(r.dataset_name, r.metric_name or r.metric_type, r.metric_value) for r in results]


# -- use --------------------------------------------------------------------------------------------------------------


def run(model: str, method: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of a model's pipeline."""
    product = visitors.product(model)
    base, normality = (model, None) if product is None else (product.base, product.normality)
    load(base)  # here, so that a GPU worker, which is forked from this process, has it too
    return _run(base, normality, method, *args, **kwargs)


@gpu
def _run(base: str, normality: NormalityModel | None, method: str, *args: Any, **kwargs: Any) -> Any:
    pipeline = load(base).working
    if normality is not None:
        pipeline = pipeline.with_normality(copy.deepcopy(normality).to(pipeline.device))
    return getattr(pipeline, method)(*args, **kwargs)


def fit(base: str, pictures: list[np.ndarray], name: str, **known: Any) -> NormalityModel:
    """Statistics of good parts for a base model's network, which stays as it is."""
    load(base)
    return _fit(base, pictures, name, **known)


@gpu
def _fit(base: str, pictures: list[np.ndarray], name: str, **known: Any) -> NormalityModel:
    pipeline, names = load(base).working, [name] * len(pictures)
    fitted = pipeline.with_normality(pipeline.normality).fit_normality(pictures, categories=names, **known)
    return fitted.normality.to("cpu")


def pipeline(model: str) -> RADPipeline:
    product = visitors.product(model)
    if product is None:
        return load(model).pipeline
    return load(product.base).pipeline.with_normality(product.normality)


def normality(model: str) -> NormalityModel:
    """What a model knows of good parts.

    Raises:
        ValueError: Nothing.
    """
    product = visitors.product(model)
    known = load(model).pipeline.normality if product is None else product.normality
    if known is None:
        raise ValueError("This model knows no good parts yet: fit yours to it in the tab Your product.")
    return known


def categories(model: str) -> list[str]:
    """The kinds of parts that a model tells apart; none if it knows no good parts yet."""
    known = pipeline(model).normality
    return [] if known is None else list(known.config.categories)


def default_rate(model: str) -> float:
    """The false-alarm rate that a model's good pictures can tell; the usual one if it knows none yet."""
    return rate_of(None, pipeline(model).normality)


def title(model: str) -> str:
    product = visitors.product(model)
    if product is not None:
        return f"Yours: {product.name}"
    return NAMES.get(model, model)
