from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from tocom_export.bundle.opening import MANIFEST, Bundle
from tocom_export.engines.bench.report import Report
from tocom_export.engines.bench.timing import summary
from tocom_export.engines.tensorrt.plan import PlanRecord, open_plan, save_plan

Run = Callable[..., Result]
Options = tuple[object, ...]
QUICK = ("--seconds", 0.01)


def test_every_engine_at_every_batch(succeeds: Run, bundle: Path):
    document = json.loads(succeeds("bench", bundle, "--batch", "1,3", *QUICK, "--json").stdout)
    assert document["runner"] == "onnx"
    assert [(t["target"], t["batch"]) for t in document["timings"]] == [
        (4, 1), (8, 1), (4, 3), (8, 3),
    ]  # fmt: skip
    for timing in document["timings"]:
        assert timing["runs"] >= 10
        assert 0 < timing["median_ms"] <= timing["p99_ms"]
        expected = 1000 * timing["batch"] / timing["median_ms"]
        assert timing["throughput"] == pytest.approx(expected)
        assert timing["speed_up"] is None


def test_over_degree_0(succeeds: Run, model, bundle: Path):
    succeeds("build", *model, "--targets", "0,8", "--out", "zero")
    result = succeeds("bench", "zero", "--batch", 2, "--threads", 1, *QUICK, "--json")
    whole, reduced = json.loads(result.stdout)["timings"]
    assert (whole["target"], whole["speed_up"]) == (0, 1.0)
    assert reduced["speed_up"] == pytest.approx(reduced["throughput"] / whole["throughput"])
    table = succeeds("bench", "zero", "--batch", 2, *QUICK).stdout
    assert "over r00" in table
    assert "1.00×" in table
    assert "No engine at degree 0" in succeeds("bench", bundle, "--batch", 1, *QUICK).stderr


@pytest.mark.parametrize(
    "options, says",
    [
        (("--targets", "12"), ("no target 12",)),
        (("--batch", "0"), ("--batch", "an image at least")),
        (("--batch", "a"), ("--batch", "not a list of numbers")),
        (("--dry-run",), ("--dry-run is for --runner trtexec",)),
        (("--layers",), ("--layers is for --runner trtexec",)),
        (("--runner", "tensorrt"), ("has no plan for target 4", "--engine tensorrt")),
        (("--runner", "trtexec"), ("has no plan for target 4",)),
        (("--trace", "arrivals.txt"), ("--trace is for --slo-ms",)),
        (("--slo-ms", "0"), ("--slo-ms 0", "more than nothing")),
        (("--slo-ms", "-1"), ("--slo-ms", "-1 is not a finite number")),
        (("--slo-ms", "nan"), ("--slo-ms", "nan is not a finite number")),
        (("--slo-ms", "inf"), ("--slo-ms", "inf is not a finite number")),
        (("--plot", "speed.pdf"), ("speed.pdf", "a .png or a .svg file")),
    ],
    ids=str,
)
def test_what_can_t_be_timed(fails: Run, bundle: Path, options, says):
    fails("bench", bundle, *options, says=says)


@pytest.fixture
def planned(bundle: Path) -> Path:
    """The same bundle, as if it had plans."""
    file = bundle / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "plans": [4, 8]}))
    opened = Bundle.open(bundle)
    for target in (4, 8):
        record = PlanRecord(
            target, 4, 0.1, False, opened.spec, opened.method, "fp32", "none", False, (1, 8, 32),
            {}, "", "tensorrt", "10.13.3", (8, 9), "GPU", (), hashlib.sha256(b"plan").hexdigest(),
        )  # fmt: skip
        save_plan(opened.plan(target), b"plan", record)
    return bundle


