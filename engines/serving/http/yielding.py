"""Models give way to what answers requests: a full machine still refuses, and tells its health."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

_LESS = 10
"""Of Unix's ``nice``: where both want a processor, a tenth of it is left for models."""
T = TypeVar("T")


def give_way() -> None:
    """Let this thread, and those that it starts, run after others of the machine.

    A runtime's threads are as the one is that opens an engine. Linux alone has it for threads.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LESS)


def run_below(call: Callable[[], T]) -> T:
    """What a call gives or raises, in a thread that gives way."""
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        give_way()
        try:
            found.append(call())
        except BaseException as error:
            raised.append(error)

    # A daemon: Ctrl-C while a model is opened doesn't wait for it.
    thread = threading.Thread(target=run, name="below", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]
