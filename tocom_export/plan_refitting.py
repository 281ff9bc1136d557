"""Other weights for a plan, run with them before it is written: what ``refit ENGINE.plan`` calls.

Looks up at ``engines``, as ``refitting.py``.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle.manifest import MANIFEST, WEIGHTS
from .bundle.weights import ModelWeights
from .compression.bank import ToComBank
from .errors import InputError
from .export_checks import Tell
from .io.locking import hear_nothing, hold
from .loading import is_installed
from .refitting import make_oracle, prepare_refit

if TYPE_CHECKING:
    from tocom_export.engines.tensorrt.engine import TensorRtEngine
    from tocom_export.engines.tensorrt.plan import PlanRecord
    from tocom_export.engines.verify import Comparison


@dataclasses.dataclass(frozen=True)
class RefittedPlan:
    """What a refit of a plan made."""

    record: PlanRecord
    weights: ModelWeights
    comparison: Comparison


def refit_plan(
    plan: Path | str,
    out: Path | str | None = None,
    *,
    checkpoint: Path | str | None = None,
    weights_key: str | None = None,
    bank: ToComBank | Path | str | None = None,
    source: int | None = None,
    scale: float | None = None,
    host_code: bool = False,
    verify: bool | None = None,
    wait: bool = True,
    tell: Tell = hear_nothing,
) -> RefittedPlan:
    """Put other weights into a plan, and write it once it has run with them.

    Args:
        out: default: in its place.
        checkpoint: default: the weights of the bundle that the plan lies in.
        host_code: let a version-compatible plan run the code that it brings along.
        verify: compare it with the PyTorch model; default where torch is installed. It is run
            anyway, and must give finite numbers.
        weights_key, bank, source, scale, wait, tell: as :func:`refit` has them.

    Raises:
        PlanError: no plan, or one that can't be refitted, or not with these weights.
        BankError, BusyError, CheckpointError, DegreeError, InputError, OutputError: as `refit`.
        CheckFailed: it differs from the model, or gives what is NaN or Inf; nothing is written.
    """
    from tocom_export.engines.tensorrt.plan import open_plan
    from tocom_export.engines.tensorrt.refit import refit_plan as exchange
    from tocom_export.engines.verify import compare, sample_images

    if verify and not is_installed("torch", "timm"):
        raise InputError("`verify` needs torch and timm: pip install 'tocom-export[torch]'.")
    plan = Path(plan)
    bundle = plan.resolve().parent
    with hold(bundle if (bundle / MANIFEST).exists() else plan.resolve(), wait=wait, tell=tell):
        _, record = open_plan(plan)
        own = plan.with_name(WEIGHTS)
        if checkpoint is None and not own.exists():
            raise InputError(
                f"`checkpoint`: there is no {own} to take the weights from; name a file."
            )
        new, variants = prepare_refit(
            record, [record.variant], own, checkpoint=checkpoint, weights_key=weights_key,
            bank=bank, source=source, scale=scale, tell=tell,
        )  # fmt: skip
        (variant,) = variants.values()
        checks: list[Comparison] = []

        def check(opened: TensorRtEngine) -> None:
            oracle = make_oracle(record, new) if verify is not False else None
            found = compare(
                opened.run_all, sample_images(record.spec), oracle and partial(oracle, variant),
                plan.name, variant.name, record.precision, batch=opened.largest or 16,
                outputs=record.outputs,
            )  # fmt: skip
            found.require("the PyTorch model", "it was left as it was.")
            checks.append(found)

        changed = exchange(plan, variant, new, Path(out or plan), check, host_code=host_code)
    if changed.refit == "none":
        tell(f"{changed.backend} {changed.version} saved a plan that can't be refitted again.")
    return RefittedPlan(changed, new, checks[0])
