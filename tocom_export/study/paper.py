"""What the ToCom paper (arXiv:2408.06798) measured, to stand beside figures of ours.

DeiT-B with ToMe and AdaptFormer on the 19 tasks of VTAB-1k, in percent. The degrees of its EViT
table can't be told from the text at hand, so its figures are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

TASKS = (7, 4, 8)
"""Natural, specialized and structured tasks; the paper averages over tasks, not over groups."""

Groups = tuple[float, float, float]


@dataclass(frozen=True)
class Reported:
    """One pair of degrees: average accuracy in each group of tasks."""

    baseline: Groups
    tocom: Groups
    reference: Groups | None = None
    """Of the models trained at the target degree, where the paper has them."""

    def average(self, groups: Groups) -> float:
        """Over all tasks."""
        return sum(n * value for n, value in zip(TASKS, groups, strict=True)) / sum(TASKS)

    @property
    def gain(self) -> float:
        """ToCom above compression alone, averaged over all tasks."""
        return self.average(self.tocom) - self.average(self.baseline)


_AT_16 = (75.5, 83.6, 58.8)
_AT_12 = (76.5, 84.1, 59.3)

VTAB = {
    (0, 12): Reported((75.9, 82.8, 58.6), (76.6, 84.5, 59.1), _AT_12),
    (0, 16): Reported((73.7, 80.0, 56.7), (75.8, 83.6, 57.9), _AT_16),
    (4, 12): Reported((76.0, 83.5, 58.8), (76.5, 84.5, 59.2), _AT_12),
    (4, 16): Reported((74.0, 81.0, 57.2), (75.7, 83.8, 58.0), _AT_16),
    (12, 0): Reported((76.9, 84.5, 59.1), (77.0, 84.9, 59.4)),
    (12, 4): Reported((76.8, 84.6, 59.2), (76.9, 84.9, 59.5)),
    (16, 0): Reported((76.0, 84.0, 57.8), (76.4, 84.6, 59.2)),
    (16, 4): Reported((76.0, 84.2, 57.9), (76.3, 84.6, 59.2)),
}
"""(source, target) → its Tables 2 and 3 (section 5.2), and the table of section 5.3."""

ABLATION_PAIRS = ((0, 12), (0, 16), (16, 0))

ABLATION = {
    "shared": (70.6, 69.2, 70.1),
    "classes": (70.9, 69.9, 70.6),
    "no-inversion": (70.9, 69.8, 70.8),
    "scale 1": (70.9, 69.9, 70.8),
    "scale 0.01": (70.8, 69.9, 70.8),
    "rank 1": (70.9, 69.7, 70.8),
    "rank 4": (70.9, 69.9, 70.9),
    "rank 8": (70.9, 70.1, 70.9),
    "tocom": (70.9, 69.9, 70.9),
}
"""Variant → average over VTAB-1k at each of ``ABLATION_PAIRS``: its tables of section 5.4."""

ABLATION_BASELINE = (70.1, 67.9, 70.0)

GAP_SHARES = (1.17, 1.00, 0.57)
"""Share of the gap 0 → 16 closed in each group: from Tables 2 and 3."""
