"""The page: its words, its redrawing from kept maps, and round trips through a running server."""

import gradio as gr
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import app

SIDE = 64


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 160, (SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(two_category_pipeline, tmp_path_factory) -> str:
    """The folder of a small pipeline that knows brick and gravel."""
    folder = tmp_path_factory.mktemp("model")
    two_category_pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def client(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAD_MODEL", model)
        demo = app.build_demo()
        demo.queue().launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        yield Client(demo.local_url, verbose=False)
        demo.close()


@pytest.fixture
def inspection(model) -> app.Inspection:
    """A picture whose map has one odd corner of 16 x 16 pixels, of which 8 x 8 are odder."""
    anomaly_map = np.zeros((SIDE, SIDE), np.float16)
    anomaly_map[:16, :16] = 1e2
    anomaly_map[:8, :8] = 1e4
    return app.Inspection(model, "brick", 0.008, Image.fromarray(picture(0)), anomaly_map, zoom=2.0)


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p_value", "words"),
    [
        (1.0, "more than 1 time in 2"),
        (0.5, "1 time in 2"),
        (0.3, "1 time in 3"),
        (1 / 437, "1 time in 440"),
        (1 / 10_000, "1 time in 10,000"),
        (1 / 10_001, "less than 1 time in 10,000"),
        (1e-12, "less than 1 time in 10,000"),
    ],
)
def test_odds(p_value, words):
    assert app.odds(p_value, 10_000) == words


def test_verdict_of_a_defect():
    words = app.describe(0.0025, 0.01, regions=2, share=0.014)
    assert "Defect found" in words and "2 regions, 1.4 % of the surface." in words
    assert "A good part looks this odd 1 time in 400." in words
    assert "Alarm set to 1 % of good parts" in words
    assert "1 region, less than 0.1 %" in app.describe(0.0025, 0.01, regions=1, share=0.0002)
    assert "no single region" in app.describe(0.0025, 0.01, regions=0, share=0.0)
    assert "Is this the product" in app.describe(1e-12, 0.01, regions=1, share=0.9)


def test_verdict_of_a_good_part():
    words = app.describe(0.3, 0.2, regions=0, share=0.0)
    assert "Looks good" in words and "1 time in 3." in words and "Alarm set to 20 %" in words


def test_verdict_claims_no_more_than_its_good_pictures_tell():
    words = app.describe(1e-9, 0.01, regions=1, share=0.1, num_good=6, interval=(0.0, 0.459))
    assert "less than 1 time in 60." in words and "between 0.0 and 45.9 % (95 % confidence)" in words


def test_verdict_shows_names_as_text():
    assert "<script>" not in app.describe(0.3, 0.01, regions=0, share=0.0, category="<script>")


# -- redrawing --------------------------------------------------------------------------------------------------------


def test_redraw_follows_the_rate(inspection):
    verdict, heated, mask, table = app.redraw(inspection, 0.01)
    assert "Defect found" in verdict and "1 region" in verdict
    assert heated.size == mask.size == (SIDE, SIDE)
    assert np.asarray(mask)[:16, :16].all() and np.asarray(mask).sum() == 256
    assert table == [[1, "0, 0", "32 x 32", 4 * 256, 1e4]]  # in pixels of the picture, twice the view
    verdict, _, mask, table = app.redraw(inspection, 0.005)
    assert "Looks good" in verdict and not np.asarray(mask).any() and table == []


def test_redraw_runs_no_model(inspection):
    pipe = app.load(inspection.model)
    calls = []
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in (pipe.unet, pipe.feature_extractor)]
    for rate in app.RATES:
        app.redraw(inspection, rate)
    for hook in hooks:
        hook.remove()
    assert not calls


def test_redraw_before_any_picture_changes_nothing():
    assert app.redraw(None, 0.01) == [gr.skip()] * 4


# -- the page ---------------------------------------------------------------------------------------------------------


def test_page_builds_without_loading_a_model(monkeypatch):
    monkeypatch.setenv("RAD_MODEL", "/nowhere")
    app.load.cache_clear()
    demo = app.build_demo()
    assert app.load.cache_info().misses == 0
    names = {fn.api_name for fn in demo.fns.values() if fn.api_visibility == "public"}
    assert names == {"categories", "inspect", "redraw", "restore"}


def test_inspect_redraw_and_restore(client, model, two_category_images, tmp_path):
    part = two_category_images[0][-1].resize((120, 90))
    part.paste("white", (30, 20, 60, 50))
    part.save(tmp_path / "part.png")
    categories = client.predict(model, api_name="/categories")
    assert [name for name, _ in categories["choices"]] == [app.AUTO, "brick", "gravel"]

    verdict, heated, mask, table, each = client.predict(
        handle_file(tmp_path / "part.png"), model, "gravel", 0.2, api_name="/inspect"
    )
    assert "Defect found" in verdict and "product: gravel" in verdict and "Alarm set to 20 %" in verdict
    assert Image.open(heated).size == Image.open(mask).size == (120, 90)
    assert table["data"] and len(each) == len(app.SCORES)

    verdict, *_ = client.predict(0.001, api_name="/redraw")  # from this session's own state
    assert "Alarm set to 0.1 %" in verdict and "product: gravel" in verdict
    with pytest.raises(AppError, match="must lie between 0 and 1"):
        client.predict(2, api_name="/redraw")

    (before, after), words, curve = client.predict(api_name="/restore")
    assert Image.open(before).size == Image.open(after).size == (120, 90)
    assert "good part" in words and curve["columns"] == ["step", "distance"]


def test_sixteen_bit_pictures_reach_our_decoder(client, model, tmp_path):
    Image.fromarray(picture(2)[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    Image.fromarray(picture(2)[..., 0]).save(tmp_path / "flat.png")
    deep, flat = (
        client.predict(handle_file(tmp_path / name), model, app.AUTO, 0.01, api_name="/inspect")
        for name in ("deep.tif", "flat.png")
    )
    assert deep[0] == flat[0]
    assert (np.asarray(Image.open(deep[1])) == np.asarray(Image.open(flat[1]))).all()


def test_bad_uploads_get_one_sentence(client, model, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(AppError, match=r"notes\.png is not an image, or not one of the formats"):
        client.predict(handle_file(tmp_path / "notes.png"), model, app.AUTO, 0.01, api_name="/inspect")
    with pytest.raises(AppError, match="Upload a picture first"):
        client.predict(None, model, app.AUTO, 0.01, api_name="/inspect")


def test_models_outside_the_list_are_refused(client, tmp_path):
    Image.fromarray(picture(3)).save(tmp_path / "part.png")
    with pytest.raises(AppError, match="not in the list of choices"):
        client.predict(handle_file(tmp_path / "part.png"), "someone/else", app.AUTO, 0.01, api_name="/inspect")


def test_visitors_have_states_of_their_own(client):
    with pytest.raises(AppError, match="Inspect a picture first"):
        Client(client.src, verbose=False).predict(api_name="/restore")
