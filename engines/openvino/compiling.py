"""From a bundle's graph and its weights to a model that OpenVINO has compiled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import BundleError, DeviceError, brief
from tocom_export.io.tensors import Array, Tensors

from ..engine import Images, Logits
from . import cache
from .library import Settings, open_core

_PRECISION = "INFERENCE_PRECISION_HINT"


@dataclass(frozen=True)
class Compiled:
    """A compiled model and its requests, each of which runs one batch at a time."""

    model: Any
    held: Any = None
    """What must outlive the model."""
    _idle: deque[Any] = field(default_factory=deque)

    @contextmanager
    def _borrow(self) -> Iterator[Any]:
        try:
            request = self._idle.pop()
        except IndexError:  # all of them run
            request = self.model.create_infer_request()
        yield request
        self._idle.append(request)

    def run(self, images: Images) -> Logits:
        """Logits (B, classes) of images (B, C, H, W)."""
        with self._borrow() as request:
            found = request.infer({0: np.ascontiguousarray(images)}, share_inputs=True)
            logits: Logits = np.array(found[0])  # the request's own memory is written again
            return logits

    @property
    def precision(self) -> str:
        """What it computes in where the graph says float32: ``f32``, ``bf16``, ``f16``."""
        try:
            found = self.model.get_property(_PRECISION)
        except RuntimeError:  # AUTO tells it of the devices that it chose
            devices = self.model.get_property("DEVICE_PROPERTIES").values()
            found = next(chosen[_PRECISION] for chosen in devices if _PRECISION in chosen)
        return str(found.get_type_name())


def compile_variant(
    bundle: Bundle,
    variant: str,
    settings: Settings,
    device: str,
    batch: int | None,
    weights: Tensors | None = None,
) -> Compiled:
    """A variant, compiled for batches of one size, or of any.

    Args:
        device: its full name.
        batch: None is any; for one size it runs 5 to 25 % faster.
        weights: in place of those in the bundle's files; such a model is not kept for later.

    Raises:
        BundleError: OpenVINO can't read the graph.
        DeviceError: the device can't run it.
    """
    place = cache.find_place(bundle, variant, settings, batch, device)
    if weights is None and (found := cache.load(place, settings)):
        return Compiled(*found)
    core, file = open_core(), bundle.graph(variant)
    try:
        model = core.read_model(str(file))
        if weights:
            replace_weights(model, weights)
        if batch is not None:
            spec = bundle.spec
            model.reshape([batch, spec.channels, *spec.image_size])
    except RuntimeError as error:
        raise BundleError(f"{file}: OpenVINO can't open it ({brief(error)}).") from error
    try:
        compiled = core.compile_model(model, settings.device, settings.to_config())
    except RuntimeError as error:
        raise DeviceError(
            f"`device` {settings.device}: it can't run {file} ({brief(error)})."
        ) from error
    if weights is None:
        cache.keep(compiled, place)
    return Compiled(compiled)


def replace_weights(model: Any, weights: Tensors) -> None:
    """Put other weights under their names into a model that was read, before it is compiled.

    Raises:
        BundleError: the graph lacks one of them, or has it in another form.
    """
    constants = {
        op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"
    }
    for name, array in weights.items():
        old = constants.get(name)
        if old is None:
            continue  # a weight that this variant doesn't read, as the head of features
        new = _make_constant(array)
        if new.get_output_shape(0) != old.get_output_shape(0):
            raise BundleError(f"{name} has another shape than in the graph.")
        new.set_friendly_name(name)
        for reader in list(old.output(0).get_target_inputs()):
            reader.replace_source_output(new.output(0))


def _make_constant(array: Array) -> Any:
    """A constant that holds an array's values; OpenVINO's Python knows no bfloat16 of NumPy's."""
    import openvino

    if array.dtype.name != "bfloat16":
        return openvino.op.Constant(np.ascontiguousarray(array), shared_memory=False)
    tensor = openvino.Tensor(openvino.Type.bf16, openvino.Shape(array.shape))
    tensor.data.view(np.uint16)[...] = array.view(np.uint16)
    return openvino.op.Constant(tensor)
