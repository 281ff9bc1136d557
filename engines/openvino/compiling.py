"""From a bundle's graph and its weights to a model that OpenVINO has compiled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tocom_export.bundle.file_hashes import record_files
from tocom_export.bundle.opening import Bundle
from tocom_export.errors import BundleError, DeviceError
from tocom_export.io.tensors import Array, Tensors

from ..engine import Images, Outputs
from . import cache
from .library import Settings, explain, open_core

_PRECISION = "INFERENCE_PRECISION_HINT"


@dataclass(frozen=True)
class Compiled:
    """A compiled model and its requests, each of which runs one batch at a time."""

    model: Any
    _idle: deque[Any] = field(default_factory=lambda: deque(maxlen=4))
    """Those that wait for images; more at a time than these are made and let go."""

    @contextmanager
    def _borrow(self) -> Iterator[Any]:
        try:
            request = self._idle.pop()
        except IndexError:  # all of them run
            request = self.model.create_infer_request()
        yield request
        self._idle.append(request)

    def run(self, images: Images, names: Iterable[str]) -> Outputs:
        """Some outputs of images (B, C, H, W)."""
        with self._borrow() as request:
            found = request.infer({0: np.ascontiguousarray(images)}, share_inputs=True)
            # Copied: the request's own memory is written again.
            return {name: np.array(found[name]) for name in names}

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
        BundleError: OpenVINO can't read the graph, or a file isn't what the manifest says.
        DeviceError: the device can't run it.
    """
    place = cache.find_place(bundle, variant, settings, batch, device)
    if weights is None and place and (found := cache.load(place, settings)):
        return Compiled(found)
    core, file = open_core(), bundle.graph(variant)
    files = [file, *bundle.weight_files(variant)] if weights is None else [file]
    _check_files(bundle, files)
    try:
        model = core.read_model(str(file))
        if batch is not None:
            spec = bundle.spec
            model.reshape([batch, spec.channels, *spec.image_size])
    except RuntimeError as error:
        raise BundleError(f"{file}: OpenVINO can't open it ({explain(error)}).") from error
    if weights:
        read = {name: tensor for name, tensor in weights.items() if bundle.reads(name)}
        replace_weights(model, read, file)
    try:
        compiled = core.compile_model(model, settings.device, settings.to_config())
    except RuntimeError as error:
        reason = explain(error)
        raise DeviceError(f"`device` {settings.device}: can't run {file} ({reason}).") from error
    if weights is None and place:
        _check_files(bundle, files)  # else another's weights would be kept under these hashes
        cache.keep(compiled, place)
    return Compiled(compiled)


def _check_files(bundle: Bundle, files: Sequence[Path]) -> None:
    """Raise BundleError where files aren't those that the bundle's manifest lists."""
    names = [file.name for file in files]
    try:
        found = record_files(bundle.path, names)
    except OSError as error:
        raise BundleError(f"{error.filename}: can't be read: {error.strerror}.") from None
    for name in names:
        if found[name] != bundle.files[name]:
            raise BundleError(
                f"{bundle.path / name} was changed since its bundle was opened; open it again."
            )


def replace_weights(model: Any, weights: Tensors, file: Path) -> None:
    """Put other weights under their names into a model that was read, before it is compiled.

    Args:
        file: what the model was read from, for messages.

    Raises:
        BundleError: the graph lacks one of them, or has it in another form.
    """
    constants = {
        op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"
    }
    for name, array in weights.items():
        if name not in constants:
            raise BundleError(f"{file} has no weight {name}.")
        old, new = constants[name], _make_constant(array)
        if new.get_output_shape(0) != old.get_output_shape(0):
            raise BundleError(f"{file}: {name} has another shape there.")
        if new.get_element_type() != old.get_element_type():
            raise BundleError(f"{file}: {name} is of another type there.")
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
