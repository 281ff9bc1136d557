"""Engines held against the PyTorch model; the only place that judges."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tocom_export.bundle.manifest import graph_name, plan_name
from tocom_export.bundle.opening import Bundle
from tocom_export.errors import CheckFailed, InputError
from tocom_export.graph.precision import Precision
from tocom_export.model.outputs import pluralise
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant

from .differences import measure
from .engine import Backend, Engine, Images, Logits, Outputs
from .opening import open_engine

Run = Callable[[Images], Logits | Mapping[str, npt.NDArray[Any]]]
"""Images → each output by its name; the array itself where there is one alone."""
Oracle = Callable[[Variant, Images], Logits | Mapping[str, npt.NDArray[Any]]]
"""A variant and images → what its engines should give, in the same form."""
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 2e-2, "int8": 1e-1}
"""What |Δ| of a value may be, over its output's largest: some five times what rounding gives."""
_BATCH = 16


@dataclass(frozen=True)
class Comparison:
    """How an engine's output compares with the oracle's on some images; the worst of several."""

    engine: str
    """Its file: ``r08.onnx``."""
    variant: str
    images: int
    max_difference: float | None
    """Largest |Δ| of a value; None where there was no oracle to compare with."""
    tolerance: float | None
    """What |Δ| may be; of a map 0."""
    beyond: int
    """Images with a |Δ| beyond the tolerance."""
    agreement: float | None
    """Share of images with the oracle's top-1 class, percent; None without logits."""
    finite: bool
    """Whether no value is NaN or Inf."""
    strict: bool
    """Whether the tolerance was given, and so holds for every image."""
    precision: Precision = "fp32"
    backend: Backend = "onnx"
    judged: bool = True
    """Whether |Δ| decides; else the accuracy does, and |Δ| is for finding what is wrong."""
    output: str = "logits"
    """Which one this is of."""

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

    @property
    def share(self) -> float:
        """|Δ| as a share of what it may be; 0 where there was nothing to compare with."""
        if not self.max_difference or self.tolerance is None:
            return 0.0
        return self.max_difference / self.tolerance if self.tolerance else math.inf

    def leave_to_accuracy(self) -> Comparison:
        """The same where labelled images were run, too.

        |Δ| then decides in fp32 alone, where nothing but a tie moves a value, and where its
        tolerance was given.
        """
        return dataclasses.replace(self, judged=self.precision == "fp32" or self.strict)

    def require(self, oracle: str, advice: str) -> None:
        """Raise CheckFailed, which says what to do, unless the engine agrees with the oracle."""
        if self.passed:
            return
        if not self.finite:
            what = pluralise(self.output)
            raise CheckFailed(f"{self.engine} gives {what} that are NaN or Inf; {advice}")
        of = "" if self.output == "logits" else f" of {pluralise(self.output)}"
        raise CheckFailed(
            f"{self.engine} differs from {oracle} on {self.beyond} of {self.images} images (max "
            f"|Δ|{of} {self.max_difference:.1e}, {self.tolerance:.1e} allowed); {advice}"
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
        oracle: gives what the model does, as arrays or what NumPy makes arrays of; None checks for
            NaN and Inf alone.
        variants: names; default: all of the bundle.
        atol: what |Δ| may be; default: that of :data:`TOLERANCES`, times an output's largest
            value.
        options: of :func:`~tocom_export.engines.opening.open_engine`. OpenVINO computes float32 in
            float32 unless ``inference_precision`` says otherwise: a CPU's bf16 would hide bugs.

    Raises:
        InputError: the oracle doesn't give each of the bundle's outputs.
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
            engine.run_all, images, judge, file_name(variant.name), variant.name, precision,
            atol=atol, batch=engine.largest or _BATCH, backend=backend, outputs=bundle.outputs,
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
    outputs: Sequence[str] = ("logits",),
) -> Comparison:
    """One engine on images (B, C, H, W), ``batch`` at a time; see :func:`verify`.

    Each output is held against its own largest value, and the worst is told.

    Args:
        outputs: the names of what both give.
    """
    batches = [images[i : i + batch] for i in range(0, len(images), batch)]
    got = _run_all(run, batches, outputs)
    wanted = _run_all(oracle, batches, outputs) if oracle else {}
    first = Comparison(
        engine, variant, len(images), None, None, 0, None, True, False, precision, backend
    )
    if "logits" in wanted:
        same = got["logits"].argmax(axis=1) == wanted["logits"].argmax(axis=1)
        first = dataclasses.replace(first, agreement=100 * float(same.mean()))
    each = [
        _judge(dataclasses.replace(first, output=name), got[name], wanted.get(name), atol)
        for name in outputs
    ]
    return max(each, key=_rank)


def _judge(blank: Comparison, got: Logits, wanted: Logits | None, atol: float | None) -> Comparison:
    """The comparison of one output (B, ...)."""
    blank = dataclasses.replace(blank, finite=bool(np.isfinite(got).all()))
    if wanted is None:
        return blank
    difference = measure(blank.output, got, wanted, blank.precision)
    share = TOLERANCES[blank.precision]
    tolerance = share * float(np.abs(wanted).max()) if atol is None else atol
    tolerance = 0.0 if blank.output == "map" else tolerance
    return dataclasses.replace(
        blank,
        max_difference=float(difference.max()),
        tolerance=tolerance,
        beyond=int((~(difference <= tolerance)).sum()),
        strict=atol is not None,
    )


def _rank(found: Comparison) -> tuple[bool, bool, int, float]:
    """How bad it is; of two that are as bad otherwise, by |Δ| as a share of what it may be.

    What was given is the same for both, and may be 0: then by |Δ| itself.
    """
    far = found.max_difference or 0.0 if found.strict else found.share
    return not found.finite, not found.passed, found.beyond, far


def _run_all(run: Run, batches: Sequence[Images], names: Sequence[str]) -> Outputs:
    """Each output of all batches.

    Raises:
        InputError: one array is given for several outputs, or one of them isn't given.
    """
    found: list[Outputs] = []
    for part in batches:
        given = run(part)
        if not isinstance(given, Mapping):
            if len(names) > 1:
                raise InputError(
                    f"`oracle` gives one array; {', '.join(names)} are wanted, each by its name."
                )
            given = {names[0]: given}
        if missing := [name for name in names if name not in given]:
            raise InputError(
                f"`oracle` gives no {missing[0]}; give {', '.join(names)}, each by its name."
            )
        found.append({name: np.asarray(given[name]) for name in names})
    return {name: np.concatenate([part[name] for part in found]) for name in names}


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
