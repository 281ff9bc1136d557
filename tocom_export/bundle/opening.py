"""The directory that is deployed: a manifest, graphs, and the weights they share."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..compression.checkpoint import map_tensors
from ..compression.method import Method
from ..compression.schedule import MAX_DEGREE, TokenSchedule
from ..errors import BundleError, DegreeError, InputError, brief
from ..graph.precision import TYPES, Precision
from ..io.atomic import replaced
from ..io.tensors import read_header
from ..model.preprocess import Preprocess
from ..model.spec import VitSpec
from .file_hashes import FileRecord, holds, record_files

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FORMAT = 1
_MAX_MANIFEST = 10_000_000  # bytes


def graph_name(target: int) -> str:
    """File name of a target's graph."""
    return f"r{target:02d}.onnx"


def weights_name(target: int) -> str:
    """File name of the tensors that differ at a target."""
    return f"r{target:02d}.safetensors"


def plan_name(target: int) -> str:
    """File name of a target's plan; what it is stands in ``<name>.json``."""
    return f"r{target:02d}.plan"


@dataclass(frozen=True)
class Refitted:
    """What a target's weights are, where they are not what the bundle was built with."""

    source: int
    scale: float
    compensated: bool
    """Whether a bank was baked in, and the source is another degree."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; see docs/architecture.md for the directory's layout."""

    path: Path
    spec: VitSpec
    method: Method
    source: int
    scale: float
    compensated: bool
    """Whether a bank was baked in."""
    precision: Precision
    targets: Mapping[int, tuple[int, ...]]
    """Target degree → tokens left after each layer."""
    files: Mapping[str, FileRecord]
    preprocess: Preprocess
    classes: tuple[str, ...] | None
    tools: Mapping[str, str]
    """Version of each tool that wrote it."""
    plans: tuple[int, ...] = ()
    """Targets that have a TensorRT plan, which lies with its own record beside the graph."""
    refitted: Mapping[int, Refitted] = field(default_factory=dict)
    """Targets whose weights were exchanged since the bundle was built."""
    accuracy: Mapping[int, float] = field(default_factory=dict)
    """Top-1 accuracy in percent of the targets where it was measured (``evaluate --record``)."""

    @classmethod
    def open(cls, path: Path | str, *, hashes: bool = False) -> Bundle:
        """Open a bundle and check that its files are there, of the right size.

        Args:
            hashes: also compare every file's SHA-256 with the manifest's.

        Raises:
            BundleError: no bundle, or a file is missing or changed.
        """
        path = Path(path)
        file = path / MANIFEST
        try:
            if file.stat().st_size > _MAX_MANIFEST:
                raise BundleError(f"{file} is too large to be a manifest.")
            data = json.loads(file.read_text("utf-8"))
            bundle = cls._from_json(path, data)
            if "next" in data:  # a refit was broken off: before its file was renamed, or after
                later = cls._from_json(path, data["next"])
                bundle = later if holds(path, later.files, bundle.files) else bundle
        except FileNotFoundError:
            what = f"it has no {MANIFEST}" if path.exists() else "there is no such folder"
            raise BundleError(f"{path} is not a bundle: {what}.") from None
        except NotADirectoryError:
            raise BundleError(f"{path} is not a bundle: it is a file.") from None
        except OSError as error:
            raise BundleError(f"{file}: can't be read: {error.strerror}.") from None
        except BundleError:
            raise
        except (
            InputError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as e:
            raise BundleError(f"{file} can't be understood ({brief(e)}); build it again.") from None
        bundle._check(hashes)
        return bundle

    @classmethod
    def _from_json(cls, path: Path, data: Mapping[str, Any]) -> Bundle:
        if data["format"] != FORMAT:
            raise BundleError(
                f"{path / MANIFEST}: format {data['format']}, this version reads {FORMAT}."
            )
        files = {}
        for name, record in data["files"].items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise BundleError(f"{path / MANIFEST}: {name!r} is not a plain file name.")
            files[name] = FileRecord(str(record["sha256"]), int(record["bytes"]))
        spec = VitSpec.from_json(data["spec"])
        targets = {int(t): tuple(counts) for t, counts in data["targets"].items()}
        for target, counts in targets.items():
            if counts != TokenSchedule.of(spec, target).tokens_out:
                raise ValueError(f"wrong token counts of target {target}")
        for name in [WEIGHTS, *map(graph_name, targets)]:
            if name not in files:
                raise BundleError(f"{path / MANIFEST} does not list {name}.")
        classes = data["classes"]
        if classes is not None and not (isinstance(classes, list) and len(classes) == spec.classes):
            raise ValueError(f"classes are not {spec.classes} names")
        if data["precision"] not in TYPES:
            raise ValueError(f"precision {data['precision']!r}")
        if not (math.isfinite(data["scale"]) and data["source"] in range(MAX_DEGREE + 1)):
            raise ValueError("source or scale out of range")
        plans = tuple(map(int, data.get("plans", ())))
        refitted = {
            int(target): Refitted(
                int(entry["source"]),
                float(entry["scale"]),
                bool(entry.get("compensated", data["compensated"])),  # as all were at first
            )
            for target, entry in data.get("refitted", {}).items()
        }
        accuracy = {int(t): float(percent) for t, percent in data.get("accuracy", {}).items()}
        if not all(0 <= percent <= 100 for percent in accuracy.values()):
            raise ValueError("accuracy is no percentage")
        if not {*plans, *refitted, *accuracy} <= set(targets):
            raise ValueError("plans, refitted weights or accuracy of no target")
        return cls(
            path=path,
            spec=spec,
            method=Method(data["method"], bool(data["proportional"])),
            source=int(data["source"]),
            scale=float(data["scale"]),
            compensated=bool(data["compensated"]),
            precision=data["precision"],
            targets=targets,
            files=files,
            preprocess=Preprocess.from_json(data["preprocess"]),
            classes=tuple(map(str, classes)) if classes else None,
            tools=dict(data["tools"]),
            plans=plans,
            refitted=refitted,
            accuracy=accuracy,
        )

    def to_json(self) -> dict[str, Any]:
        """The manifest."""
        return {
            "format": FORMAT,
            "spec": self.spec.to_json(),
            "method": self.method.name,
            "proportional": self.method.proportional,
            "source": self.source,
            "scale": self.scale,
            "compensated": self.compensated,
            "precision": self.precision,
            "targets": {str(t): list(counts) for t, counts in self.targets.items()},
            "files": {n: {"sha256": f.sha256, "bytes": f.bytes} for n, f in self.files.items()},
            "preprocess": self.preprocess.to_json(),
            "classes": list(self.classes) if self.classes else None,
            "tools": dict(self.tools),
            "plans": list(self.plans),
            "refitted": {str(t): asdict(entry) for t, entry in self.refitted.items()},
            "accuracy": {str(t): percent for t, percent in self.accuracy.items()},
        }

    def save_manifest(self, later: Bundle | None = None) -> None:
        """Write the manifest in its place.

        Args:
            later: what the bundle is about to become, by the renaming of a file. Manifest and
                file can't be renamed at once; :meth:`open` finds which of the two it is.

        Raises:
            OutputError: it can't be written.
        """
        data = self.to_json() | ({"next": later.to_json()} if later else {})
        with replaced(self.path / MANIFEST) as beside:
            beside.write_text(json.dumps(data, indent=2) + "\n", "utf-8")

    def graph(self, target: int) -> Path:
        """The graph of one target.

        Raises:
            DegreeError: the bundle has no such target.
        """
        if target not in self.targets:
            known = ", ".join(map(str, self.targets))
            raise DegreeError(f"{self.path} has no target {target}; it has {known}.")
        return self.path / graph_name(target)

    def weight_files(self, target: int) -> list[Path]:
        """The files that hold a target's weights; where two hold a name, the last one counts."""
        names = [WEIGHTS, weights_name(target)]
        return [self.path / name for name in names if name in self.files]

    def tensors(self, target: int) -> dict[str, npt.NDArray[Any]]:
        """The weights that a target's graph reads, as stored; mapped, not read.

        Raises:
            CheckpointError: a file is damaged.
        """
        found: dict[str, npt.NDArray[Any]] = {}
        for file in self.weight_files(target):
            found |= map_tensors(read_header(file)[0])
        return found

    def plan(self, target: int) -> Path:
        """The TensorRT plan of one target.

        Raises:
            DegreeError: the bundle has none for it.
        """
        if target not in self.plans:
            known = ", ".join(map(str, self.plans)) or "none"
            raise DegreeError(
                f"{self.path} has no plan for target {target} (plans: {known}); build "
                "--engine tensorrt writes them."
            )
        return self.path / plan_name(target)

    def size(self) -> int:
        """Bytes of its files, plans included."""
        plans = sum(self.plan(target).stat().st_size for target in self.plans)
        return plans + sum(record.bytes for record in self.files.values())

    def _check(self, hashes: bool) -> None:
        for name, record in self.files.items():
            file = self.path / name
            try:
                size = file.stat().st_size
            except OSError:
                raise BundleError(f"{file} is missing; build the bundle again.") from None
            if size != record.bytes:
                raise BundleError(
                    f"{file} has {size} bytes, the manifest says {record.bytes}; build it again."
                )
        if hashes:
            try:
                found = record_files(self.path, list(self.files))
            except OSError as error:
                raise BundleError(f"{error.filename}: can't be read: {error.strerror}.") from None
            for name, record in found.items():
                if record != self.files[name]:
                    raise BundleError(
                        f"{self.path / name} is not what the manifest says (SHA-256 differs); "
                        "build the bundle again."
                    )
