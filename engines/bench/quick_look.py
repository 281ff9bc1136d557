"""How fast the variants of a bundle are here, roughly: for the end of a build."""

from __future__ import annotations

from functools import partial

from tocom_export.bundle.opening import Bundle

from ..engine import Backend
from ..verify import sample_images
from .timing import time_engines


def take_quick_look(bundle: Bundle, backend: Backend) -> dict[str, float]:
    """Variant → milliseconds of its fastest run of one image, all variants in turns.

    Of ten runs, fewer where a variant has taken a fifth of a second by then. On the processor, with
    what the backend takes by itself; ``bench`` measures.
    """
    image = sample_images(bundle.spec, 1)
    engines = {name: bundle.engine(name, backend=backend, batch=1) for name in bundle.variants}
    calls = {name: partial(engine.run, image) for name, engine in engines.items()}
    return {name: found.min_ms for name, found in time_engines(calls, 1, 0, at_most=0.2).items()}
