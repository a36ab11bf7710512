"""The RAD Space: upload a picture of a part, see whether it is defective, where, and what a good one would look like.

`python app.py` serves the page. Environment: RAD_MODEL (an embedded model, a folder or a Hub id) is the model offered
first, RAD_DEVICE where it runs, GRADIO_SERVER_NAME and GRADIO_SERVER_PORT where the page is served.
"""

import functools
import html
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import numpy as np
import pandas as pd
import torch
from PIL import Image

from rad import RADImageProcessor, RADPipeline
from rad.pipeline_rad import EMBEDDED_DIR, EMBEDDED_MODELS, find_regions
from rad.visualization import draw_regions

AUTO = "Detect automatically"
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # false alarms on good parts
DEFAULT_RATE = 0.01
MODEL_NAMES = {"synthetic": "Eight synthetic products", "mtd": "Magnetic tiles (MTD)"}
EXAMPLES_MODEL = "synthetic"
VIEW_SIDE = 1024  # pixels of the longer side of what is shown and kept for redrawing
SHOWN_REGIONS = 20
SHOWN_BY_BROWSERS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
KEPT_SECONDS = 2700  # with a clean-up every 900 s, an upload is gone within the hour
SCORES = {
    "pixel": "Pixels (KL)",
    "feature": "Feature error",
    "residual": "Feature residual",
    "mahalanobis": "Mahalanobis",
    "rgb": "RGB",
}

INTRO = """
# RAD finds defects, having seen good parts only
A diffusion model has learned what good parts look like. Give it a picture: it says whether something is wrong,
where, and what the part would look like without it.
"""
SCORES_HELP = """
Each map asks *how unlike good parts is this spot?* in another way. **Pixels (KL divergence)**: does the denoiser
expect other pixels here? **Feature error**: does it expect another texture or shape? **Feature residual**: is that
error unlike the errors on good parts, all channels together? **Mahalanobis distance**: how far are this spot's
features from good parts'? The verdict fuses these four. **RGB**: the plain colour difference to the denoised picture,
for comparison only.
"""
RESTORE_HELP = """
What would this part look like without the defect? The picture is moved, step by step, to where good parts are; what
already looks good stays as it was. Takes a minute or so.
"""
LEGEND = """<p class='legend'>Heat: as usual <i></i> far odder than good parts.
Lines and numbers: the regions that raise the alarm.</p>"""
NO_VERDICT = "<div class='verdict'><strong>No picture yet</strong><p>Upload one, or pick an example.</p></div>"
FOOTER = "Pictures stay on this server, are seen by nobody else, and are deleted within an hour."

RATE_HTML = """
<label for="rate">Alarm on ${+(100 * value).toPrecision(3)} % of good parts</label>
<input id="rate" type="range" min="0" max="${rates.length - 1}" value="${rates.indexOf(value)}"
       aria-valuetext="${+(100 * value).toPrecision(3)} %">
<div class="ends"><span>fewer false alarms</span><span>fewer missed defects</span></div>
"""
RATE_JS = 'element.oninput = event => { props.value = props.rates[event.target.value]; trigger("input"); }'
SHOW_VERDICT_JS = "() => { document.querySelector('.verdict').scrollIntoView({block: 'nearest'}); return []; }"
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto; }
.results { width: 0; min-width: 100%; }  /* wide tables scroll; they do not widen the page */
.verdict { border-left: .5rem solid var(--border-color-primary); border-radius: .5rem; padding: .75rem 1rem;
           background: var(--block-background-fill); }
