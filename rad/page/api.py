"""The page's actions for programs: `gradio_client`, plain HTTP, and MCP tools. Each call stands by itself."""

import functools
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from rad.models.false_alarms import check_rate

from . import batch as many
from . import catalogue, inspection, models, product, visitors, why
from .look import DEFAULT_RATE
from .words import one_sentence


def _score(image: str | None, model: str, category: str) -> inspection.Inspection:
    if image is None:
        raise ValueError("Give a picture: the argument image is empty.")
    return inspection.score(image, model, category)


def _write(pictures: list[tuple[Image.Image, str]], folder: Path, name: str) -> list[tuple[str, str]]:
    """Pictures as files of this call alone: Gradio would write equal ones to one file, while others read it."""
    paths = [folder / f"{name}-{number:02d}.png" for number in range(len(pictures))]
    for path, (picture, _) in zip(paths, pictures, strict=True):
        picture.save(path)
    return [(str(path), words) for path, (_, words) in zip(paths, pictures, strict=True)]


@one_sentence
def inspect(
    image: str, model: str, category: str, false_alarm_rate: float, request: gr.Request
) -> tuple[dict[str, Any], str, str, list[str]]:
    """Finds defects in a picture of a part, knowing good parts only.

    Args:
        image: The picture: PNG, JPEG, BMP, TIFF, WebP, GIF or PPM.
        model: "synthetic", "mtd", "paper", the id of a RAD model of the Hub, or the token that fit_product returned.
        category: Which kind of part it is, one of describe_model's categories; empty to find out.
        false_alarm_rate: Share of good parts that may be called defective, between 0 and 1.

    Returns:
        result: Its is_anomalous, p_value (how often a good part looks as odd), score, regions (box, area, peak).
        overlay: The picture with heat and outlined regions.
        mask: Defective pixels in white.
        files: Overlay, map as 16-bit PNG (1024 is a deviation of good parts, 8192 is 0), .npy, mask, result as JSON.
    """
    check_rate(false_alarm_rate)
    scored = _score(image, model, category)
    result, files = inspection.save(scored, false_alarm_rate, visitors.new_folder(request.session_hash))
    return result, files[0], files[3], files


@one_sentence
def explain(image: str, model: str, category: str, request: gr.Request) -> tuple[dict[str, Any], list, list]:
    """Shows what a verdict rests on: one denoising step at several noise levels, and each score's map.

    Args:
        image: The picture of a part: PNG, JPEG, BMP, TIFF, WebP, GIF or PPM.
        model: "synthetic", "mtd", "paper", the id of a RAD model of the Hub, or the token that fit_product returned.
        category: Which kind of part it is, one of describe_model's categories; empty to find out.

    Returns:
        result: Noise levels and their timesteps.
        levels: For each level in turn the noised picture, the denoised one, the KL map and the feature map.
        maps: That of each score, the fused one first.
    """
    scored = _score(image, model, category)
    steps = why.explain(scored)
    pages = why.level_pages(scored, steps)
    levels = {"timesteps": steps.timesteps, "noise_levels": steps.noise_levels.tolist()}
    names = ("noised", "denoised", "KL", "feature error")
    pictures = [(p, f"{name}: {words}") for page, words in pages for p, name in zip(page, names, strict=True)]
    folder = visitors.new_folder(request.session_hash)
    return levels, _write(pictures, folder, "level"), _write(why.map_pictures(scored), folder, "map")


@one_sentence
def restore(image: str, model: str, category: str, request: gr.Request) -> tuple[str, dict[str, Any]]:
    """Shows what a part would look like without its defect; takes up to a minute.

    Args:
        image: The picture of a part: PNG, JPEG, BMP, TIFF, WebP, GIF or PPM.
        model: "synthetic", "mtd", "paper", the id of a RAD model of the Hub, or the token that fit_product returned.
        category: Which kind of part it is, one of describe_model's categories; empty to find out.

    Returns:
        restored: The restored picture, at most 768 pixels wide and high.
        result: The distance to good parts before the first and after each step, in deviations of good parts; how often
            a good part looks as odd as the restored picture, and whether that passes as good at 1 % of false alarms.
    """
    scored = _score(image, model, category)
    restored = why.restore(scored)
    path = visitors.new_folder(request.session_hash) / "restored.png"
    restored.images[0].save(path)
    result = {"distances": restored.distances[0].tolist(), "category": scored.category}
    result |= {"p_value": float(restored.p_value[0]), "passes": not restored.is_anomalous[0]}
    return str(path), result


