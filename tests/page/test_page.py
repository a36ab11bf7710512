"""The parts of the page: words, what is kept for visitors, models, and each tab's actions, without a server."""

import csv
import json
import os
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from conftest import size_of
from gradio.utils import get_upload_folder
from PIL import Image

from rad import RADPipeline, RADRestorationOutput
from rad.models.false_alarms import check_rate
from rad.page import batch, catalogue, inspection, look, models, product, visitors, why
from rad.page.words import describe, handler, odds, percent, without_folders


@pytest.fixture(autouse=True)
def offered(page_model):
    yield
    for token in list(visitors._kept):
        visitors._remove(token)


@pytest.fixture(scope="module")
def inspected(part, page_model) -> inspection.Inspection:
    return inspection.score(part, page_model, "gravel")


@pytest.fixture
def request_of_visitor():
    return gr.Request(session_hash="visitor")


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
    assert odds(p_value, 1e-4) == words


def test_percent():
    assert [percent(share) for share in (0.0, 0.0002, 0.014, 1.0)] == ["0 %", "< 0.1 %", "1.4 %", "100 %"]


def test_verdict_of_a_defect():
    words = describe(0.0025, 0.01, regions=2, share=0.014)
    assert "Defect" in words
    assert "2 regions, 1.4 % of the surface; a good part looks this odd 1 time in 400." in words
    assert "Alarm set to 1 % of good parts" in words
    assert "1 region, less than 0.1 %" in describe(0.0025, 0.01, regions=1, share=0.0002)
    assert "no single region" in describe(0.0025, 0.01, regions=0, share=0.0)
    assert "Is this the product" in describe(1e-12, 0.01, regions=1, share=0.9)


def test_verdict_of_a_good_part():
    words = describe(0.3, 0.2, regions=0, share=0.0)
    assert "Looks good" in words and "A good part looks this odd 1 time in 3." in words
    assert "Alarm set to 20 %" in words and "Defect" not in words


def test_verdict_claims_no_more_than_its_good_pictures_tell():
    words = describe(1e-9, 0.01, regions=1, share=0.1, num_good=6, resolution=1 / 60, interval=(0.0, 0.459))
    assert "less than 1 time in 60." in words and "between 0.0 and 45.9 % (95 % confidence)" in words


def test_names_are_shown_as_text():
    assert "<script>" not in describe(0.3, 0.01, regions=0, share=0.0, category="<script>", model="<script>")

    @handler
    def fail() -> None:
        raise ValueError("<script>")

    with pytest.raises(gr.Error, match="&lt;script&gt;"):
        fail()
    assert "<b>" not in look.strip([(Image.new("RGB", (4, 4)), "<b>'")])


# -- visitors ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_goes_with_its_session_alone(request_of_visitor):
    mine, other = visitors.keep("visitor"), visitors.keep("other")
    (visitors.folder(mine) / "result.json").write_text("{}")
    folders = visitors.folder(mine), visitors.folder(other)
    visitors.forget(request_of_visitor)
    assert not folders[0].exists() and folders[1].exists()


def test_what_nobody_asks_for_goes_in_time(monkeypatch):
    old = visitors.folder(visitors.keep("gone"))
    now, sleep = time.monotonic(), time.sleep
    monkeypatch.setattr(visitors.time, "monotonic", lambda: now + visitors.KEPT_SECONDS - 1)
    visitors.sweep()
    assert old.exists()
    monkeypatch.setattr(visitors.time, "monotonic", lambda: now + visitors.KEPT_SECONDS + 1)
    visitors.keep_sweeping(every=0.01)  # nobody need come by for it
    for _ in range(500):
        if old.exists():
            sleep(0.01)
    assert not old.exists()


