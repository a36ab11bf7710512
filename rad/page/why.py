"""The tab Why: the method made visible on the inspected picture, at each noise level and step by step."""

import gradio as gr
import numpy as np
from PIL import Image

from rad import RADDenoisingOutput, RADRestorationOutput
from rad.image_processor import heat
from rad.models.evidence import SCORE_TYPES

from . import models, visitors
from .inspection import Inspection
from .look import DEFAULT_RATE, empty, flipbook, flipbook_value, strip
from .settings import Settings
from .words import handler, odds

LEVELS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.6)  # of the respaced chain; RAN scores at the first, the third and the fifth
MAX_FRAMES = 50
MAP_SIDE = 256

HELP = """
A diffusion model has learned to remove noise from pictures of good parts, and nothing else. **Noise is added to the
picture** (x_t), and the model guesses the clean picture behind it (x0_hat): with enough noise a defect drowns in it,
and the model puts there what good parts have. Where its guess is no good step back towards the picture, the **KL
divergence** between the two steps is large; where it expects other texture or shape, the **feature error** is.
"""
MAPS_HELP = """
Each map asks in another way how unlike good parts a spot is. The plain colour difference between picture and guess
(**RGB**) also sees edges and grain, which are hard to guess on good parts too. **KL** weighs it by how sure the model
is. **Features** see texture and shape: the **error** of the model's guess of them; the **residual**, whether that
error is unlike those on good parts in all channels together; and the **Mahalanobis distance** of the features from
good ones. A **discriminator** has learned from artificial defects. The verdict rests on the **fused** map. All are in
standard deviations of good parts: dark is as usual, bright far odder.
"""
RESTORE_HELP = """
Where the picture is odd, the diffusion model puts what good parts have there, with less and less noise; a model
trained as RAN's follows the gradient of the distance to good parts instead, and removes its noise. Play it: the defect
fades and the distance falls. What comes out is inspected again.
"""
NOTHING = "Inspect a picture in the first tab; what the model makes of it appears here."


# -- actions ----------------------------------------------------------------------------------------------------------


def explain(inspection: Inspection) -> RADDenoisingOutput:
    """One denoising step of the inspected picture at each of several noise levels, those of the score among them."""
    pipeline = models.pipeline(inspection.model)
    last = len(pipeline.scheduler.respaced_chain.timesteps) - 1
    timesteps = pipeline.scheduler.respaced_to_full([round(level * last) for level in LEVELS])
    timesteps = sorted(set(timesteps) | set(pipeline.normality.config.timesteps))
    return models.run(inspection.model, "denoise", inspection.small, timesteps, inspection.category)


def restore(inspection: Inspection) -> RADRestorationOutput:
    settings = {"class_labels": inspection.category, "false_alarm_rate": DEFAULT_RATE}
    return models.run(inspection.model, "restore", inspection.view, **settings)


def heat_picture(values: np.ndarray, low: float, high: float) -> Image.Image:
    """A map in inferno's colours, MAP_SIDE wide and high."""
    picture = heat(values, low, max(high, low + 1e-6)).convert("RGB")
    return picture.resize((MAP_SIDE, MAP_SIDE), Image.Resampling.BICUBIC)


def map_pictures(inspection: Inspection) -> list[tuple[Image.Image, str]]:
    """Each score's map of a picture, and what it is called."""
    normality = models.normality(inspection.model)
    return [
        (
            heat_picture(inspection.map((MAP_SIDE, MAP_SIDE), name), *normality.heat_range(name)),
            SCORE_TYPES[name].title,
        )
        for name in inspection.maps
    ]


def level_pages(inspection: Inspection, steps: RADDenoisingOutput) -> list[tuple[list[Image.Image], str]]:
    """For each noise level x_t, x0_hat, the KL map and the feature map, and a caption."""
    fitted, pages = models.normality(inspection.model).config.timesteps, []
    for i, timestep in enumerate(steps.timesteps):
        kl, error = steps.pixel_map[i], steps.feature_map[i]
        kl_top, error_top = (float(np.quantile(values, 0.999)) for values in (kl, error))
        pictures = [steps.x_t[i], steps.x0_hat[i], heat_picture(kl, 0.0, kl_top), heat_picture(error, 0.0, error_top)]
        used = "one of the score's" if timestep in fitted else "not used by the score"
        caption = (
            f"Noise of deviation {steps.noise_levels[i]:.2f} (t = {timestep}, {used}). "
            f"Brightest: KL {kl_top:.2g} bits, feature error {error_top:.2g}."
        )
        pages.append((pictures, caption))
    return pages


