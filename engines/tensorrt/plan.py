"""What is written beside a plan: all that loading and refitting it must know."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bake import qkv_name
from tocom_export.compression.method import Method
from tocom_export.compression.schedule import MAX_DEGREE
from tocom_export.errors import InputError, PlanError, brief
from tocom_export.graph.precision import TYPES, Precision
from tocom_export.graph.quantising import scale_name
from tocom_export.io.atomic import replaced
from tocom_export.model.spec import VitSpec

from .library import LIBRARIES, Library

FORMAT = 1
_MAX_BYTES = 10_000_000
Refit = Literal["qkv", "all", "none"]
Batch = tuple[int, int, int]
"""Smallest, optimal and largest batch."""


@dataclass(frozen=True)
class Tensor:
    """One weight that can be refitted."""

    shape: tuple[int, ...]
    dtype: str
    """As NumPy spells it: float32, float16, bfloat16 or int8."""


@dataclass(frozen=True)
class PlanRecord:
    """The JSON beside a plan (``r08.plan.json``)."""

    target: int
    source: int
    scale: float
    compensated: bool
    spec: VitSpec
    method: Method
    precision: Precision
    refit: Refit
    stripped: bool
    """Whether the refittable weights are left out of the plan, which must be refitted to run."""
    batch: Batch
    refittable: Mapping[str, Tensor]
    fixed: str
    """SHA-256 over the weights that can't be refitted: a refit must not need others."""
    library: Library
    version: str
    compute_capability: tuple[int, int] | None
    """Of the GPU it was built on; None without one."""
    gpu: str | None
    flags: tuple[str, ...]
    sha256: str
    """Of the plan."""

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "format": FORMAT,
            **fields,
            "spec": self.spec.to_json(),
            "method": self.method.name,
            "proportional": self.method.proportional,
            "refittable": {n: [list(t.shape), t.dtype] for n, t in self.refittable.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> PlanRecord:
        """The inverse of :meth:`to_json`.

        Raises:
            InputError, LookupError, TypeError, ValueError: it is not what it should be.
        """
        if data["format"] != FORMAT:
            raise PlanError(f"format {data['format']}, this version reads {FORMAT}")
        known = {name: data[name] for name in (f.name for f in dataclasses.fields(cls))}
        for name, kinds in _KINDS.items():
            _require(name, data[name], type(data[name]) in kinds)
        for name, values in _CHOICES.items():
            _require(name, data[name], data[name] in values)
        _require("scale", data["scale"], 0 <= data["scale"] < math.inf)
        known["spec"] = VitSpec.from_json(data["spec"])
        known["method"] = Method(data["method"], data["proportional"])
        known["refittable"] = {}
        for name, (shape, dtype) in data["refittable"].items():
            _require(name, dtype, dtype in _DTYPES)
            known["refittable"][name] = Tensor(_listed(name, shape, int), dtype)
        smallest, optimal, largest = known["batch"] = _listed("batch", data["batch"], int)
        _require("batch", data["batch"], 1 <= smallest <= optimal <= largest)
        if data["compute_capability"] is not None:
            major, minor = _listed("compute_capability", data["compute_capability"], int)
            known["compute_capability"] = (major, minor)
        known["flags"] = _listed("flags", data["flags"], str)
        return cls(**known)


_DTYPES = ("float32", "float16", "bfloat16", "int8")
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("target", "source"), (int,)),
    **dict.fromkeys(("compensated", "proportional", "stripped"), (bool,)),
    **dict.fromkeys(("fixed", "version", "sha256"), (str,)),
    "scale": (int, float),
    "gpu": (str, type(None)),
}
_CHOICES: dict[str, Collection[Any]] = {
    **dict.fromkeys(("target", "source"), range(MAX_DEGREE + 1)),
    "precision": tuple(TYPES),
    "refit": ("qkv", "all", "none"),
    "library": LIBRARIES,
}


def _require(name: str, value: Any, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name}: {value!r}")


def _listed(name: str, values: Any, kind: type) -> tuple[Any, ...]:
    """A JSON list whose values are all of a type."""
    _require(name, values, type(values) is list and all(type(v) is kind for v in values))
    return tuple(values)


def save_plan(plan: Path, content: bytes, record: PlanRecord) -> None:
    """Write a plan and its record, or put them in the place of others.

    Two files can't be renamed at once. So an old record first learns of the one that follows
    it: whichever plan a broken-off write leaves, :func:`open_plan` finds what describes it.

    Raises:
        OutputError: they can't be written.
    """
    file = record_path(plan)
    with suppress(PlanError):  # one that is damaged is of no use to anybody
        _, old = open_plan(plan)
        with replaced(file) as beside:
            beside.write_text(_text({**old.to_json(), "next": record.to_json()}), "utf-8")
    with replaced(plan) as beside:
        beside.write_bytes(content)
    with replaced(file) as beside:
        beside.write_text(_text(record.to_json()), "utf-8")


def _text(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"


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
    except OSError as error:
        raise PlanError(f"{plan}: can't be read: {error.strerror}.") from None
    digest = hashlib.sha256(content).hexdigest()
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large")
        data = json.loads(file.read_text("utf-8"))
        record = PlanRecord.from_json(data)
        if "next" in data and data["next"]["sha256"] == digest:
            record = PlanRecord.from_json(data["next"])
    except FileNotFoundError:
        raise PlanError(
            f"{plan} has no {file.name} beside it, which says what it is; copy both, or build it "
            "with tocom-export build --engine tensorrt."
        ) from None
    except OSError as error:
        raise PlanError(f"{file}: can't be read: {error.strerror}.") from None
    except (
        InputError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise PlanError(f"{file} can't be understood ({brief(error)}); build it again.") from None
    if digest != record.sha256:
        raise PlanError(f"{plan} is damaged, or {file.name} is another plan's; build it again.")
    return content, record


def check_host_code(plan: Path, record: PlanRecord, allowed: bool) -> None:
    """Raise PlanError for a plan that brings code along, unless that may run."""
    if "VERSION_COMPATIBLE" in record.flags and not allowed:
        raise PlanError(
            f"{plan} is version-compatible and brings code along, which runs on the host; where "
            "you trust it, allow that (--host-code, or TensorRtEngine(host_code=True))."
        )


def check_batches(
    plan: Path, record: PlanRecord, batches: Iterable[int], *, least: int = 1
) -> None:
    """Raise InputError for a batch below ``least``, or beyond what the plan takes."""
    for batch in batches:
        if not least <= batch <= record.batch[2]:
            raise InputError(
                f"--batch {batch}: {plan} takes {least} to {record.batch[2]} images; name others, "
                "or build it with another --batch."
            )


def refittable_names(bundle: Bundle, names: Iterable[str], refit: Refit) -> list[str]:
    """Those of a target's stored tensors that a plan is to have marked.

    Args:
        names: of all tensors that the graph reads.
    """
    if refit == "all":
        return list(names)
    marks = set(map(qkv_name, range(bundle.spec.depth))) if refit == "qkv" else set()
    marks |= set(map(scale_name, marks))  # an int8 weight goes with its scales
    return [name for name in names if name in marks]


def fixed_digest(tensors: Mapping[str, npt.NDArray[Any]], refittable: Iterable[str]) -> str:
    """SHA-256 over the names, types and bytes of the stored tensors that aren't refittable."""
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - set(refittable)):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype.name} {tensor.shape}\n".encode())
        digest.update(tensor.view(np.uint8).data if tensor.ndim else tensor.tobytes())
    return digest.hexdigest()
