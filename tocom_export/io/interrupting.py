"""What Ctrl-C and SIGTERM do in a command: KeyboardInterrupt, but not within an import.

Python would raise it wherever it is. A native module whose setting up is broken off aborts or
crashes the process, a Python one may take it for a missing package, and where a dataclass is being
made (``exec`` of a text) CPython 3.11 forgets ``python -m``'s exit status and dies of SIGINT.
"""

from __future__ import annotations

import _thread
import signal
import time
from types import FrameType

CAUGHT = (signal.SIGINT, signal.SIGTERM)
_AGAIN = 0.02  # seconds until it is tried again


def catch_signals() -> None:
    """Let SIGTERM do what Ctrl-C does, unless whoever started us had them ignored."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def leave_signals() -> None:
    """From now on signals are the system's: nobody is there any more to say that it stopped."""
    for number in CAUGHT:
        if is_interrupt(number):
            signal.signal(number, signal.SIG_DFL)


def is_interrupt(number: signal.Signals) -> bool:
    """Whether a signal raises KeyboardInterrupt, by Python's own handler or ours."""
    return signal.getsignal(number) in (signal.default_int_handler, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal's handler: raises KeyboardInterrupt, as soon as nothing is being imported."""
    if not _is_importing(frame):
        raise KeyboardInterrupt
    # No threading.Thread: what was interrupted may hold the lock that its start takes.
    _thread.start_new_thread(_send_again, (number, _thread.get_ident()))


def _send_again(number: int, thread: int) -> None:
    time.sleep(_AGAIN)
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, number)  # which wakes it where it waits for the system
    else:
        signal.raise_signal(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False
