"""``preprocessor_config.json`` → how images are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, InputError
from ...io.json_codec import decode
from ..preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from .files import read_record

_FILE, _WHOLE = "preprocessor_config.json", "processor_config.json"
_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_UNSAID: dict[str, tuple[tuple[float, ...], tuple[float, ...], int]] = {
    "vit": (_HALF, _HALF, 2), "siglip": (_HALF, _HALF, 3), "clip": (_CLIP_MEAN, _CLIP_STD, 3),
    "beit": (_HALF, _HALF, 3), "data2vec-vision": (_HALF, _HALF, 3),
    "dinov3_vit": (IMAGENET_MEAN, IMAGENET_STD, 2),
}  # fmt: skip
"""model_type → mean, std and resample where the file doesn't say."""
_SQUASH: Mapping[str, Any] = {"size": {"height": 224}}
_ABSENT: dict[str, Mapping[str, Any]] = {
    "vit": _SQUASH, "siglip": _SQUASH, "dinov3_vit": _SQUASH,
    "clip": {"size": {"shortest_edge": 224}},
}  # fmt: skip
"""model_type → what transformers' own processor of it does where a folder has no file."""
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


def has_preprocessor(folder: Path) -> bool:
    """Whether a folder says how its images are prepared."""
    return (folder / _FILE).exists() or (folder / _WHOLE).exists()


def read_preprocess(folder: Path, kind: str) -> Preprocess | None:
    """The image statistics of a folder, or of its ``model_type``; None where nothing says them.

    Raises:
        CheckpointError: they can't be read, or ask for what we don't do.
    """
    file = folder / _FILE
    if file.exists():
        said: Any = read_record(file)
    elif (folder / _WHOLE).exists():  # transformers 5 keeps an image's and a text's in one
        file = folder / _WHOLE
        said = read_record(file).get("image_processor")
    else:
        said = _ABSENT.get(kind)
    if not isinstance(said, dict):
        return None
    try:
        return _read(said, kind)
    except InputError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError):
        raise CheckpointError(f"{file}: a size, mean or std can't be read.") from None


def _read(said: Mapping[str, Any], kind: str) -> Preprocess:
    mean, std, resample = _UNSAID.get(kind, (IMAGENET_MEAN, IMAGENET_STD, 3))
    given = said.get("resample")
    resample = resample if given is None else given
    if resample not in _RESAMPLE:
        raise InputError(f"resample {resample!r} is not known; 2 (bilinear) and 3 (bicubic) are.")
    mean, std = tuple(said.get("image_mean") or mean), tuple(said.get("image_std") or std)
    if said.get("do_normalize") is False:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    # We divide pixels by 255; what another factor makes of them is in the mean and the std.
    factor = 1.0 if said.get("do_rescale") is False else said.get("rescale_factor") or 1 / 255
    if abs(255 * factor - 1) > 1e-6:
        mean, std = (tuple(value / (255 * factor) for value in both) for both in (mean, std))
    crop_mode, share = _read_crop(said, kind)
    return decode(
        Preprocess,
        {
            "mean": mean,
            "std": std,
            "crop_pct": share,
            "interpolation": _RESAMPLE[resample],
            "crop_mode": crop_mode,
        },
    )


def _read_crop(said: Mapping[str, Any], kind: str) -> tuple[str, float]:
    """How an image is resized, and the share of it that the centre crop keeps."""
    size = said.get("size")
    crop = said.get("crop_size") if said.get("do_center_crop") else None
    if isinstance(crop, dict):
        crop = crop.get("height") or crop.get("shortest_edge")
    if isinstance(size, int):  # written before sizes had names
        square = crop is None or kind in ("deit", "beit", "data2vec-vision")
        size = {"height": size} if square else {"shortest_edge": size}
    size = size or {}
    side = size.get("height") or size.get("shortest_edge")
    mode = "center" if size.get("shortest_edge") else "squash"
    return mode, min(crop / side, 1.0) if crop and side else 1.0
