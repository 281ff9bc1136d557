"""What is public, and that each name of it is told of."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import tocom_export

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text("utf-8")
EXAMPLE = ROOT / "examples" / "library.py"
PUBLIC = [name for name in tocom_export.__all__ if name != "__version__"]


def test_dir_is_the_table_of_contents():
    assert dir(tocom_export) == sorted(tocom_export.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_is_documented(name: str):
    assert f"## `{name}" in PAGE
    assert inspect.getdoc(getattr(tocom_export, name))


def test_no_other_name_is_promised():
    told = [line.split("`")[1].split("(")[0] for line in PAGE.splitlines() if line[:4] == "## `"]
    assert sorted(told) == sorted(PUBLIC)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="nothing"):
        tocom_export.nothing  # noqa: B018


def test_a_function_stays_itself_when_its_module_is_imported():
    import tocom_export.exporting

    assert callable(tocom_export.export)


def test_the_example_runs(tmp_path: Path):
    lines = EXAMPLE.read_text("utf-8").splitlines()
    assert len(lines) <= 25
    assert not any("cli" in line for line in lines)
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "(2, 10)"
    assert (tmp_path / "example" / "fast.onnx").exists()
