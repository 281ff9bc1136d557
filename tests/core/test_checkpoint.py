from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from timm.models import load_state_dict

from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import METADATA_KEY, ModelInfo, to_metadata
from tocom_export.errors import CheckpointError
from tocom_export.model.spec import VitSpec

Tensors = dict[str, np.ndarray]


@pytest.fixture
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(depth=1)


@pytest.fixture
def tensors(spec: VitSpec, make_weights: Callable[..., Tensors]) -> Tensors:
    return make_weights(spec)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def refused(file: Path, spec: VitSpec) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(file).check(spec)
    assert str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_are_mapped_as_they_are(file: Path, spec: VitSpec, tensors: Tensors, dtype: Any):
    stored = {name: t.astype(dtype) for name, t in tensors.items()}
    save_file(stored, file)
    checkpoint = Checkpoint.open(file)
    assert checkpoint.check(spec) == spec
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in stored.items():
        assert checkpoint.tensors[name].dtype == dtype
        np.testing.assert_array_equal(checkpoint.tensors[name], tensor)
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.tensors["cls_token"][:] = 0


@pytest.mark.parametrize("classes", [1, 37])
def test_the_number_of_classes_is_the_checkpoints(
    file: Path, make_spec: Callable[..., VitSpec], make_weights: Callable, classes: int
):
    save_file(make_weights(make_spec(classes=classes)), file)
    assert Checkpoint.open(file).check(make_spec(classes=1000)).classes == classes


def test_a_model_without_a_head(file: Path, make_spec: Callable[..., VitSpec], make_weights):
    spec = make_spec(classes=0)
    save_file(make_weights(spec), file)
    assert Checkpoint.open(file).check(spec) == spec


def test_metadata_are_read(file: Path, spec: VitSpec, tensors: Tensors):
    info = ModelInfo(spec, source=8, classes=("a", "b"))
    save_file(tensors, file, to_metadata(info))
    assert Checkpoint.open(file).info == info
    save_file(tensors, file, {"format": "pt"})
    assert Checkpoint.open(file).info == ModelInfo()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        json.dumps({"source": 99}),
        json.dumps({"spec": {"width": 3}}),
        json.dumps({"sauce": 8}),
    ],
)
def test_bad_metadata(file: Path, spec: VitSpec, tensors: Tensors, text: str):
    save_file(tensors, file, {METADATA_KEY: text})
    refused(file, spec)


@pytest.mark.parametrize(
    ("known", "given", "default", "source"),
    [(8, None, 3, 8), (8, 8, 3, 8), (None, 4, 3, 4), (None, None, 3, 3), (0, None, 3, 0)],
)
def test_the_source_is_as_given_or_as_the_metadata_say(
    file: Path, tensors: Tensors, known: int | None, given: int | None, default: int, source: int
):
    save_file(tensors, file, to_metadata(ModelInfo(source=known)))
    assert Checkpoint.open(file).choose_source(given, default) == source


@pytest.mark.parametrize(("known", "given"), [(8, 4), (0, 4), (8, 0)])
def test_another_source_than_the_metadatas_is_refused(
    file: Path, tensors: Tensors, known: int, given: int
):
    save_file(tensors, file, to_metadata(ModelInfo(source=known)))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(file).choose_source(given)
    for part in (f"`source` {given}", str(file), f"at degree {known} by"):
        assert part in str(caught.value)


@pytest.mark.parametrize("names", [(), ("a",), ("a",) * 11])
def test_metadata_that_name_another_number_of_classes(
    file: Path, spec: VitSpec, tensors: Tensors, names: tuple[str, ...]
):
    save_file(tensors, file, to_metadata(ModelInfo(classes=names)))
    assert f"names {len(names)} classes, but its head has 10" in refused(file, spec)


def test_an_int8_bundles_weights_are_no_checkpoint(file: Path, spec: VitSpec, tensors: Tensors):
    name = "blocks.0.mlp.fc1.weight"
    save_file({**tensors, name: tensors[name].astype(np.int8)}, file)
    message = refused(file, spec)
    assert f"{name} is int8" in message
    assert "the bundle was built from" in message


def test_a_bank_is_no_checkpoint(tmp_path: Path, spec: VitSpec, make_bank):
    make_bank(spec).save(tmp_path / "bank.safetensors")
    assert "is a ToCom bank, not" in refused(tmp_path / "bank.safetensors", spec)


def test_missing_file(file: Path, spec: VitSpec):
    assert "no such file" in refused(file, spec)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated(file: Path, spec: VitSpec, tensors: Tensors, share: float):
    save_file(tensors, file)
    os.truncate(file, int(file.stat().st_size * share))
    assert "truncated" in refused(file, spec)


def test_not_safetensors(file: Path, spec: VitSpec):
    file.write_bytes(b"<html>" * 100)
    assert "not a safetensors file" in refused(file, spec)


def test_missing_tensor(file: Path, spec: VitSpec, tensors: Tensors):
    del tensors["blocks.0.norm2.bias"]
    save_file(tensors, file)
    message = refused(file, spec)
    assert f"1 of {len(tensors) + 1}" in message
    assert "blocks.0.norm2.bias" in message


