"""The Open Inference Protocol's messages: bytes ↔ images and outputs, in JSON and in binary.

After the KServe specification (v2) and Triton's extension for binary tensors: little-endian rows
behind the JSON text, whose length is in the header ``Inference-Header-Content-Length``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import msgspec
import numpy as np

from tocom_export.errors import InputError

from ...engine import Images, Outputs
from ..triton_requests import read_variant
from .refusals import Refusal, refuse

INPUT = "images"
HEADER_LENGTH = "Inference-Header-Content-Length"
DTYPES: Mapping[str, str] = {"FP32": "<f4", "FP16": "<f2"}
"""Datatypes that images may have: as they lie in a message."""
GIVEN: Mapping[str, str] = {"float32": "FP32", "int32": "INT32"}
"""Types of outputs: their datatypes."""
_TEXT = 65_536
"""Bytes of JSON around a tensor, at most."""
_DIGITS = 26
"""Bytes of a number in JSON, at most: a double, its sign, exponent and comma."""


_LONGEST = 2**63 - 1
"""Microseconds of a timeout, at most."""
_NESTED = re.compile(rb"\s*\[\s*\[")
_NO_NUMBERS = re.compile(rb"[\[,:\s]-?(NaN|nan|Infinity|inf)\b")
_BROKEN = (msgspec.DecodeError, UnicodeError, RecursionError)


class _Numbers(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"")


class _Outline(msgspec.Struct):
    inputs: tuple[_Numbers]


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] | None = None


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    parameters: dict[str, Any] | None = None
    outputs: list[_Output] | None = None


@dataclass(frozen=True)
class Form:
    """What images a model takes."""

    image: tuple[int, int, int]
    """Channels, height, width."""
    most: int
    """Images in a request."""
    outputs: tuple[str, ...] = ("logits",)
    """What it gives, by name."""

    @property
    def largest(self) -> int:
        """Bytes of a request, at most."""
        return _TEXT + _DIGITS * self.most * prod(self.image)


@dataclass(frozen=True)
class InferRequest:
    """What is asked of a model."""

    images: Images
    """(B, C, H, W) float32."""
    id: str
    outputs: Mapping[str, bool]
    """Names of those that are wanted, in their order, and whether in binary."""
    seconds: float | None
    """After which the answer is of no use."""
    variant: str | int | None = None
    """What its parameters ask for, by name or bare degree."""


def parse_request(body: bytes, header_length: str | None, form: Form) -> InferRequest:
    """A request's body.

    Args:
        header_length: bytes of JSON, what follows being binary; None where all of it is JSON.

    Raises:
        Refusal: what is wrong with it.
    """
    length = measure_text(body, header_length)
    text = memoryview(body)[:length]
    binary = None if header_length is None else memoryview(body)[length:]
    try:
        _check_outline(text)
        request = msgspec.json.decode(text, type=_Request)
    except _BROKEN as error:
        if _NO_NUMBERS.search(text):
            raise Refusal(400, "JSON has no NaN and no Infinity.") from None
        raise Refusal(400, f"the request is not as the protocol has it: {error}.") from None
    parameters = request.parameters or {}
    if sequence := [name for name in parameters if name.startswith("sequence_")]:
        raise Refusal(400, f"{sequence[0]}: sequences are not supported.")
    if [tensor.name for tensor in request.inputs] != [INPUT]:
        names = ", ".join(tensor.name for tensor in request.inputs[:8])
        raise Refusal(
            400, f"the model takes one input, {INPUT!r}; the request has {names or 'none'}."
        )
    images = _parse_images(request.inputs[0], binary, form)
    outputs = _choose_outputs(request, form)
    try:
        variant = read_variant(parameters)
    except InputError as error:
        raise refuse(error) from None
    return InferRequest(images, request.id, outputs, _read_timeout(parameters), variant)


def measure_text(body: bytes, header_length: str | None) -> int:
    """Bytes of JSON in a body.

    Raises:
        Refusal: ``header_length`` is none of this body.
    """
    if header_length is None:
        return len(body)
    digits = header_length.isascii() and header_length.isdigit()
    length = int(header_length[:20]) if digits else -1
    if not 0 < length <= len(body):
        raise Refusal(
            400, f"{HEADER_LENGTH} {header_length[:40]!r}: the body's JSON isn't as long."
        )
    return length


def _check_outline(text: memoryview) -> None:
    """Raise Refusal where much JSON is around the numbers, of which objects would be made.

    They would take twenty times the memory of their text, and more time than others can wait.
    """
    if len(text) > _TEXT:
        (tensor,) = msgspec.json.decode(text, type=_Outline).inputs
        if len(text) - memoryview(tensor.data).nbytes > _TEXT:
            raise Refusal(400, f"there are more than {_TEXT} bytes around the numbers.")


def _parse_images(tensor: _Tensor, binary: memoryview | None, form: Form) -> Images:
    shape, parameters = tensor.shape, tensor.parameters or {}
    if len(shape) != 4 or tuple(shape[1:]) != form.image or shape[0] < 1:
        wanted = ", ".join(map(str, form.image))
        raise Refusal(400, f"{INPUT} has shape {shape[:8]}; [B, {wanted}] with B ≥ 1 is expected.")
    if shape[0] > form.most:
        raise Refusal(400, f"a batch of {shape[0]} images; {form.most} are taken at most.")
    if tensor.datatype not in DTYPES:
        known = " or ".join(DTYPES)
        raise Refusal(400, f"{INPUT} has datatype {tensor.datatype[:40]!r}; {known} is expected.")
    if "shared_memory_region" in parameters:
        raise Refusal(400, "shared memory is not supported; send the tensor with the request.")
    dtype = np.dtype(DTYPES[tensor.datatype])
    size = parameters.get("binary_data_size")
    if size is None:
        if binary:
            raise Refusal(400, f"{INPUT} has no binary_data_size, but binary data follow.")
        return _parse_numbers(bytes(tensor.data), shape)
    expected = prod(shape) * dtype.itemsize
    if bytes(tensor.data):
        raise Refusal(400, f"{INPUT} has both data and binary_data_size.")
    if size != expected or binary is None or len(binary) != expected:
        there = 0 if binary is None else len(binary)
        raise Refusal(
            400,
            f"{INPUT} of {tensor.datatype} and shape {shape} has {expected} bytes; "
            f"binary_data_size says {str(size)[:40]}, and {there} follow.",
        )
    # A copy: what lies anywhere in a message isn't aligned, and the message is let go.
    return np.frombuffer(binary, dtype).astype(np.float32).reshape(shape)


def _parse_numbers(text: bytes, shape: Sequence[int]) -> Images:
    """A tensor's numbers in JSON, in one list or in lists of lists."""
    count = prod(shape)
    # Before any object is made: each number takes ten times its text.
    if text.count(b",") != count - 1:
        raise Refusal(400, f"{INPUT} of shape {list(shape)}: data must have {count} numbers.")
    kind: Any = list[list[list[list[float]]]] if _NESTED.match(text) else list[float]
    try:
        numbers = np.asarray(msgspec.json.decode(text, type=kind), np.float64)
    except (*_BROKEN, ValueError):
        wanted = f"in one list, or in lists as deep as {list(shape)}"
        raise Refusal(400, f"data of {INPUT} are not numbers alone, {wanted}.") from None
    if numbers.size != count or numbers.shape[1:] not in ((), tuple(shape[1:])):
        raise Refusal(
            400, f"data of {INPUT} are of shape {list(numbers.shape)}, not {list(shape)}."
        )
    if not (np.abs(numbers) <= np.finfo(np.float32).max).all():
        raise Refusal(400, f"data of {INPUT} are not numbers that FP32 can hold.")
    return numbers.astype(np.float32).reshape(shape)


