"""What a training run writes down of every step."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tocom_export.errors import OutputError
from tocom_export.io.atomic import replace_file


class RunLog(AbstractContextManager["RunLog"]):
    """A CSV file with a line per step, and TensorBoard's events where that is installed.

    Lines of steps that the resumed state hasn't seen are dropped, so that the file reads as
    one unbroken run.

    Args:
        file: the CSV file; events go into a folder of the same stem, ``.tensorboard``.
        step: number of steps that the run has done.
    """

    def __init__(self, file: Path, step: int) -> None:
        try:
            lines = file.read_text().splitlines(keepends=True) if file.exists() else []
            with replace_file(file) as beside:
                beside.write_text("".join(lines[: step + 1]) or "step,loss,lr\n")
            self._stream = file.open("a")
        except OSError as error:
            raise OutputError(f"{file}: can't be written: {error.strerror}.") from error
        self._board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            folder = file.with_suffix(".tensorboard")
            self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def step(self, step: int, loss: float, lr: float) -> None:
        """Note one step."""
        self._stream.write(f"{step},{loss:.6f},{lr:.3e}\n")
        if self._board is not None:
            self._board.add_scalar("loss", loss, step)
            self._board.add_scalar("lr", lr, step)

    def flush(self) -> None:
        """Hand what was noted to the operating system."""
        self._stream.flush()
        if self._board is not None:
            self._board.flush()

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        if self._board is not None:
            self._board.close()
