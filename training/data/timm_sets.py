"""Data sets that timm opens by name: torchvision's as torch/..., Hugging Face's as hfds/..."""

from __future__ import annotations

import operator
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from tocom_export.errors import DataError, brief

from .images import UnreadableImage, decode

_STREAMS = ("tfds", "hfids", "wds")


def is_timm_set(data: str) -> bool:
    """Whether ``data`` begins as timm's names do."""
    prefix, slash, _ = data.partition("/")
    return bool(slash) and prefix.lower() in ("torch", "hfds", *_STREAMS)


def open_timm_set(name: str, root: Path | None, split: str, download: bool) -> TimmSet:
    """Open a data set by timm's name for it; ``<name>:<split>`` goes before ``split``.

    Raises:
        DataError: it can only be read in a stream, isn't there, or needs a missing package.
    """
    prefix = name.partition("/")[0].lower()
    if prefix in _STREAMS:
        instead = "the shards' folder or pattern" if prefix == "wds" else "a torch/ or hfds/ name"
        raise DataError(
            f"{name}: {prefix}/ sets are read as a stream, and a run on one can't be "
            f"resumed exactly; give {instead} instead."
        )
    if prefix == "hfds":
        try:
            import_module("datasets")  # timm would print on the standard output first
        except ImportError:
            raise DataError(
                f"{name}: datasets is not installed; pip install datasets brings it."
            ) from None
    elif root is None:
        raise DataError(f"{name}: name the folder that it lies in with --data-root.")
    place = None if root is None else str(root)
    short, _, part = name.partition(":")
    split = part or split
    try:
        found = create_dataset(short, root=place, split=split, download=download)
    except Exception as error:  # each set has its own for "not there" and "not known"
        hint = "" if download else " --download fetches it where that is possible."
        raise DataError(
            f"{name}: split {split} can't be opened in --data-root {place} ({brief(error)}).{hint}"
        ) from None
    return TimmSet(name, found)


class TimmSet:
    """A map-style data set of torchvision, or of Hugging Face through timm's reader.

    Raises:
        DataError: it doesn't name its classes.
    """

    def __init__(self, name: str, found: Any) -> None:
        self.name = name
        self.classes = _class_names(found)
        # timm's own access replaces an unreadable image without saying so; its reader doesn't.
        self._reader = getattr(found, "reader", None)
        self._found = found
        if not self.classes:
            raise DataError(f"{name}: the set doesn't name its classes.")

    def __len__(self) -> int:
        return len(self._found)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """One image (RGB) and its label.

        Raises:
            UnreadableImage: this one can't be read.
            DataError: its label isn't the number of a class.
        """
        try:
            image, target = (self._reader or self._found)[index]
        except Exception:  # whatever the library that reads it raises
            raise UnreadableImage(f"{self.where(index)}: can't be read.") from None
        if isinstance(image, Image.Image):
            image = image.convert("RGB")
        else:
            with image:
                image = decode(image, lambda: self.where(index))
        try:
            label = operator.index(target)
        except TypeError:
            label = -1
        if not 0 <= label < len(self.classes):
            raise DataError(
                f"{self.where(index)} has label {target!r:.40}, not one of "
                f"{len(self.classes)} classes; a split without labels can't be used."
            )
        return image, label

    def where(self, index: int) -> str:
        """The set and the image's place in it, or its path."""
        samples = getattr(self._found, "samples", None)
        return str(samples[index][0]) if samples else f"{self.name}: image {index}"


def _class_names(found: Any) -> tuple[str, ...]:
    """Names in the order of the labels; numbers where only labels are known; else none."""
    names = getattr(found, "classes", None) or getattr(found, "all_categories", None)
    if names:  # ImageNet has a tuple of synonyms for each
        return tuple(", ".join(n) if isinstance(n, tuple) else str(n) for n in names)
    known = getattr(getattr(found, "reader", found), "class_to_idx", None)
    if known:
        return tuple(sorted(known, key=known.__getitem__))
    targets = getattr(found, "targets", None)
    if targets is not None and len(targets):
        return tuple(map(str, range(int(max(targets)) + 1)))
    return ()
