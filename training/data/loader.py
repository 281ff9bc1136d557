"""Batches from a set of images, made by worker processes, without the unreadable ones."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tocom_export.errors import DataError

from .images import Unreadable

Item = tuple[Tensor | None, int, list[int]]
"""An image (C, H, W) or None, its label, and the indices that couldn't be read on the way."""


def load(
    items: Dataset[Item], batches: Iterable[list[int]], workers: int, unreadable: Unreadable
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) and labels (B,) of each batch of indices; shorter without a None.

    Raises:
        DataError: too many images are unreadable, or one can't be used at all.
    """
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_outlast,
        pin_memory=torch.cuda.is_initialized(),  # else it would open a context of its own
    )
    try:
        for images, labels, skipped in loader:
            unreadable.add(skipped)  # counted here, since each worker would count on its own
            if len(labels):
                yield images, labels
    except DataError as error:  # from a worker it comes back with the worker's traceback
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.rpartition("DataError: ")[2]) from None


def _outlast(_: int) -> None:
    """Let SIGTERM end a worker only where the main process sends it.

    Whoever stops a run may send it to all of its processes, but the main one still wants the
    batches of the step it is at.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return  # neither macOS nor Windows tells who sent a signal

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


def _collate(items: list[Item]) -> tuple[Tensor, Tensor, list[int]]:
    """Images (B, C, H, W), labels (B,), and the indices that couldn't be read."""
    skipped = [index for *_, indices in items for index in indices]
    pairs = [(image, label) for image, label, _ in items if image is not None]
    if not pairs:
        return torch.empty(0), torch.empty(0, dtype=torch.int64), skipped
    images, labels = default_collate(pairs)
    return images, labels, skipped
