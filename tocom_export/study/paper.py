"""What the ToCom paper (arXiv:2408.06798) measured, to stand beside figures of ours.

DeiT-B with ToMe and AdaptFormer on the 19 tasks of VTAB-1k, in percent. The degrees of its EViT
table can't be told from the text at hand, so its figures are not here.
"""

from __future__ import annotations

import numpy as np

TASKS = (7, 4, 8)
"""Natural, specialized and structured tasks; the paper averages over tasks, not over groups."""

GROUPS = {
    (0, 12): ((75.9, 82.8, 58.6), (76.6, 84.5, 59.1)),
    (0, 16): ((73.7, 80.0, 56.7), (75.8, 83.6, 57.9)),
    (4, 12): ((76.0, 83.5, 58.8), (76.5, 84.5, 59.2)),
    (4, 16): ((74.0, 81.0, 57.2), (75.7, 83.8, 58.0)),
    (12, 0): ((76.9, 84.5, 59.1), (77.0, 84.9, 59.4)),
    (12, 4): ((76.8, 84.6, 59.2), (76.9, 84.9, 59.5)),
    (16, 0): ((76.0, 84.0, 57.8), (76.4, 84.6, 59.2)),
    (16, 4): ((76.0, 84.2, 57.9), (76.3, 84.6, 59.2)),
}
"""(source, target) → average in each group of tasks, with compression alone and with ToCom: its
Tables 2 and 3 (section 5.2), and the table of section 5.3."""
TRAINED_AT_16 = (75.5, 83.6, 58.8)

VTAB = {pair: tuple(np.average(two, axis=1, weights=TASKS)) for pair, two in GROUPS.items()}
"""(source, target) → average over all tasks, with compression alone and with ToCom."""

GAP_SHARES = [
    (tocom - baseline) / (trained - baseline)
    for baseline, tocom, trained in zip(*GROUPS[0, 16], TRAINED_AT_16, strict=True)
]
"""Share of the gap 0 → 16 closed in each group."""

ABLATION_PAIRS = ((0, 12), (0, 16), (16, 0))
ABLATION = {
    "": (70.1, 67.9, 70.0),
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
"""Variant, or compression alone → average over VTAB-1k at each of ``ABLATION_PAIRS``: its tables
of section 5.4."""
