"""What stops a command beyond the package's own errors: signals, closed pipes, full disks."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

_WORDS = {
    errno.ENOSPC: "the disk is full.",
    errno.EROFS: "the file system is read-only.",
    errno.EDQUOT: "the disk quota is used up.",
    errno.EMFILE: "too many files are open (ulimit -n).",
}
_LONGEST = 120  # characters of a file's name in a message


def open_streams() -> None:
    """Make sure of stdout and stderr: characters that they lack are replaced, not refused.

    A stream that was closed before the start is None, and the next file to be opened would get
    its number: what a library prints would go into that file.

    Raises:
        OSError: stdout is closed, or the working directory is gone, where torch can't be imported.
    """
    closed = sys.stdout is None
    while (lowest := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(lowest, True)
    os.close(lowest)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "w", encoding="utf-8"))
        elif hasattr(stream := getattr(sys, name), "reconfigure"):  # a code page may lack → and Δ
            stream.reconfigure(errors="replace")
    if closed:
        raise OSError(errno.EBADF, "results have nowhere to go, it is closed.", "stdout")
    Path.cwd()


def explain_fault(error: OSError) -> str:
    """A failed system call in one line: of which file, and what is wrong."""
    why = _WORDS.get(error.errno or 0) or f"{error.strerror or error}."
    try:
        Path.cwd()
    except OSError:
        return "The working directory is gone; change to one that exists."
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}…"
    return f"{name}: {why}" if name else why[:1].upper() + why[1:]


class ClosedPipe(Exception):
    """Who read our output has had enough."""


@contextmanager
def keep_closed_pipes() -> Iterator[None]:
    """Raise ClosedPipe in place of BrokenPipeError, after which Click would exit with 1."""
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipe from error


def was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error: a library that is being imported may turn it into one."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in _list_causes(error))


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def leave(status: int) -> NoReturn:
    """End with a status, whatever became of stdout.

    Else Python would write at its end what is left for a closed pipe or a full disk, complain, and
    exit with a status of its own.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
