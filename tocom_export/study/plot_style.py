"""How our plots look, and how they are written."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, MissingPackageError
from ..io.atomic import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg")

# Okabe and Ito's, which the colour-blind can tell apart, and a marker each for print in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "os^vDP"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.facecolor": "white",  # of its own, so that a dark page leaves the labels legible
    "savefig.facecolor": "white",
    "savefig.dpi": 150,
    "svg.hashsalt": "tocom-export",  # else the names inside an SVG are drawn at random
}


def check_suffix(file: Path) -> None:
    """Raise InputError where a file's name is not a picture's."""
    if file.suffix.lower() not in _SUFFIXES:
        raise InputError(f"{file}: a picture is a {' or a '.join(_SUFFIXES)} file; name it so.")


def save(figure: Figure, file: Path) -> None:
    """Write a figure to a PNG or SVG file, the same bytes for the same figure.

    Raises:
        InputError: another suffix.
        OutputError: the file can't be written.
    """
    check_suffix(file)
    suffix = file.suffix.lower()
    with apply_style(), replace_file(file) as beside:
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(beside, format=suffix[1:], metadata=metadata)


def apply_style() -> AbstractContextManager[None]:
    """Our settings, whatever a user's matplotlibrc says, for as long as a block lasts."""
    try:
        import matplotlib.style
    except ImportError:
        raise MissingPackageError("matplotlib", "plot") from None
    context: AbstractContextManager[None] = matplotlib.style.context(["default", _STYLE])
    return context
