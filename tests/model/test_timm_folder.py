"""Folders as timm's own ``save_for_hf`` writes them, read without timm."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from timm.models import save_for_hf

from tocom_export import export, load, refit
from tocom_export.cli.main import cli
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.errors import CheckpointError, InputError, UnsupportedModelError
from tocom_export.loading import load_model
from tocom_export.model.catalogue import REFERENCE, REFERENCE_CHECKPOINT, known_model
from tocom_export.model.from_timm import preprocess_from_cfg, spec_from_timm
from tocom_export.model.preprocess import Preprocess

TINY = "vit_tiny_patch16_224"
Save = Callable[..., Path]
Changes = dict[str, Any]
SMALL: Changes = {
    "depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 3,
}  # fmt: skip


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save a timm model, by its name and arguments, or as it is."""

    def make(model: Any = TINY, *, pickled: bool = False, more: Any = None, **given: Any) -> Path:
        torch.manual_seed(0)
        vit = timm.create_model(model, **given) if isinstance(model, str) else model
        folder = tmp_path / "my-model"
        logging.disable(logging.WARNING)
        save_for_hf(vit, str(folder), safe_serialization=not pickled, model_config=more)
        logging.disable(logging.NOTSET)
        return folder

    return make


@pytest.fixture
def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tocom_export.loading.is_installed", lambda *_: False)


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (TINY, {}),
        (TINY, {"num_classes": 5, "img_size": 96, "global_pool": "avg"}),
        (TINY, {"img_size": (32, 64), "global_pool": "avg", "fc_norm": False}),
        (TINY, {"patch_size": 32, "in_chans": 1, "num_classes": 0, "init_values": 1e-3}),
        (TINY, {**SMALL, "global_pool": "map", "mlp_ratio": 2.5}),
        (TINY, {**SMALL, "reg_tokens": 4, "no_embed_class": True, "qk_norm": True}),
        (TINY, {**SMALL, "class_token": False, "global_pool": "avg", "qkv_bias": False}),
        (TINY, {**SMALL, "act_layer": "quick_gelu", "pre_norm": True, "drop_path_rate": 0.1}),
        ("vit_base_patch16_siglip_224", {"depth": 1, "img_size": 32}),
        ("vit_base_patch16_siglip_224", {"depth": 1, "img_size": 32, "global_pool": "avg"}),
        ("vit_base_patch16_clip_224.openai", {"depth": 1, "img_size": 32}),
        ("vit_giant_patch14_reg4_dinov2", {"depth": 1, "embed_dim": 96, "num_heads": 6}),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}),
        ("beit_base_patch16_224", {"depth": 1, "img_size": 64, "global_pool": "token"}),
        ("eva02_tiny_patch14_224", {"depth": 1, "img_size": 56, "num_classes": 4}),
        ("vit_small_patch16_dinov3", {"depth": 1, "img_size": 64}),
        ("vit_relpos_small_patch16_rpn_224", {"depth": 1, "img_size": 64}),
    ],
)
@pytest.mark.usefixtures("without_timm")
def test_what_timm_saves(save: Save, name: str, given: Changes):
    torch.manual_seed(0)
    vit = timm.create_model(name, **given)
    folder = save(vit)
    opened = load_model(checkpoint=folder)
    assert opened.spec == spec_from_timm(vit)
    assert {n: t.shape for n, t in opened.checkpoint.tensors.items()} == opened.spec.weights()
    config = json.loads((folder / "config.json").read_text())
    assert opened.preprocess == preprocess_from_cfg(config["pretrained_cfg"])
    assert len(opened.preprocess.mean) == opened.spec.channels
    assert opened.preprocess_from == "by the config.json of my-model"
    assert opened.checkpoint.info.classes is None


