"""One writer at a time of a file or a folder, and what is left of those that were killed."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from ..errors import BusyError, OutputError

STAGED, RETIRED = ".part", ".old"
"""How the names end of what is being written beside a target, and of what it takes the place of."""
_ATTEMPTS = 100
_RANDOM = "?" * 8  # of tempfile's names


def hear_nothing(_: str) -> None:
    """What is told and not asked for."""


@contextmanager
def hold(
    target: Path, *, wait: bool = True, tell: Callable[[str], None] = hear_nothing
) -> Iterator[None]:
    """Be the only writer of a file or folder, in this process and among others on this machine.

    Each writer holds what it writes, so what lies half-written beside it once it is held is of
    a writer that was killed, and is removed; what such a writer had moved away is put back. The
    lock is a file beside the target, gone when nobody holds or awaits it, and the system's, so
    that it ends with its process. A thread may hold again what it holds.

    Args:
        target: must not be a symbolic link, whose writers would hold something else.
        wait: for another that holds it.
        tell: called with one line for people before it waits.

    Raises:
        BusyError: another holds it, and this one doesn't wait.
        OutputError: the folder around it can't be written.
    """
    file = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, is_singleton=True)
        if not _acquire(lock, file):
            if not wait:
                raise BusyError(f"{target} is being written by another; try again later.")
            tell(f"Waiting for another that writes {target}.")
            lock.acquire(poll_interval=0.02)
    except OSError as error:
        why = error.strerror or error
        raise OutputError(
            f"{target}: can't be written: {why}, in {file.parent}, where its lock has to lie."
        ) from error
    first = lock.lock_counter == 1
    try:
        if first:
            _sweep(target)
        yield
    finally:
        with suppress(OSError):
            if first and os.name == "posix":  # whoever waits for it notices, and makes a new one
                file.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: BaseFileLock, file: Path) -> bool:
    """Whether a lock could be had at once.

    Raises:
        OSError: its file can't be made, which filelock takes for one that comes and goes.
    """
    for _ in range(_ATTEMPTS):
        with suppress(Timeout):
            lock.acquire(timeout=0)
            return True
        if file.exists():
            return False
    raise OSError(errno.ENOENT, "no file can be made there", str(file))


def refuse(target: Path, error: OSError) -> OutputError:
    """What a failed system call means for a target that was to be written."""
    if error.errno == errno.ENOSPC:
        return OutputError(f"{target}: can't be written: the disk is full.")
    if error.errno == errno.EXDEV:
        return OutputError(
            f"{target}: can't be replaced: this file system can't rename it (a layer of a "
            "container's image?); put it on a volume."
        )
    return OutputError(f"{target}: can't be written: {error.strerror or error}.")


def stage_file(target: Path) -> Path:
    """A new empty file beside a target that is held."""
    handle, name = tempfile.mkstemp(STAGED, f".{target.name}.", target.parent)
    os.close(handle)
    return Path(name)


def stage_folder(target: Path) -> Path:
    """A new empty folder beside a target that is held."""
    return Path(tempfile.mkdtemp(STAGED, f".{target.name}.", target.parent))


def find_retired(target: Path) -> Path | None:
    """What a writer that was killed had moved away from a target that is missing now."""
    found = target.parent.glob(f".{glob.escape(target.name)}.{_RANDOM}{RETIRED}")
    return next(found, None) if not target.exists() else None


def is_left(name: str, targets: Iterable[str]) -> bool:
    """Whether a file is a lock of one of these, or what a killed writer of one of them left."""
    ends = ("lock", f"{_RANDOM}{STAGED}", f"{_RANDOM}{RETIRED}")
    return any(
        fnmatchcase(name, f".{glob.escape(target)}.{end}") for target in targets for end in ends
    )


def _sweep(target: Path) -> None:
    if retired := find_retired(target):
        retired.replace(target)
    for end in (STAGED, RETIRED):
        for left in target.parent.glob(f".{glob.escape(target.name)}.{_RANDOM}{end}"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with suppress(OSError):
                    left.unlink()
