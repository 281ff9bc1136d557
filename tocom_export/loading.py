"""From what a user names to a model and its weights.

Asks timm, where that is installed, for what the package doesn't list itself; so this file, as
``exporting.py``, may look up at ``training``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .compression.checkpoint import Checkpoint
from .compression.metadata import ModelInfo
from .errors import CheckpointError, InputError, UnknownModelError, UnsupportedModelError
from .image_size import resize
from .model.catalogue import REFERENCE, REFERENCE_CHECKPOINT, is_known, known_model
from .model.from_tensors import fit_spec
from .model.from_timm import preprocess_from_cfg, spec_from_timm
from .model.hub import find_folder, names_folder
from .model.huggingface.files import CONFIG
from .model.huggingface.preprocessor import has_preprocessor
from .model.preprocess import Preprocess
from .model.spec import Pool, VitSpec

_IMAGENET = "ImageNet's, as nothing says which"


@dataclass(frozen=True)
class Model:
    """A model's architecture, its weights, and how its images are prepared."""

    spec: VitSpec
    checkpoint: Checkpoint
    preprocess: Preprocess
    preprocess_from: str = _IMAGENET
    """Where the image statistics are from, for people."""
    resampled: str = ""
    """That its positions are for another image size than it was trained at, for people."""


def is_installed(*packages: str) -> bool:
    """Whether all of these can be imported, without importing them."""
    try:
        return all(importlib.util.find_spec(package) for package in packages)
    except ModuleNotFoundError:  # of a dotted name, the outer package
        return False


def load_spec(model: str) -> tuple[VitSpec, Preprocess]:
    """Spec and image statistics of a model name; asks timm for one that we don't list.

    Args:
        model: also ``local-dir:PATH`` and ``hf-hub:OWNER/NAME``, as timm calls models in folders.

    Raises:
        UnknownModelError, UnsupportedModelError: no such model, or one that can't be expressed.
    """
    if model == REFERENCE:
        info = Checkpoint.open(REFERENCE_CHECKPOINT).info
        if info.spec is None or info.preprocess is None:
            raise InputError(f"{REFERENCE_CHECKPOINT} has lost its metadata; install again.")
        return info.spec, info.preprocess
    if folder := find_folder(model):
        found = load_model(checkpoint=folder)
        return found.spec, found.preprocess
    if not is_known(model) and is_installed("torch", "timm"):
        from tocom_export.training.timm_models import preprocess_of_name, spec_of_name

        return spec_of_name(model), preprocess_of_name(model)
    return known_model(model)


