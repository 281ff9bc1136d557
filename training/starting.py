"""What fine-tuning starts from, made ready for other classes, another image size, or adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo
from tocom_export.compression.method import Method
from tocom_export.errors import InputError
from tocom_export.io.json_codec import decode, read_json
from tocom_export.loading import Model, load_spec
from tocom_export.model.catalogue import REFERENCE
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.resizing import resize_positions
from tocom_export.model.spec import VitSpec
from tocom_export.model.weight_names import HEADS

from .adaptformer import add_adapters, freeze_all_but_adapters
from .building import vit_from_spec
from .model import CompressedVit
from .torch_engine import load_weights


def start_at_random(model: str | None, image_size: tuple[int, int] | None = None) -> Model:
    """A model by its name, or by a .json file with its spec, that has no weights.

    Args:
        image_size: height and width, pixels; default: the model's.
    """
    name = model or REFERENCE
    known = (_read_spec(Path(name)), Preprocess()) if name.endswith(".json") else load_spec(name)
    spec = resize_positions(known[0], {}, image_size)[0] if image_size else known[0]
    return Model(spec, Checkpoint(Path(name), {}, ModelInfo()), known[1])


def _read_spec(file: Path) -> VitSpec:
    try:
        return decode(VitSpec, read_json(file, 1_000_000))
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}.") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def change_classes(model: Model, wanted: Sequence[str]) -> Model:
    """For other classes: a head of others is left out, and starts at random."""
    known, tensors = model.checkpoint.info.classes, model.checkpoint.tensors
    if tuple(known) == tuple(wanted) if known else model.spec.classes == len(wanted):
        return model
    kept = {n: t for n, t in tensors.items() if not n.startswith(HEADS)}
    spec = replace(model.spec, classes=len(wanted), projection=0)
    return replace(model, spec=spec, checkpoint=replace(model.checkpoint, tensors=kept))


def make_network(
    model: Model, method: Method, drop_path: float, adapter: tuple[int, float] | None = None
) -> CompressedVit:
    """The model to train; weights that it doesn't have start at random.

    Args:
        drop_path: stochastic depth of the last layer.
        adapter: width and scale of AdaptFormer's branches, which then are trained alone
            with the head; None trains all weights.
    """
    vit = vit_from_spec(model.spec, drop_path)
    load_weights(vit, model.checkpoint.tensors)
    if adapter:
        add_adapters(vit, *adapter)
        freeze_all_but_adapters(vit)
    return CompressedVit(vit, method, model.spec.model)
