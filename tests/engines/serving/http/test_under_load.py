"""What becomes of requests when more come than can be served at once."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tocom_export.engines.serving.http.serve_options import ServeOptions
from tocom_export.errors import InputError


def wait_for(what) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.005)


def failures(running) -> int:
    return sum(sums.failure for sums in running.service.counts.read().sums.values())


@pytest.fixture
def busy(serve, bundle, gate, images, in_background):
    """A server of which the one run under way waits for the gate; two images may wait."""
    with serve(bundle.path, policy="fixed", queue=2) as running:
        first = in_background(lambda: running.infer(images[:1]))
        assert gate.entered.acquire(timeout=20)
        yield running
        gate.open.set()
        assert first().status == 200


def test_a_full_line_is_told(busy, gate, images, in_background):
    waiting = [in_background(lambda: busy.infer(images[:1])) for _ in range(2)]
    wait_for(lambda: len(busy.service.line) == 2)
    start = time.monotonic()
    reply = busy.infer(images[:1])
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert "too many requests wait" in reply.error
    assert time.monotonic() - start < 5
    assert busy.ask("GET", "/v2/health/ready").status == 200
    assert busy.ask("POST", "/v2/models/small/classify", b"x").status == 503
    gate.open.set()
    assert [wait().status for wait in waiting] == [200, 200]
    assert failures(busy) == 2
    assert gate.ran == [("r00", 1), ("r00", 2)]  # those that waited ran together


def test_one_that_doesnt_fit_is_told(busy, gate, images, in_background):
    waiting = in_background(lambda: busy.infer(images[:1]))
    wait_for(lambda: len(busy.service.line) == 1)
    assert busy.infer(images[:2]).status == 503
    gate.open.set()
    assert waiting().status == 200


@pytest.mark.parametrize(
    "more", [{"timeout": 50_000}, {"headers": {"X-Timeout-Ms": "50"}}], ids=["parameter", "header"]
)
def test_who_waited_for_too_long_is_told_and_not_run(busy, gate, images, more):
    reply = busy.infer(images[:1], **more)
    assert reply.status == 504
    assert "timeout" in reply.error
    assert len(busy.service.line) == 0
    assert busy.infer(images[:1], headers={"X-Timeout-Ms": "soon"}).status == 400
    gate.open.set()
    wait_for(lambda: gate.ran)
    assert gate.ran == [("r00", 1)]


def test_who_hangs_up_is_not_run(busy, gate, images):
    host, port = busy.address.split(":")
    body = images[:1].tobytes()
    text = (
        b'{"inputs":[{"name":"images","shape":[1,3,56,56],"datatype":"FP32",'
        b'"parameters":{"binary_data_size":%d}}]}' % len(body)
    )
    lines = (
        f"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\n"
        f"Content-Length: {len(text) + len(body)}\r\n"
        f"Inference-Header-Content-Length: {len(text)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(lines.encode() + text + body)
        wait_for(lambda: len(busy.service.line) == 1)
    wait_for(lambda: len(busy.service.line) == 0)
    wait_for(lambda: busy.site.working == 1)
    gate.open.set()
    wait_for(lambda: gate.ran)
    assert gate.ran == [("r00", 1)]
    assert failures(busy) == 1
    assert busy.service.counts.read().failures["CANCELED"] == 1


def test_a_broken_request_doesnt_harm_those_in_its_batch(
    busy, gate, images, logits, in_background, same
):
    broken = np.full_like(images[:1], 3e38)
    right = in_background(lambda: busy.infer(images[:1]))
    wrong = in_background(lambda: busy.infer(broken))
    wait_for(lambda: len(busy.service.line) == 2)
    gate.open.set()
    assert right().status == 200
    assert wrong().status == 400
    assert "normalised" in wrong().error


def test_versions_dont_mix(busy, gate, images, in_background):
    waiting = [
        in_background(lambda: busy.infer(images[:1], "r16")),
        in_background(lambda: busy.infer(images[:1], "r08")),
    ]
    wait_for(lambda: len(busy.service.line) == 2)
    gate.open.set()
    assert {wait().status for wait in waiting} == {200}
    assert sorted(gate.ran) == [("r00", 1), ("r08", 1), ("r16", 1)]


def test_a_run_that_fails_is_not_the_end(serve, bundle, images, monkeypatch, caplog):
    from tocom_export.engines.serving.loaded import Serving

    with serve(bundle.path, policy="fixed") as running:
        with monkeypatch.context() as patched:
            patched.setattr(Serving, "run_all", lambda self, images: 1 / 0)
            reply = running.infer(images)
            assert (reply.status, reply.error) == (500, "the model could not be run.")
            assert "ZeroDivisionError" in caplog.text
        assert running.infer(images).status == 200


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch):
    """Decoding waits until it is set."""
    from tocom_export.engines.serving.http import images as module

    found, read = threading.Event(), module.read_pictures

    def wait(*arguments):
        assert found.wait(20)
        return read(*arguments)

    monkeypatch.setattr(module, "read_pictures", wait)
    yield found
    found.set()


PICTURE = b"P5 60 60 255\n" + bytes(3600)


def test_who_waits_to_be_decoded_is_counted(serve, bundle, decoding, in_background):
    def classify():
        return running.ask("POST", "/v2/models/small/classify", PICTURE)

    with serve(bundle.path, policy="fixed", queue=2) as running:
        running.site.workers = 1
        waiting = [in_background(classify) for _ in range(3)]  # one of them is decoded
        wait_for(lambda: running.service.preparing == 3)
        reply = classify()
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        decoding.set()
        assert {wait().status for wait in waiting} <= {200, 503}
        assert running.service.preparing == 0
        assert classify().status == 200


def test_who_is_late_is_not_decoded(serve, bundle, decoding, in_background):
    with serve(bundle.path, policy="fixed") as running:
        running.site.executor = ThreadPoolExecutor(1)
        asked = [
            in_background(
                lambda more=more: running.ask("POST", "/v2/models/small/classify", PICTURE, more)
            )
            for more in ({}, {"X-Timeout-Ms": "50"})
        ]
        wait_for(lambda: running.service.preparing == 2)
        time.sleep(0.1)
        decoding.set()
        assert asked[1]().status in (200, 504)
        assert sorted(wait().status for wait in asked) == [200, 504]
        assert failures(running) == 1


@pytest.mark.parametrize("policy", ["steering", "slackfit"])
def test_load_lowers_the_degree_and_raises_it_again(
    serve, bundle, images, monkeypatch, in_background, policy
):
    from tocom_export.engines.serving.loaded import Serving

    seconds = {"r00": 0.05, "r08": 0.02, "r16": 0.005}
    run = Serving.run_all

    def pretend(self, images):
        time.sleep(seconds[self.variant.name] * len(images))
        return run(self, images)

    monkeypatch.setattr(Serving, "run_all", pretend)
    with serve(bundle.path, policy=policy, slo=0.2, max_batch=1) as running:
        assert running.infer(images[:1]).status == 200
        assert running.service.control.variant == "r00"
        asked = [in_background(lambda: running.infer(images[:1])) for _ in range(40)]
        assert {wait().status for wait in asked} == {200}
        lowered = [name for _, name in running.service.counts.read().changes]
        assert lowered[0] == "r00"
        assert "r16" in lowered
        wait_for(lambda: running.service.control.variant == "r00")  # though nobody asks


@pytest.mark.parametrize(
    "options, says",
    [
        ({"policy": "steering", "variant": "r08"}, "`variant` is for `policy` fixed"),
        ({"policy": "slackfit", "variant": "r08"}, "`variant` is for `policy` fixed"),
        ({"slo": 0.0}, "`slo_ms` 0: a latency"),
        ({"slo": float("inf")}, "`slo_ms` inf: a latency"),
    ],
    ids=str,
)
def test_options_that_dont_go_together(options, says):
    with pytest.raises(InputError, match=says):
        ServeOptions(**options)


def test_the_end_comes_though_more_wait_than_can_be_run(
    serve, bundle, gate, images, in_background, monkeypatch
):
    monkeypatch.setattr("tocom_export.engines.serving.http.site._PATIENCE", 1.0)
    with serve(bundle.path, policy="fixed", queue=8) as running:
        first = in_background(lambda: running.infer(images[:1]))
        assert gate.entered.acquire(timeout=20)
        waiting = [in_background(lambda: running.infer(images[:1])) for _ in range(8)]
        wait_for(lambda: len(running.service.line) == 8)
        began = time.monotonic()
        running.site.stop()
        assert {wait().status for wait in waiting} == {503}
        assert time.monotonic() - began < 4
        gate.open.set()
        assert first().status == 200
    assert running.service.counts.read().failures["REJECTED"] == 8


def test_what_answers_runs_before_what_computes():
    import os
    import sys
    import threading

    from tocom_export.engines.serving.http.yielding import run_below

    if sys.platform != "linux":
        pytest.skip("threads have a priority on Linux")

    def read() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found: list[int] = []

    def start_another() -> int:
        thread = threading.Thread(target=lambda: found.append(read()))
        thread.start()
        thread.join()
        return read()

    before = read()
    assert run_below(start_another) == found[0] > before
    assert read() == before
    with pytest.raises(ZeroDivisionError):
        run_below(lambda: 1 // 0)


def test_models_give_way(busy):
    import os
    import sys

    if sys.platform == "linux":
        number = busy.service._thread.native_id
        assert os.getpriority(os.PRIO_PROCESS, number) > os.getpriority(os.PRIO_PROCESS, 0)
