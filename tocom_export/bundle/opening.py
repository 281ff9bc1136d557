"""The directory that is deployed, opened: a manifest, graphs, and the weights they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy.typing as npt

from .._version import __version__
from ..errors import BundleError, DegreeError, InputError
from ..io.atomic import recover, replace_file
from ..io.json_codec import decode, encode, read_json
from ..io.tensors import map_tensors, read_header
from ..model.outputs import OutputName
from ..variant import Variant, find_variant
from .file_hashes import record_files
from .manifest import (
    FORMAT,
    LARGEST,
    MANIFEST,
    WEIGHTS,
    Manifest,
    graph_name,
    is_sealed,
    plan_name,
    seal,
    weights_name,
)

if TYPE_CHECKING:
    from tocom_export.engines.engine import Engine


T = TypeVar("T")
_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Bundle(Manifest):
    """A manifest and the folder that it is of; see docs/architecture.md for its layout."""

    path: Path

    @classmethod
    def open(cls, path: Path | str, *, hashes: bool = False) -> Bundle:
        """Open a bundle and check that its files are there, of the right size.

        Args:
            hashes: also compare every file's SHA-256 with the manifest's, and the manifest's with
                the one at its end.

        Raises:
            BundleError: no bundle, or a file is missing or changed.
        """
        path = Path(path)
        bundle = cls(path=path, **vars(read_manifest(path)))
        bundle._check(hashes)
        return bundle

    def save_manifest(self) -> None:
        """Write the manifest in its place; OutputError where it can't be written."""
        with replace_file(self.path / MANIFEST) as beside:
            beside.write_bytes(seal(self.to_json()).encode())

    def to_json(self) -> dict[str, Any]:
        """The manifest."""
        data: dict[str, Any] = encode(self)
        del data["path"]
        return {"format": FORMAT, **data}

    def variant(self, name: str | int) -> Variant:
        """A variant by its name, or by a bare degree.

        Raises:
            DegreeError: the bundle has no such variant.
        """
        return find_variant(self.variants, name, self.path)

    def find_output(self, wanted: OutputName) -> OutputName:
        """The name under which its engines give an output.

        Raises:
            InputError: they don't.
        """
        if wanted in self.outputs:
            return wanted
        if wanted == "embedding" and "logits" in self.outputs and not self.spec.classes:
            return "logits"
        given = ", ".join(self.outputs)
        why = f"build it with --output {wanted}, too"
        if wanted == "logits" and not self.spec.classes:
            why = "its model has no head"
        raise InputError(f"{self.path} gives no {wanted} ({given} alone); {why}.")

    def by_cost(self) -> list[str]:
        """Names of its variants, by falling MACs."""
        macs = {v.name: v.schedule(self.spec).macs(self.spec) for v in self.variants.values()}
        return sorted(macs, key=lambda name: -macs[name])

    def engine(self, name: str | int, **options: Any) -> Engine:
        """A variant ready to run; see :func:`tocom_export.engines.opening.open_engine`."""
        # Looks up at the runtimes, which the core doesn't know, so that one line runs a bundle.
        from tocom_export.engines.opening import open_engine

        return open_engine(self, self.variant(name), **options)

    def graph(self, name: str | int) -> Path:
        """The graph of a variant.

        Raises:
            DegreeError: the bundle has no such variant.
        """
        return self.path / graph_name(self.variant(name).name)

    def plan(self, name: str | int) -> Path:
        """The TensorRT plan of a variant.

        Raises:
            DegreeError: the bundle has none for it.
        """
        variant = self.variant(name)
        if variant.name not in self.plans:
            known = ", ".join(self.plans) or "none"
            raise DegreeError(
                f"{self.path} has no plan for {variant.name} (plans: {known}); tocom-export build "
                "with the backend tensorrt writes them."
            )
        return self.path / plan_name(variant.name)

    def weight_files(self, name: str | int) -> list[Path]:
        """The files that hold a variant's weights; where two hold a name, the last one counts."""
        names = [WEIGHTS, weights_name(self.variant(name).name)]
        return [self.path / name for name in names if name in self.files]

    def tensors(self, name: str | int) -> dict[str, npt.NDArray[Any]]:
        """The weights that a variant's graph reads, as stored; mapped, not read.

        Raises:
            CheckpointError: a file is damaged.
        """
        found: dict[str, npt.NDArray[Any]] = {}
        for file in self.weight_files(name):
            found |= map_tensors(read_header(file)[0])
        return found

    def size(self) -> int:
        """Bytes of its files, plans included."""
        plans = sum(self.plan(name).stat().st_size for name in self.plans)
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
            if not is_sealed((self.path / MANIFEST).read_bytes()):
                raise BundleError(
                    f"{self.path / MANIFEST} was changed since it was written (its SHA-256 "
                    "differs, or isn't there); build the bundle again."
                )
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


def read_unchanged(path: Path, read: Callable[[], T]) -> T:
    """What several files of a bundle give, all of one bundle.

    Where another took its place meanwhile, they are read again.

    Raises:
        BundleError: another took its place each time.
        Exception: as ``read``.
    """
    for _ in range(_TRIES):
        before = _identify(path)
        try:
            found = read()
        except Exception:
            if _identify(path) == before:
                raise
        else:
            if _identify(path) == before:
                return found
    raise BundleError(f"{path} is being replaced again and again; try again later.")


def _identify(path: Path) -> tuple[int, int] | None:
    """Tells a folder from one that takes its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def read_manifest(path: Path) -> Manifest:
    """What the manifest in a folder says.

    Puts the folder back where a writer was killed that had moved it away.

    Raises:
        BundleError: there is none, or it can't be understood.
    """
    file = path / MANIFEST
    try:
        return _decode(file, read_json(file, LARGEST))
    except FileNotFoundError:
        if recover(path):
            return read_manifest(path)
        what = f"it has no {MANIFEST}" if path.exists() else "there is no such folder"
        raise BundleError(f"{path} is not a bundle: {what}.") from None
    except NotADirectoryError:
        raise BundleError(f"{path} is not a bundle: it is a file.") from None
    except OSError as error:
        raise BundleError(f"{file}: can't be read: {error.strerror}.") from None
    except BundleError:
        raise
    except (InputError, DegreeError) as error:
        reason = str(error).rstrip(".")
        raise BundleError(f"{file} can't be understood ({reason}); build it again.") from None


def _decode(file: Path, data: Any) -> Manifest:
    found = data.get("format") if isinstance(data, Mapping) else None
    if isinstance(found, int) and found > FORMAT:
        raise BundleError(
            f"{file} is of format {found}, and tocom-export {__version__} reads {FORMAT}: pip "
            "install -U tocom-export."
        )
    if found != FORMAT:
        raise InputError(f"format {found}, {FORMAT} is expected")
    return decode(
        Manifest, {name: value for name, value in data.items() if name not in ("format", "sha256")}
    )
