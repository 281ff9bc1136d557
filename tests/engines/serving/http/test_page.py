"""The page that shows what is served: its parts, what it asks for, and a click path in Chromium."""

from __future__ import annotations

import base64
import io
import re
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.tracing import Tracer

PATCHES = "/v2/models/small/versions/{}/patches"


def picture(size: tuple[int, int] = (90, 60), kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 9, 3), np.uint8))
    stream = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def test_the_page_needs_nothing_from_elsewhere(running: Any):
    page = running.ask("GET", "/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    text = page.content.decode()
    for part in re.findall(r'(?:src|href)="([^"]+)"', text):
        if part.startswith("data:"):
            continue
        found = running.ask("GET", f"/{part}")
        assert found.status == 200, part
        assert found.headers["x-content-type-options"] == "nosniff"
        text += found.content.decode()
    for script in re.findall(r'from "\./([^"]+)"', text):
        assert running.ask("GET", f"/page/{script}").status == 200
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


@pytest.mark.parametrize("name", ["none.js", "..%2Fpages.py", "%2e%2e/pages.py", ""])
def test_no_other_file_is_given(running: Any, name: str):
    assert running.ask("GET", f"/page/{name}").status == 404


def test_patches_are_those_that_merged(running: Any, bundle: Bundle, tmp_path: Path):
    file = tmp_path / "photo.png"
    file.write_bytes(picture())
    image = bundle.preprocess.load(file, bundle.spec.image_size)
    for name in bundle.variants:
        found = running.ask("POST", PATCHES.format(name) + "?top_k=3&seen=1", file.read_bytes())
        assert found.status == 200
        answer = found.document
        trace = Tracer(bundle, name).run(image[None])
        assert answer["map"] == trace.maps[0, -1].tolist()
        assert answer["tokens"] == len(set(answer["map"]))
        assert answer["others"] == 1, "the class token"
        assert answer["grid"] == list(bundle.spec.grid)
        assert answer["model_version"] == answer["parameters"]["variant"] == name
        assert answer["answered_ms"] > 0
        likeliest = np.argsort(-trace.outputs["logits"][0])[:3]
        assert [entry["index"] for entry in answer["classes"]] == likeliest.tolist()
        kind, _, data = answer["seen"].partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as seen:
            assert seen.size == bundle.spec.image_size[::-1]


def test_patches_follow_a_refit(serve: Any, bundle: Bundle, make_checkpoint: Any, tmp_path: Path):
    with serve(bundle.path, policy="fixed") as running:
        before = running.ask("POST", PATCHES.format("r16"), picture()).document
        checkpoint = make_checkpoint(tmp_path, bundle.spec, seed=7)
        running.service.refit(checkpoint=checkpoint, bank="none", scale=0.1)
        after = running.ask("POST", PATCHES.format("r16"), picture()).document
    assert before["map"] != after["map"]


def test_what_can_t_be_shown(running: Any):
    assert "can't be read" in running.ask("POST", PATCHES.format("r08"), b"none").error
    assert running.ask("POST", PATCHES.format("r99"), picture()).status == 404
    assert running.ask("GET", PATCHES.format("r08")).status == 405


def test_stats_tell_of_the_last_seconds(running: Any, images: Any):
    running.infer(images)
    (model,) = running.ask("GET", "/stats").document["models"]
    assert model["lately"]["latency_ms"]["p99"] >= model["lately"]["latency_ms"]["p50"] > 0
    assert model["lately"]["images_per_s"] >= 0.3


def test_stats_tell_of_the_last_minutes(running: Any, images: Any, monkeypatch: pytest.MonkeyPatch):
    running.infer(images)
    now = time.monotonic
    monkeypatch.setattr(
        "tocom_export.engines.serving.http.counts.time",
        SimpleNamespace(monotonic=lambda: now() + 20, time=time.time),
    )
    page = running.ask("GET", "/stats").document
    (model,) = page["models"]
    assert len(model["history"]) >= 4, "those in which nobody asked, too"
    assert any(step["images_per_s"] > 0 and step["p99"] > 0 for step in model["history"])
    assert model["history"][-1]["p50"] is None
    times = [step["at"] for step in model["history"]]
    assert all(b - a == pytest.approx(5, abs=0.01) for a, b in pairwise(times))


@pytest.fixture
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,1200"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def wait_for(find: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


def test_a_person_looks_and_tries_a_picture(
    browser: Any, serve: Any, bundle: Bundle, images: Any, tmp_path: Path
):
    """Opens it, sees load and a switch move the charts, tries a picture, reads its classes."""
    file = tmp_path / "photo.png"
    file.write_bytes(picture())
    css = "css selector"
    with serve(bundle.path, slo=5.0, max_batch=4) as running:
        browser.get(f"http://{running.address}/")
        figures = wait_for(lambda: browser.find_elements(css, "#figures dd"))
        assert figures[0].text == running.service.control.variant
        assert browser.find_elements(css, "#answers article") == []

        def steps() -> str:
            (path,) = browser.find_elements(css, "#variants path.one") or [None]
            return "" if path is None else str(path.get_attribute("d"))

        before = wait_for(steps)
        for _ in range(4):
            assert running.infer(images).status == 200
        running.service.pin("r16")
        wait_for(lambda: "r16 (pinned)" in browser.find_element(css, "#figures").text)
        wait_for(lambda: steps().count("L") > before.count("L"))
        wait_for(lambda: browser.find_element(css, "#latency path.one").get_attribute("d"))

        browser.find_element(css, "#file").send_keys(str(file))
        wait_for(lambda: len(browser.find_elements(css, "article[data-variant]")) == 3)
        for card in browser.find_elements(css, "article[data-variant]"):
            name = card.get_attribute("data-variant")
            answer = running.ask("POST", PATCHES.format(name), file.read_bytes()).document
            assert f"{answer['tokens'] + 1} tokens left, {answer['tokens']} of them" in card.text
            assert answer["classes"][0]["name"] in card.text
            colours = browser.execute_script(
                "const c = arguments[0].querySelector('canvas'), d = c.getContext('2d')"
                ".getImageData(0, 0, c.width, c.height).data, s = new Set();"
                "for (let i = 0; i < d.length; i += 4) s.add(d.slice(i, i + 3).join());"
                "return s.size;",
                card,
            )
            assert 2 <= colours <= answer["tokens"] + 1
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= browser.execute_script("return innerWidth"), "readable on a phone"

        (legend,) = (c for c in browser.find_elements(css, "figcaption") if "Latency" in c.text)
        assert legend.text == "Latency: median, 99 %, wanted"
        figures = browser.find_element(css, "#figures").text
        assert "turned away\n0" in figures
        lefts = {box.rect["x"] for box in browser.find_elements(css, "#figures div")}
        assert len(lefts) == 2, "two in a row on a phone"
        lefts = {box.rect["x"] for box in browser.find_elements(css, "article")}
        assert len(lefts) >= 2

        browser.find_element(css, "#file").send_keys(__file__)
        wait_for(lambda: "can't be read" in browser.find_element(css, "#complaint").text)
        said = [entry for entry in browser.get_log("browser") if "400" not in entry["message"]]
        assert said == []
        browser.get(f"http://{running.address}/")  # what it shows began before it was opened
        wait_for(lambda: browser.find_elements(css, "#latency path.one"))
        ticks = [t.text for t in browser.find_elements(css, "#throughput text")]
        assert 2 <= len(ticks) <= 6
        assert all(re.fullmatch(r"\d*[125]0*|0|0?\.0*\d+|\d+(\.\d)?", tick) for tick in ticks)
    wait_for(lambda: browser.find_element(css, "body").get_attribute("class") == "lost")
    assert float(browser.find_element(css, "main").value_of_css_property("opacity")) < 1
