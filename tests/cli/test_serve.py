"""What ``serve`` refuses before it serves anything, and what it says when it does."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs tocom-export[serve]")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Nothing is served: what would be is told, and kept here."""
    found: list[tuple] = []

    def serve(site, listener, tell, certificate, key) -> None:
        tell("http://127.0.0.1:1")
        found.append((site, listener.getsockname(), certificate))
        listener.close()
        site.close()

    monkeypatch.setattr("tocom_export.engines.serving.http.server.serve", serve)
    return found


def test_it_says_when_it_is_ready(succeeds: Callable, bundle: Path, started: list):
    options = ("--port", 0, "--threads", 1, "--variant", "8", "--max-batch", 3, "--queue", 9)
    done = succeeds("serve", bundle, f"other={bundle}", *options, "--json")
    assert done.stderr.splitlines()[-1] == "Serving http://127.0.0.1:1"
    assert json.loads(done.stdout) == {"url": "http://127.0.0.1:1", "models": ["bundle", "other"]}
    ((site, (host, port), _),) = started
    assert (host, port > 0, site.token, site.largest_image) == ("127.0.0.1", True, None, 2**25)
    service = site.services["other"]
    assert (service.control.variant, service.slo, service.most, service.line.most) == (
        "r08", None, 3, 9,
    )  # fmt: skip


def test_load_decides_unless_a_variant_is_named(succeeds: Callable, bundle: Path, started: list):
    done = succeeds("serve", bundle, "--port", 0, "--threads", 1, "--slo-ms", 123)
    assert "wanted within 123 ms" in done.stderr
    succeeds("serve", bundle, "--port", 0, "--threads", 1)
    succeeds("serve", bundle, "--port", 0, "--threads", 1, "--policy", "fixed")
    succeeds("serve", bundle, "--port", 0, "--threads", 1, "--policy", "fixed", "--slo-ms", 9)
    steered, default, fixed, counted = (site.services["bundle"] for site, _, _ in started)
    assert steered.slo == 0.123
    assert default.slo > 0
    assert fixed.slo is None
    assert (fixed.control.variant, fixed.control.policy) == ("r04", None)
    assert (counted.slo, counted.control.policy) == (0.009, None)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("nowhere", "nowhere is not a bundle"),
        ("{bundle} {bundle}", "two models are called bundle; write NAME="),
        ("a={bundle} a={bundle}", "two models are called a; write NAME="),
        ("stats={bundle}", "'stats' can't name a model"),
        ("x!={bundle}", "'x!' can't name a model"),
        ("{bundle} --variant r99", "r99"),
        ("{bundle} --variant r08 --policy steering", "--variant is for --policy fixed"),
        ("{bundle} --slo-ms 0", "--slo-ms"),
        ("{bundle} --slo-ms nan", "--slo-ms"),
        ("{bundle} --max-batch 0", "--max-batch"),
        ("{bundle} --queue 0", "--queue"),
        ("{bundle} --max-delay-ms -1", "--max-delay-ms"),
        ("{bundle} --port 70000", "--port"),
        ("{bundle} --port {taken}", "--port {taken} of 127.0.0.1 can't be had"),
        ("{bundle} --host nowhere.invalid", "--host nowhere.invalid: there is no such address"),
        ("{bundle} --admin-token-file nowhere", "--admin-token-file nowhere: can't be read"),
        ("{bundle} --admin-token-file {short}", "16 to 4096 ASCII characters"),
        ("{bundle} --tls-cert {short}", "--tls-cert and --tls-key go together"),
        ("{bundle} --tls-cert {short} --tls-key {short}", "can't be used"),
        ("{bundle} --tls-cert nowhere --tls-key nowhere", "can't be read"),
        ("{bundle} --backend tensorrt", "no plan"),
    ],
)
def test_bad_usage(
    fails: Callable, bundle: Path, tmp_path: Path, taken: int, arguments: str, says: str
):
    short = tmp_path / "short"
    short.write_text("short")
    places = {"bundle": bundle, "short": short, "taken": taken}
    options = () if "--port" in arguments else ("--port", "0")
    fails("serve", *arguments.format(**places).split(), *options, says=(says.format(**places),))


def test_without_its_packages(fails: Callable, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tocom_export.engines.serving.http.opening.find_spec", lambda module: None)
    fails("serve", bundle, says=("starlette is not installed", "tocom-export[serve]"))
