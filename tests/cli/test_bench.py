from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from tocom_export.bundle.manifest import MANIFEST
from tocom_export.bundle.opening import Bundle
from tocom_export.engines.bench.timing import Timing, summarise_times
from tocom_export.engines.tensorrt.plan import PlanRecord, open_plan, save_plan

Run = Callable[..., Result]
Options = tuple[object, ...]
QUICK = ("--seconds", 0.01)


def rows_of(result: Result, *, peers: bool = False) -> list[dict[str, Any]]:
    return [row for row in json.loads(result.stdout)["rows"] if row["peer"] == peers]


def test_every_variant_at_every_batch(succeeds: Run, bundle: Path):
    result = succeeds("bench", bundle, "--batch", "1,3", *QUICK, "--json")
    assert json.loads(result.stdout)["device"]
    rows = rows_of(result)
    assert [(row["variant"], row["batch"]) for row in rows] == [
        ("r04", 1), ("r08", 1), ("r04", 3), ("r08", 3),
    ]  # fmt: skip
    for row in rows:
        assert (row["name"], row["backend"]) == (row["variant"], "onnx")
        assert (row["precision"], row["peer"]) == ("fp32", False)
        assert row["runs"] >= 10
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p99_ms"]
        expected = 1000 * row["batch"] / row["median_ms"]
        assert row["images_per_s"] == pytest.approx(expected)
        assert row["speed_up"] is None


def test_over_the_dense_model(succeeds: Run, model, bundle: Path):
    succeeds("build", *model, "--targets", "0,8", "--out", "zero")
    whole, reduced = rows_of(
        succeeds("bench", "zero", "--batch", 2, "--threads", 1, *QUICK, "--json")
    )
    assert (whole["variant"], whole["speed_up"]) == ("r00", 1.0)
    assert reduced["speed_up"] == pytest.approx(reduced["images_per_s"] / whole["images_per_s"])
    table = succeeds("bench", "zero", "--batch", 2, *QUICK).stdout
    assert "over r00" in table
    assert "1.00×" in table
    assert "No variant of degree 0" in succeeds("bench", bundle, "--batch", 1, *QUICK).stderr


def test_a_variant_with_a_degree_per_layer(succeeds: Run, model, unmeasured, short):
    """By its name, in each table and beside bare degrees."""
    options = ("--targets", "0,8", "--schedule", "fast=6,2,1,0", "--out", "named")
    succeeds("build", *model, *options)
    timed = ("--batch", 1, *QUICK, "--variants", "0,fast", "--slo-ms", 50)
    result = succeeds("bench", "named", *timed, "--json")
    dense, fast = rows_of(result)
    assert (dense["name"], fast["name"], fast["variant"]) == ("r00", "fast", "fast")
    assert fast["bound"] == pytest.approx(dense["macs"] / fast["macs"])
    assert fast["bound"] > 1
    assert fast["memory"] == 12_345_678
    asked = [line[:3] for line in unmeasured["memory"]]
    assert asked == [(Path("named"), "r00", 1), (Path("named"), "fast", 1)]
    for found in json.loads(result.stdout)["steering"].values():
        assert list(found["fixed"]) == ["r00", "fast"]
        assert found["steered"]["shares"].keys() <= {"r00", "fast"}
    assert "\nfast " in succeeds("bench", "named", *timed).stdout


@pytest.mark.parametrize(
    "options, says",
    [
        (("--variants", "12"), ("no variant r12; it has r04, r08",)),
        (("--variants", "8,fast"), ("no variant fast",)),
        (("--variants", "8,,4"), ("--variants", "no list of variants")),
        (("--batch", "0"), ("--batch", "outside the batches 1..")),
        (("--batch", "a"), ("--batch", "no list of batches")),
        (("--dry-run",), ("--dry-run is for --backend trtexec",)),
        (("--backend", "onnx,fast"), ("--backend", "'onnx,fast' is no list of onnx, openvino")),
        (("--backend", "auto,onnx"), ("--backend", "nor auto or trtexec alone")),
        (("--backend", "onnx", "--inference-precision", "f32"), ("is for --backend openvino",)),
        (("--data", "photos"), ("--data is for --pick",)),
        (("--pick", "--backend", "onnx"), ("--pick tries all that there is",)),
        (("--layers",), ("--layers is for --backend trtexec",)),
        (("--backend", "tensorrt", "--device", "cpu"), ("--device is for --backend onnx",)),
        (("--backend", "tensorrt"), ("has no plan for r04", "tocom-export build")),
        (("--backend", "trtexec"), ("has no plan for r04",)),
        (("--backend", "trtexec", "--dry-run"), ("has no plan for r04",)),
        (("--trace", "arrivals.txt"), ("--trace is for --slo-ms",)),
        (("--slo-ms", "0"), ("--slo-ms 0", "more than nothing")),
        (("--slo-ms", "-1"), ("--slo-ms", "-1 is not a finite number")),
        (("--slo-ms", "nan"), ("--slo-ms", "nan is not a finite number")),
        (("--slo-ms", "inf"), ("--slo-ms", "inf is not a finite number")),
        (("--plot", "speed.pdf"), ("speed.pdf", "a .png or a .svg file")),
        (("--host-code",), ("--host-code is for --backend tensorrt and tensorrt-rtx",)),
        (("--backend", "onnx,openvino", "--host-code"), ("--host-code is for --backend tens",)),
    ],
    ids=str,
)
def test_what_can_t_be_timed(fails: Run, bundle: Path, options, says):
    fails("bench", bundle, *options, says=says)


