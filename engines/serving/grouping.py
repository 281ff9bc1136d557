"""Requests that came together, those of each variant run as one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tocom_export.errors import ImageError, TocomError

from ..engine import Images, Outputs
from .loaded import Serving

Observe = Callable[[Serving, int, float], None]
"""What ran, on how many images, and for how many seconds."""


@dataclass(frozen=True)
class Answer:
    """What one request gets."""

    outputs: Outputs
    """Each (B, ...), by name."""
    serving: Serving
    """What gave them."""


def run_grouped(
    batches: Sequence[Images],
    servings: Sequence[Serving],
    observe: Observe = lambda serving, images, seconds: None,
) -> list[Answer | TocomError]:
    """An answer, or what is wrong, for each of some requests, in their order.

    Those with the same ``serving`` run as one batch. Where that fails for an image of one, each
    runs by itself, so that the others don't suffer.

    Args:
        batches: normalised images (B, C, H, W) float32 of each request.
        servings: what each is to run on.
        observe: called after each batch that ran well.
    """
    answers: dict[int, Answer | TocomError] = {}
    groups: dict[int, list[int]] = {}
    for index, serving in enumerate(servings):
        groups.setdefault(id(serving), []).append(index)

    def run(members: list[int]) -> None:
        serving, chosen = servings[members[0]], [batches[index] for index in members]
        images = chosen[0] if len(chosen) == 1 else np.concatenate(chosen)
        start = time.perf_counter()
        found = serving.run_all(images)
        observe(serving, len(images), time.perf_counter() - start)
        first = 0
        for index, part in zip(members, chosen, strict=True):
            rows = {name: output[first : first + len(part)] for name, output in found.items()}
            answers[index], first = Answer(rows, serving), first + len(part)

    for members in groups.values():
        try:
            run(members)
        except ImageError:
            for index in members:
                try:
                    run([index])
                except TocomError as error:
                    answers[index] = error
        except TocomError as error:
            answers |= dict.fromkeys(members, error)
    return [answers[index] for index in range(len(batches))]