def test_an_engine_is_the_model(save: Save, tmp_path: Path, make_images: Callable[..., Any]):
    torch.manual_seed(0)
    vit = timm.create_model(TINY, **SMALL, global_pool="avg").eval()
    torch.nn.init.normal_(vit.head.weight)
    folder = save(vit)
    bundle = export(checkpoint=folder, bank="none", targets=[0], out=tmp_path / "b", verify=False)
    images = make_images(bundle.spec)
    with torch.inference_mode():
        expected = vit(torch.from_numpy(images)).numpy()
    assert np.abs(bundle.engine("r00").run(images) - expected).max() < 1e-5 * abs(expected).max()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"label_names": ["n1", "n2", "n3"]}, ("n1", "n2", "n3")),
        ({"label_names": {0: "n1", 1: "n2", 2: "n3"}}, ("n1", "n2", "n3")),
        (
            {"label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "crow", "n3": "jay"}},
            ("crow", "n2", "jay"),
        ),
        ({"label_names": ["LABEL_0", "LABEL_1", "LABEL_2"]}, None),
    ],
)
def test_classes(save: Save, labels: Changes, expected: tuple[str, ...] | None):
    assert Checkpoint.open(save(more=labels, **SMALL)).info.classes == expected


def test_a_record_of_old(save: Save):
    """One object, before there were model_args."""
    folder = save(img_size=64, num_classes=3)

    def flatten(config: Any) -> None:
        told = config.pop("pretrained_cfg")
        del config["model_args"]
        config |= {**told, "labels": ["a", "b", "c"], "crop_pct": 0.8, "std": [0.25] * 3}

    edit(folder, flatten)
    opened = load_model(checkpoint=folder)
    assert opened.spec == replace(known_model(TINY)[0], image_size=(64, 64), classes=3)
    assert opened.checkpoint.info.classes == ("a", "b", "c")
    assert opened.preprocess == Preprocess((0.5,) * 3, (0.25,) * 3, 0.8)


def test_what_a_config_leaves_out(save: Save):
    folder = save(img_size=64, num_classes=3)

    def empty(config: Any) -> None:
        config |= {"model_args": {}, "pretrained_cfg": {}}

    edit(folder, empty)
    opened = load_model(checkpoint=folder)
    assert opened.spec.image_size == (64, 64)  # by the positions
    assert opened.preprocess == known_model(TINY)[1]
    assert opened.preprocess_from == f"timm's for {TINY}"


@pytest.mark.parametrize(
    ("channels", "said", "mean"),
    [
        (3, 0.5, (0.5,) * 3),
        (3, [0.5], (0.5,) * 3),
        (1, [0.25, 0.5, 0.75], (0.5,)),
        (4, [0.5], (0.5,)),
    ],
)
def test_means_of_other_channels(save: Save, channels: int, said: Any, mean: tuple[float, ...]):
    folder = save(**SMALL, in_chans=channels)
    edit(folder, lambda config: config["pretrained_cfg"].update(mean=said, std=said))
    assert Checkpoint.open(folder).info.preprocess == Preprocess(mean, mean, 0.9)


