"""The tab Inspect: a picture, its verdict, and where it is odd. It is scored once, whatever is asked then."""

import html
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from rad import Decision
from rad.image_processor import heat, overlay, resize_map
from rad.image_reader import decode
from rad.models.evidence import FUSED
from rad.pipeline_loading import EMBEDDED_DIR
from rad.visualization import draw_regions, encode_map, score_figure

from . import models, visitors
from .look import data_uri, empty, layers
from .settings import Settings
from .words import describe, handler, percent

EXAMPLES = EMBEDDED_DIR / "examples"  # those of "synthetic"; other models' are in folders of their names
MAX_PIXELS = 30e6  # of a picture: what is made of it at its own size takes 16 bytes for each
VIEW_SIDE = 768  # pixels of the longer side of what is shown
SHOWN_REGIONS = 8
SHOWN_BY_BROWSERS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")

HISTOGRAM = "The picture's score among those of good parts"
NO_VERDICT = "<div class='verdict'><strong>No picture yet</strong><p>Upload one, or pick an example.</p></div>"
LEGEND = """<p class='legend'>Heat: as usual <i></i> far odder than good parts.
Lines and numbers: the regions that raise the alarm.</p>"""
REGIONS_HELP = """
Where the alarm comes from. The **peak** says how odd the oddest spot of a region is: 1 is the standard deviation of
good parts at such a spot. Point at a label to see its region alone.
"""
GOOD_HELP = """
Each good picture that the model was not trained on has a score; this picture's score stands among them. The dashed
line moves with the share of good parts that may raise an alarm.
"""
RESTORE_HELP = """
What would this part look like without the defect? The picture is moved, step by step, to where good parts are; what
already looks good stays as it was. Takes up to a minute; the tab *Why* plays the steps.
"""
SAVE_HELP = """
The heat over the picture, the map as numbers (`.npy`, and a 16-bit PNG in which 1024 is one deviation of good parts
and 8192 is 0), the mask, and the result as JSON, all at the picture's own size and for the alarm set above.
"""
SHOW_VERDICT_JS = "() => { document.querySelector('.verdict').scrollIntoView({block: 'nearest'}); return []; }"


@dataclass(frozen=True)
class Inspection:
    """What all else needs of an inspected picture, so that it is scored once."""

    name: str
    path: str
    model: str
    category: str
    size: tuple[int, int]  # width and height
    small: np.ndarray  # at the model's resolution, as the model saw it
    view: Image.Image  # shrunk to VIEW_SIDE at most
    maps: dict[str, np.ndarray]  # each score type's map as it was computed, float32 [g, g]
    scores: dict[str, np.ndarray]  # float32 [1]

    @cached_property
    def picture(self) -> str:
        """The view as a URI."""
        return data_uri(self.view)

    @cached_property
    def heat(self) -> str:
        """Its heat, likewise."""
        return data_uri(heat(self.map(self.view.size), *models.normality(self.model).heat_range()))

    def map(self, size: tuple[int, int], score_type: str = FUSED) -> np.ndarray:
        """A map at (width, height), as the pipeline gives it for a picture of this size."""
        maps = torch.from_numpy(self.maps[score_type])[None]
        return resize_map(maps, [size[::-1]])[0]


# -- actions ----------------------------------------------------------------------------------------------------------


def score(path: str, model: str, category: str) -> Inspection:
    """Scores the picture at a path."""
    pipeline, side = models.pipeline(model), models.normality(model).config.map_size
    processor = pipeline.image_processor
    picture = decode(path, processor.pixel_range)
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(
            f"{Path(path).name} has {picture.width * picture.height / 1e6:.0f} megapixels; this page takes up to "
            f"{MAX_PIXELS / 1e6:.0f}, the pipeline itself any number."
        )
    # The pipeline's own first step: the numbers are those of the whole picture, in a fraction of the memory
    small, _ = processor.resize(path)
    label = None if category in (models.AUTO, "") else category
    found = models.run(model, "__call__", small, class_labels=label, map_size=(side, side))
    view = picture.copy()
    view.thumbnail((VIEW_SIDE, VIEW_SIDE))
    return Inspection(
        name=Path(path).name,
        path=path,
        model=model,
        category=found.category[0],
        size=picture.size,
        small=small,
        view=view,
        maps={name: values[0] for name, values in found.maps.items()},
        scores=found.scores,
    )


