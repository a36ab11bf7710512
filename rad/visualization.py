"""Pictures that explain a result."""

import html
import io
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from scipy import ndimage
from sklearn.metrics import precision_recall_curve, roc_curve

from .data.masks import resize_mask
from .image_processor import overlay
from .image_reader import ImageInput, decode
from .models.evidence import SCORE_TYPES
from .models.false_alarms import p_value_text
from .pipeline_output import AnomalyRegion
from .pipeline_rad import RADPipeline

OUTLINE = (0, 229, 255)  # cyan, which the heat's colours and most surfaces lack; a dark rim sets it off from the rest
RIM = (0, 0, 0)
TRUTH = (255, 255, 255)
# Okabe and Ito's, which colour-blind people tell apart; black is for what matters most
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F")
GOOD, BAD = COLORS[0], COLORS[5]
_RC_LOCK = threading.Lock()


def title_of(name: str) -> str:
    """What a score type is called; other names are their own title."""
    return SCORE_TYPES[name].title if name in SCORE_TYPES else name


def outline(image: Image.Image, mask: np.ndarray, color: tuple[int, int, int], dashed: bool = False) -> Image.Image:
    """The image with a line, set off by a dark rim, around the regions of a mask [H, W], outside them."""
    image = image.copy()
    width = max(1, round(max(image.size) / 400))
    inside = mask.astype(np.uint8) * 255
    dash = 4 * width
    drawn = np.indices(mask.shape).sum(0) // dash % 2 == 0 if dashed else np.ones(mask.shape, bool)
    for shade, reach in ((RIM, 2 * width), (color, width)):
        line = Image.fromarray(ndimage.maximum_filter(inside, 2 * reach + 1) - inside)
        image.paste(shade, mask=ImageChops.multiply(line, Image.fromarray(drawn.astype(np.uint8) * 255)))
    return image


