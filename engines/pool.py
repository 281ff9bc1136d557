"""All degrees of a bundle, of which one serves: switched and refitted while it runs."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from tocom_export.bank import ToComBank
from tocom_export.bundle import WEIGHTS, Bundle
from tocom_export.checkpoint import Checkpoint
from tocom_export.engines.compare import sample_images
from tocom_export.engines.refit import NewWeights
from tocom_export.engines.serving import Images, Logits, Serving
from tocom_export.engines.session import Provider
from tocom_export.engines.weights import (
    WeightSet,
    bundled,
    compensated_anew,
    exchanged_checkpoint,
)
from tocom_export.errors import BankError, CheckFailed, CheckpointError, DegreeError, PoolError
from tocom_export.models import REFERENCE, REFERENCE_BANKS
from tocom_export.spec import VitSpec


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
        host_code: see :class:`~tocom_export.engines.tensorrt.TensorRtEngine`.

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
        bank: ToComBank | None = None,
        source: int | None = None,
        scale: float | None = None,
    ) -> None:
        """Exchange the weights of every degree, in this process alone; no file is written.

        Whatever fails, the pool goes on as it was.

        Args:
            checkpoint: the new weights, of the same model and classes; default: those that the
                pool has now.
            bank: what they are compensated with; default: for the model inside the package its
                own, none where the bundle has no compensation.
            source: degree that they were trained at; default: what the checkpoint says, else as
                before.
            scale: of the compensation; default: as before.

        Raises:
            BankError: the bundle is compensated, and no bank was given.
            CheckpointError: the checkpoint is broken, or of another model.
            PlanError: a plan that doesn't let go of what would have to change.
            CheckFailed: with these weights the engine gives no numbers.
        """
        with self._changing:
            before = self.serving
            bank = self._bank(bank)
            scale = before.scale if scale is None else scale
            if checkpoint is None:
                chosen = before.source if source is None else source
                weights = compensated_anew(self._bundle, self._weights, bank, chosen, scale)
            else:
                opened = Checkpoint.open(Path(checkpoint))
                trained = opened.info.source
                if None not in (source, trained) and source != trained:
                    raise CheckpointError(
                        f"source {source}, but {checkpoint} was trained at degree {trained} by its "
                        "metadata; leave source out."
                    )
                chosen = next(d for d in (source, trained, before.source) if d is not None)
                new = NewWeights(opened, bank, chosen, scale)
                weights = exchanged_checkpoint(self._bundle, new)
            self._exchange(self._bundle, weights)

    def reload(self) -> None:
        """Open the bundle's files again, after ``tocom-export refit`` or a new build.

        Whatever fails, the pool goes on as it was.

        Raises:
            TocomError: what opening a bundle and its engines raises.
        """
        with self._changing:
            _ = self.serving
            self._exchange(*self._opened_bundle())

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
        for target in self._chosen or ():
            bundle.graph(target)
        return bundle, bundled(bundle)

    def _exchange(self, bundle: Bundle, weights: WeightSet) -> None:
        """Open the engines that are open once more, with other weights, and move the pointer."""
        servings = self._prepared(bundle, weights, self._servings)
        with self._pointing:
            serving = servings[self.serving.target]
            self._bundle, self._weights = bundle, weights
            self._servings, self._now = servings, serving

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
        from tocom_export.engines.onnxruntime import OnnxEngine

        own = weights.own(target)
        engine = OnnxEngine(
            bundle,
            target,
            provider=self._provider,
            threads=self._threads,
            weights={**weights.shared(), **own},
        )
        size = sum(tensor.nbytes for tensor in own.values())
        return Serving(engine, target, *weights.origin(target), size)

    def _plan(self, bundle: Bundle, weights: WeightSet, target: int) -> Serving:
        from tocom_export.engines.refit import exchanged
        from tocom_export.engines.tensorrt import TensorRtEngine

        plan = bundle.plan(target)
        engine = TensorRtEngine(plan, host_code=self._host_code)
        origin = (engine.record.source, engine.record.scale)
        if weights.renewed or engine.record.stripped:
            tensors = {**weights.shared(), **weights.own(target)}
            engine.refit(exchanged(engine.record, tensors, plan))
            origin = weights.origin(target)
        return Serving(engine, target, *origin, plan.stat().st_size)

    def _bank(self, bank: ToComBank | None) -> ToComBank | None:
        """The bank that weights are compensated with, once it fits the model."""
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
