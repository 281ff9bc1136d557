from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save_file

from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.model.spec import VitSpec

Run = Callable[..., Result]
Options = tuple[object, ...]
FC1 = "blocks.2.mlp.fc1.weight"


@pytest.fixture(autouse=True)
def nothing_left(here: Path) -> Iterator[None]:
    """None of these leaves a bundle, nor a half of one; inputs lie elsewhere."""
    yield
    assert [p.name for p in here.iterdir()] == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "broken.safetensors"


@pytest.fixture
def refused(fails: Run, bank_file: Path, file: Path) -> Callable[..., Result]:
    """``build`` of the checkpoint ``file`` fails, and names it."""

    def call(*says: str) -> Result:
        options = ("--checkpoint", file, "--bank", bank_file, "--no-verify")
        return fails("build", *options, says=(file, *says))

    return call


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint(refused: Run, checkpoint: Path, file: Path, share: float):
    content = checkpoint.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused("truncated")


def test_a_checkpoint_of_another_format(refused: Run, file: Path):
    file.write_bytes(b"neither tensors nor safe " * 100)
    refused("is not a safetensors file")


def test_no_checkpoint(refused: Run):
    refused("no such file")


def test_a_folder_as_checkpoint(refused: Run, file: Path):
    file.mkdir()
    refused("has no config.json")


def test_a_pickle_that_is_none(fails: Run, tmp_path: Path):
    file = tmp_path / "broken.pth"
    file.write_bytes(b"no pickle")
    fails("build", "--checkpoint", file, "--bank", "none", says=(file, "can't be read"))


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda w: w.pop(FC1),
            (f"1 of 56 tensors of tiny are missing ({FC1})", "the others fit", "state_dict()"),
        ),
        (lambda w: w.update(more=w[FC1]), ("tiny has no tensor more", "Its metadata say", "tiny")),
        (lambda w: w.update({FC1: w[FC1][:3]}), (FC1, "(3, 64), but tiny needs (128, 64)")),
        (lambda w: w.update({FC1: w[FC1].T.copy()}), (FC1, "(64, 128), but tiny needs")),
        (lambda w: w[FC1].__setitem__((5, 6), np.nan), (FC1, "NaN or infinite")),
        (lambda w: w[FC1].__setitem__((5, 6), -np.inf), (FC1, "NaN or infinite")),
        (lambda w: w.update({FC1: w[FC1].astype(int)}), (FC1, "I64")),
    ],
    ids=["missing", "extra", "cut", "transposed", "nan", "inf", "integers"],
)
def test_tensors_that_do_not_fit(
    refused: Run, file: Path, make_weights: Callable, info: ModelInfo, change: Callable,
    says: tuple[str, ...],
):  # fmt: skip
    weights = make_weights(info.spec)
    change(weights)
    save_file(weights, file, to_metadata(info))
    refused(*says)


@pytest.mark.parametrize("metadata", ["{", '{"source": 99}', '{"spec": {"model": "x"}}', "[]"])
def test_metadata_that_make_no_sense(
    refused: Run, file: Path, make_weights: Callable, spec: VitSpec, metadata: str
):
    save_file(make_weights(spec), file, {"tocom_export": metadata})
    refused()


@pytest.mark.parametrize(
    "changes, says",
    [({"width": 128}, ("width 128", "64")), ({"depth": 3}, ("depth 3", "4"))],
    ids=["width", "depth"],
)
def test_a_bank_of_another_model(
    fails: Run, checkpoint: Path, tmp_path: Path, make_bank: Callable, make_spec: Callable,
    changes: dict, says: tuple[str, ...],
):  # fmt: skip
    bank = tmp_path / "other.safetensors"
    make_bank(make_spec(**changes)).save(bank)
    options = ("--checkpoint", checkpoint, "--bank", bank)
    fails("build", *options, says=("--bank", bank, "tiny", *says))


def test_a_bank_of_another_method(fails: Run, model: Options, bank_file: Path):
    says = ("--bank", bank_file, "method tome", "evit")
    fails("build", *model, "--method", "evit", says=says)


def test_a_checkpoint_as_bank(fails: Run, checkpoint: Path):
    options = ("--checkpoint", checkpoint, "--bank", checkpoint)
    fails("build", *options, says=(checkpoint, "is not a ToCom bank"))


def test_a_bank_as_checkpoint(fails: Run, bank_file: Path):
    options = ("--checkpoint", bank_file, "--bank", bank_file)
    fails("build", *options, says=(bank_file, "is a ToCom bank, not a model's weights"))


def test_no_bank_of_that_name(fails: Run, checkpoint: Path, tmp_path: Path):
    bank = tmp_path / "none.safetensors"
    options = ("--checkpoint", checkpoint, "--bank", bank)
    fails("build", *options, says=(bank, "no such file"))


