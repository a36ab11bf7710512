"""The tab Your product: a model of a visitor's own good parts, fitted in a minute or so and theirs alone."""

import copy
import html
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import gradio as gr
import numpy as np

from rad.data.duplicates import check_different, fingerprint, sketch
from rad.data.listing import IMAGE_SUFFIXES
from rad.data.roles import meaning_of
from rad.image_processor import RADImageProcessor, find_pixel_range
from rad.image_reader import peak
from rad.models.false_alarms import rate_note
from rad.models.fusion import judged_by

from . import models, visitors
from .batch import fetch, list_files
from .inspection import among_good
from .look import empty
from .settings import Settings, add_choice
from .words import handler

MIN_PICTURES, MAX_PICTURES = 10, 500
CHECKED_RATES = (0.01, 0.05, 0.1)
MAX_NAME = 40
SHOWN_LEFT_OUT, MAX_LEFT_OUT_NAME = 5, 80
PICTURES = (*IMAGE_SUFFIXES, ".zip")  # a zip among them is one that cannot be opened, and is told as such

HELP = f"""
Drop {MIN_PICTURES} or more photos of **good** parts, all taken the same way (same camera, light and pose), or a zip of
them. The network of the chosen model stays; what is fitted is *what your good parts look like to it*. That takes about
half a second a photo, again as if through another camera, and again for each of up to 96 copies with a defect put on
them, by which the model learns what to judge by. Files that are no pictures by their names, hidden files and
thumbnails are left out. The model is yours alone, works in the other tabs at once, and is deleted when you leave:
download it to keep it.
"""
NEXT = """
#### Use it anywhere
Unpack the zip; what lies in it is a pipeline folder:

```python
from rad import RADPipeline

pipe = RADPipeline.from_pretrained("{name}")
out = pipe("part.jpg")
```

#### Train further
More photos and an hour or so of training make the network itself know your parts:

```bash
accelerate launch training/train.py --pretrained_model_name_or_path {name} \\
  --train_data_dir my_good_photos --output_dir {name}-trained
```
"""


# -- actions ----------------------------------------------------------------------------------------------------------


def read(paths: list[str], resolution: int) -> tuple[list[np.ndarray], dict[str, Any], list[str]]:
    """All pictures in files and archives, at the model's resolution; what `fit_normality` has to know of them; and the
    names of files that are left out because they bear no picture's.

    Raises:
        ValueError: One cannot be read or is of one colour, some are called defects or masks, or there are too few
            different ones or too many.
    """
    files, left_out = list_files(paths)
    left_out += [name for name, *_ in files if not is_picture(name)]
    files = [file for file in files if is_picture(file[0])]
    if len(files) > MAX_PICTURES:
        raise ValueError(
            f"At most {MAX_PICTURES} pictures are taken here, got {len(files)}; training takes any number."
        )
    if len(files) < MIN_PICTURES:
        raise ValueError(f"Give at least {MIN_PICTURES} good pictures, got {len(files)}.")

    names = [name for name, *_ in files]
    marked = [name for name in names if is_marked(name)]
    if marked and len(marked) < len(names):
        raise ValueError(
            f"{len(marked)} of {len(names)} pictures bear names of defects or masks (such as {marked[0]}): give good "
            "pictures only."
        )

    def each(look: Callable[[Path], Any]) -> Iterator[Any]:
        for name, path, member in files:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    yield look(fetch(path, member, Path(folder)))
                except (ValueError, OSError) as error:
                    where = "" if member is None else f"{name}: "
                    raise ValueError(f"{where}{error} Take it out and try again.") from error

    pixel_range, darkest_peak = find_pixel_range(list(each(peak)))
    processor = RADImageProcessor(resolution, pixel_range, darkest_peak)
    pictures, sizes = map(list, zip(*each(processor.resize), strict=True))
    sketches = [sketch(processor.preprocess([picture])[0])[0] for picture in pictures]
    prints = [fingerprint(picture) for picture in pictures]
    check_different(prints, sketches, ["object"] * len(pictures), MIN_PICTURES, names)
    return pictures, {"pixel_range": pixel_range, "darkest_peak": darkest_peak, "sizes": sizes}, left_out


def is_picture(name: str) -> bool:
    """Whether a file bears a picture's name."""
    return PurePosixPath(name).suffix.lower() in PICTURES


def is_marked(name: str) -> bool:
    """Whether the name of a picture, or of a folder in its archive, says defect or mask."""
    path = PurePosixPath(name)
    meanings = [meaning_of(part) for part in (*path.parts[1:-1], path.stem)]
    return any(meaning.quality in ("bad", "both") or meaning.mask for meaning in meanings)


