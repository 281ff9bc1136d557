"""The bank while it is trained: low-rank side paths beside the frozen weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tocom_export.compression.bank import ToComBank
from tocom_export.compression.bank_groups import Arithmetic, groups_of, terms
from tocom_export.compression.method import Method
from tocom_export.model.spec import VitSpec


class TrainableBank(nn.Module):
    """A :class:`~tocom_export.compression.bank.ToComBank` as parameters.

    Down factors start as PyTorch starts a linear layer, up factors at zero, so that an
    untrained bank changes nothing.

    Args:
        rank: rank of each group.
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

    def side(self, source: int, target: int, scale: float | None = None) -> BankSide | None:
        """The side paths from source to target; None where the two are equal."""
        return BankSide(self, source, target, scale) if source != target else None

    def to_bank(self) -> ToComBank:
        """The factors as NumPy arrays."""
        down, up = (p.detach().float().cpu().numpy() for p in (self.down, self.up))
        factors = (down[:, 0], up[:, 0], down[:, 1], up[:, 1])
        return ToComBank(*factors, self.method, self.model, self.arithmetic)

    @classmethod
    def from_bank(cls, bank: ToComBank, spec: VitSpec) -> TrainableBank:
        """The inverse of :meth:`to_bank`, in evaluation mode.

        Raises:
            BankError: the bank doesn't fit the spec.
        """
        bank.check(spec, bank.method)
        self = cls(spec, bank.method, rank=bank.rank, arithmetic=bank.arithmetic)
        with torch.no_grad():
            for side, (down, up) in enumerate(((bank.q_down, bank.q_up), (bank.v_down, bank.v_up))):
                self.down[:, side] = torch.tensor(down)
                self.up[:, side] = torch.tensor(up)
        return self.eval()


class BankSide:
    """One (source, target)'s sum of steps: a :class:`~tocom_export.training.model.SidePaths`."""

    def __init__(
        self, bank: TrainableBank, source: int, target: int, scale: float | None = None
    ) -> None:
        groups, sign = terms(bank.arithmetic, source, target)
        self._signed = sign * (bank.scale if scale is None else scale)
        self._dropout = bank.dropout if bank.training else 0.0
        down, up = bank.down[:, :, groups], bank.up[:, :, groups]
        self._width = down.shape[2] * down.shape[3]  # channels of each projection's path, n·h
        self._down = down.flatten(1, 3)  # (L, 2·n·h, C): both projections in one product
        self._up = up.transpose(2, 3).flatten(3)  # (L, 2, C, n·h)

    def __call__(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """From normalised tokens (B, N, C) to what q and v gain, each (B, N, C)."""
        hidden = F.dropout(x @ self._down[layer].T, self._dropout) * self._signed  # (B, N, 2·n·h)
        q, v = hidden.split(self._width, dim=-1)
        return q @ self._up[layer, 0].T, v @ self._up[layer, 1].T
