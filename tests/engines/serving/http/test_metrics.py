"""What a scrape and a page read."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tocom_export.engines.serving.http.metrics import Metrics


def scrape(running) -> dict[tuple[str, ...], float]:
    reply = running.ask("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'\nnv_inference_count{model="small",version="r00"} ' in reply.content
    assert b"nv_inference_count_total" not in reply.content
    return {  # the parser adds _total to all counters
        (sample.name.removesuffix("_total"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(reply.content.decode())
        for sample in family.samples
    }


def test_counts_are_those_of_triton(running, images):
    before = scrape(running)
    running.infer(images, "r08")
    running.infer(images[:1], "r08")
    running.infer(images * float("nan"), "r08")
    after = scrape(running)

    def more(name: str, *labels: str) -> float:
        key = (name, "small", *(labels or ("r08",)))
        return after[key] - before[key]

    assert more("nv_inference_request_success") == 2
    assert more("nv_inference_request_failure", "OTHER", "r08") == 1
    assert more("nv_inference_count") == 4
    assert more("nv_inference_exec_count") == 2
    request, queue, infer = (
        more(f"nv_inference_{name}_duration_us") for name in ("request", "queue", "compute_infer")
    )
    assert request == pytest.approx(queue + infer)
    assert min(queue, infer) > 0
    assert more("nv_inference_count", "r16") == 0


def test_counts_of_our_own(running):
    found = scrape(running)
    assert found["tocom_variant_in_force", "small", "r00"] == 1
    assert found["tocom_variant_in_force", "small", "r08"] == 0
    for name in ("switches", "refits", "slo_misses", "queue_length"):
        assert found[f"tocom_{name}", "small"] == 0
    assert ("tocom_accuracy_served", "small") not in found  # the bundle has none


def test_late_answers_and_accuracy_are_counted(serve, fresh, images):
    import dataclasses

    dataclasses.replace(fresh, accuracy={"r00": 80.0, "r08": 70.0, "r16": 60.0}).save_manifest()
    with serve(fresh.path, slo=1e-6) as running:
        for version in ("r00", "r08"):
            running.infer(images, version)
        found = scrape(running)
        assert found["tocom_slo_misses", "small"] == 2
        assert found["tocom_slo_seconds", "small"] == 1e-6
        assert found["tocom_accuracy_served", "small"] == 75


def test_a_model_may_be_called_as_a_counter(running):
    text = Metrics({"nv_a_total": running.service}).write()
    assert b'nv_inference_count{model="nv_a_total",version="r00"}' in text


def test_stats(running, images):
    running.infer(images)
    page = running.ask("GET", "/stats").document
    assert not page["stopping"]
    assert page["since"] <= page["now"]
    (model,) = page["models"]
    assert (model["name"], model["model"], model["variant"]) == ("small", "small", "r00")
    assert model["policy"] == {"name": "fixed", "slo_ms": None, "pinned": None}
    assert [variant["name"] for variant in model["variants"]] == ["r00", "r08", "r16"]
    assert model["variants"][1]["degrees"] == [8] * 4
    assert model["variants"][0]["requests"] >= 1
    assert model["latency_ms"]["p99"] >= model["latency_ms"]["p50"] > 0
    assert model["images_per_s"] > 0
    assert model["changes"][0]["variant"] == "r00"
    assert model["queue"] == {"images": 0, "most": 128}


def failures(running) -> dict[str, float]:
    return {
        reason: sum(
            count
            for key, count in scrape(running).items()
            if key[0] == "nv_inference_request_failure" and key[2] == reason
        )
        for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER")
    }


PICTURE, INFER = "/v2/models/small/classify", "/v2/models/small/infer"


@pytest.mark.parametrize(
    "path, body, status",
    [
        (PICTURE, b"text", 400),
        (PICTURE, b"x" * (2**20 + 1), 413),
        (PICTURE + "?topk=3", b"x", 400),
        (PICTURE.replace("small/", "small/versions/r16/"), b"text", 400),
        (INFER, b'{"inputs":[]}', 400),
        (INFER, b"{", 400),
        ("/v2/models/small/versions/r16/patches", b"text", 400),
    ],
)
def test_each_refusal_is_counted_once(running, path: str, body: bytes, status: int):
    before = failures(running)
    assert running.ask("POST", path, body).status == status
    after = failures(running)
    assert after == {**before, "OTHER": before["OTHER"] + 1}
    (model,) = running.ask("GET", "/stats").document["models"]
    assert model["failures"] == after
    version = next(v for v in model["variants"] if v["name"] == ("r16" if "r16" in path else "r00"))
    assert version["failures"] >= 1


def test_who_finds_no_room_is_rejected(running, images, monkeypatch):
    before = failures(running)
    with monkeypatch.context() as patched:
        patched.setattr(running.service.line, "most", 0)
        assert running.infer(images).status == 503
    assert running.infer(images, headers={"X-Timeout-Ms": "0.0001"}).status == 504
    with monkeypatch.context() as patched:
        patched.setattr(running.site.budget, "most", 0)
        assert running.infer(images).status == 503
    with monkeypatch.context() as patched:
        patched.setattr(running.site, "stopping_since", 1e9)
        patched.setattr(type(running.site), "finished", False)
        assert running.infer(images).status == 503
    assert failures(running) == {**before, "REJECTED": before["REJECTED"] + 4}
    (model,) = running.ask("GET", "/stats").document["models"]
    assert model["turned_away"] == before["REJECTED"] + 4


def test_a_model_that_cant_be_run_is_its_fault(running, images, monkeypatch):
    from tocom_export.engines.serving.loaded import Serving

    before = failures(running)
    with monkeypatch.context() as patched:
        patched.setattr(Serving, "run_all", lambda self, images: 1 / 0)
        assert running.infer(images).status == 500
    assert failures(running) == {**before, "BACKEND": before["BACKEND"] + 1}
