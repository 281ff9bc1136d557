"""A bundle's engines, to be evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tocom_export.bundle.manifest import WEIGHTS
from tocom_export.bundle.opening import Bundle
from tocom_export.errors import InputError
from tocom_export.model.outputs import OutputName
from tocom_export.study.accuracy import Run
from tocom_export.study.subject import Oracle, Subject
from tocom_export.variant import Variant

from .accuracy import run_in_parts
from .engine import Backend
from .opening import open_engine, read_weights
from .verify import find_precision


def make_subject(
    bundle: Bundle,
    variants: Sequence[str | int] | None = None,
    oracle: Oracle | None = None,
    *,
    backend: Backend = "onnx",
    output: OutputName = "logits",
) -> Subject:
    """The engines of a bundle on one backend.

    Args:
        variants: names or bare degrees; default: all of the bundle.
        oracle: the PyTorch model; None has nothing to check with.
        output: what accuracy is measured by: logits, or the embedding.

    Raises:
        DegreeError: the bundle has no such variant.
        InputError: the bundle has no such output, or a variant was refitted by itself.
    """
    name = bundle.find_output(output)
    chosen = tuple(map(bundle.variant, bundle.variants if variants is None else variants))
    # Where all were, the bundle is what they are of now.
    partly = {*bundle.refitted} != {*bundle.variants}
    for variant in chosen:
        if partly and variant.name in bundle.refitted:
            raise InputError(
                f"{bundle.graph(variant.name)} was refitted: its source and its weights are no "
                "longer the bundle's, whose name its rows would bear. Refit the whole bundle, or "
                "evaluate the checkpoint."
            )
    precision = bundle.precision
    if backend == "openvino" and chosen:  # which alone may take another
        precision = find_precision(open_engine(bundle, chosen[0], backend=backend), precision)
    return Subject(
        bundle.path, bundle.spec, bundle.preprocess, bundle.classes, bundle.method, chosen,
        runner=lambda variant: _open_run(bundle, variant, backend, name), backend=backend,
        precision=precision, baked=True, oracle=oracle, files=bundle.files,
    )  # fmt: skip


def _open_run(bundle: Bundle, variant: Variant, backend: Backend, output: OutputName) -> Run:
    """One variant's run, with the weights that all share where it is not to be compensated."""
    options: dict[str, Any] = {}
    if backend in ("onnx", "openvino"):
        options["compensated"] = variant.compensated
    elif not variant.compensated and bundle.variants[variant.name].baked:
        options["weights"] = read_weights(bundle, WEIGHTS)  # a refit of the plan in memory
    return run_in_parts(open_engine(bundle, variant, backend=backend, **options), output)
