from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tocom_export.engines.tensorrt import trtexec
from tocom_export.errors import InputError, PlanError

PLAN, TIMES, PROFILE = Path("b/r08.plan"), Path("t.json"), Path("p.json")


def test_the_line_for_10(make_spec):
    line = trtexec.bench_line(PLAN, make_spec(), 32, 10, TIMES)
    assert " ".join(line) == (
        "trtexec --loadEngine=b/r08.plan --shapes=images:32x3x56x56 --noDataTransfers "
        "--useCudaGraph --useSpinWait --warmUp=500 --duration=3 --exportTimes=t.json"
    )


def test_the_line_for_11(make_spec):
    line = trtexec.bench_line(PLAN, make_spec(image_size=[24, 40]), 1, 11, TIMES, PROFILE)
    assert " ".join(line) == (
        "trtexec --loadEngine=b/r08.plan --shapes=images:1x3x24x40 --warmUp=500 --duration=3 "
        "--exportTimes=t.json --separateProfileRun --exportProfile=p.json"
    )


def test_the_line_for_a_version_compatible_plan(make_spec):
    """trtexec lets such a plan's code run only where it is told that it is one."""
    line = trtexec.bench_line(PLAN, make_spec(), 1, 11, TIMES, host_code=True)
    assert line[3] == "--versionCompatible"


@pytest.mark.parametrize("major, typed", [(10, " --stronglyTyped"), (11, "")])
def test_the_line_that_builds(make_spec, major: int, typed: str):
    line = trtexec.build_line(Path("r08.onnx"), Path("r08.plan"), make_spec(), (1, 8, 32), major)
    assert " ".join(line) == (
        "trtexec --onnx=r08.onnx --saveEngine=r08.plan --minShapes=images:1x3x56x56 "
        "--optShapes=images:8x3x56x56 --maxShapes=images:32x3x56x56"
        f"{typed} --noTF32 --profilingVerbosity=detailed --skipInference"
    )


def test_the_line_that_builds_for_later_versions_and_other_gpus(make_spec):
    files = (Path("r08.onnx"), Path("r08.plan"))
    flags = {"version_compatible": True, "hardware_compatible": True}
    line = trtexec.build_line(*files, make_spec(), (1, 8, 32), 11, **flags)
    assert {"--versionCompatible", "--hardwareCompatibilityLevel=ampere+"} <= {*line}


def entry(start: float, compute: float) -> dict[str, float]:
    """One run, as trtexec writes it without copies."""
    end = start + compute
    return {
        "startEnqMs": start - 0.1, "endEnqMs": start, "startH2dMs": start, "endH2dMs": start,
        "startComputeMs": start, "endComputeMs": end, "startD2hMs": end, "endD2hMs": end,
        "h2dMs": 0, "computeMs": compute, "d2hMs": 0, "latencyMs": compute, "endToEndMs": compute,
    }  # fmt: skip


def test_times(tmp_path: Path):
    warm = [entry(start, 50.0) for start in (0, 100, 499)]
    runs = [entry(500 + 4 * i, 2.0 + (i == 7)) for i in range(100)]
    file = tmp_path / "times.json"
    file.write_text(json.dumps([*warm, *runs]))
    timing = trtexec.read_times(file, 8)
    assert (timing.batch, timing.runs, timing.median_ms) == (8, 100, 2.0)
    assert 2.0 < timing.p99_ms <= 3.0
    assert timing.images_per_s == pytest.approx(8 * 100 / 0.398)


def test_a_profile(tmp_path: Path):
    file = tmp_path / "profile.json"
    file.write_text(
        '[\n  { "count" : 20 }\n'
        ', { "name" : "a", "timeMs" : 10, "averageMs" : 0.5, "percentage" : 25 }\n'
        ', { "name" : "b", "timeMs" : 30, "averageMs" : 1.5, "percentage" : 75 }\n]\n'
    )
    slowest, other = trtexec.read_profile(file)
    assert (slowest.name, slowest.average_ms, slowest.share) == ("b", 1.5, 75)
    assert other.name == "a"


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"name": "a"}]', '[{"startComputeMs": "x"}]'])
def test_reports_that_are_none(tmp_path: Path, text: str):
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"report\.json is no report"):
        trtexec.read_times(file, 1)
    if "startComputeMs" not in text:
        with pytest.raises(InputError, match=r"report\.json is no profile"):
            trtexec.read_profile(file)


def test_a_report_without_runs(tmp_path: Path):
    file = tmp_path / "times.json"
    file.write_text(json.dumps([entry(10, 1.0)]))
    with pytest.raises(InputError, match="holds no run after 500 ms"):
        trtexec.read_times(file, 1)
    with pytest.raises(InputError, match="can't be read"):
        trtexec.read_times(tmp_path / "none.json", 1)


@pytest.mark.parametrize(
    "banner, major",
    [("&&&& RUNNING TensorRT.trtexec [TensorRT v101303] [b1]", 10),
     ("[TensorRT v110300]", 11), ("[TensorRT v8601]", 8), ("nothing", 10)],
)  # fmt: skip
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_trtexec_on_the_path(tmp_path: Path, monkeypatch, banner: str, major: int):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trtexec.find() is None
    program = tmp_path / "trtexec"
    program.write_text(f"#!/bin/sh\necho '{banner}'\n")
    program.chmod(0o755)
    assert trtexec.find() == (program, major)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_run_that_fails(tmp_path: Path):
    program = tmp_path / "trtexec"
    program.write_text(
        "#!/bin/sh\necho '[11/22/2026-10:00:00] [E] Out of memory'\n"
        "echo '[11/22/2026-10:00:00] [E] Engine could not be loaded'\nexit 1\n"
    )
    program.chmod(0o755)
    with pytest.raises(PlanError, match=r"trtexec --x: Out of memory$"):
        trtexec.run([str(program), "--x"])
    trtexec.run([sys.executable, "-c", "pass"])