def test_few_products_are_kept(monkeypatch):
    """Of one session and of all, those used longest ago make room."""
    monkeypatch.setattr(visitors, "MAX_OWN", 2)
    monkeypatch.setattr(visitors, "MAX_ALL", 3)
    thing = visitors.Product("nut", "synthetic", None)
    mine = [visitors.keep("me", thing) for _ in range(2)]
    visitors.product(mine[0])
    mine.append(visitors.keep("me", thing))
    assert [token in visitors._kept for token in mine] == [True, False, True]
    others = [visitors.keep(f"other {i}", thing) for i in range(2)]
    assert [token in visitors._kept for token in (*mine, *others)] == [False, False, True, True, True]
    results = [visitors.keep("me") for _ in range(3)]  # count by themselves
    assert [token in visitors._kept for token in (mine[2], *results)] == [True, False, True, True]
    with pytest.raises(ValueError, match="no longer kept"):
        visitors.folder(results[0])


def test_a_model_that_was_deleted_says_so(request_of_visitor, page_model):
    token = visitors.keep("visitor", visitors.Product("nut", page_model, models.pipeline(page_model).normality))
    assert models.title(token) == "Yours: nut"
    visitors.forget(request_of_visitor)
    with pytest.raises(ValueError, match="was deleted with its session"):
        models.pipeline(token)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc", "../secret", "rad", "./rad/pretrained", "a/b/c", "", "product"])
def test_visitors_reach_no_folder_of_the_server(name, tmp_path, monkeypatch, two_category_pipeline):
    monkeypatch.chdir(tmp_path)
    two_category_pipeline.save_pretrained(tmp_path / "rad")
    with pytest.raises(ValueError, match="There is no model"):
        models.load(name)


def test_a_relative_folder_is_taken_for_a_hub_id(hub, tmp_path, monkeypatch, two_category_pipeline):
    monkeypatch.chdir(tmp_path)
    two_category_pipeline.save_pretrained(tmp_path / "user" / "local")
    with pytest.raises(OSError, match="There is no folder or Hub repository 'user/local'"):
        models.load("user/local")


def test_a_model_of_the_hub(hub, two_category_pipeline):
    two_category_pipeline.push_to_hub("user/parts", token="hf_user")
    assert models.categories("user/parts") == ["brick", "gravel"]
    known = catalogue.describe("user/parts")
    assert known["good_images"] == 12 and known["results"] == []
    assert "# parts" in known["card"]
    assert "brick, gravel" in catalogue.facts("user/parts")
    hub.reset()  # it is loaded, and nothing is asked of the Hub again
    assert models.load("user/parts").pipeline is models.load("user/parts").pipeline


def test_the_servers_own_token_opens_nothing_for_visitors(hub, two_category_pipeline, monkeypatch):
    two_category_pipeline.push_to_hub("user/secret", token="hf_user", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    with pytest.raises(OSError, match="or it is private"):
        models.load("user/secret")


def test_a_model_that_is_too_large_is_not_downloaded(hub, two_category_pipeline, monkeypatch):
    two_category_pipeline.push_to_hub("user/large", token="hf_user")
    monkeypatch.setattr(models, "MAX_DOWNLOAD", 1e6)
    with pytest.raises(ValueError, match=r"user/large has \d+ MB; this page loads up to 1 MB"):
        models.load("user/large")


def test_a_download_holds_up_nobody_else(page_model, monkeypatch):
    """While one model is on its way others are there at once, and who wants the same gets it from one download."""
    models.load(page_model)
    arrived, downloads = threading.Event(), []

    def slow(model: str) -> models.Loaded:
        downloads.append(model)
        arrived.wait(20)
        return models._loaded[page_model]

    monkeypatch.setattr(models, "_load", slow)
    monkeypatch.setattr(models, "_loaded", models._loaded.copy())
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(models.load, "user/slow") for _ in range(2)]
        assert models.load(page_model) and not any(job.done() for job in both)
        arrived.set()
        assert both[0].result() is both[1].result()
    assert downloads == ["user/slow"]


def test_few_models_stay_in_memory_beside_those_offered(page_model, hub, two_category_pipeline, monkeypatch):
    monkeypatch.setattr(models, "MAX_LOADED", 1)
    first = models.load(page_model).pipeline
    for name in ("user/one", "user/two"):
        two_category_pipeline.push_to_hub(name, token="hf_user")
        models.load(name)
    assert "user/two" in models._loaded and "user/one" not in models._loaded
    assert models.load(page_model).pipeline is first


