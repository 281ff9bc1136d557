"""Pictures of which patches became one token."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tocom_export.engines.merge_picture import (
    Panel,
    colour_tokens,
    draw_png,
    draw_svg,
    find_borders,
    restore_pixels,
    write_picture,
)
from tocom_export.errors import OutputError
from tocom_export.model.preprocess import Preprocess

GRID = (2, 3)
MAP = np.array([0, 0, 1, 2, -1, 1], np.int32)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def pixels() -> Any:
    """Six patches of 8×8, each of one grey, 0 to 250."""
    greys = np.arange(6, dtype=np.uint8).reshape(GRID) * 50
    wide = np.kron(greys, np.ones((8, 8), np.uint8))
    return np.repeat(wide[..., None], 3, axis=2)


def test_a_token_has_the_mean_colour_of_its_patches(pixels: Any):
    colours = colour_tokens(pixels, MAP, GRID)
    assert colours[..., 0].tolist() == [[25, 25, 175], [150, 24, 175]]
    assert colours.shape == (2, 3, 3)


def test_lines_run_between_tokens():
    below, beside = find_borders(MAP, GRID)
    assert below.tolist() == [[True, True, False]]
    assert beside.tolist() == [[False, True], [True, True]]


def test_png_shows_the_image_and_each_panel(pixels: Any):
    sheet = np.asarray(draw_png(pixels, [Panel("one", MAP), Panel("two", MAP * 0)], GRID))
    side = 336 // 2
    assert sheet.shape == (22 + 336, 3 * 3 * side + 2 * 12, 3)
    heads = sheet[:22]
    for place in range(3):  # its title, dark on white
        head = heads[:, place * (3 * side + 12) :][:, : 3 * side]
        assert head.min() < 100 < 250 < head.max()
    sheet = sheet[22:]
    second = sheet[:, 3 * side + 12 :]
    assert second[side // 2, side // 2].tolist() == [25, 25, 25]
    assert second[side + side // 2, side + side // 2].tolist() == [24, 24, 24]
    assert second[side // 2, 2 * side].tolist() == [255, 255, 255], "a line between tokens"
    third = sheet[:, 6 * side + 24 :]
    assert np.unique(third).tolist() == [125], "one token, and no line"


def test_more_panels_than_four_go_below(pixels: Any):
    sheet = draw_png(pixels, [Panel(str(n), MAP) for n in range(5)], GRID)
    assert sheet.size == (4 * 504 + 36, 2 * (22 + 336) + 12)


def test_svg_holds_the_same(pixels: Any):
    root = ElementTree.fromstring(draw_svg(pixels, [Panel("layer 2: 4 tokens", MAP)], GRID))
    fills = [rect.get("fill") for rect in root.iter(f"{SVG}rect")]
    assert fills == ["#191919", "#191919", "#afafaf", "#969696", "#181818", "#afafaf"]
    assert [text.text for text in root.iter(f"{SVG}text")] == ["image", "layer 2: 4 tokens"]
    (path,) = root.iter(f"{SVG}path")
    assert str(path.get("d")).count("M") == 5


def test_pixels_come_back_from_normalised_ones():
    statistics = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(seen).save(buffer, "PNG")
    buffer.seek(0)
    assert np.array_equal(restore_pixels(statistics.load(buffer, (8, 8)), statistics), seen)
    grey = restore_pixels(np.zeros((1, 4, 4), np.float32), Preprocess((0.5,), (0.5,)))
    assert grey.shape == (4, 4, 3)


def test_the_file_is_one_of_two_kinds(pixels: Any, tmp_path: Path):
    write_picture(tmp_path / "a.png", pixels, [Panel("one", MAP)], GRID)
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.format == "PNG"
    write_picture(tmp_path / "a.SVG", pixels, [Panel("one", MAP)], GRID)
    assert (tmp_path / "a.SVG").read_text().startswith("<svg")
    with pytest.raises(OutputError, match=r"`out` .*a\.jpg: \.png and \.svg"):
        write_picture(tmp_path / "a.jpg", pixels, [], GRID)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.SVG", "a.png"]
