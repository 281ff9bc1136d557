"""All variants of a bundle, of which one serves: switched and refitted while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tocom_export.bundle.manifest import WEIGHTS
from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.errors import BundleError, CheckFailed, InputError, PoolError
from tocom_export.io.memory import release_memory
from tocom_export.model.outputs import format_outputs, pluralise
from tocom_export.variant import find_variant

from ..engine import Backend, Images, Logits, Outputs, name_unusable, take_first
from ..tracing import Trace, Tracer
from ..verify import sample_images
from .loaded import Loaded, Serving


class EnginePool:
    """The engines of a bundle, of which one at a time serves. Safe to share among threads.

    A request runs wholly on one engine and one set of weights, those that serve when it begins.
    Switching changes a pointer. A refit prepares engines with the new weights beside the old
    ones, then exchanges all of them at once; requests that are under way end on the old. The
    weights are held in memory: what becomes of the bundle's files is of no matter to engines that
    are open. The variant of the most MACs serves first.

    Args:
        path: the bundle's folder.
        variants: those to hold, by name or bare degree; default: all of the bundle.
        backend: what runs them; ``auto`` is what was picked on this machine, else ONNX Runtime.
        memory: opens a variant when it is first asked for, and closes those that were not used
            for longest where all weights together are more than so many bytes; None opens all.
        options: device, threads, batch and the like, as of :meth:`Bundle.engine`.

    Raises:
        TocomError: what opening a bundle and its engines raises.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        variants: Iterable[str | int] | None = None,
        backend: Backend | Literal["auto"] = "auto",
        memory: float | None = None,
        **options: Any,
    ) -> None:
        if memory is not None and not memory >= 0:
            raise InputError(f"`memory` {memory}: a number of bytes is expected.")
        self._chosen, self._memory = None if variants is None else tuple(variants), memory
        self._changing = threading.Lock()  # held while engines are opened: seconds
        self._pointing = threading.Lock()  # held while the pointer is moved: microseconds
        self._loaded = Loaded.of(Bundle.open(path), self._chosen, backend, options)
        self.spec = self.bundle.spec
        names = self.variants
        # Those that are open, by their last use; never changed in place.
        self._servings = self._prepare(self._loaded, names if memory is None else names[:1])
        self._now: Serving | None = self._servings[names[0]]
        self._tracers: dict[str, Tracer] = {}

    @property
    def bundle(self) -> Bundle:
        """The bundle, with the variants as they are in the pool."""
        return self._loaded.bundle

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants that the pool can serve, by falling cost."""
        return self._loaded.names

    @property
    def backend(self) -> Backend:
        """What runs them."""
        return self._loaded.backend

    @property
    def serving(self) -> Serving:
        """What a request that begins now runs on; stays what it is when the pool moves on."""
        if (now := self._now) is None:
            raise PoolError("the pool is closed.")
        return now

    def run(self, images: Images, variant: str | int | None = None) -> Logits:
        """The first output of images, logits (B, classes) as a rule; as of :meth:`run_all`."""
        return take_first(self.run_all(images, variant))

    def run_all(self, images: Images, variant: str | int | None = None) -> Outputs:
        """Each output of normalised images (B, C, H, W) float32, by name.

        Args:
            variant: to run on, by name or bare degree; default: the one that serves.

        Raises:
            ImageError: the images are of another form, or a value is NaN or infinite.
            TocomError: as :meth:`switch`; the pool is closed.
        """
        return (self.serving if variant is None else self.open(variant)).run_all(images)

    def open(self, variant: str | int) -> Serving:
        """What a request to a variant that begins now runs on; the one that serves stays.

        Raises:
            TocomError: as :meth:`switch`.
        """
        return self._open(variant)

    def switch(self, variant: str | int) -> Serving:
        """Serve another variant from now on.

        Raises:
            DegreeError: the pool has no such variant.
            TocomError: its engine has to be opened, and can't be; the pool goes on as it was.
        """
        return self._open(variant, point=True)

    def trace(self, images: Images, variant: str | int) -> Trace:
        """Which patches of some images became one token, with the weights that serve now.

        By an engine of its own, in ONNX Runtime on one thread, which is opened when it is first
        asked for.

        Args:
            images: normalised (B, C, H, W) float32.

        Raises:
            ImageError: the images are of another form, or a value is NaN or infinite.
            MissingPackageError: ONNX Runtime isn't installed.
            TocomError: the pool has no such variant, or its bundle's files have changed.
        """
        with self._pointing:  # or those of the old weights would be kept among the new ones
            _ = self.serving  # it may be closed
            loaded, name, tracers = self._loaded, self._find(variant), self._tracers
        if (tracer := tracers.get(name)) is None:
            weights = {**loaded.shared, **loaded.own(name)}
            chosen = loaded.bundle.variants[name]
            tracer = tracers[name] = Tracer(loaded.bundle, chosen, threads=1, weights=weights)
        return tracer.run(images)

    def refit(
        self,
        *,
        checkpoint: Path | str | None = None,
        weights_key: str | None = None,
        bank: ToComBank | Path | str | None = None,
        source: int | None = None,
        scale: float | None = None,
    ) -> None:
        """Exchange the weights of every variant, in this process alone; no file is written.

        Whatever fails, the pool goes on as it was.

        Args:
            checkpoint: the new weights, of the same model and classes; default: those it has now.
                Positions for another image size are resampled, as :func:`tocom_export.refit` does.
            weights_key: the entry of a pickled checkpoint that is taken; default: averaged weights
                (EMA) where there are any, as timm.
            bank: what all variants are compensated with, or its file, or ``none``; default: those
                that are compensated stay so, for which the model inside the package has its own.
            source: degree they were trained at; default: what the checkpoint says, else as before.
            scale: of the compensation; default: as before.

        Raises:
            BankError, CheckpointError: one is missing, broken, or of another model.
            DegreeError, InputError: source or scale is out of range.
            PlanError: a plan that doesn't let go of what would have to change.
            PoolError: the variants differ in what stays as before, or the pool is closed.
            CheckFailed: with these weights an engine gives what is NaN or Inf.
        """
        with self._changing:
            _ = self.serving  # it may be closed
            found = {n: serving.variant for n, serving in self._servings.items()}
            present = [found.get(name, self.bundle.variants[name]) for name in self.variants]
            opened = None
            if checkpoint is not None:
                opened = Checkpoint.open(checkpoint, weights_key, self.spec)
            self._exchange(self._loaded.replace_weights(present, opened, bank, source, scale))

    def reload(self) -> None:
        """Open the bundle's files, of whatever variants, again: after a refit or a new build.

        Whatever fails, the pool goes on as it was.

        Raises:
            BundleError: it is of another model now, gives other outputs, or lacks the variant that
                serves.
            TocomError: what opening a bundle and its engines raises.
        """
        with self._changing:
            name, now = self.serving.variant.name, self._loaded
            path = now.bundle.path
            loaded = Loaded.of(Bundle.open(path), self._chosen, now.backend, now.options)
            if loaded.bundle.spec != self.spec:
                raise BundleError(f"{path} is of another model now; open a pool of it.")
            old, new = now.bundle, loaded.bundle
            if (new.outputs, new.unit_embedding) != (old.outputs, old.unit_embedding):
                given = format_outputs(new.forms, new.unit_embedding)
                raise BundleError(f"{path} gives other outputs now ({given}); open a pool of it.")
            if name not in loaded.names:
                raise BundleError(
                    f"{path} has no variant {name} now, which serves; switch to one that it has "
                    f"({', '.join(loaded.names)}) first."
                )
            self._exchange(loaded)

    def close(self) -> None:
        """Let the engines go; requests that are under way end, others are refused."""
        with self._changing, self._pointing:
            self._now, self._servings, self._tracers = None, {}, {}

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, variant: str | int, point: bool = False) -> Serving:
        """A variant, opened if need be; also the one that serves from now on if asked for."""
        with self._pointing:
            if found := self._servings.get(self._find(variant)):
                return self._use(found, point)
        with self._changing:
            _ = self.serving
            name = self._find(variant)  # it may be gone by now, after a reload
            found = self._servings.get(name) or self._prepare(self._loaded, (name,))[name]
            with self._pointing:
                return self._use(found, point)

    def _find(self, variant: str | int) -> str:
        held = {name: self.bundle.variants[name] for name in self.variants}
        return find_variant(held, variant, "the pool").name

    def _use(self, found: Serving, point: bool) -> Serving:
        """Note the use; close the variants not used for longest where there is no room for all."""
        if point:
            self._now = found
        name, serving = found.variant.name, self.serving.variant.name
        left = {n: other for n, other in self._servings.items() if n != name} | {name: found}
        shared = self.bundle.files[WEIGHTS].bytes if self._loaded.backend == "onnx" else 0
        for other in [n for n in left if n not in (name, serving)]:
            if self._memory is None or shared + sum(s.bytes for s in left.values()) <= self._memory:
                break
            del left[other]
        self._servings = left
        return found

    def _exchange(self, loaded: Loaded) -> None:
        """Open the engines that are open once more, with other weights, and move the pointer."""
        open_now = loaded.names if self._memory is None else tuple(self._servings)
        servings = self._prepare(loaded, [name for name in open_now if name in loaded.names])
        with self._pointing:
            if (name := self.serving.variant.name) not in servings:  # switched to meanwhile
                raise BundleError(f"{self.bundle.path} has no variant {name} now, which serves.")
            self._loaded, self._tracers = loaded, {}
            self._servings, self._now = servings, servings[name]
        release_memory()

    def _prepare(self, loaded: Loaded, names: Iterable[str]) -> dict[str, Serving]:
        """Engines of some variants, each of which has run."""
        images = sample_images(loaded.bundle.spec, 1)
        servings = {}
        for name in names:
            servings[name] = found = loaded.open(name)
            if bad := name_unusable(found.engine.run_all(images)):
                what = pluralise(bad)
                raise CheckFailed(f"{what} of {name} are NaN or Inf with these weights.")
        return servings
