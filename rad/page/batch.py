"""The tab Batch: many pictures, or archives of them, one row each."""

import csv
import html
import json
import tempfile
import time
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import gradio as gr

from rad.data.inputs import MAX_BYTES, list_members
from rad.data.listing import foreign
from rad.image_processor import overlay
from rad.models.evidence import FUSED
from rad.models.false_alarms import check_rate
from rad.prediction import harmless
from rad.visualization import encode_map

from . import models, visitors
from .inspection import Inspection, among_good, decide, score
from .look import RATES, empty
from .settings import Settings
from .words import handler, percent, without_folders

MAX_PICTURES = 1000
MAP_SIDE = 512  # pixels of the longer side of a map in the archive
THUMBNAIL_SIDE = 320
REFRESH_SECONDS = 1.0
GALLERY = 60
HEADERS = ["picture", "verdict", "score", "p-value", "surface", "product", "error"]

HELP = """
Drop many pictures, or a zip of them. Each gets a row; a file that is no picture gets one too, with the reason,
except hidden files, thumbnails and files of the system's, which are skipped (`.DS_Store`, `@eaDir`, `Thumbs.db`). The
**p-value** is how often a good part scores as high. A heading's menu, there when you point at it, sorts and filters.
Moving the alarm above changes the verdicts at once.
"""
FIGURE = "All scores among those of good parts"
NO_SUMMARY = "<div class='verdict'><strong>No pictures yet</strong><p>Drop files on the left.</p></div>"


@dataclass(frozen=True)
class Row:
    """One file: its numbers, or why there are none."""

    name: str
    error: str = ""
    score: float = float("nan")
    p_value: float = float("nan")
    category: str = ""
    shares: dict[float, float] = field(default_factory=dict)  # of the surface, at each rate asked for
    thumbnail: Path | None = None
    map: Path | None = None

    def verdict(self, rate: float) -> str:
        return "error" if self.error else "defect" if self.p_value <= rate else "good"

    def share(self, rate: float) -> float:
        return self.shares[rate]


@dataclass
class Batch:
    """All rows so far; a list that grows while the pictures are scored."""

    model: str
    total: int
    token: str  # of the files
    rows: list[Row] = field(default_factory=list)
    rate: float | None = None  # false alarms that the visitor has set since the batch began


# -- reading ----------------------------------------------------------------------------------------------------------


def list_files(paths: list[str]) -> tuple[list[tuple[str, Path, zipfile.ZipInfo | None]], list[str]]:
    """Every picture in files and archives: the name to show, the file, and the member of an archive; and the names of
    what is skipped, hidden files, thumbnails and the system's.

    Raises:
        ValueError: There is none, or there are more than MAX_PICTURES.
    """
    files: list[tuple[str, Path, zipfile.ZipInfo | None]] = []
    skipped: list[str] = []
    for path in map(Path, paths or []):
        try:
            members = list_members(path, 10 * MAX_PICTURES) if path.suffix.lower() == ".zip" else None
        except zipfile.BadZipFile:
            members = None  # a row with its error, from `fetch`
        for member in [None] if members is None else members:
            name = path.name if member is None else f"{path.stem}/{member.filename}"
            if foreign(PurePosixPath(path.name if member is None else member.filename)):
                skipped.append(name)
            else:
                files.append((name, path, member))
    if not files:
        raise ValueError("Give pictures, or a zip with pictures in it.")
    if len(files) > MAX_PICTURES:
        raise ValueError(f"At most {MAX_PICTURES:,} pictures are taken at a time; these are {len(files):,}.")
    return files, skipped


def fetch(path: Path, member: zipfile.ZipInfo | None, folder: Path) -> Path:
    """The picture as a file of its own: a member of an archive is written to the folder, under no name of its own."""
    if member is None:
        if path.suffix.lower() == ".zip":
            raise ValueError(f"{path.name} is damaged, or no zip archive.")
        return path
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            content = file.read(MAX_BYTES + 1)  # not what its heading claims
    except Exception as error:  # zipfile and each compression have errors of their own
        raise ValueError(f"It cannot be taken from the archive ({error}).") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"It has more than {MAX_BYTES / 1e6:.0f} MB.")
    target = folder / "picture"
    target.write_bytes(content)
    return target


# -- actions ----------------------------------------------------------------------------------------------------------


