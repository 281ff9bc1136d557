"""The command line run in-process, in a folder of its own, on a model that builds in no time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from tocom_export.bank import ToComBank
from tocom_export.cli.main import cli
from tocom_export.info import ModelInfo
from tocom_export.method import Method
from tocom_export.spec import VitSpec

SOURCE = 4
CLASSES = tuple(f"class-{letter}" for letter in "abcdefghij")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small are slower on several threads, by far on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of every test."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run() -> Callable[..., Result]:
    """``tocom-export`` with some arguments."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def succeeds(run: Callable[..., Result]) -> Callable[..., Result]:
    """The same, where it must end well."""

    def call(*arguments: object) -> Result:
        result = run(*arguments)
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result

    return call


@pytest.fixture
def fails(run: Callable[..., Result]) -> Callable[..., Result]:
    """The same, where it must end with a short message that holds all of ``says``."""

    def call(*arguments: object, says: tuple[object, ...], status: int = 2) -> Result:
        result = run(*arguments)
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == status
        message = result.stderr.strip()
        assert message.startswith("Error: ")
        assert "Traceback" not in message
        assert len(message.splitlines()) <= 2
        for text in says:
            assert str(text) in message
        return result

    return call


@pytest.fixture(scope="session")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    """17 tokens; degree 4 leaves 13, 9, 5 and 3, degree 8 leaves 9, 5, 3 and 2."""
    return make_spec(model="tiny", image_size=[32, 32])


@pytest.fixture(scope="session")
def info(spec: VitSpec) -> ModelInfo:
    return ModelInfo(spec, SOURCE, Method("tome"), CLASSES)


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable, info: ModelInfo
) -> Path:
    """A checkpoint of degree 4 that says what it is."""
    folder = tmp_path_factory.mktemp("checkpoint")
    file: Path = make_checkpoint(folder, info.spec, metadata=info.to_metadata())
    return file


@pytest.fixture(scope="session")
def bank_file(tmp_path_factory: pytest.TempPathFactory, make_bank: Callable, spec: VitSpec) -> Path:
    bank: ToComBank = make_bank(spec)
    file = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    bank.save(file)
    return file


@pytest.fixture
def model(checkpoint: Path, bank_file: Path) -> tuple[object, ...]:
    """The options of ``build`` that name the model, and leave verification out."""
    return ("--checkpoint", checkpoint, "--bank", bank_file, "--no-verify")


@pytest.fixture
def bundle(succeeds: Callable[..., Result], model: tuple[object, ...], tmp_path: Path) -> Path:
    """A bundle with the targets 4 (its source) and 8, a test's own."""
    succeeds("build", *model, "--targets", "4,8", "--out", tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def damage() -> Callable[..., None]:
    """Changes one byte of a file."""

    def call(file: Path, position: int = -50) -> None:
        data = bytearray(file.read_bytes())
        data[position] ^= 1
        file.write_bytes(data)

    return call


@pytest.fixture
def photos(tmp_path: Path, image_folder: Callable[..., Path]) -> Path:
    """12 images of two classes, ``a`` and ``b``."""
    return image_folder(tmp_path / "photos")


@pytest.fixture
def nan_in() -> Callable[[Path], None]:
    """Makes the last value of a bundle's weights NaN, with a manifest that agrees."""

    def call(file: Path) -> None:
        content = file.read_bytes()[:-4] + np.float32("nan").tobytes()
        file.write_bytes(content)
        manifest = json.loads((file.parent / "manifest.json").read_text())
        manifest["files"][file.name]["sha256"] = hashlib.sha256(content).hexdigest()
        (file.parent / "manifest.json").write_text(json.dumps(manifest))

    return call


@pytest.fixture
def files_end_at() -> Callable[[int], AbstractContextManager[None]]:
    """A disk that is full once a file has so many bytes."""
    resource = pytest.importorskip("resource", reason="needs POSIX's limits")

    @contextmanager
    def call(limit: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return call
