"""Pictures that explain a result."""

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from .image_processor import ImageInput
from .pipeline_rad import AnomalyRegion, RADPipeline

OUTLINE = (0, 229, 255)  # cyan, which the heat's colours and most surfaces lack; a dark rim sets it off from the rest
RIM = (0, 0, 0)


def draw_regions(image: Image.Image, mask: np.ndarray, regions: list[AnomalyRegion]) -> Image.Image:
    """The image with a line around each region of a mask [H, W], outside it, and the region's number from 1 on."""
    image = image.copy()
    width = max(1, round(max(image.size) / 400))
    inside = Image.fromarray(mask.astype(np.uint8) * 255)
    for color, reach in ((RIM, 2 * width), (OUTLINE, width)):
        image.paste(color, mask=ImageChops.subtract(inside.filter(ImageFilter.MaxFilter(2 * reach + 1)), inside))
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
    false_alarm_rate: float = 0.01,
) -> Image.Image:
    """A picture of real results, such as a model card shows, RGB.

    Args:
        pipeline: With its normality fitted.
        images: One row each: the input, the heat over it with the regions that raise the alarm, the restored image.
        class_labels: Their categories; by default the pipeline finds out.
        restore: Without it there is no third column.
        false_alarm_rate: Of the regions and the verdict.
    """
    images = [pipeline.image_processor.decode(image) for image in images]
    output = pipeline(images, class_labels=class_labels, false_alarm_rate=false_alarm_rate)
    threshold = output.pixel_threshold
    columns = ["input", "anomaly map"] + ["restored"] * restore
    restored = pipeline.restore(images, class_labels=class_labels).images if restore else images
    figure = Figure(figsize=(3 * len(columns), 3.3 * len(images)), dpi=100, layout="constrained")
    for i, axes in enumerate(figure.subplots(len(images), len(columns), squeeze=False)):
        top = max(2 * threshold, float(output.anomaly_map[i].max()))
        heat = pipeline.image_processor.overlay(images[i], output.anomaly_map[i], threshold / 2, top)
        heat = draw_regions(heat, output.mask[i], output.regions[i])
        for axis, picture, title in zip(axes, (images[i], heat, restored[i]), columns, strict=False):
            axis.imshow(picture)
            axis.set_axis_off()
            axis.set_title(title if i == 0 else "")
        p = "p < 0.001" if output.p_value[i] < 0.001 else f"p = {output.p_value[i]:.2g}"
        verdict = f"{'defect' if output.is_anomalous[i] else 'good'}, {p}"
        axes[1].text(0.5, -0.02, verdict, transform=axes[1].transAxes, ha="center", va="top")
    return _render(figure)


def denoising_figure(
    x_0: torch.Tensor, x_t: torch.Tensor, x0_hat: torch.Tensor, kl: torch.Tensor, error: torch.Tensor
) -> Image.Image:
    """What the denoiser makes of images at one timestep, a row for each, RGB.

    Args:
        x_0, x_t, x0_hat: Clean, noised and denoised images [B, 3, S, S] in [-1, 1].
        kl: KL in bits, [B, S, S].
        error: Squared feature error, [B, g, g].
    """
    titles = ("x_0", "x_t", "x0_hat", "KL, bits", "feature error")
    figure = Figure(figsize=(2.2 * len(titles), 2.2 * len(x_0) + 0.3), dpi=100, layout="constrained")
    pictures = [((x.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy() for x in (x_0, x_t, x0_hat)]
    maps = [m.float().cpu().numpy() for m in (kl, error)]
    for i, axes in enumerate(figure.subplots(len(x_0), len(titles), squeeze=False)):
        for axis, values, title in zip(axes, (*pictures, *maps), titles, strict=True):
            shown = {} if values.ndim == 4 else {"cmap": "inferno", "vmin": 0, "vmax": np.quantile(values, 0.999)}
            axis.imshow(values[i], **shown)
            axis.set_axis_off()
            axis.set_title(title if i == 0 else "", fontsize=10)
    return _render(figure)


def _render(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
