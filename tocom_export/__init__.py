"""One trained Vision Transformer, exported at many costs without retraining.

The names below are imported when they are first used, so that importing the package is cheap.
docs/api.md tells what each is for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from tocom_export.engines.engine import Engine as Engine
    from tocom_export.engines.serving.policy import Load as Load
    from tocom_export.engines.serving.pool import EnginePool as EnginePool
    from tocom_export.engines.serving.steering import Steering as Steering
    from tocom_export.engines.verify import verify as verify

    from .bundle.opening import Bundle as Bundle
    from .compression.bank import ToComBank as ToComBank
    from .compression.checkpoint import Checkpoint as Checkpoint
    from .compression.method import Method as Method
    from .compression.schedule import Schedule as Schedule
    from .errors import TocomError as TocomError
    from .exporting import export as export
    from .model.preprocess import Preprocess as Preprocess
    from .model.spec import VitSpec as VitSpec
    from .refitting import refit as refit
    from .variant import Variant as Variant

_HOMES = {
    "Bundle": "bundle.opening",
    "Checkpoint": "compression.checkpoint",
    "Engine": "engines.engine",
    "EnginePool": "engines.serving.pool",
    "Load": "engines.serving.policy",
    "Method": "compression.method",
    "Preprocess": "model.preprocess",
    "Schedule": "compression.schedule",
    "Steering": "engines.serving.steering",
    "ToComBank": "compression.bank",
    "TocomError": "errors",
    "Variant": "variant",
    "VitSpec": "model.spec",
    "export": "exporting",
    "refit": "refitting",
    "verify": "engines.verify",
}
"""Public name → where it lives. Everything that is public is here, or is ``load``."""


def load(path: Any, *, hashes: bool = False) -> Bundle:
    """Open a bundle; see :meth:`Bundle.open`."""
    from .bundle.opening import Bundle

    return Bundle.open(path, hashes=hashes)


__all__ = ["__version__", "load", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tocom_export' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"tocom_export.{_HOMES[name]}"), name)
    globals()[name] = found  # so that it is looked up once
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