@pytest.mark.parametrize("option", ["--bank", "--checkpoint"])
@pytest.mark.parametrize("name", ["nope", "nope.pth"])
def test_a_missing_file_is_missing_without_torch_too(
    fails: Run, monkeypatch: pytest.MonkeyPatch, option: str, name: str
):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = fails("build", option, name, says=(f"{name}: no such file",))
    assert "torch" not in result.stderr


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("naflexvit_base_patch16_siglip", "NaFlexVit (images of varying size)"),
        ("samvit_base_patch16", "VisionTransformerSAM (windows, relative positions)"),
        ("vit_small_r26_s32_224", "HybridEmbed (convolutions)"),
        ("swinv2_tiny_window8_256", "SwinTransformerV2"),
    ],
)
def test_a_vit_of_another_kind_is_refused_by_its_part_on_a_base_install(
    fails: Run, monkeypatch: pytest.MonkeyPatch, model: str, part: str
):
    for module in ("timm", "torch"):
        monkeypatch.setitem(sys.modules, module, None)
    options = ("--model", model, "--bank", "none", "--targets", "8")
    fails("build", *options, says=(f"{model}: ", part, "is not supported."))


def test_a_pickle_without_torch(fails: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "mine.pth"
    file.touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    for option in ("--bank", "--checkpoint"):
        says = (f"torch, which {file} needs to be read,", "pip install 'tocom-export[torch]'")
        fails("build", option, file, says=says)


def test_a_truncated_bank(fails: Run, checkpoint: Path, bank_file: Path, file: Path):
    file.write_bytes(bank_file.read_bytes()[:-100])
    fails("build", "--checkpoint", checkpoint, "--bank", file, says=(file, "truncated"))


def test_a_bank_of_nan(
    fails: Run, checkpoint: Path, tmp_path: Path, make_bank: Callable, spec: VitSpec
):
    file = tmp_path / "nan.safetensors"
    bank = make_bank(spec)
    bank.v_up[1, 2, 3, 1] = np.nan
    bank.save(file)
    options = ("--checkpoint", checkpoint, "--bank", file)
    fails("build", *options, says=(file, "v.up", "NaN"))


def test_a_bank_must_be_given_for_a_model_that_has_none(fails: Run, checkpoint: Path):
    fails("build", "--checkpoint", checkpoint, says=("--bank", "tiny", "'none'"))


@pytest.mark.parametrize(
    ("targets", "what"),
    [("17", "degree 17: a bank compensates degrees 0..16"), ("4-20", "degree 17"),
     ("1000001", "1000001")],
)  # fmt: skip
def test_targets_out_of_range(fails: Run, model: Options, targets: str, what: str):
    says = ("--targets", what)
    fails("build", *model, "--targets", targets, says=says)


@pytest.mark.parametrize("targets", ["8-4", "0-16:0"])
def test_targets_that_do_not_rise(fails: Run, model: Options, targets: str):
    fails("build", *model, "--targets", targets, says=("--targets", "no rising span"))


@pytest.mark.parametrize("targets", ["four", "4;8", "", "4,,8", "-1", "4.5"])
def test_targets_that_are_no_numbers(fails: Run, model: Options, targets: str):
    says = ("--targets", f"{targets!r} is no list of degrees", "4,8,12,16 or 0-16 or 0,4-16:4")
    fails("build", *model, "--targets", targets, says=says)


@pytest.mark.parametrize("source", ["17", "-1", "x"])
def test_a_source_that_is_no_degree(fails: Run, model: Options, source: str):
    fails("build", *model, "--source", source, says=("--source", source))


def test_a_source_that_contradicts_the_metadata(fails: Run, model: Options, checkpoint: Path):
    says = ("--source 8", checkpoint, "trained at degree 4", "leave --source out")
    fails("build", *model, "--source", "8", says=says)


@pytest.mark.parametrize("scale", ["nan", "inf", "much"])
def test_a_scale_that_is_no_number(fails: Run, model: Options, scale: str):
    fails("build", *model, "--scale", scale, says=("--scale", scale))


def test_a_model_that_contradicts_the_metadata(fails: Run, model: Options, checkpoint: Path):
    name = "deit_tiny_patch16_224"
    fails("build", *model, "--model", name, says=(f"--model {name}", checkpoint, "tiny"))


@pytest.mark.parametrize("with_timm", [True, False])
def test_an_unknown_model(fails: Run, monkeypatch: pytest.MonkeyPatch, with_timm: bool):
    if not with_timm:
        monkeypatch.setattr("tocom_export.loading.is_installed", lambda *_: False)
    says = ("--model deit_tiny_patch16_225", "no model of that name", "deit_tiny_patch16_224")
    fails("build", "--model", "deit_tiny_patch16_225", says=says)


@pytest.mark.parametrize("with_timm", [True, False])
def test_an_unsupported_model(fails: Run, monkeypatch: pytest.MonkeyPatch, with_timm: bool):
    if not with_timm:
        monkeypatch.setattr("tocom_export.loading.is_installed", lambda *_: False)
    name = "swin_tiny_patch4_window7_224"
    fails("build", "--model", name, says=(name, "SwinTransformer", "not supported"))


def test_pretrained_weights_that_cannot_be_downloaded(
    fails: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    name = "deit_tiny_patch16_224"
    options = ("--model", name, "--bank", "none")
    fails("build", *options, says=(name, "can't be downloaded", "--checkpoint FILE"))


def test_without_torch_weights_must_be_given(fails: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tocom_export.loading.is_installed", lambda *_: False)
    says = ("--checkpoint", "pip install 'tocom-export[torch]'")
    fails("build", "--model", "deit_tiny_patch16_224", "--bank", "none", says=says)


def test_verification_needs_torch(
    fails: Run, checkpoint: Path, bank_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tocom_export.exporting.is_installed", lambda *_: False)
    options = ("--checkpoint", checkpoint, "--bank", bank_file, "--verify")
    fails("build", *options, says=("--verify", "pip install 'tocom-export[cpu,torch]'"))


@pytest.mark.parametrize(
    "options, says",
    [
        (("--precision", "int8"), ("--precision int8 needs --calibrate",)),
        (("--calibrate", "photos"), ("--calibrate is for --precision int8 alone",)),
        (("--verify",), ("--verify needs torch",)),
        (("--schedule", "fast=1,2"), ("--schedule fast: tiny has 4 layers",)),
    ],
    ids=str,
)
def test_a_dry_run_refuses_what_a_build_would(
    fails: Run, checkpoint: Path, bank_file: Path, monkeypatch: pytest.MonkeyPatch,
    options: Options, says: tuple[str, ...],
):  # fmt: skip
    monkeypatch.setattr("tocom_export.exporting.is_installed", lambda *_: False)
    model = ("--checkpoint", checkpoint, "--bank", bank_file)
    for dry in ((), ("--dry-run",)):
        fails("build", *model, *options, *dry, says=says)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize("content", ["bundle", "empty", "other"])
def test_an_existing_folder(
    fails: Run, succeeds: Run, model: Options, tmp_path: Path, content: str, dry: Options
):
    out = tmp_path / "out"
    if content == "bundle":
        succeeds("build", *model, "--targets", "8", "--out", out)
    else:
        out.mkdir()
    if content == "other":
        (out / "thesis.tex").write_text("all of it")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    siblings = sorted(tmp_path.iterdir())
    fails("build", *model, "--out", out, *dry, says=(out, "exists", "--force"))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(tmp_path.iterdir()) == siblings


def test_force_does_not_replace_what_is_no_bundle(fails: Run, model: Options, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("all of it")
    fails("build", *model, "--out", out, "--force", says=(out, "other files than a bundle's"))
    assert (out / "thesis.tex").read_text() == "all of it"


def test_force_does_not_replace_a_file(fails: Run, model: Options, tmp_path: Path):
    out = tmp_path / "thesis.tex"
    out.write_text("all of it")
    fails("build", *model, "--out", out, "--force", says=(out,))
    assert out.read_text() == "all of it"


def test_a_folder_that_cannot_be_written(fails: Run, model: Options, tmp_path: Path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    fails("build", *model, "--out", out, says=(out, "can't be written"))


@pytest.mark.parametrize("limit", [0, 1000, 300_000])
def test_a_disk_that_is_full_at_the_weights(
    fails: Run, model: Options, files_end_at: Callable, limit: int
):
    with files_end_at(limit):
        fails("build", *model, "--out", "out", says=("out", "can't be written"))


def test_a_disk_that_is_full_at_a_graph(
    fails: Run, model: Options, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tocom_export.bundle.writing.ir.save", full)
    says = ("out", "can't be written", "the disk is full")
    fails("build", *model, "--out", "out", says=says)


def test_a_full_disk_leaves_the_old_bundle(
    fails: Run, model: Options, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    monkeypatch.setattr("tocom_export.bundle.writing.ir.save", full)
    fails("build", *model, "--out", bundle, "--force", says=(bundle, "can't be written"))
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before
    assert not list(bundle.parent.glob(".*"))


def test_a_stopped_build_leaves_nothing(run: Run, model: Options, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tocom_export.bundle.writing.ir.save", stop)
    result = run("build", *model, "--out", "out")
    assert result.exit_code == 130
    assert result.stderr.strip() == "Stopped."


def test_two_vs_show_the_traceback(run: Run, model: Options):
    quiet, loud = (run("build", *model, "--source", "8", *flags).stderr for flags in ([], ["-vv"]))
    assert "Traceback" not in quiet
    assert loud.startswith("Traceback")
    assert loud.endswith(quiet)
