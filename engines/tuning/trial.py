"""A schedule as an engine: its graph and weights in a folder of their own, as in a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tocom_export.bundle.extending import read_input_scales
from tocom_export.bundle.file_hashes import record_files
from tocom_export.bundle.manifest import WEIGHTS, graph_name, weights_name
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights
from tocom_export.bundle.writing import Blueprint, write_variant
from tocom_export.io.atomic import link_or_copy
from tocom_export.variant import Variant

from ..engine import Engine
from ..opening import open_engine

_NAME = "trial"


@dataclass(frozen=True)
class Workshop:
    """Where candidates are written and opened; see :func:`open_workshop`."""

    bundle: Bundle
    weights: ModelWeights
    folder: Path
    options: dict[str, Any]
    """Of :func:`~tocom_export.engines.opening.open_engine`."""

    def make_variant(
        self, degrees: Sequence[int] | int, scale: float | None = None, name: str = _NAME
    ) -> Variant:
        """A variant of the bundle's model, as it would be compensated."""
        like = next(iter(self.bundle.variants.values()))
        listed = (degrees,) * self.bundle.spec.depth if isinstance(degrees, int) else tuple(degrees)
        return Variant.of(
            self.bundle.spec,
            listed,
            name,
            source=like.source,
            scale=like.scale if scale is None else scale,
            compensated=self.weights.bank is not None,
            merge=self.bundle.method.merge,
        )

    def open(self, variant: Variant, batch: int) -> Engine:
        """An engine of a variant that the bundle hasn't."""
        bundle, folder = self.bundle, self.folder / variant.name
        folder.mkdir(exist_ok=True)
        if not (folder / WEIGHTS).exists():
            link_or_copy(bundle.path / WEIGHTS, folder / WEIGHTS)
        made = Blueprint(
            self.weights, bundle.method, {variant.name: variant}, bundle.preprocess, bundle.classes,
            outputs=bundle.outputs, unit_embedding=bundle.unit_embedding,
        )  # fmt: skip
        own = (graph_name(variant.name), weights_name(variant.name))
        for name in own:  # of the candidate before: an engine may have them mapped
            (folder / name).unlink(missing_ok=True)
        write_variant(made, variant, folder, read_input_scales(bundle, variant))
        present = [name for name in own if (folder / name).exists()]
        found = dataclasses.replace(
            bundle,
            path=folder,
            variants={variant.name: variant},
            files={WEIGHTS: bundle.files[WEIGHTS], **record_files(folder, present)},
            plans=(), refitted=(), accuracy={},
        )  # fmt: skip
        return open_engine(found, variant, batch=batch, **self.options)


@contextmanager
def open_workshop(bundle: Bundle, weights: ModelWeights, **options: Any) -> Iterator[Workshop]:
    """A place for candidates, beside the bundle so that its weights can be linked; then removed."""
    with TemporaryDirectory(dir=bundle.path.parent, prefix=f".{bundle.path.name}.tune.") as place:
        yield Workshop(bundle, weights, Path(place), options)