def restoration_words(restored: RADRestorationOutput, resolution: float) -> str:
    """What became of one picture; nothing rarer than `resolution` is claimed."""
    distances, p_value = restored.distances[0], float(restored.p_value[0])
    often = f"a good part looks as odd {odds(p_value, resolution)}"
    if len(distances) == 1:
        moved = "Every part of the picture is as good parts are: nothing was changed."
    else:
        moved = (
            f"Distance to good parts: **{distances[0]:.1f}** before, **{distances[-1]:.1f}** after "
            f"{len(distances) - 1} steps. 0 is a typical good part; 1 is a standard deviation of good parts."
        )
    passes = "still does not pass" if restored.is_anomalous[0] else "passes"
    return f"{moved} Inspected again it **{passes}** as good at {100 * DEFAULT_RATE:g} % of false alarms ({often})."


# -- handlers ---------------------------------------------------------------------------------------------------------


@handler
def on_explain(
    inspection: Inspection | None, shown: Inspection | None, progress: gr.Progress = gr.Progress()
) -> tuple | list:
    """What the tab shows of the inspected picture; nothing is done again for the same one."""
    if inspection is None or shown is inspection:
        return [gr.skip()] * 4
    progress(0.2, desc="Adding noise and removing it")
    steps = explain(inspection)
    progress(0.9, desc="Drawing")
    fitted = models.normality(inspection.model).config.timesteps
    middle = steps.timesteps.index(fitted[len(fitted) // 2])
    titles = ["x_t: noised", "x0_hat: what the model expects", "KL divergence", "feature error"]
    book = flipbook_value(titles, level_pages(inspection, steps), middle)
    return inspection, book, strip(map_pictures(inspection)), None


@handler
def on_restore(inspection: Inspection | None, progress: gr.Progress = gr.Progress(track_tqdm=True)) -> tuple:
    """The picture beside its good version, the distance in words, and the steps to play; and whose they are."""
    if inspection is None:
        raise ValueError("Inspect a picture first.")
    progress(0.0, desc="Moving the picture towards good parts")
    restored = restore(inspection)
    steps, distances = restored.intermediates[0], restored.distances[0]
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_FRAMES)).round().astype(int))
    pages = [([steps[i]], f"Step {i} of {len(steps) - 1}, distance {distances[i]:.1f}") for i in shown]
    book = flipbook_value(["The part, step by step"], pages, 0, distances[shown], "Distance to good parts")
    words = restoration_words(restored, models.normality(inspection.model).p_value_resolution)
    return (inspection, (inspection.view, restored.images[0]), words, book)


def on_restored(done: tuple | None, inspection: Inspection | None) -> tuple | list:
    """Shows a restoration if its picture is still the inspected one."""
    return done[1:] if done is not None and done[0] is inspection else [gr.skip()] * 3


# -- the tab ----------------------------------------------------------------------------------------------------------


def build(settings: Settings, tab: gr.Tab) -> None:
    shown = gr.State()
    gr.Markdown("### One step back from noise\n" + HELP)
    levels = flipbook("Noise level", NOTHING)
    gr.Markdown("### Why not just the colour difference?\n" + MAPS_HELP)
    maps = gr.HTML(empty(NOTHING))
    gr.Markdown("### Restoration\n" + RESTORE_HELP)
    button = gr.Button("Restore this picture")
    with gr.Column(elem_classes="player"):
        steps = flipbook("Step", "The steps of the restoration")

    tab.select(
        on_explain,
        [settings.inspection, shown],
        [shown, levels, maps, steps],
        concurrency_id="score",
        concurrency_limit=2,
        show_progress_on=[levels],
        api_visibility="private",
    )
    restored = gr.State(time_to_live=visitors.KEPT_SECONDS)
    restoring = gr.on(
        [b.click for b in (*settings.restore_buttons, button)],
        on_restore,
        settings.inspection,
        restored,
        concurrency_id="restore",
        concurrency_limit=1,
        show_progress_on=[settings.restored, steps],
        api_visibility="private",
    )
    restoring.success(
        on_restored,
        [restored, settings.inspection],
        [settings.restored, settings.distance, steps],
        concurrency_limit=4,
        show_progress="hidden",
        api_visibility="private",
    )
