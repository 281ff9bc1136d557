from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tocom_export.io import memory
from tocom_export.io.memory import (
    measure_memory,
    read_memory,
    read_own_memory,
    release_memory,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it")


@LINUX
def test_what_this_process_takes():
    release_memory()  # or the block may lie in what other tests have freed
    before = read_memory()
    assert before is not None
    assert before > 20_000_000
    block = np.ones(1 << 26, np.uint8)  # 67 MB
    after = read_memory()
    assert after is not None
    assert after - before == pytest.approx(block.nbytes, rel=0.2)


@LINUX
def test_what_no_file_holds(tmp_path: Path):
    """A mapped file counts once it is written to, privately."""
    (tmp_path / "file").write_bytes(bytes(1 << 26))
    mapped = np.memmap(tmp_path / "file", np.uint8, "c")  # 67 MB, copied on write
    before, whole = read_own_memory(), read_memory()
    assert int(mapped.sum()) == 0
    read, after = read_own_memory(), read_memory()
    assert before is not None and read is not None and whole is not None and after is not None
    assert after - whole == pytest.approx(mapped.nbytes, rel=0.2)
    assert read - before < 5_000_000
    mapped[:] = 1
    written = read_own_memory()
    assert written is not None
    assert written - before == pytest.approx(mapped.nbytes, rel=0.2)


def test_a_system_that_doesn_t_say(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(memory, "_ROLLUP", tmp_path / "none")
    assert read_memory() is read_own_memory() is None

    def started(*_, **__):
        raise AssertionError("a process is started in vain")

    monkeypatch.setattr("subprocess.run", started)
    assert measure_memory("some_program", ()) is None


def test_the_line_that_counts(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(memory, "_ROLLUP", tmp_path / "rollup")
    header = "5600-7ffd ---p 00000000 00:00 0 [rollup]\nRss:  99 kB\n"
    (tmp_path / "rollup").write_text(f"{header}Pss:       12 kB\nPss_Dirty:  7 kB\n")
    assert read_memory() == 12 * 1024
    (tmp_path / "rollup").write_text(f"{header}Pss_Dirty:  7 kB\nSwapPss:  3 kB\n")
    assert read_memory() is None


@pytest.fixture
def program(monkeypatch, tmp_path: Path):
    """A module of some lines, for fresh processes to run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(memory, "read_memory", lambda: 1)

    def call(text: str) -> str:
        (tmp_path / "some_program.py").write_text(text)
        return "some_program"

    return call


def test_a_fresh_process_prints_it_last(program):
    name = program("import sys; print('hello 3'); print(sum(map(int, sys.argv[1:])))")
    assert measure_memory(name, (40, 2)) == 42


@pytest.mark.parametrize("text", ["raise SystemExit(1)", "print(3); raise ValueError", "pass"])
def test_a_process_that_fails(program, text: str, capfd):
    assert measure_memory(program(text), ()) is None
    assert capfd.readouterr() == ("", "")


def test_a_module_that_is_none():
    assert measure_memory("tocom_export.engines.nothing", ()) is None


@LINUX
def test_freed_arrays_are_released():
    """Many small ones, as weights are, with one at the end that is still in use."""
    blocks = [np.ones(100_000, np.uint8) for _ in range(600)]
    last = np.ones(100_000, np.uint8)
    del blocks
    before = read_memory()
    release_memory()
    after = read_memory()
    assert before is not None and after is not None
    assert before - after > 30_000_000
    assert last.all()
