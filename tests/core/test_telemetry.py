from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
