"""A cache of the tests' own, and OpenVINO where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tocom_export.engines.openvino.library import open_core

pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled models are kept."""
    monkeypatch.setenv("TOCOM_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


@pytest.fixture(scope="session")
def has_bf16() -> bool:
    """Whether this processor computes in bfloat16."""
    return "BF16" in open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
