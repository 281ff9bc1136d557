"""The weights that a bundle's variants share, as a backend reads them."""

from __future__ import annotations

from tocom_export.bundle.manifest import WEIGHTS
from tocom_export.bundle.opening import Bundle
from tocom_export.io.tensors import Tensors, map_tensors, read_header


def map_plain(bundle: Bundle) -> Tensors:
    """The checkpoint's own weights, in place of compensated ones; mapped, not read."""
    return map_tensors(read_header(bundle.path / WEIGHTS)[0])
