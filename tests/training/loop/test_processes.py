"""Training in processes of their own: killed, stopped, and several at once."""

from __future__ import annotations

import os
import random
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from tocom_export.cli.main import cli
from tocom_export.compression.metadata import ModelInfo, to_metadata

SCRIPT = Path(__file__).with_name("runs.py")
runs = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def start(*command: object, **environment: str) -> subprocess.Popen[str]:
    """A process with this one's Python."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "images", each=20)


def log(out: Path) -> str:
    return out.with_suffix(".safetensors.csv").read_text()


def test_a_killed_run_goes_on_to_the_same_bank(tmp_path: Path, images: Path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    runs.run_bank(images, whole)
    stop = random.randint(2, runs.STEPS - 5)  # no seed: another step each time
    with start(SCRIPT, "distil", images, out) as child:
        for line in child.stdout:
            if int(line) == stop:
                child.kill()
                break
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    assert out.with_suffix(".safetensors.state").exists()

    taken: list[int] = []
    runs.run_bank(images, out, report=lambda step, *_: taken.append(step))
    assert taken == list(range(taken[0], runs.STEPS + 1))
    assert 1 < taken[0] <= stop + 5, f"killed at step {stop}"
    assert out.read_bytes() == whole.read_bytes(), f"killed at step {stop}"
    assert log(out) == log(whole)


def test_sigterm_saves_and_ends_well(
    tmp_path: Path, images: Path, make_checkpoint: Callable[..., Path]
):
    metadata = to_metadata(ModelInfo(spec=runs.SPEC))
    checkpoint = make_checkpoint(tmp_path, runs.SPEC, metadata=metadata)
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"

    def command(out: Path, workers: int = 0) -> list[str]:
        options = f"--epochs 12 --batch 4 --workers {workers} --device cpu -v"
        return [
            "train", f"--checkpoint={checkpoint}", f"--data={images}", f"--out={out}",
            *options.split(),
        ]  # fmt: skip

    def finish(out: Path) -> None:
        result = CliRunner().invoke(cli, command(out))
        assert result.exit_code == 0, result.output

    finish(whole)
    with start("-m", "tocom_export.cli.main", *command(out, workers=1)) as child:
        for line in child.stderr:
            if "step 30/120" in line:
                os.killpg(child.pid, signal.SIGTERM)  # as Slurm does: to the worker as well
                break
        said = child.communicate()[1]
    assert child.returncode == 130, said
    state = out.with_suffix(".safetensors.state")
    assert said.rstrip().splitlines()[-1].startswith("Stopped after step ")
    assert str(state) in said
    assert state.exists()
    assert not out.exists()
    finish(out)
    assert not state.exists()
    assert out.read_bytes() == whole.read_bytes()
    assert log(out) == log(whole)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The folder that two processes leave their results in."""
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [start(SCRIPT, "ddp", images, folder, RANK=str(rank), **world) for rank in range(2)]
    for child in children:
        said: Any = child.communicate(timeout=120)
        assert child.returncode == 0, said[1]
    return folder


@pytest.mark.parametrize(
    ("case", "accumulate"),
    [("plain", 1), ("plain", 2), ("full", 2), ("model", 1)],
)
def test_two_processes_train_what_one_does(
    tmp_path: Path, images: Path, two_processes: Path, case: str, accumulate: int
):
    alone = tmp_path / "alone.safetensors"
    losses: list[float] = []
    runs.CASES[case](
        images, alone, accumulate=accumulate, report=lambda *step: losses.append(step[2])
    )
    assert len(losses) == runs.STEPS
    assert runs.largest_difference(alone, two_processes / alone.with_stem(case).name) <= 1e-5
    lines = log(two_processes / alone.with_stem(case).name).splitlines()[1:]
    for line, loss in zip(lines, losses, strict=True):
        assert float(line.split(",")[1]) == pytest.approx(loss, abs=1e-5)


def test_parts_draw_apart_so_that_one_whole_batch_differs(
    tmp_path: Path, images: Path, two_processes: Path
):
    runs.run_bank(images, tmp_path / "alone.safetensors")
    found = runs.largest_difference(
        tmp_path / "alone.safetensors", two_processes / "full.safetensors"
    )
    assert found > 1e-4


def test_sigterm_to_one_process_stops_all(tmp_path: Path, images: Path, two_processes: Path):
    said = {(two_processes / f"stopped{rank}").read_text() for rank in range(2)}
    state = two_processes / "stopped.safetensors.state"
    assert said == {f"Stopped after step 7 of {runs.STEPS}; saved in {state}."}
    assert len(log(two_processes / "stopped.safetensors").splitlines()) == 1 + 7
    runs.run_bank(images, two_processes / "stopped.safetensors", accumulate=2)  # as one process
    found = runs.largest_difference(
        two_processes / "stopped.safetensors", two_processes / "full.safetensors"
    )
    assert found <= 1e-5
