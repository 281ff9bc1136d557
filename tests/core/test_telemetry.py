from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tocom_export.bundle.writing import write_bundle
from tocom_export.io.telemetry import decline_telemetry

USE = """
from tocom_export.io.telemetry import decline_telemetry
decline_telemetry()
import onnxruntime, openvino, nncf
openvino.convert_model
onnxruntime.get_available_providers()
"""


def test_nothing_is_kept_of_the_use(tmp_path: Path):
    """Neither a client's number nor a count, from which what is sent would be made."""
    pytest.importorskip("nncf")
    unset = ("CI", "TF_BUILD", "NNCF_CI", "NNCF_DEV", "ORT_DISABLE_TELEMETRY")
    there = {name: value for name, value in os.environ.items() if name not in unset}
    line = [sys.executable, "-c", USE]
    done = subprocess.run(line, env=there | {"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_what_the_user_chose_stands(monkeypatch: pytest.MonkeyPatch):
    chosen = object()
    monkeypatch.setitem(sys.modules, "openvino_telemetry", chosen)  # type: ignore[arg-type]
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    decline_telemetry()
    assert sys.modules["openvino_telemetry"] is chosen
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"


OPEN = """
import sys
from tocom_export import Bundle
for backend in ("onnx", "openvino"):
    Bundle.open(sys.argv[1]).engine("r08", backend=backend)
"""


def test_engines_keep_nothing_of_their_use(tmp_path: Path, make_blueprint):
    pytest.importorskip("openvino")
    home = tmp_path / "home"
    home.mkdir()
    write_bundle(make_blueprint(tmp_path), tmp_path / "bundle")
    unset = ("CI", "TF_BUILD", "ORT_DISABLE_TELEMETRY")
    there = {name: value for name, value in os.environ.items() if name not in unset}
    there |= {"HOME": str(home), "TOCOM_EXPORT_CACHE": str(tmp_path / "cache")}
    line = [sys.executable, "-c", OPEN, str(tmp_path / "bundle")]
    done = subprocess.run(line, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(home.iterdir())
