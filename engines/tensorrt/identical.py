"""Plans without weights that take back the very ones they were built with, and no others.

NVIDIA promises such a plan (``REFIT_IDENTICAL``) the speed of one that can't be refitted: the
builder counts on the weights' values, and folds them as it likes. With others anything may happen.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from tocom_export.bundle.file_hashes import read_recorded
from tocom_export.bundle.opening import Bundle
from tocom_export.io.tensors import Tensors


def add_constants(bundle: Bundle, variant: str, weights: Tensors) -> Tensors:
    """All tensors of a variant, and those that lie in its graph: such a plan may want both.

    Raises:
        BundleError: the graph is not what the bundle's manifest says.
    """
    file = bundle.graph(variant)
    content = onnx.load_model_from_string(read_recorded(file, bundle.files[file.name]))
    values = (v.const_value for v in ir.from_proto(content).graph.initializers.values())
    constants = {
        str(tensor.name): tensor.numpy()
        for tensor in values
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor)
    }
    return {**weights, **constants}