def test_no_path_of_the_server_is_shown(page_model, monkeypatch, two_category_pipeline, tmp_path):
    two_category_pipeline.save_pretrained(tmp_path / "parts")
    monkeypatch.setenv("RAD_MODEL", str(tmp_path / "parts"))
    assert list(models.offered()) == ["parts", "synthetic", "mtd", "paper"]
    assert models.categories("parts") == ["brick", "gravel"]
    with pytest.raises(ValueError) as error:
        models.load(str(tmp_path / "parts"))
    assert str(tmp_path) not in str(error.value).replace(repr(str(tmp_path / "parts")), "")


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setenv("RAD_DEVICE", "banana")
    with pytest.raises(ValueError, match="RAD_DEVICE is 'banana', which this machine does not have"):
        models.device()


@pytest.mark.parametrize("name", ["mtd", "synthetic"])
def test_embedded_models_show_their_metrics_and_limits(name):
    known = catalogue.describe(name)
    assert {"image AUROC", "pixel AP", "AUPRO (FPR <= 0.3)"} <= {result["metric"] for result in known["results"]}
    assert "0.9" in catalogue.facts(name) and "imits" in catalogue.card(name)
    assert "](" not in "".join(line for line in catalogue.card(name).splitlines() if line.startswith("!["))


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_pipeline_says(part, inspected, two_category_pipeline):
    pipe = two_category_pipeline
    found = pipe(part, class_labels="gravel", false_alarm_rate=0.2)
    anomaly_map, decision = inspection.decide(inspected, 0.2, inspected.size)
    assert decision.p_value == found.p_value[0] and inspected.scores["fused"] == found.score[0]
    assert (anomaly_map == found.anomaly_map[0]).all() and decision.mask[0].any()
    assert (decision.mask[0] == found.mask[0]).all()
    assert decision.regions == found.regions
    result = inspection.result(inspected, 0.2, decision)
    assert result["p_value_resolution"] == pytest.approx(1 / 120)  # of 12 good pictures
    assert result["is_anomalous"] == found.is_anomalous[0] and result["threshold"] == found.threshold
    assert [tuple(region["box"]) for region in result["regions"]] == [region.box for region in found.regions[0]]


def test_a_model_without_good_parts_says_what_to_do(
    part, page_model, tmp_path, small_pipeline_without_normality, monkeypatch
):
    small_pipeline_without_normality.save_pretrained(tmp_path / "bare")
    monkeypatch.setenv("RAD_MODEL", str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="knows no good parts yet"):
        inspection.score(part, "bare", models.AUTO)
    with pytest.raises(ValueError, match="knows no good parts yet"):
        next(batch.score_all([part], "bare", models.AUTO, "visitor"))
    assert "none yet" in catalogue.facts("bare")


def test_an_embedded_model_is_meant_by_its_name_whatever_folder_stands_beside_the_page(
    two_category_pipeline, tmp_path, monkeypatch
):
    two_category_pipeline.save_pretrained(tmp_path / "mtd")
    monkeypatch.chdir(tmp_path)
    models._loaded.pop("mtd", None)
    assert models.categories("mtd") == ["magnetic_tile"]


def test_files_to_download(inspected, tmp_path):
    result, paths = inspection.save(inspected, 0.2, tmp_path)
    paths = {Path(path).name: path for path in paths}
    assert list(paths) == [f"part_{end}" for end in ("overlay.png", "map.png", "map.npy", "mask.png", "result.json")]
    anomaly_map, decision = inspection.decide(inspected, 0.2, (120, 90))
    assert (np.load(paths["part_map.npy"]) == anomaly_map).all()
    deep = np.asarray(Image.open(paths["part_map.png"]))
    assert deep.dtype == np.uint16 and np.abs(deep / 1024 - 8 - anomaly_map.clip(-8, 56)).max() <= 0.5 / 1024 + 1e-9
    assert (np.asarray(Image.open(paths["part_mask.png"])) == 255 * decision.mask[0]).all()
    assert size_of(paths["part_overlay.png"]) == (120, 90)
    assert json.loads(Path(paths["part_result.json"]).read_text()) == result
    assert result == inspection.result(inspected, 0.2, decision)


