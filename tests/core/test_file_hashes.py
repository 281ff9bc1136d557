from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tocom_export.bundle.file_hashes import (
    FileRecord,
    load_recorded,
    record_files,
)
from tocom_export.errors import BundleError


def record_of(content: bytes) -> FileRecord:
    return FileRecord(hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


OURS = {name: record_of(name.encode()) for name in "abc"}
OTHER = record_of(b"x")  # of the same size


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_a_record(tmp_path: Path, size: int):
    content = b"\x07" * size
    (tmp_path / "file").write_bytes(content)
    assert record_files(tmp_path, ["file"]) == {"file": record_of(content)}


def test_records_of_many_files_are_in_their_order(tmp_path: Path):
    names = [f"{number:02d}" for number in range(40)][::-1]
    for name in names:
        (tmp_path / name).write_text(name)
    found = record_files(tmp_path, iter(names))
    assert list(found) == names
    assert found == {name: record_of(name.encode()) for name in names}
    assert record_files(tmp_path, []) == {}


def test_no_record_of_what_isn_t_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        record_files(tmp_path, ["file"])


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, FileRecord, dict[str, np.ndarray]]:
    tensors: dict[str, np.ndarray] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(2, np.float16),
    }
    file = tmp_path / "weights.safetensors"
    save_file(tensors, file)
    return file, record_of(file.read_bytes()), tensors


def test_recorded_tensors_are_read(weights):
    file, record, tensors = weights
    found = load_recorded(file, record)
    file.write_bytes(bytes(record.bytes))  # in its place, which mapped tensors would show
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_another_file_than_the_recorded_one(weights, tmp_path: Path):
    file, record, _ = weights
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.safetensors is not what .*SHA-256 differs"):
        load_recorded(file, record)
    file.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"weights\.safetensors was changed since its bundle"):
        load_recorded(file, record)
    file.unlink()
    with pytest.raises(BundleError, match=r"weights\.safetensors: can't be read: No such file"):
        load_recorded(file, record)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64])
def test_a_recorded_file_without_tensors(tmp_path: Path, content: bytes):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.safetensors is not a safetensors file"):
        load_recorded(file, record_of(content))
