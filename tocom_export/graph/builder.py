"""Recording ONNX nodes: names that say where a node stands, constants written once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..io.tensors import StoredTensor
from .precision import TYPES, Types

Attribute = int | float | str | Sequence[int]
FLOAT = ir.DataType.FLOAT

_DTYPES = {
    "F32": FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I8": ir.DataType.INT8,
}


class GraphBuilder:
    """Records nodes, and knows the model's weights by their PyTorch names.

    Args:
        weights: where each weight lies; becomes an external tensor of the same name.
        types: of the arithmetic. Weights must be stored in ``types.compute``, or in int8.
        input_scales: quantized layer → what one step of its int8 input stands for; a layer whose
            weight is int8 and that isn't listed finds its input's range at each run.
    """

    def __init__(
        self,
        weights: Mapping[str, StoredTensor],
        types: Types = TYPES["fp32"],
        input_scales: Mapping[str, float] | None = None,
    ) -> None:
        self._tape = ir.tape.Tape()
        self.types = types
        self.input_scales = input_scales or {}
        self._weights = weights
        self._values: dict[str, ir.Value] = {}
        self._scope = ""
        self._counts: Counter[str] = Counter()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """All nodes so far."""
        return self._tape.nodes

    @property
    def initializers(self) -> Sequence[ir.Value]:
        """All weights and constants so far."""
        return self._tape.initializers

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes recorded in this block are named ``<name>/<op type>``."""
        outer, self._scope = self._scope, name
        yield
        self._scope = outer

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """One node with one output."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, outputs: int, **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """One node with several outputs."""
        name = f"{self._scope}/{kind}"
        self._counts[name] += 1
        if self._counts[name] > 1:
            name = f"{name}_{self._counts[name]}"
        values = self._tape.op_multi_out(
            kind, inputs, attributes or None, num_outputs=outputs, name=name
        )
        for index, value in enumerate(values):
            value.name = name if outputs == 1 else f"{name}.{index}"
        return values

    def weight(self, name: str) -> ir.Value:
        """A weight of the checkpoint, by reference."""
        if name not in self._values:
            stored = self._weights[name]
            tensor = ir.ExternalTensor(
                stored.file.name,
                stored.offset,
                stored.length,
                _DTYPES[stored.dtype],
                shape=ir.Shape(stored.shape),
                name=name,
            )
            self._values[name] = self._tape.initializer(tensor)
        return self._values[name]

    def shape(self, weight: str) -> tuple[int, ...]:
        """The shape of a weight of the checkpoint."""
        return self._weights[weight].shape

    def is_quantized(self, weight: str) -> bool:
        """Whether a weight of the checkpoint is stored in int8."""
        return self._weights[weight].dtype == "I8"

    def ints(self, *numbers: int) -> ir.Value:
        """An int64 vector, stored in the graph."""
        name = "ints_" + "_".join(map(str, numbers)).replace("-", "m")
        return self.constant(name, np.array(numbers, np.int64))

    def floats(self, *numbers: float, dtype: ir.DataType | None = None) -> ir.Value:
        """A vector, stored in the graph; a scalar where it is one number.

        Args:
            dtype: default: the type that is computed in.
        """
        dtype = dtype or self.types.compute
        name = f"{dtype.name.lower()}s_" + "_".join(map(repr, numbers)).replace("-", "m")
        value = numbers[0] if len(numbers) == 1 else numbers
        return self.constant(name, np.array(value, dtype.numpy()))

    def cast(self, x: ir.Value, source: ir.DataType, target: ir.DataType) -> ir.Value:
        """From one type to another; x itself where they are the same."""
        return x if source == target else self.op("Cast", x, to=int(target))

    def to_stream(self, x: ir.Value) -> ir.Value:
        """From the type that is computed in to that of the residual stream."""
        return self.cast(x, self.types.compute, self.types.stream)

    def from_stream(self, x: ir.Value) -> ir.Value:
        """The inverse of :meth:`to_stream`."""
        return self.cast(x, self.types.stream, self.types.compute)

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A small array, stored in the graph; one name always holds one array."""
        if name not in self._values:
            self._values[name] = self._tape.initializer(ir.tensor(array, name=name))
        return self._values[name]

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshape; -1 stands for what follows from the batch."""
        return self.op("Reshape", x, self.ints(*shape))

    def cut(self, x: ir.Value, axis: int, start: int, end: int, step: int = 1) -> ir.Value:
        """``x[start:end:step]`` along one axis."""
        bounds = (self.ints(start), self.ints(end), self.ints(axis), self.ints(step))
        return self.op("Slice", x, *bounds)
