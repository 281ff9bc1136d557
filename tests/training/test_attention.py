"""Attention as it is trained, against the fused product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tocom_export.training.attention import _mix


@pytest.mark.parametrize("biased", [False, True])
def test_products_of_bfloat16_have_the_gradients_of_the_fused_one(biased: bool) -> None:
    torch.manual_seed(0)
    shape = (2, 3, 20, 16)
    bias = torch.rand(2, 1, 1, 20).log() if biased else None
    wanted = torch.randn(shape)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(1)
        q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
        mix = F.scaled_dot_product_attention if dtype == torch.float32 else _mix_without_dropout
        out = mix(q, k, v, None if bias is None else bias.to(dtype))
        assert out.dtype == dtype
        (out.float() * wanted).sum().backward()
        return [out.float(), *(t.grad.float() for t in (q, k, v) if t.grad is not None)]

    exact, found = gradients(torch.float32), gradients(torch.bfloat16)
    assert len(found) == 4
    for a, b in zip(exact, found, strict=True):
        assert (a - b).norm() / a.norm() < 0.02


def test_dropout_of_bfloat16_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 200, 8, dtype=torch.bfloat16) for _ in range(2))
    v = torch.ones(1, 1, 200, 8, dtype=torch.bfloat16, requires_grad=True)
    out = _mix(q, k, v, None, 0.5).detach()
    assert out.std() > 0.01
    assert abs(float(out.mean()) - 1) < 0.05


def _mix_without_dropout(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return _mix(q, k, v, bias, 0.0)
