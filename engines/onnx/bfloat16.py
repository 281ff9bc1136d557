"""bfloat16 graphs on a CPU: ONNX Runtime has kernels for hardly any bfloat16 operator there."""

from __future__ import annotations

import onnx

_BF16, _FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
_MOVES = {
    "Cast", "Concat", "Expand", "GatherND", "Pad", "Reshape", "Slice", "Split", "Squeeze",
    "Transpose",
}  # fmt: skip
"""Operators that a CPU has for bfloat16: they only move elements."""


def widen_file(content: bytes) -> bytes:
    """:func:`widen` for a graph that is serialized."""
    model = onnx.load_from_string(content)
    widen(model)
    widened: bytes = model.SerializeToString()
    return widened


def widen(model: onnx.ModelProto) -> None:
    """Let a graph do its bfloat16 arithmetic in float32, rounded after each operator; in place.

    It is what a processor with bfloat16 units does, slowly. Weights stay where they lie.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}

    nodes = []
    for node in model.graph.node:
        before, after = [], []
        if node.op_type not in _MOVES:
            for index, name in enumerate(node.input):
                if types.get(name) == _BF16:
                    node.input[index] = wide = f"{node.name}/wide.{index}"
                    before.append(onnx.helper.make_node("Cast", [name], [wide], wide, to=_FLOAT))
            for index, name in enumerate(node.output):
                if types.get(name) == _BF16:
                    node.output[index] = exact = f"{node.name}/exact.{index}"
                    after.append(onnx.helper.make_node("Cast", [exact], [name], exact, to=_BF16))
        nodes += [*before, node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