@one_sentence
def inspect_batch(
    archive: str, model: str, category: str, false_alarm_rate: float, request: gr.Request
) -> tuple[dict[str, Any], list[str]]:
    """Finds defects in many pictures at once; a file that is no picture is a row with its error.

    Args:
        archive: A zip of pictures.
        model: "synthetic", "mtd", "paper", the id of a RAD model of the Hub, or the token that fit_product returned.
        category: Which kind of part all are, one of describe_model's categories; empty to find out for each.
        false_alarm_rate: Share of good parts that may be called defective, between 0 and 1.

    Returns:
        result: A row for each picture, with verdict, score, p_value, anomalous_share and error.
        files: The table as CSV and as JSON, and a zip of all maps as 16-bit PNG.
    """
    *_, done = many.score_all([archive], model, category, request.session_hash, [false_alarm_rate])
    paths = many.save(done, false_alarm_rate, visitors.new_folder(request.session_hash))
    return {"pictures": many.records(done, false_alarm_rate)}, paths


@one_sentence
def fit_product(archive: str, name: str, model: str, request: gr.Request) -> tuple[dict[str, Any], str]:
    """Fits a model to pictures of good parts, ten at least, in a minute or so; it is deleted when your session ends.

    Args:
        archive: A zip of pictures of good parts, all taken the same way.
        name: What to call the product.
        model: Whose network to use: "synthetic", "mtd", "paper" or the id of a RAD model of the Hub.

    Returns:
        result: The token that stands for this model in the other calls, false alarms on held-out good pictures, and
            how many files were left out because they are no pictures, with the names of some.
        pipeline: A zip of the folder that `RADPipeline.from_pretrained` loads.
    """
    token = product.fit([archive], name, model, request.session_hash)
    kept = visitors.product(token)
    told = {"num_left_out": kept.num_left_out, "left_out": list(kept.left_out)}
    return {"model": token, "self_check": product.self_check(token), **told}, product.save(token)


@one_sentence
def describe_model(model: str) -> dict[str, Any]:
    """Tells what a model knows: its categories, measured results and card; a model of the Hub is loaded.

    Args:
        model: "synthetic", "mtd", "paper", the id of a RAD model of the Hub, or the token that fit_product returned.

    Returns:
        result: Categories, good images behind the thresholds, resolution, timesteps, parameters, results and card.
    """
    return catalogue.describe(model)


def build() -> None:
    """The endpoints, each with components of its own that check what comes in, out of sight."""

    def image() -> gr.Image:
        component = gr.Image(label="image", type="filepath")
        component.preprocess = lambda file: file and file.path  # our decoder opens the file, and no other
        return component

    model = functools.partial(gr.Textbox, next(iter(models.offered())), label="model")
    category = functools.partial(gr.Textbox, "", label="category")
    rate = functools.partial(gr.Number, DEFAULT_RATE, label="false_alarm_rate")
    name = functools.partial(gr.Textbox, "my product", label="name")
    # One zip, not many files: Gradio's MCP server cannot take a list of them
    archive, pipeline = (functools.partial(gr.File, label=label) for label in ("archive", "pipeline"))
    files = functools.partial(gr.Files, label="files")
    result = functools.partial(gr.JSON, label="result")
    overlay, mask, restored = (
        functools.partial(gr.Image, label=label, format="png") for label in ("overlay", "mask", "restored")
    )
    levels, maps = (functools.partial(gr.Gallery, label=label, format="png") for label in ("levels", "maps"))

    # As on the page, what takes long holds up only its like
    endpoints = [
        (inspect, [image, model, category, rate], [result, overlay, mask, files], "score"),
        (explain, [image, model, category], [result, levels, maps], "score"),
        (restore, [image, model, category], [restored, result], "restore"),
        (inspect_batch, [archive, model, category, rate], [result, files], "batch"),
        (fit_product, [archive, name, model], [result, pipeline], "fit"),
        (describe_model, [model], [result], "load"),
    ]
    with gr.Row(visible=False):
        for action, inputs, outputs, group in endpoints:
            gr.Button().click(
                action,
                [make() for make in inputs],
                [make() for make in outputs],
                api_name=action.__name__,
                concurrency_id=group,
                concurrency_limit=2 if group in ("score", "load") else 1,
            )
