"""Servers that run in the test's process, on a free port, and what talks to them."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs tocom-export[serve]")
pytest.importorskip("geventhttpclient", reason="needs tritonclient[http]")
import tritonclient.http as triton

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.serving.http.serve_options import ServeOptions
from tocom_export.engines.serving.http.server import bind, make_server
from tocom_export.engines.serving.http.service import Service
from tocom_export.engines.serving.http.site import Site
from tocom_export.engines.serving.loaded import Serving

MODEL = "small"


@dataclass
class Reply:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    """By their names in small letters."""
    content: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> str:
        return str(self.document["error"])


@dataclass
class Running:
    """A server that runs."""

    address: str
    site: Site

    @property
    def service(self) -> Service:
        return self.site.services[MODEL]

    def client(self, **options: Any) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(self.address, **options)

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Reply:
        """A request on a connection of its own."""
        connection = http.client.HTTPConnection(self.address, timeout=20)
        try:
            connection.request(method, path, body, headers or {})
            found = connection.getresponse()
            headers = {name.lower(): value for name, value in found.getheaders()}
            return Reply(found.status, headers, found.read())
        finally:
            connection.close()

    def infer(
        self, images: Any, version: str = "", headers: dict[str, str] | None = None, **more: Any
    ) -> Reply:
        """Images in binary."""
        place = f"/versions/{version}" if version else ""
        body, length = triton.InferenceServerClient.generate_request_body(
            [make_input(images)], **more
        )
        headers = {"Inference-Header-Content-Length": str(length), **(headers or {})}
        return self.ask("POST", f"/v2/models/{MODEL}{place}/infer", body, headers)


def make_input(images: Any, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return tensor


@contextmanager
def _serve(
    path: Path, token: str | None = None, largest_image: int = 2**20, **options: Any
) -> Iterator[Running]:
    threads = options.pop("threads", 1)
    service = Service.open(MODEL, path, ServeOptions(**options), backend="onnx", threads=threads)
    site = Site({MODEL: service}, token, largest_image)
    listener = bind("127.0.0.1", 0)
    told: list[str] = []
    ready = threading.Event()

    def tell(address: str) -> None:
        told.append(address)
        ready.set()

    server = make_server(site, listener, tell)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert ready.wait(20)
        yield Running(told[0].removeprefix("http://"), site)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        site.close()
        assert not thread.is_alive()


Serve = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def serve() -> Serve:
    """A bundle served as a model called ``small``."""
    return _serve


@pytest.fixture(scope="session", autouse=True)
def hurried() -> Iterator[None]:
    """Variants are timed by ten runs each before they are served."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tocom_export.engines.serving.http.lineup._TIMING", 0.0)
        yield


@pytest.fixture(scope="module")
def running(bundle: Bundle) -> Iterator[Running]:
    """r00, r08 and r16 of a small model, of which the first is in force."""
    with _serve(bundle.path, policy="fixed") as found:
        yield found


@pytest.fixture
def client(running: Running) -> Iterator[triton.InferenceServerClient]:
    with running.client(concurrency=4) as found:
        yield found


@pytest.fixture(scope="session")
def as_input() -> Callable[..., triton.InferInput]:
    """Images as a client's input."""
    return make_input


@pytest.fixture(scope="module")
def images(bundle: Bundle, make_images: Callable[..., Any]) -> Any:
    return make_images(bundle.spec, 3)


@pytest.fixture(scope="module")
def logits(bundle: Bundle, images: Any) -> dict[str, Any]:
    """Variant → what its engine says of the images."""
    engines = {name: bundle.engine(name, threads=1) for name in bundle.variants}
    return {name: engine.run(images) for name, engine in engines.items()}


class Gate:
    """Runs of a model wait until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.ran: list[tuple[str, int]] = []
        """Variant and images of each run."""


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate()
    run = Serving.run_all

    def wait(self: Serving, images: Any) -> Any:
        found.entered.release()
        assert found.open.wait(20)
        found.ran.append((self.variant.name, len(images)))
        return run(self, images)

    monkeypatch.setattr(Serving, "run_all", wait)
    yield found
    found.open.set()


@pytest.fixture
def in_background() -> Iterator[Callable[[Callable[[], Any]], Callable[[], Any]]]:
    """Starts a call in a thread; what is returned waits for its result."""
    threads: list[threading.Thread] = []

    def start(call: Callable[[], Any]) -> Callable[[], Any]:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(call()))
        thread.start()
        threads.append(thread)

        def wait() -> Any:
            thread.join(20)
            return found[0]

        return wait

    yield start
    for thread in threads:
        thread.join(20)


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], bool]:
    """Whether logits are the same but for what another batch rounds otherwise."""
    return lambda found, wanted: np.allclose(found, wanted, rtol=1e-4, atol=1e-4)
