"""Running out of memory, said in a way that helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tocom_export.errors import InputError


@contextmanager
def explained(used: str, advice: str) -> Iterator[None]:
    """Say what to lower where the memory doesn't suffice.

    Args:
        used: the options that it wasn't enough for.
        advice: what to do about it.

    Raises:
        InputError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:  # the CPU's allocator has no class of its own
        known = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not known:
            raise
        raise InputError(f"out of memory with {used}; {advice}.") from error
