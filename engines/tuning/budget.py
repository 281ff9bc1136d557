"""What a variant may cost, and what was found for that."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tocom_export.variant import Variant


@dataclass(frozen=True)
class Budget:
    """What a variant may cost."""

    kind: Literal["speedup", "ms", "macs"]
    """Times as fast as the uncompressed model, milliseconds of a batch, or a share of its MACs."""
    amount: float

    @property
    def option(self) -> str:
        """The parameter it was named by."""
        return {"speedup": "speedup", "ms": "budget_ms", "macs": "macs"}[self.kind]

    @property
    def name(self) -> str:
        """What a variant of it is called: ``fast2x``, ``in8ms``, ``macs50``."""
        number = f"{self.amount:g}".replace(".", "_")
        return {"speedup": f"fast{number}x", "ms": f"in{number}ms",
                "macs": f"macs{round(100 * self.amount)}"}[self.kind]  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """A constant degree beside which a schedule is shown."""

    degree: int
    macs: int
    median_ms: float | None
    divergence: float


@dataclass(frozen=True)
class Found:
    """A schedule, and the constant one that costs no more, by pictures that chose neither."""

    budget: Budget
    variant: Variant
    macs: int
    median_ms: float | None
    divergence: float
    constant: Constant | None
    """The best within the budget; None where it asks for more than degree 16."""
    tried: int
    points: tuple[tuple[str, float, float], ...]
    """Of candidates and constants: which, cost, and divergence in the search; for a picture."""

    def to_json(self) -> dict[str, Any]:
        """One row of ``tune --json``."""
        return {
            "name": self.variant.name,
            "degrees": list(self.variant.degrees),
            "scale": self.variant.scale,
            "macs": self.macs,
            "median_ms": self.median_ms,
            "divergence": self.divergence,
            "constant": self.constant and asdict(self.constant),
            "tried": self.tried,
        }