def test_redraw_follows_the_rate_and_runs_no_model(inspected):
    pipe = models.pipeline(inspected.model)
    calls = []
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in (pipe.unet, pipe.feature_extractor)]
    _, decision = inspection.decide(inspected, 0.2, inspected.view.size)
    verdict, stack, (picture, boxes), table, histogram = inspection.on_redraw(inspected, 0.2)
    assert "model: model." in verdict
    strict, _, (_, no_boxes), no_table, _ = inspection.on_redraw(inspected, decision.p_value[0] / 2)
    for hook in hooks:
        hook.remove()
    assert not calls
    assert "Defect" in verdict and "Looks good" in strict
    assert boxes and len(boxes) == len(table) and no_boxes == no_table == []
    assert picture.size == (120, 90) and set(stack) == {"picture", "heat", "lines"}
    assert histogram.startswith("<svg") and "aria-label" in histogram


def test_pictures_of_too_many_pixels_are_refused(part, page_model, monkeypatch):
    monkeypatch.setattr(inspection, "MAX_PIXELS", 120 * 90 - 1)
    with pytest.raises(ValueError, match=r"part\.png has 0 megapixels; this page takes up to 0"):
        inspection.score(part, page_model, models.AUTO)


@pytest.mark.parametrize("rate", [0, 1, -1, 5, None, "abc", float("nan")])
def test_rates_that_are_none(rate, part, page_model):
    with pytest.raises(ValueError, match="false_alarm_rate must lie between 0 and 1"):
        check_rate(rate)
    with pytest.raises(ValueError, match="false_alarm_rate must lie between 0 and 1"):
        next(batch.score_all([part], page_model, models.AUTO, "visitor", [rate]))


def test_redraw_before_any_picture_changes_nothing():
    assert inspection.on_redraw(None, 0.01) == [gr.skip()] * 5
    with pytest.raises(gr.Error, match="Inspect a picture first"):
        inspection.on_save(None, 0.01, None)


