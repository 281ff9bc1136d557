"""A refit of files that is killed at every step of its way to the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.io.locking import hold

KILLED = """
import dataclasses, os, shutil, sys
from pathlib import Path
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.bundle.refitting import refit_bundle

old, checkpoint, bank = map(Path, sys.argv[2:])
present = Bundle.open(old)
new = ModelWeights(present.spec, Checkpoint.open(checkpoint), ToComBank.load(bank))
names = present.variants if sys.argv[1] == "all" else [sys.argv[1]]
variants = {name: dataclasses.replace(present.variant(name), scale=0.5) for name in names}
writes = ("os.rename", "os.remove", "os.rmdir", "os.link", "os.mkdir", "os.chmod")

def refit(folder, step):
    count = 0
    def watch(event, arguments):
        nonlocal count
        if event in writes or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            count += 1
            if count == step:
                os._exit(9)
    sys.addaudithook(watch)
    refit_bundle(folder, lambda bundle: (new, variants), lambda *_: None)
    os._exit(0)

step, code = 0, 9
while code == 9:
    step += 1
    folder = old.parent / f"step{step}" / "bundle"
    shutil.copytree(old, folder)
    if not (child := os.fork()):
        refit(folder, step)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(step if code == 0 else f"exit status {code}")
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX renames")
@pytest.mark.parametrize("asked", ["r08", "fast", "all"])
def test_it_is_the_old_bundle_or_the_new_one(
    make_blueprint, tmp_path: Path, make_images, revise: Callable[..., Blueprint], asked: str
):
    blueprint = make_blueprint(tmp_path, targets=(8,), schedules={"fast": (20, 3, 0, 7)})
    weights = blueprint.weights
    images = make_images(weights.spec)
    old = write_bundle(blueprint, tmp_path / "old")
    new = write_bundle(revise(blueprint, scale=0.5), tmp_path / "new")
    names = list(old.variants) if asked == "all" else [asked]

    def run(bundle: Bundle) -> list[np.ndarray]:
        return [OnnxEngine(bundle, name, threads=1).run(images) for name in old.variants]

    wanted = [run(old), run(new)]
    for at, name in enumerate(old.variants):
        if name not in names:
            wanted[1][at] = wanted[0][at]
    bank = tmp_path / "bank.safetensors"
    weights.bank.save(bank)
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    files = (program, asked, old.path, weights.checkpoint.file, bank)
    line = list(map(str, (sys.executable, *files)))
    steps = int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    found = []
    for step in range(1, steps + 1):
        folder = tmp_path / f"step{step}" / "bundle"
        bundle = Bundle.open(folder, hashes=True)
        logits = run(bundle)
        which = [all(map(np.array_equal, logits, answers)) for answers in wanted]
        assert which in ([True, False], [False, True])
        # The manifest knows which of the two it is.
        assert bundle.refitted == (tuple(names) if which[1] else ())
        changed = {name: new.variants[name] for name in names} if which[1] else {}
        assert bundle.variants == {**old.variants, **changed}
        found.append(which[1])
        with hold(folder):  # what the next writer does
            pass
        assert [file.name for file in folder.parent.iterdir()] == ["bundle"]
        assert {file.name for file in folder.iterdir()} == {
            file.name for file in old.path.iterdir()
        }
    assert found == sorted(found)  # once it is the new one, it stays so
    assert steps > 8
    assert not found[0]
    assert found[-1]
