"""Where labelled images come from: a folder, WebDataset shards, or a set that timm names."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from PIL import Image
from torchvision.datasets import ImageFolder

from tocom_export.errors import DataError, brief

from .images import decode
from .shards import Shards, is_shards
from .timm_sets import is_timm_set, open_timm_set


class LabelledImages(Protocol):
    """Images that can be read in any order, each with the number of its class.

    Worker processes get a copy, by fork or by pickle, so nothing in it may stay open.
    """

    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    name: str
    """What was opened, for messages."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """One image (RGB) and its label.

        Raises:
            UnreadableImage: this one can't be read.
        """
        ...

    def where(self, index: int) -> str:
        """Name one image, for messages."""
        ...


def open_images(
    data: str | Path, *, root: Path | None = None, split: str = "train", download: bool = False
) -> LabelledImages:
    """Open labelled images; a path that exists is taken before a name of timm's.

    Args:
        data: a folder ``<folder>/<class>/<image>``; a folder, a file or a pattern of WebDataset
            shards (``shards/train-{000..146}.tar``, ``shards/*.tar``); or ``torch/<name>`` or
            ``hfds/<name>`` as timm reads them, with ``:<split>`` after it where need be.
        root: where a set by name lies, or is downloaded to.
        split: which part of a set by name that doesn't say it.
        download: fetch a ``torch/`` set that isn't there. ``hfds/`` sets are fetched anyway.

    Raises:
        DataError: they can't be opened, or have fewer than two classes.
    """
    text, path = str(data), Path(data)
    images: LabelledImages
    if not path.exists() and is_timm_set(text):
        images = open_timm_set(text, root, split, download)
    elif is_shards(text):
        images = Shards(text)
    else:
        images = Folder(path)
    if len(images.classes) < 2:
        only = repr(images.classes[0]) if images.classes else "none"
        raise DataError(
            f"{text}: one class only ({only}), with nothing to tell it from. Is this the folder "
            "of the class folders?"
        )
    return images


class Folder:
    """An ImageFolder, ``<folder>/<class>/<image>``; classes in the order of their names.

    Raises:
        DataError: there is no such folder, or a class without images.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            raise DataError(
                f"{folder}: no such folder. It takes <folder>/<class>/<image>, shards "
                "(*.tar), or a name like torch/cifar10."
            )
        try:
            found = ImageFolder(str(folder))
        except (OSError, ValueError) as error:
            folders = [p for p in sorted(folder.glob("*")) if p.is_dir()]
            empty = [p.name for p in folders if not any(p.iterdir())]
            what = f"its class {empty[0]!r} is empty" if empty else brief(error)
            raise DataError(
                f"{folder}: not images as <folder>/<class>/<image> throughout ({what})."
            ) from None
        self.name = str(folder)
        self.classes: tuple[str, ...] = tuple(found.classes)
        self._samples: list[tuple[str, int]] = found.samples

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """One image (RGB) and its label."""
        path, label = self._samples[index]
        return decode(Path(path), lambda: path), label

    def where(self, index: int) -> str:
        """The image's path."""
        return self._samples[index][0]
