"""The load generator against a tiny server that answers as it is told."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.manifest import MANIFEST
from tocom_export.bundle.writing import write_bundle

pytest.importorskip("aiohttp", reason="what benchmarks/load.py sends with")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def load() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("load")
    finally:
        sys.path.remove(str(BENCHMARKS))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, document: Any, tail: bytes = b"") -> None:
        head = json.dumps(document).encode()
        self.send_response(status)
        if tail:
            self.send_header(LENGTH, str(len(head)))
        self.send_header("Content-Length", str(len(head + tail)))
        self.end_headers()
        self.wfile.write(head + tail)

    def do_GET(self) -> None:
        told = self.server.told
        if self.path != "/v2/models/small":
            self.reply(404, {"error": "no such model"})
        else:
            shape = told.shape
            self.reply(200, {"inputs": [{"name": "images", "datatype": "FP32", "shape": shape}]})

    def do_POST(self) -> None:
        told = self.server.told
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v2/repository/index":
            self.reply(200, [{"name": "small"}, {"name": "small"}, {"name": "large"}])
            return
        size = int(self.headers[LENGTH])
        (tensor,) = json.loads(body[:size])["inputs"]
        image = np.frombuffer(body[size:], np.float32).reshape(tensor["shape"])
        assert tensor["parameters"]["binary_data_size"] == image.nbytes
        with told.lock:
            number = len(told.came)
            told.came.append((time.perf_counter(), self.path, image))
        status, delay, document = told.answer(number)
        time.sleep(delay)
        self.reply(status, document, b"\0" * 40)


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """``answer`` says what request number so much gets: status, seconds, JSON."""
    told = SimpleNamespace(
        came=[], lock=threading.Lock(), shape=[-1, 3, 4, 4],
        answer=lambda _: (200, 0.0, {"model_name": "small", "parameters": {"variant": "r00"}}),
    )  # fmt: skip
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads, made.told = True, told  # type: ignore[attr-defined]
    told.url = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield told
    made.shutdown()
    thread.join()
    made.server_close()


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(load: Any, server: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> Run:
    def go(*options: object, exits: int = 0) -> dict[str, Any]:
        line = [server.url, "--model", "small", "--json", *map(str, options)]
        assert load.main(line) == exits
        return json.loads(capsys.readouterr().out)

    return go


def write(file: Path, *times: float) -> Path:
    file.write_text("".join(f"{t}\n" for t in times))
    return file


def test_a_late_answer_does_not_delay_the_next_request(
    run: Run, server: SimpleNamespace, tmp_path: Path
):
    answers = [("r00", 1.0), ("r08", 0.0), ("r08", 0.0), ("r16", 0.0)]

    def answer(number: int) -> tuple[int, float, Any]:
        variant, delay = answers[number]
        return 200, delay, {"parameters": {"variant": variant}}

    server.answer = answer
    trace = write(tmp_path / "a.txt", 5, 5.1, 5.2, 5.3)
    found = run("--trace", trace, "--slo-ms", 700)
    assert (found["sent"], found["answered"], found["failures"]) == (4, 4, {})
    assert found["met"] == 75
    assert found["shares"] == {"r08": 50, "r00": 25, "r16": 25}
    assert found["switches"] == 2
    assert found["p99_ms"] > 900 > 700 > found["p50_ms"]
    assert found["accuracy"] is None
    came = [t for t, _, _ in server.came]
    np.testing.assert_allclose(np.diff(came), 0.1, atol=0.09)
    assert {path for _, path, _ in server.came} == {"/v2/models/small/infer"}


def test_images_differ_and_are_of_the_model_s_shape(run: Run, server: SimpleNamespace):
    run("--rate", 200, "--duration", 0.1, "--slo-ms", 1000)
    images = [image for _, _, image in server.came]
    assert {image.shape for image in images} == {(1, 3, 4, 4)}
    assert len({image.tobytes() for image in images}) == min(8, len(images)) > 1


def test_failures_are_not_in_time(run: Run, server: SimpleNamespace, tmp_path: Path):
    def answer(number: int) -> tuple[int, float, Any]:
        return [(200, 0.0, {"model_name": "small_r08"}), (503, 0.0, {"error": "full"}),
                (200, 3.0, {}), (200, 0.0, {"model_name": "small_r16"})][number]  # fmt: skip

    server.answer = answer
    trace = write(tmp_path / "a.txt", 0, 0.1, 0.2, 0.3)
    found = run("--trace", trace, "--slo-ms", 800, "--timeout", 1)
    assert (found["sent"], found["answered"], found["met"]) == (4, 2, 50)
    assert found["failures"] == {"status 503": 1, "TimeoutError": 1}
    assert found["shares"] == {"r08": 50, "r16": 50}  # Triton's models are a variant each


def test_nothing_is_answered(load, server: SimpleNamespace, tmp_path: Path, capsys):
    server.answer = lambda _: (500, 0.0, {})
    trace = str(write(tmp_path / "a.txt", 0, 0))
    line = [server.url, "--model", "small", "--trace", trace, "--slo-ms", "9"]
    assert load.main(line) == 1
    assert "2 requests, " in (out := capsys.readouterr().out)
    assert "failed: 2 of status 500" in out


def test_recorded_arrivals_can_be_sent_again(run: Run, tmp_path: Path):
    file = tmp_path / "recorded.txt"
    first = run("--rate", 100, "--duration", 0.3, "--slo-ms", 1000, "--record", file)
    times = np.array(file.read_text().split(), float)
    assert len(times) == first["sent"]
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    again = run("--trace", file, "--slo-ms", 1000)
    assert again["sent"] == first["sent"]


def test_accuracy_by_the_bundle(run: Run, server: SimpleNamespace, make_blueprint, tmp_path: Path):
    folder = write_bundle(make_blueprint(tmp_path, targets=(0, 8)), tmp_path / "bundle").path
    edited = json.loads((folder / MANIFEST).read_text()) | {"accuracy": {"r00": 80, "r08": 70}}
    (folder / MANIFEST).write_text(json.dumps(edited))
    server.answer = lambda n: (200, 0.0, {"parameters": {"variant": ("r00", "r08")[n % 2]}})
    trace = write(tmp_path / "a.txt", 0, 0.01, 0.02, 0.03)
    found = run("--trace", trace, "--slo-ms", 1000, "--bundle", folder)
    assert found["accuracy"] == 75


def draw(load: Any, *options: object) -> Any:
    line = ["http://x", "--model", "m", "--slo-ms", "1", *map(str, options)]
    return load.draw(load.parse(line))


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        (["--shape", "poisson"], [500] * 5),
        (["--shape", "burst"], [250, 750, 250, 750, 250]),
        (["--shape", "ramp"], [175, 325, 475, 625, 775]),
        (["--shape", "gamma", "--cv", "0.5"], [500] * 5),
        (["--shape", "diurnal"], [117, 405, 583, 405, 117]),
    ],
    ids=lambda x: str(x[1]),
)
def test_shapes(load, options: list[str], rates: list[int]):
    arrivals = draw(load, "--rate", 500, "--duration", 20, *options)
    counts, _ = np.histogram(arrivals, 5, (0, 20))
    np.testing.assert_allclose(counts / 4, rates, rtol=0.12)


def test_a_trace_may_be_stretched(load, tmp_path: Path):
    trace = write(tmp_path / "a.txt", 1, 2, 3, 5)
    assert draw(load, "--trace", trace).tolist() == [0, 1, 2, 4]
    assert draw(load, "--trace", trace, "--rate", 2).tolist() == [0, 0.5, 1, 2]


def test_a_table_for_the_eye(load, server: SimpleNamespace, tmp_path: Path, capsys):
    trace = str(write(tmp_path / "a.txt", 0, 0.1))
    assert load.main([server.url, "--model", "small", "--trace", trace, "--slo-ms", "900"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 requests, 20.0 a second; failed: none"
    assert lines[1] == "within 900 ms: 100.00 %"
    assert lines[3] == "by: r00 100.0 %; 0 changes"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--rate or --trace says when"),
        (["--rate", "0"], "--rate is a positive number"),
        (["--rate", "5", "--slo-ms", "-1"], "--slo-ms is a positive number"),
        (["--rate", "nan"], "--rate is a positive number"),
        (["--rate", "5", "--shape", "square"], "invalid choice"),
    ],
    ids=str,
)
def test_options_that_can_t_be(load, options: list[str], says: str, capsys):
    with pytest.raises(SystemExit):
        load.main(["http://127.0.0.1:9", "--model", "m", "--slo-ms", "1", *options])
    assert says in capsys.readouterr().err


def test_nothing_is_due(load):
    with pytest.raises(SystemExit, match="no request is due"):
        load.main(["http://127.0.0.1:9", "--model", "m", "--slo-ms", "1", "--rate", "1e-9"])


def test_a_server_that_is_not_there(load, server: SimpleNamespace):
    with pytest.raises(SystemExit, match=r"models/small: no metadata"):
        load.main(["http://127.0.0.1:9", "--model", "small", "--slo-ms", "1", "--rate", "1"])
    with pytest.raises(SystemExit, match=r"models/other: no such model"):
        load.main([server.url, "--model", "other", "--slo-ms", "1", "--rate", "1"])
    server.shape = [-1, 3, -1, -1]
    with pytest.raises(SystemExit, match="FP32 of a known shape is expected"):
        load.main([server.url, "--model", "small", "--slo-ms", "1", "--rate", "1"])


def test_a_model_that_isnt_there(load: Any, server: SimpleNamespace):
    with pytest.raises(SystemExit) as caught:
        load.main([server.url, "--model", "medium", "--rate", "5", "--slo-ms", "100"])
    assert str(caught.value).endswith("medium: no such model; there are small, large.")


def test_nobody_reads_what_it_prints(server: SimpleNamespace):
    line = [server.url, "--model", "small", "--rate", "50", "--slo-ms", "100", "--duration", "0.2"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "load.py"), *line], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
