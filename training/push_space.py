#!/usr/bin/env python
"""Creates or updates a Space on the Hugging Face Hub that serves `app.py`.

python training/push_space.py user/my-space --model user/my-model
"""

import argparse
from pathlib import Path

from huggingface_hub import HfApi

from rad.hub import list_files, one_sentence, upload

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("space", help="Where it goes: user/my-space.")
    parser.add_argument("--model", help="The model offered first: a Hub id or an embedded model's name.")
    parser.add_argument("--private", action="store_true", help="Only you see a newly created Space.")
    parser.add_argument("--hub_token", help="By default the one of `hf auth login`.")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    files = {name: ROOT / name for name in ("README.md", "app.py", "requirements.txt")}
    package = list_files(ROOT / "rad", ignore_patterns=["*__pycache__*", "*.ipynb_checkpoints*"])
    commit = upload(
        args.space,
        files | {f"rad/{name}": path for name, path in package.items()},
        "Upload the page",
        repo_type="space",
        space_sdk="gradio",
        private=args.private or None,
        token=args.hub_token,
    )
    if args.model:
        with one_sentence(args.space):
            HfApi(token=args.hub_token).add_space_variable(args.space, "RAD_MODEL", args.model)
    print(f"Pushed {len(files) + len(package)} files: {commit.commit_url}")


if __name__ == "__main__":
    main(parse_args())
