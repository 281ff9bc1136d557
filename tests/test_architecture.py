"""The house rules that a machine can see: which way imports point, and how long rooms are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tocom_export.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
TOPS = ("tocom_export", "engines", "training", "cli")
BELOW = {
    "tocom_export": (),
    "engines": ("tocom_export",),
    "training": ("tocom_export",),
    "cli": ("tocom_export", "engines", "training"),
}
"""Top-level folder → those that it may import."""
LOOK_UP = {
    "__init__.py", "__main__.py", "export_checks.py", "exporting.py", "loading.py", "refitting.py",
    "plan_refitting.py",
    "bundle/opening.py",
}  # fmt: skip
"""Of the core, the files that may look up at what is installed; within functions alone."""


def sources(top: str) -> list[Path]:
    links = {ROOT / "tocom_export" / name for name in TOPS}
    return sorted(file for file in (ROOT / top).rglob("*.py") if not links & {*file.parents})


ALL = [file for top in TOPS for file in sources(top)]


def imported(file: Path) -> Iterator[tuple[str, bool]]:
    """Absolute names of our modules that a file imports, and whether at its import."""
    tree = ast.parse(file.read_text("utf-8"))
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.If))  # ast.If: TYPE_CHECKING
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
            continue
        if node.module.split(".")[0] == "tocom_export":
            names = [node.module]
            if node.module == "tocom_export":
                names = [f"tocom_export.{alias.name}" for alias in node.names]
            yield from ((name, node not in late) for name in names)


def top_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in TOPS else "tocom_export"


def test_there_is_something_to_test():
    assert len(ALL) > 100


@pytest.mark.parametrize("top", TOPS)
def test_imports_point_one_way(top: str):
    for file in sources(top):
        place = file.relative_to(ROOT / top).as_posix()
        for module, at_import in imported(file):
            if top == "tocom_export" and place in LOOK_UP and not at_import:
                continue
            assert top_of(module) in BELOW[top], f"{file}: {module}"


def test_relative_within_a_folder_and_absolute_across():
    for file in ALL:
        top = file.relative_to(ROOT).parts[0]
        depth = len(file.relative_to(ROOT / top).parts)
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{file} leaves its folder by a relative import"


def test_rooms_are_small():
    for file in ALL:
        text = file.read_text("utf-8")
        assert len(text.splitlines()) <= 300, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 80, f"{file}: {node.name}"


def test_the_command_line_parses_calls_and_prints():
    """What a command does lies elsewhere; 325 lines for each are enough to ask and to answer."""
    lines = sum(len(file.read_text("utf-8").splitlines()) for file in sources("cli"))
    assert lines <= 325 * len(COMMANDS)


def test_a_checkout_is_the_whole_package():
    for name in TOPS[1:]:
        link = ROOT / "tocom_export" / name
        assert (link / "__init__.py").samefile(ROOT / name / "__init__.py")
