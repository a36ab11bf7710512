"""The page's theme, and its few components that Gradio lacks: layers, a flip book, a strip of pictures, a rate."""

import base64
import html
import io

import gradio as gr
import numpy as np
from PIL import Image

RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # false alarms on good parts
DEFAULT_RATE = 0.01

THEME = gr.themes.Soft(
    primary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_text_color_subdued="*neutral_600",  # these are darker than Soft's, to be readable
    block_info_text_color="*neutral_600",
    link_text_color_dark="*secondary_300",  # and lighter in the dark
    link_text_color_visited_dark="*secondary_300",
    block_label_text_color="*primary_700",
    block_title_text_color="*primary_700",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
)

CSS = """
@media (max-width: 640px) {  /* on a phone the alarm stays in sight */
  .settings, .settings > .column { display: contents; }
  .rate { position: sticky; top: 0; z-index: 30; background: var(--body-background-fill); }
  .rate .note { display: none; } .verdict { scroll-margin-top: 8rem; }
}
.figure svg { max-width: 34rem; } .caption-label { font-size: .75rem !important; }
.gradio-container { max-width: 1280px !important; margin: 0 auto;
                    overflow: clip !important; }  /* not hidden, in which nothing could stay in sight */
[role=tab][aria-selected=true] { color: var(--primary-700) !important; }
.dark [role=tab][aria-selected=true] { color: var(--primary-300) !important; }
.prose .token { color: inherit !important; background: none !important; }  /* Gradio's are too faint */
.wide-content { width: 0; min-width: 100% !important; }  /* wide tables scroll, tabs fold; neither widens the page */
.verdict { border-left: .5rem solid var(--border-color-primary); border-radius: .5rem; padding: .75rem 1rem;
           background: var(--block-background-fill); min-height: 7.5rem; }
.verdict.bad { border-color: #d1242f; } .verdict.good { border-color: #1a7f37; }
.verdict strong { font-size: 1.75rem; line-height: 1.2; }
.verdict p { margin: .35rem 0 0; font-size: 1rem; }
.note, .verdict .note, .rate .ends, .legend, figcaption { color: var(--body-text-color-subdued); font-size: .875rem; }
.rate label, .layers label, .flipbook label { font-weight: 600; }
.rate input, .layers input, .flipbook input { width: 100%; accent-color: var(--color-accent); min-height: 1.75rem; }
.rate .ends { display: flex; justify-content: space-between; }
.legend i { display: inline-block; width: 5rem; height: .7rem; border-radius: .2rem; margin: 0 .3rem;
            background: linear-gradient(90deg, #0000, #57106e 25%, #bc3754 55%, #f98e09 80%, #fcffa4); }
.empty { display: grid; place-items: center; min-height: 14rem; padding: 1rem; text-align: center;
         border: 1px dashed var(--border-color-primary); border-radius: .5rem; color: var(--body-text-color-subdued); }
.layers .empty { min-height: min(65vh, 28rem, 90vw); } .player { max-width: 30rem; }
.layers .stack { position: relative; height: min(65vh, 28rem, 90vw); }
.layers .stack img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; }
.strip figure { margin: 0; } .strip img { width: 100%; border-radius: .3rem; }
.flipbook .controls { display: flex; gap: .75rem; align-items: center; }
.flipbook button { min-width: 5.5rem; padding: .35rem .8rem; border-radius: .4rem; color: white;
                   background: var(--button-primary-background-fill); }
.flipbook svg { width: 100%; height: 7rem; } .flipbook .line { fill: none; stroke: var(--color-accent); }
.flipbook .caption { min-height: 2.6em; }
.facts { width: 100%; border-collapse: collapse; margin-top: .6rem; }
.facts, .facts tr { border: 0 !important; } .facts caption { text-align: left; }
.verdict .facts th, .verdict .facts td { text-align: left; font-weight: 400; padding: .25rem .5rem .25rem 0 !important;
                       vertical-align: top; border: solid var(--border-color-primary) !important;
                       border-width: 1px 0 0 !important;
                       border-color: var(--border-color-primary) !important; }
.facts th { color: var(--body-text-color-subdued); }
"""


def data_uri(image: Image.Image, quality: int = 85, lossless: bool = False) -> str:
    """A picture that stands in the page itself."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, lossless=lossless, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def empty(words: str) -> str:
    """What stands where there is nothing yet, so that the page does not jump when there is."""
    return f"<div class='empty'>{words}</div>"


def strip(pictures: list[tuple[Image.Image, str]]) -> str:
    """Pictures side by side with their captions, as HTML."""
    figures = [
        f"<figure><img src='{data_uri(picture)}' alt='{html.escape(caption, quote=True)}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for picture, caption in pictures
    ]
    return f"<div class='strip'>{''.join(figures)}</div>"


# -- false-alarm rate -------------------------------------------------------------------------------------------------

RATE_HTML = """
<label for="rate">Alarm on ${+(100 * value).toPrecision(3)} % of good parts</label>
<input id="rate" type="range" min="0" max="${rates.length - 1}" value="${rates.indexOf(value)}"
       aria-valuetext="${+(100 * value).toPrecision(3)} %">
