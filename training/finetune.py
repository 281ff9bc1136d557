"""Supervised training of a ViT at its source degree, from scratch or from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tocom_export.compression.metadata import ModelInfo
from tocom_export.errors import InputError
from tocom_export.io.atomic import replaced
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec

from .adaptformer import merged_state
from .data.train import TrainData
from .loop.distributed import ALONE, Placement
from .loop.loop import Recipe, Report, fit
from .loop.state import digest, state_of
from .model import CompressedVit


def finetune(
    model: CompressedVit,
    data: TrainData,
    recipe: Recipe,
    out: Path,
    *,
    source: int = 0,
    preprocess: Preprocess,
    label_smoothing: float = 0.1,
    placement: Placement = ALONE,
    accumulate: int = 1,
    report: Report | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train ``model`` with token reduction at degree ``source``; write a checkpoint.

    The checkpoint's metadata say what it is, so that ``build`` needs no further options.
    Its training state lies beside it until the checkpoint is written. Weights that don't
    require a gradient stay as they are.

    Args:
        out: the ``.safetensors`` file to write.
        source: the degree that the model runs at while it is trained.
    """
    state_file = state_of(out)
    model.to(placement.device)

    def loss_of(images: Tensor, labels: Tensor, _: int) -> Tensor:
        return F.cross_entropy(model(images, source), labels, label_smoothing=label_smoothing)

    trained = [name for name, p in model.vit.named_parameters() if p.requires_grad]
    identity = {
        "spec": model.spec.to_json(),
        "method": str(model.method),
        "drop-path": model.drop_path,
        "weights": digest(model.vit),
        "trained": trained,
        "adapter-scale": getattr(model.vit.blocks[0].mlp, "scale", None),
        "source": source,
        "label-smoothing": label_smoothing,
    }
    fit(
        model, loss_of, data, recipe, state_file,
        identity=identity, placement=placement, accumulate=accumulate,
        report=report, after_epoch=after_epoch,
    )  # fmt: skip
    if placement.first:
        info = ModelInfo(model.spec, source, model.method, data.classes, preprocess)
        tensors = {name: t.cpu().contiguous() for name, t in merged_state(model.vit).items()}
        with replaced(out) as beside:
            save_file(tensors, beside, info.to_metadata())
        state_file.unlink()


def read_spec(file: Path) -> VitSpec:
    """A model spec from a JSON file.

    Raises:
        InputError: the file is missing, or is no spec.
    """
    try:
        return VitSpec.from_json(json.loads(file.read_text("utf-8")))
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}.") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is not JSON ({error}).") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def with_classes(
    spec: VitSpec,
    tensors: Mapping[str, npt.NDArray[Any]] | None,
    known: Sequence[str] | None,
    wanted: Sequence[str],
) -> tuple[VitSpec, Mapping[str, npt.NDArray[Any]] | None]:
    """Spec and weights for other classes: a head of others is left out.

    Args:
        known: names of the head's classes, where the checkpoint says them.
        wanted: names of the data's classes.
    """
    same = tuple(known) == tuple(wanted) if known else spec.classes == len(wanted)
    if same:
        return spec, tensors
    spec = dataclasses.replace(spec, classes=len(wanted))
    if tensors is not None:
        tensors = {n: t for n, t in tensors.items() if not n.startswith(("head.", "head_dist."))}
    return spec, tensors
