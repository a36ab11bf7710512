"""The one way to measure: what a method finds on images whose truth is known, and the metrics of that.

`score_dataset` for a pipeline and `keep_records` for any method keep what they find in files, one for each image: they
go on where they were stopped, several processes share the work, and maps are read when they are needed.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.stats import betabinom, binom
from tqdm.auto import tqdm

from .data import AnomalyDataset
from .files import remove_partials, whole
from .image_reader import ImageInput, read
from .metrics import IMAGE_METRICS, PIXEL_METRICS, image_metrics, pixel_curves, pixel_metrics
from .models.evidence import GLOBAL
from .pipeline_rad import RADPipeline
from .truths import Truth, undefined

METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
LIBRARIES = ("torch", "numpy", "pillow", "scipy", "scikit-learn", "timm", "diffusers")  # that results depend on
SOURCE = Path(__file__).parent
# Of its modules those that show or publish: no number depends on them
PRESENTATION = ("__main__.py", "hub.py", "model_card.py", "report.py", "visualization.py")


# -- one file for each image ------------------------------------------------------------------------------------------


class Lazy(Sequence):
    """Items made when they are asked for: `read(source)` of each source."""

    def __init__(self, read: Callable[[Any], np.ndarray], sources: Sequence) -> None:
        self.read, self.sources = read, sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.read(self.sources[index])


@dataclass(frozen=True)
class Scored:
    """What a method finds on B images.

    Attributes:
        maps: [B, H, W] or B arrays [H, W], which cover the images, of each score that has a map.
        scores: [B] of each score.
        p_values: Likewise; empty for a method that has none.
        categories: Whose statistics were used on each image; empty for a method that has none.
    """

    maps: Mapping[str, Sequence[np.ndarray]]
    scores: dict[str, np.ndarray]
    p_values: dict[str, np.ndarray] = field(default_factory=dict)
    categories: Sequence[str] = ()


@dataclass(frozen=True)
class Record:
    """What a method found on one image; maps and mask are read from the file when they are asked for.

    Attributes:
        path: The file, safetensors: a map [S, S] for each score that has one and, of a defective image with a known
            mask, `mask` [S, S] bool.
        index: Of the image in its data set.
        category, defect: As the data set says.
        scores: Image score of each score type.
        p_values: Likewise; empty in paper mode.
        used_category: Whose normality was used; None without a normality model.
        has_mask: False for a defective image without a mask, which counts at image level only.
        seconds: Time to score the image, as its share of its batch.
    """

    path: Path
    index: int
    category: str
    defect: str
    scores: dict[str, float]
    p_values: dict[str, float]
    used_category: str | None
    has_mask: bool
    seconds: float

    @property
    def label(self) -> int:
        """0 for good, 1 for anomalous."""
        return int(self.defect != "good")

    @property
    def has_good_pixels(self) -> bool:
        return self.has_mask and not (self.label and self.mask().all())

    def map(self, score_type: str) -> np.ndarray:
        """Float32 [S, S]."""
        with _open(self.path) as file:
            return file.get_tensor(score_type).astype(np.float32)

    def mask(self) -> np.ndarray:
        """Bool [S, S]: what is defective; nothing where no mask is known."""
        with _open(self.path) as file:
            names = list(file.keys())
            return file.get_tensor("mask") if "mask" in names else np.zeros_like(file.get_tensor(names[0]), bool)


def score_dataset(
    pipeline: RADPipeline,
    dataset: AnomalyDataset,
    indices: Sequence[int],
    folder: str | os.PathLike,
    map_size: int = 256,
    infer_category: bool = False,
    batch_size: int = 4,
    at_resolution: bool = False,
    **kwargs: Any,
) -> list[Record]:
    """A pipeline's records of images of a data set, as `keep_records` makes and keeps them.

    Args:
        dataset, indices, folder, map_size, batch_size: As in `keep_records`.
        infer_category: Let the pipeline guess each category.
        at_resolution: Resize images to the pipeline's resolution first, so that maps of that size are not resized.
        kwargs: `mode`, `num_noise_samples` and `seed` of the pipeline.
    """
    pipeline.set_progress_bar_config(disable=True)
    known = [] if infer_category else pipeline.categories

    def score(images: list[ImageInput], category: str) -> Scored:
        if at_resolution:
            images = [pipeline.image_processor.resize(image)[0] for image in images]
        label = category if category in known else None
        output = pipeline(images, class_labels=label, batch_size=batch_size, **kwargs)
        p_values = {}
        if output.p_value is not None:
            p_values = {n: pipeline.normality.p_value(torch.from_numpy(s), n) for n, s in output.scores.items()}
        return Scored(output.maps, output.scores, p_values, output.category or ())

    settings = {"infer_category": infer_category, "at_resolution": at_resolution, **dict(sorted(kwargs.items()))}
    return keep_records(score, fingerprint(pipeline, settings), dataset, indices, folder, map_size, batch_size)


def keep_records(
    score: Callable[[list[ImageInput], str], Scored],
    fingerprint: "hashlib._Hash",
    dataset: AnomalyDataset,
    indices: Sequence[int],
    folder: str | os.PathLike,
    map_size: int = 256,
    batch_size: int = 4,
    dtype: type = np.float16,
) -> list[Record]:
    """Scores images of a data set with any method, or reads what an earlier run found, each from a file of its own.

    A file's name is a hash of all that its content depends on: the method, the arguments, the image, its mask and its
    category. It appears when it is complete. Batches hold one category and are the same for any number of processes,
    each of which scores its share; all get all records.

    Args:
        score: The method: images of one category, and its name.
        fingerprint: Hash of all that the method depends on.
        indices: Of the images to score.
        folder: Of the files, the same for all processes; created if need be.
        map_size: Maps and masks are kept at this square.
        dtype: Of the maps as they are kept.
    """
    folder, state, limit = Path(folder), PartialState(), np.finfo(dtype).max.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        remove_partials(folder)
    state.wait_for_everyone()
    common = fingerprint.copy()
    common.update(f"{map_size} {np.dtype(dtype)}".encode())
    batches = []
    for category in sorted({dataset.samples[i].category for i in indices}):
        members = [i for i in indices if dataset.samples[i].category == category]
        batches += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]

    names = {}
    own = batches[state.process_index :: state.num_processes]
    for batch in tqdm(own, "Scoring", disable=not state.is_local_main_process):
        category = dataset.samples[batch[0]].category
        images, masks = [dataset[i].image for i in batch], [dataset.mask(i, (map_size, map_size)) for i in batch]
        paths = []
        for image, mask in zip(images, masks, strict=True):
            key = common.copy()
            content = image.read_bytes() if isinstance(image, Path) else np.asarray(read(image)).tobytes()
            for part in (content, b"" if mask is None else mask.tobytes(), category.encode()):
                key.update(hashlib.sha256(part).digest())
            paths.append(folder / f"{key.hexdigest()[:32]}.safetensors")
        names |= {i: path.name for i, path in zip(batch, paths, strict=True)}
        if all(path.exists() for path in paths):
            continue

        start = time.perf_counter()
        found = score(images, category)
        seconds = (time.perf_counter() - start) / len(batch)
        kept: list[dict[str, np.ndarray]] = [{} for _ in batch]
        for name, maps in found.maps.items():  # one score after another: at their own size all would fill the memory
            for tensors, own_size in zip(kept, maps, strict=True):
                tensors[name] = resize_square(own_size, map_size).clip(-limit, limit).astype(dtype)
        for i, (path, mask, tensors) in enumerate(zip(paths, masks, kept, strict=True)):
            record = {
                "scores": {name: float(values[i]) for name, values in found.scores.items()},
                "p_values": {name: float(values[i]) for name, values in found.p_values.items()},
                "used_category": found.categories[i] if found.categories else None,
                "has_mask": mask is not None,
                "seconds": seconds,
            }
            tensors |= {"mask": mask} if mask is not None and mask.any() else {}
            with whole(path) as partial:
                save_file(tensors, partial, metadata={"record": json.dumps(record)})

    names, records = dict(gather_object(list(names.items()))), []
    for i in indices:
        path, sample = folder / names[i], dataset.samples[i]
        with _open(path) as file:
            content = json.loads(file.metadata()["record"])
        records.append(Record(path, i, sample.category, sample.defect, **content))
    return records


def resize_square(own_size: np.ndarray, size: int) -> np.ndarray:
    """A map [h, w] as float32 [size, size], averaged where it shrinks."""
    own_size = torch.from_numpy(np.asarray(own_size))[None, None].float()
    return F.interpolate(own_size, (size, size), mode="bilinear", antialias=True)[0, 0].numpy()


def fingerprint(pipeline: RADPipeline, settings: Any) -> "hashlib._Hash":
    """A hash, to be continued, of all that maps depend on beside the images: configuration, weights, code and the
    settings, which JSON can write."""
    digest = hash_pipeline(pipeline)
    digest.update(hash_code().digest() + json.dumps(settings, sort_keys=True).encode())
    return digest


def hash_code() -> "hashlib._Hash":
    """Of this package's code, as far as numbers depend on it, and of the libraries' versions."""
    digest = hashlib.sha256(json.dumps({name: version(name) for name in LIBRARIES}).encode())
    for path in sorted([*SOURCE.glob("*.py"), *(SOURCE / "models").glob("*.py")]):
        if path.name not in PRESENTATION:
            digest.update(path.name.encode() + path.read_bytes())
    return digest


def hash_pipeline(pipeline: RADPipeline) -> "hashlib._Hash":
    """Of a pipeline's configuration and weights."""
    digest, parts = hashlib.sha256(), {"pipeline": pipeline, **pipeline.components}
    for name, part in sorted(parts.items()):
        if part is None:
            continue
        config = {k: v for k, v in getattr(part, "config", {}).items() if not k.startswith("_")}  # no local paths
        config = {k: v for k, v in config.items() if k not in parts}
        digest.update(f"{name} {json.dumps(config, sort_keys=True, default=str)}".encode())
        for key, tensor in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise OSError(f"{path} is damaged ({error}): delete it, and run again.") from error


