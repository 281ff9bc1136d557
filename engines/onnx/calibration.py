"""How large the inputs of each quantized layer get, on a user's images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx

from tocom_export.bundle.opening import Bundle
from tocom_export.graph.quantising import LARGEST, quantized_layers

from .session import open_session

_BATCH = 32
SHARE = 0.9999
"""Of a layer's inputs, those that int8 must reach; the rest is cut off. Measured against all of
them, 0.999 and 0.99999 (docs/precision.md)."""


def measure_input_scales(
    bundle: Bundle, variant: str, images: npt.NDArray[np.float32], share: float = SHARE
) -> dict[str, float]:
    """Layer → what one step of its int8 input stands for, in one variant of an fp32 bundle.

    Args:
        images: normalised (N, C, H, W); some hundreds are enough.
        share: of a layer's inputs in the batch where they are largest, those within its range.
    """
    model = onnx.load(bundle.graph(variant), load_external_data=False)
    weights = {f"{layer}.weight": layer for layer in quantized_layers(bundle.spec)}
    inputs = {
        weights[node.input[1]]: node.input[0]
        for node in model.graph.node
        if len(node.input) > 1 and node.input[1] in weights
    }
    wanted = list(dict.fromkeys(inputs.values()))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session, _ = open_session(bundle, variant, "cpu", None, graph=model.SerializeToString())
    reach = dict.fromkeys(wanted, 0.0)
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        for name, values in zip(wanted, session.run(wanted, {"images": batch}), strict=True):
            size = np.abs(values).ravel()
            rank = min(len(size) - 1, int(share * len(size)))
            reach[name] = max(reach[name], float(np.partition(size, rank)[rank]))
    return {layer: (reach[name] or 1.0) / LARGEST for layer, name in inputs.items()}