def score_all(
    paths: list[str], model: str, category: str, owner: str | None, rates: Collection[float] = RATES
) -> Iterator[Batch]:
    """Scores picture after picture; yields the batch as it grows.

    Args:
        owner: The session that the results are kept for; they end with it.
        rates: False-alarm rates at which the results can be asked for.
    """
    for rate in rates:
        check_rate(rate)
    models.normality(model)  # raises if there is none, once and not for each picture
    files, _ = list_files(paths)
    batch = Batch(model, len(files), visitors.keep(owner))
    yield batch
    for name, path, member in files:
        folder = visitors.folder(batch.token)  # raises when the visitor has left
        with tempfile.TemporaryDirectory() as temporary:
            try:
                inspection = score(str(fetch(path, member, Path(temporary))), model, category)
                row = make_row(name, inspection, folder / f"{len(batch.rows):04d}", rates)
            except (ValueError, OSError) as error:
                row = Row(name, error=without_folders(str(error)))
        batch.rows.append(row)
        yield batch


def make_row(name: str, inspection: Inspection, stem: Path, rates: Collection[float]) -> Row:
    """The numbers of a picture; its map and a thumbnail with heat go to files."""
    view = inspection.view.copy()
    view.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    heat = overlay(view, inspection.map(view.size), *models.normality(inspection.model).heat_range())
    heat.save(stem.with_suffix(".webp"), quality=80)
    scale = min(1.0, MAP_SIDE / max(inspection.size))
    size = tuple(max(1, round(scale * side)) for side in inspection.size)
    encode_map(inspection.map(size)).save(stem.with_suffix(".png"))
    decisions = {rate: decide(inspection, rate, size)[1] for rate in rates}
    shares = {rate: float(decision.mask[0].mean()) for rate, decision in decisions.items()}
    p_value = float(next(iter(decisions.values())).p_value[0])  # the same at any rate
    numbers = float(inspection.scores[FUSED][0]), p_value, inspection.category, shares
    return Row(name, "", *numbers, stem.with_suffix(".webp"), stem.with_suffix(".png"))


def table(batch: Batch, rate: float) -> list[list[str | float | None]]:
    """Rows under `HEADERS`, as people read them, in the files' order; no p-value that good pictures cannot tell."""
    least = models.normality(batch.model).p_value_resolution
    return [
        [
            row.name,
            row.verdict(rate),
            None if row.error else round(row.score, 2),
            None if row.error else float(f"{max(row.p_value, least):.2g}"),
            "" if row.error else percent(row.share(rate)),
            row.category,
            row.error,
        ]
        for row in batch.rows
    ]


def summary(batch: Batch, rate: float) -> str:
    verdicts = [row.verdict(rate) for row in batch.rows]
    bad, errors = verdicts.count("defect"), verdicts.count("error")
    kind = "" if len(batch.rows) < batch.total else "bad" if bad else "good"
    left = f"{len(batch.rows)} of {batch.total} pictures done. " if len(batch.rows) < batch.total else ""
    unread = f" {errors} file{'s' * (errors != 1)} could not be read." if errors else ""
    return (
        f"<div class='verdict {kind}' role='status'><strong>{bad} defect{'s' * (bad != 1)} in "
        f"{len(verdicts) - errors}</strong><p>{left}Alarm set to {100 * rate:g} % of good parts.{unread}</p>"
        f"<p class='note'>Model: {html.escape(models.title(batch.model))}.</p></div>"
    )


def gallery(batch: Batch, rate: float) -> list[tuple[str, str]]:
    """Thumbnails that are still kept, the oddest first."""
    rows = [row for row in batch.rows if row.thumbnail is not None and row.thumbnail.is_file()]
    rows.sort(key=lambda row: (row.p_value, -row.score))
    return [(str(row.thumbnail), f"{row.verdict(rate)}, {row.score:.1f}: {row.name}") for row in rows[:GALLERY]]


def plot(batch: Batch, rate: float) -> str:
    scores = [row.score for row in batch.rows if not row.error]
    return among_good(batch.model, rate, scores, f"Scores of {len(scores)} pictures", "pictures")


def records(batch: Batch, rate: float) -> list[dict]:
    """The rows as programs read them."""
    least = models.normality(batch.model).p_value_resolution
    return [
        {
            "picture": row.name,
            "verdict": row.verdict(rate),
            "score": None if row.error else row.score,
            "p_value": None if row.error else row.p_value,
            "p_value_resolution": least,
            "anomalous_share": None if row.error else row.share(rate),
            "category": row.category,
            "error": row.error,
            "map": "" if row.map is None else f"maps/{row.map.name}",
        }
        for row in batch.rows
    ]