def fit(paths: list[str], name: str, model: str, owner: str | None) -> str:
    """Fits a visitor's model; returns its token."""
    name = "".join(c for c in name or "" if c.isalnum() or c in " -_")[:MAX_NAME].strip() or "my product"
    product = visitors.product(model)
    base = model if product is None else product.base
    pictures, known, left_out = read(paths, models.load(base).pipeline.config.resolution)
    normality = models.fit(base, pictures, name, **known)
    names = tuple(path[-MAX_LEFT_OUT_NAME:] for path in left_out[:SHOWN_LEFT_OUT])  # an archive may hold any
    return visitors.keep(owner, visitors.Product(name, base, normality, len(left_out), names))


def self_check(model: str) -> list[dict]:
    """At several alarms, how many held-out good pictures raise one, each judged by the others."""
    normality = models.normality(model)
    return [
        {
            "false_alarm_rate": rate,
            "held_out": normality.config.num_scores,
            "alarms": normality.held_out_alarms(rate),
            "interval": list(normality.false_alarm_interval(rate)),
        }
        for rate in CHECKED_RATES
    ]


def save(model: str) -> str:
    """The pipeline's folder as a zip, weights in half precision; returns its path."""
    folder, stem = visitors.folder(model), file_name(visitors.product(model).name)
    pipeline = copy.deepcopy(models.pipeline(model))
    for name, component in pipeline.components.items():
        if component is not None and name != "scheduler":
            component.half()
    path = folder / f"{stem}.zip"
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(path, "w") as archive:
        pipeline.save_pretrained(Path(unpacked) / stem)
        for file in sorted(Path(unpacked).rglob("*")):
            archive.write(file, file.relative_to(unpacked))
    return str(path)


def file_name(name: str) -> str:
    return "-".join(name.lower().split()) or "my-product"


def report(model: str) -> str:
    """The self-check as HTML."""
    product = visitors.product(model)
    rows, num_good = self_check(model), product.normality.config.num_scores
    cells = "".join(
        f"<tr><td>{100 * row['false_alarm_rate']:g} %</td><td>{row['alarms']} of {row['held_out']}</td>"
        f"<td>{100 * row['interval'][0]:.1f} to {100 * row['interval'][1]:.1f} %</td></tr>"
        for row in rows
    )
    judged = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in judged_by(product.normality.config))
    num_different = product.normality.num_different
    note = rate_note(product.normality.default_rate, num_different)
    few = f" More photos narrow this. {note}" if num_good < 100 else ""
    same = f" of {num_different} parts (some are copies, or show the same one)" if num_different < num_good else ""
    named = ", ".join(product.left_out) + (" ..." if product.num_left_out > len(product.left_out) else "")
    left_out = f" {product.num_left_out} files that are no pictures were left out: {named}." if named else ""
    return (
        f"<div class='verdict good' role='status'><strong>{html.escape(product.name)}: ready</strong>"
        f"<p>Fitted on {num_good} good pictures{same}, and chosen above: inspect parts in the first tab."
        f"{html.escape(left_out)}</p>"
        "<table class='facts'><caption>Self-check: each good picture judged by a model that never saw it</caption>"
        "<thead><tr><th>alarm set to</th><th>false alarms</th><th>true rate, 95 % confidence</th></tr></thead>"
        f"<tbody>{cells}</tbody></table><ul class='note'>{judged}</ul>"
        f"<p class='note'>With {num_good} pictures no odds rarer than 1 in "
        f"{round(1 / product.normality.p_value_resolution):,} can be told.{few}</p></div>"
    )


# -- handlers ---------------------------------------------------------------------------------------------------------


@handler
def on_fit(
    paths: list[str] | None,
    name: str,
    model: str,
    known: list[tuple[str, str]],
    rate: float,
    request: gr.Request,
    progress: gr.Progress = gr.Progress(track_tqdm=True),
) -> tuple:
    progress(0.0, desc="Reading the pictures")
    token = fit(paths, name, model, request.session_hash)
    progress(0.95, desc="Packing the model")
    figure = among_good(token, rate, [], "Scores of the good pictures, each held out")
    words = NEXT.format(name=file_name(visitors.product(token).name))
    return report(token), figure, save(token), words, *add_choice(known, token)


# -- the tab ----------------------------------------------------------------------------------------------------------


def build(settings: Settings) -> None:
    gr.Markdown(HELP)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            files = gr.Files(label="Photos of good parts, or a zip of them", height=220)
            name = gr.Textbox("my product", label="Name", max_length=MAX_NAME)
            button = gr.Button("Fit my model", variant="primary")
            zipped = gr.File(label="Your model, to download", interactive=False, height=120)
        with gr.Column(scale=3, min_width=320):
            verdict = gr.HTML("<div class='verdict'><strong>No model yet</strong><p>Drop your good photos.</p></div>")
            figure = gr.HTML(empty("The scores of your good parts"), elem_classes="figure")
            words = gr.Markdown()
    button.click(
        on_fit,
        [files, name, settings.model, settings.choices, settings.rate],
        [verdict, figure, zipped, words, settings.choices, settings.model],
        concurrency_id="fit",
        concurrency_limit=1,
        show_progress_on=[verdict],
        api_visibility="private",
    )
