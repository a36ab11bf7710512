"""The page as programs see it: its endpoints over HTTP, with `gradio_client`, as MCP tools, and under load."""

import asyncio
import base64
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import size_of, texture
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub import SpaceCard
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from PIL import Image

import app
from rad import RADPipeline
from rad.page import models, visitors

ROOT = Path(__file__).parent.parent
ENDPOINTS = {"inspect", "explain", "restore", "inspect_batch", "fit_product", "describe_model"}


@pytest.fixture(scope="module")
def client(served) -> Client:
    return Client(served.local_url, verbose=False)


@pytest.fixture(scope="module")
def good_zip(good_images, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("good")
    for i, picture in enumerate(good_images):
        picture.save(folder / f"{i:02d}.png")
    return shutil.make_archive(str(folder.parent / "good"), "zip", folder)


def wait_for(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


# -- the page ---------------------------------------------------------------------------------------------------------


def test_page_builds_without_loading_a_model(monkeypatch):
    monkeypatch.setenv("RAD_MODEL", "/nowhere")
    monkeypatch.setenv("RAD_MAX_QUEUE", "7")
    monkeypatch.setattr(models, "_loaded", {})
    demo = app.build_demo()
    assert not models._loaded
    assert demo._queue.max_size == 7
    monkeypatch.setenv("RAD_MAX_QUEUE", "many")
    with pytest.raises(ValueError, match="RAD_MAX_QUEUE must be a whole number of at least 1, got 'many'"):
        app.build_demo()
    assert sum(demo.delete_cache) <= 3600, "uploads are to be gone within the hour"


def test_device(monkeypatch, page_model):
    monkeypatch.setenv("RAD_DEVICE", "meta")
    monkeypatch.setattr(models, "_loaded", models.OrderedDict())
    loaded = models.load(page_model)
    assert loaded.working.device.type == "meta" and loaded.pipeline.device.type == "cpu"
    assert models.normality(page_model).good_scores.device.type == "cpu"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RAD_DEVICE", "banana", "RAD_DEVICE is 'banana', which this machine does not have"),
        ("RAD_DEVICE", "cuda:99", "RAD_DEVICE is 'cuda:99', which this machine does not have"),
        ("RAD_MAX_QUEUE", "0", "RAD_MAX_QUEUE must be a whole number"),
        ("RAD_MODEL", "/nowhere", "There is no folder '/nowhere'"),
    ],
)
def test_what_is_wrong_with_the_environment_is_said_at_once(name, value, words, page_model, monkeypatch):
    monkeypatch.setattr(models, "_loaded", models.OrderedDict())
    monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match=words):
            app.main()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_work_is_done_on_a_space_s_gpu(monkeypatch, page_model, part):
    """With a package `spaces` as on ZeroGPU, every call of the pipeline goes through its decorator."""
    calls = []

    def GPU(function):
        def wrapped(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return wrapped

    stub = types.ModuleType("spaces")
    stub.GPU = GPU
    monkeypatch.setitem(sys.modules, "spaces", stub)
    spec = importlib.util.spec_from_file_location("rad.page.models_on_zero", models.__file__)
    on_zero = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(on_zero)
    picture = Image.open(part).convert("RGB")
    assert on_zero.run(page_model, "__call__", picture).score.shape == (1,)
    on_zero.fit(page_model, [picture.rotate(turn) for turn in range(5)], "nut")
    assert calls == ["_run", "_fit"]


def test_front_matter_of_the_space(hub):
    card = SpaceCard.load(ROOT / "README.md")
    card.validate()  # asks the Hub
    data = card.data
    assert (data.sdk, data.app_file, data.license) == ("gradio", "app.py", "apache-2.0")
    wrong = SpaceCard((ROOT / "README.md").read_text().replace("colorFrom: indigo", "colorFrom: orange"))
    with pytest.raises(ValueError, match="colorFrom.* must be one of"):
        wrong.validate()
    requirement = re.search(r"^gradio\[mcp\]>=([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert data.sdk_version.startswith(requirement[1]), "the Space installs the tested version"


# -- endpoints --------------------------------------------------------------------------------------------------------


def test_endpoints_are_documented(client):
    api = client.view_api(return_format="dict")["named_endpoints"]
    assert {name.strip("/") for name in api} == ENDPOINTS
    for name, endpoint in api.items():
        described = endpoint["description"]
        assert len(described) > 30, name
        for parameter in endpoint["parameters"]:
            assert parameter["parameter_name"] in ("image", "archive", "model", "category", "name", "false_alarm_rate")
            assert parameter["label"] == parameter["parameter_name"], name
        assert all(returned["label"] and "value" not in returned["label"] for returned in endpoint["returns"]), name


def test_inspect(client, part, page_model, two_category_pipeline):
    result, overlay, mask, files = client.predict(handle_file(part), page_model, "gravel", 0.2, api_name="/inspect")
    found = two_category_pipeline(part, class_labels="gravel", false_alarm_rate=0.2)
    assert result["is_anomalous"] and result["p_value"] == pytest.approx(found.p_value[0])
    assert result["score"] == pytest.approx(found.score[0]) and result["category"] == "gravel"
    assert result["regions"] == [
        {"box": list(r.box), "area": r.area, "peak": pytest.approx(r.peak)} for r in found.regions[0]
    ]
    assert size_of(overlay) == (120, 90)
    assert (np.asarray(Image.open(mask).convert("L")) == 255 * found.mask[0]).all()
    raw = next(path for path in files if path.endswith(".npy"))
    assert (np.load(raw) == found.anomaly_map[0]).all()


def test_explain(client, part):
    levels, pictures, maps = client.predict(image=handle_file(part), api_name="/explain")
    assert {20, 201, 401} <= set(levels["timesteps"]) and len(pictures) == 4 * len(levels["noise_levels"])
    assert maps[0]["caption"] == "fused" and size_of(maps[0]["image"]) == (256, 256)


def test_restore(client, part):
    restored, result = client.predict(image=handle_file(part), category="gravel", api_name="/restore")
    assert size_of(restored) == (120, 90)
    assert result["distances"][-1] < result["distances"][0] and result["category"] == "gravel"
    assert 0 < result["p_value"] <= 1 and result["passes"] is (result["p_value"] > 0.01)


def test_batch(client, part, tmp_path):
    shutil.copy(part, tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    archive = shutil.make_archive(str(tmp_path.parent / "batch"), "zip", tmp_path)
    result, files = client.predict(archive=handle_file(archive), false_alarm_rate=0.2, api_name="/inspect_batch")
    assert [row["verdict"] for row in result["pictures"]] == ["defect", "error"]
    assert sorted(Path(path).name for path in files) == ["batch.csv", "batch.json", "maps.zip"]


def test_a_product_lives_as_long_as_its_session(served, part, good_zip, client, tmp_path):
    mine = Client(served.local_url, verbose=False)
    fitted, zipped = mine.predict(handle_file(good_zip), "nut", api_name="/fit_product")
    token = fitted["model"]
    assert [row["held_out"] for row in fitted["self_check"]] == [12] * 3
    result, *_ = mine.predict(handle_file(part), token, api_name="/inspect")
    assert result["model"] == "Yours: nut" and result["category"] == "nut"
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(tmp_path)
    assert RADPipeline.from_pretrained(tmp_path / "nut").normality.config.categories == ["nut"]

    folder = visitors.folder(token)
    assert folder.is_dir()
    mine.close()
    assert wait_for(lambda: not folder.exists()), "its files are still there"
    with pytest.raises(AppError, match="was deleted with its session"):
        client.predict(handle_file(part), token, api_name="/inspect")


def test_sixteen_bit_pictures_reach_our_decoder(client, page_model, tmp_path):
    pixels = np.random.default_rng(2).integers(90, 160, (64, 64), dtype=np.uint8)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    Image.fromarray(pixels).save(tmp_path / "flat.png")
    deep, flat = (
        client.predict(image=handle_file(tmp_path / name), api_name="/inspect")[0] for name in ("deep.tif", "flat.png")
    )
    assert deep["scores"] == flat["scores"]


def test_errors_are_one_sentence(client, part, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    bad, good = handle_file(tmp_path / "notes.png"), handle_file(part)
    for words, endpoint, arguments in (
        (r"notes\.png is not an image, or not one of the formats", "/inspect", {"image": bad}),
        ("Give a picture", "/inspect", {"image": None}),
        ("must lie between 0 and 1", "/inspect", {"image": good, "false_alarm_rate": 0}),
        ("There is no model '/etc'", "/inspect", {"image": good, "model": "/etc"}),
        ("There is no category 'nut'", "/inspect", {"image": good, "category": "nut"}),
        ("There is no model 'x'", "/describe_model", {"model": "x"}),
        ("at least 10 good pictures, got 1", "/fit_product", {"archive": good}),
        ("must lie between 0 and 1, got None", "/inspect_batch", {"archive": good, "false_alarm_rate": None}),
        ("The model must be a name, got None", "/describe_model", {"model": None}),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(**arguments, api_name=endpoint)


def test_files_of_the_server_are_not_served(served):
    payload = {"data": [{"path": str(ROOT / "LICENSE"), "meta": {"_type": "gradio.FileData"}}, "synthetic", "", 0.01]}
    request = urllib.request.Request(
        f"{served.local_url}gradio_api/call/inspect",
        json.dumps(payload).encode(),
        {"Content-Type": "application/json"},
    )
    event = json.load(urllib.request.urlopen(request))["event_id"]
    answer = urllib.request.urlopen(f"{served.local_url}gradio_api/call/inspect/{event}").read().decode()
    assert answer.startswith("event: error") and "LICENSE is not an image" not in answer
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{served.local_url}gradio_api/file={ROOT / 'LICENSE'}")


# -- the documentation's examples -------------------------------------------------------------------------------------


def example(language: str, served) -> str:
    """The documentation's example of the API in a language, for this server."""
    section = (ROOT / "training/docs/page.md").read_text().split("\n## The API\n")[1]
    code = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]
    return code.replace("http://127.0.0.1:7860/", served.local_url)


def test_python_example(served, part, monkeypatch, capsys):
    monkeypatch.chdir(Path(part).parent)
    exec(example("python", served), {})
    assert re.search(r"(True|False) [\d.e-]+ \[", capsys.readouterr().out)


def test_curl_example(served, part):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    script = "set -euo pipefail\n" + example("bash", served)
    done = subprocess.run(["bash", "-c", script], cwd=Path(part).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "event: complete" in done.stdout and "p_value" in done.stdout


def test_mcp_tools(served, part, good_zip):
    archive = "data:application/zip;base64," + base64.b64encode(Path(good_zip).read_bytes()).decode()
    picture = "data:image/png;base64," + base64.b64encode(Path(part).read_bytes()).decode()

    messages = []

    arguments = {
        "inspect": {"image": picture, "false_alarm_rate": 0.2},
        "explain": {"image": picture},
        "restore": {"image": picture},
        "inspect_batch": {"archive": archive},
        "fit_product": {"archive": archive, "name": "nut"},
        "describe_model": {},
    }

    async def talk():
        url = f"{served.local_url}gradio_api/mcp/"
        async with streamable_http_client(url) as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            answers = {}
            for name, given in arguments.items():
                answers[name] = await session.call_tool(name, given, progress_callback=progressed)
            return tools, answers

    async def progressed(progress: float, total: float | None, message: str | None) -> None:
        messages.append(message)

    tools, answers = asyncio.run(talk())
    assert set(tools) == set(answers) == ENDPOINTS
    texts = {name: " ".join(c.text for c in answer.content if c.type == "text") for name, answer in answers.items()}
    assert not any(answer.isError for answer in answers.values()), texts
    assert "'held_out': 12" in texts["fit_product"] and "'verdict': 'good'" in texts["inspect_batch"]
    for name, tool in tools.items():
        assert not re.search(r",,|, ,|As in", tool.description + str(tool.inputSchema)), name
    properties = tools["inspect"].inputSchema["properties"]
    assert "share of good parts" in properties["false_alarm_rate"]["description"].lower()
    assert "'is_anomalous': True" in texts["inspect"] and messages
    assert any(content.type == "image" for content in answers["inspect"].content)


# -- under load -------------------------------------------------------------------------------------------------------


def test_twenty_visitors_at_once(served, two_category_pipeline, tmp_path):
    """Each gets the result of their own picture, sees a place in the queue, and the page answers meanwhile."""
    pictures, kept_before = [], len(visitors._kept)
    for seed in range(20):
        picture = texture("gravel", 100 + seed)
        picture.paste((255, 255 - 10 * seed, 0), (seed, seed, seed + 20, seed + 20))
        picture.save(tmp_path / f"{seed}.png")
        pictures.append(str(tmp_path / f"{seed}.png"))
    expected = two_category_pipeline(pictures).score
    with ThreadPoolExecutor(20) as threads:
        clients = list(threads.map(lambda _: Client(served.local_url, verbose=False), range(20)))
    ranks, together = set(), threading.Barrier(20)

    def visit(number: int) -> tuple[dict, bool]:
        together.wait()
        job = clients[number].submit(image=handle_file(pictures[number]), api_name="/inspect")
        while not job.done():
            ranks.add(job.status().rank)
            time.sleep(0.01)
        result, _, _, files = job.result()
        return result, all(Path(path).name.startswith(f"{number}_") for path in files)

    with ThreadPoolExecutor(21) as threads:
        jobs = [threads.submit(visit, number) for number in range(20)]
        answers, memory = [], 0
        while not all(job.done() for job in jobs):
            with urllib.request.urlopen(served.local_url, timeout=10) as page:
                answers.append(page.status)
            memory = max(memory, psutil.Process().memory_info().rss)
            time.sleep(0.1)
        results = [job.result() for job in jobs]
    for number, (result, own_files) in enumerate(results):
        assert result["picture"] == f"{number}.png" and own_files
        assert result["score"] == pytest.approx(expected[number], rel=1e-4)
    assert any(rank is not None and rank > 0 for rank in ranks), "nobody was told a place in the queue"
    assert answers and set(answers) == {200}
    assert memory < 4e9
    for each in clients:
        each.close()
    assert wait_for(lambda: len(visitors._kept) <= kept_before), "what visitors left is still there"


def test_a_full_queue_says_so(page_model, part, monkeypatch):
    monkeypatch.setenv("RAD_MAX_QUEUE", "1")
    demo = app.build_demo()
    demo.launch(**app.LAUNCH, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    client = Client(demo.local_url, verbose=False)
    jobs = [client.submit(image=handle_file(part), api_name="/restore") for _ in range(6)]
    words = " ".join(str(job.exception()) for job in jobs if job.exception())
    client.close()
    demo.close()
    assert "queue is full" in words.lower(), words


def test_no_file_stays_when_the_server_is_stopped(part, tmp_path):
    """`python app.py` in a process of its own, with an upload and results on disk."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(tmp_path), "RAD_MODEL": "mtd"}
    environment.pop("GRADIO_TEMP_DIR", None)
    server = subprocess.Popen([sys.executable, ROOT / "app.py"], env=environment, stdout=subprocess.PIPE, text=True)
    assert any("Running on local URL" in line for line in server.stdout)
    client = Client(f"http://127.0.0.1:{port}/", verbose=False)
    client.predict(image=handle_file(part), api_name="/inspect")
    assert [path for path in tmp_path.rglob("*part*") if path.is_file()]
    server.terminate()
    client.close()
    assert server.wait(30) == 0
    server.stdout.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
