"""Scores pictures by the thousand: one row for each, written as it goes, gone on with where it stopped."""

import csv
import io
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .data.inputs import Source
from .evaluation import fingerprint
from .files import whole
from .image_processor import overlay
from .image_reader import decode, read
from .pipeline_arguments import check_labels, rate_of
from .pipeline_rad import RADPipeline
from .visualization import encode_map

COLUMNS = ("path", "verdict", "p_value", "score", "regions", "anomalous_share", "category", "seconds", "error")
READ_AHEAD = 2  # batches that are decoded while the networks are busy
NAME = "predictions"
PART = re.compile(rf"{NAME}(-\d+-of-\d+)?\.jsonl")  # of one process


@dataclass(frozen=True)
class Outputs:
    """What is written of each picture beside its row.

    Attributes:
        overlays: Its heat over it, PNG, in `overlays/`.
        masks: Its regions, PNG of 0 and 255, in `masks/`.
        maps: Its anomaly map, in `maps/`: "png" of 16 bits, in which 8 + a value in deviations of good images is 1024
            each, or "npy" of float32; None for none.
    """

    overlays: bool = False
    masks: bool = False
    maps: str | None = None


class Predictions:
    """Rows in a folder: `predictions.jsonl`, with each region and score, and `predictions.csv`.

    Each of several processes writes rows of its own; `merge` makes one table of all, in the order of the pictures.

    Args:
        folder: Where to write. What an interrupted run of the same model and settings wrote is gone on with.
        settings: All that rows depend on, with names and values of JSON.
        overwrite: Begin anew where the folder holds predictions with other settings.
        rank, num_processes: This one's and how many there are.

    Raises:
        ValueError: The folder holds predictions of another model or other settings.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], overwrite: bool = False, rank: int = 0, num_processes: int = 1
    ) -> None:
        self.folder, self.rank, self.num_processes = folder, rank, num_processes
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / f"{NAME}-settings.json"
        if rank == 0:
            before = _settings(known) if known.exists() else settings
            if before != settings:
                changed = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
                if not overwrite:
                    raise ValueError(
                        f"{folder} holds predictions with another {', '.join(changed)}: give another folder, or "
                        "--overwrite to replace them."
                    )
                for path in (*self._parts(), folder / f"{NAME}.csv"):
                    path.unlink(missing_ok=True)
            with whole(known) as partial:
                partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def _parts(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{NAME}*.jsonl") if PART.fullmatch(path.name))

    def rows(self) -> dict[str, dict[str, Any]]:
        """All that is written, by name, of all processes; a last line that is not whole was being written, and a row
        with an error gives way to one without."""
        found: dict[str, dict[str, Any]] = {}
        for path in self._parts():
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    row = json.loads(line)
                    if row["path"] not in found or found[row["path"]]["error"]:
                        found[row["path"]] = row
        return found

    def append(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Writes rows as they come, and passes them on; both files hold all of a row, or none of it that counts."""
        part = f"-{self.rank}-of-{self.num_processes}" if self.num_processes > 1 else ""
        path, before = self.folder / f"{NAME}{part}.jsonl", self.rows() if self.num_processes == 1 else {}
        before = {name: row for name, row in before.items() if not row["error"]}  # these are tried again
        if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
            with whole(path) as partial:
                partial.write_bytes(content[: content.rfind(b"\n") + 1])
        # One of several processes leaves the table to `merge`
        table_path = os.devnull if self.num_processes > 1 else self.folder / f"{NAME}.csv"
        with (
            open(path, "a", encoding="utf-8") as lines,
            open(table_path, "w", newline="", encoding="utf-8", errors="backslashreplace") as table,
        ):
            table.write(to_csv(before.values(), heading=True))
            for row in rows:
                lines.write(json.dumps(row) + "\n")
                table.write(to_csv([row]))
                lines.flush(), table.flush()
                yield row

    def merge(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """One table of all processes' rows, in the order of the names; rows of no name come last."""
        rows, place = self.rows(), {name: i for i, name in enumerate(names)}
        ordered = sorted(rows.values(), key=lambda row: place.get(row["path"], len(place)))
        parts = [path for path in self._parts() if path.name != f"{NAME}.jsonl"]
        texts = {".jsonl": "".join(json.dumps(row) + "\n" for row in ordered), ".csv": to_csv(ordered, heading=True)}
        for suffix, text in texts.items():
            with whole(self.folder / f"{NAME}{suffix}") as partial:
                partial.write_bytes(text.encode(errors="backslashreplace"))
        for path in parts:
            path.unlink()
        return ordered


def settings_of(
    pipeline: RADPipeline, false_alarm_rate: float | None, category: str | None, outputs: Outputs
) -> dict[str, Any]:
    """All that rows depend on, for `Predictions`; raises ValueError for what the pipeline does not know."""
    if pipeline.normality is None:
        raise ValueError("The pipeline has no normality model: call fit_normality first.")
    check_labels(category, 1, pipeline.categories)
    rate = rate_of(false_alarm_rate, pipeline.normality)
    own = {"false_alarm_rate": rate, "category": category, **asdict(outputs)}
    return {"model": fingerprint(pipeline, {}).hexdigest()[:16], **own}


def predict(
    pipeline: RADPipeline,
    sources: Sequence[Source],
    false_alarm_rate: float | None = None,
    category: str | None = None,
    batch_size: int = 4,
    num_threads: int = 2,
    folder: Path | None = None,
    outputs: Outputs = Outputs(),
) -> Iterator[dict[str, Any]]:
    """One row for each picture, in order; one that cannot be read or judged is a row with its error.

    Memory holds a few batches of pictures, however many there are: those of the next batches are decoded by threads
    while the networks look at one.

    Args:
        pipeline: With a normality model.
        sources: From `list_inputs`.
        false_alarm_rate: On good parts, in (0, 1); by default as in scoring.
        category: What all pictures show; by default the pipeline finds out.
        batch_size: Pictures in one stacked pass.
        num_threads: That decode.
        folder: Where the outputs go.
        outputs: What to write beside the rows.

    Yields:
        `path`, `place` (of its pictures in the output folders), `verdict` ("good", "defect" or "error"), `p_value`,
        `score`, `threshold`, `scores` by type, `regions` (box, area and peak of each), `anomalous_share` of the
        picture, `category`, `seconds` and `error`; numbers are None in a row with an error.
    """
    pending: deque[tuple[Source, Future]] = deque()
    remaining = iter(sources)
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        while True:
            for source in islice(remaining, (1 + READ_AHEAD) * batch_size - len(pending)):
                pending.append((source, pool.submit(lambda source=source: read(source.fetch()))))
            if not pending:
                return
            batch = [pending.popleft() for _ in range(min(batch_size, len(pending)))]
            start, found = time.monotonic(), {}
            images: dict[int, Any] = {}
            for i, (source, future) in enumerate(batch):
                try:
                    images[i] = future.result()
                except (ValueError, OSError, RuntimeError) as error:
                    found[i] = _failed(source, error)
            try:
                found |= _judge(pipeline, images, batch, false_alarm_rate, category, folder, outputs)
            except ValueError:  # of which one does not fit the model: each by itself
                for i, image in images.items():
                    try:
                        found |= _judge(pipeline, {i: image}, batch, false_alarm_rate, category, folder, outputs)
                    except ValueError as error:
                        found[i] = _failed(batch[i][0], error)
            seconds = (time.monotonic() - start) / len(batch)
            for i in range(len(batch)):
                yield found[i] | {"seconds": round(seconds, 4)}


def _judge(
    pipeline: RADPipeline,
    images: dict[int, Any],
    batch: Sequence[tuple[Source, Any]],
    false_alarm_rate: float | None,
    category: str | None,
    folder: Path | None,
    outputs: Outputs,
) -> dict[int, dict[str, Any]]:
    if not images:
        return {}
    output = pipeline(list(images.values()), class_labels=category, false_alarm_rate=false_alarm_rate)
    rows = {}
    for k, (i, image) in enumerate(images.items()):
        source, mask = batch[i][0], output.mask[k]
        rows[i] = {
            "path": source.name,
            "place": source.place,
            "verdict": "defect" if output.is_anomalous[k] else "good",
            "p_value": float(output.p_value[k]),
            "score": float(output.score[k]),
            "threshold": float(output.threshold),
            "scores": {score_type: float(values[k]) for score_type, values in output.scores.items()},
            "regions": [asdict(region) for region in output.regions[k]],
            "anomalous_share": float(mask.mean()),
            "category": output.category[k],
            "error": "",
        }
        if folder is not None:
            _write(folder, source.place, outputs, image, output.anomaly_map[k], mask, pipeline)
    return rows


def _failed(source: Source, error: Exception) -> dict[str, Any]:
    numbers = dict.fromkeys(("p_value", "score", "threshold", "scores", "regions", "anomalous_share", "category"))
    return {"path": source.name, "place": source.place, "verdict": "error", **numbers, "error": str(error)}


def _write(
    folder: Path,
    place: str,
    outputs: Outputs,
    image: Any,
    anomaly_map: np.ndarray,
    mask: np.ndarray,
    pipeline: RADPipeline,
) -> None:
    """The pictures that belong to a row."""

    def path_of(kind: str, suffix: str) -> Path:
        path = folder / kind / f"{place}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    shown = {}
    if outputs.overlays:
        picture = decode(image, pipeline.image_processor.pixel_range)
        shown["overlays"] = overlay(picture, anomaly_map, *pipeline.normality.heat_range())
    if outputs.masks:
        shown["masks"] = Image.fromarray(mask)
    if outputs.maps == "png":
        shown["maps"] = encode_map(anomaly_map)
    for kind, picture in shown.items():
        with whole(path_of(kind, ".png")) as partial:
            picture.save(partial)
    if outputs.maps == "npy":
        with whole(path_of("maps", ".npy")) as partial:
            np.save(partial, anomaly_map)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    return settings if isinstance(settings, dict) else {"settings file": "damaged"}


def to_csv(rows: Any, heading: bool = False) -> str:
    """Rows under `COLUMNS`, of the regions their number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, extrasaction="ignore")
    if heading:
        writer.writeheader()
    for row in rows:
        regions = None if row["regions"] is None else len(row["regions"])
        writer.writerow({name: harmless(value) for name, value in row.items()} | {"regions": regions})
    return text.getvalue()


def harmless(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value
