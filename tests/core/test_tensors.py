from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tocom_export.errors import CheckpointError
from tocom_export.io.tensors import StoredTensor, is_finite, map_tensors, read_header, read_tensors


def write(file: Path, header: Any, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "w.safetensors"


def test_every_tensor_lies_where_it_says(file: Path):
    tensors: dict[str, np.ndarray] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float16),
        "empty": np.empty((0, 3), np.float32),
    }
    save_file(tensors, file, {"k": "v"})
    stored, metadata = read_header(file)
    assert metadata == {"k": "v"}
    assert set(stored) == set(tensors)
    raw = file.read_bytes()
    for name, array in tensors.items():
        place = stored[name]
        assert place.file == file
        assert place.shape == array.shape
        assert raw[place.offset : place.offset + place.length] == array.tobytes()
    assert stored["b"].dtype == "F16"


def test_a_file_without_metadata(file: Path):
    write(file, entry(), bytes(8))
    stored, metadata = read_header(file)
    assert metadata == {}
    assert stored == {"a": StoredTensor(file, "F32", (2,), file.stat().st_size - 8, 8)}


def test_missing_file(file: Path):
    with pytest.raises(CheckpointError, match="no such file") as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def test_folder(tmp_path: Path):
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_what_git_lfs_leaves_in_place_of_a_file(file: Path):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer, in place of the weights"):
        read_header(file)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.6, 0.999])
def test_truncated(file: Path, share: float):
    save_file({"a": np.ones(64, np.float32), "b": np.ones(3, np.float32)}, file)
    raw = file.read_bytes()
    file.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def test_truncated_data_says_both_sizes(file: Path):
    write(file, entry(), bytes(7))
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    size = file.stat().st_size
    assert f"{size} bytes" in str(caught.value)
    assert str(size + 1) in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        [],
        3,
        "text",
        None,
        {"a": 3},
        {"a": {}},
        entry(dtype=4),
        entry(shape="2"),
        entry(shape=[-2]),
        entry(shape=[2.0]),
        entry(shape=[True, 2]),
        entry(shape=[3]),
        entry(offsets=[0]),
        entry(offsets=[0, 4, 8]),
        entry(offsets=[8, 0]),
        entry(offsets=[0, "8"]),
        entry(offsets=None),
        {**entry(), "__metadata__": None},
        {**entry(), "__metadata__": [1]},
    ],
)
def test_a_header_that_the_format_does_not_allow(file: Path, header: Any):
    with pytest.raises(CheckpointError) as caught:
        read_header(write(file, header, bytes(8)))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"1234567",
        b"PK\x03\x04" + bytes(40),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"\xff\xff",
        struct.pack("<Q", 50_000) + b"[" * 50_000,
        struct.pack("<Q", 11) + b'{"a":1e999}',
        struct.pack("<Q", 9) + b'{"a":NaN}',
    ],
    ids=["empty", "short", "zip", "huge header", "no utf-8", "deep", "infinite", "NaN"],
)
def test_not_safetensors(file: Path, raw: bytes):
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="not a safetensors file") as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    position=st.integers(0, 90),
    byte=st.integers(0, 255),
)
def test_one_changed_byte_is_read_or_refused(file: Path, position: int, byte: int):
    save_file({"a": np.ones(3, np.float32)}, file, {"k": "v"})
    raw = bytearray(file.read_bytes())
    raw[position % len(raw)] = byte
    file.write_bytes(raw)
    try:
        stored, _ = read_header(file)
    except CheckpointError:
        return
    assert all(place.offset + place.length <= len(raw) for place in stored.values())


TENSORS: dict[str, np.ndarray] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "c": np.arange(3).astype(np.float16),
    "d": np.arange(7, dtype=np.int8),
    "scalar": np.array(4, np.float32),
    "empty": np.empty((0, 3), np.float32),
}


def same(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(found[name], tensor)


def test_tensors_are_mapped(file: Path):
    save_file(TENSORS, file)
    found = map_tensors(read_header(file)[0])
    same(found)
    with pytest.raises(ValueError, match="read-only"):
        found["a"][:] = 0
    assert map_tensors({}) == {}


def test_tensors_are_read_from_memory(file: Path):
    save_file(TENSORS, file)
    same(read_tensors(file.read_bytes()))


@pytest.mark.parametrize("content", [b"", b"none", b"\xff" * 64])
def test_memory_without_tensors(content: bytes):
    with pytest.raises(SafetensorError):
        read_tensors(content)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite(dtype: Any, bad: float):
    array = np.ones((3, 5), dtype)
    assert is_finite(array)
    array[1, 2] = bad
    assert not is_finite(array)


def test_finite_where_the_sum_overflows():
    assert is_finite(np.full(100, 3e38, np.float32))
    assert not is_finite(np.array([np.inf, -np.inf, 1], np.float32))
