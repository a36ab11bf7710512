#!/usr/bin/env python
"""Turns OpenAI's guided-diffusion checkpoint, which RAN starts from, into a diffusers model folder.

    python training/convert_guided_diffusion.py 256x256_diffusion.pt --output_dir ran-init

`training/train.py --init_from` takes either. The checkpoint is linked from https://github.com/openai/guided-diffusion.
"""

import argparse
from os.path import expanduser
from pathlib import Path

import torch

from rad.models.guided_diffusion import load_guided_diffusion


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=expanduser, help="256x256_diffusion.pt.")
    parser.add_argument(
        "--output_dir", type=expanduser, default="ran-init", help="The U-Net goes here, as a diffusers model folder."
    )
    parser.add_argument("--categories", nargs="+", default=[], help="Names of the categories to train on.")
    parser.add_argument("--feature_channels", type=int, default=272, help="Channels of the extractor.")
    parser.add_argument("--feature_stride", type=int, default=4, help="Pixels per position of the extractor's grid.")
    parser.add_argument("--sample_size", type=int, default=256, help="Side of the training images in pixels.")
    parser.add_argument("--seed", type=int, default=0, help="Of the feature head's weights.")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = load_guided_diffusion(
        args.checkpoint,
        args.categories,
        feature_channels=args.feature_channels,
        feature_stride=args.feature_stride,
        sample_size=args.sample_size,
    )
    model.save_pretrained(args.output_dir)
    converted, new = (sum(p.numel() for p in part.parameters()) for part in (model.unet, model.feature_head))
    print(f"Converted {converted:,} parameters, with {new:,} new ones in the feature head.")
    print(f"Model: {Path(args.output_dir).resolve()}")


if __name__ == "__main__":
    main(parse_args())
