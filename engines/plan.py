"""What is written beside a plan: all that loading and refitting it must know."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tocom_export.atomic import replaced
from tocom_export.bake import qkv_name
from tocom_export.bundle import Bundle
from tocom_export.engines.nvidia import LIBRARIES, Library
from tocom_export.errors import InputError, PlanError, brief
from tocom_export.method import Method
from tocom_export.precision import TYPES, Precision
from tocom_export.quantize import scale_name
from tocom_export.spec import VitSpec

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
        known["spec"] = VitSpec.from_json(data["spec"])
        known["method"] = Method(data["method"], bool(data["proportional"]))
        known["refittable"] = {
            str(name): Tensor(tuple(map(int, shape)), str(dtype))
            for name, (shape, dtype) in data["refittable"].items()
        }
        smallest, optimal, largest = map(int, data["batch"])
        known["batch"] = (smallest, optimal, largest)
        if data["compute_capability"] is not None:
            major, minor = map(int, data["compute_capability"])
            known["compute_capability"] = (major, minor)
        known["flags"] = tuple(map(str, data["flags"]))
        if data["library"] not in LIBRARIES or data["precision"] not in TYPES:
            raise ValueError("unknown library or precision")
        return cls(**known)


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
