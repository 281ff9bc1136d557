"""Writing beside and renaming, so that a killed process leaves the old file or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import OutputError, brief
from .exchanging import exchange
from .locking import (
    RETIRED,
    STAGED,
    find_retired,
    hear_nothing,
    hold,
    refuse,
    stage_file,
    stage_folder,
)


@contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to; renamed to ``target`` when the block ends well.

    Another writer of the same file waits meanwhile.

    Raises:
        OutputError: the folder can't be written, or the disk is full.
    """
    with _refuse(target), hold(target):
        beside = stage_file(target)
        try:
            yield beside
            beside.chmod(0o666 & ~_umask())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def replace_folder(
    target: Path, *, wait: bool = True, tell: Callable[[str], None] = hear_nothing
) -> Iterator[Path]:
    """The same for a folder; an old ``target`` is removed once the new one is complete.

    At any time ``target`` is the old folder or the new one, whole, where the system can exchange
    two names in one step. Elsewhere it is missing between two renamings, and :func:`recover`
    mends what a process leaves that is killed there.

    Args:
        wait, tell: as of :func:`hold`.

    Raises:
        BusyError: another writes it, and isn't waited for.
        OutputError: the folder can't be written, or the disk is full.
    """
    target = target.resolve()  # behind a link, the folder is replaced and the link stays
    if target.is_mount():
        raise OutputError(
            f"{target} is a mount point, which can't be replaced; mount the folder around it."
        )
    with _refuse(target), hold(target, wait=wait, tell=tell):
        beside = stage_folder(target)
        try:
            yield beside
            _set_modes(beside, target)
            _put(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # where names were exchanged, the old one


def recover(target: Path) -> bool:
    """Put back a folder that a killed writer had moved away and not replaced.

    Returns:
        Whether there was one.
    """
    target = target.resolve()
    if find_retired(target) is None:
        return False
    with hold(target):  # which puts it back, once no writer is at it
        return target.exists()


def link_or_copy(file: Path | str, to: Path | str) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(Path(file).resolve(), to)  # what a symbolic link points to: it may be relative
    except OSError:
        shutil.copy2(file, to)


def _put(beside: Path, target: Path) -> None:
    if not target.exists():
        beside.replace(target)
    elif not exchange(beside, target):
        retired = beside.with_name(beside.name.removesuffix(STAGED) + RETIRED)
        target.replace(retired)
        try:
            beside.replace(target)
        except BaseException:
            retired.replace(target)
            raise
        retired.replace(beside)  # it is over: nobody shall put the old one back


def _set_modes(folder: Path, target: Path) -> None:
    """Permissions as the target and its files have them, else as the umask says.

    Temporary folders and some libraries give others none. Links to files that stay are left.
    """
    mask = _umask()
    for made in (folder, *folder.iterdir()):
        if made.is_symlink() or (made.is_file() and made.stat().st_nlink > 1):
            continue
        before = target if made == folder else target / made.name
        if before.exists():
            shutil.copymode(before, made)
        elif made == folder or made.is_file():
            made.chmod((0o777 if made.is_dir() else 0o666) & ~mask)


@contextmanager
def _refuse(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) or _is_of_another(error, target):
            raise
        raise refuse(target, error) from error
    except SafetensorError as error:
        raise OutputError(f"{target}: can't be written: {brief(error)}.") from error


def _is_of_another(error: OSError, target: Path) -> bool:
    """Whether an error names a file that is not the target's, nor one that is staged for it."""
    if not isinstance(error.filename, str):
        return False
    names = {target.name, *(part for part in Path(error.filename).parts if part.endswith(STAGED))}
    return not names & {*Path(error.filename).parts} and Path(error.filename) != target.parent


def _umask() -> int:
    """The process's umask, which the temporary files above don't follow by themselves."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
