"""Models by the names that timm gives to folders, on this machine and on the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tocom_export.errors import (
    CheckpointError,
    InputError,
    MissingPackageError,
    UnknownModelError,
)
from tocom_export.loading import load_model, load_spec
from tocom_export.model.catalogue import known_model
from tocom_export.model.preprocess import Preprocess

TINY = "vit_tiny_patch16_224"
SPEC = replace(known_model(TINY)[0], depth=1, image_size=(32, 32), classes=3)
CONFIG = {
    "architecture": TINY, "model_args": {"depth": 1, "img_size": 32},
    "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "crop_pct": 1.0},
}  # fmt: skip
STATISTICS = Preprocess((0.1, 0.2, 0.3), (0.5,) * 3)


def fill(folder: Path) -> Path:
    """Write a model of timm's."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in SPEC.weights().items()}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("source", ["local-dir", "Local-Dir"])
def test_a_folder_here(tmp_path: Path, source: str):
    name = f"{source}:{fill(tmp_path / 'a @ b#c')}"
    opened = load_model(name)
    assert (opened.spec, opened.preprocess) == (SPEC, STATISTICS)
    assert opened.preprocess_from == f"by the config.json of {name}"
    assert load_spec(name) == (SPEC, STATISTICS)
    with pytest.raises(InputError, match="brings its weights along; leave `checkpoint` out"):
        load_model(name, tmp_path / "weights.safetensors")


def test_nothing_is_downloaded_for_naught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(InputError, match="hf-hub:me/birds brings its weights along; leave `checkp"):
        load_model("hf-hub:me/birds", "x.safetensors")


def test_a_folder_in_place_of_a_name(tmp_path: Path):
    with pytest.raises(
        UnknownModelError, match="is a folder; give it as `checkpoint`, without `mo"
    ):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("s3:bucket", "`model` s3:bucket: hf-hub:OWNER/NAME and local-dir:PATH are known"),
        ("hf-hub:", "`model` hf-hub:: hf-hub:OWNER/NAME"),
        ("timm/vit", "`model` timm/vit: hf-hub:timm/vit is .* hub, local-dir:timm/vit a folder"),
    ],
)
def test_names_that_stand_for_nothing(name: str, says: str):
    for ask in (load_model, load_spec):
        with pytest.raises(UnknownModelError, match=says):
            ask(name)


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"none: no such file"):
        load_model(f"local-dir:{tmp_path / 'none'}")
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        load_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["hf-hub:me/birds@v2", "hf_hub:me/birds@v2"])
def test_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str):
    asked: list[Any] = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(fill(tmp_path / "snapshot"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    opened = load_model(name)
    assert (opened.spec, opened.preprocess_from) == (SPEC, f"by the config.json of {name}")
    ((repository, revision, patterns),) = asked
    assert (repository, revision) == ("me/birds", "v2")
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {*patterns}
    assert "pytorch_model.bin" not in patterns


def test_pickled_weights_are_fetched_where_there_are_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    torch = pytest.importorskip("torch")

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        tmp_path.joinpath("config.json").write_text(json.dumps(CONFIG))
        if "pytorch_model.bin" in allow_patterns:
            state = {name: torch.zeros(shape) for name, shape in SPEC.weights().items()}
            torch.save(state, tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_model("hf-hub:me/birds").spec == SPEC


def test_a_repository_without_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_model("hf-hub:me/birds")


def test_the_hubs_package_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"huggingface_hub, which .* is not installed"):
        load_model("hf-hub:me/birds")


def test_offline(tmp_path: Path):
    """What lies in the hub's cache is taken; of another the one line says what to do."""
    commit = "a" * 40
    place = tmp_path / "hub" / "models--me--birds"
    fill(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    run = [sys.executable, "-m", "tocom_export", "build", "--bank", "none", "--dry-run", "--model"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def build(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*run, name], env=environment, capture_output=True, text=True)

    found = build("hf-hub:me/birds")
    assert found.returncode == 0, found.stderr
    assert "by the config.json of hf-hub:me/birds" in found.stderr
    missing = build("hf-hub:me/others")
    assert missing.returncode == 2
    (line,) = missing.stderr.splitlines()
    assert "--model hf-hub:me/others can't be downloaded" in line
    assert "give a folder with its config.json and model.safetensors as --checkpoint" in line
    assert "'hf download me/others'" in line