def test_the_lines_of_trtexec(succeeds: Run, planned: Path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    options = ("--runner", "trtexec", "--targets", 8, "--batch", "1,32", "--dry-run")
    lines = succeeds("bench", planned, *options).stdout.splitlines()
    assert lines == [
        f"trtexec --loadEngine={planned}/r08.plan --shapes=images:{batch}x3x32x32 "
        "--noDataTransfers --useCudaGraph --useSpinWait --warmUp=500 --duration=3 "
        "--exportTimes=times.json"
        for batch in (1, 32)
    ]


def test_the_lines_are_those_that_would_run(succeeds: Run, planned: Path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    content, record = open_plan(planned / "r08.plan")
    flags = ("VERSION_COMPATIBLE",)
    save_plan(planned / "r08.plan", content, dataclasses.replace(record, flags=flags))
    options = ("--runner", "trtexec", "--targets", "4,8", "--batch", "1,32", "--dry-run")
    four, _, first, last = succeeds(
        "bench", planned, *options, "--seconds", 0.5, "--layers", "--host-code"
    ).stdout.splitlines()
    assert "--versionCompatible" not in four
    assert "--versionCompatible" in first
    assert "--duration=0.5" in first
    assert "--exportProfile" not in first
    assert last.endswith("--separateProfileRun --exportProfile=profile.json")


TRTEXEC = """#!{python}
import json, sys
options = dict(a[2:].split("=", 1) for a in sys.argv[1:] if "=" in a)
if not options:
    print("TensorRT v110300")
    raise SystemExit
batch = int(options["shapes"].split(":")[1].split("x")[0])
ms = batch * (2.0 if "r04" in options["loadEngine"] else 1.0)
runs = [
    dict(startComputeMs=500 + i * ms, endComputeMs=500 + i * ms + ms, computeMs=ms)
    for i in range(50)
]
json.dump(runs, open(options["exportTimes"], "w"))
if "exportProfile" in options:
    layers = [dict(name="attention", timeMs=1, averageMs=0.1, percentage=60.0)]
    json.dump([dict(count=9), *layers], open(options["exportProfile"], "w"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a script as a program")
def test_trtexec_is_run_and_read(succeeds: Run, planned: Path, here: Path, monkeypatch):
    program = here / "trtexec"
    program.write_text(TRTEXEC.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(here))
    options = ("--runner", "trtexec", "--batch", "1,8", "--layers", "--json", "-v")
    result = succeeds("bench", planned, *options)
    document = json.loads(result.stdout)
    assert document["runner"] == "trtexec"
    medians = {(t["target"], t["batch"]): t["median_ms"] for t in document["timings"]}
    assert medians == {(4, 1): 2, (8, 1): 1, (4, 8): 16, (8, 8): 8}
    assert document["layers"]["8"][0]["name"] == "attention"
    assert "--useSpinWait" not in result.stderr  # version 11 does so by itself
    assert "attention" in succeeds("bench", planned, *options[:-2]).stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a script as a program")
@pytest.mark.parametrize(
    "change, says",
    [
        ({"library": "tensorrt-rtx"}, ("is of tensorrt-rtx", "--runner tensorrt-rtx")),
        ({"stripped": True}, ("r08.plan is stripped", "refit it first")),
        ({"flags": ("VERSION_COMPATIBLE",)}, ("r08.plan is version-compatible", "--host-code")),
        ({"batch": (1, 8, 16)}, ("--batch 32: ", "r08.plan takes 1 to 16 images")),
        ({"batch": (2, 8, 32)}, ("--batch 1: ", "r08.plan takes 2 to 32 images")),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_plans_that_trtexec_can_t_run(
    fails: Run, planned: Path, here: Path, monkeypatch, change, says, dry: Options
):
    program = here / "trtexec"
    program.write_text(TRTEXEC.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(here))
    content, record = open_plan(planned / "r08.plan")
    save_plan(planned / "r08.plan", content, dataclasses.replace(record, **change))
    monkeypatch.setattr("tocom_export.engines.tensorrt.trtexec.run", None)
    fails("bench", planned, "--runner", "trtexec", "--targets", 8, *dry, says=says)


@pytest.mark.parametrize("runner", ["tensorrt", "trtexec"])
def test_batches_that_a_plan_doesn_t_take(
    nvidia, succeeds: Run, fails: Run, model: Options, monkeypatch, runner: str
):
    """From Python, which fills smaller ones up."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("tocom_export.engines.bench.timing.time_engines", None)
    options = ("--targets", 8, "--engine", "tensorrt", "--batch", "4,8,16", "--out", "planned")
    succeeds("build", *model, *options)
    says = ("--batch 17: ", "planned/r08.plan takes 1 to 16 images")
    fails("bench", "planned", "--runner", runner, "--batch", "1,16,17", "-q", says=says)


@pytest.fixture
def zero(succeeds: Run, model: Options) -> Path:
    """A bundle with the targets 0 and 8."""
    succeeds("build", *model, "--targets", "0,8", "--out", "zero")
    return Path("zero")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Options]]:
    """No process is started to measure memory; what would have been run in one."""
    asked: dict[str, list[Options]] = {}

    def memory_of(module: str, arguments: Options) -> int:
        asked.setdefault(module.split(".")[-1], []).append(arguments)
        return 12_345_678

    monkeypatch.setattr("tocom_export.io.memory.memory_of", memory_of)
    monkeypatch.setattr("tocom_export.training.peers.memory_of", memory_of)
    return asked