def test_tensors_without_shape(save: Save):
    folder = save(**SMALL, global_pool="map")
    tensors = load_file(folder / "model.safetensors")
    for name in ("head.weight", "attn_pool.mlp.fc1.weight"):
        save_file({**tensors, name: np.array(1, np.float32)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{name} has shape \(\)"):
            load_model(checkpoint=folder)


def test_a_wrapper_of_transformers(save: Save):
    folder = save(**SMALL)
    expected = load_model(checkpoint=folder).spec
    edit(folder, lambda config: config.update(model_type="timm_wrapper"))
    assert load_model(checkpoint=folder).spec == expected


def test_pickled_weights(save: Save):
    folder = save(pickled=True, **SMALL)
    whole = {name: np.array(t) for name, t in Checkpoint.open(folder).tensors.items()}
    assert load_model(checkpoint=folder).spec.classes == 3
    save_file(whole, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"unread")
    again = Checkpoint.open(folder).tensors
    assert again.keys() == whole.keys()
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_file_beside_its_config(save: Save, pickled: bool):
    folder = save(pickled=pickled, **SMALL)
    (file,) = (file for file in folder.iterdir() if file.name != "config.json")
    for model in (None, TINY):
        assert load_model(model, file).spec == load_model(checkpoint=folder).spec
    with pytest.raises(InputError, match=f"says it is {TINY}; leave `model` out"):
        load_model("deit_tiny_patch16_224", file)
    with pytest.raises(InputError, match="says it is token; leave `pool` out"):
        load_model(checkpoint=file, pool="avg")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="tensors of vit_tiny_patch16_224"):
        load_model(TINY, file)  # as without one


def test_a_file_that_says_itself_what_it_is(save: Save):
    file = save(**SMALL) / "ours.safetensors"
    file.write_bytes(REFERENCE_CHECKPOINT.read_bytes())
    assert load_model(checkpoint=file).spec.model == REFERENCE


def test_an_architecture_that_isnt_listed(save: Save, monkeypatch: pytest.MonkeyPatch):
    """timm is asked, where it is installed."""
    folder = save(**SMALL)
    expected = load_model(checkpoint=folder).spec
    for place in ("loading", "compression.checkpoint"):
        monkeypatch.setattr(f"tocom_export.{place}.is_known", lambda _: False)
    assert Checkpoint.open(folder).info.spec is None
    assert load_model(checkpoint=folder).spec == expected
    edit(folder, lambda config: config.update(architecture="vit_of_tomorrow"))
    says = "no architecture 'vit_of_tomorrow' is known; a newer timm may know it"
    with pytest.raises(CheckpointError, match=says):
        load_model(checkpoint=folder)
    monkeypatch.setattr("tocom_export.loading.is_installed", lambda *_: False)
    with pytest.raises(CheckpointError, match="is known; timm, where it is installed, may"):
        load_model(checkpoint=folder)


@pytest.mark.parametrize("with_timm", [True, False])
def test_a_model_that_isnt_supported(save: Save, monkeypatch: pytest.MonkeyPatch, with_timm: bool):
    folder = save(**SMALL)
    if not with_timm:
        monkeypatch.setattr("tocom_export.loading.is_installed", lambda *_: False)
    edit(folder, lambda config: config.update(architecture="swin_tiny_patch4_window7_224"))
    with pytest.raises(UnsupportedModelError, match=r"my-model \(swin_.*SwinTransformer is not"):
        load_model(checkpoint=folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label_names": ["a", "b"]}, "label_names in config.json names 2 classes, .* head has 3"),
        ({"label_names": {"0": "a", "1": "b", "3": "c"}}, "has no name for class 2"),
        ({"label_names": [1, 2, 3]}, r"config.json: label_names: \[0\]: expected str"),
        ({"label_names": ["a", "b", "c"], "label_descriptions": ["d"]}, "config.json: label_names"),
        ({"model_args": {"swiglu_mlp": True}}, "the argument swiglu_mlp in config.json is not"),
        ({"model_args": {"act_layer": "mish"}}, "the argument act_layer 'mish' in config.json"),
        ({"model_args": {"global_pool": "avgmax"}}, "pooling 'avgmax' is not supported"),
        ({"global_pool": "", "model_args": SMALL}, "pooling '' is not supported"),
        ({"model_args": {**SMALL, "depth": "two"}}, "config.json: depth: expected `?int"),
        ({"model_args": {**SMALL, "num_heads": 3}}, "config.json: model spec: width 32 is no"),
        ({"model_args": {**SMALL, "img_size": 64}}, "images of 32x32, not of 64x64 as config.json"),
        ({"model_args": {**SMALL, "depth": 3}}, "the weights have 2 layers, not 3 as config.json"),
        ({"model_args": {**SMALL, "depth": 10**6}}, "the weights have 2 layers, not 1000000 as"),
        ({"model_args": {**SMALL, "img_size": [10**6] * 2}}, "patches; 65,536 is the most"),
        ({"model_args": [1]}, "config.json: pretrained_cfg and model_args are objects"),
        ({"pretrained_cfg": {"interpolation": "lanczos"}}, "config.json: pretrained_cfg: interpol"),
        ({"pretrained_cfg": {"mean": ["a", "b"]}}, "pretrained_cfg: mean and std are numbers"),
        ({"pretrained_cfg": {"mean": []}}, "pretrained_cfg: mean and std are numbers"),
        ({"pretrained_cfg": {"mean": [10**400, 1, 1, 1]}}, "pretrained_cfg: mean and std are"),
        ({"pretrained_cfg": {"mean": [10**400, 1, 1]}}, "config.json"),
        ({"pretrained_cfg": {"std": 0}}, "pretrained_cfg: image statistics can't be"),
        ({"architecture": 3}, "has no model_type, nor timm's architecture"),
        ({"architecture": "local-dir:my-model"}, "has no model_type, nor timm's architecture"),
        ({"architecture": "reference"}, "has no model_type, nor timm's architecture"),
    ],
)
def test_configs_that_are_refused(save: Save, change: Changes, says: str):
    folder = save(**SMALL)
    edit(folder, lambda config: config.update(change))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=says) as caught:
        load_model(checkpoint=folder)
    assert "\n" not in str(caught.value)
    assert "my-model" in str(caught.value)