def test_upload_that_is_no_picture_is_refused_at_once(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.warns(UserWarning, match="notes.png is not an image"):
        assert inspection.check_upload(str(tmp_path / "notes.png")) is None


# -- why --------------------------------------------------------------------------------------------------------------


def test_noise_levels_contain_those_of_the_score(inspected):
    steps = why.explain(inspected)
    assert {20, 201, 401} <= set(steps.timesteps) and len(steps.timesteps) > 3
    assert (np.diff(steps.noise_levels) > 0).all()
    pages = why.level_pages(inspected, steps)
    assert len(pages) == len(steps.timesteps) and all(len(pictures) == 4 for pictures, _ in pages)
    assert [words for _, words in why.map_pictures(inspected)][:3] == ["fused", "KL", "feature error"]
    assert "RGB difference" in [words for _, words in why.map_pictures(inspected)]


def test_restoration_is_a_flip_book_with_its_curve(inspected):
    done = why.on_restore(inspected)
    assert why.on_restored(done, None) == [gr.skip()] * 3, "another picture has been inspected since"
    (before, after), words, book = why.on_restored(done, inspected)
    assert before.size == after.size == (120, 90)
    assert len(book["pages"]) == len(book["curve"]) <= why.MAX_FRAMES
    assert book["pages"][0]["caption"].startswith("Step 0 of") and book["curve"][-1] < book["curve"][0]
    assert "Distance to good parts" in words and "Inspected again it" in words


def test_a_failed_restoration_is_called_so():
    def words(steps, p_value):
        found = RADRestorationOutput([], [], [np.ones(steps)], np.array([p_value]), np.array([p_value <= 0.01]))
        return why.restoration_words(found, 0.005)

    assert "still does not pass" in words(21, 0.002) and "less than 1 time in 200" in words(21, 0.002)
    assert "**passes** as good" in words(21, 0.25) and "1 time in 4" in words(21, 0.25)
    assert "nothing was changed" in words(1, 0.25)


# -- batch ------------------------------------------------------------------------------------------------------------


def write_zip(path: Path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


@pytest.fixture
def scored(part, page_model, tmp_path) -> batch.Batch:
    """A picture, a file that is none, and a zip with a picture and a damaged one."""
    content = Path(part).read_bytes()
    (tmp_path / "=notes.txt").write_text("no picture")
    archive = write_zip(
        tmp_path / "parts.zip",
        {"a/good.png": content, "a/cut.png": content[:200]}
        | dict.fromkeys(("__MACOSX/._good.png", "a/@eaDir/good.png", "a/Thumbs.db", "a/.DS_Store"), b"x"),
    )
    paths = [part, str(tmp_path / "=notes.txt"), archive]
    *_, done = batch.score_all(paths, page_model, models.AUTO, "visitor")
    return done


def test_a_bad_file_is_one_row_with_its_error(scored):
    names = ["part.png", "=notes.txt", "parts/a/good.png", "parts/a/cut.png"]
    assert [row.name for row in scored.rows] == names
    assert [bool(row.error) for row in scored.rows] == [False, True, False, True]
    assert "is not an image" in scored.rows[1].error and "truncated" in scored.rows[3].error
    assert scored.rows[0].score == scored.rows[2].score
    verdicts = [row[batch.HEADERS.index("verdict")] for row in batch.table(scored, 0.2)]
    assert verdicts == ["defect", "error", "defect", "error"]
    assert "2 defects in 2" in batch.summary(scored, 0.2) and "2 files could not be read" in batch.summary(scored, 0.2)


@pytest.mark.parametrize("rate", [0.2, 0.03])
def test_verdicts_and_areas_are_those_of_the_rate(part, page_model, two_category_pipeline, rate):
    *_, done = batch.score_all([part], page_model, models.AUTO, "visitor", [rate, 1e-13])
    row, found = done.rows[0], two_category_pipeline(part, false_alarm_rate=rate)
    assert row.share(rate) == found.mask[0].mean() > 0
    assert row.verdict(1e-13) == "good" and row.share(1e-13) == 0


def test_no_odds_that_good_pictures_cannot_tell(scored):
    """With 12 good pictures no rarer ones than 1 in 120; programs get the p-value as it is, and this."""
    p_values = [row[batch.HEADERS.index("p-value")] for row in batch.table(scored, 0.2)]
    assert all(p >= 0.0083 for p in p_values if p is not None) and p_values.count(None) == 2
    assert batch.records(scored, 0.2)[0]["p_value_resolution"] == pytest.approx(1 / 120)


def test_the_results_end_with_their_session(part, page_model, request_of_visitor):
    running = batch.score_all([part] * 3, page_model, models.AUTO, "visitor")
    next(running)
    next(running)
    visitors.forget(request_of_visitor)
    with pytest.raises(ValueError, match="no longer kept"):
        next(running)


def test_two_members_of_one_name_are_two_pictures(part, page_model, two_category_images, tmp_path):
    two_category_images[0][-1].save(tmp_path / "good.png")
    with zipfile.ZipFile(tmp_path / "parts.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.write(part, "dup.png")
        archive.write(tmp_path / "good.png", "dup.png")
    *_, done = batch.score_all([str(tmp_path / "parts.zip")], page_model, models.AUTO, "visitor")
    assert [row.name for row in done.rows] == ["parts/dup.png"] * 2
    assert [row.verdict(0.01) for row in done.rows] == ["defect", "good"]


def test_gallery_has_the_oddest_first_of_those_that_are_kept(tmp_path):
    names = {"usual": 0.5, "odd": 1e-9, "gone": 1e-12}
    rows = [batch.Row(name, "", 1.0, p, thumbnail=tmp_path / f"{name}.webp") for name, p in names.items()]
    for row in rows[:2]:
        row.thumbnail.touch()
    captions = [caption for _, caption in batch.gallery(batch.Batch("", 3, "", rows), 0.01)]
    assert captions == ["defect, 1.0: odd", "good, 1.0: usual"]


def test_tables_and_maps_to_download(scored, tmp_path):
    paths = [Path(path) for path in batch.save(scored, 0.2, tmp_path)]
    assert [path.name for path in paths] == ["batch.csv", "batch.json", "maps.zip"]
    rows = list(csv.DictReader(paths[0].read_text().splitlines()))
    records = json.loads(paths[1].read_text())["pictures"]
    assert [row["verdict"] for row in rows] == [row["verdict"] for row in records]
    assert float(rows[0]["score"]) == records[0]["score"]
    assert rows[1]["picture"] == "'=notes.txt", "a spreadsheet would run it as a formula"
    with zipfile.ZipFile(paths[2]) as archive:
        assert archive.namelist() == [records[0]["map"], records[2]["map"]]
        with archive.open(records[0]["map"]) as file:
            assert np.asarray(Image.open(file)).dtype == np.uint16


def test_archives_are_not_trusted(tmp_path, monkeypatch, page_model, part):
    monkeypatch.setattr(batch, "MAX_BYTES", 100_000)
    paths = [
        write_zip(tmp_path / "bomb.zip", {"zeros.png": bytes(100_001)}),
        write_zip(tmp_path / "up.zip", {"../../escaped.png": Path(part).read_bytes(), "n" * 400: b"x"}),
    ]
    *_, done = batch.score_all(paths, page_model, models.AUTO, "visitor")
    assert "has more than 0 MB" in done.rows[0].error and not done.rows[1].error
    assert "is not an image" in done.rows[2].error, "no name of a member is used on disk"
    folders = tmp_path.parent, tmp_path.parent.parent, Path(tempfile.gettempdir()), visitors.folder(done.token).parent
    assert not [path for folder in folders for path in folder.glob("escaped*")]
    for name, content in (("no.zip", b"no zip"), ("empty.zip", b"")):
        (tmp_path / name).write_bytes(content)
        *_, done = batch.score_all([str(tmp_path / name), part], page_model, models.AUTO, "visitor")
        assert [row.error for row in done.rows] == [f"{name} is damaged, or no zip archive.", ""]
    damaged = bytearray(Path(paths[0]).read_bytes())
    damaged[40:60] = bytes(20)
    (tmp_path / "bomb.zip").write_bytes(damaged)
    *_, done = batch.score_all(paths[:1], page_model, models.AUTO, "visitor")
    assert "cannot be taken from the archive" in done.rows[0].error
    directory = b"PK\x01\x02"  # starts each of its entries
    (tmp_path / "cut.zip").write_bytes(Path(paths[1]).read_bytes().replace(directory, bytes(4)))
    *_, done = batch.score_all([str(tmp_path / "cut.zip"), part], page_model, models.AUTO, "visitor")
    assert [row.error for row in done.rows] == ["cut.zip is damaged, or no zip archive.", ""]
    entries = write_zip(tmp_path / "many.zip", {f"{i}.png": b"" for i in range(11)})
    monkeypatch.setattr(batch, "MAX_PICTURES", 1)
    with pytest.raises(ValueError, match=r"many\.zip has more than 10 entries"):
        batch.list_files([entries])
    with pytest.raises(ValueError, match="At most 1 pictures are taken at a time; these are 3"):
        batch.list_files(paths)
    with pytest.raises(ValueError, match="Give pictures"):
        batch.list_files([])


# -- your product -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_files(good_images, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("good")
    for i, picture in enumerate(good_images):
        picture.resize((80, 80)).save(folder / f"{i:02d}.png")
    return sorted(str(path) for path in folder.glob("*.png"))


def test_a_product_of_ones_own(good_files, part, page_model, tmp_path):
    network = models.load(page_model).pipeline
    before = {name: value.clone() for name, value in network.unet.state_dict().items()}
    known = network.normality
    token = product.fit(good_files, "My <nut> 7", page_model, "visitor")
    assert models.title(token) == "Yours: My nut 7" and models.categories(token) == ["My nut 7"]
    assert models.load(page_model).pipeline.normality is known, "the model of all visitors has changed"
    assert all((value == before[name]).all() for name, value in network.unet.state_dict().items())

    check = product.self_check(token)
    assert [row["held_out"] for row in check] == [12] * 3
    assert all(0 <= row["alarms"] <= 4 and row["interval"][0] <= row["interval"][1] for row in check)
    assert "My nut 7: ready" in product.report(token)

    with zipfile.ZipFile(product.save(token)) as archive:
        archive.extractall(tmp_path)
    loaded = RADPipeline.from_pretrained(tmp_path / "my-nut-7")
    found, own = loaded(part), inspection.score(part, token, models.AUTO)
    # The zip holds half precision, as all saved pipelines do
    assert found.category == ["My nut 7"] and found.score[0] == pytest.approx(own.scores["fused"][0], rel=0.05)
    text = "".join(path.read_text() for path in (tmp_path / "my-nut-7").rglob("*.json"))
    assert os.environ["RAD_MODEL"] not in text, "paths of the server are in what visitors download"
    assert [path.name for path in visitors.folder(token).iterdir()] == ["my-nut-7.zip"]


@pytest.mark.parametrize("count", [0, 9])
def test_too_few_good_pictures(good_files, page_model, count):
    words = "Give at least 10 good pictures, got 9" if count else "Give pictures"
    with pytest.raises(ValueError, match=words):
        product.fit(good_files[:count], "nut", page_model, "visitor")
    assert not visitors._kept


def test_good_pictures_that_show_nothing_give_no_model(good_files, page_model, tmp_path):
    Image.new("RGB", (80, 80)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match=r"1 of 13 good images \(the first is black.png\) are of one colour"):
        product.fit([*good_files, str(tmp_path / "black.png")], "nut", page_model, "visitor")
    with pytest.raises(
        ValueError,
        match="12 good images, 11 of which are copies of others or show the same part; it needs at least 10",
    ):
        product.fit(good_files[:1] * 12, "nut", page_model, "visitor")
    assert not visitors._kept


def test_defects_and_masks_in_an_archive_are_not_fitted_to(good_files, page_model, tmp_path):
    with zipfile.ZipFile(tmp_path / "parts.zip", "w") as archive:
        for i, path in enumerate(good_files):
            archive.write(path, f"good/{i}.png")
        archive.write(good_files[0], "bad/0.png")
        archive.write(good_files[0], "ground_truth/bad/0.png")
    with pytest.raises(ValueError, match=r"2 of \d+ pictures bear names of defects or masks .*parts/bad/0.png"):
        product.fit([str(tmp_path / "parts.zip")], "nut", page_model, "visitor")


def test_a_bad_file_among_good_ones_is_named(good_files, page_model, tmp_path):
    (tmp_path / "cut.png").write_bytes(Path(good_files[0]).read_bytes()[:200])
    with pytest.raises(ValueError, match=r"^/.*/cut\.png is truncated .* Take it out and try again"):
        product.fit([*good_files, str(tmp_path / "cut.png")], "nut", page_model, "visitor")


def test_files_that_are_no_pictures_are_left_out_and_told(good_files, page_model, tmp_path):
    with zipfile.ZipFile(tmp_path / "parts.zip", "w") as archive:
        for i, path in enumerate(good_files):
            archive.write(path, f"{i}.png")
        archive.writestr("Thumbs.db", b"x")
        archive.writestr("readme.txt", "good parts")
    (tmp_path / "<notes>.txt").write_text("no picture")
    paths = [str(tmp_path / name) for name in ("parts.zip", "<notes>.txt")]
    told = product.report(product.fit(paths, "nut", page_model, "visitor"))
    assert "3 files that are no pictures were left out: " in told
    assert all(name in told for name in ("parts/Thumbs.db", "parts/readme.txt", "&lt;notes&gt;.txt"))
    with zipfile.ZipFile(tmp_path / "parts.zip", "a") as archive:
        for i in range(30):
            archive.writestr(f"{i}{'x' * 5000}.txt", b"x")
    kept = visitors.product(product.fit(paths, "nut", page_model, "visitor"))
    assert kept.num_left_out == 33 and len("".join(kept.left_out)) <= 400
    with pytest.raises(ValueError, match="Give at least 10 good pictures, got 0"):
        product.fit(paths[1:], "nut", page_model, "visitor")


def test_errors_name_uploads_without_the_server_s_folders(tmp_path):
    path = Path(get_upload_folder()) / "ab12" / "my part.png"
    assert without_folders(f"{path} is not an image.") == "my part.png is not an image."
    assert without_folders("Give 1/2 of /tmp or so.") == "Give 1/2 of /tmp or so."
