"""Files and folders that are there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a hidden path beside `path`, for a file or a folder, that takes its place once the block has ended well.

    If the block raises, what it wrote is removed and what stood at `path` stays. The hidden name ends like `path`'s,
    as writers that look at the suffix need, and no other process has it.

    Args:
        path: A file or a folder to write; its parent must exist, and a folder is replaced, not merged.
    """
    path = Path(path)
    partial, old = (path.with_name(f".{kind}-{os.getpid()}-{path.name}") for kind in ("partial", "partial-old"))
    try:
        yield partial
        if path.is_dir():  # no rename replaces a folder that is not empty
            path.rename(old)
        try:
            partial.replace(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        _remove(partial)
        _remove(old)


def remove_partials(folder: Path) -> None:
    """Removes what processes that were killed had begun to write in a folder; what they were about to replace is put
    back if nothing had taken its place yet."""
    for old in folder.glob(".partial-old-*"):
        target = old.with_name(old.name.split("-", 3)[3])
        if not target.exists():
            old.rename(target)
    for path in folder.glob(".partial-*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
