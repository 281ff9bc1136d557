"""Pictures of which patches of an image became one token, as ToMe's are: PNG or SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tocom_export.errors import OutputError
from tocom_export.io.atomic import replace_file
from tocom_export.model.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]
"""(H, W, 3)."""
_SIDE = 336
"""Least pixels of a picture's height."""
_GAP = 12
_HEAD, _TEXT = 22, 13
"""Pixels of a title's line, and of its letters."""
_LINE = (255, 255, 255)
_PRUNED = (24, 24, 24)


@dataclass(frozen=True)
class Panel:
    """One picture of several: the patches of a layer."""

    title: str
    map: npt.NDArray[np.int32]
    """(patches,)."""


def restore_pixels(image: npt.NDArray[np.float32], preprocess: Preprocess) -> Pixels:
    """A normalised image (C, H, W) as it was seen (H, W, 3), 8 bits."""
    mean, std = (np.asarray(v, np.float32) for v in (preprocess.mean, preprocess.std))
    pixels = image.transpose(1, 2, 0) * std + mean
    pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def colour_tokens(
    pixels: Pixels, map: npt.NDArray[np.int32], grid: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """The colour of each patch (rows, columns, 3): the mean of all pixels of its token.

    Args:
        map: token of each patch (patches,); -1 for a pruned one.
        grid: patches per column and per row.
    """
    rows, columns = grid
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    cut = pixels[: rows * height, : columns * width].astype(np.float64)
    means = cut.reshape(rows, height, columns, width, 3).mean(axis=(1, 3)).reshape(-1, 3)
    colours = np.empty((len(map), 3), np.uint8)
    for token in np.unique(map):
        of = map == token
        colours[of] = _PRUNED if token < 0 else np.rint(means[of].mean(axis=0))
    return colours.reshape(rows, columns, 3)


def find_borders(
    map: npt.NDArray[np.int32], grid: tuple[int, int]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Where two neighbours are of different tokens: below (rows - 1, columns), beside each."""
    places = map.reshape(grid)
    return places[1:] != places[:-1], places[:, 1:] != places[:, :-1]


def write_picture(
    file: Path, pixels: Pixels, panels: Sequence[Panel], grid: tuple[int, int]
) -> None:
    """The image and its panels side by side, as PNG or SVG by the file's name.

    Raises:
        OutputError: the name is of another kind, or it can't be written.
        MissingPackageError: Pillow isn't installed.
    """
    if file.suffix.lower() not in (".png", ".svg"):
        raise OutputError(f"`out` {file}: .png and .svg are written.")
    with replace_file(file) as beside:
        if file.suffix.lower() == ".png":
            draw_png(pixels, panels, grid).save(beside, "PNG")
        else:
            beside.write_text(draw_svg(pixels, panels, grid), "utf-8")


def draw_png(pixels: Pixels, panels: Sequence[Panel], grid: tuple[int, int]) -> Image.Image:
    """The picture, one panel after another, four in a row at the most, each under its title."""
    from PIL import Image, ImageDraw, ImageFont

    cell = _choose_cell(pixels, grid)
    width, height = grid[1] * cell, grid[0] * cell
    first = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    drawn = [("image", first)]
    for panel in panels:
        colours = Image.fromarray(colour_tokens(pixels, panel.map, grid))
        tile = colours.resize((width, height), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(tile)
        for line in _list_lines(panel.map, grid, cell):
            draw.line(line, fill=_LINE, width=max(1, cell // 24))
        drawn.append((panel.title, tile))
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    high = _HEAD + height + _GAP
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * high - _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    for index, (title, tile) in enumerate(drawn):
        left, top = index % columns * (width + _GAP), index // columns * high
        draw.text((left, top + 2), title, "black", font)
        sheet.paste(tile, (left, top + _HEAD))
    return sheet


def draw_svg(pixels: Pixels, panels: Sequence[Panel], grid: tuple[int, int]) -> str:
    """The same as SVG, each panel with its title above it."""
    from PIL import Image

    cell, head = _choose_cell(pixels, grid), _HEAD
    width, height = grid[1] * cell, grid[0] * cell
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    image = (
        f'<image width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
    )
    drawn = [("image", image)] + [
        (panel.title, _draw_patches(pixels, panel.map, grid, cell)) for panel in panels
    ]
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    total = (columns * (width + _GAP) - _GAP, rows * (height + head + _GAP) - _GAP)
    parts = []
    for index, (title, body) in enumerate(drawn):
        left = index % columns * (width + _GAP)
        top = index // columns * (height + head + _GAP)
        text = f'<text y="15" font-family="sans-serif" font-size="{_TEXT}">{title}</text>'
        parts.append(
            f'<g transform="translate({left},{top})">{text}'
            f'<g transform="translate(0,{head})">{body}</g></g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" '
        f'width="{total[0]}" height="{total[1]}">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _draw_patches(
    pixels: Pixels, map: npt.NDArray[np.int32], grid: tuple[int, int], cell: int
) -> str:
    colours = colour_tokens(pixels, map, grid)
    squares = [
        f'<rect x="{x * cell}" y="{y * cell}" width="{cell}" height="{cell}" '
        f'fill="#{bytes(colours[y, x]).hex()}"/>'
        for y in range(grid[0])
        for x in range(grid[1])
    ]
    lines = " ".join(f"M{x1} {y1}L{x2} {y2}" for (x1, y1), (x2, y2) in _list_lines(map, grid, cell))
    colour = bytes(_LINE).hex()
    path = f'<path d="{lines}" stroke="#{colour}" stroke-width="1.5" fill="none"/>'
    return f'<g shape-rendering="crispEdges">{"".join(squares)}</g>{path}'


Line = tuple[tuple[int, int], tuple[int, int]]


def _list_lines(map: npt.NDArray[np.int32], grid: tuple[int, int], cell: int) -> list[Line]:
    """The edges between patches of different tokens, pixels."""
    below, beside = find_borders(map, grid)
    across = [
        ((x * cell, (y + 1) * cell), ((x + 1) * cell, (y + 1) * cell))
        for y, x in np.argwhere(below).tolist()
    ]
    down = [
        (((x + 1) * cell, y * cell), ((x + 1) * cell, (y + 1) * cell))
        for y, x in np.argwhere(beside).tolist()
    ]
    return across + down


def _choose_cell(pixels: Pixels, grid: tuple[int, int]) -> int:
    """Pixels of a patch's side: as in the image, or more where that is small."""
    return max(-(-_SIDE // grid[0]), int(pixels.shape[0]) // grid[0])
