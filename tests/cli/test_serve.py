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
    assert "Serving" not in done.stderr
    assert json.loads(done.stdout) == {"url": "http://127.0.0.1:1", "models": ["bundle", "other"]}
    ((site, (host, port), _),) = started
    assert (host, port > 0, site.token, site.largest_image) == ("127.0.0.1", True, None, 2**25)
    service = site.services["other"]
    assert (service.control.variant, service.slo, service.most, service.line.most) == (
        "r08", None, 3, 9,
    )  # fmt: skip


def test_its_line_is_a_result_and_the_rest_are_notes(
    succeeds: Callable, bundle: Path, started: list, tmp_path: Path
):
    done = succeeds("serve", bundle, "--port", 0, "--threads", 1, "--slo-ms", 0.1)
    assert done.stdout == "Serving http://127.0.0.1:1\n"
    first, second = done.stderr.splitlines()
    assert first == "bundle: measuring how fast its variants are ..."
    assert second.endswith("wanted within 0.1 ms, which is less than any of them takes.")
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o644)
    options = ("--port", 0, "--threads", 1, "--policy", "fixed", "--host", "0.0.0.0")
    done = succeeds("serve", bundle, *options, "--admin-token-file", token)
    lines = done.stderr.splitlines()
    assert lines[0] == f"--admin-token-file {token}: others of this machine may read it."
    assert lines[1].startswith("--host 0.0.0.0: who reaches it may ask")
    assert lines[2].startswith("bundle: r04, ")
    token.chmod(0o600)
    done = succeeds("serve", bundle, *options[:-2], "--admin-token-file", token, "-q")
    assert (done.stdout, done.stderr) == ("Serving http://127.0.0.1:1\n", "")


@pytest.mark.parametrize("verbosity, shown", [(-1, 1), (0, 2), (1, 3), (2, 3)])
def test_what_is_logged(verbosity: int, shown: int, capsys: pytest.CaptureFixture[str]):
    from tocom_export.cli.commands.serve import start_log
    from tocom_export.engines.serving.http.telling import access, log, set_levels

    start_log()
    set_levels(verbosity)
    log.error("a fault")
    log.info("a change \x1b[2J")
    access.info("a request")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "ERROR a fault", "INFO a change \N{REPLACEMENT CHARACTER}[2J", "INFO a request",
    ][:shown]  # fmt: skip


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
        ("{bundle} --slo-ms 0", "--slo-ms 0: a latency of more than 0 ms is expected"),
        ("{bundle} --slo-ms -5", "--slo-ms -5: a latency of more than 0 ms is expected"),
        ("a=", "'a=' names no bundle; write a=BUNDLE"),
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


def test_advice_can_be_typed(fails: Callable):
    fails("serve", "my models", says=("NAME='my models'.",))
