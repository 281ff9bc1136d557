"""What holds for every command: help, exit statuses, and what is imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tocom_export._version import __version__
from tocom_export.cli.main import COMMANDS
from tocom_export.study.results import Results, Row

Run = Callable[..., Result]
HEAVY = ("torch", "timm", "onnxruntime", "openvino", "onnx", "tensorrt", "matplotlib")
CALL = "from tocom_export.cli.main import main; main()"


def imported(*commands: list[str]) -> list[str]:
    """Which heavy packages a fresh process has imported after some command lines."""
    code = f"""
import json, sys
from tocom_export.cli.main import cli
for arguments in {list(commands)!r}:
    try:
        cli(arguments)
    except SystemExit as status:
        assert not status.code, arguments
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(succeeds: Run, command: str, flag: str):
    text = succeeds(command, flag).stdout
    assert f"tocom-export {command}" in re.split("Examples?:\n", text)[1]
    if command != "completion":  # whose output is a shell's
        for option in ("--json", "--verbose", "--quiet"):
            assert option in text


def test_the_help_of_all(succeeds: Run):
    text = succeeds("--help").stdout
    for command, summary in COMMANDS.items():
        assert command in text
        assert summary in text
    assert "tocom-export build" in text


def test_the_commands():
    wanted = [
        "build",
        "inspect",
        "refit",
        "verify",
        "run",
        "show",
        "tune",
        "bench",
        "train",
        "finetune",
        "evaluate",
        "serve",
        "triton",
        "completion",
    ]
    assert list(COMMANDS) == wanted


def test_the_version(succeeds: Run):
    assert succeeds("--version").stdout.strip() == f"tocom-export, version {__version__}"


def test_no_command_shows_the_help(run: Run):
    result = run()
    assert result.exit_code == 2
    assert result.output.startswith("Usage:")
    assert "build" in result.output


def test_help_imports_nothing_heavy():
    assert imported(["--help"], ["--version"]) == []
    assert imported(*([name, "--help"] for name in COMMANDS)) == []


def test_making_a_page_imports_no_torch(here: Path):
    row = Row("flowers", "tome", 0, 8, 50.0, 60.0, 70.0, 0, throughput=9.0)
    Results((row,)).save(here / "study" / "results.json")
    assert imported(["evaluate", "--out", "study", "-q"]) == ["matplotlib"]
    assert (here / "study" / "accuracy.svg").exists()


def test_building_from_safetensors_imports_no_torch(checkpoint: Path, bank_file: Path, here: Path):
    arguments = ["build", "--checkpoint", str(checkpoint), "--bank", str(bank_file),
                 "--no-verify", "--targets", "8", "--out", "out"]  # fmt: skip
    assert not {"torch", "timm", "onnxruntime"} & set(imported(arguments))
    assert (here / "out" / "r08.onnx").exists()


def test_exit_statuses_of_the_process(checkpoint: Path):
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CALL, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    good = call("inspect", str(checkpoint), "--json")
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["kind"] == "checkpoint"
    bad = call("inspect", "none")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "Error: none: no such file or folder.\n"


@pytest.mark.parametrize(
    "arguments, says",
    [(["bild"], "bild"), (["build", "--tragets", "8"], "--targets"), (["--loud"], "--loud"),
     (["build", "--targets"], "--targets"), (["inspect"], "PATH"), (["verify", "a", "b"], "b"),
     (["build", "--backend", "torchscript"], "--backend")],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors(fails: Run, arguments: list[str], says: str):
    result = fails(*arguments, says=(says, "--help"))
    assert result.stdout == ""


def test_an_output_that_lacks_characters(tmp_path: Path):
    """As Windows' code pages do."""
    done = subprocess.run(
        [sys.executable, "-m", "tocom_export.cli.main", "verify", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    assert done.returncode == 0
    assert b"max |?|" in done.stdout


@pytest.mark.parametrize("options", [("--seed", "-1"), ("--lr", "nan"), ("--scale", "inf")])
def test_numbers_that_make_no_sense(fails, options: tuple[str, str], here: Path):
    (here / "images").mkdir()
    fails("train", "--data", "images", *options, says=(options[0],))


@pytest.mark.parametrize(
    ("typed", "near"),
    [("buidl", "build"), ("infer", None), ("re-fit", "refit"), ("benhc", "bench")],
)
def test_a_mistyped_command(fails: Run, typed: str, near: str | None):
    said = fails(typed, says=(f"No such command '{typed}'", "See '")).stderr
    assert ("did you mean" in said) is (near is not None)
    assert near is None or f"did you mean {near}?" in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(succeeds: Run, shell: str):
    """The script asks the program, which answers with commands and with options."""
    script = succeeds("completion", shell).stdout
    assert f"_TOCOM_EXPORT_COMPLETE={shell}_complete" in script
    environment = {**os.environ, "_TOCOM_EXPORT_COMPLETE": "bash_complete"}
    for words, answer in ((("re",), "plain,refit"), (("refit", "--sc"), "plain,--scale")):
        line = ("tocom-export", *words)
        asked = {**environment, "COMP_WORDS": " ".join(line), "COMP_CWORD": str(len(words))}
        code = "from tocom_export.cli.main import cli; cli(prog_name='tocom-export')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=asked, capture_output=True, text=True
        )
        assert answer in done.stdout.splitlines()


def test_the_package_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "tocom_export", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"tocom-export, version {__version__}"