def test_missing_tensor_under_another_name(file: Path, spec: VitSpec, tensors: Tensors):
    tensors["heads.weight"] = tensors.pop("head.weight")
    save_file(tensors, file)
    message = refused(file, spec)
    assert "head.weight" in message
    assert "heads.weight" in message


def test_extra_tensor(file: Path, spec: VitSpec, tensors: Tensors):
    save_file({**tensors, "blocks.0.attn.scale": np.ones(1, np.float32)}, file)
    assert "blocks.0.attn.scale" in refused(file, spec)


def test_deeper_than_the_spec(file: Path, spec: VitSpec, make_spec, make_weights):
    save_file(make_weights(make_spec(depth=2)), file)
    assert "blocks.1." in refused(file, spec)


def test_misshapen_tensor(file: Path, spec: VitSpec, tensors: Tensors):
    save_file({**tensors, "pos_embed": np.zeros((1, 17, 64), np.float32)}, file)
    message = refused(file, spec)
    for part in ("pos_embed", "(1, 17, 64)", "(1, 50, 64)", spec.model):
        assert part in message


@pytest.mark.parametrize("shape", [(10,), (10, 32), (10, 64, 1, 1), (0, 64)])
def test_misshapen_head(file: Path, spec: VitSpec, tensors: Tensors, shape: tuple[int, ...]):
    save_file({**tensors, "head.weight": np.zeros(shape, np.float32)}, file)
    assert "head" in refused(file, spec)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_not_finite(file: Path, spec: VitSpec, tensors: Tensors, bad: float, dtype: Any):
    stored = {name: t.astype(dtype) for name, t in tensors.items()}
    stored["blocks.0.mlp.fc1.weight"][3, 4] = bad
    save_file(stored, file)
    assert "blocks.0.mlp.fc1.weight" in refused(file, spec)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8])
def test_wrong_dtype(file: Path, spec: VitSpec, tensors: Tensors, dtype: Any):
    save_file({**tensors, "norm.bias": tensors["norm.bias"].astype(dtype)}, file)
    assert "norm.bias" in refused(file, spec)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts /proc/self/fd")
def test_an_open_checkpoint_holds_few_file_descriptors(tmp_path: Path, make_checkpoint, make_spec):
    file = make_checkpoint(tmp_path, make_spec())
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    checkpoint = Checkpoint.open(file)
    held = len(os.listdir("/proc/self/fd")) - before  # noqa: PTH208
    assert held < 5 < len(checkpoint.tensors)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_pytorch_files(
    tmp_path: Path, spec: VitSpec, tensors: Tensors, suffix: str, wrapper: str | None
):
    file = tmp_path / f"weights{suffix}"
    state: Any = {name: torch.from_numpy(t) for name, t in tensors.items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, file)
    checkpoint = Checkpoint.open(file)
    assert checkpoint.check(spec) == spec
    np.testing.assert_array_equal(checkpoint.tensors["pos_embed"], tensors["pos_embed"])


def test_pytorch_file_of_a_parallel_model_in_bfloat16(
    tmp_path: Path, spec: VitSpec, tensors: Tensors
):
    file = tmp_path / "weights.pth"
    state = {f"module.{n}": torch.nn.Parameter(torch.from_numpy(t)) for n, t in tensors.items()}
    torch.save({name: p.bfloat16() for name, p in state.items()}, file)
    assert Checkpoint.open(file).check(spec) == spec


def save_entries(file: Path, tensors: Tensors, **entries: float | None) -> None:
    """A training script's file: the weights times a number in each entry."""
    content: dict[str, Any] = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    for name, by in entries.items():
        state = {n: torch.from_numpy(t * np.float32(by or 0)) for n, t in tensors.items()}
        content[name] = None if by is None else state
    torch.save(content, file)


@pytest.mark.parametrize(
    ("entries", "key", "number"),
    [
        ({"state_dict": 1, "state_dict_ema": 2}, None, 2),
        ({"model_ema": 2, "model": 1}, None, 2),
        ({"state_dict": 1, "state_dict_ema": 2, "model_ema": 3}, None, 2),
        ({"state_dict": 1, "state_dict_ema": None}, None, 1),
        ({"state_dict": 1, "state_dict_ema": 2}, "state_dict", 1),
        ({"model": 1, "model_ema": 2}, "model", 1),
        ({"model": 1, "model_ema": 2}, "model_ema", 2),
        ({"student": 1, "teacher": 2}, "teacher", 2),
    ],
)
def test_averaged_weights_are_taken_as_timm_takes_them(
    tmp_path: Path, tensors: Tensors, entries: dict[str, float], key: str | None, number: float
):
    file = tmp_path / "model_best.pth.tar"
    save_entries(file, tensors, **entries)
    found = Checkpoint.open(file, key).tensors
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor * np.float32(number))
    if key is None:
        for name, tensor in load_state_dict(str(file)).items():
            np.testing.assert_array_equal(found[name], tensor.numpy())


