from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import write_bundle
from tocom_export.engines.bench.report import Report, Row
from tocom_export.engines.bench.run import name_gpu, runs_on_cpu, time_bundle
from tocom_export.engines.bench.timing import summarise_times
from tocom_export.engines.machine import name_processor
from tocom_export.engines.picking import Choice
from tocom_export.errors import DegreeError, InputError

QUICK = {"seconds": 0.0, "threads": 1}


@pytest.fixture
def named(make_blueprint: Callable[..., Any], tmp_path: Path) -> Bundle:
    """r00, r08, and a variant with a degree per layer."""
    schedules = {"fast": (20, 8, 4, 0)}
    blueprint = make_blueprint(tmp_path, targets=(0, 8), schedules=schedules)
    return write_bundle(blueprint, tmp_path / "named")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """No process is started to measure memory; what would have been run in one."""
    found: list[tuple[object, ...]] = []

    def measure(_: str, arguments: tuple[object, ...]) -> int:
        found.append(arguments)
        return 123

    monkeypatch.setattr("tocom_export.engines.bench.memory.measure_memory", measure)
    return found


def peer(name: str, ran: list[tuple[int, ...]]) -> Any:
    def run(images: np.ndarray) -> None:
        ran.append(images.shape)

    return SimpleNamespace(
        name=name, backend="torch", precision="bf16", variant="r00", run=run,
        memory=lambda batch: 1000 * batch,
    )  # fmt: skip


def test_every_variant_and_peer_at_every_batch(named: Bundle, asked):
    ran: list[tuple[int, ...]] = []
    told: list[str] = []
    # A peer may be called as a variant is.
    peers = [peer("r08", ran), "another: not installed.", peer("torch", ran)]
    report = time_bundle(
        named, ["fast", 8], batch=(2, 1), peers=peers, progress=told.append, **QUICK
    )
    assert [(row.name, row.peer, row.timing.batch) for row in report.rows] == [
        (name, is_peer, batch)
        for batch in (1, 2)
        for name, is_peer in (("fast", False), ("r08", False), ("r08", True), ("torch", True))
    ]
    assert [(row.backend, row.precision, row.variant) for row in report.rows[:4]] == [
        ("onnx", "fp32", "fast"), ("onnx", "fp32", "r08"),
        ("torch", "bf16", "r00"), ("torch", "bf16", "r00"),
    ]  # fmt: skip
    assert [row.memory for row in report.rows[:4]] == [123, 123, 2000, 2000]
    assert [line[:3] for line in asked] == [(named.path, "fast", 2), (named.path, "r08", 2)]
    options = json.loads(str(asked[0][3]))
    assert (options["backend"], options["threads"]) == ("onnx", 1)
    assert report.not_timed == ["another: not installed."]
    assert set(ran) == {(1, 3, 56, 56), (2, 3, 56, 56)}
    assert len(told) == 4 * (2 + 1)
    assert (told[0], told[-1]) == ("fast, batch 1", "torch, memory")
    assert report.dense is None
    assert report.device == name_processor()


def test_all_variants_by_default(named: Bundle, asked):
    report = time_bundle(named, batch=[1], **QUICK)
    assert [row.variant for row in report.rows] == ["r00", "r08", "fast"]
    assert report.dense == "r00"
    assert report.bound("r00") == 1
    costs = [report.macs(row.variant) for row in report.rows]
    assert report.bound("fast") == pytest.approx(costs[0] / costs[2])
    dense, _, fast = report.rows
    ratio = fast.timing.images_per_s / dense.timing.images_per_s
    assert (report.speed_up(dense), report.speed_up(fast)) == (1, pytest.approx(ratio))


def test_what_steering_would_do_with_names(named: Bundle, asked):
    report = time_bundle(named, ["r00", "fast"], batch=[1], **QUICK)
    found = report.steer(0.05, {"two": np.array([0.0, 1.0])})
    assert list(found.steering["two"].fixed) == ["r00", "fast"]
    assert found.steering["two"].steered.requests == 2
    assert not report.steering


def test_steering_picks_among_the_batches_that_were_timed(named: Bundle):
    """Four together take here what one does: alone, the last would be answered after 0.4 s."""
    rows = [
        Row(name, "onnx", "fp32", name, summarise_times([took], batch))
        for name, took in (("r00", 0.1), ("fast", 0.09))
        for batch in (1, 4)
    ]
    at_once = {"at once": np.zeros(4)}
    found = Report(named, "a machine", rows).steer(0.25, at_once).steering["at once"]
    assert (found.steered.met, found.steered.p99_ms) == (100, pytest.approx(100))
    assert found.fixed["fast"].p99_ms == pytest.approx(90)
    singly = Report(named, "a machine", [row for row in rows if row.timing.batch == 1])
    assert singly.steer(0.25, at_once).steering["at once"].steered.met == 50


