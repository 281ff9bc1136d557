"""``hf-hub:OWNER/NAME`` and ``local-dir:PATH``: names that timm gives to models in folders."""

from __future__ import annotations

import logging
from pathlib import Path

from ..errors import CheckpointError, MissingPackageError, UnknownModelError, brief
from .huggingface.files import CONFIG, INDEX, PICKLED, WEIGHTS

_FILES = (
    CONFIG, "preprocessor_config.json", "processor_config.json", WEIGHTS, INDEX,
    "model-*-of-*.safetensors",
)  # fmt: skip


def names_folder(model: str) -> bool:
    """Whether a name is of this form."""
    source, _, place = model.partition(":")
    return source.lower().replace("_", "-") in ("hf-hub", "local-dir") and bool(place)


def find_folder(model: str) -> Path | None:
    """The folder that a name stands for, downloaded if need be; None for any other name.

    Raises:
        UnknownModelError: a name of this form that stands for nothing.
        CheckpointError: it can't be downloaded.
        MissingPackageError: huggingface_hub, which comes with timm, is not installed.
    """
    source, colon, place = model.partition(":")
    if not colon:
        if "/" in model and Path(model).is_dir():
            raise UnknownModelError(
                f"`model` {model} is a folder; give it as `checkpoint`, without `model`."
            )
        if "/" in model:
            raise UnknownModelError(
                f"`model` {model}: hf-hub:{model} is a model of the Hugging Face hub, "
                f"local-dir:{model} a folder."
            )
        return None
    if not names_folder(model):
        raise UnknownModelError(
            f"`model` {model}: hf-hub:OWNER/NAME and local-dir:PATH are known, and timm's names."
        )
    return _download(model, place) if source.lower().startswith("hf") else Path(place)


def _download(model: str, place: str) -> Path:
    """The hub's folder, as far as we read it, in the hub's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        package = f"huggingface_hub, which downloads `model` {model},"
        raise MissingPackageError(package, "torch") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each retry
    name, _, revision = place.partition("@")
    reason = f"neither {WEIGHTS} nor {PICKLED} is there"
    for files in (_FILES, (*_FILES, PICKLED)):  # pickled weights only where there are no others
        try:
            found = snapshot_download(name, revision=revision or None, allow_patterns=list(files))
        except Exception as error:  # hub, network and cache errors share no base class
            reason = brief(error)
            break
        folder = Path(found)
        if any((folder / weights).exists() for weights in (WEIGHTS, INDEX, PICKLED)):
            return folder
    raise CheckpointError(
        f"`model` {model} can't be downloaded ({reason.rstrip('.')}). Offline, give a folder with "
        f"its {CONFIG} and {WEIGHTS} as `checkpoint`: 'hf download {name}' makes one elsewhere."
    )
