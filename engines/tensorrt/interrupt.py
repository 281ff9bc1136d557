"""Ctrl-C, and SIGTERM where it does the same, while NVIDIA's libraries work: they lose it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tocom_export.io.interrupting import CAUGHT, is_interrupt


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is only noted within the block, and raised as KeyboardInterrupt at its end.

    Else Python would raise it in a function that the library calls back, and no exception gets
    through the library. What is yielded says whether Ctrl-C came. Nothing changes outside the
    main thread, where signals don't arrive, and where somebody else handles them.
    """
    came = False

    def note(*_: object) -> None:
        nonlocal came
        came = True

    here = threading.current_thread() is threading.main_thread()
    ours = {n: signal.getsignal(n) for n in CAUGHT if here and is_interrupt(n)}
    for number in ours:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, usual in ours.items():
            signal.signal(number, usual)
        if came:
            raise KeyboardInterrupt
