from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tocom_export.io.interrupting import catch_signals, is_interrupt, leave_signals

posix = pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking")

SLOW = """
import signal, time
signal.raise_signal(signal.{name})
try:
    time.sleep(0.3)
    exec("end = time.monotonic()")
except BaseException:
    end = None
"""

COMMAND = """
import sys
from tocom_export.io.interrupting import catch_signals, leave_signals

catch_signals()
try:
    import slow
    import time
    time.sleep(10)
except KeyboardInterrupt:
    assert slow.end, "it came into the import"
    sys.exit(130)
finally:
    leave_signals()
"""


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Whatever these tests were started with: a shell has Ctrl-C ignored in the background."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_import_is_done_before_it_stops(tmp_path: Path, name: str):
    (tmp_path / "slow.py").write_text(SLOW.format(name=name))
    (tmp_path / "command.py").write_text(COMMAND)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "command"], cwd=tmp_path, env=environment, capture_output=True,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "")
    assert time.monotonic() - began < 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_at_once_elsewhere(number: signal.Signals):
    catch_signals()
    assert is_interrupt(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    leave_signals()
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_ignored_stays_so(number: signal.Signals):
    signal.signal(number, signal.SIG_IGN)
    catch_signals()
    assert signal.getsignal(number) is signal.SIG_IGN
    leave_signals()
    assert signal.getsignal(number) is signal.SIG_IGN