def _choose_outputs(request: _Request, form: Form) -> dict[str, bool]:
    binary = _read_flag(request.parameters or {}, "binary_data_output", False)
    if not request.outputs:
        return dict.fromkeys(form.outputs, binary)
    wanted: dict[str, bool] = {}
    for output in request.outputs:
        parameters = output.parameters or {}
        if output.name not in form.outputs:
            known = ", ".join(form.outputs)
            raise Refusal(400, f"the model gives {known}, and no {output.name[:40]!r}.")
        if "classification" in parameters:
            raise Refusal(400, "classification is not supported here; POST an image to …/classify.")
        if "shared_memory_region" in parameters:
            raise Refusal(400, "shared memory is not supported; outputs come with the answer.")
        wanted[output.name] = _read_flag(parameters, "binary_data", binary)
    return wanted


def _read_flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Refusal(400, f"{name} is true or false.")
    return value


def _read_timeout(parameters: Mapping[str, Any]) -> float | None:
    """Triton's ``timeout``, microseconds, in seconds; 0 is none."""
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LONGEST:
        raise Refusal(400, "timeout is a whole number of microseconds.")
    return value / 1e6 if value else None


def format_answer(
    model: str, version: str, request: InferRequest, found: Outputs, parameters: Mapping[str, Any]
) -> tuple[bytes, int | None]:
    """An answer's body, and bytes of JSON where binary data follow it.

    Args:
        found: each output (B, ...), by name.
        parameters: of the answer.
    """
    outputs, binaries = [], []
    for name, binary in request.outputs.items():
        rows = found[name]
        datatype = GIVEN[rows.dtype.name]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(rows.shape)}
        if binary:
            binaries.append(rows.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes())
            output["parameters"] = {"binary_data_size": len(binaries[-1])}
        else:
            output["data"] = rows.ravel().tolist()
        outputs.append(output)
    answer: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id:
        answer["id"] = request.id
    answer |= {"parameters": dict(parameters), "outputs": outputs}
    text = msgspec.json.encode(answer)
    return (text + b"".join(binaries), len(text)) if binaries else (text, None)