def test_spread_bound_and_memory(succeeds: Run, zero: Path):
    options = ("--batch", "1,3", "--threads", 1, *QUICK)
    timings = json.loads(succeeds("bench", zero, *options, "--json").stdout)["timings"]
    for timing in timings:
        assert timing["low_ms"] <= timing["median_ms"] <= timing["high_ms"] <= timing["p99_ms"]
        assert timing["of_bound"] == pytest.approx(timing["speed_up"] / timing["bound"])
        if sys.platform == "linux":
            assert timing["memory"] > 20_000_000
    bounds = {timing["target"]: timing["bound"] for timing in timings}
    assert bounds[0] == 1
    assert 1 < bounds[8] < 4  # of 17 tokens, 9, 5, 3 and 2 are left


def test_memory_is_that_of_the_largest_batch(succeeds: Run, zero: Path, unmeasured):
    table = succeeds("bench", zero, "--batch", "3,1", *QUICK).stdout
    assert table.count("12.3 MB") == 4
    assert unmeasured == {"memory": [(zero, 0, 3), (zero, 8, 3)]}
    unmeasured.clear()
    succeeds("bench", zero, "--batch", 2, "--threads", 1, "--targets", 8, *QUICK)
    assert unmeasured == {"memory": [(zero, 8, 2, 1)]}


