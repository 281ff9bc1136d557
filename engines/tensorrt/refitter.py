"""New weights into a deserialized engine, by the library's Refitter."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from tocom_export.errors import PlanError
from tocom_export.io.tensors import Tensors

from .interrupt import deferred_interrupt
from .library import Nvidia
from .plan import PlanRecord

_TYPES = {
    "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int8": "INT8", "int64": "INT64",
}  # fmt: skip
"""NumPy's name of a type → the libraries'."""


def refit(nvidia: Nvidia, engine: Any, record: PlanRecord, weights: Tensors) -> None:
    """Set every refittable weight of an engine, to weights that ``check_weights`` has seen.

    The values are absolute, and all of them are set each time: what an earlier refit left, and
    what the library itself calls missing, plays no part. No inference may be in flight.

    Raises:
        PlanError: engine and record differ, or the library refuses; nothing may run then.
    """
    trt, refitter = nvidia.trt, open_refitter(nvidia, engine)
    asked = set(refitter.get_all_weights())
    if differing := sorted(asked ^ set(record.refittable)):
        who = "the engine wants" if differing[0] in asked else "the engine doesn't know"
        raise PlanError(f"{who} {differing[0]}, unlike the plan's JSON; build the plan again.")
    alive = []
    for name in sorted(asked):
        array = np.ascontiguousarray(weights[name])
        alive.append(array)  # read until the refit is done
        kind = getattr(trt.DataType, _TYPES[array.dtype.name])
        prototype = refitter.get_weights_prototype(name)
        if (prototype.size, prototype.dtype) != (array.size, kind):
            raise PlanError(
                f"the engine's {name} has {prototype.size} values of {prototype.dtype}, the plan's "
                f"JSON says {array.size} of {kind}; the two are not of one build."
            )
        given = trt.Weights(kind, array.ctypes.data, array.size)
        if not refitter.set_named_weights(name, given, trt.TensorLocation.HOST):
            raise PlanError(f"{nvidia.library} refuses {name} ({nvidia.reason()}).")
    with deferred_interrupt():
        done = refitter.refit_cuda_engine()
    if not done:
        raise PlanError(f"{nvidia.library} can't refit it ({nvidia.reason()}).")


def open_engine(nvidia: Nvidia, content: bytes, host_code: bool = False) -> Any:
    """The library's engine of a serialized plan; raises PlanError where it refuses it."""
    nvidia.logger.errors.clear()
    with suppress(TypeError), deferred_interrupt():  # what the bindings make of a null pointer
        runtime = nvidia.trt.Runtime(nvidia.logger)
        runtime.engine_host_code_allowed = host_code
        if (engine := runtime.deserialize_cuda_engine(content)) is not None:
            return engine
    raise PlanError(nvidia.reason())


def open_refitter(nvidia: Nvidia, engine: Any) -> Any:
    """The library's refitter of an engine; raises PlanError for one that can't be refitted."""
    nvidia.logger.errors.clear()
    with suppress(TypeError):
        if engine.refittable:
            return nvidia.trt.Refitter(engine, nvidia.logger)
    raise PlanError(
        f"{nvidia.library} {nvidia.version} can't refit this plan (before 10.14, a plan that was "
        "refitted and saved may be so); build it again."
    )


def serialize(nvidia: Nvidia, engine: Any, stripped: bool) -> bytes:
    """An engine, built stripped or not, with its weights; refittable if that can be asked for."""
    flags = nvidia.trt.SerializationFlag
    if not hasattr(flags, "INCLUDE_REFIT") and not stripped:  # before 10.14
        content = engine.serialize()
    else:
        config = engine.create_serialization_config()
        config.clear_flag(flags.EXCLUDE_WEIGHTS)
        if hasattr(flags, "INCLUDE_REFIT"):
            config.set_flag(flags.INCLUDE_REFIT)
        content = engine.serialize_with_config(config)
    if content is None:
        raise PlanError(f"{nvidia.library} can't save it ({nvidia.reason()}).")
    return bytes(content)
