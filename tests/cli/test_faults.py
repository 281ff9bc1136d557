"""What the system does to a command: full disks, closed pipes, signals, folders that go away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image

from tocom_export.cli.faults import explain_fault, was_interrupted
from tocom_export.errors import MissingPackageError

CLI = [sys.executable, "-m", "tocom_export"]
FULL = Path("/dev/full")
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX")
full = pytest.mark.skipif(not FULL.exists(), reason="has no device that is full")


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*CLI, *map(str, arguments)], text=True, **streams)  # type: ignore[call-overload,no-any-return]


def says_one_line(said: str, *parts: str) -> None:
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert "report" not in said
    for part in parts:
        assert part in said


@full
@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",), ("build", "--help"), ("--version",), ("inspect", "BUNDLE"),
        ("inspect", "BUNDLE", "--json"), ("completion", "bash"),
        ("build", "--dry-run", "--json", "-q"),
    ],
)  # fmt: skip
def test_results_that_can_t_be_written(bundle: Path, arguments: tuple[str, ...]):
    words = [str(bundle) if word == "BUNDLE" else word for word in arguments]
    with FULL.open("w") as stream, start(*words, stdout=stream) as child:
        _, said = child.communicate()
    assert child.returncode == 2
    says_one_line(said, "The disk is full.")


@posix
def test_a_closed_stdout(bundle: Path):
    script = f"exec {' '.join(CLI)} inspect {bundle} >&-"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    says_one_line(done.stderr, "stdout: results have nowhere to go")


@posix
def test_a_closed_stderr(bundle: Path):
    script = f"exec {' '.join(CLI)} inspect {bundle} --json 2>&-"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout[:1]) == (0, "{")


@posix
@pytest.mark.parametrize("arguments", [("inspect", "BUNDLE", "--json"), ("--help",)])
def test_a_closed_pipe_is_no_error(bundle: Path, arguments: tuple[str, ...]):
    words = [str(bundle) if word == "BUNDLE" else word for word in arguments]
    with start(*words) as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.stderr is not None
        said = child.stderr.read()
    assert (child.returncode, said) == (141, "")


@posix
def test_the_working_directory_is_gone(tmp_path: Path, bundle: Path):
    folder = tmp_path / "gone"
    script = f"cd {folder} && rmdir {folder} && exec {' '.join(CLI)}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for words in ("build --targets 0 --no-verify", f"refit {bundle} --bank none"):
        folder.mkdir()
        line = f"{script} {words}"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment)
        assert done.returncode == 2
        says_one_line(done.stderr, "The working directory is gone")


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 130), (signal.SIGINT, 130)])
def test_a_signal_stops_a_build_that_leaves_nothing(
    here: Path, number: signal.Signals, status: int, model: tuple[object, ...]
):
    words = ("build", "--targets", "0-16", "--out", "made", "--model", "reference")

    def restore() -> None:
        """A shell has SIGINT ignored by what it starts in the background, such as these tests."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with start(*words, preexec_fn=restore) as child:
        for _ in range(400):  # until it is at work
            if list(here.glob(".made.*.part/*")):
                break
            time.sleep(0.02)
        else:
            raise AssertionError("it never began")
        child.send_signal(number)
        _, said = child.communicate()
    assert child.returncode == status
    assert said.endswith("Stopped.\n")
    assert list(here.iterdir()) == []


@posix
@pytest.mark.parametrize("command", ["build", "refit"])
def test_a_folder_that_can_t_be_written(
    succeeds: Callable[..., Result], here: Path, command: str, bank_file: Path, bundle: Path
):
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    place = here / "place"
    place.mkdir()
    shutil.copytree(bundle, place / "bundle")
    place.chmod(0o500)
    words = {
        "build": ("build", "--no-verify", "--targets", "0", "--out", place / "new"),
        "refit": ("refit", place / "bundle", "--bank", bank_file, "--scale", "0.2"),
    }[command]
    with start(*words) as child:
        _, said = child.communicate()
    place.chmod(0o700)
    assert child.returncode == 2
    says_one_line(said, "can't be written: Permission denied")


def test_a_library_that_hides_ctrl_c():
    """ONNX Runtime, when it is interrupted while it is imported, can't be imported."""
    try:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                raise ImportError("no module") from error
        except ImportError:
            raise MissingPackageError("onnxruntime", "cpu") from None
    except MissingPackageError as error:
        assert was_interrupted(error)
    assert not was_interrupted(MissingPackageError("onnxruntime", "cpu"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "x.onnx"), "x.onnx: the disk is full."),
        (OSError(13, "Permission denied", b"caf\xe9"), "caf\udce9: Permission denied."),
        (OSError(36, "File name too long", "x" * 999), f"{'x' * 120}…: File name too long."),
        (OSError("what a library says"), "What a library says."),
    ],
)
def test_a_fault_in_a_line(error: OSError, says: str):
    assert explain_fault(error) == says


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_a_path_that_is_not_utf8(bundle: Path, tmp_path: Path):
    """Everything but ONNX Runtime goes by it; that says so."""
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(bundle, place)
    with start("inspect", place, "--json") as child:
        found, _ = child.communicate()
    assert child.returncode == 0
    assert json.loads(found)["path"] == str(place)
    image = place / "x.png"
    Image.new("RGB", (32, 32)).save(image)
    with start("run", place, image, "--backend", "onnx") as child:
        _, said = child.communicate()
    assert child.returncode == 2
    says_one_line(said, "isn't UTF-8; rename it")


@posix
def test_names_of_classes_can_t_steer_the_terminal(bundle: Path):
    manifest = bundle / "manifest.json"
    data = json.loads(manifest.read_text())
    data["classes"] = [f"\x1b]0;owned\x07\x1b[2J{number}" for number in range(10)]
    manifest.write_text(json.dumps(data))
    Image.new("RGB", (32, 32)).save(bundle.parent / "x.png")
    with start("run", bundle, bundle.parent / "x.png") as child:
        shown, _ = child.communicate()
    assert child.returncode == 0
    assert "\x1b]" not in shown
    assert "owned" in shown
