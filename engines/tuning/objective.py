"""How far a variant's outputs are from those of the model without token reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tocom_export.study.divergence import find_distance, find_divergence

from ..engine import Images, Logits

Run = Callable[[Images], Logits]
_FIRST = 4
"""A candidate that is much worse than the best on this part of the images is given up."""
_HOPELESS = 1.5
"""How much worse."""


class Objective:
    """What a candidate is judged by: the mean distance of its outputs from those wanted.

    Args:
        images: normalised (N, C, H, W).
        wanted: the uncompressed model's outputs (N, outputs).
        batch: images in a run.
        classes: whether outputs are logits of classes, else features.
        labels: (N,) class of each image; the share of wrong ones is then what is judged.
    """

    def __init__(
        self,
        images: Images,
        wanted: Logits,
        batch: int,
        classes: bool,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.images, self._wanted, self._batch = images, wanted, batch
        self._classes = classes
        self._labels = None if labels is None else np.asarray(labels)

    def judge(self, run: Run, best: float = np.inf) -> float:
        """The mean over all images; over a part of them where that is hopeless already.

        Args:
            best: the best so far.
        """
        part = max(self._batch, len(self.images) // _FIRST)
        found: list[npt.NDArray[np.float64]] = []
        for start, stop in self._list_batches():
            found.append(self._judge(run(self.images[start:stop]), start, stop))
            if start < part <= stop and np.concatenate(found).mean() > _HOPELESS * best:
                break
        return float(np.concatenate(found).mean())

    def _judge(self, outputs: Logits, start: int, stop: int) -> npt.NDArray[np.float64]:
        if self._labels is not None:
            wrong: npt.NDArray[np.bool_] = outputs.argmax(axis=1) != self._labels[start:stop]
            return wrong.astype(np.float64)
        measure = find_divergence if self._classes else find_distance
        return measure(outputs, self._wanted[start:stop])

    def _list_batches(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self.images), self._batch):
            yield start, min(start + self._batch, len(self.images))
