"""Opening images to train on: a folder, WebDataset shards, or a data set that timm names."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import DatasetFolder

from tocom_export.errors import DataError, brief
from tocom_export.model.image_files import SUFFIXES, decode_image

from .images import LabelledImages
from .loose_images import LooseImages
from .shards import Shards, is_shards
from .timm_sets import MapDataset, is_timm_set, open_timm_set


def open_images(
    data: str | Path,
    *,
    data_root: Path | None = None,
    split: str = "train",
    download: bool = False,
    labels: bool = True,
) -> LabelledImages:
    """Open labelled images; a path that exists is taken before a name of timm's.

    Args:
        data: a folder ``<folder>/<class>/<image>``; a folder, a file or a pattern of WebDataset
            shards (``shards/train-{000..146}.tar``, ``shards/*.tar``); or ``torch/<name>`` or
            ``hfds/<name>`` as timm reads them, with ``:<split>`` after it where need be.
        data_root: the folder that a set by name lies in, or is downloaded to.
        split: which part of a set by name that doesn't say it.
        download: fetch a ``torch/`` set that isn't there. ``hfds/`` sets are fetched anyway.
        labels: whether they are wanted; else a folder may also hold images as they come.

    Raises:
        DataError: they can't be opened, or have fewer than two classes where labels are wanted.
    """
    text, path = str(data), Path(data)
    images: LabelledImages
    if not labels and path.is_dir() and not is_shards(text):
        return LooseImages(path)
    if not path.exists() and is_timm_set(text):
        images = open_timm_set(text, data_root, split, download)
    elif is_shards(text):
        images = Shards(text)
    else:
        images = _open_folder(path)
    if labels and len(images.classes) < 2:
        only = repr(images.classes[0]) if images.classes else "none"
        raise DataError(
            f"{text}: one class only ({only}), but two or more are needed. Is this the folder of "
            "the class folders?"
        )
    return images


def _open_folder(folder: Path) -> MapDataset:
    """A folder for each class, in the order of their names."""
    if not folder.exists():
        raise DataError(
            f"{folder}: no such folder. Give a folder <folder>/<class>/<image>, shards "
            "(*.tar), or a name like torch/cifar10."
        )
    try:
        return MapDataset(str(folder), DatasetFolder(str(folder), decode_image, SUFFIXES))
    except (OSError, ValueError) as error:
        classes = [path for path in sorted(folder.glob("*")) if path.is_dir()]
        empty = [path.name for path in classes if not any(path.iterdir())]
        what = f"its class {empty[0]!r} is empty" if empty else brief(error)
        raise DataError(
            f"{folder}: not images as <folder>/<class>/<image> throughout ({what})."
        ) from None


def name_data(data: str) -> str:
    """A data set's name from where it lies: ``cifar10`` of ``data/cifar10/test``."""
    parts = [p for p in Path(data.split(":")[0]).parts if p not in ("test", "val", "validation")]
    return parts[-1] if parts else data


def name_voters(data: str) -> str:
    """What rows call the images that voted: ``cifar10/train`` of ``data/cifar10/train``."""
    path = Path(data)
    if not path.exists() and is_timm_set(data):
        return data
    return "/".join(path.resolve().parts[-2:])
