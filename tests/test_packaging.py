from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tocom_export
from tocom_export._version import __version__

ROOT = Path(__file__).parent.parent
SOURCES = ("tocom_export", "training", "engines", "cli")
OPTIONAL = ("torch", "timm", "onnxruntime", "tensorrt", "tensorrt_rtx", "PIL", "matplotlib")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: a build leaves folders behind, and what an older one left would be packed.
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def packed(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_has_the_version_of_the_package(wheel: Path) -> None:
    assert wheel.name == f"tocom_export-{__version__}-py3-none-any.whl"


def test_wheel_installs_one_top_level_name(packed: set[str]) -> None:
    top = {name.split("/")[0] for name in packed}
    assert top == {"tocom_export", f"tocom_export-{__version__}.dist-info"}


def test_wheel_holds_every_file_of_the_package(packed: set[str]) -> None:
    wanted = set()
    for folder in SOURCES:
        inside = Path() if folder == "tocom_export" else Path(folder)
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                path = "tocom_export" / inside / file.relative_to(ROOT / folder)
                wanted.add(path.as_posix())
    assert {f"tocom_export/{name}/__init__.py" for name in ("graph", *SOURCES[1:])} <= wanted
    assert "tocom_export/py.typed" in wanted
    assert wanted <= packed


def test_wheel_carries_the_licence(packed: set[str]) -> None:
    assert f"tocom_export-{__version__}.dist-info/licenses/LICENSE" in packed


def test_import_brings_in_no_optional_package(tmp_path: Path) -> None:
    code = f"import sys, tocom_export; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]"


def test_every_exported_name_resolves() -> None:
    assert len(tocom_export.__all__) > 5
    assert [name for name in tocom_export.__all__ if not hasattr(tocom_export, name)] == []
