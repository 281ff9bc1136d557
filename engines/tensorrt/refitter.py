"""New weights into a deserialized engine, by the library's Refitter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tocom_export.errors import PlanError

from .interrupt import deferred_interrupt
from .library import Nvidia
from .plan import PlanRecord, Tensor

_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int8": "INT8"}
"""NumPy's name of a type → the libraries'."""


def check_weights(record: PlanRecord, weights: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raise PlanError unless ``weights`` are what a refit of the plan needs, shape and dtype."""
    if not record.refittable:
        raise PlanError(
            "the plan was built with --refit none; build it with --refit qkv, or --refit all to "
            "exchange every weight."
        )
    if missing := [name for name in record.refittable if name not in weights]:
        raise PlanError(f"weights for {missing[0]} are missing ({len(missing)} such tensors).")
    for name, expected in record.refittable.items():
        given = weights[name]
        if given.shape != expected.shape or given.dtype.name != expected.dtype:
            raise PlanError(
                f"{name} is {given.dtype.name} of shape {given.shape}; the plan takes "
                f"{expected.dtype} of shape {expected.shape}."
            )


def refit(
    nvidia: Nvidia, engine: Any, record: PlanRecord, weights: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Set every refittable weight of an engine; no inference may be in flight.

    The values are absolute, and all of them are set each time: what an earlier refit left, and
    what the library itself calls missing, plays no part.

    Raises:
        PlanError: weights are missing or of another form, or the library refuses them; the
            engine must then not be used.
    """
    trt = nvidia.trt
    check_weights(record, weights)
    refitter = open_refitter(nvidia, engine)
    asked = set(refitter.get_all_weights())
    if differing := sorted(asked ^ set(record.refittable)):
        who = "the engine wants" if differing[0] in asked else "the engine doesn't know"
        raise PlanError(f"{who} {differing[0]}, unlike the plan's JSON; build the plan again.")
    alive = []
    for name in sorted(asked):
        expected = record.refittable[name]
        _check_prototype(trt, name, refitter.get_weights_prototype(name), expected)
        array = np.ascontiguousarray(weights[name])
        alive.append(array)  # read until the refit is done
        kind = getattr(trt.DataType, _TYPES[expected.dtype])
        given = trt.Weights(kind, array.ctypes.data, array.size)
        if not refitter.set_named_weights(name, given, trt.TensorLocation.HOST):
            raise PlanError(
                f"{nvidia.library} refuses {name} ({nvidia.reason('no reason given')})."
            )
    with deferred_interrupt():
        done = refitter.refit_cuda_engine()
    if not done:
        raise PlanError(f"{nvidia.library} can't refit it ({nvidia.reason('no reason given')}).")


def _check_prototype(trt: Any, name: str, prototype: Any, expected: Tensor) -> None:
    kind = getattr(trt.DataType, _TYPES[expected.dtype])
    count = int(np.prod(expected.shape))
    if (prototype.size, prototype.dtype) != (count, kind):
        raise PlanError(
            f"the engine's {name} has {prototype.size} values of {prototype.dtype}, the plan's "
            f"JSON says {count} of {kind}; the two are not of one build."
        )


def open_engine(nvidia: Nvidia, content: bytes, host_code: bool = False) -> Any:
    """The library's engine of a serialized plan.

    Args:
        host_code: let a version-compatible plan run the code that it brings along.

    Raises:
        PlanError: the library refuses it.
    """
    nvidia.errors.clear()
    try:
        runtime = nvidia.trt.Runtime(nvidia.logger)
        runtime.engine_host_code_allowed = host_code
        with deferred_interrupt():
            engine = runtime.deserialize_cuda_engine(content)
    except TypeError:  # what the bindings make of a null pointer
        engine = None
    if engine is None:
        raise PlanError(nvidia.reason("no reason given"))
    return engine


def open_refitter(nvidia: Nvidia, engine: Any) -> Any:
    """The library's refitter of an engine.

    Raises:
        PlanError: the engine can't be refitted.
    """
    nvidia.errors.clear()
    try:
        if engine.refittable:
            return nvidia.trt.Refitter(engine, nvidia.logger)
    except TypeError:
        pass
    raise PlanError(
        f"{nvidia.library} {nvidia.version} can't refit this plan (before 10.14, a plan that was "
        "refitted and saved may be so); build it again."
    )


def serialized(nvidia: Nvidia, engine: Any, stripped: bool) -> bytes:
    """An engine with its weights, which can be refitted again where the library lets that be said.

    Args:
        stripped: whether its weights were left out when it was built.

    Raises:
        PlanError: the library can't save it.
    """
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
        raise PlanError(f"{nvidia.library} can't save it ({nvidia.reason('no reason given')}).")
    return bytes(content)
