#!/usr/bin/env python
"""Measures false alarms on good test images seen through another camera: other files, exposures, focus and noise.

    python training/robustness.py --model my-model --data_dir my_test_photos

A change is made at the picture's own size, or at the network's resolution where that is smaller: there it does most,
and large photos lose it as they shrink.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from data_arguments import add_data_arguments, load_split, summarise_folder
from PIL import Image, ImageFilter
from tqdm.auto import tqdm

from rad import RADPipeline
from rad.data.dataset import evenly
from rad.files import whole
from rad.image_processor import to_pil

RATES = (0.01, 0.05, 0.1)
Change = Callable[[Image.Image], Image.Image]


def saved(file_format: str, quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, file_format, quality=quality)
        return Image.open(file).convert("RGB")

    return change


def exposed(gain: float = 1.0, gamma: float = 1.0) -> Change:
    table = [round(255 * min(1.0, gain * (level / 255) ** gamma)) for level in range(256)]
    return lambda image: image.point(table * 3)


def noisy(image: Image.Image) -> Image.Image:
    """Of two grey levels; grey pictures stay grey."""
    pixels, rng = np.asarray(image, np.float32), np.random.default_rng(0)
    is_grey = bool((pixels == pixels[..., :1]).all())
    noise = rng.normal(0, 2, (*pixels.shape[:2], 1 if is_grey else 3))
    return Image.fromarray((pixels + noise).clip(0, 255).round().astype(np.uint8))


def moved(image: Image.Image) -> Image.Image:
    """By a pixel to the right and down."""
    pixels = np.pad(np.asarray(image), ((1, 0), (1, 0), (0, 0)), mode="edge")[:-1, :-1]
    return Image.fromarray(pixels)


CHANGES: dict[str, Change] = {
    "as they are": lambda image: image,
    "JPEG, quality 95": saved("JPEG", 95),
    "JPEG, quality 80": saved("JPEG", 80),
    "JPEG, quality 60": saved("JPEG", 60),
    "WebP, quality 80": saved("WEBP", 80),
    "5 % darker": exposed(gain=0.95),
    "5 % brighter": exposed(gain=1.05),
    "gamma 0.95": exposed(gamma=0.95),
    "gamma 1.05": exposed(gamma=1.05),
    "moved by a pixel": moved,
    "out of focus (0.7 pixels)": lambda image: image.filter(ImageFilter.GaussianBlur(0.7)),
    "noise of 2 grey levels": noisy,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic", help="Folder, Hub id or name of an embedded model.")
    parser.add_argument("--data_dir", required=True, help="Folder with good test images.")
    add_data_arguments(parser.add_argument)
    parser.add_argument("--max_images", type=int, help="So many good test images of each category, evenly picked.")
    parser.add_argument("--output", help="Also write the table's numbers to this JSON file.")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Shares of good test images that raise an alarm, by change and rate."""
    if args.dry_run:
        print(summarise_folder(args, args.category).to_text())
        return {}
    pipeline = RADPipeline.load(args.model)
    pipeline.set_progress_bar_config(disable=True)
    dataset, known = load_split(args, "test", args.category), set(pipeline.normality.config.categories)
    names = sorted({sample.category for sample in dataset.samples})
    picked: list[int] = []
    for name in names:
        good = [i for i, s in enumerate(dataset.samples) if s.category == name and not s.label]
        picked += [good[k] for k in evenly(len(good), args.max_images or len(good))]
    if not picked:
        raise ValueError(f"There are no good test images in {args.data_dir}.")
    found: dict[str, list[float]] = {change: [] for change in CHANGES}
    for i in tqdm(picked, desc="Scoring"):
        sample = dataset[i]
        x_0, sizes = pipeline.image_processor.preprocess([sample.image])
        image = to_pil(x_0, [tuple(min(one, x_0.shape[-1]) for one in sizes[0])])[0]
        category = sample.category if sample.category in known else None
        output = pipeline([change(image) for change in CHANGES.values()], class_labels=category)
        for change, p_value in zip(CHANGES, output.p_value.tolist(), strict=True):
            found[change].append(p_value)
    table = {
        change: {f"{rate:g}": float(np.mean(np.array(values) <= rate)) for rate in RATES}
        for change, values in found.items()
    }
    lines = [f"| {len(picked)} good images | " + " | ".join(f"{rate:.0%}" for rate in RATES) + " |", "|---" * 4 + "|"]
    lines += [f"| {c} | " + " | ".join(f"{share:.1%}" for share in row.values()) + " |" for c, row in table.items()]
    print("\n".join(lines))
    if args.output:
        with whole(Path(args.output).expanduser()) as partial:
            partial.write_text(json.dumps({"images": len(picked), "alarms": table}, indent=2) + "\n", encoding="utf-8")
    return table


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
