"""The whole way: a model and some variants in, a checked bundle out; or nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tocom_export.bundle.manifest import MANIFEST, WEIGHTS
from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bake import bake
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.compression.method import Method
from tocom_export.compression.rules import list_degrees
from tocom_export.engines.verify import Comparison
from tocom_export.errors import (
    BankError,
    CheckFailed,
    CheckpointError,
    DegreeError,
    InputError,
    MissingPackageError,
    OutputError,
)
from tocom_export.exporting import check_write, export, write
from tocom_export.model.catalogue import REFERENCE, REFERENCE_BANKS, REFERENCE_CHECKPOINT
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.preparing import default_out, prepare
from tocom_export.variant import Variant


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(depth=3, width=32, mlp_width=48, classes=3)


@pytest.fixture(scope="module")
def bank(make_bank: Callable[..., ToComBank], spec: VitSpec) -> ToComBank:
    return make_bank(spec)


@pytest.fixture
def checkpoint(tmp_path: Path, make_weights: Callable[..., Any], spec: VitSpec) -> Path:
    """Of degree 4, with everything that a file can say."""
    classes, preprocess = ("cat", "dog", "owl"), Preprocess(crop_pct=0.9)
    info = ModelInfo(spec, 4, Method("tome"), classes, preprocess)
    (tmp_path / "inputs").mkdir()
    file = tmp_path / "inputs" / "weights.safetensors"
    save_file(make_weights(spec), file, to_metadata(info))
    return file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "bundle"


@pytest.fixture
def nothing_left(out: Path) -> Iterator[None]:
    """Neither a bundle nor a half of one."""
    yield
    assert not list(out.parent.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_model_inside_the_package(out: Path):
    bundle = export(out=out, targets=(0, 16), verify=False)
    assert bundle == Bundle.open(out, hashes=True)
    assert (bundle.spec.model, bundle.method) == (REFERENCE, Method("tome"))
    assert list(bundle.variants) == ["r00", "r16"]
    assert [variant.baked for variant in bundle.variants.values()] == [False, True]
    named = export(
        REFERENCE,
        out.with_name("named"),
        checkpoint=REFERENCE_CHECKPOINT,
        bank=REFERENCE_BANKS["tome"],
        targets=(0, 16),
        source=0,
        method="tome",
        verify=False,
    )
    assert contents(named.path) == contents(out)


def test_degrees_where_none_are_given(out: Path):
    blueprint = prepare()
    assert list(blueprint.variants) == ["r00", "r04", "r08", "r12", "r16"]
    assert default_out(blueprint) == Path("reference-source0")


def test_pruning_takes_the_bank_of_its_method():
    bank = prepare(method="evit").weights.bank
    assert bank is not None
    assert bank.method == Method("evit")


def test_names_and_statistics_that_are_given(checkpoint: Path, out: Path):
    """In place of those in the file, also in what is written."""
    (out.parent.parent / "names.txt").write_text("a\nb\nc\n")
    bundle = export(
        out=out, checkpoint=checkpoint, bank="none", targets=[4], verify=False,
        classes=out.parent.parent / "names.txt", mean=0.5, std=(0.1, 0.2, 0.3), crop_pct=0.8,
        interpolation="bilinear", proportional=False,
    )  # fmt: skip
    statistics = Preprocess((0.5, 0.5, 0.5), (0.1, 0.2, 0.3), 0.8, "bilinear")
    assert (bundle.classes, bundle.preprocess) == (("a", "b", "c"), statistics)
    assert not bundle.method.proportional
    info = Checkpoint.open(bundle.path / WEIGHTS).info
    assert (info.classes, info.preprocess, info.method) == (
        bundle.classes, statistics, bundle.method
    )  # fmt: skip
    with pytest.raises(InputError, match="`classes` names 2 classes, but the head has 3"):
        prepare(checkpoint=checkpoint, bank="none", classes=["a", "b"])


def test_which_weights_and_statistics_are_taken_is_told(tmp_path: Path, checkpoint: Path):
    told: list[str] = []
    prepare(checkpoint=checkpoint, bank="none", tell=told.append)
    statistics = "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop 0.9 (center), bicubic"
    origin = "by the metadata of weights.safetensors"
    assert told == [f"Image statistics: {statistics} ({origin})."]
    told.clear()
    state = {name: torch.from_numpy(t) for name, t in load_file(REFERENCE_CHECKPOINT).items()}
    torch.save({"state_dict": {}, "state_dict_ema": state}, tmp_path / "model.pth")
    prepare(checkpoint=tmp_path / "model.pth", crop_pct=0.7, tell=told.append)
    assert len(told) == 2
    assert "the averaged weights are taken, state_dict_ema" in told[0]
    assert "crop 0.7" in told[1]
    assert "(the reference model's, but `crop_pct` as given)" in told[1]


def test_a_file(checkpoint: Path, bank: ToComBank, spec: VitSpec, out: Path):
    bundle = export(out=str(out), checkpoint=str(checkpoint), bank=bank, targets=[4, 8], scale=0.2)
    assert bundle == Bundle.open(out, hashes=True)
    assert bundle.spec == spec
    assert bundle.classes == ("cat", "dog", "owl")
    assert bundle.preprocess == Preprocess(crop_pct=0.9)
    assert bundle.variants == {
        "r04": Variant("r04", (4,) * 3, (4,) * 3, 4, 0.2, True),
        "r08": Variant("r08", (8,) * 3, (8,) * 3, 4, 0.2, True),
    }
    assert {path.name for path in out.iterdir()} == {
        MANIFEST, WEIGHTS, "r04.onnx", "r08.onnx", "r08.safetensors",
    }  # fmt: skip


def test_where_a_bundle_goes_by_itself(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    bundle = export(checkpoint=checkpoint, bank="none", targets=(8,), verify=False)
    assert bundle.path == Path("small-source4")
    assert Bundle.open(tmp_path / "small-source4", hashes=True).variants == bundle.variants


def test_a_live_model(make_vit: Callable[..., Any], make_images: Callable[..., Any],
                      spec: VitSpec, bank: ToComBank, out: Path):  # fmt: skip
    from tocom_export.training.model import CompressedVit

    vit = make_vit(spec)
    bundle = export(vit, out, bank=bank, targets=(0, 8), source=0)
    written = load_file(out / WEIGHTS)
    for name, tensor in vit.state_dict().items():
        np.testing.assert_array_equal(written[name], tensor.numpy())
    images = make_images(spec, 3)
    for degree in (0, 8):
        own = bundle.tensors(degree)
        vit.load_state_dict({name: torch.from_numpy(np.array(t)) for name, t in own.items()})
        with torch.inference_mode():
            expected = CompressedVit(vit, bundle.method)(torch.from_numpy(images), degree).numpy()
        found = bundle.engine(degree).run(images)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_live_model_without_a_bank(make_vit: Callable[..., Any], spec: VitSpec, out: Path):
    vit = make_vit(spec)
    with pytest.raises(BankError, match="has no bank of its own"):
        export(vit, out)
    bundle = export(vit, out, bank="none", targets=(0, 8), source=8)
    assert [v.compensated or v.baked for v in bundle.variants.values()] == [False, False]
    assert [variant.source for variant in bundle.variants.values()] == [8, 8]


def test_a_degree_per_layer(checkpoint: Path, bank: ToComBank, out: Path):
    schedules = {"fast": (20, 3, 0), "late": [0, 0, 16], "r20": [20] * 3}
    bundle = export(None, out, checkpoint=checkpoint, bank=bank, targets=(), schedules=schedules)
    assert list(bundle.variants) == ["fast", "late", "r20"]
    fast = bundle.variant("fast")
    assert (fast.degrees, fast.targets) == ((20, 3, 0), (16, 16, 11.5))
    assert bundle.variant(20).targets == (16, 16, 16)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert names == sorted([WEIGHTS, "fast.safetensors", "late.safetensors", "r20.safetensors"])
    original, baked = load_file(out / WEIGHTS), load_file(out / "fast.safetensors")
    width = bundle.spec.width
    for layer, target in enumerate(fast.targets):
        name = f"blocks.{layer}.attn.qkv.weight"
        gap_q, gap_v = bank.gap(layer, 4, target, 0.1)
        gap = np.concatenate([gap_q, np.zeros_like(gap_q), gap_v])
        assert gap.shape == (3 * width, width)
        np.testing.assert_allclose(baked[name] - original[name], gap, rtol=0, atol=1e-6)


def test_a_rule_in_place_of_a_list(checkpoint: Path, bank: ToComBank, spec: VitSpec):
    blueprint = prepare(checkpoint=checkpoint, bank=bank, schedules={"fast": "every:2:4"})
    listed = Variant.of(spec, list_degrees(spec, "every:2:4"), "fast", source=4)
    assert blueprint.variants["fast"] == listed


def test_degrees_and_schedules_together(checkpoint: Path, bank: ToComBank):
    blueprint = prepare(
        checkpoint=checkpoint, bank=bank, targets=iter([8, 0]), schedules={"fast": [20, 3, 0]}
    )
    assert list(blueprint.variants) == ["r08", "r00", "fast"]
    plain = prepare(checkpoint=checkpoint, bank=bank, schedules={"fast": [20, 3, 0]})
    assert list(plain.variants) == ["r00", "r04", "r08", "r12", "r16", "fast"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_schedule_in_each_precision(checkpoint: Path, bank: ToComBank, out: Path, precision: Any):
    schedules = {"fast": (20, 3, 0)}
    bundle = export(
        out=out, checkpoint=checkpoint, bank=bank, targets=(), schedules=schedules,
        precision=precision, verify=True,
    )  # fmt: skip
    assert bundle.precision == precision


def test_int8_is_calibrated_on_a_folder(
    checkpoint: Path, bank: ToComBank, out: Path, tmp_path: Path, image_folder: Callable[..., Path]
):
    photos = image_folder(tmp_path / "photos")
    said: list[str] = []
    blueprint = prepare(
        checkpoint=checkpoint, bank=bank, targets=(8,), schedules={"fast": [20, 3, 0]},
        precision="int8",
    )  # fmt: skip
    bundle = write(blueprint, out, calibrate=str(photos), tell=said.append)
    assert bundle == Bundle.open(out, hashes=True)
    assert bundle.precision == "int8"
    assert any("12 images to calibrate on" in line for line in said)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"targets": ()}, "no variant: name a degree in `targets`, or a schedule"),
        ({"targets": (8, 8)}, "r08 is asked for twice"),
        ({"schedules": {"r08": [8] * 3}, "targets": (8,)}, "r08 is asked for twice"),
        ({"schedules": {"a": [8] * 3, "A": [9] * 3}}, "A is asked for twice"),
        ({"targets": (17,)}, "`targets`: degree 17: a bank compensates degrees 0..16; go without"),
        ({"targets": (1_000_001,)}, "`targets`: degree 1000001: 0 to 1000000 is expected"),
        ({"targets": (-1,)}, "degree -1"),
        ({"schedules": {"fast": [8, 8]}}, "`schedules` fast: small has 3 layers"),
        ({"schedules": {"fast": [8, 8, -1]}}, "`schedules` fast: degree -1"),
        ({"schedules": {"fast": "every:0"}}, "`schedules` fast: 'every:0' is not every:K or"),
        (
            {"schedules": {"fast": "8,8,8"}},
            "`schedules` fast: '8,8,8' is no rule; write",
        ),
        ({"schedules": {"fast": "every:2:16"}}, "`schedules` fast: every:2:16: with tokens"),
        ({"schedules": {"r08": [8, 8, 7]}}, "`schedules` r08: r08 is the name of degree 8"),
        ({"schedules": {"weights": [8] * 3}}, "'weights' can't name a variant"),
        ({"schedules": {"": [8] * 3}}, "'' can't name a variant"),
        ({"schedules": {"../x": [8] * 3}}, "'../x' can't name a variant"),
        ({"source": 8}, "`source` 8, but"),
        ({"source": 17}, "`source` 17"),
        ({"scale": -1}, "`scale` -1"),
        ({"scale": float("nan")}, "`scale` nan"),
        ({"method": "evit"}, "`bank`: the bank has method tome"),
        ({"method": "topk"}, "unknown method 'topk'"),
        ({"proportional": False}, "the bank has method tome"),
        ({"model": "deit_tiny_patch16_224"}, "leave `model` out"),
        ({"precision": "int8"}, "`precision` int8 needs `calibrate`"),
        ({"precision": "fp8"}, "`precision` 'fp8': it is fp32, fp16, bf16, int8"),
        ({"calibrate": "photos"}, "`calibrate` is for `precision` int8 alone; this is fp32"),
        ({"precision": "int8", "calibrate": "photos"}, "photos is not a folder"),
    ],
)
def test_what_can_t_be(
    checkpoint: Path, bank: ToComBank, out: Path, choices: dict[str, Any], message: str
):
    with pytest.raises(InputError) as caught:
        export(**{"checkpoint": checkpoint, "bank": bank, "out": out, **choices})
    assert message in str(caught.value)


def test_errors_keep_their_class(checkpoint: Path, bank: ToComBank):
    with pytest.raises(DegreeError):
        prepare(checkpoint=checkpoint, bank=bank, targets=(17,))
    with pytest.raises(DegreeError):
        prepare(checkpoint=checkpoint, bank=bank, schedules={"fast": [8]})
    with pytest.raises(CheckpointError):
        prepare(checkpoint=checkpoint, bank=bank, source=8)


def test_nothing_is_replaced_unasked(checkpoint: Path, out: Path):
    export(out=out, checkpoint=checkpoint, bank="none", targets=(8,), verify=False)
    before = contents(out)
    with pytest.raises(OutputError, match=r"`out` .* exists; add `force`"):
        export(out=out, checkpoint=checkpoint, bank="none", targets=(4,), verify=False)
    assert contents(out) == before
    export(out=out, checkpoint=checkpoint, bank="none", targets=(4,), verify=False, force=True)
    assert list(Bundle.open(out, hashes=True).variants) == ["r04"]
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wrongly_baked_weights_are_found(
    checkpoint: Path, bank: ToComBank, out: Path, monkeypatch: pytest.MonkeyPatch, precision: Any
):
    """The check holds the engines against the model and the bank, not against the bundle."""
    monkeypatch.setattr(
        "tocom_export.bundle.weights.bake",
        lambda *arguments: {name: -tensor for name, tensor in bake(*arguments).items()},
    )
    with pytest.raises(CheckFailed, match=r"fast\.onnx differs from the PyTorch model on 20 of 20"):
        export(
            out=out, checkpoint=checkpoint, bank=bank, targets=(4,),
            schedules={"fast": [20, 3, 0]}, precision=precision,
        )  # fmt: skip


@pytest.mark.usefixtures("nothing_left")
def test_logits_of_nan_are_found(
    checkpoint: Path, bank: ToComBank, out: Path, monkeypatch: pytest.MonkeyPatch
):
    nothing = Comparison("r08.onnx", "r08", 20, None, None, 0, None, False, False)
    monkeypatch.setattr("tocom_export.engines.verify.verify", lambda *_, **__: iter([nothing]))
    with pytest.raises(CheckFailed, match=r"r08\.onnx gives logits that are NaN or Inf"):
        export(out=out, checkpoint=checkpoint, bank=bank, targets=(8,))


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_a_broken_off_export(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("tocom_export.bundle.writing.ir.save", fail)
    with pytest.raises(OutputError if error is OSError else error):
        export(out=out, checkpoint=checkpoint, bank="none")


def test_a_failing_check_keeps_the_old_bundle(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    export(out=out, checkpoint=checkpoint, bank="none", targets=(8,), verify=False)
    before = contents(out)
    nothing = Comparison("r04.onnx", "r04", 20, None, None, 0, None, False, False)
    monkeypatch.setattr("tocom_export.engines.verify.verify", lambda *_, **__: iter([nothing]))
    with pytest.raises(CheckFailed):
        export(out=out, checkpoint=checkpoint, bank="none", targets=(4,), force=True)
    assert contents(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_what_a_caller_is_told(checkpoint: Path, bank: ToComBank, out: Path):
    seen: dict[str, list[str]] = {}
    steps: dict[str, int] = {}
    details: list[str] = []
    comparisons: list[Comparison] = []

    @contextmanager
    def progress(title: str, count: int) -> Iterator[Callable[[str], None]]:
        steps[title] = count
        yield seen.setdefault(title, []).append

    blueprint = prepare(checkpoint=checkpoint, bank=bank, targets=(4, 8))
    write(blueprint, out, progress=progress, detail=details.append, checked=comparisons.append)
    assert steps == {"writing": 5, "checking": 2}
    assert sorted(seen["writing"]) == sorted(blueprint.files())
    assert seen["checking"] == ["r04", "r08"]
    assert details == [f"writing {out / name}" for name in seen["writing"]]
    assert [comparison.engine for comparison in comparisons] == ["r04.onnx", "r08.onnx"]
    assert all(c.passed and c.max_difference is not None for c in comparisons)


def test_without_onnx_runtime_nothing_is_checked(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in ("exporting", "export_checks"):
        monkeypatch.setattr(f"tocom_export.{module}.is_installed", lambda *_: False)
    blueprint = prepare(checkpoint=checkpoint, bank="none", targets=(8,))
    with pytest.raises(InputError, match="`verify` needs torch, timm and onnxruntime"):
        write(blueprint, out, verify=True)
    assert not out.exists()
    said: list[str] = []
    write(blueprint, out, tell=said.append)
    (line,) = said
    assert line.startswith("Not checked: onnxruntime is not installed; pip install")
    with pytest.raises(MissingPackageError, match="openvino is not installed"):
        write(blueprint, out, force=True, backends=("openvino",))
    assert Bundle.open(out, hashes=True).variants == blueprint.variants


def test_without_torch_logits_must_be_finite(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "tocom_export.export_checks.is_installed", lambda *packages: packages == ("onnxruntime",)
    )
    comparisons: list[Comparison] = []
    blueprint = prepare(checkpoint=checkpoint, bank="none", targets=(8,))
    write(blueprint, out, checked=comparisons.append)
    (only,) = comparisons
    assert (only.max_difference, only.finite, only.passed) == (None, True, True)


def test_engines_are_checked_in_every_backend_that_is_asked_for(checkpoint: Path, out: Path):
    pytest.importorskip("openvino")
    comparisons: list[Comparison] = []
    blueprint = prepare(checkpoint=checkpoint, bank="none", targets=(0, 8))
    write(blueprint, out, backends=("onnx", "openvino"), checked=comparisons.append)
    assert [(c.backend, c.variant) for c in comparisons] == [
        ("onnx", "r00"), ("onnx", "r08"), ("openvino", "r00"), ("openvino", "r08")
    ]  # fmt: skip
    assert all(c.passed and c.max_difference is not None for c in comparisons)
    with pytest.raises(InputError, match="`backends` 'tensorrt': graphs are checked in onnx, open"):
        write(blueprint, out, force=True, backends=("tensorrt",))


def test_int8_wants_images_or_none(checkpoint: Path, out: Path):
    blueprint = prepare(checkpoint=checkpoint, bank="none", targets=(8,), precision="int8")
    with pytest.raises(InputError, match="`precision` int8 needs `calibrate`: a folder"):
        write(blueprint, out)
    bundle = write(blueprint, out, calibrate="none")
    kinds = {node.op_type for node in ir.load(bundle.graph(8)).graph}
    assert "DynamicQuantizeLinear" in kinds
    assert "QuantizeLinear" not in kinds
    plans: Any = ("tensorrt", None)
    with pytest.raises(InputError, match="`calibrate` none: TensorRT wants ranges"):
        check_write(blueprint, out, calibrate="none", force=True, plans=plans)
