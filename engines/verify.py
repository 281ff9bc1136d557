"""Engines held against the PyTorch model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tocom_export.bundle.opening import Bundle
from tocom_export.graph.precision import Precision
from tocom_export.model.spec import VitSpec

from .onnx.engine import OnnxEngine

Images = npt.NDArray[np.float32]
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 2e-2, "int8": 1e-1}
"""What |Δ| of a logit may be, over the largest logit: some five times what rounding alone gives."""
_BATCH = 16


@dataclass(frozen=True)
class Comparison:
    """How one engine's logits compare with the model's on the same images."""

    target: int
    images: int
    max_difference: float | None
    """Largest |Δ| of a logit; None where there was no model to compare with."""
    tolerance: float | None
    """What |Δ| may be."""
    beyond: int
    """Images with a |Δ| beyond the tolerance."""
    agreement: float | None
    """Share of images with the model's top-1 class, percent."""
    finite: bool
    """Whether all logits are numbers."""
    strict: bool
    """Whether the tolerance was given, and so holds for every image."""
    precision: Precision = "fp32"

    @property
    def passed(self) -> bool:
        """Finite, and within the tolerance; where it wasn't given, on 19 images in 20.

        Two pairs of tokens can be equally similar to within rounding, and each side may then
        merge another one: a rare image differs without either being wrong. Rounding to half the
        digits or fewer makes that common, so half of the images may then differ; a wrong weight
        or a lost bias would show on all.
        """
        allowed = self.images // (20 if self.precision == "fp32" else 2)
        return self.finite and self.beyond <= (0 if self.strict else allowed)

    @property
    def difference(self) -> str:
        """How far the two are apart, for a message; of a comparison with a model."""
        return (
            f"on {self.beyond} of {self.images} images (max |Δ| {self.max_difference:.1e}, "
            f"{self.tolerance:.1e} allowed)"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all fields and the verdict."""
        fields = dataclasses.asdict(self)
        for name in ("max_difference", "tolerance"):  # JSON has no NaN
            if fields[name] is not None and not math.isfinite(fields[name]):
                fields[name] = None
        return {**fields, "passed": self.passed}


def compare(
    bundle: Bundle,
    images: Images,
    reference: Callable[[int, Images], Images] | None,
    atol: float | None = None,
) -> Iterator[Comparison]:
    """Run every engine of a bundle on images (B, C, H, W), one comparison each.

    Args:
        reference: (target, images) → the model's logits; None checks for NaN alone.
        atol: what |Δ| may be; default: that of :data:`TOLERANCES`, times max |logit|.
    """
    for target in bundle.targets:
        judge = None if reference is None else partial(reference, target)
        run = OnnxEngine(bundle, target).run
        yield compare_engine(run, target, bundle.precision, images, judge, atol)


def compare_engine(
    run: Callable[[Images], Images],
    target: int,
    precision: Precision,
    images: Images,
    reference: Callable[[Images], Images] | None,
    atol: float | None = None,
    batch: int = _BATCH,
) -> Comparison:
    """One engine on images (B, C, H, W), so many at a time; see :func:`compare`."""
    batches = [images[i : i + batch] for i in range(0, len(images), batch)]
    got = np.concatenate([run(part) for part in batches])
    finite = bool(np.isfinite(got).all())
    if reference is None:
        nothing = (None, None, 0, None)
        return Comparison(target, len(images), *nothing, finite, False, precision)
    wanted = np.concatenate([reference(part) for part in batches])
    largest = float(np.abs(wanted).max())
    tolerance = TOLERANCES[precision] * largest if atol is None else atol
    difference = np.abs(got - wanted).max(axis=1)
    agree = got.argmax(axis=1) == wanted.argmax(axis=1)
    return Comparison(
        target=target,
        images=len(images),
        max_difference=float(difference.max()),
        tolerance=tolerance,
        beyond=int((~(difference <= tolerance)).sum()),
        agreement=100 * float(agree.mean()),
        finite=finite,
        strict=atol is not None,
        precision=precision,
    )


def sample_images(spec: VitSpec, count: int = 20, seed: int = 0) -> Images:
    """Images with structure (B, C, H, W): smooth blobs under fine noise.

    Plain noise makes all tokens alike, and hides a wrong merge.
    """
    rng = np.random.default_rng(seed)
    height, width = spec.image_size
    rows = np.linspace(0, 6.99, height).astype(int)
    columns = np.linspace(0, 6.99, width).astype(int)
    coarse = rng.standard_normal((count, spec.channels, 7, 7))
    blobs = coarse[:, :, rows][:, :, :, columns]
    ramp = np.linspace(-1, 1, width) * rng.standard_normal((count, spec.channels, 1, 1))
    noise = 0.1 * rng.standard_normal((count, spec.channels, height, width))
    return (blobs + ramp + noise).astype(np.float32)
