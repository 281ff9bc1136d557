"""One degree of a bundle in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import ImageError

from .session import Provider, open_session

__all__ = ["OnnxEngine", "Provider"]


class OnnxEngine:
    """A bundle's graph at one target degree, ready to run. Safe to share among threads.

    The weights are mapped from the bundle's files and not repacked, so that engines of one
    bundle share them in memory. On a CPU, which has no bfloat16 operators, bf16 is computed in
    float32 and rounded after each operator: slow, and right.

    Args:
        bundle: an opened bundle.
        target: one of its degrees.
        provider: where to run. One that the runtime does not give is an error; it would
            otherwise fall back to the CPU in silence.
        threads: threads within an operator; None leaves it to the runtime.
        compensated: False runs the checkpoint's own weights at that degree: token reduction
            alone, to compare with.
        weights: the target's tensors, all of them and in the bundle's types, to run in place of
            those in its files. A CPU reads them where they lie: engines that are given the same
            arrays share them, and an array must not be changed afterwards.
        graph: the target's graph, in place of the file.

    Raises:
        DegreeError: the bundle has no such target.
        MissingPackageError: ONNX Runtime is not installed.
        ProviderError: the provider asked for is not what the session got.
        BundleError: ONNX Runtime can't open the files.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: int,
        *,
        provider: Provider = "cpu",
        threads: int | None = None,
        compensated: bool = True,
        weights: Mapping[str, npt.NDArray[Any]] | None = None,
        graph: bytes | None = None,
    ) -> None:
        self.spec = bundle.spec
        self.target = target
        self._open: Callable[[], tuple[Any, list[Any]]] = partial(
            open_session, bundle, target, provider, threads, compensated, weights, graph
        )
        self._opened = self._open()

    def reload(self) -> None:
        """Read the weights again, after a refit of the bundle's files; given ones stay.

        Runs that are under way end with the old weights, those that begin later have the new
        ones.

        Raises:
            BundleError: the files can't be opened; the engine goes on with the old weights.
        """
        self._opened = self._open()

    def run(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (B, classes) float32 of normalised images (B, C, H, W) float32.

        Raises:
            ImageError: the array has another shape or dtype, or is empty.
        """
        expected = (self.spec.channels, *self.spec.image_size)
        if images.ndim != 4 or images.shape[1:] != expected or not len(images):
            raise ImageError(
                f"images have shape {images.shape}; (B, {', '.join(map(str, expected))}) "
                "with B ≥ 1 is expected."
            )
        if images.dtype != np.float32:
            raise ImageError(f"images are {images.dtype}; float32 is expected.")
        session, _held = self._opened  # both, for a reload may come while this one runs
        logits: npt.NDArray[np.float32] = session.run(None, {"images": images})[0]
        return logits
