"""Running out of memory, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tocom_export.errors import InputError


@contextmanager
def explain_out_of_memory(used: str, advice: str) -> Iterator[None]:
    """Raise InputError in place of torch's error.

    Args:
        used: the parameters that the memory wasn't enough for.
        advice: what to do about it.
    """
    try:
        yield
    except RuntimeError as error:  # the CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise InputError(f"out of memory with {used}; {advice}.") from error
