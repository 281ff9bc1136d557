"""A variant in OpenVINO."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import BundleError, InputError
from tocom_export.graph.precision import Precision
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
from .compiling import Compiled, compile_variant
from .library import Settings, check_device, explain, get_version

_COARSER: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
_PRECISIONS: dict[str, Precision] = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}


class OpenVinoEngine:
    """A bundle's graph of one variant, compiled by OpenVINO. Safe to share among threads.

    A compiled model has repacked weights of its own: engines share nothing in memory. What was
    compiled of a bundle's files is kept in the machine's cache, where the next start finds it.

    Args:
        variant: one of the bundle's, its name or its bare degree.
        settings: device, precision, threads, streams, hint.
        batch: sizes of batches that it is compiled for at once, each by itself, which runs 5 to
            25 % faster; other sizes run on one model for any, compiled when it is first needed.
        weights: the variant's tensors, all of them and in the bundle's types, to run in place of
            those in its files.
        compensated: False runs the checkpoint's own weights: token reduction alone.

    Raises:
        DegreeError: the bundle has no such variant.
        MissingPackageError, DeviceError: OpenVINO is not installed, or too old, or without the
            device, or this can't compute in the precision.
        BundleError: OpenVINO can't read the files.
    """

    largest = None

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant | str | int,
        *,
        settings: Settings | None = None,
        batch: int | Sequence[int] = (),
        weights: Tensors | None = None,
        compensated: bool = True,
    ) -> None:
        batch = (batch,) if isinstance(batch, int) else tuple(batch)
        if not all(isinstance(size, int) and size > 0 for size in batch):
            raise InputError(f"`batch` {batch}: whole numbers of images are expected.")
        self.spec = bundle.spec
        self.variant = variant if isinstance(variant, Variant) else bundle.variant(variant)
        self.settings = settings or Settings()
        self.device = check_device(self.settings)
        self._bundle, self._compensated = bundle, compensated
        self._weights = self._choose_weights(bundle, weights)
        self._compiling = threading.Lock()
        self._opened = self._compile_all(batch or (None,), bundle, self._weights)

    @property
    def copies(self) -> int:
        """Models that were compiled, each of which has all weights for itself."""
        return len(self._opened)

    @property
    def precision(self) -> Precision:
        """The coarser of its bundle's and of what the device was given or chose."""
        taken = _PRECISIONS.get(self._device_precision, "fp32")
        return max(self._bundle.precision, taken, key=_COARSER.index)

    @property
    def arithmetic(self) -> str:
        """``fp32``, ``bf16``; ``int8+bf16`` where only products of weights are int8."""
        rest = _PRECISIONS.get(self._device_precision, "fp32")
        return self.precision if rest in ("fp32", self.precision) else f"{self.precision}+{rest}"

    @property
    def about(self) -> str:
        """``OpenVINO 2026.4.1 on AMD EPYC, int8+bf16``."""
        return f"OpenVINO {get_version()} on {self.device}, {self.arithmetic}"

    @property
    def _device_precision(self) -> str:
        return next(iter(self._opened.values())).precision

    def run(self, images: Images) -> Logits:
        """The first output of normalised images (B, C, H, W) float32; else ImageError."""
        return take_first(self.run_all(images))

    def run_all(self, images: Images) -> Outputs:
        """Each output of normalised images (B, C, H, W) float32 by name; else ImageError."""
        check_images(images, self.spec)
        check_finite(images, self._bundle.precision)
        forms = self._bundle.forms
        opened = self._opened  # a refit may exchange it meanwhile
        compiled = opened.get(len(images)) or opened.get(None) or self._compile_any()
        try:
            found = compiled.run(images, forms)
        except RuntimeError as error:
            raise BundleError(
                f"{self._bundle.graph(self.variant.name)}: OpenVINO can't run it "
                f"({explain(error)}); inspect tells whether it is damaged."
            ) from error
        return check_outputs(found, images, forms)

    def refit(self, weights: Tensors | None = None) -> None:
        """Exchange the weights; None reads the bundle's files again, after a refit of theirs.

        The new ones are compiled beside the old, which runs that are under way end with.

        Raises:
            BundleError: they can't be opened; the engine goes on with the old weights.
        """
        with self._compiling:
            bundle = Bundle.open(self._bundle.path) if weights is None else self._bundle
            chosen = self._choose_weights(bundle, weights)
            self._opened = self._compile_all(tuple(self._opened), bundle, chosen)
            self._bundle, self._weights = bundle, chosen
            self.variant = bundle.variant(self.variant.name) if weights is None else self.variant

    def _choose_weights(self, bundle: Bundle, weights: Tensors | None) -> Tensors | None:
        """Those that are given; without compensation the checkpoint's own; else the files'."""
        return weights if weights or self._compensated else map_plain(bundle)

    def _compile_any(self) -> Compiled:
        """The model for batches of any size, once it is needed."""
        with self._compiling:
            if None not in self._opened:
                found = self._compile_all((None,), self._bundle, self._weights)
                self._opened = {**self._opened, **found}
            return self._opened[None]

    def _compile_all(
        self, batches: Sequence[int | None], bundle: Bundle, weights: Tensors | None
    ) -> Mapping[int | None, Compiled]:
        name, settings = self.variant.name, self.settings
        return {
            batch: compile_variant(bundle, name, settings, self.device, batch, weights)
            for batch in batches
        }
