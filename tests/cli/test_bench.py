from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tocom_export.bundle import MANIFEST, Bundle
from tocom_export.engines.plan import PlanRecord, open_plan, save_plan

Run = Callable[..., Result]
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
    assert "no engine at degree 0" in succeeds("bench", bundle, "--batch", 1, *QUICK).stderr


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
        "bench", planned, *options, "--seconds", 0.5, "--layers"
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
    ],
)
def test_plans_that_trtexec_can_t_run(
    fails: Run, planned: Path, here: Path, monkeypatch, change, says
):
    program = here / "trtexec"
    program.write_text(TRTEXEC.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(here))
    content, record = open_plan(planned / "r08.plan")
    save_plan(planned / "r08.plan", content, dataclasses.replace(record, **change))
    fails("bench", planned, "--runner", "trtexec", "--targets", 8, says=says)
