"""A variant in ONNX Runtime."""

from __future__ import annotations

from functools import partial

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import BundleError, brief
from tocom_export.io.tensors import Tensors
from tocom_export.variant import Variant

from ..engine import (
    Images,
    Logits,
    Outputs,
    check_finite,
    check_images,
    check_outputs,
    take_first,
)
from ..weights import map_plain
from .session import Device, open_session


class OnnxEngine:
    """A bundle's graph of one variant, ready to run. Safe to share among threads.

    The weights are mapped from the bundle's files and not repacked, so that engines of one
    bundle share them in memory. On a CPU, which has no bfloat16 operators, bf16 is computed in
    float32 and rounded after each operator: slow, and right.

    Args:
        variant: one of the bundle's, its name or its bare degree.
        device: where to run; one that the runtime does not give is an error.
        threads: threads within an operator; None leaves it to the runtime.
        compensated: False runs the checkpoint's own weights: token reduction alone.
        weights: the variant's tensors, all of them and in the bundle's types, to run in place of
            those in its files. A CPU reads them where they lie: engines that are given the same
            arrays share them, and an array must not be changed afterwards.
        graph: the variant's graph, in place of the file.

    Raises:
        DegreeError: the bundle has no such variant.
        MissingPackageError, DeviceError: ONNX Runtime is not installed, or without the device.
        BundleError: ONNX Runtime can't open the files.
    """

    largest = None

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant | str | int,
        *,
        device: Device = "cpu",
        threads: int | None = None,
        compensated: bool = True,
        weights: Tensors | None = None,
        graph: bytes | None = None,
    ) -> None:
        self.spec, self._bundle, self._compensated = bundle.spec, bundle, compensated
        self.precision = self.arithmetic = bundle.precision
        self.variant = variant if isinstance(variant, Variant) else bundle.variant(variant)
        self._open = partial(open_session, bundle, self.variant.name, device, threads, graph=graph)
        self._opened = self._open(weights=weights or self._choose_plain())

    @property
    def about(self) -> str:
        """``ONNX Runtime 1.32.0, CPUExecutionProvider, fp32``."""
        import onnxruntime

        provider = self._opened[0].get_providers()[0]
        return f"ONNX Runtime {onnxruntime.__version__}, {provider}, {self.precision}"

    def run(self, images: Images) -> Logits:
        """The first output of normalised images (B, C, H, W) float32; else ImageError."""
        return take_first(self.run_all(images))

    def run_all(self, images: Images) -> Outputs:
        """Each output of normalised images (B, C, H, W) float32 by name; else ImageError."""
        check_images(images, self.spec)
        check_finite(images, self._bundle.precision)
        names = list(forms := self._bundle.forms)
        session, _held = self._opened  # both, for a refit may come while this one runs
        try:
            found = session.run(names, {"images": images})
        except Exception as error:  # of many types, as in opening one
            raise BundleError(
                f"{self._bundle.graph(self.variant.name)}: ONNX Runtime can't run it "
                f"({brief(error)}); inspect tells whether it is damaged."
            ) from error
        return check_outputs(dict(zip(names, found, strict=True)), images, forms)

    def refit(self, weights: Tensors | None = None) -> None:
        """Exchange the weights; None reads the bundle's files again, after a refit of theirs.

        Raises:
            BundleError: they can't be opened; the engine goes on with the old weights.
        """
        now = self.variant
        if weights is None:
            now = Bundle.open(self._bundle.path).variant(now.name)
        self._opened = self._open(weights=weights or self._choose_plain())
        self.variant = now

    def _choose_plain(self) -> Tensors | None:
        """The checkpoint's own weights where nothing is to be compensated."""
        return None if self._compensated else map_plain(self._bundle)
