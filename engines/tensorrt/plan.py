"""What is written beside a plan: all that loading and refitting it must know."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.method import Method
from tocom_export.errors import InputError, PlanError
from tocom_export.graph.precision import Precision
from tocom_export.graph.quantising import scale_name
from tocom_export.io.atomic import replace_file
from tocom_export.io.json_codec import LATER, decode, encode, format_json, read_json
from tocom_export.io.locking import hold
from tocom_export.io.tensors import Tensors
from tocom_export.model.outputs import Form, OutputName, list_forms
from tocom_export.model.spec import VitSpec
from tocom_export.model.weight_names import qkv_weights
from tocom_export.variant import Variant

from .library import Library

FORMAT = 2
_LARGEST = 10_000_000
Refit = Literal["qkv", "all", "none", "identical"]
Batch = tuple[int, int, int]
"""Smallest, optimal and largest batch."""


@dataclass(frozen=True)
class Tensor:
    """One weight that can be refitted."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "float16", "bfloat16", "int8", "int64"]


@dataclass(frozen=True)
class PlanRecord:
    """The JSON beside a plan (``r08.plan.json``)."""

    variant: Variant
    spec: VitSpec
    method: Method
    precision: Precision
    refit: Refit
    stripped: bool
    """Whether the refittable weights are left out of the plan, which must be refitted to run."""
    batch: Batch
    refittable: Mapping[str, Tensor]
    """What can be exchanged; of an identical plan, what it takes back before it runs."""
    fixed: str
    """SHA-256 over the weights that a refit must not change: of an identical plan, over all."""
    backend: Library
    version: str
    """Of the library."""
    compute_capability: tuple[int, int] | None
    """Of the GPU it was built on; None without one."""
    gpu: str | None
    flags: tuple[str, ...]
    sha256: str
    """Of the plan."""
    outputs: tuple[OutputName, ...] = field(default=("logits",), metadata=LATER)
    unit_embedding: bool = field(default=False, metadata=LATER)

    @property
    def forms(self) -> dict[str, Form]:
        """Shape and type of each output."""
        return list_forms(self.spec, self.outputs)

    def __post_init__(self) -> None:
        smallest, optimal, largest = self.batch
        if not 1 <= smallest <= optimal <= largest:
            raise InputError(f"batch: {self.batch} is no smallest, optimal and largest batch.")
        if self.refit == "identical" and not self.stripped:
            raise InputError("stripped: a plan of refit identical has no weights of its own.")
        self.variant.check(self.spec)


def save_plan(plan: Path, content: bytes, record: PlanRecord) -> None:
    """Write a plan and its record, or put them in the place of others.

    Two files can't be renamed at once. So an old record first learns of the one that follows
    it: whichever plan a broken-off write leaves, :func:`open_plan` finds what describes it.

    Raises:
        OutputError: one of the two can't be written; the old ones are then what they were.
    """

    def write_record(present: PlanRecord, **later: Any) -> None:
        with replace_file(record_path(plan)) as beside:
            data = {"format": FORMAT, **encode(present), **later}
            beside.write_text(format_json(data), "utf-8")

    with hold(plan):  # two writers would tell of each other's plans
        with suppress(PlanError):  # one that is damaged is of no use to anybody
            _, old = open_plan(plan)
            write_record(old, next=encode(record))
        with replace_file(plan) as beside:
            beside.write_bytes(content)
        write_record(record)


def check_plan(bundle: Bundle, name: str, record: PlanRecord) -> None:
    """Raise PlanError for a plan of another variant; its source and scale may be other ones."""
    ours, theirs = bundle.variant(name), record.variant
    pairs = [
        ("variant", (ours.name, ours.degrees), (theirs.name, theirs.degrees)),
        ("model", bundle.spec, record.spec),
        ("method", bundle.method, record.method),
        ("precision", bundle.precision, record.precision),
        (
            "kind of output",
            (bundle.outputs, bundle.unit_embedding),
            (record.outputs, record.unit_embedding),
        ),
    ]
    if differing := [what for what, our, their in pairs if our != their]:
        raise PlanError(
            f"{bundle.plan(name)} is of another {differing[0]} than the bundle's {ours.name}: it "
            f"is {theirs.name} of degree {theirs.label}, {record.spec.model}; build it again."
        )


def record_path(plan: Path) -> Path:
    """``r08.plan`` → ``r08.plan.json``."""
    return plan.with_name(plan.name + ".json")


