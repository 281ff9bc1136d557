"""A bundle's engines, to be evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import InputError
from tocom_export.study.subject import Subject
from tocom_export.variant import Variant

from .onnx.engine import OnnxEngine
from .verify import Run


def make_subject(
    bundle: Bundle,
    variants: Sequence[str | int] | None = None,
    oracle: Callable[[Variant], Run] | None = None,
) -> Subject:
    """The engines of a bundle in ONNX Runtime.

    Args:
        variants: names or bare degrees; default: all of the bundle.
        oracle: a variant → PyTorch's run with the same weights; None has nothing to check with.

    Raises:
        DegreeError: the bundle has no such variant.
        InputError: a variant was refitted.
    """
    chosen = tuple(map(bundle.variant, bundle.variants if variants is None else variants))
    for variant in chosen:
        if variant.name in bundle.refitted:
            raise InputError(
                f"{bundle.graph(variant.name)} was refitted: its source and its weights are no "
                "longer the bundle's, whose name its rows would bear. Evaluate the checkpoint, or "
                "build a bundle of it."
            )
    return Subject(
        bundle.path, bundle.spec, bundle.preprocess, bundle.classes, bundle.method, chosen,
        runner=lambda v: OnnxEngine(bundle, v, compensated=v.compensated).run,
        backend="onnx", precision=bundle.precision, baked=True, oracle=oracle,
    )  # fmt: skip
