"""Data sets that timm opens by name: torchvision's as torch/..., Hugging Face's as hfds/..."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from tocom_export.errors import DataError, brief
from tocom_export.model.image_files import convert_image, decode_image

from .images import name_unreadable

_STREAMS = ("tfds", "hfids", "wds")


def is_timm_set(data: str) -> bool:
    """Whether ``data`` begins as timm's names do."""
    prefix, slash, _ = data.partition("/")
    return bool(slash) and prefix.lower() in ("torch", "hfds", *_STREAMS)


def open_timm_set(name: str, data_root: Path | None, split: str, download: bool) -> MapDataset:
    """Open a data set by timm's name for it; ``<name>:<split>`` goes before ``split``.

    What is opened is called by the split that it is, whatever that was asked for as.
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
            missing = "datasets is not installed; pip install datasets brings it"
            raise DataError(f"{name}: {missing}.") from None
    elif data_root is None:
        raise DataError(f"{name}: name the folder that it lies in with `data_root`.")
    place = None if data_root is None else str(data_root)
    short, _, named = name.partition(":")
    split = named or split
    try:
        found = create_dataset(short, root=place, split=split, download=download)
    except Exception as error:  # each set has its own for "not there" and "not known"
        hint = "" if download else " `download` fetches it where that is possible."
        raise DataError(
            f"{name}: split {split} can't be opened in `data_root` {place} ({brief(error)}).{hint}"
        ) from None
    return MapDataset(_name_split(short, found, place, split), found)


def _name_split(name: str, found: Any, place: str | None, split: str) -> str:
    """``torch/cifar10:test``, though ``val`` was asked for; without a split where it has none.

    torchvision takes other words for a split, too, and whatever it doesn't know for the test split.
    """
    prefix, _, rest = name.partition("/")
    if prefix.lower() == "hfds":
        return f"hfds/{rest}:{split}"
    if isinstance(trained := getattr(found, "train", None), bool):
        split = "train" if trained else "test"
    elif known := getattr(found, "split", None) or getattr(found, "version", None):
        split = str(known)
    elif root := getattr(found, "root", None):  # of class folders, with splits around them or not
        split = "" if Path(root) == Path(place or "") else Path(root).name
    return f"torch/{rest.lower()}" + (f":{split}" if split else "")


class MapDataset:
    """A map-style data set of torchvision, or of Hugging Face through timm's reader."""

    def __init__(self, name: str, found: Any) -> None:
        self.name = name
        self.classes = _find_class_names(found)
        # timm's own access replaces an unreadable image without saying so; its reader doesn't.
        self._reader = getattr(found, "reader", None)
        self._found = found
        if hasattr(found, "loader"):  # torchvision's turns 16 bits into white, and no image upright
            found.loader = decode_image
        if not self.classes:
            raise DataError(f"{name}: the set doesn't name its classes.")

    def __len__(self) -> int:
        return len(self._found)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """One upright image (RGB) and its label.

        Raises:
            DataError: its label isn't the number of a class.
        """
        with name_unreadable(self, index):
            image, target = (self._reader or self._found)[index]
            if isinstance(image, Image.Image):
                image = convert_image(image)
            else:
                with image:
                    image = decode_image(image)
        if target not in range(len(self.classes)):
            raise DataError(
                f"{self.where(index)} has label {target!r:.40}, not one of "
                f"{len(self.classes)} classes; a split without labels can't be used."
            )
        return image, int(target)

    def where(self, index: int) -> str:
        """The set and the image's place in it, or its path."""
        samples = getattr(self._found, "samples", None)
        return str(samples[index][0]) if samples else f"{self.name}: image {index}"


def _find_class_names(found: Any) -> tuple[str, ...]:
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
