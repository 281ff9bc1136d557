from __future__ import annotations

import pytest
import torch
from torch import nn

from tocom_export.errors import InputError
from tocom_export.training.loop.distributed import SINGLE_PROCESS, Process, join_processes


def test_one_process_on_the_cpu():
    with join_processes("cpu") as process:
        assert process == SINGLE_PROCESS == Process(torch.device("cpu"), None, 0, 1)
        assert process.first
        assert process.average(1.5) == 1.5
        process.wait()
        module = nn.Linear(2, 2)
        assert process.synchronize_gradients(module) is module
    assert not torch.distributed.is_initialized()


def test_the_default_is_the_cpu_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with join_processes() as process:
        assert process.device == torch.device("cpu")


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_autocast(amp):
    with join_processes("cpu", amp) as process, process.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"none": torch.float32, "bf16": torch.bfloat16}[amp]


def refusal(*options: str) -> str:
    with pytest.raises(InputError) as caught, join_processes(*options):
        pass
    return str(caught.value)


def test_fp16_needs_cuda():
    message = refusal("cpu", "fp16")
    assert message == "`amp` fp16 needs a CUDA device; the CPU takes bf16 or none."


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "mps"])
def test_an_unknown_device(name: str):
    assert refusal(name) == f"`device` {name}: expected cpu, cuda or cuda:N."


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_a_device(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(name)
    assert message.startswith(f"`device` {name}: ")
    assert message.endswith("sees no CUDA device; use cpu.")


def test_a_cuda_device_too_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refusal("cuda:2") == (
        "`device` cuda:2: this machine has 2 CUDA devices, counted from 0."
    )


def test_each_of_several_processes_takes_the_device_of_its_number(
    monkeypatch: pytest.MonkeyPatch,
):
    for name, value in {"WORLD_SIZE": "8", "RANK": "6", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    called: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **_: called.append(backend)
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: called.append("end"))
    device = torch.device("cuda", 2)
    with join_processes(None, "fp16") as process:
        assert process == Process(device, torch.float16, 6, 8)
        assert not process.first
    assert called == [device, "nccl", "end"]