def test_that_averaged_weights_were_taken_is_said(tmp_path: Path, tensors: Tensors):
    file = tmp_path / "weights.pth"
    save_entries(file, tensors, state_dict=1, state_dict_ema=2)
    assert Checkpoint.open(file).note == (
        f"{file}: the averaged weights are taken, state_dict_ema. `weights_key` chooses others: "
        "state_dict."
    )
    assert Checkpoint.open(file, "state_dict_ema").note == ""
    save_entries(file, tensors, model_ema=2)
    assert Checkpoint.open(file).note == f"{file}: the averaged weights are taken, model_ema."
    save_entries(file, tensors, model=1)
    assert Checkpoint.open(file).note == ""


def test_an_entry_that_isn_t_there(tmp_path: Path, tensors: Tensors):
    file = tmp_path / "weights.pth"
    save_entries(file, tensors, state_dict=1, state_dict_ema=2)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(file, "model")
    assert "has no `weights_key` model; it has optimizer, state_dict, state_dict_ema." in str(
        caught.value
    )
    torch.save({"norm.weight": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match="`weights_key` model; it is a state dict itself"):
        Checkpoint.open(file, "model")


def test_entries_that_nobody_knows_are_named(tmp_path: Path, tensors: Tensors, spec: VitSpec):
    file = tmp_path / "weights.pth"
    save_entries(file, tensors, student=1, teacher=2)
    assert "`weights_key` says in which of its entries they are: student, teacher" in refused(
        file, spec
    )


def test_a_safetensors_file_has_no_entries(file: Path, tensors: Tensors):
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"`weights_key` model: {file} has no entries"):
        Checkpoint.open(file, "model")


def test_a_file_that_holds_itself(tmp_path: Path, spec: VitSpec):
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "weights.pth")
    assert "are missing" in refused(tmp_path / "weights.pth", spec)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_of_parallel_and_compiled_models(
    tmp_path: Path, spec: VitSpec, tensors: Tensors, prefix: str, suffix: str
):
    file = tmp_path / f"weights{suffix}"
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    if suffix == ".pth":
        torch.save({"model_ema": {n: torch.from_numpy(t) for n, t in named.items()}}, file)
    else:
        save_file(named, file)
    opened = Checkpoint.open(file)
    assert opened.check(spec) == spec
    assert opened.tensors.keys() == load_state_dict(str(file)).keys()
    np.testing.assert_array_equal(opened.tensors["pos_embed"], tensors["pos_embed"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_one_tensor_under_two_names(tmp_path: Path, spec: VitSpec, tensors: Tensors, suffix: str):
    file, twice = (
        tmp_path / f"weights{suffix}",
        {**tensors, "module.norm.bias": tensors["norm.bias"]},
    )
    if suffix == ".pth":
        torch.save({name: torch.from_numpy(tensor) for name, tensor in twice.items()}, file)
    else:
        save_file(twice, file)
    assert "both norm.bias and module.norm.bias" in refused(file, spec)


class Malicious:
    """Unpickling it runs code."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, spec: VitSpec):
    file = tmp_path / "weights.pth"
    torch.save({"model": {"cls_token": Malicious(tmp_path / "witness")}}, file)
    refused(file, spec)
    refused(file.rename(tmp_path / "model_best.pth.tar"), spec)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    "raw",
    [b"", b"hello", b"\x80", b"\x80\x04.", b"PK\x03\x04 and nothing", b"\x80\x02]q\x00."],
    ids=["empty", "text", "short", "protocol alone", "zip", "list"],
)
def test_broken_pytorch_file(tmp_path: Path, spec: VitSpec, raw: bytes):
    file = tmp_path / "weights.pth"
    file.write_bytes(raw)
    refused(file, spec)


def test_missing_pytorch_file(tmp_path: Path, spec: VitSpec):
    assert "no such file" in refused(tmp_path / "none.pth", spec)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {"model": [1]}])
def test_pytorch_file_of_something_else(tmp_path: Path, spec: VitSpec, content: Any):
    torch.save(content, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", spec)


def test_pytorch_file_of_a_type_that_numpy_lacks(tmp_path: Path, spec: VitSpec, tensors: Tensors):
    state = {name: torch.from_numpy(t) for name, t in tensors.items()}
    state["norm.bias"] = state["norm.bias"].to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "weights.pth")
    assert "norm.bias" in refused(tmp_path / "weights.pth", spec)


def test_pytorch_file_with_its_arguments(tmp_path: Path, spec: VitSpec, tensors: Tensors):
    """As DeiT's training script writes it."""
    state = {name: torch.from_numpy(t) for name, t in tensors.items()}
    content = {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "weights.pth")
    opened = Checkpoint.open(tmp_path / "weights.pth")
    assert opened.check(spec) == spec


def test_pytorch_file_with_an_object(tmp_path: Path, spec: VitSpec):
    torch.save({"model": {}, "path": Path("x")}, tmp_path / "weights.pth")
    message = refused(tmp_path / "weights.pth", spec)
    assert "more than tensors (pathlib" in message
    assert "state dict alone" in message
