"""Two names exchange what they stand for, in one step where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

_HERE = -100  # AT_FDCWD: relative paths start at the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_UNABLE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


def exchange(one: Path, other: Path) -> bool:
    """Exchange two existing files or folders of one file system.

    At no time one of the names is missing.

    Returns:
        Whether it was done. False where system or file system can't, and nothing has changed.

    Raises:
        OSError: as of a renaming.
    """
    call = _find_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@cache
def _find_call() -> Any:
    """The C library's function of two paths, where it has one."""
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        swap = getattr(library, "renamex_np", None)
        return swap and (lambda one, other: swap(one, other, _EXCHANGE))
    rename = getattr(library, "renameat2", None)  # glibc from 2.28 on, musl from 1.2.5
    return rename and (lambda one, other: rename(_HERE, one, _HERE, other, _EXCHANGE))