# -- metrics ----------------------------------------------------------------------------------------------------------


def measure(
    truths: Sequence[Truth | Record], scores: Sequence[float] | np.ndarray, maps: Sequence[np.ndarray] | None = None
) -> dict[str, float]:
    """The metrics of one score that are not `undefined`: `image_metrics` and, where there are maps, `pixel_metrics`.

    Args:
        truths: Of N images; those without a known mask count at image level only.
        scores: [N].
        maps: Each image's [H, W], of its mask's size; may be read when they are asked for, several times.
    """
    missing, found = undefined(truths), {}
    if IMAGE_METRICS[0] not in missing:
        found |= image_metrics(np.asarray(scores), np.array([truth.label for truth in truths]))
    masked = [i for i, truth in enumerate(truths) if truth.has_mask]
    if maps is not None and PIXEL_METRICS[0] not in missing:
        found |= pixel_metrics(Lazy(maps.__getitem__, masked), Lazy(lambda i: truths[i].mask(), masked))
    return found


def measure_records(records: Sequence[Record], score_type: str, pixels: bool = True) -> dict[str, float]:
    """`measure` of one score of records; of its image scores alone without `pixels`, or where it has no map."""
    maps = Lazy(lambda record: record.map(score_type), records) if pixels and score_type != GLOBAL else None
    return measure(records, [record.scores[score_type] for record in records], maps)


