from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.engines.onnx.engine import OnnxEngine

Run = Callable[..., Result]


def test_the_five_likeliest_classes(succeeds: Run, bundle: Path, photos: Path):
    files = [photos / "a" / "0.png", photos / "b" / "3.png"]
    document = json.loads(succeeds("run", bundle, "--variant", "r08", *files, "--json").stdout)
    assert document["bundle"] == str(bundle)
    assert [image["file"] for image in document["images"]] == [str(file) for file in files]
    assert {image["variant"] for image in document["images"]} == {"r08"}

    opened = Bundle.open(bundle)
    logits = OnnxEngine(opened, 8).run(opened.preprocess.load_batch(files, (32, 32)))
    for image, row in zip(document["images"], logits.astype(float), strict=True):
        shares = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-row)[:5]
        assert [top["index"] for top in image["classes"]] == order.tolist()
        assert [top["name"] for top in image["classes"]] == [
            f"class-{'abcdefghij'[i]}" for i in order
        ]
        np.testing.assert_allclose([t["probability"] for t in image["classes"]], shares[order])


def test_as_many_classes_as_are_asked_for(succeeds: Run, bundle: Path, photos: Path):
    options = (bundle, "--variant", "r08", photos / "a" / "0.png", "--json")
    five, three, all_of_them = (
        json.loads(succeeds("run", *options, *more).stdout)["images"][0]["classes"]
        for more in ((), ("--top-k", 3), ("--top-k", 99))
    )
    assert five[:3] == three
    assert all_of_them[:5] == five
    assert len(all_of_them) == 10
    assert sum(top["probability"] for top in all_of_them) == pytest.approx(1)


def test_a_bare_degree(succeeds: Run, bundle: Path, photos: Path):
    named, bare = (
        succeeds("run", bundle, "--variant", variant, photos / "a" / "0.png", "--json").stdout
        for variant in ("r08", 8)
    )
    assert named == bare


def test_the_table(succeeds: Run, bundle: Path, photos: Path):
    result = succeeds("run", bundle, "--variant", "r08", photos / "a" / "0.png")
    document = succeeds("run", bundle, "--variant", "r08", photos / "a" / "0.png", "--json")
    assert "tiny, r08" in result.stdout
    assert result.stdout.count("class-") == 5
    (image,) = json.loads(document.stdout)["images"]
    rows = [line for line in result.stdout.splitlines() if "class-" in line]
    for row, top in zip(rows, image["classes"], strict=True):
        assert row.split()[-3:] == [top["name"], f"{100 * top['probability']:.1f}", "%"]
    assert rows[0].startswith(str(photos / "a" / "0.png"))


def test_variants_answer_differently(succeeds: Run, bundle: Path, photos: Path):
    one, other = (
        json.loads(succeeds("run", bundle, "--variant", v, photos / "a" / "0.png", "--json").stdout)
        for v in ("r04", "r08")
    )
    assert one["images"][0]["classes"] != other["images"][0]["classes"]


def test_classes_without_names(succeeds: Run, bundle: Path, photos: Path):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "classes": None}))
    result = succeeds("run", bundle, "--variant", "r08", photos / "a" / "0.png", "--json")
    (image,) = json.loads(result.stdout)["images"]
    assert all(top["name"] == f"class {top['index']}" for top in image["classes"])


@pytest.mark.parametrize("variant", ["12", "17", "r12", "x", "R08", "-1"])
def test_a_variant_that_the_bundle_lacks(fails: Run, bundle: Path, variant: str):
    says = (f"{bundle} has no variant {variant}", "it has r04, r08")
    fails("run", bundle, "--variant", variant, "any.png", says=says)


def test_no_image(fails: Run, bundle: Path):
    fails("run", bundle, "--variant", "r08", says=("IMAGE",))


def test_an_image_that_is_not_there(fails: Run, bundle: Path):
    fails("run", bundle, "--variant", "r08", "none.png", says=("none.png", "no such file"))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_an_image_that_is_none(fails: Run, bundle: Path, photos: Path, here: Path, content: bytes):
    (here / "broken.png").write_bytes(content)
    files = (photos / "a" / "0.png", "broken.png")
    result = fails("run", bundle, "--variant", "r08", *files, says=("broken.png is not an image",))
    assert result.stdout.count("class-") == 5
    assert "broken" not in result.stdout