def load_model(
    model: str | Any | None = None,
    checkpoint: Path | str | None = None,
    *,
    weights_key: str | None = None,
    image_size: tuple[int, int] | int | None = None,
    pool: Pool | None = None,
) -> Model:
    """A model and its weights, checked against each other.

    Args:
        model: a timm model name, also ``local-dir:PATH`` and ``hf-hub:OWNER/NAME``,
            ``reference``, or a live timm model; default: what the checkpoint's metadata say, else
            ``reference``.
        checkpoint: a .safetensors, .pth, .pt, .bin or .tar file, or a folder of Hugging Face's or
            timm's; default: timm's pretrained weights, those of the live model, or those inside
            the package.
        weights_key: see :meth:`Checkpoint.open`.
        image_size: height and width, or one number for both, to which the positions of weights
            for another size are resampled; default: what the weights are for.
        pool: what the head reads, ``token`` or ``avg``; default: by the weights' last norm.

    Raises:
        InputError: they contradict each other, or one can't be opened.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if model is not None and not isinstance(model, str):
        given = {"checkpoint": checkpoint, "image_size": size, "pool": pool}
        return _load_live(model, {**given, "weights_key": weights_key})
    named = None
    if model is not None and checkpoint is not None and names_folder(model):
        raise InputError(f"`model` {model} brings its weights along; leave `checkpoint` out.")
    if model is not None and (folder := find_folder(model)):
        named, model, checkpoint = model, None, folder
    if checkpoint is None and weights_key is not None:
        raise InputError("`weights_key` names an entry of a `checkpoint`; give that, too.")
    if checkpoint is None and model not in (None, REFERENCE):
        return _load_pretrained(model, size, pool)
    opened = Checkpoint.open(checkpoint or REFERENCE_CHECKPOINT, weights_key, model=model)
    opened = _ask_timm(opened)
    info, origin = opened.info, f"by the metadata of {opened.file.name}"
    if opened.config is not None:
        file = CONFIG if opened.timm else "preprocessor"
        folder = opened.config.parent
        origin = f"by the {file} of {named or folder.absolute().name}"
        if not (opened.timm or has_preprocessor(folder)):
            origin = "transformers' for its model_type; there is no preprocessor_config.json"
    if info.spec is None:
        advice = "Does `model` say which model it is?"
        spec, preprocess = load_spec(model or REFERENCE)
        known = f"timm's for {model}" if model not in (None, REFERENCE) else "the reference model's"
        origin = origin if info.preprocess else known
        spec = fit_spec(spec, _list_shapes(opened), size, pool)
    else:
        said = f"Its {CONFIG} says" if opened.config else "Its metadata say"
        advice = f"{said} that it is {info.spec.model}; save it again."
        spec, preprocess = _check_metadata(info.spec, model, pool, opened.file), Preprocess()
        if info.preprocess is None:
            origin = _IMAGENET
            if is_known(spec.model):
                preprocess, origin = known_model(spec.model)[1], f"timm's for {spec.model}"
    spec, opened, told = resize(spec, opened, size)
    return Model(opened.check(spec, advice), opened, info.preprocess or preprocess, origin, told)


def _ask_timm(opened: Checkpoint) -> Checkpoint:
    """With the spec of an architecture that we don't list, in a folder of timm's."""
    found = opened.timm
    if found is None or opened.info.spec is not None:
        return opened
    try:
        known = load_spec(found.architecture)[0]
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{found.folder} ({found.architecture})", error.part) from None
    except UnknownModelError:
        which = "a newer timm" if is_installed("torch", "timm") else "timm, where it is installed,"
        raise CheckpointError(
            f"{found.folder / CONFIG}: no architecture {found.architecture!r} is known; {which} "
            "may know it."
        ) from None
    return replace(opened, info=replace(opened.info, spec=found.make_spec(known)))


def _list_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def _check_metadata(spec: VitSpec, model: str | None, pool: Pool | None, file: Path) -> VitSpec:
    """The spec in a file's metadata, once nothing that is given says otherwise."""
    said = {
        "model": (model and model.split(".")[0], spec.model, model),
        "pool": (pool, spec.pool, pool),
    }
    for name, (given, known, shown) in said.items():
        if given and given != known:
            raise InputError(
                f"`{name}` {shown}, but {file} says it is {known}; leave `{name}` out."
            )
    return spec


def _load_pretrained(name: str, size: tuple[int, int] | None, pool: Pool | None) -> Model:
    spec, preprocess = load_spec(name)
    if not is_installed("torch", "timm"):
        raise InputError(
            f"`model` {name}: give its weights with `checkpoint`; downloading timm's pretrained "
            "ones needs torch and timm (pip install 'tocom-export[torch]')."
        )
    from tocom_export.training.timm_models import pretrained_tensors

    opened = Checkpoint(Path(name), pretrained_tensors(name), ModelInfo())
    spec = fit_spec(spec, _list_shapes(opened), size, pool)
    spec, opened, told = resize(spec, opened, size)
    return Model(opened.check(spec), opened, preprocess, f"timm's for {name}", told)


def _load_live(vit: Any, given: Mapping[str, Any]) -> Model:
    """A timm model as it stands in memory, to which nothing needs to be added."""
    if told := next((name for name, value in given.items() if value is not None), None):
        raise InputError(f"`{told}`: a live model has its weights and its form; change it itself.")
    spec = spec_from_timm(vit)
    state = vit.state_dict().items()  # copied, so that the model may go on training
    tensors = {name: np.array(t.detach().float().cpu().numpy()) for name, t in state}
    opened = Checkpoint(Path(spec.model), tensors, ModelInfo())
    cfg = getattr(vit, "pretrained_cfg", None) or {}
    origin = f"timm's for {spec.model}" if cfg.get("mean") else _IMAGENET
    return Model(opened.check(spec), opened, preprocess_from_cfg(cfg), origin)
