"""What was written, run before it gets its name; plans added to it.

Looks up at ``engines`` and ``training``, as ``exporting.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from .bundle.opening import Bundle
from .bundle.writing import Blueprint
from .errors import MissingPackageError
from .loading import is_installed

if TYPE_CHECKING:
    from tocom_export.engines.tensorrt.building import PlanOptions
    from tocom_export.engines.tensorrt.library import Library
    from tocom_export.engines.verify import Comparison, Oracle

GRAPH_BACKENDS = {"onnx": ("onnxruntime", "cpu"), "openvino": ("openvino", "openvino")}
"""What runs graphs: its package, and the extra that brings it."""
Tell = Callable[[str], None]
Progress = Callable[[str, int], AbstractContextManager[Callable[[str], None]]]
"""A title and a number of steps → a context that yields what is called before each step."""


def find_missing(backends: Sequence[str]) -> MissingPackageError | None:
    """The runtime that a check would need and that isn't installed."""
    packages = (GRAPH_BACKENDS[name] for name in backends)
    return next((MissingPackageError(*p) for p in packages if not is_installed(p[0])), None)


def check(
    blueprint: Blueprint,
    bundle: Bundle,
    backends: Sequence[str],
    wanted: bool | None,
    progress: Progress,
    tell: Tell,
    checked: Callable[[Comparison], None],
) -> None:
    """Run every engine once in each backend; against the PyTorch model where that can be had.

    Raises:
        CheckFailed: an engine differs from the model, or gives what is NaN or Inf.
    """
    if wanted is False:
        return
    if missing := find_missing(backends):
        tell(f"Not checked: {missing}")
        return
    from tocom_export.engines.verify import sample_images, verify

    oracle: Oracle | None = None
    if is_installed("torch", "timm"):
        from tocom_export.training.torch_engine import make_oracle

        oracle = make_oracle(bundle, blueprint.weights.bank).run_all
    # Whether outputs are finite one image shows as well as twenty, which agreement takes.
    images = sample_images(bundle.spec) if oracle else sample_images(bundle.spec, 1)
    comparisons: list[Comparison] = []
    with progress("checking", len(backends) * len(bundle.variants)) as advance:
        for backend in backends:
            for comparison in verify(bundle, images, oracle, backend=backend):  # type: ignore[arg-type]
                advance(comparison.variant)
                comparisons.append(comparison)
                checked(comparison)
    for comparison in comparisons:
        comparison.require("the PyTorch model", "no bundle was written. Please report this.")


def add_plans(
    bundle: Bundle,
    backend: Library,
    options: PlanOptions,
    check: bool,
    progress: Progress,
    tell: Tell,
    detail: Tell,
) -> Bundle:
    """The bundle with a plan for each variant, run where there is a GPU."""
    from tocom_export.engines.tensorrt import add_plans as adding
    from tocom_export.engines.tensorrt.cuda import find_gpu
    from tocom_export.engines.tensorrt.known_bugs import explain_doubt
    from tocom_export.engines.tensorrt.library import open_library
    from tocom_export.engines.verify import sample_images

    gpu = find_gpu()
    name, oracle = _choose_oracle(bundle) if check and gpu else ("", None)
    images = sample_images(bundle.spec) if check and gpu else None
    with progress("building plans", 100 * len(bundle.variants)) as advance:
        follow = partial(adding.count_hundredths, advance)
        extended = adding.add_plans(
            bundle, backend, options, images, oracle, name, tell=detail, progress=follow
        )
    if images is not None and oracle:
        tell(f"The plans were run, and agree with {name}.")
    elif images is not None:
        tell("The plans were run, and what they give is finite; there was nothing to compare them "
             "with: neither torch and timm nor onnxruntime is installed.")  # fmt: skip
    else:
        tell(f"The plans were not run: {'verify is off' if gpu else 'there is no GPU here'}.")
    if not oracle and (doubt := explain_doubt(open_library(backend))):
        tell(doubt)
    return extended


def _choose_oracle(bundle: Bundle) -> tuple[str, Oracle | None]:
    """What plans are compared with, the model or the same graphs elsewhere; its name first."""
    if is_installed("torch", "timm"):
        from tocom_export.training.torch_engine import make_oracle

        return "the PyTorch model", make_oracle(bundle).run_all
    if is_installed("onnxruntime"):
        return "ONNX Runtime on the same graph", lambda variant, images: bundle.engine(
            variant.name
        ).run_all(images)
    return "", None
