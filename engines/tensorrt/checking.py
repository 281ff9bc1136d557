"""A bundle's plan, run on the GPU before it is relied on."""

from __future__ import annotations

from collections.abc import Callable

from tocom_export.bundle.opening import Bundle, plan_name

from ..refit import exchanged
from ..verify import Comparison, Images, compare_engine
from .engine import TensorRtEngine


def compare_plan(
    bundle: Bundle,
    target: int,
    images: Images,
    reference: Callable[[Images], Images] | None,
    atol: float | None = None,
    *,
    host_code: bool = False,
) -> Comparison:
    """A target's plan on images (B, C, H, W); see :func:`~tocom_export.engines.verify.compare`.

    A stripped plan is refitted in memory, with the bundle's weights.

    Raises:
        PlanError: it can't be opened, or not be refitted with these weights.
        DeviceError: there is no GPU, or too little memory on it.
    """
    plan = bundle.path / plan_name(target)
    engine = TensorRtEngine(plan, host_code=host_code)
    if engine.record.stripped:
        engine.refit(exchanged(engine.record, bundle.tensors(target), plan))
    batch = engine.record.batch[2]
    return compare_engine(engine.run, target, bundle.precision, images, reference, atol, batch)
