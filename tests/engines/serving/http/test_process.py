"""A server as it is started: its line when it is ready, TLS, and its end."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from tocom_export.bundle.opening import Bundle

HEAD = b"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


def notice() -> None:
    """Ctrl-C is not ignored, whatever these tests were started with."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore() -> None:
    """Ctrl-C is ignored, as a shell's script has it in what it runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def start(
    *arguments: object, prepare: Callable[[], None] = notice
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    line = [sys.executable, "-m", "tocom_export.cli.main", "serve", "--threads", "1"]
    process = subprocess.Popen(
        [*line, "--port", "0", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=prepare if os.name == "posix" else None,
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        assert said.startswith("Serving http"), said
        yield process, said.split()[1]
    finally:
        process.kill()
        process.wait(20)
        process.stdout.close()
        process.stderr.close()


def connect(url: str) -> socket.socket:
    """To a server, before anything is said."""
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 20)


def make_body(images: Any) -> tuple[bytes, dict[str, str]]:
    tensor = triton.InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    body, length = triton.InferenceServerClient.generate_request_body([tensor])
    return body, {"Inference-Header-Content-Length": str(length)}


@POSIX
def test_at_a_signal_nobody_is_left_without_an_answer(
    bundle: Bundle, make_images: Callable[..., Any]
):
    images = make_images(bundle.spec, 8)
    body, headers = make_body(images)
    with start(f"small={bundle.path}", "--policy", "fixed", "--queue", "2000") as (process, url):
        address = url.removeprefix("http://")
        statuses: list[int] = []
        refused: list[str] = []
        sent = threading.Semaphore(0)

        def ask() -> None:
            with closing(http.client.HTTPConnection(address, timeout=20)) as connection:
                ask_again(connection)

        def ask_again(connection: http.client.HTTPConnection) -> None:
            for _ in range(50):
                try:
                    connection.request("POST", "/v2/models/small/infer", body, headers)
                    sent.release()
                    reply = connection.getresponse()
                    reply.read()
                except OSError as error:  # of who comes when all is over
                    refused.append(repr(error))
                    return
                statuses.append(reply.status)
                if reply.status == 503:
                    refused.append(str(reply.getheader("connection")))
                    return

        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for _ in range(60):
            assert sent.acquire(timeout=20)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        assert process.wait(20) == 130
        assert "Stopped." in process.stderr.read()
    assert statuses.count(200) >= 36
    assert set(statuses) <= {200, 503}
    assert len(refused) == 24
    assert "close" in refused
    assert not [told for told in refused if "RemoteDisconnected" in told]


@POSIX
def test_a_second_signal_ends_it_at_once(bundle: Bundle, make_images: Callable[..., Any]):
    body, headers = make_body(np.repeat(make_images(bundle.spec, 8), 4, axis=0))
    options = ("--policy", "fixed", "--queue", "5000", "--max-batch", 32)
    with start(f"small={bundle.path}", *options) as (process, url):
        address = url.removeprefix("http://")
        connections = [http.client.HTTPConnection(address, timeout=20) for _ in range(40)]
        for connection in connections:
            connection.request("POST", "/v2/models/small/infer", body, headers)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        try:
            # By the system, where it was about to end when the second came.
            assert process.wait(30) in (130, -signal.SIGINT)
        finally:
            for connection in connections:
                connection.close()


@POSIX
def test_a_second_signal_doesnt_wait_for_a_body(bundle: Bundle):
    with start(f"small={bundle.path}", "--policy", "fixed") as (process, url):
        with closing(connect(url)) as connection:
            connection.sendall(HEAD)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            began, found = time.monotonic(), b""
            while part := connection.recv(65536):
                found += part
            assert time.monotonic() - began < 4
            assert found.startswith(b"HTTP/1.1 503")
        assert process.wait(20) == 130
        assert process.stderr.read().splitlines()[1:] == ["", "Stopped."]


@POSIX
def test_half_a_body_is_not_waited_for(bundle: Bundle):
    with start(f"small={bundle.path}", "--policy", "fixed") as (process, url):
        with closing(connect(url)) as connection:
            connection.sendall(HEAD + b"half")
            time.sleep(0.5)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            found = b""
            while part := connection.recv(65536):
                found += part
            assert found.startswith(b"HTTP/1.1 503")
            assert b"the server is stopping" in found
        assert process.wait(20) == 130
        assert 2 < time.monotonic() - began < 10


@POSIX
def test_what_was_ignored_from_the_start_stays_so(bundle: Bundle):
    """Else it would end at Ctrl-C, and with status 0."""
    with start(f"small={bundle.path}", "--policy", "fixed", prepare=ignore) as (process, url):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        with closing(
            http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
        ) as connection:
            connection.request("GET", "/v2/health/ready")
            assert connection.getresponse().status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(bundle: Bundle, tmp_path: Path, make_images: Callable[..., Any]):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-out", certificate, "-keyout", key]
    subprocess.run([*line.split(), *names, *files], check=True, capture_output=True)
    options = ("--tls-cert", certificate, "--tls-key", key, "--policy", "fixed")
    with start(f"small={bundle.path}", *options) as (_, url):
        assert url.startswith("https://")
        address = url.removeprefix("https://")
        import gevent.ssl

        def trust() -> ssl.SSLContext:
            context: ssl.SSLContext = gevent.ssl.create_default_context(cafile=str(certificate))
            return context

        with triton.InferenceServerClient(address, ssl=True, ssl_context_factory=trust) as client:
            tensor = triton.InferInput("images", [1, 3, 56, 56], "FP32")
            tensor.set_data_from_numpy(make_images(bundle.spec, 1))
            assert client.infer("small", [tensor]).as_numpy("logits").shape == (1, 10)
        plain = http.client.HTTPConnection(address, timeout=20)
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.request("GET", "/v2")
            plain.getresponse()
        plain.close()
