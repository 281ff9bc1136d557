"""Kill commands that write, at random moments, and look at what they leave.

python scripts/kill_writers.py RUNS [--seed N]

Each run starts one of build, build --force, refit of a variant, refit of a bundle, train and
finetune on a small model, and ends it by SIGKILL or SIGTERM after a random part of the time that
it takes. Prints a table, and exits with 1 where a bundle, a bank or a checkpoint was lost or
damaged, or where something is left beside it after the same command ran once more. Says on stderr
what it does; Ctrl-C and SIGTERM end it with the table of what was done.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.errors import TocomError
from tocom_export.io.interrupting import catch_signals
from tocom_export.model.catalogue import REFERENCE_CHECKPOINT

CLI = (sys.executable, "-m", "tocom_export.cli.main")


@dataclass(frozen=True)
class Writer:
    """A command, and how what it writes is opened."""

    name: str
    arguments: tuple[str, ...]
    made: str
    """What it writes, within the folder that it runs in."""
    open: Callable[[Path], object]
    before: str = ""
    """What has to lie there before: a name in the folder of what was prepared."""


def open_bundle(path: Path) -> object:
    """A bundle whose files all are what the manifest says."""
    return Bundle.open(path, hashes=True)


def list_writers() -> list[Writer]:
    """All of them; the shipped model, whose bundle takes a second."""
    recipe = (
        "--data", "../images", "--epochs", "2", "--batch", "8", "--device", "cpu", "--workers", "0",
    )  # fmt: skip
    model = ("--checkpoint", str(REFERENCE_CHECKPOINT))
    build = ("build", "--targets", "0,8", "--out", "made", "--no-verify")
    refit = ("refit", "made", "--scale", "0.3", "--no-verify")
    one = ("refit", "made/r08.onnx", "--scale", "0.3", "--no-verify")
    train = ("train", *model, *recipe, "--out", "bank.safetensors")
    tune = ("finetune", *model, *recipe, "--source", "4", "--out", "tuned.safetensors")
    return [
        Writer("build", build, "made", open_bundle),
        Writer("build --force", (*build, "--force"), "made", open_bundle, "bundle"),
        Writer("refit a variant", one, "made", open_bundle, "bundle"),
        Writer("refit a bundle", refit, "made", open_bundle, "bundle"),
        Writer("train", train, "bank.safetensors", ToComBank.load),
        Writer("finetune", tune, "tuned.safetensors", Checkpoint.open),
    ]


def prepare(folder: Path) -> None:
    """A bundle, and a few images of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    run(("build", "--targets", "0,8", "--out", "bundle", "--no-verify"), folder)


def lay_out(writer: Writer, root: Path) -> Path:
    """A fresh folder to run in, with what the command needs."""
    folder = root / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if writer.before:
        shutil.copytree(root / writer.before, folder / writer.made)
    return folder


def run(arguments: Sequence[str], folder: Path) -> float:
    """Run a command to its end; seconds that it took."""
    began = time.monotonic()
    done = subprocess.run([*CLI, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return time.monotonic() - began


def kill(writer: Writer, folder: Path, number: signal.Signals, after: float) -> tuple[int, str]:
    """Start a command and send it a signal; its exit status, and what it said."""
    child = subprocess.Popen(
        [*CLI, *writer.arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},  # says where it crashed
    )
    try:
        _, said = child.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        child.send_signal(number)
        _, said = child.communicate()
    finally:
        child.kill()  # where this program is to stop
    return child.returncode, said


def inspect(writer: Writer, folder: Path) -> str:
    """What is wrong with what a killed writer left; empty where nothing is."""
    made = folder / writer.made
    if writer.before and not made.exists():
        return "lost"
    if made.exists():
        try:
            writer.open(made)
        except TocomError as error:
            return f"damaged: {error}"
    return ""


def judge_signal(number: signal.Signals, status: int, said: str, folder: Path) -> list[str]:
    """What is wrong right after a signal; before our first line SIGTERM is the system's."""
    if number == signal.SIGKILL or status in (0, -signal.SIGTERM):
        return []
    wrong = [] if status == 130 else [f"status {status}, and said: {said}"]
    return [*wrong, *find_leftovers(folder)]


def run_again(writer: Writer, folder: Path) -> None:
    """Run the command to its end, over what it may have made already."""
    words = [word for word in writer.arguments if word != "--force"]
    makes = writer.arguments[0] != "refit" and (folder / writer.made).exists()
    run([*words, *(["--force"] if makes else [])], folder)


def find_leftovers(folder: Path) -> list[str]:
    """Hidden files, anywhere below."""
    return sorted(f"left {file.relative_to(folder)}" for file in folder.rglob(".*"))


def main() -> int:
    """Exit status 1 where something was lost, damaged or left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    catch_signals()
    rng, counts, faults = random.Random(options.seed), Counter[tuple[str, str]](), []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        prepare(root)
        writers, spans = list_writers(), {}
        for writer in writers:
            lay_out(writer, root)
            spans[writer.name] = run(writer.arguments, root / "run")
        with suppress(KeyboardInterrupt):
            for index in range(options.runs):
                writer = writers[index % len(writers)]
                folder = lay_out(writer, root)
                number = rng.choice((signal.SIGKILL, signal.SIGTERM))
                after = rng.uniform(0, 1.05) * spans[writer.name]
                status, said = kill(writer, folder, number, after)
                found = [*judge_signal(number, status, said, folder), inspect(writer, folder)]
                run_again(writer, folder)
                found += [inspect(writer, folder), *find_leftovers(folder)]
                counts[writer.name, "finished" if status == 0 else number.name] += 1
                told = f"{writer.name}, {number.name} after {after:.2f} s"
                faults += [f"{told}: {fault}" for fault in found if fault]
                print(
                    f"{index + 1}: {told}: status {status}", *filter(None, found), file=sys.stderr
                )
    print("| command | SIGKILL | SIGTERM | had finished |\n|---|---:|---:|---:|")
    for writer in writers:
        columns = (counts[writer.name, what] for what in ("SIGKILL", "SIGTERM", "finished"))
        print(f"| {writer.name} | {' | '.join(map(str, columns))} |")
    print(*faults, f"{len(faults)} faults in {counts.total()} runs", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