def decide(inspection: Inspection, rate: float, size: tuple[int, int]) -> tuple[np.ndarray, Decision]:
    """The fused map at (width, height), and what the model decides on it at a false-alarm rate; no network runs."""
    anomaly_map = inspection.map(size)
    decision = models.normality(inspection.model).decide({FUSED: [anomaly_map]}, inspection.scores, rate)
    return anomaly_map, decision


def among_good(model: str, rate: float, scores: list[float], words: str, name: str = "picture") -> str:
    """The figure of scores among those of good pictures; the words say which they are."""
    normality = models.normality(model)
    good = normality.good_scores[normality.score_types.index(FUSED)].numpy()
    threshold = normality.score_threshold(rate)
    words = f"{words}; the alarm starts at {threshold:.1f}; {len(good)} good pictures."
    return score_figure(good, threshold, rate, scores, words, name)


def result(inspection: Inspection, rate: float, decision: Decision) -> dict[str, Any]:
    """What there is to say about a picture, for programs; the decision is that of `decide` at its own size."""
    return {
        "picture": inspection.name,
        "size": list(inspection.size),
        "model": models.title(inspection.model),
        "category": inspection.category,
        "is_anomalous": bool(decision.is_anomalous[0]),
        "p_value": float(decision.p_value[0]),
        "p_value_resolution": models.normality(inspection.model).p_value_resolution,
        "score": float(inspection.scores[FUSED][0]),
        "scores": {name: float(values[0]) for name, values in inspection.scores.items()},
        "false_alarm_rate": rate,
        "false_alarm_interval": list(decision.interval),
        "threshold": decision.threshold,
        "pixel_threshold": decision.pixel_threshold,
        "anomalous_share": float(decision.mask[0].mean()),
        "regions": [{"box": list(r.box), "area": r.area, "peak": r.peak} for r in decision.regions[0]],
    }


