"""What the page says: verdicts, and errors."""

import functools
import html
import inspect
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from rad.models.false_alarms import rate_note


def one_sentence(action: Callable, markup: bool = False) -> Callable:
    """Shows the library's one-sentence errors as they are; `markup` where they are shown as HTML."""

    def translate(error: Exception) -> gr.Error:
        words = without_folders(str(error))
        return gr.Error(html.escape(words) if markup else words, print_exception=False)

    @functools.wraps(action)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return action(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise translate(error) from error

    @functools.wraps(action)
    def generator(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from action(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise translate(error) from error

    return generator if inspect.isgeneratorfunction(action) else wrapped


handler = functools.partial(one_sentence, markup=True)  # for actions of the page, whose errors are HTML


def without_folders(text: str) -> str:
    """A sentence that names uploaded files by their names, not by where the server keeps them."""
    kept = [Path(folder) for folder in (get_upload_folder(), tempfile.gettempdir())]
    for folder in dict.fromkeys(map(str, [*kept, *(path.resolve() for path in kept)])):
        text = re.sub(rf"{re.escape(folder)}/(?:[^\s/]+/)*", "", text)
    return text


def odds(p_value: float, resolution: float) -> str:
    """A p-value in words; nothing rarer than `resolution` is claimed."""
    if p_value < resolution:
        return f"less than 1 time in {round(1 / resolution):,}"
    if p_value > 0.5:
        return "more than 1 time in 2"
    return f"1 time in {round(float(f'{1 / p_value:.2g}')):,}"


def percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"


def describe(
    p_value: float,
    rate: float,
    regions: int,
    share: float,
    category: str = "object",
    model: str = "model",
    num_good: int = 1000,
    resolution: float = 1e-4,
    interval: tuple[float, float] = (0.0, 1.0),
) -> str:
    """The verdict as HTML.

    Args:
        rate: False-alarm rate in use; the verdict is "defect" where p_value <= rate.
        regions, share: How many regions the mask has, and its share of the surface.
        category, model: Names to show.
        num_good, resolution: Good pictures that p_value was measured on, and how small a one they bear out.
        interval: What the rate may really be, 95 % confident.
    """
    good = f"a good part looks this odd {odds(p_value, resolution)}."
    is_bad = p_value <= rate
    if is_bad and regions:
        where = f"{regions} region{'s' * (regions > 1)}, {percent(share).replace('<', 'less than')} of the surface; "
    elif is_bad:
        where = "Odd as a whole, no single region stands out; "
    else:
        good, where = good.capitalize(), ""
    kind, title = ("bad", "✕ Defect") if is_bad else ("good", "✓ Looks good")
    hint = " Is this the product that the model knows?" if share > 0.5 else ""
    return (
        f"<div class='verdict {kind}' role='status'><strong>{title}</strong><p>{where}{good}{hint}</p>"
        f"<p class='note'>Alarm set to {100 * rate:g} % of good parts. Compared with {num_good:,} good pictures, "
        f"which leave it between {100 * interval[0]:.1f} and {100 * interval[1]:.1f} % (95 % confidence); "
        f"product: {html.escape(category)}, model: {html.escape(model)}. {rate_note(rate, num_good)}</p></div>"
    )
