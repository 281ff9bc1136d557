"""Engines held against the PyTorch model; the only place that judges."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tocom_export.bundle.manifest import graph_name, plan_name
from tocom_export.bundle.opening import Bundle
from tocom_export.errors import CheckFailed
from tocom_export.graph.precision import Precision
from tocom_export.model.spec import VitSpec
from tocom_export.study.accuracy import Difference, Score
from tocom_export.study.evaluate import Measured
from tocom_export.variant import Variant

from .engine import Backend, Engine, Images, Logits
from .opening import open_engine

Run = Callable[[Images], Logits]
Oracle = Callable[[Variant, Images], Logits]
"""A variant and images → the logits that its engines should give."""
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 2e-2, "int8": 1e-1}
"""What |Δ| of a logit may be, over the largest logit: some five times what rounding alone gives."""
ALLOWED_LOSS = 0.3
"""Points of accuracy that an engine may be shown to lose against the model."""
ALLOWED_DIFFERENCE = 0.1
"""Points between an fp32 engine and the model, where its logits are not judged beside them."""
_BATCH = 16


@dataclass(frozen=True)
class Comparison:
    """How one engine's logits compare with the oracle's on the same images."""

    engine: str
    """Its file: ``r08.onnx``."""
    variant: str
    images: int
    max_difference: float | None
    """Largest |Δ| of a logit; None where there was no oracle to compare with."""
    tolerance: float | None
    """What |Δ| may be."""
    beyond: int
    """Images with a |Δ| beyond the tolerance."""
    agreement: float | None
    """Share of images with the oracle's top-1 class, percent."""
    finite: bool
    """Whether no logit is NaN or Inf."""
    strict: bool
    """Whether the tolerance was given, and so holds for every image."""
    precision: Precision = "fp32"
    backend: Backend = "onnx"
    judged: bool = True
    """Whether |Δ| decides; else the accuracy does, and |Δ| is for finding what is wrong."""

    @property
    def passed(self) -> bool:
        """Finite, and within the tolerance; where it wasn't given, on 19 images in 20.

        Two pairs of tokens can be equally similar to within rounding, and each side may then
        merge another one. In half the digits or fewer that is common, so that half of the images
        may differ; a wrong weight or a lost bias would show on all.
        """
        allowed = self.images // (20 if self.precision == "fp32" else 2)
        within = self.beyond <= (0 if self.strict else allowed)
        return self.finite and (within or not self.judged)

    def leave_to_accuracy(self) -> Comparison:
        """The same where labelled images were run, too.

        |Δ| then decides in fp32 alone, where nothing but a tie moves a logit, and where its
        tolerance was given.
        """
        return dataclasses.replace(self, judged=self.precision == "fp32" or self.strict)

    def require(self, oracle: str, advice: str) -> None:
        """Raise CheckFailed, which says what to do, unless the engine agrees with the oracle."""
        if self.passed:
            return
        if not self.finite:
            raise CheckFailed(f"{self.engine} gives logits that are NaN or Inf; {advice}")
        raise CheckFailed(
            f"{self.engine} differs from {oracle} on {self.beyond} of {self.images} images (max "
            f"|Δ| {self.max_difference:.1e}, {self.tolerance:.1e} allowed); {advice}"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all fields and the verdict."""
        fields = dataclasses.asdict(self)
        for name in ("max_difference", "tolerance"):  # JSON has no NaN
            fields[name] = fields[name] if math.isfinite(fields[name] or 0) else None
        return {**fields, "passed": self.passed}


def verify(
    bundle: Bundle,
    images: Images,
    oracle: Oracle | None,
    *,
    backend: Backend = "onnx",
    variants: Iterable[str] | None = None,
    atol: float | None = None,
    **options: Any,
) -> Iterator[Comparison]:
    """Run a bundle's engines of one backend on images (B, C, H, W), one comparison each.

    Args:
        oracle: gives the model's logits; None checks for NaN and Inf alone.
        variants: names; default: all of the bundle.
        atol: what |Δ| may be; default: that of :data:`TOLERANCES`, times max |logit|.
        options: of :func:`~tocom_export.engines.opening.open_engine`. OpenVINO computes float32 in
            float32 unless ``inference_precision`` says otherwise: a CPU's bf16 would hide bugs.

    Raises:
        TocomError: what opening an engine raises.
    """
    if backend == "openvino":
        options = {"inference_precision": "f32", **options}
    file_name = graph_name if backend in ("onnx", "openvino") else plan_name
    for name in bundle.variants if variants is None else variants:
        variant = bundle.variant(name)
        engine = open_engine(bundle, variant, backend=backend, **options)
        judge = None if oracle is None else partial(oracle, variant)
        precision = find_precision(engine, bundle.precision)
        yield compare(
            engine.run, images, judge, file_name(variant.name), variant.name, precision,
            atol=atol, batch=engine.largest or _BATCH, backend=backend,
        )  # fmt: skip


def compare(
    run: Run,
    images: Images,
    oracle: Run | None,
    engine: str,
    variant: str,
    precision: Precision,
    *,
    atol: float | None = None,
    batch: int = _BATCH,
    backend: Backend = "onnx",
) -> Comparison:
    """One engine on images (B, C, H, W), ``batch`` at a time; see :func:`verify`."""
    batches = [images[i : i + batch] for i in range(0, len(images), batch)]
    got = np.concatenate([run(part) for part in batches])
    finite = bool(np.isfinite(got).all())
    found = Comparison(
        engine, variant, len(images), None, None, 0, None, finite, False, precision, backend
    )
    if oracle is None:
        return found
    wanted = np.concatenate([oracle(part) for part in batches])
    difference = np.abs(got - wanted).max(axis=1)
    tolerance = TOLERANCES[precision] * float(np.abs(wanted).max()) if atol is None else atol
    return dataclasses.replace(
        found,
        max_difference=float(difference.max()),
        tolerance=tolerance,
        beyond=int((~(difference <= tolerance)).sum()),
        agreement=100 * float((got.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
        strict=atol is not None,
    )


@dataclass(frozen=True)
class AccuracyCheck:
    """How right an engine is beside the model, on the same labelled images."""

    variant: str
    precision: Precision
    backend: str
    engine: Score
    pytorch: Score
    stored_as: Precision
    """What the model's weights were rounded to."""
    alone: bool = False
    """Whether no logits are judged beside the accuracy; in fp32 that must then be the model's."""

    @property
    def difference(self) -> Difference:
        """Accuracy of the engine less the model's."""
        return self.engine.compare(self.pytorch)

    @property
    def agreement(self) -> float:
        """Share of images with the model's top-1 class, percent."""
        differ = self.engine.count_differences(self.pytorch)
        return 100 * (self.engine.total - differ) / self.engine.total

    @property
    def failure(self) -> str:
        """What is wrong with the engine; empty where it passed.

        A precision costs what it costs: an engine fails where more than :data:`ALLOWED_LOSS` is
        lost beyond doubt, by the whole of the difference's interval.
        """
        if self.engine.unusable:
            return f"logits are NaN or Inf on {self.engine.unusable} of {self.engine.total} images"
        points, (_, high) = self.difference.points, self.difference.interval
        # Rounded: 80.3 - 80.2 is a tenth of a point.
        if self.alone and self.precision == "fp32" and round(abs(points), 9) > ALLOWED_DIFFERENCE:
            return f"accuracy is {points:+.2f} points off PyTorch's, ±{ALLOWED_DIFFERENCE} allowed"
        if high < -ALLOWED_LOSS:
            return f"accuracy is {-high:.2f} points or more below PyTorch's, {ALLOWED_LOSS} allowed"
        return ""

    @property
    def passed(self) -> bool:
        """Whether nothing is shown to be wrong."""
        return not self.failure

    @property
    def doubtful(self) -> bool:
        """Whether it passed and yet may lose more than is allowed: more images would tell.

        Not in fp32, where rounding is no reason to lose any.
        """
        low = self.difference.interval[0]
        return self.passed and self.precision != "fp32" and low < -ALLOWED_LOSS

    def to_json(self) -> dict[str, Any]:
        """One row: accuracies and differences in percent."""
        low, high = self.engine.interval
        least, most = self.difference.interval
        return {
            "variant": self.variant,
            "precision": self.precision,
            "backend": self.backend,
            "accuracy": self.engine.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "images": self.engine.total,
            "pytorch": self.pytorch.accuracy,
            "pytorch_weights": self.stored_as,
            "difference": self.difference.points,
            "difference_low": least,
            "difference_high": most,
            "agreement": self.agreement,
            "finite": not self.engine.unusable,
            "passed": self.passed,
        }


def check_accuracy(found: Measured) -> AccuracyCheck:
    """What a study measured of an engine beside its oracle, to be judged by that alone."""
    of, variant, oracle = found.subject, found.variant, found.oracle
    assert of.oracle is not None and oracle is not None
    return AccuracyCheck(
        variant.name, of.precision, of.backend, found.served, oracle, of.oracle.stored_as(variant),
        alone=True,
    )  # fmt: skip


def find_precision(engine: Engine, stored: Precision) -> Precision:
    """What an engine computes in: a bundle's precision, or a coarser one that its runtime took.

    OpenVINO takes bf16 for float32 where a CPU is faster in it.
    """
    return max(stored, engine.precision, key=list(TOLERANCES).index)


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
