"""What ``evaluate`` measures: checkpoints in PyTorch, and the engines of bundles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Method
from tocom_export.errors import CheckpointError, DataError, DegreeError, InputError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec

from .resolve import choose_method, open_bank, open_model

if TYPE_CHECKING:
    import torch

    from tocom_export.study.accuracy import RunOf


@dataclass(frozen=True)
class Subject:
    """One trained model, ready to be run at several degrees."""

    path: Path
    spec: VitSpec
    preprocess: Preprocess
    classes: tuple[str, ...] | None
    method: Method
    source: int
    targets: tuple[int, ...]
    baked_scale: float | None
    """The scale of a bundle's engines; None where it can be chosen."""
    plain: Callable[[int], RunOf]
    """Target → the model with token reduction alone."""
    compensated: Callable[[int, float], RunOf] | None
    """Target and scale → the model with the bank; None without one."""
    reference: Callable[[int], RunOf] | None = None
    """Target → PyTorch with the very weights of a bundle's engine."""

    def check_classes(self, names: Sequence[str], data: str) -> None:
        """Raise DataError where a data set's classes are not the model's.

        Args:
            data: the option and its value.
        """
        if len(names) != self.spec.classes:
            raise DataError(
                f"{data} has {len(names)} classes, but {self.path} has a head of "
                f"{self.spec.classes}."
            )
        if self.classes and self.classes != tuple(names):
            ours, theirs = next(p for p in zip(self.classes, names, strict=True) if p[0] != p[1])
            raise DataError(
                f"{data} has a class {theirs!r} where {self.path} has {ours!r}; classes "
                "must have the same names in the same order."
            )


def open_subject(
    path: Path,
    *,
    bank: str | None,
    method: str | None,
    targets: tuple[int, ...] | None,
    device: torch.device,
) -> Subject:
    """A bundle where ``path`` is a folder, else a checkpoint.

    Raises:
        InputError: it can't be opened, or doesn't fit the bank.
    """
    if path.is_dir():
        return _bundle(path, targets)
    return _checkpoint(path, bank, method, targets or (0, 4, 8, 12, 16), device)


def _checkpoint(
    path: Path,
    bank_name: str | None,
    method_name: str | None,
    targets: tuple[int, ...],
    device: torch.device,
) -> Subject:
    from tocom_export.training.evaluate import runner
    from tocom_export.training.lora import TrainableBank
    from tocom_export.training.torch_engine import load_model

    if path.suffix == ".safetensors" and Checkpoint.open(path).info.spec is None:
        raise CheckpointError(
            f"{path} doesn't say which model it is; evaluate takes what finetune writes, or a "
            f"bundle (tocom-export build --model NAME --checkpoint {path})."
        )
    spec, checkpoint, preprocess = open_model(None, path)
    bank = open_bank(bank_name, spec, method_name, checkpoint.info)
    method = choose_method(method_name, bank, checkpoint.info)
    if bank is not None:
        bank.check(spec, method, f"--bank {bank_name or 'of the package'}")
    model = load_model(spec, checkpoint.tensors, method).to(device)
    steps = TrainableBank.from_bank(bank, spec).to(device) if bank else None
    source = checkpoint.info.source or 0

    def compensated(target: int, scale: float) -> RunOf:
        assert steps is not None
        return runner(model, target, steps.side(source, target, scale))

    return Subject(
        path, spec, preprocess, checkpoint.info.classes, method, source, targets, None,
        plain=lambda target: runner(model, target),
        compensated=compensated if steps else None,
    )  # fmt: skip


def _bundle(path: Path, targets: tuple[int, ...] | None) -> Subject:
    from tocom_export.engines.onnx.engine import OnnxEngine

    bundle = Bundle.open(path)
    if missing := [t for t in targets or () if t not in bundle.targets]:
        have = ", ".join(map(str, bundle.targets))
        raise DegreeError(f"{path} has no engine at degree {missing[0]}; it has {have}.")

    if refitted := sorted({*(targets or bundle.targets)} & {*bundle.refitted}):
        raise InputError(
            f"{bundle.graph(refitted[0])} was refitted: its source and its weights are no longer "
            "the bundle's, whose name its rows would bear. Evaluate the checkpoint, or build a "
            "bundle of it."
        )

    def reference(target: int) -> RunOf:
        from tocom_export.training.torch_engine import Reference

        model = Reference(bundle)
        return lambda images: model(target, images)

    return Subject(
        path, bundle.spec, bundle.preprocess, bundle.classes, bundle.method, bundle.source,
        targets or tuple(bundle.targets), bundle.scale,
        plain=lambda target: OnnxEngine(bundle, target, compensated=False).run,
        compensated=(
            (lambda target, _: OnnxEngine(bundle, target).run) if bundle.compensated else None
        ),
        reference=reference,
    )  # fmt: skip
