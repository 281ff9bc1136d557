from __future__ import annotations

import pytest
import torch
from torch import nn

from tocom_export.errors import InputError
from tocom_export.training.loop.distributed import ALONE, Placement, placed


def test_one_process_on_the_cpu():
    with placed("cpu") as placement:
        assert placement == ALONE == Placement(torch.device("cpu"), None, 0, 1)
        assert placement.first
        assert placement.mean(1.5, -2.0) == [1.5, -2.0]
        placement.wait()
        module = nn.Linear(2, 2)
        assert placement.distributed(module) is module
    assert not torch.distributed.is_initialized()


def test_the_default_is_the_cpu_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with placed() as placement:
        assert placement.device == torch.device("cpu")


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_autocast(amp):
    with placed("cpu", amp) as placement, placement.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"none": torch.float32, "bf16": torch.bfloat16}[amp]


def refusal(*options: str) -> str:
    with pytest.raises(InputError) as caught, placed(*options):
        pass
    return str(caught.value)


def test_fp16_needs_cuda():
    message = refusal("cpu", "fp16")
    assert message == "--amp fp16 needs a CUDA device; the CPU takes bf16 or none."


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "mps"])
def test_an_unknown_device(name: str):
    assert refusal(name) == f"--device {name}: cpu, cuda or cuda:N is expected."


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_a_device(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(name)
    assert message.startswith(f"--device {name}: ")
    assert message.endswith("sees no CUDA device; use cpu.")


def test_a_cuda_device_too_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refusal("cuda:2") == "--device cuda:2: there are 2 CUDA devices."


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
    with placed(None, "fp16") as placement:
        assert placement == Placement(device, torch.float16, 6, 8)
        assert not placement.first
    assert called == [device, "nccl", "end"]