@pytest.fixture
def planned(bundle: Path) -> Path:
    """The same bundle, as if it had plans."""
    file = bundle / MANIFEST
    names = ["r04", "r08"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "plans": names}))
    opened = Bundle.open(bundle)
    for name in names:
        record = PlanRecord(
            opened.variant(name), opened.spec, opened.method, "fp32", "none", False, (1, 8, 32),
            {}, "", "tensorrt", "10.13.3", (8, 9), "GPU", (), hashlib.sha256(b"plan").hexdigest(),
        )  # fmt: skip
        save_plan(opened.plan(name), b"plan", record)
    return bundle


def test_the_lines_of_trtexec(succeeds: Run, planned: Path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    options = ("--backend", "trtexec", "--variants", 8, "--batch", "1,32", "--dry-run")
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
    options = ("--backend", "trtexec", "--variants", "r04,8", "--batch", "1,32", "--dry-run")
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
    options = ("--backend", "trtexec", "--batch", "1,8", "--layers", "--json", "-v")
    result = succeeds("bench", planned, *options)
    document = json.loads(result.stdout)
    assert {row["backend"] for row in document["rows"]} == {"trtexec"}
    assert [(row["variant"], row["batch"], row["median_ms"]) for row in document["rows"]] == [
        ("r04", 1, 2), ("r08", 1, 1), ("r04", 8, 16), ("r08", 8, 8)
    ]  # fmt: skip
    assert document["layers"]["r08"][0]["name"] == "attention"
    assert "--useSpinWait" not in result.stderr  # version 11 does so by itself
    assert "attention" in succeeds("bench", planned, *options[:-2]).stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a script as a program")
@pytest.mark.parametrize(
    "change, says",
    [
        ({"backend": "tensorrt-rtx"}, ("is of tensorrt-rtx", "--backend tensorrt-rtx")),
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
    fails("bench", planned, "--backend", "trtexec", "--variants", 8, *dry, says=says)


@pytest.mark.parametrize("backend", ["tensorrt", "trtexec"])
def test_batches_that_a_plan_doesn_t_take(
    nvidia, succeeds: Run, fails: Run, model: Options, monkeypatch, backend: str
):
    """From Python, which fills smaller ones up."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("tocom_export.engines.bench.run.time_engines", None)
    options = ("--targets", 8, "--backend", "tensorrt", "--batch", "4,8,16", "--out", "planned")
    succeeds("build", *model, *options)
    says = ("--batch 17: ", "planned/r08.plan takes 1 to 16 images")
    fails("bench", "planned", "--backend", backend, "--batch", "1,16,17", "-q", says=says)


@pytest.fixture
def zero(succeeds: Run, model: Options) -> Path:
    """A bundle with r00 and r08."""
    succeeds("build", *model, "--targets", "0,8", "--out", "zero")
    return Path("zero")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Options]]:
    """No process is started to measure memory; what would have been run in one."""
    asked: dict[str, list[Options]] = {}

    def measure_memory(module: str, arguments: Options) -> int:
        asked.setdefault(module.split(".")[-1], []).append(arguments)
        return 12_345_678

    monkeypatch.setattr("tocom_export.engines.bench.memory.measure_memory", measure_memory)
    monkeypatch.setattr("tocom_export.training.peers.opening.measure_memory", measure_memory)
    return asked


def test_spread_bound_and_memory(succeeds: Run, zero: Path):
    options = ("--batch", "1,3", "--threads", 1, *QUICK)
    rows = rows_of(succeeds("bench", zero, *options, "--json"))
    for row in rows:
        assert row["min_ms"] <= row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["high_ms"] <= row["p99_ms"]
        assert row["of_bound"] == pytest.approx(row["speed_up"] / row["bound"])
        assert row["bound"] == pytest.approx(rows[0]["macs"] / row["macs"])
        if sys.platform == "linux":
            assert row["memory"] > 20_000_000
    bounds = {row["variant"]: row["bound"] for row in rows}
    assert bounds["r00"] == 1
    assert 1 < bounds["r08"] < 4  # of 17 tokens, 9, 5, 3 and 2 are left


@pytest.mark.parametrize("scatter, told", [(0.01, True), (0.5, False)])
def test_slower_is_what_differs_by_more_than_its_runs(
    succeeds: Run, zero: Path, unmeasured, monkeypatch, scatter: float, told: bool
):
    def time_engines(runs: dict[Any, object], batch: int, *_: object) -> dict[Any, Timing]:
        spread = [1 - scatter, 1 - scatter, 1, 1 + scatter, 1 + scatter]
        return {
            key: summarise_times([(0.1 + 0.01 * i) * share for share in spread], batch)
            for i, key in enumerate(runs)
        }

    monkeypatch.setattr("tocom_export.engines.bench.run.time_engines", time_engines)
    result = succeeds("bench", zero, "--backend", "onnx", "--batch", "1,3")
    assert result.stdout.count(" 0.91×") == 2
    for batch in (1, 3):
        says = f"r08 (onnx, fp32) is slower than r00 at batch {batch}: "
        assert (says in result.stderr) == told


def test_memory_is_that_of_the_largest_batch(succeeds: Run, zero: Path, unmeasured):
    table = succeeds("bench", zero, "--batch", "3,1", *QUICK).stdout
    assert table.count("12.3 MB") == 4
    assert [line[:3] for line in unmeasured["memory"]] == [(zero, "r00", 3), (zero, "r08", 3)]
    unmeasured.clear()
    succeeds("bench", zero, "--batch", 2, "--threads", 1, "--variants", 8, *QUICK)
    ((*asked, options),) = unmeasured["memory"]
    assert asked == [zero, "r08", 2]
    assert json.loads(options)["threads"] == 1


def test_a_picture(succeeds: Run, zero: Path, here: Path, unmeasured):
    pytest.importorskip("matplotlib")
    options = ("--batch", "1,2", *QUICK, "--plot")
    assert "Wrote speed.svg." in succeeds("bench", zero, *options, "speed.svg").stderr
    picture = (here / "speed.svg").read_text()
    assert picture.startswith("<?xml")
    assert "<!-- batch 2 -->" in picture
    assert "<!-- images per second -->" in picture
    assert "<!-- accuracy, % -->" not in picture
    edited = json.loads((zero / MANIFEST).read_text()) | {"accuracy": {"r00": 81.5, "r08": 79.5}}
    (zero / MANIFEST).write_text(json.dumps(edited))
    document = succeeds("bench", zero, *options, "speed.SVG", "--json").stdout
    assert json.loads(document)["rows"]
    assert "<!-- accuracy, % -->" in (here / "speed.SVG").read_text()
    succeeds("bench", zero, *options, "speed.png", "--variants", 8)
    assert (here / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib(
    fails: Run, bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is said before the work."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("tocom_export.engines.bench.run.time_engines", None)
    says = ("matplotlib is not installed", "tocom-export[plot]")
    fails("bench", bundle, *QUICK, "--plot", "speed.svg", says=says)
    assert not list(here.iterdir())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made traces of a second, in which a model this small serves thousands."""
    monkeypatch.setattr("tocom_export.engines.serving.arrivals.TRACE_SECONDS", 1)
    monkeypatch.setattr("tocom_export.engines.serving.arrivals.TRACE_REQUESTS", 100)


OUTCOME = {"requests", "met", "shares", "accuracy", "p50_ms", "p95_ms", "p99_ms", "switches"}


def test_what_steering_would_do(succeeds: Run, zero: Path, unmeasured, short):
    options = ("--batch", "2,1", *QUICK, "--slo-ms", 50)
    document = json.loads(succeeds("bench", zero, *options, "--json").stdout)
    assert list(document["steering"]) == ["steady", "burst", "ramp", "diurnal", "overload"]
    slowest = max(row["median_ms"] for row in document["rows"] if row["batch"] == 1)
    for shape, rate in (("steady", 0.7), ("overload", 2.5)):
        requests = document["steering"][shape]["steered"]["requests"]
        assert requests == pytest.approx(1000 / slowest * rate, rel=0.1)
    for found in document["steering"].values():
        steered, fixed = found["steered"], found["fixed"]
        assert list(fixed) == ["r00", "r08"]
        assert all(set(outcome) == OUTCOME for outcome in (steered, *fixed.values()))
        assert len({outcome["requests"] for outcome in (steered, *fixed.values())}) == 1
        for name, outcome in fixed.items():
            assert (outcome["shares"], outcome["switches"]) == ({name: 100}, 0)
        assert steered["shares"].keys() <= {"r00", "r08"}
        assert sum(steered["shares"].values()) == pytest.approx(100)


def test_the_tables_of_what_steering_would_do(succeeds: Run, zero: Path, unmeasured, short):
    Path("arrivals.txt").write_text("100\n101\n101.5\n")
    edited = json.loads((zero / MANIFEST).read_text()) | {"accuracy": {"r00": 81.5, "r08": 79.5}}
    (zero / MANIFEST).write_text(json.dumps(edited))
    options = ("--batch", 1, *QUICK, "--slo-ms", 1000)
    text = succeeds("bench", zero, *options).stdout
    for shape in ("steady", "burst", "ramp", "diurnal", "overload"):
        assert f"\n{shape}, " in text
    assert text.count(" requests, simulated with these times") == 5
    assert text.count("answered by") == 5
    lines = succeeds("bench", zero, *options, "--trace", "arrivals.txt").stdout.splitlines()
    (start,) = (n for n, line in enumerate(lines) if "simulated" in line)
    assert lines[start] == "arrivals.txt, 3 requests, simulated with these times"
    assert [line.split()[:8] for line in lines[start + 2 :]] == [
        ["steered", "100.0", "%", "r00", "100.0", "%", "81.5", "%"],
        ["r00", "100.0", "%", "r00", "100.0", "%", "81.5", "%"],
        ["r08", "100.0", "%", "r08", "100.0", "%", "79.5", "%"],
    ]


def test_arrivals_from_a_file(succeeds: Run, zero: Path, unmeasured):
    Path("arrivals.txt").write_text("7\n" * 2000)  # all at once: more than can be served
    options = ("--batch", 1, *QUICK, "--slo-ms", 0.01, "--trace", "arrivals.txt", "--json")
    ((name, found),) = json.loads(succeeds("bench", zero, *options).stdout)["steering"].items()
    assert name == "arrivals.txt"
    for outcome in (found["steered"], *found["fixed"].values()):
        assert (outcome["requests"], outcome["met"]) == (2000, 0)


def test_steering_goes_by_the_accuracy_that_was_recorded(
    succeeds: Run, zero: Path, unmeasured, monkeypatch: pytest.MonkeyPatch
):
    """A model that was trained at degree 8 is better there, which is its best degree."""
    Path("arrivals.txt").write_text("0\n1\n2\n")
    options = ("--batch", 16, *QUICK, "--slo-ms", 10_000, "--trace", "arrivals.txt", "--json")

    def time_engines(runs: dict[Any, object], batch: int, *_: object) -> dict[Any, Timing]:
        return {key: summarise_times([0.1 - 0.01 * i], batch) for i, key in enumerate(runs)}

    monkeypatch.setattr("tocom_export.engines.bench.run.time_engines", time_engines)

    def steered() -> tuple[dict[str, float], float | None]:
        document = json.loads(succeeds("bench", zero, *options).stdout)
        found = document["steering"]["arrivals.txt"]["steered"]
        return found["shares"], found["accuracy"]

    assert steered() == ({"r00": 100}, None)
    edited = json.loads((zero / MANIFEST).read_text()) | {"accuracy": {"r00": 70.5, "r08": 79.5}}
    (zero / MANIFEST).write_text(json.dumps(edited))
    assert steered() == ({"r08": 100}, 79.5)


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
    opening = "tocom_export.training.peers.opening"
    monkeypatch.setattr(f"{opening}.EXPORTERS", exporters)
    monkeypatch.setattr(f"{opening}.QUANTISERS", {})
    monkeypatch.setattr(f"{opening}._open_openvino", lambda opener: ())
    monkeypatch.setattr("tocom_export.training.peers.torch_peers.has_bfloat16", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    options = ("--batch", "1,2", *QUICK, "--peers")
    result = succeeds("bench", zero, *options, "--json")
    document, peers = json.loads(result.stdout), rows_of(result, peers=True)
    kinds = (("eager", "r00"), ("compiled", "r00"), ("scatter", "r08"))
    whats = ("torch eager, dense", "torch.compile, dense", "torch eager, merging by scatter, r08")
    facts = {
        f"{what}, {precision}": (kind, precision, variant)
        for what, (kind, variant) in zip(whats, kinds, strict=True)
        for precision in ("fp32", "bf16")
    }
    names = list(facts)
    assert [(p["name"], p["batch"]) for p in peers] == [
        (name, batch) for batch in (1, 2) for name in names
    ]
    dense = {row["batch"]: row for row in rows_of(result) if row["variant"] == "r00"}
    for peer in peers:
        assert peer["backend"] == "torch"
        assert (peer["precision"], peer["variant"]) == facts[peer["name"]][1:]
        assert peer["runs"] >= 10
        assert 0 < peer["low_ms"] <= peer["median_ms"] <= peer["high_ms"]
        speed_up = peer["images_per_s"] / dense[peer["batch"]]["images_per_s"]
        assert peer["speed_up"] == pytest.approx(speed_up)
        assert peer["memory"] == 12_345_678
    missing = ["failing: no such operator", "missing: no_such_package is not installed."]
    assert document["not_timed"] == missing
    assert [arguments[1:] for arguments in unmeasured["peers"]] == [
        (*fact, "cpu", "2,3,32,32") for fact in facts.values()
    ]

    result = succeeds("bench", zero, *options, "--plot", "speed.svg", "--slo-ms", 50)
    for name in names:
        assert result.stdout.count(f"\n{name} ") == 2
        assert f"<!-- {name}, batch 2 -->" in (here / "speed.svg").read_text()
    for line in missing:
        assert f"Not timed: {line}" in result.stderr
    assert " requests, simulated with these times" in result.stdout


def test_no_peers_unless_asked_for(succeeds: Run, bundle: Path, unmeasured, monkeypatch):
    monkeypatch.setattr("tocom_export.training.peers.opening.open_peers", None)
    result = succeeds("bench", bundle, "--batch", 1, *QUICK, "--json")
    document = json.loads(result.stdout)
    assert rows_of(result, peers=True) == document["not_timed"] == []
    assert document["steering"] == {}


def test_peers_beside_trtexec(fails: Run, planned: Path):
    says = ("--peers are timed from Python", "another --backend")
    fails("bench", planned, "--backend", "trtexec", "--peers", says=says)


def test_several_backends_and_a_pick(succeeds: Run, zero: Path, unmeasured, monkeypatch, here):
    pytest.importorskip("openvino")
    monkeypatch.setenv("TOCOM_EXPORT_CACHE", str(here / "cache"))
    options = (zero, "--batch", 1, *QUICK, "--variants", 8)
    backends = [row["backend"] for row in rows_of(succeeds("bench", *options, "--json"))]
    assert backends == ["onnx"]
    both = succeeds("bench", *options, "--backend", "onnx,openvino", "--json")
    assert [row["backend"] for row in rows_of(both)] == ["onnx", "openvino"]
    picked = succeeds("bench", *options, "--pick", "--json")
    found = json.loads(picked.stdout)
    kinds = [(row["backend"], row["precision"]) for row in found["rows"]]
    assert kinds[:2] == [("onnx", "fp32"), ("openvino", "fp32")]
    choice = found["pick"]["choice"]
    assert f"Picked {choice['backend']}" in picked.stderr
    assert list((here / "cache" / "picks").iterdir())
    backends = [row["backend"] for row in rows_of(succeeds("bench", *options, "--json"))]
    assert backends == [choice["backend"]]


def test_a_pick_within_a_budget(succeeds: Run, fails: Run, zero: Path, unmeasured, photos: Path):
    pytest.importorskip("openvino")
    options = (zero, "--batch", 1, *QUICK, "--variants", 8, "--pick", "--data")
    fails("bench", *options, photos, says=("--data", "2 classes", "head of 10"))


def test_a_pick_that_can_t_be_kept_is_not_measured(fails: Run, zero: Path, monkeypatch, here):
    pytest.importorskip("openvino")
    (here / "file").write_text("")
    monkeypatch.setenv("TOCOM_EXPORT_CACHE", str(here / "file"))
    monkeypatch.setattr("tocom_export.engines.bench.picking.time_bundle", None)
    fails("bench", zero, "--pick", says=("can't be written",))
