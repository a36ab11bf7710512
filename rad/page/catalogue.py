"""The tab Models: what each model knows, how well, and where its limits are; and any other of the Hub."""

import html
import re

import gradio as gr

from . import models, visitors
from .settings import Settings, add_choice
from .words import handler

HELP = """
The model chosen above, in numbers and in the words of its card. Any RAD model of the Hugging Face Hub can be loaded by
its id: only its weights (safetensors) and settings are read, none of its code is run. **AUROC** says how well scores
tell bad from good (1 is perfect, 0.5 a coin), **AP** and **AUPRO** how well maps find defective pixels and regions.
"""


# -- actions ----------------------------------------------------------------------------------------------------------


def describe(model: str) -> dict:
    """What is known about a model, for programs."""
    product = visitors.product(model)
    loaded = models.load(model if product is None else product.base)
    pipeline = models.pipeline(model)
    normality = pipeline.normality
    parameters = sum(
        p.numel() for m in pipeline.components.values() if hasattr(m, "parameters") for p in m.parameters()
    )
    card = loaded.card
    if product is not None:
        card = f"Statistics of your own good parts on the network of {models.title(product.base)}."
    return {
        "model": models.title(model),
        "categories": models.categories(model),
        "good_images": 0 if normality is None else normality.config.num_scores,
        "resolution": pipeline.config.resolution,
        "timesteps": [] if normality is None else list(normality.config.timesteps),
        "parameters": parameters,
        "results": []
        if product is not None
        else [{"data": data, "metric": metric, "value": value} for data, metric, value in loaded.results],
        "card": card,
    }


def facts(model: str) -> str:
    """The numbers of `describe` as HTML."""
    known = describe(model)
    names = ", ".join(html.escape(name) for name in known["categories"]) or "none yet: fit yours"
    rows = [
        ("Products", names),
        ("Good pictures behind its thresholds", f"{known['good_images']:,}"),
        ("Looks at", f"{known['resolution']} x {known['resolution']} pixels; finer defects may be lost"),
        ("Parameters", f"{known['parameters'] / 1e6:.1f} M"),
    ]
    data = None
    for result in known["results"]:
        if result["data"] != data:
            data = result["data"]
            rows.append(("Measured on", html.escape(str(data))))
        value = result["value"]
        value = f"{value:.3f}" if isinstance(value, float) else str(value)
        rows.append((html.escape(str(result["metric"])), html.escape(value)))
    cells = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in rows)
    title = html.escape(known["model"])
    return f"<div class='verdict'><strong>{title}</strong><table class='facts'><tbody>{cells}</tbody></table></div>"


def card(model: str) -> str:
    """A model's card as Markdown, without pictures, which lie elsewhere."""
    return re.sub(r"!\[[^\]\n]{0,300}\]\([^)\n]{0,300}\)", "", describe(model)["card"])


# -- handlers ---------------------------------------------------------------------------------------------------------


@handler
def on_model(model: str) -> tuple[str, str]:
    return facts(model), card(model)


@handler
def on_load(
    repo_id: str, known: list[tuple[str, str]], progress: gr.Progress = gr.Progress(track_tqdm=True)
) -> tuple[list[tuple[str, str]], gr.Dropdown]:
    repo_id = repo_id.strip()
    if not repo_id:
        raise ValueError("Give the id of a model of the Hub, such as user/repo.")
    progress(0.0, desc=f"Loading {repo_id}")
    models.load(repo_id)
    return add_choice(known, repo_id)


# -- the tab ----------------------------------------------------------------------------------------------------------


def build(settings: Settings, demo: gr.Blocks) -> None:
    gr.Markdown(HELP)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            repo_id = gr.Textbox(label="Hub id", placeholder="user/repo", max_length=96)
            button = gr.Button("Load from the Hub")
            numbers = gr.HTML("<div class='verdict'></div>")
        with gr.Column(scale=3, min_width=320):
            text = gr.Markdown(container=True, max_height=640, elem_classes="card")
    gr.on(
        [button.click, repo_id.submit],
        on_load,
        [repo_id, settings.choices],
        [settings.choices, settings.model],
        concurrency_id="load",
        concurrency_limit=2,
        show_progress_on=[text],
        api_visibility="private",
    )
    gr.on(
        [demo.load, settings.model.change],
        on_model,
        settings.model,
        [numbers, text],
        concurrency_limit=4,
        show_progress="hidden",
        api_visibility="private",
    )
