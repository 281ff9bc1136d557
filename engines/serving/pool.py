"""All degrees of a bundle, of which one serves: switched and refitted while it runs."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import numpy as np

from tocom_export.bundle.opening import WEIGHTS, Bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.schedule import MAX_DEGREE
from tocom_export.errors import (
    BankError,
    BundleError,
    CheckFailed,
    CheckpointError,
    DegreeError,
    InputError,
    PoolError,
)
from tocom_export.io.memory import give_back
from tocom_export.model.catalogue import REFERENCE, REFERENCE_BANKS
from tocom_export.model.spec import VitSpec

from ..engine import Images, Logits, Serving
from ..onnx.session import Provider
from ..refit import NewWeights
from ..verify import sample_images
from ..weights import (
    WeightSet,
    bundled,
    compensated_anew,
    exchanged_checkpoint,
    identity,
)

Value = TypeVar("Value", int, float)


class EnginePool:
    """The engines of a bundle, of which one at a time serves. Safe to share among threads.

    A request runs wholly on one engine and one set of weights, those that serve when it begins.
    Switching changes a pointer. A refit prepares engines with the new weights beside the old
    ones, then exchanges all of them at once; requests that are under way end on the old. The
    weights are held in memory: what becomes of the bundle's files, or whether they can be written,
    is of no matter. The lowest degree serves first.

    Args:
        path: the bundle's folder.
        targets: degrees to hold; default: all of the bundle.
        runner: ``onnx`` for ONNX Runtime, ``plan`` for the bundle's TensorRT plans.
        provider: where ONNX Runtime runs.
        threads: of ONNX Runtime within an operator; None leaves it to the runtime.
        memory: opens a degree when it is first asked for, and closes those that were not used
            for longest where all weights together are more than so many bytes; None opens every
            degree at once.
        host_code: see :class:`~tocom_export.engines.tensorrt.engine.TensorRtEngine`.

    Raises:
        TocomError: what opening a bundle and its engines raises.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        targets: Iterable[int] | None = None,
        runner: Literal["onnx", "plan"] = "onnx",
        provider: Provider = "cpu",
        threads: int | None = None,
        memory: float | None = None,
        host_code: bool = False,
    ) -> None:
        if runner not in ("onnx", "plan"):
            raise InputError(f"runner {runner!r}: it is 'onnx' or 'plan'.")
        if threads is not None and threads < 1:
            raise InputError(f"threads {threads}: there is one at least.")
        if memory is not None and not memory >= 0:
            raise InputError(f"memory {memory}: a number of bytes is expected.")
        self._path, self._chosen = Path(path), targets and tuple(targets)
        self._runner, self._provider, self._threads = runner, provider, threads
        self._memory, self._host_code = memory, host_code
        self._used: dict[int, float] = defaultdict(float)
        self._changing = threading.Lock()  # held while engines are opened: seconds
        self._pointing = threading.Lock()  # held while the pointer is moved: microseconds
        self._bundle, self._weights = self._opened_bundle()
        self._servings = self._prepared(
            self._bundle, self._weights, self.targets if memory is None else self.targets[:1]
        )
        self._now: Serving | None = self._servings[self.targets[0]]

    @property
    def spec(self) -> VitSpec:
        """The model's architecture."""
        return self._bundle.spec

    @property
    def bundle(self) -> Bundle:
        """The bundle, as it was when it was last opened."""
        return self._bundle

    @property
    def targets(self) -> tuple[int, ...]:
        """The degrees that the pool can serve, in ascending order."""
        return tuple(sorted(self._chosen or self._bundle.targets))

    @property
    def serving(self) -> Serving:
        """What a request that begins now runs on; stays what it is when the pool moves on.

        Raises:
            PoolError: the pool is closed.
        """
        now = self._now
        if now is None:
            raise PoolError("the pool is closed.")
        return now

    def run(self, images: Images) -> Logits:
        """Logits (B, classes) float32 of normalised images (B, C, H, W) float32.

        Raises:
            ImageError: as :meth:`Serving.run` says.
            PoolError: the pool is closed.
        """
        return self.serving.run(images)

    def switch(self, target: int) -> Serving:
        """Serve at another degree from now on.

        Raises:
            DegreeError: the pool has no such degree.
            TocomError: its engine has to be opened, and can't be; the pool goes on as it was.
        """
        if target not in self.targets:
            raise DegreeError(
                f"the pool has no degree {target}; it has {', '.join(map(str, self.targets))}."
            )
        self._used[target] = time.monotonic()
        with self._pointing:
            if target in self._servings:
                return self._point(target)
        with self._changing:
            _ = self.serving
            opened = self._prepared(self._bundle, self._weights, (target,))
            with self._pointing:
                self._servings |= opened
                serving = self._point(target)
                self._trim()
                return serving

    def refit(
        self,
        *,
        checkpoint: Path | str | None = None,
        bank: ToComBank | Path | str | None = None,
        source: int | None = None,
        scale: float | None = None,
    ) -> None:
        """Exchange the weights of every degree, in this process alone; no file is written.

        Whatever fails, the pool goes on as it was.

        Args:
            checkpoint: the new weights, of the same model and classes; default: those that the
                pool has now.
            bank: what they are compensated with, or its file; default: for the model inside the
                package its own, none where the bundle has no compensation.
            source: degree that they were trained at; default: what the checkpoint says, else as
                before.
            scale: of the compensation; default: as before.

        Raises:
            BankError: the bundle is compensated, and no bank was given.
            CheckpointError: the checkpoint is broken, or of another model.
            PlanError: a plan that doesn't let go of what would have to change.
            PoolError: the degrees differ in what stays as before, or the pool is closed.
            CheckFailed: with these weights the engine gives no numbers.
        """
        with self._changing:
            _ = self.serving
            if source is not None and source not in range(MAX_DEGREE + 1):
                raise DegreeError(f"source {source}: a degree is a number from 0 to {MAX_DEGREE}.")
            if scale is not None and not 0 <= scale < math.inf:
                raise InputError(f"scale {scale}: a finite number from 0 on is expected.")
            steps = self._bank(bank)
            origins = self._origins()
            if scale is None:
                scale = _common("scale", (scale for _, scale in origins))
            if checkpoint is None:
                chosen = source
                if chosen is None:
                    chosen = _common("source", (source for source, _ in origins))
                weights = compensated_anew(self._bundle, self._weights, steps, chosen, scale)
            else:
                opened = Checkpoint.open(Path(checkpoint))
                trained = opened.info.source
                if None not in (source, trained) and source != trained:
                    raise CheckpointError(
                        f"source {source}, but {checkpoint} was trained at degree {trained} by its "
                        "metadata; leave source out."
                    )
                chosen = trained if source is None else source
                if chosen is None:
                    chosen = _common("source", (source for source, _ in origins))
                new = NewWeights(opened, steps, chosen, scale)
                weights = exchanged_checkpoint(self._bundle, self._weights, new)
            # What accuracy was measured, was that of other weights.
            self._exchange(dataclasses.replace(self._bundle, accuracy={}), weights)

    def reload(self) -> None:
        """Open the bundle's files again, after ``tocom-export refit`` or a new build.

        Degrees that are new are served from now on, those that are gone no more. Whatever fails,
        the pool goes on as it was.

        Raises:
            BundleError: it is of another model now, or lacks the degree that serves.
            TocomError: what opening a bundle and its engines raises.
        """
        with self._changing:
            serving = self.serving
            bundle, weights = self._opened_bundle()
            if bundle.spec != self.spec:
                raise BundleError(f"{self._path} is of another model now; open a pool of it.")
            if serving.target not in bundle.targets:
                raise BundleError(
                    f"{self._path} has no degree {serving.target} now, which serves; switch to one "
                    f"that it has ({', '.join(map(str, bundle.targets))}) first."
                )
            self._exchange(bundle, weights)

    def close(self) -> None:
        """Let the engines go; requests that are under way end, others are refused."""
        with self._changing, self._pointing:
            self._now, self._servings = None, {}

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _opened_bundle(self) -> tuple[Bundle, WeightSet]:
        bundle = Bundle.open(self._path)
        return bundle, bundled(bundle, self._chosen or bundle.targets, self._runner)

    def _origins(self) -> list[tuple[int, float]]:
        """Source and scale of every degree."""
        opened = {target: (s.source, s.scale) for target, s in self._servings.items()}
        return [opened.get(target) or self._weights.origin(target) for target in self.targets]

    def _exchange(self, bundle: Bundle, weights: WeightSet) -> None:
        """Open the engines that are open once more, with other weights, and move the pointer."""
        known = sorted(self._chosen or bundle.targets)
        wanted = [t for t in known if self._memory is None or t in self._servings]
        servings = self._prepared(bundle, weights, wanted)
        with self._pointing:
            if (target := self.serving.target) not in servings:  # switched to meanwhile
                raise BundleError(f"{self._path} has no degree {target} now, which serves.")
            serving = servings[target]
            self._bundle, self._weights = bundle, weights
            self._servings, self._now = servings, serving
        give_back()

    def _point(self, target: int) -> Serving:
        _ = self.serving  # it may be closed
        self._now = self._servings[target]
        return self._now

    def _trim(self) -> None:
        """Close the degrees that were not used for longest, where there is no room for all."""
        if self._memory is None:
            return
        shared = self._bundle.files[WEIGHTS].bytes if self._runner == "onnx" else 0
        opened = dict(self._servings)
        for degree in sorted(opened.keys() - {self.serving.target}, key=self._used.__getitem__):
            if shared + sum(serving.bytes for serving in opened.values()) <= self._memory:
                break
            del opened[degree]
        self._servings = opened

    def _prepared(
        self, bundle: Bundle, weights: WeightSet, targets: Iterable[int]
    ) -> dict[int, Serving]:
        """Engines of some degrees, each of which has run."""
        images = sample_images(bundle.spec, 1)
        servings = {}
        for target in targets:
            serving = self._onnx if self._runner == "onnx" else self._plan
            servings[target] = found = serving(bundle, weights, target)
            if not np.isfinite(found.engine.run(images)).all():
                raise CheckFailed(f"the engine at degree {target} gives no numbers.")
        return servings

    def _onnx(self, bundle: Bundle, weights: WeightSet, target: int) -> Serving:
        from ..onnx.engine import OnnxEngine

        own = weights.own(target)
        engine = OnnxEngine(
            bundle,
            target,
            provider=self._provider,
            threads=self._threads,
            weights={**weights.shared(), **own},
            graph=weights.graphs[target],
        )
        size = sum(tensor.nbytes for tensor in own.values())
        return Serving(engine, target, *weights.origin(target), size)

    def _plan(self, bundle: Bundle, weights: WeightSet, target: int) -> Serving:
        from ..refit import exchanged
        from ..tensorrt.engine import TensorRtEngine

        plan = bundle.plan(target)
        if identity(plan) != weights.plans[target]:
            raise BundleError(f"{plan} was changed since its bundle was opened; reload the pool.")
        engine = TensorRtEngine(plan, host_code=self._host_code)
        origin = (engine.record.source, engine.record.scale)
        if weights.renewed or engine.record.stripped:
            tensors = {**weights.shared(), **weights.own(target)}
            engine.refit(exchanged(engine.record, tensors, plan))
            origin = weights.origin(target)
        return Serving(engine, target, *origin, plan.stat().st_size)

    def _bank(self, bank: ToComBank | Path | str | None) -> ToComBank | None:
        """The bank that weights are compensated with, once it fits the model."""
        if isinstance(bank, str | Path):
            bank = ToComBank.load(bank)
        if bank is None and not self._bundle.compensated:
            return None
        if bank is None and self.spec.model == REFERENCE:
            bank = ToComBank.load(REFERENCE_BANKS[self._bundle.method.name])
        if bank is None:
            raise BankError(
                f"{self._path} is compensated: name the bank that new weights are compensated with "
                "(refit(bank=ToComBank.load(...)))."
            )
        bank.check(self.spec, self._bundle.method, "refit(bank=...)")
        return bank


def _common(name: str, values: Iterable[Value]) -> Value:
    """What all degrees have, to go on with it."""
    found = sorted(set(values))
    if len(found) > 1:
        have = ", ".join(map(str, found))
        raise PoolError(f"the degrees differ in {name} ({have}): refit({name}=...) must say which.")
    return found[0]
