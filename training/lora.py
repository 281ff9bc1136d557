"""The bank while it is trained: low-rank side paths beside the frozen weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tocom_export.compression.bank import ToComBank
from tocom_export.compression.bank_groups import Arithmetic, coefficients, groups_of
from tocom_export.compression.method import Method
from tocom_export.model.spec import VitSpec

from .model import SidePaths


class TrainableBank(nn.Module):
    """A :class:`~tocom_export.compression.bank.ToComBank` as parameters.

    Down factors start as PyTorch starts a linear layer, up factors at zero, so that an
    untrained bank changes nothing.

    Args:
        rank: of each group.
        scale: ``s``, while training (paper, section 5.1).
        dropout: on the low-rank activation, while training.
    """

    def __init__(
        self,
        spec: VitSpec,
        method: Method,
        *,
        rank: int = 2,
        scale: float = 0.1,
        dropout: float = 0.1,
        arithmetic: Arithmetic = "steps",
    ) -> None:
        super().__init__()
        self.method, self.model, self.scale, self.dropout = method, spec.model, scale, dropout
        self.arithmetic: Arithmetic = arithmetic
        bound = spec.width**-0.5
        shape = (spec.depth, 2, groups_of(arithmetic), rank, spec.width)
        self.down = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))  # (L, q|v, G, h, C)
        self.up = nn.Parameter(torch.zeros(*shape[:3], spec.width, rank))  # (L, q|v, G, C, h)

    def side(
        self, source: int, target: float | Sequence[float], scale: float | None = None
    ) -> SidePaths | None:
        """The gap from source to target as a sum of steps; None where there is none.

        Args:
            target: one for all layers, or one per layer.
            scale: ``s``; default: that of training.
        """
        targets = target if isinstance(target, Sequence) else (target,) * len(self.down)
        if all(t == source for t in targets):
            return None
        rows = {t: coefficients(self.arithmetic, source, t) for t in set(targets)}
        shares = np.stack([rows[t] for t in targets])  # (L, G)
        (used,) = np.nonzero(shares.any(axis=0))
        groups = slice(int(used[0]), int(used[-1]) + 1)  # all others are zero in every layer
        down, up = self.down[:, :, groups], self.up[:, :, groups]
        width = down.shape[2] * down.shape[3]  # channels of each projection's path, n·h
        signed = torch.as_tensor(shares[:, groups]) * (self.scale if scale is None else scale)
        signed = signed.repeat_interleave(down.shape[3], dim=1).repeat(1, 2)  # (L, 2·n·h)
        signed = signed.to(down)
        down = down.flatten(1, 3)  # (L, 2·n·h, C): both projections in one product
        up = up.transpose(2, 3).flatten(3)  # (L, 2, C, n·h)
        dropout = self.dropout if self.training else 0.0

        def paths(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = F.dropout(x @ down[layer].T, dropout)
            hidden = hidden * signed[layer]  # (B, N, 2·n·h); float32, or bfloat16 rounds s
            q, v = hidden.split(width, dim=-1)
            return q @ up[layer, 0].T, v @ up[layer, 1].T

        return paths

    def to_bank(self) -> ToComBank:
        """The factors as NumPy arrays."""
        down, up = (p.detach().float().cpu().numpy() for p in (self.down, self.up))
        factors = (down[:, 0], up[:, 0], down[:, 1], up[:, 1])
        return ToComBank(*factors, self.method, self.model, self.arithmetic)

    @classmethod
    def from_bank(cls, bank: ToComBank, spec: VitSpec, scale: float = 0.1) -> TrainableBank:
        """The inverse of :meth:`to_bank`, in evaluation mode, once the bank fits the spec."""
        bank.check(spec, bank.method)
        self = cls(spec, bank.method, rank=bank.rank, scale=scale, arithmetic=bank.arithmetic)
        with torch.no_grad():
            for side, (down, up) in enumerate(((bank.q_down, bank.q_up), (bank.v_down, bank.v_up))):
                self.down[:, side] = torch.tensor(down)
                self.up[:, side] = torch.tensor(up)
        return self.eval()