def test_a_picture(succeeds: Run, zero: Path, here: Path, unmeasured):
    pytest.importorskip("matplotlib")
    options = ("--batch", "1,2", *QUICK, "--plot")
    assert "Wrote speed.svg." in succeeds("bench", zero, *options, "speed.svg").stderr
    picture = (here / "speed.svg").read_text()
    assert picture.startswith("<?xml")
    assert "<!-- batch 2 -->" in picture
    assert "<!-- images per second -->" in picture
    assert "<!-- accuracy, % -->" not in picture
    edited = json.loads((zero / MANIFEST).read_text()) | {"accuracy": {"0": 81.5, "8": 79.5}}
    (zero / MANIFEST).write_text(json.dumps(edited))
    document = succeeds("bench", zero, *options, "speed.SVG", "--json").stdout
    assert json.loads(document)["timings"]
    assert "<!-- accuracy, % -->" in (here / "speed.SVG").read_text()
    succeeds("bench", zero, *options, "speed.png", "--targets", 8)
    assert (here / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    """Peers at the largest batch, and the accuracy of what was timed."""
    opened = dataclasses.replace(Bundle.open(bundle), accuracy={4: 80.0, 8: 79.0})
    timings = {(4, batch): summary([batch / 100], batch) for batch in (8, 1)}
    peers = {("torch", batch): summary([batch / 50 + 1], batch) for batch in (8, 1)}
    drawn: list[object] = []
    monkeypatch.setattr("tocom_export.engines.bench.plot.speed_picture", lambda *a: drawn.extend(a))
    Report(opened, "onnx", timings, peers=peers).draw(Path("speed.svg"))
    engines = {8: {4: pytest.approx(100)}, 1: {4: pytest.approx(100)}}
    assert drawn == [engines, {4: 80.0}, {"torch": pytest.approx(8 / 1.16)}, Path("speed.svg")]


def test_a_picture_without_matplotlib(
    fails: Run, bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is said before the work."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("tocom_export.engines.bench.timing.time_engines", None)
    says = ("matplotlib is not installed", "tocom-export[plot]")
    fails("bench", bundle, *QUICK, "--plot", "speed.svg", says=says)
    assert not list(here.iterdir())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made traces of a second, in which a model this small serves thousands."""
    monkeypatch.setattr("tocom_export.engines.bench.report.TRACE_SECONDS", 1)
    monkeypatch.setattr("tocom_export.engines.bench.report.TRACE_REQUESTS", 100)


OUTCOME = {"requests", "met", "mean_degree", "p50_ms", "p99_ms", "switches"}


def test_what_steering_would_do(succeeds: Run, zero: Path, unmeasured, short):
    options = ("--batch", "2,1", *QUICK, "--slo-ms", 50)
    document = json.loads(succeeds("bench", zero, *options, "--json").stdout)
    assert list(document["steering"]) == ["steady", "burst", "ramp", "overload"]
    dense = next(t for t in document["timings"] if (t["target"], t["batch"]) == (0, 1))
    for shape, rate in (("steady", 0.7), ("overload", 2.5)):
        requests = document["steering"][shape]["steered"]["requests"]
        assert requests == pytest.approx(1000 / dense["median_ms"] * rate, rel=0.1)
    for outcomes in document["steering"].values():
        assert list(outcomes) == ["steered", "r00", "r08"]
        assert all(set(outcome) == OUTCOME for outcome in outcomes.values())
        assert len({outcome["requests"] for outcome in outcomes.values()}) == 1
        assert outcomes["r00"]["mean_degree"] == outcomes["r00"]["switches"] == 0
        assert outcomes["r08"]["mean_degree"] == 8
        assert 0 <= outcomes["steered"]["mean_degree"] <= 8


def test_the_tables_of_what_steering_would_do(succeeds: Run, zero: Path, unmeasured, short):
    Path("arrivals.txt").write_text("100\n101\n101.5\n")
    options = ("--batch", 1, *QUICK, "--slo-ms", 1000)
    text = succeeds("bench", zero, *options).stdout
    for shape in ("steady", "burst", "ramp", "overload"):
        assert f"\n{shape}, " in text
    assert text.count(" requests, simulated with these times") == 4
    assert text.count("mean degree") == 4
    lines = succeeds("bench", zero, *options, "--trace", "arrivals.txt").stdout.splitlines()
    (start,) = (n for n, line in enumerate(lines) if "simulated" in line)
    assert lines[start] == "arrivals.txt, 3 requests, simulated with these times"
    assert [line.split()[:4] for line in lines[start + 2 :]] == [
        ["steered", "100.0", "%", "0.0"],
        ["r00", "100.0", "%", "0.0"],
        ["r08", "100.0", "%", "8.0"],
    ]


def test_recorded_arrivals(succeeds: Run, zero: Path, unmeasured):
    Path("arrivals.txt").write_text("7\n" * 2000)  # all at once: more than can be served
    options = ("--batch", 1, *QUICK, "--slo-ms", 0.01, "--trace", "arrivals.txt", "--json")
    ((name, outcomes),) = json.loads(succeeds("bench", zero, *options).stdout)["steering"].items()
    assert name == "arrivals.txt"
    assert {outcome["requests"] for outcome in outcomes.values()} == {2000}
    assert {outcome["met"] for outcome in outcomes.values()} == {0}


def test_steering_goes_by_the_accuracy_that_was_recorded(succeeds: Run, zero: Path, unmeasured):
    """A model that was trained at degree 8 is better there, which is its best degree."""
    Path("arrivals.txt").write_text("0\n1\n2\n")
    options = ("--batch", 16, *QUICK, "--slo-ms", 10_000, "--trace", "arrivals.txt", "--json")

    def degree() -> float:
        document = json.loads(succeeds("bench", zero, *options).stdout)
        return document["steering"]["arrivals.txt"]["steered"]["mean_degree"]

    assert degree() == 0
    edited = json.loads((zero / MANIFEST).read_text()) | {"accuracy": {"0": 70.5, "8": 79.5}}
    (zero / MANIFEST).write_text(json.dumps(edited))
    assert degree() == 8


@pytest.mark.parametrize(
    "content, says",
    [(None, "can't be read"), ("2\n1\n", "ascending order"), ("soon", "a number of seconds")],
)
def test_arrivals_that_are_none(fails: Run, bundle: Path, unmeasured, content: str | None, says):
    if content is not None:
        Path("arrivals.txt").write_text(content)
    options = ("--batch", 1, *QUICK, "--slo-ms", 50, "--trace", "arrivals.txt")
    fails("bench", bundle, *options, says=("arrivals.txt: ", says))


def test_peers(succeeds: Run, zero: Path, unmeasured, short, monkeypatch, here: Path):
    """torch's own are run; its compiler, and exporters, take long and have tests of their own."""

    def export(vit: object, spec: object, file: Path) -> None:
        raise RuntimeError("no such operator")

    exporters = {"failing": ((), export), "missing": (("no_such_package",), export)}
    monkeypatch.setattr("tocom_export.training.peers.EXPORTERS", exporters)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    options = ("--batch", "1,2", *QUICK, "--peers")
    document = json.loads(succeeds("bench", zero, *options, "--json").stdout)
    names = ["torch eager, dense", "torch.compile, dense", "torch eager, usual merging, r = 8"]
    assert [(p["name"], p["batch"]) for p in document["peers"]] == [
        (name, batch) for batch in (1, 2) for name in names
    ]
    dense = {t["batch"]: t for t in document["timings"] if t["target"] == 0}
    for peer in document["peers"]:
        assert peer["runs"] >= 10
        assert 0 < peer["low_ms"] <= peer["median_ms"] <= peer["high_ms"]
        speed_up = peer["throughput"] / dense[peer["batch"]]["throughput"]
        assert peer["speed_up"] == pytest.approx(speed_up)
        assert peer["memory"] == 12_345_678
    missing = ["failing: no such operator", "missing: no_such_package is not installed."]
    assert document["peers_missing"] == missing
    assert [arguments[1:] for arguments in unmeasured["peers"]] == [
        (kind, degree, "cpu", "2,3,32,32")
        for kind, degree in (("eager", 0), ("compiled", 0), ("usual", 8))
    ]  # fmt: skip

    result = succeeds("bench", zero, *options, "--plot", "speed.svg", "--slo-ms", 50)
    for name in names:
        assert result.stdout.count(f"\n{name} ") == 2
        assert f"<!-- {name} -->" in (here / "speed.svg").read_text()
    for line in missing:
        assert f"Not timed: {line}" in result.stderr
    assert " requests, simulated with these times" in result.stdout


def test_no_peers_unless_asked_for(succeeds: Run, bundle: Path, unmeasured, monkeypatch):
    monkeypatch.setattr("tocom_export.training.peers.peers", None)
    document = json.loads(succeeds("bench", bundle, "--batch", 1, *QUICK, "--json").stdout)
    assert document["peers"] == document["peers_missing"] == []
    assert document["steering"] == {}


def test_peers_beside_trtexec(fails: Run, planned: Path):
    says = ("--peers are timed from Python", "another --runner")
    fails("bench", planned, "--runner", "trtexec", "--peers", says=says)
