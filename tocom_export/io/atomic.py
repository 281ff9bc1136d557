"""Writing beside and renaming, so that a killed process leaves the old file or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import OutputError, brief


@contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to; renamed to ``target`` when the block ends well.

    Raises:
        OutputError: the folder can't be written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(f"{target}: can't be written: {error.strerror}.") from error
    beside = Path(name)
    try:
        yield beside
        beside.chmod(0o666 & ~_umask())
        beside.replace(target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{target}: can't be written: {_reason(error)}.") from error
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """The same for a folder; an old ``target`` is removed once the new one is complete.

    Raises:
        OutputError: the folder can't be written, or the disk is full.
    """
    target = target.resolve()  # behind a link, the folder is replaced and the link stays
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{target}: can't be written: {error.strerror}.") from error
    retired = beside.with_name(beside.name + ".old")
    try:
        yield beside
        mask = _umask()
        beside.chmod(0o777 & ~mask)
        for file in beside.iterdir():  # libraries may have written theirs as 0600
            if not file.is_dir():
                file.chmod(0o666 & ~mask)
        if target.exists():
            target.replace(retired)
        beside.replace(target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{target}: can't be written: {_reason(error)}.") from error
    finally:
        if retired.exists() and not target.exists():
            retired.replace(target)
        if target.exists():
            shutil.rmtree(retired, ignore_errors=True)
        shutil.rmtree(beside, ignore_errors=True)


def link_or_copy(file: Path, to: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(file.resolve(), to)  # what a symbolic link points to: it may be a relative one
    except OSError:
        shutil.copyfile(file, to)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else brief(error)


def _umask() -> int:
    """The process's umask, which the temporary files above don't follow by themselves."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
