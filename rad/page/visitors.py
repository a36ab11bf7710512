"""What the page keeps for a visitor, for as long as the visitor stays: results to download, and a model of their own.

Whatever is kept lies behind a token that nobody can guess, belongs to one session, and goes when that session ends, or
when nobody has asked for it for KEPT_SECONDS.
"""

import secrets
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from rad import NormalityModel

KEPT_SECONDS = 2700  # with a clean-up every 900 s, an upload is gone within the hour
MAX_OWN, MAX_ALL = 5, 64  # products, and as many results, of one session and of all; the oldest make room


@dataclass(frozen=True)
class Product:
    """A visitor's own model: a base model's network with statistics of the visitor's good parts.

    Attributes:
        num_left_out, left_out: How many files were no pictures, and the names of some, cut.
    """

    name: str
    base: str
    normality: NormalityModel
    num_left_out: int = 0
    left_out: tuple[str, ...] = ()


@dataclass
class Kept:
    owner: str | None  # the session
    folder: Path
    product: Product | None = None
    used: float = field(default_factory=time.monotonic)


_kept: dict[str, Kept] = {}


def keep(owner: str | None, product: Product | None = None) -> str:
    """Makes a place for a visitor's results or model; returns its token."""
    present = sorted(_kept.items(), key=lambda item: item[1].used)
    alike = [(token, kept.owner) for token, kept in present if bool(kept.product) == bool(product)]
    own = [token for token, whose in alike if whose == owner]
    for token in own[: 1 - MAX_OWN] + [token for token, _ in alike][: 1 - MAX_ALL]:
        _remove(token)
    token = secrets.token_urlsafe(16) if product is None else f"product-{secrets.token_urlsafe(16)}"
    # In Gradio's cache, so that Gradio serves the files where they are and deletes them with its own
    folder = Path(get_upload_folder()) / token
    folder.mkdir(parents=True)
    _kept[token] = Kept(owner, folder, product)
    return token


def folder(token: str) -> Path:
    """Where the files of a token lie.

    Raises:
        ValueError: They are gone.
    """
    kept = _kept.get(token)
    if kept is None:
        raise ValueError("These results are no longer kept: make them again.")
    kept.used = time.monotonic()
    return kept.folder


def new_folder(owner: str | None) -> Path:
    """A place for results that nobody asks for again by a token."""
    return folder(keep(owner))


def product(model: str) -> Product | None:
    """The visitor's own model of this token; None if it is no such token.

    Raises:
        ValueError: It is one, but what it stood for is gone.
    """
    if not isinstance(model, str):
        raise ValueError(f"The model must be a name, got {model!r}.")
    if not model.startswith("product-"):
        return None
    kept = _kept.get(model)
    if kept is None:
        raise ValueError("This model was deleted with its session: fit it again, or choose another model.")
    kept.used = time.monotonic()
    return kept.product


def forget(request: gr.Request) -> None:
    """Deletes all that a session has kept; called when it ends."""
    for token, kept in list(_kept.items()):
        if kept.owner == request.session_hash:
            _remove(token)


def sweep() -> None:
    """Deletes what nobody has asked for in time."""
    for token, kept in list(_kept.items()):
        if time.monotonic() - kept.used > KEPT_SECONDS:
            _remove(token)


def keep_sweeping(every: float = 300.0) -> None:
    """Sweeps again and again, as long as this process lives."""

    def run() -> None:
        while True:
            time.sleep(every)
            sweep()

    threading.Thread(target=run, daemon=True).start()


def _remove(token: str) -> None:
    kept = _kept.pop(token, None)
    if kept is not None:
        shutil.rmtree(kept.folder, ignore_errors=True)
