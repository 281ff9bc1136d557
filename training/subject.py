"""A checkpoint in PyTorch, to be evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from tocom_export.compensation import load_compensation
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Merge
from tocom_export.compression.rules import list_degrees
from tocom_export.errors import CheckpointError
from tocom_export.loading import load_model
from tocom_export.model.outputs import OutputName
from tocom_export.preparing import TARGETS
from tocom_export.study.subject import Subject
from tocom_export.variant import Variant

from . import torch_engine


def open_subject(
    path: Path,
    *,
    targets: Iterable[int] = TARGETS,
    schedules: Iterable[tuple[str, Sequence[int] | str]] = (),
    bank: ToComBank | Path | str | None = None,
    method: str | None = None,
    merge: Merge | None = None,
    device: torch.device | None = None,
    weights_key: str | None = None,
    output: OutputName = "logits",
    tell: Callable[[str], None] = lambda _: None,
) -> Subject:
    """A checkpoint that says which model it is, with the bank beside its weights.

    Args:
        targets: degrees for all layers; they become the variants r00, r04, ...
        schedules: names of variants, and a degree for each layer or a rule that gives them
            (``every:3``, ``keep:0.5``).
        bank, method, merge: see :func:`~tocom_export.loading.load_compensation`.
        weights_key: see :meth:`Checkpoint.open`.
        output: what accuracy is measured by: logits, or the embedding.
        tell: called with a line that a person would want to know.

    Raises:
        InputError: it can't be opened, or doesn't fit the bank.
    """
    if path.suffix == ".safetensors" and Checkpoint.open(path).info.spec is None:
        raise CheckpointError(
            f"{path} doesn't say which model it is; evaluate takes what finetune writes, or a "
            f"bundle (tocom-export build --model NAME --checkpoint {path})."
        )
    model = load_model(checkpoint=path, weights_key=weights_key)
    if model.checkpoint.note:
        tell(model.checkpoint.note)
    spec, info = model.spec, model.checkpoint.info
    opened, chosen = load_compensation(bank, spec, info, method, None, merge)
    source = model.checkpoint.choose_source(None)
    make = partial(
        Variant.of, spec, source=source, compensated=opened is not None, merge=chosen.merge
    )
    variants = (
        *map(make, targets),
        *(make(list_degrees(spec, asked, chosen.merge), name) for name, asked in schedules),
    )
    network = torch_engine.load_model(spec, model.checkpoint.tensors, chosen).to(device)
    return Subject(
        path, spec, model.preprocess, info.classes, chosen, variants,
        runner=torch_engine.BankOracle(network, opened, (output,)).runner, backend="torch",
    )  # fmt: skip
