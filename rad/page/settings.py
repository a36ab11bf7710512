"""What all tabs share: the model, the kind of part, the false-alarm rate, and the picture that was inspected."""

from dataclasses import dataclass, field

import gradio as gr

from . import models, visitors
from .look import rate_slider
from .words import handler


@dataclass
class Settings:
    """Components of the page that more than one tab uses."""

    model: gr.Dropdown
    category: gr.Dropdown
    rate: gr.HTML
    choices: gr.State  # of the models, for this visitor
    inspection: gr.State
    restore_buttons: list[gr.Button] = field(default_factory=list)
    restored: gr.ImageSlider | None = None
    distance: gr.Markdown | None = None


def choices() -> list[tuple[str, str]]:
    return [(models.title(model), model) for model in models.offered()]


@handler
def on_model(model: str, before: str, rate: float) -> tuple:
    """The model's products and the alarm that its good pictures can tell, unless the visitor has moved it."""
    products = gr.Dropdown(choices=[models.AUTO, *models.categories(model)], value=models.AUTO)
    moved = before and rate != models.default_rate(before)
    return products, gr.skip() if moved else models.default_rate(model), model


def build(demo: gr.Blocks) -> Settings:
    with gr.Row(elem_classes="settings"):
        model = gr.Dropdown(
            choices(),
            label="Model",
            info="What knows your good parts.",
            min_width=220,
        )
        category = gr.Dropdown([models.AUTO], label="Product", info="Which good parts to compare with.", min_width=220)
        with gr.Column(min_width=280):
            rate = rate_slider()
    settings = Settings(model, category, rate, gr.State(choices()), gr.State(time_to_live=visitors.KEPT_SECONDS))
    before = gr.State("")
    gr.on(
        [demo.load, model.change],
        on_model,
        [model, before, rate],
        [category, rate, before],
        concurrency_limit=4,
        api_visibility="private",
    )
    return settings


def add_choice(known: list[tuple[str, str]], model: str) -> tuple[list[tuple[str, str]], gr.Dropdown]:
    """The choices with one model more, and the dropdown that has it chosen."""
    known = [choice for choice in known if choice[1] != model] + [(models.title(model), model)]
    return known, gr.Dropdown(choices=known, value=model)
