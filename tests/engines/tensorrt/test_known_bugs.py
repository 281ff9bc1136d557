"""Versions of TensorRT that are known to be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.known_bugs import explain_doubt
from tocom_export.engines.tensorrt.library import open_library
from tocom_export.errors import PlanError


@pytest.mark.parametrize("refit", ["qkv", "all"])
@pytest.mark.parametrize("version", ["11.3.0.99", "11.3.1"])
def test_refits_of_11_3_are_refused(nvidia, bundle: Bundle, version: str, refit: Any):
    nvidia.trt.__version__ = version
    says = rf"`refit` {refit}: TensorRT 11\.3 may lose the bias .*install 11\.4, or .* identical"
    with pytest.raises(PlanError, match=says):
        build_plan(open_library("tensorrt"), bundle, bundle.variant(8), PlanOptions(refit))
    assert nvidia.trt.asked == []  # said before any work


@pytest.mark.parametrize("refit", ["identical", "none"])
def test_what_11_3_does_right(nvidia, bundle: Bundle, refit: Any):
    nvidia.trt.__version__ = "11.3.0.99"
    _, record = build_plan(open_library("tensorrt"), bundle, bundle.variant(8), PlanOptions(refit))
    assert record.version == "11.3.0.99"


@pytest.mark.parametrize("version", ["10.16.1.11", "11.2.1.2", "11.4.0.106"])
def test_versions_beside_it(nvidia, bundle: Bundle, version: str):
    nvidia.trt.__version__ = version
    assert build_plan(open_library("tensorrt"), bundle, bundle.variant(8), PlanOptions())


@pytest.mark.parametrize(
    "version, doubted",
    [("10.2.0", False), ("10.3.0", True), ("10.3.0.30", True), ("10.4.0", True), ("10.5.0", False)],
)
def test_versions_of_which_wrong_vits_were_reported(nvidia, version: str, doubted: bool):
    nvidia.trt.__version__ = version
    why = explain_doubt(open_library("tensorrt"))
    assert bool(why) == doubted
    if why:
        assert why.startswith(f"TensorRT {version}: wrong ViTs")
        assert "tocom-export verify" in why


def test_tensorrt_rtx_has_numbers_of_its_own(nvidia):
    nvidia.rtx.__version__ = "1.7.1.116"
    assert explain_doubt(open_library("tensorrt-rtx")) is None