@pytest.mark.parametrize("runtime", [(), ("--backend", "openvino")])
def test_the_other_images_are_answered(
    run: Run, succeeds: Run, bundle: Path, photos: Path, here: Path, runtime: tuple[str, ...]
):
    """Also where a whole batch can't be read; the array keeps their places."""
    if runtime:
        pytest.importorskip("openvino")
    options = ("run", bundle, *runtime, "--json", "--output", "logits", "all")
    wanted = json.loads(succeeds(*options, photos).stdout)["images"]
    logits = np.load(here / "all.npy")
    for number in range(16):
        (photos / "a" / f"none{number:02d}.png").write_bytes(b"no image")
    result = run(*options, "-q", photos, "nowhere.png")
    assert result.exit_code == 2
    broken = [str(photos / "a" / f"none{number:02d}.png") for number in range(16)]
    wrong = [f"{file} is not an image that can be read." for file in broken]
    wrong.append("nowhere.png: no such file.")
    assert result.stderr.splitlines() == [f"Error: {line}" for line in wrong]
    images = json.loads(result.stdout)["images"]
    assert [image for image in images if "error" in image] == [
        {"file": file, "error": line}
        for file, line in zip([*broken, "nowhere.png"], wrong, strict=True)
    ]
    assert [image["file"] for image in images] == [
        *(str(photos / "a" / f"{number}.png") for number in range(6)), *broken,
        *(str(photos / "b" / f"{number}.png") for number in range(6)), "nowhere.png",
    ]  # fmt: skip
    for image, expected in zip((i for i in images if "classes" in i), wanted, strict=True):
        assert image["file"] == expected["file"]
        assert image["classes"][0]["name"] == expected["classes"][0]["name"]
    found = np.load(here / "all.npy")
    assert (found.dtype, found.shape) == (np.float32, (29, 10))
    bad = [index for index, image in enumerate(images) if "error" in image]
    assert np.isnan(found[bad]).all()
    np.testing.assert_allclose(np.delete(found, bad, 0), logits, rtol=0, atol=1e-4)