def test_positions_that_are_computed(save: Save):
    """No tensor says that a record's image size is too large for any machine."""
    folder = save("vit_small_patch16_dinov3", depth=1, img_size=64)
    edit(folder, lambda config: config["model_args"].update(img_size=[10**6, 10**6]))
    with pytest.raises(CheckpointError, match="3,906,250,000 patches; 65,536 is the most"):
        load_model(checkpoint=folder)


def test_names_of_a_parallel_model(save: Save):
    folder = save(**SMALL)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, file)
    for place in (file, folder):
        opened = load_model(checkpoint=place)
        assert opened.checkpoint.tensors.keys() == tensors.keys() == opened.spec.weights().keys()


def test_averaged_weights_of_a_folder(save: Save):
    folder = save(pickled=True, **SMALL)
    file = folder / "pytorch_model.bin"
    state = torch.load(file)
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, file)
    for place in (file, folder):
        opened = Checkpoint.open(place)
        assert "the averaged weights are taken, state_dict_ema" in opened.note
        assert np.array_equal(opened.tensors["norm.bias"], averaged["norm.bias"])
        opened = Checkpoint.open(place, weights_key="state_dict")
        assert (opened.note, opened.info.spec is not None) == ("", True)
        assert np.array_equal(opened.tensors["norm.bias"], state["norm.bias"])


def test_another_model_s_file_beside_a_config(save: Save):
    """What is said to be the model is taken; the folder tells of its own weights."""
    folder, name = save(**SMALL), "deit_tiny_patch16_224"
    rng = np.random.default_rng(0)
    shapes = known_model(name)[0].weights()
    save_file(
        {n: rng.random(s, np.float32) for n, s in shapes.items()}, folder / "mine.safetensors"
    )
    opened = load_model(name, folder / "mine.safetensors")
    assert (opened.spec.model, opened.spec.depth) == (name, 12)
    assert opened.preprocess_from == f"timm's for {name}"


def test_both_norms(save: Save):
    folder = save(**SMALL)
    tensors = load_file(folder / "model.safetensors")
    more = {f"fc_norm.{leaf}": tensors[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    save_file({**tensors, **more}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="a norm before the pooling and one after it"):
        load_model(checkpoint=folder)


def test_folders_that_lack_files(save: Save):
    folder = save(**SMALL)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model.safetensors, nor pytorch_model.bin.$"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no folder that transformers or timm saved"):
        Checkpoint.open(folder)


def test_commands_take_it(save: Save, tmp_path: Path, make_images: Callable[..., Any]):
    folder = save(more={"label_names": ["crow", "jay", "kite"]}, **SMALL)
    run, out = CliRunner(), tmp_path / "out"
    done = run.invoke(cli, ["inspect", str(folder), "--json"])
    assert json.loads(done.output)["model"] == TINY
    options = ["--bank", "none", "--targets", "0", "--no-verify", "--out", str(out)]
    done = run.invoke(cli, ["build", "--model", f"local-dir:{folder}", *options])
    assert done.exit_code == 0, done.output
    assert f"by the config.json of local-dir:{folder}" in done.output
    bundle = load(out)
    assert bundle.classes == ("crow", "jay", "kite")
    for path in (folder, folder / "model.safetensors"):
        done = run.invoke(cli, ["evaluate", str(path), "--data", "nowhere", "--bank", "none"])
        assert "nowhere" in done.output
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"] = tensors["head.bias"] + np.float32(1)
    save_file(tensors, folder / "model.safetensors")
    images = make_images(bundle.spec)
    before = bundle.engine("r00").run(images)
    refit(out, checkpoint=folder, verify=False)
    assert np.allclose(load(out).engine("r00").run(images), before + 1, atol=1e-5)
    edit(folder, lambda config: config["model_args"].update(act_layer="relu"))
    with pytest.raises(CheckpointError, match="has activation relu, the bundle gelu"):
        refit(out, checkpoint=folder)
