"""Connections that are slow, or that two servers would read otherwise."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

HEAD = b"GET /v2 HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def hasty(running: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """The address of a server that waits for headers for half a second."""
    monkeypatch.setattr("tocom_export.engines.serving.http.connections._SECONDS", 0.5)
    host, port = running.address.split(":")
    return host, int(port)


def drip(data: bytes) -> Iterator[bytes]:
    for byte in data * 100:
        yield bytes([byte])


@pytest.mark.parametrize("parts", [[], [HEAD], drip(b"x")], ids=["nothing", "some", "drops"])
def test_headers_that_dont_come(hasty: tuple[str, int], parts: Any):
    start = time.monotonic()
    with socket.create_connection(hasty, 20) as connection:
        connection.settimeout(0.05)
        parts = iter(parts)
        while time.monotonic() - start < 20:
            try:
                connection.sendall(next(parts, b""))
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    assert 0.4 < time.monotonic() - start < 10


def test_those_of_a_second_request(hasty: tuple[str, int]):
    with closing(socket.create_connection(hasty, 20)) as connection:
        connection.sendall(HEAD + b"\r\n")
        found = b""
        while not found.endswith(b"}"):
            found += connection.recv(65536)
        assert found.startswith(b"HTTP/1.1 200")
        time.sleep(0.8)  # between requests there is more time
        connection.sendall(HEAD)
        start = time.monotonic()
        assert connection.recv(65536) == b""
        assert time.monotonic() - start < 10


def test_a_body_has_more_time(hasty: tuple[str, int]):
    connection = http.client.HTTPConnection(*hasty, timeout=20)
    connection.putrequest("POST", "/v2/models/small/infer")
    connection.putheader("Content-Length", "2")
    connection.endheaders()
    time.sleep(0.8)
    connection.send(b"{}")
    assert connection.getresponse().status == 400
    connection.close()


def test_two_lengths_of_one_body(running: Any):
    host, port = running.address.split(":")
    request = (
        b"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    found = b""
    with closing(socket.create_connection((host, int(port)), 20)) as connection:
        connection.sendall(request)
        while part := connection.recv(65536):
            found += part
    assert found.startswith(b"HTTP/1.1 400")
    assert found.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("wait", [False, True], ids=["before its answer", "after it"])
def test_a_body_that_is_broken(running: Any, wait: bool, caplog: pytest.LogCaptureFixture):
    """Is no fault of ours."""
    host, port = running.address.split(":")
    head = b"POST /v2/models/large/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    broken, found = b"no length\r\n", b""
    with closing(socket.create_connection((host, int(port)), 20)) as connection:
        connection.sendall(head if wait else head + broken)
        if wait:
            while not found.endswith(b"}"):
                found += connection.recv(65536)
            connection.sendall(broken)
        while part := connection.recv(65536):
            found += part
    assert found.startswith(b"HTTP/1.1 404" if wait else b"HTTP/1.1 400")
    assert running.ask("GET", "/v2/health/live").status == 200
    assert not caplog.records
