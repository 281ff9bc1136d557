"""NVIDIA's two libraries, as far as they are installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tocom_export.engines.tensorrt.library import open_library
from tocom_export.errors import MissingPackageError, PlanError


@pytest.mark.parametrize("version", ["8.6.1", "12.0.0", "unknown"])
def test_a_version_that_is_not_known(nvidia, version: str):
    nvidia.trt.__version__ = version
    with pytest.raises(PlanError, match=rf"tensorrt {version} is installed; 10\.0 to 11\.x"):
        open_library("tensorrt")


def test_rtx_before_what_we_use(nvidia):
    nvidia.rtx.__version__ = "1.6.0.5"
    with pytest.raises(PlanError, match=r"tensorrt_rtx 1\.6\.0\.5 is installed; 1\.7 to 1\.x"):
        open_library("tensorrt-rtx")


@pytest.mark.parametrize(
    "content, says",
    [
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("raise OSError('libnvinfer.so.10: no such file')", "libnvinfer.so.10: no such file"),
        ("raise ImportError('libcudart.so.13: not found')", "libcudart.so.13: not found"),
    ],
)
def test_a_library_that_can_t_be_loaded(tmp_path: Path, monkeypatch, content: str, says: str):
    (tmp_path / "tensorrt.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(PlanError, match="tensorrt is installed, but can't be loaded") as caught:
        open_library("tensorrt")
    assert says in str(caught.value)
    assert "pip install --force-reinstall 'tocom-export[tensorrt]'" in str(caught.value)


@pytest.mark.parametrize("library, extra", [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_a_library_that_is_not_installed(monkeypatch, library: Any, extra: str):
    monkeypatch.setitem(sys.modules, library.replace("-", "_"), None)
    with pytest.raises(MissingPackageError, match=rf"pip install 'tocom-export\[{extra}\]'"):
        open_library(library)


def test_messages_of_the_library(nvidia):
    told: list[str] = []
    library = open_library("tensorrt", told.append)
    library.logger.log("INFO", "fine")
    library.logger.log("VERBOSE", "too much")
    library.logger.log("ERROR", "not\n  fine.")
    assert told == ["fine"]
    assert library.reason("nothing") == "not fine"
    open_library("tensorrt").logger.log("WARNING", "slow")  # as an engine does that is opened
    assert told == ["fine", "slow"]