<div class="ends"><span>fewer false alarms</span><span>fewer missed defects</span></div>
<div class="note">The share of good parts that may be called defective by mistake.</div>
"""
RATE_JS = 'element.oninput = event => { props.value = props.rates[event.target.value]; trigger("input"); }'


def rate_slider() -> gr.HTML:
    """A slider over RATES; its value is the rate."""
    return gr.HTML(
        DEFAULT_RATE,
        label="False-alarm rate",
        html_template=RATE_HTML,
        js_on_load=RATE_JS,
        elem_classes="rate",
        rates=RATES,
    )


# -- layers -----------------------------------------------------------------------------------------------------------

LAYERS_HTML = """
${!value ? `<div class="empty">${placeholder}</div>` : `
<div class="stack">
  <img src="${value.picture}" alt="The picture">
  <img class="heat" src="${value.heat}" alt="Heat where the picture is odd" style="opacity: ${opacity}">
  <img src="${value.lines}" alt="Lines around the regions that raise the alarm">
</div>
<label>Heat
  <input type="range" min="0" max="1" step="0.05" value="${opacity}" aria-label="Opacity of the heat"></label>
`}
"""
LAYERS_JS = """
element.oninput = event => { element.querySelector(".heat").style.opacity = event.target.value; };
element.onchange = event => { props.opacity = event.target.value; };
"""


def layers(placeholder: str) -> gr.HTML:
    """A picture, heat whose opacity a slider sets, and lines over both; its value is a dict of these three, URIs."""
    return gr.HTML(
        None,
        html_template=LAYERS_HTML,
        js_on_load=LAYERS_JS,
        elem_classes="layers",
        placeholder=placeholder,
        opacity=0.6,
    )


# -- flip book --------------------------------------------------------------------------------------------------------

FLIPBOOK_HTML = """
${!value ? `<div class="empty">${placeholder}</div>` : `
<div class="strip">${value.titles.map((title, i) => `<figure>
  <img src="${value.pages[value.start].pictures[i]}" alt="${title}">
  <figcaption>${title}</figcaption></figure>`).join("")}
</div>
${!value.curve ? "" : `
  <svg viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label="${value.curve_title}">
  <polyline class="line" vector-effect="non-scaling-stroke" stroke-width="2" points="${value.curve.map((y, i, all) =>
    `${100 * i / Math.max(1, all.length - 1)},${29 - 28 * y / Math.max(...all)}`).join(" ")}"/>
  <line class="now" y1="0" y2="30" stroke="currentColor" vector-effect="non-scaling-stroke"
        x1="${100 * value.start / Math.max(1, value.pages.length - 1)}"
        x2="${100 * value.start / Math.max(1, value.pages.length - 1)}"/></svg>
  <div class="note">${value.curve_title}</div>`}
<div class="controls"><button type="button">▶ Play</button>
  <input type="range" min="0" max="${value.pages.length - 1}" value="${value.start}" aria-label="${label}"></div>
<div class="caption" aria-live="polite">${value.pages[value.start].caption}</div>
`}
"""
FLIPBOOK_JS = """
let timer = null;
const find = selector => element.querySelector(selector);
function stop() { clearInterval(timer); timer = null; if (find("button")) find("button").textContent = "▶ Play"; }
function show(index) {
  const page = props.value.pages[index], x = 100 * index / Math.max(1, props.value.pages.length - 1);
  element.querySelectorAll("figure img").forEach((image, i) => { image.src = page.pictures[i]; });
  if (find(".now")) { find(".now").setAttribute("x1", x); find(".now").setAttribute("x2", x); }
  find("input").value = index;
  find("input").setAttribute("aria-valuetext", page.caption);
  find(".caption").textContent = page.caption;
}
element.oninput = event => { stop(); show(+event.target.value); };
element.onclick = event => {
  if (!event.target.closest("button")) return;
  if (timer) return stop();
  const last = props.value.pages.length - 1;
  let index = +find("input").value === last ? 0 : +find("input").value;
  show(index);
  find("button").textContent = "❚❚ Stop";
  const milliseconds = Math.min(800, Math.max(40, 4000 / (last + 1)));
  timer = setInterval(() => { index < last ? show(++index) : stop(); }, milliseconds);
};
watch("value", stop);
"""


def flipbook(label: str, placeholder: str) -> gr.HTML:
    """Pictures that change together as a slider moves or as they are played; its value is from `flipbook_value`."""
    return gr.HTML(
        None,
        label=label,
        html_template=FLIPBOOK_HTML,
        js_on_load=FLIPBOOK_JS,
        elem_classes="flipbook",
        placeholder=placeholder,
    )


def flipbook_value(
    titles: list[str],
    pages: list[tuple[list[Image.Image], str]],
    start: int = 0,
    curve: np.ndarray | None = None,
    curve_title: str = "",
) -> dict:
    """The value of a flip book.

    Args:
        titles: Of the pictures that are shown at once.
        pages: For each position of the slider the pictures and a caption.
        start: The page shown first.
        curve: A number for each page, drawn as a curve on which the page's place is marked.
        curve_title: What it says.
    """
    return {
        "titles": titles,
        "pages": [{"pictures": [data_uri(p, 80) for p in pictures], "caption": words} for pictures, words in pages],
        "start": start,
        "curve": None if curve is None else [max(0.0, round(float(y), 4)) for y in curve],
        "curve_title": curve_title,
    }
