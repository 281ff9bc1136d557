"""A segmentation set with exact masks: objects cut out of pictures and laid on others.

python recipes/segmentation/compose.py DATA OUT [--train 5000] [--test 1000] [--side 64] [--seed 0]

DATA is what recipes/reference/prepare.py makes: objects come from gtsrb, caltech101 and imagenette,
what lies behind them from tiny-imagenet; those of the test pictures from the test splits. Writes

    OUT/classes.txt                  a name a line; the first is the background
    OUT/{train,test}/images/N.png    pictures
    OUT/{train,test}/masks/N.png     the class of each pixel, as an index into a palette

One to four objects a picture, each turned, scaled and mirrored at random, later ones in front. The
same seed makes the same set.
"""

from __future__ import annotations

import argparse
import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.progress import track

FINE = 4
"""An outline is drawn so many times as large, so that it can be smooth."""
MOST = 4
BACKGROUND = "background"


@dataclass(frozen=True)
class Thing:
    """A class of objects, and what is cut out of a picture of one."""

    name: str
    folders: tuple[str, ...]
    """Of the data sets' class folders, ``<set>/<class>``."""
    corners: int
    """Of the outline: a polygon's, or 0 for an ellipse."""
    turn: float = 0.0
    """Of the first corner, in degrees from straight up."""
    width: float = 0.8
    """Of the outline, as a share of the picture; likewise ``height``."""
    height: float = 0.8
    mirrored: bool = True


def _signs(*numbers: int) -> tuple[str, ...]:
    return tuple(f"gtsrb/{number:02d}" for number in numbers)


THINGS = (
    Thing("speed limit", _signs(*range(9)), 0, mirrored=False),
    Thing("no passing", _signs(9, 10), 0, mirrored=False),
    Thing("danger", _signs(*range(18, 32)), 3, width=0.9, height=0.9, mirrored=False),
    Thing("yield", _signs(13), 3, turn=180, width=0.9, height=0.9),
    Thing("priority", _signs(12), 4, width=0.9, height=0.9),
    Thing("stop", _signs(14), 8, turn=22.5, mirrored=False),
    Thing("mandatory", _signs(*range(33, 41)), 0, mirrored=False),
    Thing("airplane", ("caltech101/airplanes",), 0, width=0.98, height=0.6),
    Thing("face", ("caltech101/Faces_easy",), 0, width=0.75, height=0.95),
    Thing("motorbike", ("caltech101/Motorbikes",), 0, width=0.98, height=0.8),
    Thing("garbage truck", ("imagenette/garbage truck",), 4, turn=45, width=1.2, height=1.1),
    Thing("parachute", ("imagenette/parachute",), 0, width=0.95, height=0.95),
    Thing("gas pump", ("imagenette/gas pump",), 4, turn=45, width=0.9, height=1.3),
    Thing("church", ("imagenette/church",), 5, width=1.0, height=1.0),
)


def draw_outline(thing: Thing, side: int) -> Image.Image:
    """What belongs to the object, white, in a picture of so many pixels a side."""
    large = Image.new("L", (side * FINE, side * FINE))
    draw, middle = ImageDraw.Draw(large), side * FINE / 2
    across, up = middle * thing.width, middle * thing.height
    if thing.corners:
        angles = [math.radians(thing.turn + 360 * n / thing.corners) for n in range(thing.corners)]
        points = [(middle + across * math.sin(a), middle - up * math.cos(a)) for a in angles]
        draw.polygon(points, fill=255)
    else:
        draw.ellipse((middle - across, middle - up, middle + across, middle + up), fill=255)
    return large.resize((side, side), Image.Resampling.BOX)


class Composer:
    """Makes pictures of one split.

    Args:
        data: with the data sets' folders.
        split: train or test.
        side: pixels of a picture.
    """

    def __init__(self, data: Path, split: str, side: int, seed: int) -> None:
        self.side, self._key = side, (seed, ("train", "test").index(split))
        self._behind = sorted((data / "tiny-imagenet" / split).glob("*/*"))
        self._objects = [
            sorted(file for name in thing.folders for file in self._list(data, name, split))
            for thing in THINGS
        ]

    @staticmethod
    def _list(data: Path, name: str, split: str) -> Sequence[Path]:
        dataset, _, label = name.partition("/")
        found = list((data / dataset / split / label).glob("*"))
        if not found:
            raise SystemExit(f"{data / dataset / split / label}: no pictures; see prepare.py.")
        return found

    def compose(self, number: int) -> tuple[Image.Image, Image.Image]:
        """A picture (RGB) and its mask (L, the class of each pixel)."""
        dice = np.random.default_rng((*self._key, number))
        behind = Image.open(self._behind[dice.integers(len(self._behind))]).convert("RGB")
        picture = behind.resize((self.side, self.side), Image.Resampling.BICUBIC)
        mask = Image.new("L", picture.size)
        for _ in range(dice.integers(1, MOST + 1)):
            kind = int(dice.integers(len(THINGS)))
            files = self._objects[kind]
            own = Image.open(files[dice.integers(len(files))]).convert("RGB")
            self._lay(picture, mask, own, kind, dice)
        return picture, mask

    def _lay(
        self, picture: Image.Image, mask: Image.Image, own: Image.Image, kind: int,
        dice: np.random.Generator,
    ) -> None:  # fmt: skip
        """Put one object in front of what there is."""
        size = int(self.side * dice.uniform(0.25, 0.6))
        own = own.resize((size, size), Image.Resampling.BICUBIC)
        outline = draw_outline(THINGS[kind], size)
        if THINGS[kind].mirrored and dice.random() < 0.5:
            own = own.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        angle = float(dice.uniform(-20, 20))
        own = own.rotate(angle, Image.Resampling.BICUBIC)
        outline = outline.rotate(angle, Image.Resampling.BICUBIC)
        light = float(dice.uniform(0.7, 1.2))
        own = own.point(lambda value: min(255, round(value * light)))
        place = tuple(int(dice.integers(-size // 4, self.side - 3 * size // 4)) for _ in range(2))
        picture.paste(own, place, outline)
        mask.paste(kind + 1, place, outline.point(lambda value: 255 * (value > 127)))


def list_colours() -> list[int]:
    """Red, green and blue of each class, one after the other: black, then all round the circle."""
    hues = [colorsys.hsv_to_rgb(n / len(THINGS), 0.75, 0.95) for n in range(len(THINGS))]
    return [0, 0, 0, *(round(255 * value) for hue in hues for value in hue)]


def main() -> None:
    """Write the set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in (("train", 5000), ("test", 1000), ("side", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    for split in ("train", "test"):
        composer = Composer(options.data, split, options.side, options.seed)
        for part in ("images", "masks"):
            (options.out / split / part).mkdir(parents=True, exist_ok=True)
        for number in track(range(getattr(options, split)), split):
            picture, mask = composer.compose(number)
            picture.save(options.out / split / "images" / f"{number:05d}.png")
            mask.putpalette(list_colours())
            mask.save(options.out / split / "masks" / f"{number:05d}.png")
    names = [BACKGROUND, *(thing.name for thing in THINGS)]
    (options.out / "classes.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")


if __name__ == "__main__":
    main()
