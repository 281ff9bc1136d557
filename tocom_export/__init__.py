"""One trained Vision Transformer, exported at many costs without retraining.

The names below are imported when they are first used, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from tocom_export.engines.onnx.engine import OnnxEngine
    from tocom_export.engines.serving.pool import EnginePool

    from .bundle.opening import Bundle
    from .bundle.writing import BuildPlan, write_bundle
    from .compression.bank import ToComBank
    from .compression.checkpoint import Checkpoint
    from .compression.method import Method
    from .compression.schedule import TokenSchedule
    from .errors import TocomError
    from .graph.writer import write_graph
    from .model.preprocess import Preprocess
    from .model.spec import VitSpec

_HOMES = {
    "BuildPlan": "bundle.writing",
    "Bundle": "bundle.opening",
    "Checkpoint": "compression.checkpoint",
    "EnginePool": "engines.serving.pool",
    "Method": "compression.method",
    "OnnxEngine": "engines.onnx.engine",
    "Preprocess": "model.preprocess",
    "ToComBank": "compression.bank",
    "TocomError": "errors",
    "TokenSchedule": "compression.schedule",
    "VitSpec": "model.spec",
    "write_bundle": "bundle.writing",
    "write_graph": "graph.writer",
}

__all__ = [
    "BuildPlan",
    "Bundle",
    "Checkpoint",
    "EnginePool",
    "Method",
    "OnnxEngine",
    "Preprocess",
    "ToComBank",
    "TocomError",
    "TokenSchedule",
    "VitSpec",
    "__version__",
    "write_bundle",
    "write_graph",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tocom_export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tocom_export.{_HOMES[name]}"), name)
