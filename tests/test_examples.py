"""What can be seen of the examples for containers without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "examples" / "triton"
PAGE = (ROOT / "docs" / "triton.md").read_text("utf-8")


def read(name: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((PLACE / name).read_text("utf-8"))


def test_compose():
    triton = read("compose.yaml")["services"]["triton"]
    recipe = triton["build"]["dockerfile_inline"]
    assert (PLACE / triton["build"]["context"]).resolve() == ROOT
    (tag,) = re.findall(r"^FROM nvcr.io/nvidia/tritonserver:([\d.]+)-py3$", recipe, re.M)
    assert triton["image"].endswith(f":{tag}")
    assert f"Triton {tag}" in PAGE
    assert "numpy<2" in recipe
    (volume,) = triton["volumes"]
    assert f"--model-repository={volume.split(':')[1]}" in triton["command"]
    assert triton["shm_size"] == "1gb"


def test_inference_service():
    document = read("inference-service.yaml")
    assert (document["apiVersion"], document["kind"]) == (
        "serving.kserve.io/v1beta1", "InferenceService"
    )  # fmt: skip
    predictor = document["spec"]["predictor"]
    image = read("compose.yaml")["services"]["triton"]["image"]
    assert predictor["model"]["image"].endswith(f"/{image}")
    mounted = [mount["name"] for mount in predictor["model"]["volumeMounts"]]
    assert mounted == [volume["name"] for volume in predictor["volumes"]]


def test_both_are_told_of():
    for file in PLACE.iterdir():
        assert f"(../examples/triton/{file.name})" in PAGE