def test_where_none_can_be_read(run: Run, bundle: Path, here: Path):
    (here / "broken.png").write_bytes(b"no image")
    result = run("run", bundle, "broken.png", "nowhere.png", "--output", "logits", "x", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("Error: ") == 2
    assert not (here / "x.npy").exists()


def test_a_truncated_image(fails: Run, bundle: Path, photos: Path, here: Path):
    content = (photos / "a" / "0.png").read_bytes()
    (here / "half.png").write_bytes(content[: len(content) // 2])
    fails("run", bundle, "--variant", "r08", "half.png", says=("half.png", "is not an image"))


def test_a_device_that_is_not_there(
    fails: Run, bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    options = ("--variant", "r08", "--device", "cuda", photos / "a" / "0.png")
    fails("run", bundle, *options, says=("--device cuda", "has cpu", "onnxruntime-gpu"))


def test_without_a_runtime(fails: Run, bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    says = ("onnxruntime is not installed", "pip install 'tocom-export[cpu]'")
    fails("run", bundle, "--variant", "r08", photos / "a" / "0.png", says=says)


@pytest.mark.parametrize("name", ["none", "file"])
def test_no_bundle(fails: Run, here: Path, name: str):
    (here / "file").touch()
    fails("run", name, "--variant", "r08", "any.png", says=(name, "is not a bundle"))


def test_without_a_variant_it_is_the_one_of_the_most_macs(
    succeeds: Run, bundle: Path, photos: Path
):
    document = json.loads(succeeds("run", bundle, photos / "a" / "0.png", "--json").stdout)
    assert document["images"][0]["variant"] == "r04"


def test_another_backend(succeeds: Run, bundle: Path, photos: Path):
    pytest.importorskip("openvino")
    file = photos / "a" / "0.png"
    options = ("--backend", "openvino", "--inference-precision", "f32", "--threads", 1)
    found = json.loads(succeeds("run", bundle, file, *options, "--json").stdout)
    wanted = json.loads(succeeds("run", bundle, file, "--json").stdout)
    assert found["engine"].startswith("OpenVINO 20")
    assert found["engine"].endswith(", fp32")
    assert wanted["engine"].startswith("ONNX Runtime 1.")
    for ours, theirs in zip(
        found["images"][0]["classes"], wanted["images"][0]["classes"], strict=True
    ):
        assert ours["name"] == theirs["name"]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "openvino", "--device", "npu"), "--device NPU: OpenVINO 20"),
        (
            ("--backend", "onnx", "--inference-precision", "bf16"),
            "--inference-precision is for --backend openvino.",
        ),
        (("--device", "tpu", "--backend", "onnx"), "--device 'tpu': it is cpu, cuda, tensorrt"),
    ],
)
def test_what_a_backend_lacks(fails: Run, bundle: Path, photos: Path, options, message: str):
    pytest.importorskip("openvino")
    fails("run", bundle, photos / "a" / "0.png", *options, says=(message,))


def test_a_folder_and_the_array(succeeds: Run, bundle: Path, photos: Path, here: Path):
    """Twelve images, in the order of their names, and their logits."""
    result = succeeds("run", bundle, photos, "--output", "logits", "all", "--json")
    files = [image["file"] for image in json.loads(result.stdout)["images"]]
    assert files == sorted(str(file) for file in photos.rglob("*.png"))
    logits = np.load(here / "all.npy")
    opened = Bundle.open(bundle)
    wanted = OnnxEngine(opened, opened.by_cost()[0]).run(
        opened.preprocess.load_batch(files, (32, 32))
    )
    assert (logits.dtype, logits.shape) == (np.float32, (12, 10))
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
    assert "Wrote all.npy: 12 × 10 float32." in result.stderr


def test_no_more_than_a_batch_is_in_memory(
    succeeds: Run, bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    batches = []
    run = OnnxEngine.run_all

    def watch(self: OnnxEngine, images: np.ndarray) -> dict[str, np.ndarray]:
        batches.append(len(images))
        return run(self, images)

    monkeypatch.setattr(OnnxEngine, "run_all", watch)
    succeeds("run", bundle, "--backend", "onnx", photos, photos, photos)
    assert batches == [16, 16, 4]


def test_stdin(bundle: Path, photos: Path):
    image = (photos / "a" / "0.png").read_bytes()
    words = [sys.executable, "-m", "tocom_export", "run", str(bundle), "-", "--json"]
    done = subprocess.run(words, input=image, capture_output=True)
    (found,) = json.loads(done.stdout)["images"]
    assert found["file"] == "-"
    assert len(found["classes"]) == 5
    done = subprocess.run(words, input=b"nothing", capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"Error: stdin is not an image that can be read.\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with names")
def test_a_pipe_is_not_waited_for(fails: Run, bundle: Path, here: Path):
    os.mkfifo(here / "pipe.png")
    fails("run", bundle, "pipe.png", says=("pipe.png is not an image that can be read",))


@pytest.mark.parametrize("name", ["r08.onnx", "weights.safetensors", "manifest.json"])
def test_hashes_where_they_are_asked_for(
    succeeds: Run, fails: Run, bundle: Path, photos: Path, damage: Callable[..., None], name: str
):
    options = ("run", bundle, photos / "a" / "0.png", "--check-hashes")
    succeeds(*options)
    if name == "manifest.json":
        file = bundle / name
        file.write_text(file.read_text().replace("class-a", "class-A"))
    else:
        damage(bundle / name)
    fails(*options, says=(name, "SHA-256"))


def test_a_model_without_a_head(
    succeeds: Run, make_checkpoint: Callable, make_spec: Callable, make_bank: Callable,
    photos: Path, here: Path,
):  # fmt: skip
    spec = make_spec(model="tiny", image_size=[32, 32], classes=0)
    checkpoint = make_checkpoint(here, spec, metadata=to_metadata(ModelInfo(spec)))
    succeeds("build", "--checkpoint", checkpoint, "--bank", "none", "--targets", "0", "--out", "b")
    photo = photos / "a" / "0.png"
    result = succeeds("run", "b", photo)
    assert result.stdout.splitlines()[1].split() == ["image", "channels", "length"]
    assert result.stdout.splitlines()[2].split()[:2] == [str(photo), "64"]
    assert "The model has no classes" in result.stderr
    (found,) = json.loads(succeeds("run", "b", photo, "--json").stdout)["images"]
    assert len(found["embedding"]) == 64
    assert "classes" not in found