def open_plan(plan: Path) -> tuple[bytes, PlanRecord]:
    """A plan's content and its record, held against each other.

    Raises:
        PlanError: one of the two is missing, damaged, or not of the other.
    """
    file = record_path(plan)
    try:
        content = plan.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        data = read_json(file, _LARGEST)
        if not isinstance(data, dict):
            raise InputError("no JSON object.")
        found, later = data.pop("format", None), data.pop("next", None)
        if found != FORMAT:
            raise InputError(f"format {found}, this version reads {FORMAT}.")
        record = decode(PlanRecord, data)
        if later is not None and (following := decode(PlanRecord, later)).sha256 == digest:
            record = following
    except OSError as error:
        if isinstance(error, FileNotFoundError) and plan.exists():
            raise PlanError(
                f"{plan} has no {file.name} beside it, which says what it is; copy both, or build "
                "it with tocom-export build --backend tensorrt."
            ) from None
        raise PlanError(f"{error.filename or plan}: can't be read: {error.strerror}.") from None
    except InputError as error:
        reason = str(error).rstrip(".")
        raise PlanError(f"{file} can't be understood ({reason}); build it again.") from None
    if digest != record.sha256:
        raise PlanError(f"{plan} is damaged, or {file.name} is another plan's; build it again.")
    return content, record


def check_host_code(plan: Path, record: PlanRecord, allowed: bool) -> None:
    """Raise PlanError for a plan that brings code along, unless that may run."""
    if "VERSION_COMPATIBLE" in record.flags and not allowed:
        raise PlanError(
            f"{plan} is version-compatible and brings code along, which runs on the host; where "
            "you trust it, allow that with `host_code`."
        )


def check_batches(
    plan: Path, record: PlanRecord, batches: Iterable[int], *, least: int = 1
) -> None:
    """Raise InputError for a batch below ``least``, or beyond what the plan takes."""
    if wrong := [batch for batch in batches if not least <= batch <= record.batch[2]]:
        raise InputError(
            f"`batch` {wrong[0]}: {plan} takes {least} to {record.batch[2]} images; choose others, "
            "or build it for others."
        )


def list_marked(bundle: Bundle, names: Iterable[str], refit: Refit) -> list[str]:
    """Of the tensors that a variant's graph reads, those that a plan is to have marked."""
    qkv = set(qkv_weights(bundle.spec))
    if refit == "all":
        return list(filter(bundle.reads, names))
    marks = qkv | set(map(scale_name, qkv)) if refit == "qkv" else set()
    return [name for name in names if name in marks]  # an int8 weight goes with its scales


def select_refittable(record: PlanRecord, weights: Tensors, plan: Path) -> Tensors:
    """Of all tensors of a variant, those that its plan lets go of, or takes back.

    Raises:
        PlanError: they are of another form, or others would have to change, too.
    """
    if record.refit == "identical":
        return weights  # an engine itself wants all of them, to hold them against its own
    check_weights(record, weights)
    if digest_fixed(weights, record.refittable) != record.fixed:
        raise PlanError(
            f"the weights differ from those of {plan} in more than it lets go of (refit: "
            f"{record.refit}); build it with --refit all."
        )
    return {name: weights[name] for name in record.refittable}


def check_weights(record: PlanRecord, weights: Tensors) -> None:
    """Raise PlanError unless ``weights`` are what a refit of the plan needs, shape and dtype.

    An identical plan needs all tensors, and to the last bit those that it was built with.
    """
    if not record.refittable:
        raise PlanError(
            "the plan was built with --refit none; build it with --refit qkv, or --refit all to "
            "exchange every weight."
        )
    if missing := [name for name in record.refittable if name not in weights]:
        raise PlanError(f"weights for {missing[0]} are missing ({len(missing)} such tensors).")
    for name, expected in record.refittable.items():
        given = weights[name]
        if (given.shape, given.dtype.name) != (expected.shape, expected.dtype):
            raise PlanError(
                f"{name} is {given.dtype.name} of shape {given.shape}; the plan takes "
                f"{expected.dtype} of shape {expected.shape}."
            )
    if record.refit == "identical" and digest_fixed(weights, ()) != record.fixed:
        raise PlanError(
            "the plan takes back the weights that it was built with alone (refit: identical), and "
            "these are others; build it again, with --refit qkv or all to exchange them later."
        )


def digest_fixed(tensors: Tensors, refittable: Iterable[str]) -> str:
    """SHA-256 over the names, types and bytes of the stored tensors that aren't refittable."""
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - set(refittable)):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype.name} {tensor.shape}\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
