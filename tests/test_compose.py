"""The segmentation set that is composed: its masks are where its objects are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

RECIPE = Path(__file__).parent.parent / "recipes" / "segmentation"


@pytest.fixture
def compose() -> Iterator[Any]:
    sys.path.insert(0, str(RECIPE))
    try:
        import compose

        yield compose
    finally:
        sys.path.remove(str(RECIPE))


@pytest.fixture
def data(tmp_path: Path, compose: Any) -> Path:
    """White objects, and black to lay them on."""
    folders = [name for thing in compose.THINGS for name in thing.folders]
    for split in ("train", "test"):
        for folder in (*folders, "tiny-imagenet/black"):
            dataset, _, label = folder.partition("/")
            place = tmp_path / dataset / split / label
            place.mkdir(parents=True)
            grey = 0 if label == "black" else 255
            Image.new("RGB", (32, 32), (grey,) * 3).save(place / "0.png")
    return tmp_path


def run(compose: Any, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    options = ("--train", "6", "--test", "2", "--side", "48")
    monkeypatch.setattr(sys, "argv", ["compose", str(data), str(out), *options])
    compose.main()
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


def test_a_set_of_two_folders(
    compose: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = run(compose, data, tmp_path / "a", monkeypatch)
    assert len(files) == 1 + 2 * (6 + 2)
    assert files == run(compose, data, tmp_path / "b", monkeypatch)
    names = (tmp_path / "a" / "classes.txt").read_text().splitlines()
    assert names[0] == "background"
    assert len(names) == len(compose.THINGS) + 1 > 10
    seen: set[int] = set()
    for file in (tmp_path / "a" / "train" / "masks").iterdir():
        mask = np.asarray(Image.open(file))
        picture = np.asarray(Image.open(file.parent.parent / "images" / file.name))
        seen |= set(np.unique(mask).tolist())
        # Objects are white but for what turning left black at their corners, and edges are smooth.
        assert picture[mask == 0].max() < 200
        assert (picture[mask > 0] > 40).mean() > 0.9
    assert 0 in seen
    assert len(seen) > 3
    assert max(seen) < len(names)


def test_training_and_test_pictures_are_not_the_same(
    compose: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = run(compose, data, tmp_path / "a", monkeypatch)
    assert files["train/masks/00000.png"] != files["test/masks/00000.png"]


def test_pictures_that_are_missing(compose: Any, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"00: no pictures; see prepare\.py"):
        compose.Composer(tmp_path, "train", 64, 0)
