"""Tables in windows of every width."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty")

PROGRAM = """
from tocom_export.cli.output import Output
columns = ["engine", "degree", "tokens", "MACs", "MACs saved", "max |Δ|", "same top-1"]
row = ["r16.onnx", "16", "197 → 10", "2,299.0 M", "50 %", "1.2e-06", "100 %"]
Output(False, 0).table(columns, [row, row], "deit_small_patch16_224, source 0")
"""


def show(width: int) -> list[str]:
    """The lines that a window of so many columns shows."""
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=theirs, env=environment)
    os.close(theirs)
    said = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # Linux's way to say that it is over
            break
        if not block:
            break
        said += block
    os.close(ours)
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", said.decode()).replace("\r", "")
    return [line.rstrip() for line in text.splitlines()]


@pytest.mark.parametrize("width", [30, 40, 60])
def test_a_narrow_window_has_paragraphs(width: int):
    lines = show(width)
    assert max(map(len, lines[1:])) <= width
    assert lines[1:4] == ["r16.onnx", "  degree      16", "  tokens      197 → 10"]
    assert lines.count("r16.onnx") == 2


def test_a_wide_window_has_a_table():
    heads, first, second = show(100)[1:]
    assert heads.split()[:3] == ["engine", "degree", "tokens"]
    assert first == second
    assert first.split()[:2] == ["r16.onnx", "16"]
