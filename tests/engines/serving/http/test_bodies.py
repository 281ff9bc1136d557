"""Bodies and what they unpack to, within their limits."""

from __future__ import annotations

import gzip
import http.client
import zlib

import pytest

from tocom_export.engines.serving.http.bodies import Budget, unpack
from tocom_export.engines.serving.http.refusals import Refusal

PLACE = "/v2/models/small/infer"


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_unpacking(pack):
    assert unpack(pack(b"x" * 1000), 1000) == b"x" * 1000
    with pytest.raises(Refusal) as caught:
        unpack(pack(b"x" * 1001), 1000)
    assert caught.value.status == 413
    for wrong in (pack(b"x")[:-2], pack(b"x") + b"y", b"plain", b""):
        with pytest.raises(Refusal) as caught:
            unpack(wrong, 1000)
        assert caught.value.status == 400


def test_budget():
    budget = Budget(10)
    budget.hold(6)
    with pytest.raises(Refusal) as caught:
        budget.hold(5)
    assert caught.value.status == 503
    budget.release(6)
    budget.hold(10)


def test_a_bomb(running):
    bomb = gzip.compress(b"0" * 50_000_000)
    reply = running.ask("POST", PLACE, bomb, {"Content-Encoding": "gzip"})
    assert (reply.status, running.site.budget.held) == (413, 0)


@pytest.mark.parametrize("coding, status", [("gzip", 400), ("deflate", 400), ("br", 415)])
def test_codings(running, coding: str, status: int):
    reply = running.ask("POST", PLACE, b"{}", {"Content-Encoding": coding})
    assert reply.status == status
    assert running.ask("POST", PLACE, b"{}", {"Content-Encoding": "identity"}).status == 400


def test_too_large_is_refused_unread(running):
    connection = http.client.HTTPConnection(running.address, timeout=20)
    connection.putrequest("POST", PLACE)
    connection.putheader("Content-Length", "1000000000000")
    connection.endheaders()
    found = connection.getresponse()  # though nothing was sent
    assert found.status == 413
    connection.close()


def test_chunks_are_counted(running):
    largest = running.service.form.largest
    connection = http.client.HTTPConnection(running.address, timeout=20)
    chunks = [b" " * 50_000] * (largest // 50_000 + 2)
    connection.request("POST", PLACE, iter(chunks), encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})  # fmt: skip
    assert connection.getresponse().status == 413
    connection.close()
    assert running.site.budget.held == 0


def test_no_room_for_bodies(running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running.site.budget, "most", 100)
    reply = running.ask("POST", PLACE, b" " * 101)
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    monkeypatch.undo()
    assert running.ask("POST", PLACE, b" " * 101).status == 400