def draw_regions(image: Image.Image, mask: np.ndarray, regions: list[AnomalyRegion]) -> Image.Image:
    """The image, RGB or RGBA, with a line around each region of a mask [H, W], outside it, and the region's number
    from 1 on."""
    image = outline(image, mask, OUTLINE)
    width = max(1, round(max(image.size) / 400))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(14, max(image.size) // 24))
    for number, region in enumerate(regions, start=1):
        left, top, _, _ = region.box
        position = (left, max(0, top - font.size - 3 * width))
        draw.text(position, str(number), OUTLINE, font, stroke_width=width, stroke_fill=RIM)
    return image


def results_figure(
    pipeline: RADPipeline,
    images: list[ImageInput],
    class_labels: list[str | int] | None = None,
    restore: bool = True,
    false_alarm_rate: float | None = None,
) -> Image.Image:
    """A picture of real results, such as a model card shows, RGB.

    Args:
        pipeline: With its normality fitted.
        images: One row each: the input, the heat over it with the regions that raise the alarm, the restored image.
        class_labels: Their categories; by default the pipeline finds out.
        restore: Without it there is no third column.
        false_alarm_rate: Of the regions and the verdict; by default as in scoring.
    """
    output = pipeline(images, class_labels=class_labels, false_alarm_rate=false_alarm_rate)
    low, high = pipeline.normality.heat_range()
    columns = ["input", "anomaly map"] + ["restored"] * restore
    restored = pipeline.restore(images, class_labels=class_labels).images if restore else images
    images = [decode(image, pipeline.image_processor.pixel_range) for image in images]
    figure = Figure(figsize=(3 * len(columns), 3.3 * len(images)), dpi=100, layout="constrained")
    for i, axes in enumerate(figure.subplots(len(images), len(columns), squeeze=False)):
        heat = overlay(images[i], output.anomaly_map[i], low, high)
        heat = draw_regions(heat, output.mask[i], output.regions[i])
        for axis, picture, title in zip(axes, (images[i], heat, restored[i]), columns, strict=False):
            axis.imshow(picture)
            axis.set_axis_off()
            axis.set_title(title if i == 0 else "")
        p_value = p_value_text(float(output.p_value[i]), pipeline.normality.p_value_resolution)
        verdict = f"{'defect' if output.is_anomalous[i] else 'good'}, {p_value}"
        axes[1].text(0.5, -0.02, verdict, transform=axes[1].transAxes, ha="center", va="top")
    return _render(figure)


def denoising_figure(
    timesteps: Sequence[int],
    x_0: torch.Tensor,
    x_t: torch.Tensor,
    x0_hat: torch.Tensor,
    kl: torch.Tensor,
    error: torch.Tensor,
) -> Image.Image:
    """What the denoiser makes of one image, a row for each of T timesteps, RGB.

    Args:
        timesteps: Of the full chain, [T].
        x_0, x_t, x0_hat: The image, noised and denoised, [T, 3, S, S] in [-1, 1].
        kl: KL in bits, [T, S, S].
        error: Squared feature error, [T, g, g].
    """
    titles = ("x_0", "x_t", "x0_hat", "KL, bits", "feature error")
    figure = Figure(figsize=(2.2 * len(titles), 2.2 * len(x_0) + 0.3), dpi=100, layout="constrained")
    pictures = [((x.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy() for x in (x_0, x_t, x0_hat)]
    maps = [m.float().cpu().numpy() for m in (kl, error)]
    for i, axes in enumerate(figure.subplots(len(x_0), len(titles), squeeze=False)):
        for axis, values, title in zip(axes, (*pictures, *maps), titles, strict=True):
            # KL falls by orders of magnitude from step to step: each has its own range
            is_map = values.ndim == 3
            shown = {"cmap": "inferno", "vmin": 0, "vmax": np.quantile(values[i], 0.999)} if is_map else {}
            axis.imshow(values[i], **shown)
            axis.set_axis_off()
            axis.set_title(title if i == 0 else "", fontsize=10)
        place = {"transform": axes[0].transAxes, "rotation": 90, "ha": "right", "va": "center"}
        axes[0].text(-0.06, 0.5, f"t = {timesteps[i]}", **place)
    return _render(figure)


def curve_figures(
    image_scores: dict[str, np.ndarray], labels: np.ndarray, pixel_curves: dict[str, dict[str, np.ndarray]]
) -> dict[str, Image.Image]:
    """ROC and precision-recall curves of images and of pixels, and the PRO curve, by title; a line for each score
    type, RGB.

    Args:
        image_scores: [N] for each score type.
        labels: [N], 1 for anomalous.
        pixel_curves: From `rad.metrics.pixel_curves`; empty where no masks are known.
    """
    fpr, tpr, recall = "false-positive rate", "true-positive rate", "recall"
    lines = {("ROC curve, images", fpr, tpr): {}, ("Precision and recall, images", recall, "precision"): {}}
    for name, scores in image_scores.items():
        for curve, points in zip(
            lines.values(), (roc_curve(labels, scores)[:2], precision_recall_curve(labels, scores)[1::-1]), strict=True
        ):
            curve[name] = points
    of_pixels = {
        ("ROC curve, pixels", fpr, tpr): ("fpr", "tpr"),
        ("Precision and recall, pixels", recall, "precision"): ("tpr", "precision"),
        ("PRO curve, AUPRO up to the dotted lines", fpr, "per-region overlap"): ("fpr", "pro"),
    }
    for title, (x, y) in of_pixels.items() if pixel_curves else ():
        lines[title] = {name: (curve[x], curve[y]) for name, curve in pixel_curves.items()}
    figures = {}
    for (title, x, y), curves in lines.items():
        figure = Figure(figsize=(4.4, 4.4), dpi=100, layout="constrained")
        axis = figure.subplots()
        for number, (name, points) in enumerate(curves.items()):
            axis.plot(*points, **line_style(name, number))
        for limit in (0.05, 0.3) if title.startswith("PRO") else ():
            axis.axvline(limit, color="black", linestyle=":", linewidth=1)
        axis.set(xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        figures[title] = _render(figure)
    return figures


def line_style(name: str, number: int) -> dict[str, Any]:
    """How the line of a score type is drawn: the fused one black and thick, others by colour and dashes."""
    label = title_of(name)
    if name == "fused":
        return {"color": "black", "linewidth": 2.5, "label": label, "zorder": 3}
    dashes = ("-", "--", "-.", ":")[number % 4]
    return {"color": COLORS[number % len(COLORS)], "linewidth": 1.6, "linestyle": dashes, "label": label}


def histogram_figure(good: np.ndarray, bad: np.ndarray, threshold: float | None, rate: float) -> Image.Image:
    """How image scores of good and of bad images are spread, with the threshold of a false-alarm rate, RGB."""
    figure = Figure(figsize=(5, 3.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    both = np.concatenate([good, bad])
    # A few extreme scores would squeeze all others into one bar
    low, high = both.min(), max(np.quantile(both, 0.98), np.quantile(good, 1) if len(good) else -np.inf)
    bins = np.linspace(low, high if high > low else low + 1, 31)
    for scores, color, hatch, name in ((good, GOOD, "", "good"), (bad, BAD, "//", "defective")):
        label = f"{name} ({len(scores)})"
        axis.hist(
            scores.clip(bins[0], bins[-1]), bins, color=color, alpha=0.6, hatch=hatch, edgecolor="white", label=label
        )
    if threshold is not None:
        axis.axvline(threshold, color="black", linestyle="--", label=f"threshold, false-alarm rate {rate:.2g}")
    beyond = int((both > bins[-1]).sum())
    axis.set(xlabel=f"image score ({beyond} beyond are in the last bar)" if beyond else "image score", ylabel="images")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return _render(figure)


def score_figure(
    good: np.ndarray, threshold: float, rate: float, scores: Sequence[float], description: str, name: str = "picture"
) -> str:
    """Scores of good images as a histogram, and where the threshold and given scores lie among them, as from `svg`.

    Args:
        good: Scores of held-out good images.
        threshold: At the false-alarm rate `rate`.
        scores: Of the images in question, a mark each: a triangle above the threshold, a dot else.
        description: The figure in words, for those who cannot see it.
        name: What one such image is called.
    """
    scores = np.asarray(scores, np.float64)
    figure = Figure(figsize=(4.8, 2.8), layout="constrained")  # so that words can be read on a phone
    axis = figure.subplots()
    low = min(good.min(), scores.min(initial=np.inf))
    # What lies far beyond would squeeze all else: it stands at the right edge
    high = max(threshold, good.max()) + (max(threshold, good.max()) - np.median(good))
    high = max(high, low + 1e-3)
    counts, *_ = axis.hist(good, np.linspace(low, high, 41), color=GOOD, alpha=0.75, label=f"{len(good)} good images")
    axis.axvline(threshold, color="black", linestyle="--", label=f"alarm, {100 * rate:.2g} % of good ones")
    top = counts.max()
    for marks, color, marker, label in (
        (scores[scores <= threshold], COLORS[2], "o", f"{name} without alarm"),
        (scores[scores > threshold], BAD, "v", f"{name} with alarm"),
    ):
        if len(marks):
            many = len(scores) > 1
            spread = np.random.default_rng(0).uniform(0.25, 0.75, len(marks)) if many else np.full(len(marks), 0.5)
            label = f"{len(marks)} x {label}" if many else label
            style = {"color": color, "marker": marker, "s": 40 if many else 140, "label": label, "zorder": 3}
            axis.scatter(marks.clip(low, high), top * spread, edgecolors="white", linewidths=0.8, **style)
    beyond = int((scores > high).sum())
    label = "score, in deviations of good images"
    if beyond:
        label += f" ({f'{beyond} beyond' if len(scores) > 1 else f'{scores[0]:.3g}, beyond'} the right edge)"
    axis.set(xlabel=label, yticks=[])
    axis.margins(x=0.02)
    axis.spines[["left", "right", "top"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, fontsize=10, frameon=False)
    return svg(figure, description)


def svg(figure: Figure, description: str) -> str:
    """A figure as SVG to stand in a page: without a background, black as the page's own colour of text, as wide as its
    place, with a description for those who cannot see it."""
    buffer = io.StringIO()
    with _RC_LOCK, rc_context({"svg.fonttype": "none"}):  # changed for all threads, one at a time
        figure.savefig(buffer, format="svg", transparent=True)
    content = buffer.getvalue()
    content = content[content.index("<svg") :].replace("#000000", "currentColor")
    content = re.sub(r"<metadata>.*?</metadata>", "", content, flags=re.DOTALL)
    heading = re.search(r'viewBox="[^"]*"', content)[0]
    label = html.escape(description, quote=True)
    style = "width: 100%; height: auto; fill: currentColor; font-family: inherit"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg {names} {heading} role="img" aria-label="{label}" style="{style}">'
    return opening + content[content.index(">") + 1 :]


def verdict_picture(
    image: Image.Image,
    anomaly_map: np.ndarray,
    truth: np.ndarray,
    threshold: float | None,
    alarm: bool,
    heat_range: tuple[float, float] | None = None,
    side: int = 256,
) -> Image.Image:
    """An image, beside it its map as heat with the truth dashed in white and the mask found solid in cyan, RGB.

    Args:
        anomaly_map: [S, S]; it and `truth` cover the whole image.
        truth: Bool [S, S].
        threshold: Of pixels; None where there is none, and then there is no mask either.
        alarm: Whether the image as a whole is called anomalous; if not there is no mask.
        heat_range: Map values at which the heat's colours start and end; None where the model has none, and then the
            image's own median and maximum.
        side: The longer side of each of the two pictures.
    """
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    image = image.resize(size, Image.Resampling.LANCZOS)
    values = np.asarray(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    truth = resize_mask(truth, size[::-1])
    if heat_range is None:
        low = float(np.median(values))
        heat_range = low, max(4 * low, float(values.max()), low + 1e-3)
    heat = overlay(image, values, *heat_range)
    heat = outline(heat, truth, TRUTH, dashed=True)
    if threshold is not None and alarm:
        heat = outline(heat, values > threshold, OUTLINE)
    both = Image.new("RGB", (2 * size[0] + 4, size[1]), "white")
    both.paste(image)
    both.paste(heat, (size[0] + 4, 0))
    return both


def maps_figure(pictures: list[Image.Image], columns: dict[str, list[np.ndarray]]) -> Image.Image:
    """Methods side by side, as in RAN's figures 1 and 6: a row for each image, a column for each map, RGB.

    Args:
        pictures: The inputs.
        columns: [S, S] for each picture: bool masks as they are, else maps, whose colours span one range a column.
    """
    titles = ["input", *(title_of(name) for name in columns)]
    figure = Figure(figsize=(1.8 * len(titles), 1.8 * len(pictures) + 0.3), dpi=90, layout="constrained")
    axes = figure.subplots(len(pictures), len(titles), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for row, picture in zip(axes, pictures, strict=True):
        row[0].imshow(picture.resize((256, 256)))
    for column, maps in zip(axes.T[1:], columns.values(), strict=True):
        low, high = np.quantile(np.stack(maps).astype(np.float32), (0.02, 0.998))
        shown = {"cmap": "gray", "vmin": 0, "vmax": 1} if maps[0].dtype == bool else {"cmap": "inferno"}
        for axis, values in zip(column, maps, strict=True):
            axis.imshow(values, **({"vmin": low, "vmax": high} | shown))
    for axis in axes.flat:
        axis.set_axis_off()
    return _render(figure)


def sweep_figure(alphas: Sequence[float], metrics: dict[str, list[float]]) -> Image.Image:
    """Metrics over the weight of the pixel-level score, as in RAN's figure 5, RGB."""
    figure = Figure(figsize=(7, 4), dpi=90, layout="constrained")
    axis = figure.subplots()
    for number, (name, values) in enumerate(metrics.items()):
        axis.plot(alphas, values, marker="os^D"[number % 4], **line_style(name, number))
    axis.set(xlabel="alpha (0: feature error alone, 1: KL alone)", xlim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    return _render(figure)


def restoration_figure(
    intermediates: list[list[Image.Image]], distances: list[np.ndarray], num_shown: int = 6
) -> Image.Image:
    """Images at several steps of the restoration and their distance curves, as in RAN's figure 7, RGB."""
    figure = Figure(figsize=(1.8 * (num_shown + 1.5), 1.9 * len(distances) + 0.3), dpi=90, layout="constrained")
    axes = figure.subplots(
        len(distances), num_shown + 1, squeeze=False, gridspec_kw={"width_ratios": [1] * num_shown + [1.5]}
    )
    for row, images, curve in zip(axes, intermediates, distances, strict=True):
        for axis, step in zip(row, np.linspace(0, len(images) - 1, num_shown).round().astype(int), strict=False):
            axis.imshow(images[step])
            axis.set_title(f"step {step}" if step else "input", fontsize=9)
            axis.set_axis_off()
        row[-1].plot(curve, color=GOOD)
        row[-1].axhline(0, color="black", linestyle=":", linewidth=1)
        row[-1].set_title("distance, good images' deviations", fontsize=8)
        row[-1].tick_params(labelsize=8)
    return _render(figure)


def restoration_sheet(
    pairs: Sequence[tuple[Image.Image, Image.Image]], captions: Sequence[str], side: int = 160, num_columns: int = 6
) -> Image.Image:
    """A contact sheet of images and what they were restored to, side by side, to be judged by eye, RGB.

    Args:
        pairs: Both pictures of each image.
        captions: A few words below each pair.
        side: Of each picture's square.
        num_columns: Pairs in a row.
    """
    rows, columns = -(-len(pairs) // num_columns), min(num_columns, len(pairs))
    font, gap = ImageFont.load_default(13), 10
    width, height = 2 * side + gap, side + 20 + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (pair, caption) in enumerate(zip(pairs, captions, strict=True)):
        left, top = gap + number % num_columns * width, gap + number // num_columns * height
        for place, picture in enumerate(pair):
            sheet.paste(ImageOps.pad(picture.convert("RGB"), (side, side), color="white"), (left + place * side, top))
        draw.text((left, top + side + 3), caption, "black", font)
    return sheet


def encode_map(anomaly_map: np.ndarray) -> Image.Image:
    """A map [H, W] as a 16-bit grey image whose values compare between images: 0 to 65535 are -8 to 56 deviations of
    good images, so that a deviation is 1024; what lies beyond is clipped."""
    return Image.fromarray(((anomaly_map.astype(np.float64) + 8) * 1024).round().clip(0, 65535).astype(np.uint16))


def _render(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
