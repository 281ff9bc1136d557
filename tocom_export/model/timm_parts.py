"""Names of timm's modules, without importing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedModelError
from .spec import Activation

Need = Callable[[bool, str], None]
"""Refuses a model: unless the condition holds, it has a part that can't be expressed."""

_WORDS = {
    "VisionTransformerSAM": "windows, relative positions",
    "HybridEmbed": "convolutions",
    "NaFlexVit": "images of varying size",
}
"""What some classes of timm have that a spec can't express; the names of others say it."""

_ACTIVATIONS: dict[str, Activation] = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}


def kind(module: Any) -> str:
    """The name of a module's class."""
    return type(module).__name__


def is_there(module: Any) -> bool:
    """Whether an optional module does something."""
    return kind(module) not in ("Identity", "NoneType")


def explain(module: Any) -> str:
    """The name of a class that isn't supported, and what it stands for."""
    words = _WORDS.get(kind(module))
    return f"{kind(module)} ({words})" if words else kind(module)


def read_activation(model: str, module: Any) -> Activation:
    """The activation that a module is.

    Raises:
        UnsupportedModelError: another one.
    """
    if kind(module) == "GELU" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    if kind(module) not in _ACTIVATIONS:
        raise UnsupportedModelError(model, f"activation {kind(module)}")
    return _ACTIVATIONS[kind(module)]
