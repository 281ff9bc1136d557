"""From names, files and live models to what a bundle is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import save_file
from torch import nn

from tocom_export.compensation import choose_method, load_bank, load_compensation
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.compression.method import Method
from tocom_export.errors import (
    BankError,
    CheckpointError,
    InputError,
    UnknownModelError,
    UnsupportedModelError,
)
from tocom_export.image_size import resize_for
from tocom_export.loading import is_installed, load_model, load_spec
from tocom_export.model.catalogue import (
    REFERENCE,
    REFERENCE_BANKS,
    REFERENCE_CHECKPOINT,
    known_model,
)
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec

TOME, BARE, EVIT = Method("tome"), Method("tome", False), Method("evit")
TINY = "deit_tiny_patch16_224"


@pytest.fixture
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(depth=1)


@pytest.fixture
def checkpoint(
    tmp_path: Path, make_weights: Callable[..., Any], spec: VitSpec
) -> Callable[..., Path]:
    """A checkpoint that says what it is, as far as it is told."""

    def make(of: VitSpec | None = None, **known: Any) -> Path:
        file = tmp_path / "weights.safetensors"
        save_file(make_weights(of or spec), file, to_metadata(ModelInfo(**known)))
        return file

    return make


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither torch nor timm is installed."""
    monkeypatch.setattr("tocom_export.loading.is_installed", lambda *_: False)


def test_what_is_installed():
    assert is_installed("numpy", "safetensors")
    assert not is_installed("numpy", "no_such_package")
    assert not is_installed("no_such_package.part")
    assert is_installed()


@pytest.mark.usefixtures("bare")
def test_the_reference_model_needs_nothing():
    spec, preprocess = load_spec(REFERENCE)
    loaded = load_model()
    assert (loaded.spec, loaded.preprocess) == (spec, preprocess)
    assert loaded.checkpoint.file == REFERENCE_CHECKPOINT
    assert load_model(REFERENCE).spec == spec == loaded.checkpoint.info.spec
    assert preprocess == loaded.checkpoint.info.preprocess


@pytest.mark.parametrize("name", [TINY, f"{TINY}.fb_in1k"])
@pytest.mark.usefixtures("bare")
def test_a_listed_name_needs_nothing_either(name: str):
    assert load_spec(name) == known_model(name)


@pytest.mark.parametrize("with_timm", [True, False])
def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch, with_timm: bool):
    if not with_timm:
        monkeypatch.setattr("tocom_export.loading.is_installed", lambda *_: False)
    with pytest.raises(UnknownModelError, match=f"`model` {TINY}x.*{TINY}"):
        load_spec(f"{TINY}x")


@pytest.mark.parametrize("name", [TINY, f"{TINY}.fb_in1k"])
def test_timm_is_asked_for_a_name_that_we_don_t_list(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr("tocom_export.loading.is_known", lambda _: False)
    assert load_spec(name) == known_model(name)


@pytest.mark.parametrize("with_timm", [True, False])
def test_a_name_that_timm_knows_and_we_can_t_express(
    monkeypatch: pytest.MonkeyPatch, with_timm: bool
):
    if not with_timm:
        monkeypatch.setattr("tocom_export.loading.is_installed", lambda *_: False)
    with pytest.raises(UnsupportedModelError, match=r"swin.*SwinTransformer"):
        load_spec("swin_tiny_patch4_window7_224")


def test_a_file_that_says_what_it_is(checkpoint: Callable[..., Path], spec: VitSpec):
    preprocess = Preprocess(crop_pct=0.9)
    file = checkpoint(spec=replace(spec, classes=1000), preprocess=preprocess)
    for model in (None, "small", "small.a_tag"):
        loaded = load_model(model, file)
        assert loaded.spec == spec  # its head has 10
        assert loaded.preprocess == preprocess
        assert loaded.checkpoint.file == file


def test_a_file_may_be_text(checkpoint: Callable[..., Path], spec: VitSpec):
    assert load_model(checkpoint=str(checkpoint(spec=spec))).spec == spec


def test_a_file_that_says_nothing(checkpoint: Callable[..., Path]):
    tiny, preprocess = known_model(TINY)
    file = checkpoint(replace(tiny, classes=7))
    loaded = load_model(TINY, file)
    assert loaded.spec == replace(tiny, classes=7)
    assert loaded.preprocess == preprocess
    with pytest.raises(CheckpointError, match="Does `model` say which model it is"):
        load_model(checkpoint=file)  # taken for the reference model's


def test_statistics_that_a_file_leaves_out(
    checkpoint: Callable[..., Path], make_spec: Callable[..., VitSpec]
):
    """They are the model's where its name is known, else ImageNet's."""
    vit, preprocess = known_model("vit_tiny_patch16_224")
    assert preprocess != Preprocess()
    assert load_model(checkpoint=checkpoint(vit, spec=vit)).preprocess == preprocess
    spec = make_spec(depth=1)
    assert load_model(checkpoint=checkpoint(spec, spec=spec)).preprocess == Preprocess()


def test_a_file_of_another_model(checkpoint: Callable[..., Path], spec: VitSpec):
    file = checkpoint(spec=spec)
    with pytest.raises(InputError) as caught:
        load_model(TINY, file)
    assert str(caught.value) == (f"`model` {TINY}, but {file} says it is small; leave `model` out.")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pool": "avg"}, "`pool` avg, but {} says it is token; leave `pool` out."),
    ],
)
def test_a_file_that_says_another_form(
    checkpoint: Callable[..., Path], spec: VitSpec, given: dict[str, Any], says: str
):
    file = checkpoint(spec=spec)
    with pytest.raises(InputError) as caught:
        load_model(checkpoint=file, **given)
    assert says.format(file) in str(caught.value)
    assert load_model(checkpoint=file, image_size=56, pool="token").spec == spec


