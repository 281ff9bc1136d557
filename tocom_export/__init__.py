"""One trained Vision Transformer, exported at many costs without retraining.

The names below are imported when they are first used, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tocom_export._version import __version__

if TYPE_CHECKING:
    from tocom_export.bank import ToComBank
    from tocom_export.build import BuildPlan, write_bundle
    from tocom_export.bundle import Bundle
    from tocom_export.checkpoint import Checkpoint
    from tocom_export.engines.onnxruntime import OnnxEngine
    from tocom_export.engines.pool import EnginePool
    from tocom_export.errors import TocomError
    from tocom_export.graph.writer import write_graph
    from tocom_export.images import Preprocess
    from tocom_export.method import Method
    from tocom_export.schedule import TokenSchedule
    from tocom_export.spec import VitSpec

_HOMES = {
    "BuildPlan": "build",
    "Bundle": "bundle",
    "Checkpoint": "checkpoint",
    "EnginePool": "engines.pool",
    "Method": "method",
    "OnnxEngine": "engines.onnxruntime",
    "Preprocess": "images",
    "ToComBank": "bank",
    "TocomError": "errors",
    "TokenSchedule": "schedule",
    "VitSpec": "spec",
    "write_bundle": "build",
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
