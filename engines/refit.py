"""Other weights into an engine's files: another model's, another source's, another scale's."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tocom_export.bundle.file_hashes import record_files
from tocom_export.bundle.opening import WEIGHTS, Bundle, Refitted, weights_name
from tocom_export.compression.bake import bake
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.errors import CheckpointError, PlanError
from tocom_export.graph.precision import Precision
from tocom_export.graph.quantising import quantized_layers, stored_form
from tocom_export.io.atomic import link_or_copy, replaced
from tocom_export.io.tensors import read_header
from tocom_export.model.catalogue import REFERENCE, REFERENCE_CHECKPOINT
from tocom_export.model.spec import VitSpec

from .tensorrt.engine import TensorRtEngine
from .tensorrt.plan import PlanRecord, fixed_digest, open_plan, save_plan
from .tensorrt.refitter import check_weights


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
        return self.shared(spec, precision) | self.own(spec, target, precision)

    def shared(self, spec: VitSpec, precision: Precision) -> dict[str, npt.NDArray[Any]]:
        """The checkpoint's tensors, in that form; raises as :meth:`at` does."""
        found = self.checkpoint.fit(spec)
        if found != spec:
            raise CheckpointError(
                f"{self.checkpoint.file} has {found.classes} classes, the engine {spec.classes}; "
                "build a bundle of it."
            )
        tensors = {name: self.checkpoint.tensors[name] for name in spec.weights()}
        return stored_form(tensors, precision, quantized_layers(spec))

    def own(self, spec: VitSpec, target: int, precision: Precision) -> dict[str, npt.NDArray[Any]]:
        """Those that differ at a target, in that form; none where nothing is compensated."""
        if self.bank is None or target == self.source:
            return {}
        tensors = self.checkpoint.tensors
        baked = bake(tensors, spec, self.bank, self.source, target, self.scale)
        return stored_form(baked, precision, quantized_layers(spec))


def base_checkpoint(own: Checkpoint, spec: VitSpec, precision: Precision) -> Checkpoint:
    """The checkpoint that a bundle was made of, as far as it is at hand: for a refit without one.

    A bundle's own weights are rounded to its precision. Those of the model inside the package
    are the rounded ones of a file that is always there.

    Args:
        own: the bundle's shared weights.
    """
    if precision == "fp32" or spec.model != REFERENCE:
        return own
    shipped = Checkpoint.open(REFERENCE_CHECKPOINT)
    tensors = {name: shipped.tensors[name] for name in spec.weights() if name in shipped.tensors}
    rounded = stored_form(tensors, precision, quantized_layers(spec))
    same = rounded.keys() == own.tensors.keys() and all(
        np.array_equal(tensor, own.tensors[name]) for name, tensor in rounded.items()
    )
    return shipped if same else own


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
        host_code: see :class:`~tocom_export.engines.tensorrt.engine.TensorRtEngine`.
        check: called with an engine of what is about to be written; what it raises leaves the
            files as they were.

    Raises:
        PlanError: the plan can't be refitted, or not with these weights.
        CheckpointError: the checkpoint is of another model.
    """
    _, record = open_plan(plan)
    weights = exchanged(record, new.at(record.spec, record.target, record.precision), plan)
    engine = TensorRtEngine(plan, host_code=host_code)
    engine.refit(weights)
    content = engine.serialize()
    del engine  # the GPU may not have memory for two
    changed = dataclasses.replace(
        record,
        source=new.source,
        scale=new.scale,
        compensated=new.bank is not None and record.target != new.source,
        stripped=False,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    saved = TensorRtEngine(out, host_code=host_code, unsaved=(content, changed))
    if check:
        check(saved)
    if not saved.refittable:
        changed = dataclasses.replace(changed, refit="none", refittable={})
    save_plan(out, content, changed)
    return changed


def exchanged(
    record: PlanRecord, weights: Mapping[str, npt.NDArray[Any]], plan: Path
) -> dict[str, npt.NDArray[Any]]:
    """Of a target's weights, those that its plan lets go of.

    Raises:
        PlanError: they are of another form, or others differ from the plan's.
    """
    check_weights(record, weights)
    if fixed_digest(weights, record.refittable) != record.fixed:
        raise PlanError(
            f"the weights differ from those of {plan} in more than it lets go of (--refit "
            f"{record.refit}); build it with --refit all."
        )
    return {name: weights[name] for name in record.refittable}


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
    del stored  # mapped from the file that is to be replaced, which Windows wouldn't allow
    compensated = new.bank is not None and target != new.source
    refitted = Refitted(new.source, new.scale, compensated)
    with TemporaryDirectory(prefix=f".{name}.", dir=bundle.path) as folder:
        beside = Path(folder)
        save_file({key: weights[key] for key in before}, beside / name, metadata)
        after, _ = read_header(beside / name)
        if any(before[key].offset != after[key].offset for key in before):
            raise PlanError(f"{name} can't be rewritten in its own form; build the bundle again.")
        changed = dataclasses.replace(
            bundle,
            files={**bundle.files, **record_files(beside, [name])},
            refitted={**bundle.refitted, target: refitted},
            accuracy={t: percent for t, percent in bundle.accuracy.items() if t != target},
        )
        if check:  # on the new weights among links to the bundle's other files
            for other in (WEIGHTS, bundle.graph(target).name):
                link_or_copy(bundle.path / other, beside / other)
            check(dataclasses.replace(changed, path=beside))
        bundle.save_manifest(later=changed)
        with replaced(bundle.path / name) as file:
            (beside / name).replace(file)
    changed.save_manifest()
    return changed
