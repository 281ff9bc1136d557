"""Short forms of the programs in scripts/ that kill writers, race them and flip bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("kill_writers.py", "6"), "0 faults in 6 runs"),
        (("race_writers.py", "2"), "0 ended wrongly"),
        (("fuzz_bundle.py", "6"), "6 flips: 6 answered well, 0 not"),
    ],
)
def test_nothing_is_lost(words: tuple[str, ...], says: str):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / words[0]), *words[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout
