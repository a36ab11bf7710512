"""The RAD Space: upload a picture of a part, see whether it is defective, where, why, and what a good one looks like.

`python app.py` serves the page. Environment: RAD_MODEL (an embedded model, a folder or a Hub id) is the model offered
first, RAD_DEVICE where it runs, RAD_MAX_QUEUE how many calls may wait; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT where
the page is served.
"""

import os
import signal
import sys
import tempfile

import gradio as gr

from rad.page import api, batch, catalogue, inspection, models, product, settings, visitors, why
from rad.page.look import CSS, THEME

INTRO = """
# RAD finds defects, having seen good parts only
A diffusion model has learned what good parts look like. Give it a picture: it says whether something is wrong,
where, and what the part would look like without it.
"""
FOOTER = "Pictures stay on this server, are seen by nobody else, and are deleted within an hour."


def build_demo() -> gr.Blocks:
    with gr.Blocks(
        title="RAD: find defects", analytics_enabled=False, delete_cache=(900, visitors.KEPT_SECONDS)
    ) as demo:
        gr.Markdown(INTRO)
        shared = settings.build(demo)
        with gr.Tabs(elem_classes="wide-content"):
            with gr.Tab("Inspect"):
                inspection.build(shared)
            with gr.Tab("Why") as tab:
                why.build(shared, tab)
            with gr.Tab("Batch"):
                batch.build(shared)
            with gr.Tab("Your product"):
                product.build(shared)
            with gr.Tab("Models"):
                catalogue.build(shared, demo)
        api.build()
        gr.Markdown(FOOTER, elem_classes="legend")
        demo.unload(visitors.forget)
    return demo.queue(max_size=max_queue())


def max_queue() -> int:
    value = os.environ.get("RAD_MAX_QUEUE") or "100"
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"RAD_MAX_QUEUE must be a whole number of at least 1, got {value!r}.")
    return int(value)


# For Blocks.launch; the limit is that of one upload, and archives are uploads
LAUNCH = {"theme": THEME, "css": CSS, "max_file_size": "500mb", "footer_links": ["api"], "mcp_server": True}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as on Ctrl+C, so that no file stays
    with tempfile.TemporaryDirectory(prefix="rad-") as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)
        try:
            models.load(next(iter(models.offered())))  # what is wrong with it shows now, and nobody waits for it
            demo = build_demo()
        except (ValueError, OSError) as error:
            sys.exit(str(error))
        visitors.keep_sweeping()
        demo.launch(**LAUNCH)


if __name__ == "__main__":
    main()