def test_a_file_of_a_listed_model_in_another_form(checkpoint: Callable[..., Path]):
    """What it is named after is of 224 pixels and reads the class token."""
    spec = replace(known_model(TINY)[0], image_size=(96, 96), pool="avg", final_norm="fc_norm")
    file = checkpoint(replace(spec, classes=3))
    assert load_model(TINY, file).spec == replace(spec, classes=3)
    assert load_model(TINY, file, image_size=96, pool="avg").spec == replace(spec, classes=3)
    assert load_model(TINY, file, image_size=(48, 192)).spec.grid == (3, 12)
    resized = load_model(TINY, file, image_size=224)
    assert resized.spec.image_size == (224, 224)
    assert "positions are resampled from 6×6 to 14×14 patches" in resized.resampled
    assert load_model(TINY, file, image_size=(48, 192)).resampled == ""
    with pytest.raises(InputError, match="`weights_key` names an entry of a `checkpoint`"):
        load_model(TINY, weights_key="model")


@pytest.mark.parametrize("size", [64, (24, 112), (8, 8)])
def test_images_of_another_size(
    checkpoint: Callable[..., Path], spec: VitSpec, make_spec: Callable[..., VitSpec], size: Any
):
    file = checkpoint(spec=spec)
    height, width = size if isinstance(size, tuple) else (size, size)
    loaded = load_model(checkpoint=file, image_size=size)
    assert loaded.spec == replace(spec, image_size=(height, width))
    assert loaded.checkpoint.info.spec == loaded.spec
    assert loaded.checkpoint.tensors["pos_embed"].shape == (1, 1 + height * width // 64, 64)
    assert loaded.resampled == (
        f"{file}: positions are resampled from 7×7 to {height // 8}×{width // 8} patches; accuracy "
        "at another size than trained may differ; finetune adapts."
    )
    assert load_model(checkpoint=file, image_size=56).resampled == ""


def test_weights_that_can_t_take_a_bundle_s_place(
    checkpoint: Callable[..., Path], spec: VitSpec, make_spec: Callable[..., VitSpec]
):
    """They are left to the check that says so."""
    opened = Checkpoint.open(checkpoint(spec=spec))
    for changes in ({"image_size": [60, 70]}, {"patch_size": [7, 7]}, {"image_size": [56, 56]}):
        assert resize_for(make_spec(depth=1, **changes), opened) == (opened, "")
    resized, told = resize_for(make_spec(depth=1, image_size=[64, 64]), opened)
    assert resized.info.spec == make_spec(depth=1, image_size=[64, 64])
    assert "from 7×7 to 8×8 patches" in told


def test_bare_weights_of_as_many_positions_stay(make_spec: Callable[..., Any], make_weights: Any):
    """7×28 patches are as many as 14×14, which the model's name says."""
    spec = make_spec(model=TINY, image_size=[112, 448], patch_size=[16, 16], depth=1)
    bare = Checkpoint(Path("bare"), make_weights(spec), ModelInfo())
    assert resize_for(spec, bare) == (bare, "")
    told = Checkpoint(Path("told"), bare.tensors, ModelInfo(replace(spec, image_size=(224, 224))))
    assert "from 14×14 to 7×28 patches" in resize_for(spec, told)[1]


def test_positions_that_are_computed(
    checkpoint: Callable[..., Path], make_spec: Callable[..., VitSpec]
):
    spec = make_spec(
        depth=1, positions=False, family="relpos", relative="mlp", relative_width=8,
        class_token=False, pool="avg",
    )  # fmt: skip
    loaded = load_model(checkpoint=checkpoint(spec, spec=spec), image_size=64)
    assert "positions are computed for 8×8 patches, and the weights are of 7×7" in loaded.resampled


def test_where_statistics_are_from(
    checkpoint: Callable[..., Path], spec: VitSpec, make_vit: Callable[..., Any]
):
    tiny = known_model(TINY)[0]
    name = "weights.safetensors"
    for loaded, origin in (
        (load_model(), "by the metadata of reference.safetensors"),
        (load_model(TINY, checkpoint(tiny)), f"timm's for {TINY}"),
        (load_model(TINY, checkpoint(tiny, preprocess=Preprocess())), f"by the metadata of {name}"),
        (load_model(checkpoint=checkpoint(tiny, spec=tiny)), f"timm's for {TINY}"),
        (load_model(checkpoint=checkpoint(spec, spec=spec)), "ImageNet's, as nothing says which"),
        (load_model(make_vit(spec)), "ImageNet's, as nothing says which"),
        (load_model(timm.create_model(TINY)), f"timm's for {TINY}"),
    ):
        assert loaded.preprocess_from == origin


def test_a_file_that_doesn_t_fit_what_it_says(
    checkpoint: Callable[..., Path], spec: VitSpec, make_spec: Callable[..., VitSpec]
):
    with pytest.raises(CheckpointError, match=r"blocks\.1\."):
        load_model(checkpoint=checkpoint(spec, spec=make_spec(depth=2)))


def test_a_file_that_lacks_some_tensors(tmp_path: Path, make_weights: Callable[..., Any]):
    """It is not the model's name that is wrong."""
    weights = make_weights(known_model(TINY)[0])
    for name in ("norm.bias", "blocks.3.mlp.fc1.bias", "blocks.2.norm1.bias", "cls_token"):
        del weights[name]
    save_file(weights, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(TINY, tmp_path / "cut.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'cut.safetensors'}: 4 of 152 tensors of {TINY} are missing (cls_token, "
        "blocks.2.norm1.bias, blocks.3.mlp.fc1.bias, …), the others fit it. Save the model's "
        "whole state_dict()."
    )


@pytest.mark.parametrize(
    ("of", "named", "says"),
    [
        (
            "deit_small_patch16_224",
            TINY,
            r"\(1, 1, 384\), but deit_tiny_patch16_224 needs \(1, 1, 192\) \(151 such tensors\)",
        ),
        (TINY, "deit_tiny_distilled_patch16_224", "3 of 155 tensors .*dist_token first"),
    ],
)
def test_a_file_of_another_model_by_its_tensors(
    tmp_path: Path, make_weights: Callable[..., Any], of: str, named: str, says: str
):
    save_file(make_weights(known_model(of)[0]), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=rf"{says}.* Does `model` say which model it is\?$"):
        load_model(named, tmp_path / "other.safetensors")


def test_a_file_of_fewer_layers(tmp_path: Path, make_weights: Callable[..., Any]):
    """That is another model; nothing was left out."""
    spec = replace(known_model(TINY)[0], depth=10)
    save_file(make_weights(spec), tmp_path / "ten.safetensors")
    with pytest.raises(CheckpointError, match=r"24 of 152 tensors .*Does `model` say"):
        load_model(TINY, tmp_path / "ten.safetensors")


def test_no_such_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(checkpoint=tmp_path / "none.safetensors")


def test_pretrained_weights(monkeypatch: pytest.MonkeyPatch, make_weights: Callable[..., Any]):
    spec, preprocess = known_model(TINY)
    weights = make_weights(spec)
    monkeypatch.setattr(
        "tocom_export.training.timm_models.pretrained_tensors", lambda name: weights
    )
    loaded = load_model(f"{TINY}.fb_in1k")
    assert (loaded.spec, loaded.preprocess) == (spec, preprocess)
    assert loaded.checkpoint.tensors is weights
    assert loaded.checkpoint.info == ModelInfo()


@pytest.mark.usefixtures("bare")
def test_pretrained_weights_need_torch():
    with pytest.raises(InputError, match=rf"`model` {TINY}: .*`checkpoint`.*tocom-export\[torch\]"):
        load_model(TINY)


@pytest.mark.parametrize("changes", [{}, {"distilled": True}, {"classes": 0}])
def test_a_live_model(
    make_vit: Callable[..., Any], make_spec: Callable[..., VitSpec], changes: dict[str, Any]
):
    spec = make_spec(depth=1, **changes)
    vit = make_vit(spec)
    loaded = load_model(vit)
    assert replace(loaded.spec, model="small") == spec
    assert loaded.preprocess == Preprocess()
    assert loaded.checkpoint.info == ModelInfo()
    for name, tensor in vit.state_dict().items():
        np.testing.assert_array_equal(loaded.checkpoint.tensors[name], tensor.numpy())


def test_a_live_model_may_go_on_training(make_vit: Callable[..., Any], spec: VitSpec):
    vit = make_vit(spec)
    loaded = load_model(vit)
    before = vit.cls_token.detach().clone().numpy()
    with torch.no_grad():
        vit.cls_token += 1
    np.testing.assert_array_equal(loaded.checkpoint.tensors["cls_token"], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_live_model_of_another_type(make_vit: Callable[..., Any], spec: VitSpec, dtype: Any):
    vit = make_vit(spec).to(dtype)
    tensors = load_model(vit).checkpoint.tensors
    for name, tensor in vit.state_dict().items():
        np.testing.assert_array_equal(tensors[name], tensor.float().numpy())


def test_a_live_model_knows_its_name_and_statistics():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    loaded = load_model(vit)
    spec, preprocess = known_model("vit_tiny_patch16_224")
    assert (loaded.spec, loaded.preprocess) == (replace(spec, classes=7), preprocess)


def test_a_live_model_that_is_none():
    with pytest.raises(UnsupportedModelError, match="model class Linear"):
        load_model(nn.Linear(2, 2))


def test_a_live_model_has_its_weights_and_form(
    make_vit: Callable[..., Any], spec: VitSpec, tmp_path: Path
):
    given: list[dict[str, Any]] = [
        {"checkpoint": tmp_path / "weights.pth"}, {"weights_key": "model"}, {"image_size": 64},
        {"pool": "avg"},
    ]  # fmt: skip
    for wrong in given:
        with pytest.raises(InputError, match=f"`{next(iter(wrong))}`: a live model has its"):
            load_model(make_vit(spec), **wrong)


def test_a_live_model_of_nan(make_vit: Callable[..., Any], spec: VitSpec):
    vit = make_vit(spec)
    with torch.no_grad():
        vit.norm.weight[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"norm\.weight holds NaN"):
        load_model(vit)


@pytest.fixture
def bank(make_bank: Callable[..., ToComBank], spec: VitSpec) -> ToComBank:
    return make_bank(spec)


def test_a_bank_and_its_file(tmp_path: Path, bank: ToComBank, spec: VitSpec):
    file = tmp_path / "bank.safetensors"
    bank.save(file)
    assert load_bank(bank, spec, TOME) is bank
    for named in (file, str(file)):
        loaded = load_bank(named, spec, TOME)
        assert loaded is not None
        np.testing.assert_array_equal(loaded.q_up, bank.q_up)
    assert load_bank("none", spec, TOME) is None


@pytest.mark.parametrize("method", ["tome", "evit"])
def test_the_reference_models_own_bank(method: Any):
    spec, _ = load_spec(REFERENCE)
    loaded = load_bank(None, spec, Method(method))
    assert loaded is not None
    np.testing.assert_array_equal(loaded.q_up, ToComBank.load(REFERENCE_BANKS[method]).q_up)


def test_a_model_without_a_bank_of_its_own(spec: VitSpec):
    with pytest.raises(BankError, match=r"`bank`: small has no bank of its own.*'none'"):
        load_bank(None, spec, TOME)


def test_a_bank_that_doesn_t_fit(
    tmp_path: Path, bank: ToComBank, spec: VitSpec, make_spec: Callable[..., VitSpec]
):
    with pytest.raises(BankError, match=r"^`bank`: the bank has depth 1, but small is to have 4"):
        load_bank(bank, make_spec(), TOME)
    file = tmp_path / "bank.safetensors"
    bank.save(file)
    with pytest.raises(BankError, match="the bank has method tome, but small is to have evit") as e:
        load_bank(file, spec, EVIT)
    assert str(e.value).startswith(f"`bank` {file}: ")
    spec = replace(load_spec(REFERENCE)[0], depth=7)
    with pytest.raises(BankError, match=r"^`bank` of the package: the bank has depth 6"):
        load_bank(None, spec, TOME)


@pytest.mark.parametrize("name", ["none.safetensors", "None"])
def test_no_such_bank(spec: VitSpec, tmp_path: Path, name: str):
    with pytest.raises(BankError):
        load_bank(tmp_path / name, spec, TOME)


@pytest.mark.parametrize(
    ("name", "bank_method", "known", "proportional", "chosen"),
    [
        (None, None, None, None, TOME),
        (None, BARE, None, None, BARE),
        (None, EVIT, None, None, EVIT),
        (None, EVIT, TOME, None, EVIT),
        (None, None, EVIT, None, EVIT),
        (None, None, BARE, None, BARE),
        (None, TOME, BARE, None, BARE),  # the checkpoint knows better
        (None, BARE, TOME, None, TOME),
        (None, TOME, BARE, True, TOME),
        (None, None, None, False, BARE),
        ("tome", None, None, None, TOME),
        ("tome", None, BARE, None, BARE),
        ("tome", BARE, EVIT, None, BARE),
        ("tome", BARE, EVIT, True, TOME),
        ("evit", TOME, TOME, None, EVIT),
        ("evit", None, None, True, EVIT),  # without meaning for pruning
    ],
)
def test_the_method(
    bank: ToComBank, name: str | None, bank_method: Method | None, known: Method | None,
    proportional: bool | None, chosen: Method,
):  # fmt: skip
    steps = replace(bank, method=bank_method) if bank_method else None
    assert choose_method(name, steps, ModelInfo(method=known), proportional) == chosen


@pytest.mark.parametrize("method", [TOME, BARE, EVIT])
def test_a_bank_says_its_method(bank: ToComBank, spec: VitSpec, method: Method):
    made = replace(bank, method=method)
    assert load_compensation(made, spec, ModelInfo()) == (made, method)
    assert load_compensation("none", spec, ModelInfo(method=method)) == (None, method)


@pytest.mark.parametrize(
    ("info", "method", "file"),
    [
        (ModelInfo(), None, "tome"),
        (ModelInfo(method=EVIT), None, "evit"),
        (ModelInfo(method=EVIT), "tome", "tome"),
        (ModelInfo(), "evit", "evit"),
    ],
)
def test_the_reference_models_bank_is_of_the_method(info: ModelInfo, method: str | None, file: str):
    loaded, chosen = load_compensation(None, load_spec(REFERENCE)[0], info, method)
    assert loaded is not None
    np.testing.assert_array_equal(loaded.q_up, ToComBank.load(REFERENCE_BANKS[file]).q_up)
    assert chosen == Method(file)  # type: ignore[arg-type]


def test_a_method_that_contradicts_the_bank(bank: ToComBank, spec: VitSpec):
    for options in ((ModelInfo(), "evit"), (ModelInfo(method=BARE),), (ModelInfo(), None, False)):
        with pytest.raises(BankError, match="`bank`: the bank has method tome"):
            load_compensation(bank, spec, *options)


@pytest.mark.parametrize("bank", [None, "none"])
def test_no_such_method(bank: str | None):
    with pytest.raises(InputError, match="unknown method 'topk'; tome and evit are known"):
        load_compensation(bank, load_spec(REFERENCE)[0], ModelInfo(), "topk")
