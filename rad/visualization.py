"""Pictures that explain a result."""

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from .pipeline_rad import AnomalyRegion

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
