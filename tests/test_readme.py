"""The README's commands, run as they are written, and its transcript held against theirs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.model.catalogue import known_model
from tocom_export.model.preprocess import find_images

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[str]:
    """Every line that a reader would type, continued lines joined, ``a && b`` taken apart."""
    typed = []
    for language, block in BLOCKS:
        if language == "console":
            lines = block.replace("\\\n", " ").splitlines()
            joined = " && ".join(line[2:] for line in lines if line.startswith("$ "))
            typed += [part.strip() for part in joined.split("&&")]
    return typed


def masked(text: str) -> list[str]:
    """Lines without what differs from run to run: the comparison with PyTorch, which needs it
    installed, times, and the widths of columns.
    """
    text = re.sub(r" +max \|Δ\| +same top-1$", "", text, flags=re.M)
    text = re.sub(r" +\d\.\de-\d\d +100 %$", "", text, flags=re.M)
    text = re.sub(r" \d+\.\d\d +(?=\d\d\.\d\d %)", " … ", text)
    text = re.sub(r"^Engines run, .*$", "", text, flags=re.M)
    text = re.sub(r"in [\d.]+ s", "in … s", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory,
    make_weights: Callable[..., Any],
    make_spec: Callable[..., Any],
    make_bank: Callable[..., Any],
    image_folder: Callable[..., Path],
) -> Path:
    """A folder with the files that the README takes for granted."""
    folder = tmp_path_factory.mktemp("desk")
    deit, _ = known_model("deit_tiny_patch16_224")
    save_file(make_weights(deit), folder / "mine.safetensors")
    make_bank(deit).save(folder / "bank.safetensors")
    small = make_spec(classes=2, depth=2)
    metadata = to_metadata(ModelInfo(small))
    save_file(make_weights(small), folder / "backbone.safetensors", metadata)
    image_folder(folder / "images" / "train", each=80)
    image_folder(folder / "images" / "test", each=8)
    find_images(folder / "images")[0].replace(folder / "cat.png")
    return folder


def test_there_are_commands_to_test():
    assert sum(command.startswith("tocom-export") for command in commands()) >= 5


def test_extras_exist():
    extras = re.findall(r"\.\[([\w,]+)\]", README)
    assert extras
    known = metadata("tocom-export").get_all("Provides-Extra")
    assert {name for extra in extras for name in extra.split(",")} <= set(known)


def test_commands_run_and_print_what_the_readme_shows(desk: Path):
    for command in commands():
        if not command.startswith("tocom-export"):
            assert command == "pytest" or command.startswith("pip install ")
            continue
        done = subprocess.run(
            [sys.executable, "-m", "tocom_export.cli.main", *shlex.split(command)[1:]],
            cwd=desk,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (command, done.stderr)
        if "--source 0 --targets 0,4,8,12,16" in command:
            printed = masked(done.stdout + done.stderr)
            transcript = next(block for language, block in BLOCKS if language == "text")
            assert [line for line in masked(transcript) if line not in printed] == []


@pytest.mark.parametrize("number", range(2))
def test_python_examples_run(desk: Path, number: int):
    examples = [block for language, block in BLOCKS if language == "python"]
    assert len(examples) == 2
    example = examples[number]
    done = subprocess.run(
        [sys.executable, "-c", example + "\nprint(logits.shape)"],
        cwd=desk,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "(1, 200)", done.stderr