def curves_of_records(records: Sequence[Record], score_type: str) -> dict[str, np.ndarray] | None:
    """`pixel_curves`; None where pixel metrics are `undefined`, and for the global score."""
    masked = [record for record in records if record.has_mask]
    if score_type == GLOBAL or PIXEL_METRICS[0] in undefined(records):
        return None
    maps = Lazy(lambda record: record.map(score_type), masked)
    return pixel_curves(maps, Lazy(Record.mask, masked), num_points=300)


def mean_metrics(rows: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean of each metric over the rows that have it; None where it is None in all."""
    found = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).extend([] if value is None else [value])
    return {name: float(np.mean(values)) if values else None for name, values in found.items()}


def measure_decisions(
    records: Sequence[Record], score_type: str, false_alarm_rates: Sequence[float], num_scores: int
) -> list[dict[str, Any]]:
    """How often an alarm is raised at each requested false-alarm rate, on good and on defective images.

    Args:
        num_scores: Good images that the thresholds rest on.

    Returns:
        For each rate: `false_alarms` among `num_good`; `interval`, which their number lies in with a probability of
        95 % or more if the rate holds (binomial), and whether it is `inside`; `interval_few`, the same for thresholds
        that rest on the ranks of `num_scores` good images, which is wider (beta-binomial); and `found` among
        `num_bad`. Without good images the intervals and `inside` are None.
    """
    good, bad = (np.array([r.p_values[score_type] for r in records if r.label == label]) for label in (0, 1))
    rows = []
    for rate in false_alarm_rates:
        alarms, interval, few = int((good <= rate).sum()), None, None
        if len(good):
            interval = [int(x) for x in binom.interval(0.95, len(good), rate)]
            few = betabinom.interval(0.95, len(good), rate * (num_scores + 1), (1 - rate) * (num_scores + 1))
        rows.append(
            {
                "false_alarm_rate": rate,
                "false_alarms": alarms,
                "num_good": len(good),
                "interval": interval,
                "inside": interval and interval[0] <= alarms <= interval[1],
                "interval_few": few and [int(x) for x in few],
                "found": int((bad <= rate).sum()),
                "num_bad": len(bad),
            }
        )
    return rows


def alpha_sweep(records: Sequence[Record], alpha: float) -> dict[str, float]:
    """Metrics of RAN's A = alpha z(KL) + (1 - alpha) (feature error), each the mean over t, from paper-mode records;
    the image score is the mean of the 64 largest pixels."""

    def fused(record: Record) -> np.ndarray:
        return alpha * record.map("pixel") + (1 - alpha) * record.map("feature")

    scores = [np.sort(fused(record), axis=None)[-64:].mean() for record in records]
    return measure(records, scores, Lazy(fused, records))
