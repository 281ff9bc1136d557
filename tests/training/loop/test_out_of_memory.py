from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tocom_export.errors import InputError

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 GB."),
    ],
)
def test_out_of_memory_says_what_to_lower(make_run, error: RuntimeError):
    run = make_run("run")

    def loss_of(*_: Any) -> Tensor:
        raise error

    with pytest.raises(InputError) as caught:
        run.train(loss_of=loss_of, accumulate=2)
    for part in (
        "`batch` 4 and `accumulate` 2;",
        "lower `batch`",
        "`accumulate` to 4",
        "`amp` bf16",
    ):
        assert part in str(caught.value)
    assert caught.value.__cause__ is error


def test_other_runtime_errors_pass_unchanged(make_run):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def loss_of(*_: Any) -> Tensor:
        raise error

    with pytest.raises(RuntimeError) as caught:
        make_run("run").train(loss_of=loss_of)
    assert caught.value is error
