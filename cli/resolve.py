"""From a command's options to a model, its weights and its bank."""

from __future__ import annotations

from pathlib import Path

from tocom_export.bundle.writing import BuildPlan
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo
from tocom_export.compression.method import Method
from tocom_export.errors import BankError, InputError
from tocom_export.graph.precision import Precision
from tocom_export.model.catalogue import (
    REFERENCE,
    REFERENCE_BANKS,
    REFERENCE_CHECKPOINT,
    is_known,
    known_model,
)
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec

from .output import installed


def spec_of(model: str) -> tuple[VitSpec, Preprocess]:
    """Spec and image statistics of a model name; asks timm for one that we don't list."""
    if model == REFERENCE:
        model_info = Checkpoint.open(REFERENCE_CHECKPOINT).info
        if model_info.spec is None or model_info.preprocess is None:
            raise InputError(f"{REFERENCE_CHECKPOINT} has lost its metadata; install again.")
        return model_info.spec, model_info.preprocess
    if not is_known(model) and installed("torch", "timm"):
        from tocom_export.training.timm_models import preprocess_of_name, spec_of_name

        return spec_of_name(model), preprocess_of_name(model)
    return known_model(model)


def open_model(model: str | None, file: Path | None) -> tuple[VitSpec, Checkpoint, Preprocess]:
    """The weights that ``--model`` and ``--checkpoint`` ask for, checked against their spec."""
    if file is None and model not in (None, REFERENCE):
        spec, preprocess = spec_of(model)
        if not installed("torch", "timm"):
            raise InputError(
                f"--model {model}: give its weights with --checkpoint FILE; downloading timm's "
                "pretrained ones needs torch and timm (pip install 'tocom-export[torch]')."
            )
        from tocom_export.training.timm_models import pretrained_tensors

        checkpoint = Checkpoint(Path(model), pretrained_tensors(model), ModelInfo())
        return checkpoint.fit(spec), checkpoint, preprocess
    checkpoint = Checkpoint.open(file or REFERENCE_CHECKPOINT)
    info = checkpoint.info
    if info.spec is None:
        spec, preprocess = spec_of(model or REFERENCE)
    elif model and model.split(".")[0] != info.spec.model:
        raise InputError(
            f"--model {model}, but {file} says it is {info.spec.model}; leave --model out."
        )
    else:
        spec, preprocess = info.spec, Preprocess()
        if info.preprocess is None and is_known(spec.model):
            preprocess = known_model(spec.model)[1]
    return checkpoint.fit(spec), checkpoint, info.preprocess or preprocess


def open_bank(
    bank: str | None, spec: VitSpec, method: str | None, info: ModelInfo
) -> ToComBank | None:
    """The bank that ``--bank`` asks for, or the shipped one of the method; None for ``none``."""
    if bank == "none":
        return None
    if bank is None and spec.model != REFERENCE:
        raise BankError(
            f"--bank: {spec.model} has no bank of its own; give FILE (tocom-export train makes "
            "one), or 'none' to go without."
        )
    method = method or (info.method.name if info.method else "tome")
    return ToComBank.load(Path(bank) if bank else REFERENCE_BANKS[method])


def choose_method(
    name: str | None,
    bank: ToComBank | None,
    info: ModelInfo,
    proportional: bool | None = None,
) -> Method:
    """``--method``, else the bank's, else the checkpoint's, else ToMe.

    Whether attention is proportional follows the option, then the checkpoint, then the bank.
    """
    known = [m for m in (info.method, bank and bank.method) if m]
    if name is None:
        name = bank.method.name if bank else known[0].name if known else "tome"
    if proportional is not None:
        return Method(name, proportional)  # type: ignore[arg-type]
    return next((m for m in known if m.name == name), Method(name))  # type: ignore[arg-type]


def plan_build(
    *,
    model: str | None,
    checkpoint_file: Path | None,
    bank_name: str | None,
    method_name: str | None,
    source: int | None,
    targets: tuple[int, ...],
    scale: float,
    precision: Precision = "fp32",
) -> BuildPlan:
    """What ``build`` would do, everything about it checked; writes nothing."""
    spec, checkpoint, preprocess = open_model(model, checkpoint_file)
    known_source = checkpoint.info.source
    if None not in (source, known_source) and source != known_source:
        raise InputError(
            f"--source {source}, but {checkpoint.file} was trained at degree {known_source} by "
            "its metadata; leave --source out."
        )
    bank = open_bank(bank_name, spec, method_name, checkpoint.info)
    method = choose_method(method_name, bank, checkpoint.info)
    if bank is not None:
        bank.check(spec, method, f"--bank {bank_name or 'of the package'}")
    return BuildPlan(
        spec=spec,
        checkpoint=checkpoint,
        bank=bank,
        method=method,
        source=source if source is not None else (known_source or 0),
        targets=targets,
        scale=scale,
        preprocess=preprocess,
        classes=checkpoint.info.classes,
        precision=precision,
    )
