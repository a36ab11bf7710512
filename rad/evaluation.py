"""A pipeline on images whose truth is known: the test images of a data set, or good ones with defects pasted on.

`score_dataset` keeps what it finds in files, one for each image, so that it can go on where it was stopped, several
processes can share the work, and maps are read when they are needed.
"""

import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import PartialState
from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.stats import betabinom, binom
from tqdm.auto import tqdm

from . import __version__
from .data import AnomalyDataset, Sample
from .data.defects import DEFECTS, add_defect
from .image_processor import decode, to_pil
from .metrics import image_auroc, image_metrics, pixel_curves, pixel_metrics
from .models.evidence import GLOBAL
from .pipeline_rad import RADPipeline, RADPipelineOutput

METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
HALF_MAX = float(np.finfo(np.float16).max)


def evenly(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` positions, evenly spread."""
    if limit is None or limit >= count:
        return list(range(count))
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def test_images(dataset: AnomalyDataset, size: tuple[int, int], limit: int | None = None) -> list[dict[str, Any]]:
    """Images of a test split: {"image", "mask" (bool [size], or None), "label", "category", "defect"}.

    Args:
        dataset: The test split.
        size: Height and width of the masks.
        limit: At most this many, evenly picked.
    """
    return [
        {
            "image": sample.image,
            "mask": dataset.mask(i, size),
            "label": sample.label,
            "category": sample.category,
            "defect": sample.defect,
        }
        for i in evenly(len(dataset), limit)
        for sample in [dataset[i]]
    ]


test_images.__test__ = False  # no test of pytest's


def pasted_defects(dataset: AnomalyDataset, count: int, size: tuple[int, int], seed: int = 0) -> list[dict[str, Any]]:
    """Like `test_images`, from `count` good images, each once as it is and once with a synthetic defect pasted on."""
    images = []
    for position, i in enumerate(evenly(len(dataset), count)):
        good, rng = decode(dataset[i].image), np.random.default_rng([seed, i])
        kind = DEFECTS[position % len(DEFECTS)]
        bad, mask = add_defect(np.asarray(good), kind, rng.uniform(0.1, 1.0), rng)
        mask = np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
        common = {"category": dataset[i].category}
        images.append({"image": good, "mask": np.zeros(size, bool), "label": 0, "defect": "good", **common})
        images.append(
            {"image": Image.fromarray(bad), "mask": mask if mask.any() else None, "label": 1, "defect": kind, **common}
        )
    return images


def score_images(
    pipeline: RADPipeline,
    images: list[dict[str, Any]],
    map_size: int = 256,
    batch_size: int = 4,
    **kwargs: Any,
) -> dict[str, Any]:
    """Maps [N, map_size, map_size] and scores [N] of each score type.

    Args:
        images: From `test_images` or `pasted_defects`; the pipeline guesses the categories that it does not know.
        kwargs: Further arguments of the pipeline.
    """
    pipeline.set_progress_bar_config(disable=True)
    known = [] if pipeline.normality is None else pipeline.normality.config.categories
    maps, scores = {}, {}
    for start in tqdm(range(0, len(images), batch_size), desc="Scoring"):
        batch = images[start : start + batch_size]
        named = all(item["category"] in known for item in batch)
        output = pipeline(
            [item["image"] for item in batch],
            class_labels=[item["category"] for item in batch] if named else None,
            batch_size=batch_size,
            **kwargs,
        )
        for name, resized in resize_maps(output, map_size).items():
            maps.setdefault(name, []).append(resized)
        for name, values in output.scores.items():
            scores.setdefault(name, []).append(values)
    return {
        "maps": {name: np.concatenate(m) for name, m in maps.items()},
        "scores": {name: np.concatenate(s) for name, s in scores.items()},
    }


def resize_maps(output: RADPipelineOutput, size: int) -> dict[str, np.ndarray]:
    """The maps of each score type as float32 [B, size, size]; the pipeline's are at each image's own size."""
    maps = {}
    for name in (name for name in output.scores if name != GLOBAL):
        maps[name] = np.stack([resize_map(m, size) for m in output.maps[name]])
    return maps


def resize_map(own_size: np.ndarray, size: int) -> np.ndarray:
    """A map [h, w] as float32 [size, size]."""
    own_size = torch.from_numpy(own_size)[None, None].float()
    return F.interpolate(own_size, (size, size), mode="bilinear", antialias=True)[0, 0].numpy()


def measure(images: list[dict], maps: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """The four metrics of one score; images without a known mask count at image level only."""
    labels = np.array([item["label"] for item in images])
    masked = [i for i, item in enumerate(images) if item["mask"] is not None]
    found = pixel_metrics(maps[masked], np.stack([images[i]["mask"] for i in masked]), (0.3,))
    return {"image_auroc": image_auroc(scores, labels)} | {name: found[name] for name in METRICS[1:]}


def measure_categories(images: list[dict], found: dict) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of each score for each category, and their means over categories as "mean"."""
    names = sorted({item["category"] for item in images})
    results = {}
    for score_type in found["maps"]:
        rows = {}
        for name in names:
            members = [i for i, item in enumerate(images) if item["category"] == name]
            rows[name] = measure(
                [images[i] for i in members], found["maps"][score_type][members], found["scores"][score_type][members]
            )
        rows["mean"] = {metric: float(np.mean([row[metric] for row in rows.values()])) for metric in METRICS}
        results[score_type] = rows
    return results


# -- one file for each image ------------------------------------------------------------------------------------------


class Lazy(Sequence):
    """Items made when they are asked for: `read(source)` of each source."""

    def __init__(self, read: Callable[[Any], np.ndarray], sources: Sequence):
        self.read, self.sources = read, sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.read(self.sources[index])


class PastedDataset(AnomalyDataset):
    """What `pasted_defects` gives, as a data set."""

    def __init__(self, images: list[dict[str, Any]]):
        super().__init__([Sample(item["image"], item["category"], item["defect"]) for item in images])
        self.masks = [item["mask"] for item in images]

    def mask(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray | None:
        mask = self.masks[index]
        if mask is None or size is None or mask.shape == size:
            return mask
        return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


@dataclass(frozen=True)
class Record:
    """What a pipeline found on one image; maps and mask are read from the file when they are asked for.

    Attributes:
        path: The file, safetensors: a map [S, S] float16 for each score type and, of a defective image with a known
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

    def map(self, score_type: str) -> np.ndarray:
        """Float32 [S, S]."""
        with _open(self.path) as file:
            return file.get_tensor(score_type).astype(np.float32)

    def mask(self) -> np.ndarray:
        """Bool [S, S]: what is defective; nothing where no mask is known."""
        with _open(self.path) as file:
            if "mask" in file.keys():
                return file.get_tensor("mask")
            return np.zeros(file.get_slice("fused").get_shape(), bool)


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
    """Scores images of a data set, or reads what an earlier run found, and keeps each result in a file of its own.

    A file's name is a hash of all that its content depends on: the pipeline's weights and code, the arguments, the
    image, its mask and its category. It appears when it is complete. Batches hold one category and are the same for
    any number of processes, each of which scores its share; all get all records.

    Args:
        indices: Of the images to score.
        folder: Of the files, the same for all processes; created if need be.
        map_size: Maps and masks are kept at this square.
        infer_category: Let the pipeline guess each category.
        at_resolution: Resize images to the pipeline's resolution first, so that maps of that size are not resized.
        kwargs: `mode`, `num_noise_samples` and `seed` of the pipeline.
    """
    folder, state = Path(folder), PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        for path in folder.glob("*.partial-*"):  # of a run that was killed
            path.unlink()
    state.wait_for_everyone()
    pipeline.set_progress_bar_config(disable=True)
    known = [] if pipeline.normality is None else pipeline.normality.config.categories
    settings = {"map_size": map_size, "at_resolution": at_resolution, **dict(sorted(kwargs.items()))}
    common = fingerprint(pipeline, settings)
    batches = []
    for category in sorted({dataset.samples[i].category for i in indices}):
        members = [i for i in indices if dataset.samples[i].category == category]
        batches += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]

    names = {}
    own = batches[state.process_index :: state.num_processes]
    for batch in tqdm(own, "Scoring", disable=not state.is_local_main_process):
        given = dataset.samples[batch[0]].category
        given = given if given in known and not infer_category else None
        images, masks = [dataset[i].image for i in batch], [dataset.mask(i, (map_size, map_size)) for i in batch]
        paths = []
        for image, mask in zip(images, masks, strict=True):
            key = common.copy()
            content = image.read_bytes() if isinstance(image, Path) else decode(image).tobytes()
            for part in (content, b"" if mask is None else mask.tobytes(), str(given).encode()):
                key.update(hashlib.sha256(part).digest())
            paths.append(folder / f"{key.hexdigest()[:32]}.safetensors")
        names |= {i: path.name for i, path in zip(batch, paths, strict=True)}
        if all(path.exists() for path in paths):
            continue

        start = time.perf_counter()
        if at_resolution:
            images = to_pil(pipeline.image_processor.preprocess(images)[0])
        output = pipeline(images, class_labels=given, batch_size=batch_size, **kwargs)
        seconds = (time.perf_counter() - start) / len(batch)
        maps, p_values = resize_maps(output, map_size), {}
        if output.p_value is not None:
            p_values = {n: pipeline.normality.p_value(torch.from_numpy(s), n) for n, s in output.scores.items()}
        for i, (path, mask) in enumerate(zip(paths, masks, strict=True)):
            tensors = {name: m[i].clip(-HALF_MAX, HALF_MAX).astype(np.float16) for name, m in maps.items()}
            record = {
                "scores": {name: float(values[i]) for name, values in output.scores.items()},
                "p_values": {name: float(values[i]) for name, values in p_values.items()},
                "used_category": output.category[i] if output.category else None,
                "has_mask": mask is not None,
                "seconds": seconds,
            }
            partial = path.with_suffix(f".partial-{os.getpid()}")
            save_file(
                tensors | ({"mask": mask} if mask is not None and mask.any() else {}),
                partial,
                metadata={"record": json.dumps(record)},
            )
            os.replace(partial, path)

    names = dict(item for item in gather_object(list(names.items())))
    return [_read_record(folder / names[i], i, dataset.samples[i]) for i in indices]


def fingerprint(pipeline: RADPipeline, settings: Any) -> "hashlib._Hash":
    """A hash, to be continued, of all that maps depend on beside the image: code, configuration, weights, settings."""
    digest = hashlib.sha256(f"{__version__} {json.dumps(settings, sort_keys=True)}".encode())
    parts = {"pipeline": pipeline, "image_processor": pipeline.image_processor, **pipeline.components}
    for name, part in sorted(parts.items()):
        if part is None:
            continue
        config = {k: v for k, v in getattr(part, "config", {}).items() if not k.startswith("_")}  # no local paths
        config = {k: v for k, v in config.items() if k not in pipeline.components}
        digest.update(f"{name} {json.dumps(config, sort_keys=True, default=str)}".encode())
        digest.update(inspect.getsource(sys.modules[type(part).__module__]).encode())
        for key, tensor in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest


def write(path: Path, text: str) -> None:
    """The file is there as a whole or as it was."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise OSError(f"{path} is damaged ({error}): delete it, and run again.") from error


def _read_record(path: Path, index: int, sample: Sample) -> Record:
    with _open(path) as file:
        content = json.loads(file.metadata()["record"])
    return Record(path, index, sample.category, sample.defect, **content)


# -- what the records say ---------------------------------------------------------------------------------------------


def measure_records(records: Sequence[Record], score_type: str, pixels: bool = True) -> dict[str, float]:
    """`image_metrics`, where there are good and bad images, and `pixel_metrics`, where masks are known."""
    scores = [record.scores[score_type] for record in records]
    pixels = pixels and score_type != GLOBAL
    return _measure(records, scores, (lambda record: record.map(score_type)) if pixels else None)


def _measure(records: Sequence[Record], scores: list[float], read: Callable[[Record], np.ndarray] | None) -> dict:
    labels, found = np.array([record.label for record in records]), {}
    if len(set(labels.tolist())) == 2:
        found |= image_metrics(np.array(scores), labels)
    masked = [record for record in records if record.has_mask]
    if read is not None and any(record.label for record in masked):
        found |= pixel_metrics(Lazy(read, masked), Lazy(Record.mask, masked))
    return found


def curves_of_records(records: Sequence[Record], score_type: str) -> dict[str, np.ndarray] | None:
    """`pixel_curves`; None where no masks are known, and for the global score."""
    masked = [record for record in records if record.has_mask]
    if score_type == GLOBAL or not any(record.label for record in masked):
        return None
    maps = Lazy(lambda record: record.map(score_type), masked)
    return pixel_curves(maps, Lazy(Record.mask, masked), num_points=300)


def mean_metrics(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def measure_decisions(
    records: Sequence[Record], score_type: str, false_alarm_rates: Sequence[float], num_scores: int
) -> list[dict[str, Any]]:
    """How often an alarm is raised at each requested false-alarm rate, on good and on defective images.

    Args:
        num_scores: Good images that the thresholds rest on.

    Returns:
        For each rate, if there are good images: `false_alarms` among `num_good`; `interval`, which their number lies
        in with a probability of 95 % or more if the rate holds (binomial), and whether it is `inside`;
        `interval_few`, the same for thresholds that rest on the ranks of `num_scores` good images, which is wider
        (beta-binomial); and `found` among `num_bad`.
    """
    good, bad = (np.array([r.p_values[score_type] for r in records if r.label == label]) for label in (0, 1))
    rows = []
    for rate in false_alarm_rates if len(good) else ():
        alarms = int((good <= rate).sum())
        low, high = (int(x) for x in binom.interval(0.95, len(good), rate))
        few = betabinom.interval(0.95, len(good), rate * (num_scores + 1), (1 - rate) * (num_scores + 1))
        rows.append(
            {
                "false_alarm_rate": rate,
                "false_alarms": alarms,
                "num_good": len(good),
                "interval": [low, high],
                "inside": low <= alarms <= high,
                "interval_few": [int(x) for x in few],
                "found": int((bad <= rate).sum()),
                "num_bad": len(bad),
            }
        )
    return rows


def alpha_sweep(records: Sequence[Record], alpha: float) -> dict[str, float]:
    """Metrics of RAN's A = alpha z(KL) + (1 - alpha) (feature error), each the mean over t, from paper-mode records.

    The image score is the mean of the 64 largest pixels.
    """

    def fused(record: Record) -> np.ndarray:
        return alpha * record.map("pixel") + (1 - alpha) * record.map("feature")

    return _measure(records, [np.sort(fused(r), axis=None)[-64:].mean() for r in records], fused)
