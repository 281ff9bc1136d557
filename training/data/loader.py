"""Batches from a set of images, read by worker processes, without the unreadable images."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tocom_export.errors import DataError

from .images import LabelledImages, UnreadableImage
from .seeding import seed_cpu
from .transforms import Transform

Key = tuple[int, ...]
"""An image's index, and before it the numbers that its augmentation is drawn from, if any."""
Item = tuple[Tensor | None, int, dict[int, str]]
"""An image (C, H, W) or None, its label, and of those that couldn't be read on the way why."""
Warn = Callable[[str], None]
"""Called with a line about something that a run goes on without."""


class Loader:
    """Loads images of a set; names, counts and leaves out those that can't be read.

    ``classes`` and ``name`` are those of the images, ``unreadable`` holds the indices of the
    images that couldn't be read so far.

    Args:
        replace: take the next image for one that can't be read; else its batch is shorter.
        workers: processes that read and transform; 0 for this one.
        warn: called once for each image that can't be read.
    """

    def __init__(
        self,
        images: LabelledImages,
        transform: Transform,
        *,
        replace: bool = False,
        workers: int = 0,
        warn: Warn | None = None,
    ) -> None:
        self.classes, self.name = images.classes, images.name
        self.unreadable: set[int] = set()
        # One in a hundred; a small set may hold a few more, but something must be left of it.
        self._limit = min(max(10, len(images) // 100), max(len(images) - 1, 0))
        self._items = _Items(images, transform, self._limit if replace else 0)
        self._images, self._workers, self._warn = images, workers, warn

    def load(self, batches: Iterable[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) float32 and labels (B,) int64 of each batch.

        Raises:
            DataError: too many images are unreadable, or one can't be used at all.
        """
        loader: DataLoader[Any] = DataLoader(
            self._items,
            batch_sampler=batches,
            num_workers=self._workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_main,
            pin_memory=torch.cuda.is_initialized(),  # else it would open a context of its own
        )
        try:
            for images, labels, skipped in loader:
                self._count(skipped)  # here, since each worker would count on its own
                if len(labels):
                    yield images, labels
        except DataError as error:  # from a worker it comes back with the worker's traceback
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.rpartition("DataError: ")[2]) from None

    def _count(self, skipped: Mapping[int, str]) -> None:
        """Name those that are new; raise DataError once there are too many."""
        for index, why in skipped.items():
            if index not in self.unreadable and self._warn:
                self._warn(f"{why.rstrip('.')}; skipped")
            self.unreadable.add(index)
        if len(self.unreadable) > self._limit:
            example = self._images.where(min(self.unreadable))
            raise DataError(
                f"{self.name}: too many unreadable images: {len(self.unreadable)} of "
                f"{len(self._images)}, {example} for one; at most {self._limit} are skipped. "
                "Repair or remove them."
            )


class _Items(Dataset[Item]):
    """What a worker process has: images and their transform, nothing that can't be pickled."""

    def __init__(self, images: LabelledImages, transform: Transform, replacements: int) -> None:
        self.images, self.transform, self.replacements = images, transform, replacements

    def __getitem__(self, key: Key) -> Item:
        *draws, index = key
        skipped: dict[int, str] = {}
        while len(skipped) <= self.replacements:
            found = (index + len(skipped)) % len(self.images)
            try:
                image, label = self.images.read(found)
            except UnreadableImage as error:
                skipped[found] = str(error)
                continue
            if draws:
                # The missing image's index: its replacement is drawn a second time in this epoch.
                seed_cpu(*key)
            return self.transform(image), label, skipped
        return None, -1, skipped


def _leave_signals_to_main(_: int) -> None:
    """Let SIGTERM end a worker only where the main process sends it, and Ctrl-C not at all.

    Whoever stops a run may send either to all of its processes, but the main one still wants the
    batches of the step it is at.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return  # neither macOS nor Windows tells who sent a signal

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


def _collate(items: list[Item]) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Images (B, C, H, W), labels (B,), and those that couldn't be read."""
    skipped = {index: why for *_, unreadable in items for index, why in unreadable.items()}
    pairs = [(image, label) for image, label, _ in items if image is not None]
    if not pairs:
        return torch.empty(0), torch.empty(0, dtype=torch.int64), skipped
    images, labels = default_collate(pairs)
    return images, labels, skipped