def save(inspection: Inspection, rate: float, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Writes overlay, raw map, mask and result, at the picture's own size; returns the result and all paths."""
    if not Path(inspection.path).is_file():
        raise ValueError("The picture is no longer kept: inspect it again.")
    picture = decode(inspection.path, models.normality(inspection.model).config.pixel_range)
    anomaly_map, decision = decide(inspection, rate, picture.size)
    mask, shown = decision.mask[0], decision.regions[0][:SHOWN_REGIONS]
    hot = overlay(picture, anomaly_map, *models.normality(inspection.model).heat_range())
    stem = Path(inspection.name).stem
    paths = [folder / f"{stem}_{end}" for end in ("overlay.png", "map.png", "map.npy", "mask.png", "result.json")]
    drawn, deep, raw, binary, words = paths
    draw_regions(hot, mask, shown).save(drawn, compress_level=1)  # three times as fast as 6
    encode_map(anomaly_map).save(deep, compress_level=1)
    np.save(raw, anomaly_map)
    Image.fromarray(mask.astype(np.uint8) * 255).save(binary)
    found = result(inspection, rate, decision)
    words.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found, [str(path) for path in paths]


# -- handlers ---------------------------------------------------------------------------------------------------------


def check_upload(path: str) -> str | Image.Image | None:
    """Says at once why a file is refused, and shows those that browsers do not."""
    try:
        image = decode(path)
    except (ValueError, OSError) as error:
        gr.Warning(html.escape(str(error)))
        return None
    return path if Path(path).suffix.lower() in SHOWN_BY_BROWSERS else image


@handler
def on_inspect(path: str | None, model: str, category: str, progress: gr.Progress = gr.Progress()) -> Inspection:
    """Scores the picture; what is shown of it follows from `on_redraw`, at the rate that is set by then."""
    if path is None:
        raise ValueError("Upload a picture first, or pick an example.")
    progress(0.0, desc="Loading the model")
    models.pipeline(model)
    progress(0.2, desc="Comparing the picture with good parts")
    inspection = score(path, model, category)
    progress(0.9, desc="Drawing")
    return inspection


def on_scored(scored: Inspection | None, path: str | None) -> Inspection | dict:
    """A scored picture is the inspected one if it is still the one that is shown."""
    return scored if scored is not None and scored.path == path else gr.skip()


def on_drawn(path: str | None) -> tuple | list:
    return on_clear() if path is None else [gr.skip()] * len(on_clear())


@handler
def on_redraw(inspection: Inspection | None, rate: float) -> tuple | list:
    """Verdict, layers, boxes, table and histogram at a false-alarm rate, from the kept maps: no model runs."""
    if inspection is None:
        return [gr.skip()] * 5
    normality = models.normality(inspection.model)
    _, decision = decide(inspection, rate, inspection.view.size)
    mask, regions = decision.mask[0], decision.regions[0]
    shown = regions[:SHOWN_REGIONS]
    verdict = describe(
        float(decision.p_value[0]),
        rate,
        len(regions),
        float(mask.mean()),
        inspection.category,
        models.title(inspection.model),
        normality.num_different,
        normality.p_value_resolution,
        decision.interval,
    )
    lines = draw_regions(Image.new("RGBA", inspection.view.size), mask, shown)
    stack = {"picture": inspection.picture, "heat": inspection.heat, "lines": data_uri(lines, lossless=True)}
    zoom, boxes, table = inspection.size[0] / inspection.view.width, [], []
    for number, region in enumerate(shown, start=1):
        surface = percent(region.area / mask.size)
        boxes.append((region.box, f"{number}: {surface}, peak {region.peak:.1f}"))
        left, top, right, bottom = (round(zoom * side) for side in region.box)
        place = f"{left}, {top}", f"{right - left} x {bottom - top}"
        table.append([number, *place, surface, round(region.peak, 1)])
    this = float(inspection.scores[FUSED][0])
    histogram = among_good(inspection.model, rate, [this], f"Score {this:.1f} of this picture")
    return verdict, stack, (draw_regions(inspection.view, mask, shown), boxes), table, histogram


def on_clear() -> tuple:
    """What is shown where there is no picture: nothing of the one before."""
    return None, NO_VERDICT, None, None, [], empty(HISTOGRAM), None, None, ""


@handler
def on_save(inspection: Inspection | None, rate: float, request: gr.Request) -> list[str]:
    if inspection is None:
        raise ValueError("Inspect a picture first.")
    return save(inspection, rate, visitors.new_folder(request.session_hash))[1]


# -- the tab ----------------------------------------------------------------------------------------------------------


def build(settings: Settings) -> None:
    examples = [(path, path.parent.name) for path in sorted(EXAMPLES.glob("*/*.png"))]  # photographs first
    examples += [(path, "synthetic") for path in sorted(EXAMPLES.glob("*.png"))]
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            image = gr.Image(
                type="filepath",
                format="png",
                label="Picture of the part",
                alt_text="The picture to inspect",
                height=340,
                buttons=["fullscreen"],
                placeholder="Drop a picture here, paste it, or click to choose one\nPNG, JPEG, TIFF, BMP, WebP",
                webcam_options=gr.WebcamOptions(
                    mirror=False, constraints={"video": {"facingMode": {"ideal": "environment"}}}
                ),
            )
            # Our decoder gets the file itself: Gradio would open it first, and fail on odd ones with no reason.
            # Handlers give this component values only: an update such as gr.skip() makes Gradio build it anew.
            image.preprocess = lambda file: file and file.path
            button = gr.Button("Inspect", variant="primary", size="lg")
            gr.Markdown("**Or pick an example, good or bad**")
            pick = gr.Gallery(
                [(str(path), path.stem.replace("_", " ")) for path, _ in examples],
                label="Examples, good or bad",
                show_label=False,
                columns=3,
                height="auto",
                allow_preview=False,
                buttons=[],
                interactive=False,
            )
        with gr.Column(scale=3, min_width=320):
            verdict = gr.HTML(NO_VERDICT)
            with gr.Tabs(elem_classes="wide-content"):
                with gr.Tab("Heat"):
                    stack = layers("The picture with heat where it is unlike good parts")
                    gr.HTML(LEGEND)
                with gr.Tab("Regions"):
                    gr.Markdown(REGIONS_HELP)
                    boxes = gr.AnnotatedImage(
                        label="Regions: share of the surface, peak", show_label=False, height=420
                    )
                    table = gr.Dataframe(
                        headers=["No.", "left, top", "size", "surface", "peak"],
                        datatype=["number", "str", "str", "str", "number"],
                        label="Regions; places and sizes in the picture's pixels",
                        interactive=False,
                        column_widths=["14%", "23%", "25%", "19%", "19%"],
                        wrap=True,
                    )
                with gr.Tab("Among good parts"):
                    gr.Markdown(GOOD_HELP)
                    histogram = gr.HTML(empty(HISTOGRAM), elem_classes="figure")
                with gr.Tab("Good version"):
                    gr.Markdown(RESTORE_HELP)
                    settings.restore_buttons.append(gr.Button("Show a good version"))
                    settings.restored = gr.ImageSlider(label="Yours | good version", format="png", height=420)
                    settings.distance = gr.Markdown()
                with gr.Tab("Save"):
                    gr.Markdown(SAVE_HELP)
                    save_button = gr.Button("Save the result")
                    files = gr.Files(label="Files", interactive=False)

    scored = gr.State(time_to_live=visitors.KEPT_SECONDS)
    results = [verdict, stack, boxes, table, histogram]
    scoring = {
        "fn": on_inspect,
        "inputs": [image, settings.model, settings.category],
        "outputs": scored,
        "trigger_mode": "always_last",
        "concurrency_id": "score",
        "concurrency_limit": 2,
        "show_progress_on": [verdict],
        "api_visibility": "private",
    }
    redrawing = {
        "fn": on_redraw,
        "inputs": [settings.inspection, settings.rate],
        "outputs": results,
        "concurrency_limit": 4,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    clearing = {
        "fn": on_clear,
        "outputs": [settings.inspection, *results, files, settings.restored, settings.distance],
        "api_visibility": "private",
        "show_progress": "hidden",
    }
    image.upload(check_upload, image, image, api_visibility="private", concurrency_limit=4)
    gr.on([image.clear, image.upload], **clearing)

    def choose(event: gr.SelectData) -> tuple[str, str, str]:
        path, model = examples[event.index]
        return str(path), model, models.AUTO

    chosen = pick.select(
        choose,
        None,
        [image, settings.model, settings.category],
        trigger_mode="always_last",  # one that is picked while another loads counts
        api_visibility="private",
    )
    # The picture may be another, or gone, by the time that one is scored, and again when it is drawn
    checking = {"concurrency_limit": 4, "show_progress": "hidden", "api_visibility": "private"}
    for start in (button.click, chosen.success):
        done = start(**clearing, trigger_mode="always_last").success(**scoring)
        done = done.success(on_scored, [scored, image], settings.inspection, **checking).success(**redrawing)
        done.success(on_drawn, image, clearing["outputs"], **checking).success(None, js=SHOW_VERDICT_JS)
    settings.rate.input(**redrawing, trigger_mode="always_last")
    save_button.click(
        on_save, [settings.inspection, settings.rate], files, api_visibility="private", concurrency_limit=2
    )
