"""A refit of a plan that is killed at every step of its way to the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.plan import open_plan
from tocom_export.io.locking import hold

KILLED = """
import dataclasses, os, runpy, shutil, sys
from pathlib import Path
from types import SimpleNamespace

stand_in, plan, checkpoint, bank = map(Path, sys.argv[1:])
pretended = runpy.run_path(str(stand_in))
cuda = pretended["Cuda"]()
bindings = SimpleNamespace(runtime=cuda)
sys.modules |= {
    "tensorrt": pretended["Trt"](cuda), "cuda.bindings": bindings,
    "cuda": SimpleNamespace(bindings=bindings),
}

from tocom_export.bundle.weights import ModelWeights
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.engines.tensorrt.plan import open_plan
from tocom_export.engines.tensorrt.refit import refit_plan

_, record = open_plan(plan)
new = ModelWeights(record.spec, Checkpoint.open(checkpoint), ToComBank.load(bank))
variant = dataclasses.replace(record.variant, source=4, scale=0.5)
writes = ("os.rename", "os.remove", "os.link", "os.chmod")

def refit(file, step):
    count = 0
    def watch(event, arguments):
        nonlocal count
        if event in writes or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            count += 1
            if count == step:
                os._exit(9)
    sys.addaudithook(watch)
    refit_plan(file, variant, new, file)
    os._exit(0)

step, code = 0, 9
while code == 9:
    step += 1
    file = plan.parent / f"step{step}" / plan.name
    file.parent.mkdir()
    for name in (plan.name, plan.name + ".json"):
        shutil.copyfile(plan.parent / name, file.parent / name)
    if not (child := os.fork()):
        refit(file, step)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(step if code == 0 else f"exit status {code}")
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX renames")
def test_it_is_the_old_plan_or_the_new_one(
    nvidia,
    fresh: Bundle,
    blueprint: Blueprint,
    write_plan: Callable[..., Path],
    tmp_path: Path,
    make_images,
):
    images, plan = make_images(fresh.spec), write_plan(fresh)
    _, old = open_plan(plan)
    before = TensorRtEngine(plan).run(images)
    bank, program = tmp_path / "bank.safetensors", tmp_path / "killed.py"
    blueprint.weights.bank.save(bank)
    program.write_text(KILLED)
    stand_in = Path(__file__).parents[1] / "stand_in.py"
    files = (program, stand_in, plan, blueprint.weights.checkpoint.file, bank)
    line = [sys.executable, *map(str, files)]
    steps = int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    found = []
    for step in range(1, steps + 1):
        file = fresh.path / f"step{step}" / plan.name
        _, record = open_plan(file)  # whatever was reached, the two belong together
        same = np.array_equal(TensorRtEngine(file).run(images), before)
        assert (record == old) == same
        assert (record.variant.source, record.variant.scale) == ((0, 0.1) if same else (4, 0.5))
        found.append(not same)
        for left in (file, file.with_name(f"{file.name}.json")):
            with hold(left):  # as the next writer does
                pass
        assert {entry.name for entry in file.parent.iterdir()} == {file.name, f"{file.name}.json"}
    assert found == sorted(found)  # once it is the new one, it stays so
    assert not found[0]
    assert found[-1]
    assert steps > 10