def save(batch: Batch, rate: float, folder: Path) -> list[str]:
    """Writes the table as CSV and JSON, and a zip of all maps as 16-bit PNG; returns their paths."""
    visitors.folder(batch.token)  # raises when the maps are gone
    rows = records(batch, rate)
    paths = [folder / name for name in ("batch.csv", "batch.json", "maps.zip")]
    with open(paths[0], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({name: harmless(value) for name, value in row.items()} for row in rows)
    content = {"model": models.title(batch.model), "false_alarm_rate": rate, "pictures": rows}
    paths[1].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with zipfile.ZipFile(paths[2], "w") as archive:
        for row in batch.rows:
            if row.map is not None:
                archive.write(row.map, f"maps/{row.map.name}")
    return [str(path) for path in paths]


# -- handlers ---------------------------------------------------------------------------------------------------------


@handler
def on_run(
    paths: list[str] | None,
    model: str,
    category: str,
    rate: float,
    request: gr.Request,
    progress: gr.Progress = gr.Progress(),
) -> Iterator[tuple]:
    """Rows as they come, at the rate that is set by then; gallery and plot follow from `on_redraw`."""
    last = 0.0
    for batch in score_all(paths, model, category, request.session_hash):
        rate = batch.rate or rate
        done = len(batch.rows)
        progress((done, batch.total), desc="Scoring the pictures", unit="pictures")
        if not done:  # what belongs to the batch before goes
            yield batch, summary(batch, rate), table(batch, rate), [], empty(FIGURE), None
        elif time.monotonic() - last > REFRESH_SECONDS or done == batch.total:
            last = time.monotonic()
            yield batch, summary(batch, rate), table(batch, rate), gr.skip(), gr.skip(), gr.skip()


@handler
def on_redraw(batch: Batch | None, rate: float) -> tuple | list:
    if batch is None or not batch.rows:
        return [gr.skip()] * 4
    batch.rate = rate  # for a batch that still runs
    return show(batch, rate)


@handler
def on_save(batch: Batch | None, rate: float, request: gr.Request) -> list[str]:
    if batch is None or not batch.rows:
        raise ValueError("Score some pictures first.")
    return save(batch, rate, visitors.new_folder(request.session_hash))


def show(batch: Batch, rate: float) -> tuple:
    any_scored = any(not row.error for row in batch.rows)
    figure = plot(batch, rate) if any_scored else empty("No picture could be read.")
    return summary(batch, rate), table(batch, rate), gallery(batch, rate), figure


# -- the tab ----------------------------------------------------------------------------------------------------------


def build(settings: Settings) -> None:
    batch = gr.State(time_to_live=visitors.KEPT_SECONDS)
    gr.Markdown(HELP)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            files = gr.Files(label="Pictures, or zips of pictures", height=220)
            with gr.Row():
                run = gr.Button("Inspect all", variant="primary", min_width=120)
                stop = gr.Button("Cancel", variant="stop", min_width=120)
            save_button = gr.Button("Save results (CSV, JSON, maps)")
            saved = gr.Files(label="Results", interactive=False, height=170)
        with gr.Column(scale=3, min_width=320):
            headline = gr.HTML(NO_SUMMARY)
            figure = gr.HTML(empty(FIGURE), elem_classes="figure")
    rows = gr.Dataframe(
        headers=HEADERS,
        datatype=["str", "str", "number", "number", "str", "str", "str"],
        label="Pictures; the surface is the share that raises the alarm",
        interactive=False,
        max_height=420,
        wrap=True,
        column_widths=["240px", "90px", "80px", "90px", "90px", "130px", "300px"],
        buttons=["fullscreen"],
        elem_classes="wide-content",
    )
    pictures = gr.Gallery(
        label=f"The oddest first, {GALLERY} at most",
        columns=4,
        height=420,
        object_fit="contain",
        format="webp",
        elem_classes="wide-content",
    )

    shown = [headline, rows, pictures, figure]
    running = run.click(
        on_run,
        [files, settings.model, settings.category, settings.rate],
        [batch, *shown, saved],
        concurrency_id="batch",
        concurrency_limit=1,
        show_progress_on=[figure],
        api_visibility="private",
    )
    redrawing = {
        "fn": on_redraw,
        "inputs": [batch, settings.rate],
        "outputs": shown,
        "concurrency_limit": 4,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    running.success(**redrawing)
    stop.click(**redrawing, cancels=[running])
    settings.rate.input(**redrawing, trigger_mode="always_last")
    save_button.click(on_save, [batch, settings.rate], saved, api_visibility="private", concurrency_limit=2)
