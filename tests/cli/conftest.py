"""The command line run in-process, in a folder of its own, on a model that builds in no time."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click import Context
from click.testing import CliRunner, Result
from PIL import Image

from tocom_export.bundle.file_hashes import record_files
from tocom_export.bundle.manifest import seal
from tocom_export.cli.main import COMMANDS, cli
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.compression.method import Method
from tocom_export.io.tensors import read_header
from tocom_export.model.spec import VitSpec
from tocom_export.training.data.train import TrainData

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
    """``tocom-export`` with some arguments, which never speaks of its options in backticks."""

    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        if arguments and "-vv" not in arguments and str(arguments[0]) in COMMANDS:
            command: Any = cli.get_command(Context(cli), str(arguments[0]))
            assert command.name_options(result.stderr) == result.stderr
        return result

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
    file: Path = make_checkpoint(folder, info.spec, metadata=to_metadata(info))
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
    """A bundle with the degrees 4 (its source) and 8, a test's own."""
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
def recipe(photos: Path) -> tuple[object, ...]:
    """The options of a training run of two epochs of three steps."""
    return ("--data", photos, "--epochs", 2, "--batch", 4, "--workers", 0)


@pytest.fixture
def written(here: Path) -> Callable[[], list[str]]:
    """What lies in the working directory, but for TensorBoard's log where that is installed."""
    return lambda: sorted(p.name for p in here.iterdir() if p.suffix != ".tensorboard")


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Training is interrupted when an epoch begins."""
    epochs = TrainData.epoch

    @contextmanager
    def call(number: int) -> Iterator[None]:
        def epoch(self: TrainData, epoch: int, *arguments: object) -> object:
            if epoch == number:
                raise KeyboardInterrupt
            return epochs(self, epoch, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(TrainData, "epoch", epoch)
            yield

    return call


@pytest.fixture
def started(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, object]]:
    """What would decide the outcome of a training command, which stops before its first step."""

    def call(command: str, *arguments: object) -> dict[str, object]:
        found: dict[str, object] = {}

        def train(_: object, __: object, data: TrainData, recipe: object, *___: object, **rest):
            found.update({**vars(recipe), **data.identity, **rest["identity"]})
            found["accumulate"], found["amp"] = rest["accumulate"], rest["process"].amp
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            module = {"train": "distill"}.get(command, command)
            patched.setattr(f"tocom_export.training.{module}.train", train)
            result = run(command, *arguments)
        assert result.exit_code == 130, result.output + repr(result.exception)
        return found

    return call


@pytest.fixture
def make_shards() -> Callable[..., Path]:
    """WebDataset shards of image files with their labels, five samples each."""

    def call(
        folder: Path, images: Sequence[bytes], labels: Sequence[int], classes: Sequence[str]
    ) -> Path:
        folder.mkdir(parents=True)
        (folder / "classes.txt").write_text("\n".join(classes))
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            mode = "a" if index % 5 else "w"
            with tarfile.open(folder / f"{index // 5:03d}.tar", mode) as tar:
                for kind, content in (("png", image), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{index:04d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return folder

    return call


@pytest.fixture(scope="session")
def pictures(make_images: Callable, spec: VitSpec) -> list[bytes]:
    """PNG files with structure, on which small differences between models tell."""
    files = []
    for pixels in make_images(spec, 48):  # (3, 32, 32), roughly -4 to 4
        stream = io.BytesIO()
        values = (pixels * 32 + 128).clip(0, 255).astype(np.uint8)
        Image.fromarray(values.transpose(1, 2, 0)).save(stream, "png")
        files.append(stream.getvalue())
    return files


@pytest.fixture
def labelled(
    tmp_path: Path, make_shards: Callable, pictures: list[bytes], info: ModelInfo
) -> Callable[..., Path]:
    """The pictures under given labels."""

    def call(name: str, labels: Sequence[int], classes: Sequence[str] | None = None) -> Path:
        return make_shards(tmp_path / name, pictures, labels, classes or info.classes)

    return call


@pytest.fixture
def misreads() -> Callable[[Path], None]:
    """Points the graph of degree 8 at the second layer's weights for the first."""

    def call(bundle: Path) -> None:
        name, graph = "blocks.0.attn.qkv.weight", bundle / "r08.onnx"
        stored = read_header(bundle / "r08.safetensors")[0]
        first, second = (str(stored[n].offset) for n in (name, name.replace("0", "1")))
        assert len(first) <= len(second)
        content = graph.read_bytes()
        changed = content.replace(second.encode(), first.zfill(len(second)).encode())
        assert changed != content
        graph.write_bytes(changed)
        manifest = json.loads((bundle / "manifest.json").read_text())
        record = record_files(bundle, ["r08.onnx"])["r08.onnx"]
        manifest["files"]["r08.onnx"]["sha256"] = record.sha256
        (bundle / "manifest.json").write_text(seal(manifest))

    return call


@pytest.fixture
def nan_in() -> Callable[[Path], None]:
    """Makes the last value of a bundle's weights NaN, with a manifest that agrees."""

    def call(file: Path) -> None:
        content = file.read_bytes()[:-4] + np.float32("nan").tobytes()
        file.write_bytes(content)
        manifest = json.loads((file.parent / "manifest.json").read_text())
        manifest["files"][file.name]["sha256"] = hashlib.sha256(content).hexdigest()
        (file.parent / "manifest.json").write_text(seal(manifest))

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