@pytest.mark.parametrize("name", ["r12", "slow", 16])
def test_a_variant_that_the_bundle_lacks(named: Bundle, name: str | int):
    with pytest.raises(DegreeError, match=r"no variant .*; it has r00, r08, fast"):
        time_bundle(named, [name], batch=[1], **QUICK)


def test_several_backends(named: Bundle, asked):
    pytest.importorskip("openvino")
    choices = (Choice("onnx"), Choice("openvino", "f32"))
    report = time_bundle(named, choices=choices, batch=[1], **QUICK)
    assert report.kinds == [("onnx", "fp32"), ("openvino", "fp32")]
    assert [row.name for row in report.rows] == ["r00", "r08", "fast"] * 2
    assert report.fastest in report.kinds
    for dense in (report.rows[0], report.rows[3]):  # each over its own
        assert report.speed_up(dense) == 1
    ratio = report.rows[4].timing.images_per_s / report.rows[3].timing.images_per_s
    assert report.speed_up(report.rows[4]) == pytest.approx(ratio)
    assert json.loads(str(asked[-1][3]))["inference_precision"] == "f32"


def test_backends_that_aren_t(named: Bundle):
    with pytest.raises(InputError, match="`backend` 'trtexec': it is onnx, openvino, tensorrt"):
        time_bundle(named, ["r00"], choices=[Choice("trtexec")], **QUICK)  # type: ignore[arg-type]
    with pytest.raises(DegreeError, match="no plan for r00"):
        time_bundle(named, ["r00"], choices=[Choice("tensorrt")], seconds=0.0)


def test_where_it_ran(nvidia: Any):
    assert "cores" in name_processor()
    assert name_gpu() != "GPU"
    cpu = (Choice("onnx"), Choice("openvino"))
    assert runs_on_cpu(cpu, None)
    assert runs_on_cpu(cpu, "CPU")
    assert not runs_on_cpu(cpu, "cuda")
    assert not runs_on_cpu([*cpu, Choice("tensorrt")], None)


def test_a_gpu_without_cuda_python():
    assert name_gpu() == "GPU"


def rows(name: str, *, is_peer: bool, each: float) -> list[Row]:
    """At the batches 8 and 1."""
    return [
        Row(name, "onnx", "fp32", name, summarise_times([batch * each + is_peer], batch), is_peer)
        for batch in (8, 1)
    ]


def test_what_can_t_be_told_apart(named: Bundle):
    """No row of one kind is faster or slower than that of another, beyond what they scatter."""

    def time(kind: str, variant: str, *each: float) -> Row:
        return Row(variant, kind, "fp32", variant, summarise_times(each, 1), kind == "torch")

    rows = [
        time("onnx", "r00", 20, 21, 22), time("onnx", "r08", 10, 11, 12),
        time("openvino", "r00", 20, 22, 24), time("openvino", "r08", 10.5, 11.5, 12.5),
        time("other", "r00", 20, 21, 22), time("other", "r08", 20, 21, 22),
        time("torch", "r00", 30, 31, 32),
    ]  # fmt: skip
    report = Report(named, "a processor", rows)
    assert report.fastest == ("onnx", "fp32")
    assert report.find_rivals(report.fastest) == [("openvino", "fp32")]
    assert report.find_rivals(("openvino", "fp32")) == [("onnx", "fp32")]
    assert report.find_rivals(("other", "fp32")) == []
    assert not any(map(report.is_slower, rows))
    slow = dataclasses.replace(rows[1], timing=summarise_times([30, 31, 32], 1))
    assert report.is_slower(slow)


def test_what_is_drawn(named: Bundle, monkeypatch: pytest.MonkeyPatch):
    """Peers at the largest batch, and the accuracy of what was timed."""
    known = dataclasses.replace(named, accuracy={"fast": 80.0, "r08": 79.0})
    found = [*rows("fast", is_peer=False, each=0.01), *rows("torch", is_peer=True, each=0.02)]
    drawn: list[object] = []
    monkeypatch.setattr("tocom_export.engines.bench.plot.draw_speeds", lambda *a: drawn.extend(a))
    monkeypatch.setattr("tocom_export.study.plot_style.save", lambda _, file: drawn.append(file))
    report = Report(known, "a processor", found)
    report.plot(Path("speed.svg"))
    speeds = {8: {"fast": pytest.approx(100)}, 1: {"fast": pytest.approx(100)}}
    assert drawn == [
        speeds, {"fast": report.macs("fast")}, {"fast": 80.0},
        {"torch": pytest.approx(8 / 1.16)}, Path("speed.svg"),
    ]  # fmt: skip
