"""How far a model's outputs are from another's, image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Outputs = npt.NDArray[Any]


def find_divergence(logits: Outputs, wanted: Outputs) -> npt.NDArray[np.float64]:
    """Kullback-Leibler divergence of each image's classes (B,), nats: Σ p log(p / q).

    Args:
        logits: of what is judged, q (B, classes).
        wanted: of the uncompressed model, p (B, classes).
    """
    p, q = _log_softmax(wanted), _log_softmax(logits)
    found: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return found


def find_distance(features: Outputs, wanted: Outputs) -> npt.NDArray[np.float64]:
    """One minus the cosine of each image's features (B,), for models without a head."""
    a, b = features.astype(np.float64), wanted.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: npt.NDArray[np.float64] = 1 - (a * b).sum(axis=1) / np.maximum(lengths, 1e-30)
    return found


def _log_softmax(logits: Outputs) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return found