.verdict.bad { border-color: #d1242f; } .verdict.good { border-color: #1a7f37; }
.verdict strong { font-size: 1.75rem; line-height: 1.2; }
.verdict p { margin: .35rem 0 0; font-size: 1rem; }
.rate label { font-weight: 600; } .rate input { width: 100%; accent-color: var(--color-accent); }
.rate .ends { display: flex; justify-content: space-between; }
.verdict .note, .rate .ends, .legend { color: var(--body-text-color-subdued); font-size: .875rem; }
.legend i { display: inline-block; width: 5rem; height: .7rem; border-radius: .2rem; margin: 0 .3rem;
            background: linear-gradient(90deg, #0000, #57106e 25%, #bc3754 55%, #f98e09 80%, #fcffa4); }
"""
THEME = gr.themes.Soft(
    primary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_text_color_subdued="*neutral_600",  # these are darker than Soft's, to be readable
    block_info_text_color="*neutral_600",
    block_label_text_color="*primary_700",
    block_title_text_color="*primary_700",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
)


@dataclass(frozen=True)
class Inspection:
    """What redrawing and restoring need of an inspected picture, so that the model scores it once."""

    model: str
    category: str
    p_value: float
    view: Image.Image  # the picture, shrunk to VIEW_SIDE at most
    map: np.ndarray  # its anomaly map, float16
    zoom: float  # size of the picture over the size of the view


@functools.lru_cache(maxsize=2)
def load(model: str) -> RADPipeline:
    return RADPipeline.load(model).to(os.environ.get("RAD_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


def one_sentence(action: Callable) -> Callable:
    """Shows the library's one-sentence errors as they are."""

    @functools.wraps(action)
    def wrapped(*args, **kwargs):
        try:
            return action(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return wrapped


# -- words ------------------------------------------------------------------------------------------------------------


def odds(p_value: float, resolution: int) -> str:
    """A p-value in words; nothing rarer than one in `resolution` is claimed."""
    if p_value * resolution < 1:
        return f"less than 1 time in {resolution:,}"
    if p_value > 0.5:
        return "more than 1 time in 2"
    return f"1 time in {round(float(f'{1 / p_value:.2g}')):,}"


def describe(
    p_value: float,
    rate: float,
    regions: int,
    share: float,
    category: str = "object",
    num_good: int = 1000,
    interval: tuple[float, float] = (0.0, 1.0),
) -> str:
    """The verdict as HTML.

    Args:
        rate: False-alarm rate in use; the verdict is "defect" where p_value <= rate.
        regions, share: How many regions the mask has, and its share of the surface.
        num_good: Good pictures that p_value was measured on; it is trusted to a tenth of 1 / num_good.
        interval: What the rate may really be, 95 % confident.
    """
    good = f"A good part looks this odd {odds(p_value, min(10 * num_good, 10_000))}."
    percent = "less than 0.1" if share < 0.001 else f"{100 * share:.2g}"
    is_bad = p_value <= rate
    where = ""
    if is_bad and regions:
        where = f"{regions} region{'s' * (regions > 1)}, {percent} % of the surface."
    elif is_bad:
        where = "It is odd as a whole: no single region stands out."
    kind, title = ("bad", "✕ Defect found") if is_bad else ("good", "✓ Looks good")
    hint = " Is this the product that the model knows?" if share > 0.5 else ""
    return (
        f"<div class='verdict {kind}' role='status'><strong>{title}</strong><p>{where} {good}{hint}</p>"
        f"<p class='note'>Alarm set to {100 * rate:g} % of good parts. Compared with {num_good:,} good pictures, "
        f"which leave it between {100 * interval[0]:.1f} and {100 * interval[1]:.1f} % (95 % confidence); "
        f"product: {html.escape(category)}.</p></div>"
    )


# -- actions ----------------------------------------------------------------------------------------------------------


@one_sentence
def list_categories(model: str) -> gr.Dropdown:
    return gr.Dropdown(choices=[AUTO, *load(model).normality.config.categories], value=AUTO)


def check_upload(path: str):
    """Says at once why a file is refused, and shows those that browsers do not."""
    try:
        image = RADImageProcessor().decode(path)
    except (ValueError, OSError) as error:
        gr.Warning(str(error))
        return None
    return path if Path(path).suffix.lower() in SHOWN_BY_BROWSERS else image


@one_sentence
def inspect(path: str | None, model: str, category: str, rate: float, progress=gr.Progress()):  # noqa: B008
    """Scores a picture; returns what `redraw` returns, after the state and followed by a picture of each score."""
    if path is None:
        raise gr.Error("Upload a picture first, or pick an example.", print_exception=False)
    progress(0.0, desc="Loading the model")
    pipe = load(model)
    progress(0.2, desc="Reading the picture")
    image = pipe.image_processor.decode(path)
    progress(0.3, desc="Comparing it with good parts")
    found = pipe(image, class_labels=None if category == AUTO else category, false_alarm_rate=float(rate))
    progress(0.9, desc="Drawing")
    view = image.copy()
    view.thumbnail((VIEW_SIDE, VIEW_SIDE))
    maps = {
        name: np.asarray(Image.fromarray(found[f"{name}_map"][0]).resize(view.size, Image.Resampling.BILINEAR))
        for name in ("anomaly", *SCORES)
    }
    inspection = Inspection(
        model=model,
        category=found.category[0],
        p_value=float(found.p_value[0]),
        view=view,
        map=maps["anomaly"].clip(-6e4, 6e4).astype(np.float16),
        zoom=image.width / view.width,
    )
    each = [(heat(pipe, view, maps[name], name), caption) for name, caption in SCORES.items()]
    return inspection, *redraw(inspection, rate), each


@one_sentence
def redraw(inspection: Inspection | None, rate: float):
    """Verdict, heat, mask and regions at a false-alarm rate, from the kept map: no model runs."""
    if inspection is None:
        return [gr.skip()] * 4
    if not 0 < float(rate) < 1:
        raise ValueError(f"The false-alarm rate must lie between 0 and 1, got {rate}.")
    rate, zoom = float(rate), inspection.zoom
    pipe, anomaly_map = load(inspection.model), inspection.map.astype(np.float32)
    is_anomalous = inspection.p_value <= rate
    mask = (anomaly_map > pipe.normality.pixel_threshold(rate)) & is_anomalous
    regions = find_regions(mask, anomaly_map)
    shown = regions[:SHOWN_REGIONS]
    heated = draw_regions(heat(pipe, inspection.view, anomaly_map), mask, shown)
    table = []
    for number, region in enumerate(shown, start=1):
        left, top, right, bottom = (round(zoom * side) for side in region.box)
        box = f"{left}, {top}", f"{right - left} x {bottom - top}"
        table.append([number, *box, round(zoom**2 * region.area), round(region.peak, 1)])
    num_good = pipe.normality.config.num_scores
    interval = pipe.normality.false_alarm_interval(rate)
    verdict = describe(inspection.p_value, rate, len(regions), mask.mean(), inspection.category, num_good, interval)
    return verdict, heated, Image.fromarray(mask), table


def heat(pipe: RADPipeline, image: Image.Image, map: np.ndarray, score_type: str = "fused") -> Image.Image:
    """Heat from what 1 good pixel in 20 exceeds; half as strong as it gets where 1 in 1000 does."""
    low, middle = (pipe.normality.pixel_threshold(rate, score_type) for rate in (0.05, 0.001))
    return pipe.image_processor.overlay(image, map, vmin=low, vmax=2 * middle - low)


@one_sentence
def restore(inspection: Inspection | None, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
    """The picture beside its good version, how far it was and is from good parts in words, and at each step."""
    if inspection is None:
        raise gr.Error("Inspect a picture first.", print_exception=False)
    pipe = load(inspection.model)
    pipe.set_progress_bar_config(desc="Moving the picture towards good parts")
    restored = pipe.restore(inspection.view, class_labels=inspection.category)
    distances = restored.distances[0]
    if len(distances) == 1:
        words = "The picture is already as close to good parts as a typical good one: nothing was changed."
    else:
        words = (
            f"Distance to good parts: **{distances[0]:.1f}** before, **{distances[-1]:.1f}** after "
            f"{len(distances) - 1} steps. 0 is a typical good part; 1 is a standard deviation of good parts."
        )
    curve = pd.DataFrame({"step": range(len(distances)), "distance": distances})
    return (inspection.view, restored.images[0]), words, curve


# -- page -------------------------------------------------------------------------------------------------------------


def build_demo() -> gr.Blocks:
    default_model = os.environ.get("RAD_MODEL") or EMBEDDED_MODELS[0]
    models = list(dict.fromkeys([default_model, *EMBEDDED_MODELS]))
    examples = sorted(str(path) for path in (EMBEDDED_DIR / "examples").glob("*.png"))

    with gr.Blocks(title="RAD: find defects", analytics_enabled=False, delete_cache=(900, KEPT_SECONDS)) as demo:
        state = gr.State(time_to_live=KEPT_SECONDS)
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = gr.Image(
                    type="filepath",
                    format="png",
                    label="Picture of the part",
                    alt_text="The picture to inspect",
                    height=340,
                    buttons=["fullscreen"],
                    placeholder="Drop a picture here, or click to choose one\nPNG, JPEG, TIFF, BMP, WebP",
                    webcam_options=gr.WebcamOptions(
                        mirror=False, constraints={"video": {"facingMode": {"ideal": "environment"}}}
                    ),
                )
                # Our decoder gets the file itself: Gradio would open it first, and fail on odd ones with no reason.
                # Handlers give this component values only: an update such as gr.skip() makes Gradio build it anew.
                image.preprocess = lambda file: file and file.path
                button = gr.Button("Inspect", variant="primary", size="lg")
                if examples:
                    pick = gr.Dataset(
                        components=[gr.Image(visible=False)],
                        samples=[[path] for path in examples],
                        type="index",
                        label="Or pick an example, good or bad",
                        samples_per_page=24,
                    )
                model = gr.Dropdown([(MODEL_NAMES.get(name, name), name) for name in models], label="Model")
                category = gr.Dropdown([AUTO], label="Product", info="Which good parts to compare with.")
            with gr.Column(scale=3, min_width=320):
                verdict = gr.HTML(NO_VERDICT)
                rate = gr.HTML(
                    DEFAULT_RATE,
                    label="False-alarm rate",
                    html_template=RATE_HTML,
                    js_on_load=RATE_JS,
                    elem_classes="rate",
                    rates=RATES,
                )
                with gr.Tabs(visible=False, elem_classes="results") as tabs:
                    with gr.Tab("Where"):
                        heated = gr.Image(
                            label="Heat over the picture",
                            alt_text="The picture with odd areas outlined",
                            buttons=["fullscreen", "download"],
                        )
                        gr.HTML(LEGEND)
                        table = gr.Dataframe(
                            headers=["No.", "left, top", "size", "area", "peak"],
                            datatype=["number", "str", "str", "number", "number"],
                            label="Regions, in pixels; peak in deviations of good parts",
                            interactive=False,
                            column_widths=["14%", "23%", "25%", "19%", "19%"],
                            wrap=True,
                        )
                    with gr.Tab("Mask"):
                        mask = gr.Image(
                            label="Mask",
                            alt_text="Defective pixels in white",
                            format="png",
                            buttons=["fullscreen", "download"],
                        )
                    with gr.Tab("Scores"):
                        gr.Markdown(SCORES_HELP)
                        each = gr.Gallery(
                            label="Heat of each score alone", columns=2, height="auto", buttons=["fullscreen"]
                        )
                    with gr.Tab("Good version"):
                        gr.Markdown(RESTORE_HELP)
                        restore_button = gr.Button("Show a good version")
                        slider = gr.ImageSlider(label="Yours | good version", format="png")
                        words = gr.Markdown()
                        curve = gr.LinePlot(x="step", y="distance", label="Distance to good parts", height=200)
        gr.Markdown(FOOTER, elem_classes="legend")

        results = [verdict, heated, mask, table]
        inspection = {
            "fn": inspect,
            "inputs": [image, model, category, rate],
            "outputs": [state, *results, each],
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress_on": [verdict],
        }
        image.upload(check_upload, image, image, api_visibility="private")
        gr.on(
            [demo.load, model.change], list_categories, model, category, concurrency_id="model", api_name="categories"
        )
        inspected = [button.click(**inspection, api_name="inspect")]
        if examples:
            picked = pick.click(
                lambda index: (examples[index], EXAMPLES_MODEL, AUTO),
                pick,
                [image, model, category],
                api_visibility="private",
            )
            inspected.append(picked.success(**inspection, api_visibility="private"))
        for done in inspected:
            done.success(
                lambda: (gr.Tabs(visible=True), None, "", None),
                outputs=[tabs, slider, words, curve],
                api_visibility="private",
                js=SHOW_VERDICT_JS,
            )
        rate.input(
            redraw, [state, rate], results, api_name="redraw", trigger_mode="always_last", show_progress="hidden"
        )
        restore_button.click(
            restore,
            state,
            [slider, words, curve],
            api_name="restore",
            show_progress_on=slider,
            concurrency_id="model",
            concurrency_limit=1,
        )
    return demo


if __name__ == "__main__":
    build_demo().queue().launch(theme=THEME, css=CSS, max_file_size="100mb", footer_links=["api"])
