"""Other weights into an engine's files: another model's, another source's, another scale's."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tocom_export.atomic import replaced
from tocom_export.bake import bake
from tocom_export.bank import ToComBank
from tocom_export.bundle import WEIGHTS, Bundle, Refitted, record_files, weights_name
from tocom_export.checkpoint import Checkpoint
from tocom_export.engines.plan import PlanRecord, fixed_digest, open_plan, save_plan
from tocom_export.engines.refitter import check_weights
from tocom_export.engines.tensorrt import TensorRtEngine
from tocom_export.errors import CheckpointError, PlanError
from tocom_export.precision import Precision
from tocom_export.quantize import quantized_layers, stored_form
from tocom_export.spec import VitSpec
from tocom_export.store import read_header


@dataclasses.dataclass(frozen=True)
class NewWeights:
    """What an engine is to be refitted with; the checkpoint is checked against its spec."""

    checkpoint: Checkpoint
    bank: ToComBank | None
    """None for no compensation."""
    source: int
    scale: float

    def at(self, spec: VitSpec, target: int, precision: Precision) -> dict[str, npt.NDArray[Any]]:
        """All tensors of a target as a bundle of that precision stores them, absolute values.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        found = self.checkpoint.fit(spec)
        if found != spec:
            raise CheckpointError(
                f"{self.checkpoint.file} has {found.classes} classes, the engine {spec.classes}; "
                "build a bundle of it."
            )
        tensors = {name: self.checkpoint.tensors[name] for name in spec.weights()}
        if self.bank is not None and target != self.source:
            tensors |= bake(tensors, spec, self.bank, self.source, target, self.scale)
        return stored_form(tensors, precision, quantized_layers(spec))


def refit_plan(
    plan: Path,
    new: NewWeights,
    out: Path,
    check: Callable[[TensorRtEngine], None] | None = None,
    *,
    host_code: bool = False,
) -> PlanRecord:
    """A plan with other weights, written to ``out`` once it is right.

    The record says ``refit: none`` where the library saved a plan that can't be refitted again.

    Args:
        out: may be ``plan`` itself.
        host_code: see :class:`~tocom_export.engines.tensorrt.TensorRtEngine`.
        check: called with the refitted engine before anything is written; what it raises leaves
            the files as they were.

    Raises:
        PlanError: the plan can't be refitted, or not with these weights.
        CheckpointError: the checkpoint is of another model.
    """
    _, record = open_plan(plan)
    weights = new.at(record.spec, record.target, record.precision)
    check_weights(record, weights)
    if fixed_digest(weights, record.refittable) != record.fixed:
        raise PlanError(
            f"{new.checkpoint.file} differs from {plan} in more than the weights that the plan "
            f"lets go of (--refit {record.refit}); build it with --refit all."
        )
    engine = TensorRtEngine(plan, host_code=host_code)
    engine.refit({name: weights[name] for name in record.refittable})
    if check:
        check(engine)
    content = engine.serialize()
    changed = dataclasses.replace(
        record,
        source=new.source,
        scale=new.scale,
        compensated=new.bank is not None and record.target != new.source,
        stripped=False,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    if not engine.reopened(content).refittable:  # TensorRT before 10.14 has no way to ask for it
        changed = dataclasses.replace(changed, refit="none", refittable={})
    save_plan(out, content, changed)
    return changed


def refit_graph(
    bundle: Bundle,
    target: int,
    new: NewWeights,
    check: Callable[[Bundle], None] | None = None,
) -> Bundle:
    """Other weights for one ONNX engine of a bundle: its own weights file, and the manifest.

    The graph is left as it is, so every tensor lies where it lay. What the engine shares with
    the bundle's others must be what it was.

    Args:
        check: called with the bundle as it will be, in a folder of its own that has this target
            alone; when it raises, nothing is changed.

    Raises:
        PlanError: the target has no weights of its own, or others would have to change.
        CheckpointError: the checkpoint is of another model.
    """
    name = weights_name(target)
    if name not in bundle.files:
        raise PlanError(
            f"{bundle.graph(target)} has no weights of its own: it reads {WEIGHTS}, as the "
            "bundle's other engines do; build a bundle of the new ones."
        )
    weights = new.at(bundle.spec, target, bundle.precision)
    before, metadata = read_header(bundle.path / name)
    stored = bundle.tensors(target)
    for key, tensor in weights.items():
        if key not in before and not np.array_equal(tensor, stored[key]):
            raise PlanError(
                f"{new.checkpoint.file} has another {key} than the bundle, whose engines all read "
                f"it from {WEIGHTS}; build a bundle of it."
            )
    with TemporaryDirectory(prefix=f".{name}.", dir=bundle.path) as folder:
        beside = Path(folder)
        save_file({key: weights[key] for key in before}, beside / name, metadata)
        after, _ = read_header(beside / name)
        if any(before[key].offset != after[key].offset for key in before):
            raise PlanError(f"{name} can't be rewritten in its own form; build the bundle again.")
        changed = dataclasses.replace(
            bundle,
            files={**bundle.files, **record_files(beside, [name])},
            refitted={**bundle.refitted, target: Refitted(new.source, new.scale)},
        )
        if check:  # on the new weights among links to the bundle's other files
            for other in (WEIGHTS, bundle.graph(target).name):
                _link(bundle.path / other, beside / other)
            check(dataclasses.replace(changed, path=beside))
        with replaced(bundle.path / name) as file:
            (beside / name).replace(file)
    changed.save_manifest()
    return changed


def _link(file: Path, to: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
