"""A bundle as it was when a pool opened it, and what a request runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tocom_export.bundle.file_hashes import read_recorded
from tocom_export.bundle.manifest import WEIGHTS, weights_name
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights, check_same_model, recover_checkpoint
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo
from tocom_export.errors import BankError, BundleError, InputError, PoolError
from tocom_export.image_size import resize_for
from tocom_export.io.tensors import Tensors
from tocom_export.model.catalogue import REFERENCE
from tocom_export.model.weight_names import qkv_weights
from tocom_export.refitting import choose_bank
from tocom_export.variant import Variant

from ..engine import Backend, Engine, Images, Logits, Outputs, check_usable, take_first
from ..opening import check_backend, open_engine, read_weights
from ..picking import resolve


@dataclass(frozen=True)
class Serving:
    """What a request runs on, from its begin to its end: one engine with one set of weights."""

    engine: Engine
    bytes: int
    """What the engine holds for itself: weights, or a whole plan."""

    @property
    def variant(self) -> Variant:
        """The engine's."""
        return self.engine.variant

    def run(self, images: Images) -> Logits:
        """The first output of images, logits as a rule; as of :meth:`run_all`."""
        return take_first(self.run_all(images))

    def run_all(self, images: Images) -> Outputs:
        """Each output of normalised images (B, C, H, W) float32, by name.

        Raises:
            ImageError: the images are of another form, or hold a NaN or an infinite value.
        """
        found = self.engine.run_all(images)
        check_usable(found, images)
        return found


