from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.onnx.engine import OnnxEngine

Run = Callable[..., Result]


def test_the_five_likeliest_classes(succeeds: Run, bundle: Path, photos: Path):
    files = [photos / "a" / "0.png", photos / "b" / "3.png"]
    document = json.loads(succeeds("run", bundle, "--target", "8", *files, "--json").stdout)
    assert (document["bundle"], document["target"]) == (str(bundle), 8)
    assert [image["image"] for image in document["images"]] == [str(file) for file in files]

    opened = Bundle.open(bundle)
    logits = OnnxEngine(opened, 8).run(opened.preprocess.load_batch(files, (32, 32)))
    for image, row in zip(document["images"], logits.astype(float), strict=True):
        shares = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-row)[:5]
        assert [top["index"] for top in image["top5"]] == order.tolist()
        assert [top["class"] for top in image["top5"]] == [
            f"class-{'abcdefghij'[i]}" for i in order
        ]
        np.testing.assert_allclose([t["probability"] for t in image["top5"]], shares[order])


def test_the_table(succeeds: Run, bundle: Path, photos: Path):
    result = succeeds("run", bundle, "--target", "8", photos / "a" / "0.png")
    document = succeeds("run", bundle, "--target", "8", photos / "a" / "0.png", "--json")
    assert "tiny at degree 8" in result.stdout
    assert result.stdout.count("class-") == 5
    (image,) = json.loads(document.stdout)["images"]
    rows = [line for line in result.stdout.splitlines() if "class-" in line]
    for row, top in zip(rows, image["top5"], strict=True):
        assert row.split()[-3:] == [top["class"], f"{100 * top['probability']:.1f}", "%"]
    assert rows[0].startswith("0.png")


def test_targets_answer_differently(succeeds: Run, bundle: Path, photos: Path):
    one, other = (
        json.loads(succeeds("run", bundle, "--target", t, photos / "a" / "0.png", "--json").stdout)
        for t in (4, 8)
    )
    assert one["images"] != other["images"]


def test_classes_without_names(succeeds: Run, bundle: Path, photos: Path):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "classes": None}))
    result = succeeds("run", bundle, "--target", "8", photos / "a" / "0.png", "--json")
    (image,) = json.loads(result.stdout)["images"]
    assert all(top["class"] == f"class {top['index']}" for top in image["top5"])


@pytest.mark.parametrize(
    "target, says", [("12", "it has 4, 8"), ("17", "--target"), ("x", "--target")]
)
def test_a_target_that_the_bundle_lacks(fails: Run, bundle: Path, target: str, says: str):
    fails("run", bundle, "--target", target, "any.png", says=(says, target))


def test_no_target(fails: Run, bundle: Path):
    fails("run", bundle, "any.png", says=("--target",))


def test_no_image(fails: Run, bundle: Path):
    fails("run", bundle, "--target", "8", says=("IMAGE",))


def test_an_image_that_is_not_there(fails: Run, bundle: Path):
    fails("run", bundle, "--target", "8", "none.png", says=("none.png", "no such file"))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_an_image_that_is_none(fails: Run, bundle: Path, photos: Path, here: Path, content: bytes):
    (here / "broken.png").write_bytes(content)
    files = (photos / "a" / "0.png", "broken.png")
    fails("run", bundle, "--target", "8", *files, says=("broken.png", "is not an image"))


def test_a_truncated_image(fails: Run, bundle: Path, photos: Path, here: Path):
    content = (photos / "a" / "0.png").read_bytes()
    (here / "half.png").write_bytes(content[: len(content) // 2])
    fails("run", bundle, "--target", "8", "half.png", says=("half.png", "is not an image"))


def test_a_provider_that_is_not_there(
    fails: Run, bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    options = ("--target", "8", "--provider", "cuda", photos / "a" / "0.png")
    fails("run", bundle, *options, says=("--provider cuda", "has cpu", "onnxruntime-gpu"))


def test_without_onnxruntime(
    fails: Run, bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    says = ("onnxruntime is not installed", "pip install 'tocom-export[cpu]'")
    fails("run", bundle, "--target", "8", photos / "a" / "0.png", says=says)


@pytest.mark.parametrize("name", ["none", "file"])
def test_no_bundle(fails: Run, here: Path, name: str):
    (here / "file").touch()
    fails("run", name, "--target", "8", "any.png", says=(name, "is not a bundle"))