@dataclass(frozen=True)
class Loaded:
    """A bundle, its graphs or plans as they were, and the weights that its engines have."""

    bundle: Bundle
    names: tuple[str, ...]
    """Of the variants to serve, by falling cost."""
    backend: Backend
    options: Mapping[str, Any]
    files: Mapping[str, Any]
    """Variant → its graph, or what tells its files from others that are put in their place."""
    new: ModelWeights | None = None
    """What other weights than those in the bundle's files are made of."""
    new_shared: Tensors | None = None
    """Of these, the ones that all variants share."""

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        variants: Sequence[str | int] | None,
        backend: Backend | Literal["auto"],
        options: Mapping[str, Any],
    ) -> Loaded:
        """What a pool of some variants, or of all, holds of a bundle."""
        asked = options.get("inference_precision", "auto")
        chosen, precision = resolve(bundle, backend, options.get("device"), asked)
        check_backend(chosen)
        if chosen == "openvino":
            options = {**options, "inference_precision": precision}
        if variants is not None and not variants:
            raise InputError("`variants`: a pool holds one at least.")
        wanted = [bundle.variant(v) for v in (bundle.variants if variants is None else variants)]
        wanted.sort(key=lambda v: -v.schedule(bundle.spec).macs(bundle.spec))
        names = tuple(dict.fromkeys(variant.name for variant in wanted))
        if chosen == "onnx":
            graphs = {name: bundle.graph(name) for name in names}
            read = {n: read_recorded(file, bundle.files[file.name]) for n, file in graphs.items()}
            return cls(bundle, names, chosen, options, read)
        loaded = cls(bundle, names, chosen, options, {})
        files = {name: tuple(map(_identify, loaded._list_files(name))) for name in names}
        return dataclasses.replace(loaded, files=files)

    @cached_property
    def shared(self) -> Tensors:
        """The weights that all variants share, read when they are first needed."""
        return self.new_shared or read_weights(self.bundle, WEIGHTS)

    def own(self, name: str) -> Tensors:
        """The weights in which a variant differs."""
        if self.new:
            return self.new.own(self.bundle.variants[name])
        return read_weights(self.bundle, weights_name(name))

    def open(self, name: str) -> Serving:
        """An engine of one variant; raises what opening one does."""
        bundle, variant = self.bundle, self.bundle.variants[name]
        if self.backend == "onnx":
            own, graph = self.own(name), self.files[name]
            weights = {**self.shared, **own}
            engine = open_engine(bundle, variant, weights=weights, graph=graph, **self.options)
            return Serving(engine, sum(tensor.nbytes for tensor in own.values()))
        files = self._list_files(name)
        read = files[:1] if self.new else files  # of OpenVINO's, the graph alone
        for file, known in zip(read, self.files[name], strict=False):
            if _identify(file) != known:
                raise BundleError(
                    f"{file} was changed since its bundle was opened; reload the pool."
                )
        new = {**self.shared, **self.new.own(variant)} if self.new else None
        engine = open_engine(bundle, variant, backend=self.backend, weights=new, **self.options)
        if (record := getattr(engine, "record", None)) and record.stripped:
            files += bundle.weight_files(name)  # what the plan left out
        each = sum(file.stat().st_size for file in files)
        return Serving(engine, each * getattr(engine, "copies", 1))

    def _list_files(self, name: str) -> list[Path]:
        """What a backend reads itself: a plan, or OpenVINO's graph and its weights."""
        bundle = self.bundle
        if self.backend == "openvino":
            return [bundle.graph(name), *bundle.weight_files(name)]
        return [bundle.plan(name)]

    def replace_weights(
        self,
        present: Sequence[Variant],
        opened: Checkpoint | None,
        bank: ToComBank | Path | str | None,
        source: int | None,
        scale: float | None,
    ) -> Loaded:
        """The same with other weights, as :meth:`EnginePool.refit` says, for these variants."""
        bundle = self.bundle
        as_before = bank is None and any(variant.compensated for variant in present)
        if as_before and bundle.spec.model != REFERENCE:
            raise BankError(f"{bundle.path} is compensated: name the `bank` for the new weights.")
        steps = choose_bank(bundle, present, bank)
        changes: dict[str, Any] = {} if as_before else {"compensated": steps is not None}
        if opened is not None and opened.info.source is not None:
            source = opened.choose_source(source)
        for name, given in (("scale", scale), ("source", source)):
            found = {getattr(v, name) for v in present} if given is None else {given}
            changes[name], *others = sorted(found)
            if others:
                have = ", ".join(map(str, sorted(found)))
                raise PoolError(f"the variants differ in {name} ({have}): `{name}` must say which.")
        changed = {v.name: dataclasses.replace(v, **changes) for v in present}
        shared, exact = self._hold(opened)
        new = ModelWeights(bundle.spec, exact, steps, bundle.precision)
        # What accuracy was measured, was that of other weights.
        bundle = dataclasses.replace(bundle, variants={**bundle.variants, **changed}, accuracy={})
        return dataclasses.replace(self, bundle=bundle, new=new, new_shared=shared)

    def _hold(self, opened: Checkpoint | None) -> tuple[Tensors, Checkpoint]:
        """What variants share of a checkpoint, or now, and what they are compensated from."""
        bundle, spec = self.bundle, self.bundle.spec
        if opened is None and self.new:
            return self.shared, self.new.checkpoint
        if opened is None:
            shared = self.shared
            own = Checkpoint(bundle.path / WEIGHTS, shared, ModelInfo())
            opened = recover_checkpoint(own, spec, bundle.precision)
            check_same_model(opened, spec)
        else:
            opened, _ = resize_for(spec, opened)
            check_same_model(opened, spec)
            stored = ModelWeights(spec, opened, None, bundle.precision).shared()
            # Those that are no copies already are views of the mapped file.
            shared = {n: t if t.flags.owndata else np.array(t) for n, t in stored.items()}
        exact = shared
        if bundle.precision != "fp32":  # of what is rounded, as much as baking takes
            qkv = qkv_weights(spec)
            exact = {name: np.array(opened.tensors[name]) for name in qkv}
        return shared, Checkpoint(opened.file, exact, opened.info)


def _identify(file: Path) -> tuple[int, ...]:
    """Tells a file from one that is put in its place, without reading it."""
    try:
        found = file.stat()
    except OSError as error:
        raise BundleError(f"{file}: can't be read: {error.strerror}.") from None
    return found.st_ino, found.st_size, found.st_mtime_ns
