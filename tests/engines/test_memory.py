from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.io import memory
from tocom_export.io.memory import give_back, memory_of, own_memory

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it")


@LINUX
def test_what_this_process_takes():
    before = own_memory()
    assert before is not None
    assert before > 20_000_000
    block = np.ones(1 << 26, np.uint8)  # 67 MB
    after = own_memory()
    assert after is not None
    assert after - before == pytest.approx(block.nbytes, rel=0.2)


def test_a_system_that_doesn_t_say(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(memory, "_ROLLUP", tmp_path / "none")
    assert own_memory() is None

    def started(*_, **__):
        raise AssertionError("a process is started in vain")

    monkeypatch.setattr("subprocess.run", started)
    assert memory_of("tocom_export.io.memory", ()) is None


def test_the_line_that_counts(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(memory, "_ROLLUP", tmp_path / "rollup")
    header = "5600-7ffd ---p 00000000 00:00 0 [rollup]\nRss:  99 kB\n"
    (tmp_path / "rollup").write_text(f"{header}Pss:       12 kB\nPss_Dirty:  7 kB\n")
    assert own_memory() == 12 * 1024
    (tmp_path / "rollup").write_text(f"{header}Pss_Dirty:  7 kB\nSwapPss:  3 kB\n")
    assert own_memory() is None


@pytest.fixture
def program(monkeypatch, tmp_path: Path):
    """A module of some lines, for fresh processes to run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(memory, "own_memory", lambda: 1)

    def call(text: str) -> str:
        (tmp_path / "some_program.py").write_text(text)
        return "some_program"

    return call


def test_a_fresh_process_prints_it_last(program):
    name = program("import sys; print('hello 3'); print(sum(map(int, sys.argv[1:])))")
    assert memory_of(name, (40, 2)) == 42


@pytest.mark.parametrize("text", ["raise SystemExit(1)", "print(3); raise ValueError", "pass"])
def test_a_process_that_fails(program, text: str, capfd):
    assert memory_of(program(text), ()) is None
    assert capfd.readouterr() == ("", "")


def test_a_module_that_is_none():
    assert memory_of("tocom_export.engines.nothing", ()) is None


@LINUX
def test_a_process_that_runs_one_engine(bundle: Bundle):
    taken = memory_of("tocom_export.io.memory", (bundle.path, 8, 2, 1))
    assert taken is not None
    assert 20_000_000 < taken < 200_000_000  # PyTorch alone would be more
    assert memory_of("tocom_export.io.memory", (bundle.path, 12, 2)) is None  # no such target


@LINUX
@pytest.mark.parametrize("threads", [None, 1])
def test_what_runs_in_it(bundle: Bundle, monkeypatch, capsys, threads: int | None):
    from tocom_export.engines.onnx.engine import OnnxEngine

    opened, ran = [], []

    class Engine(OnnxEngine):
        def __init__(self, bundle: Bundle, target: int, *, threads: int | None) -> None:
            opened.append((target, threads))
            super().__init__(bundle, target, threads=threads)

        def run(self, images):
            ran.append(images.shape)
            return super().run(images)

    monkeypatch.setattr("tocom_export.engines.onnx.engine.OnnxEngine", Engine)
    more = () if threads is None else (str(threads),)
    monkeypatch.setattr(sys, "argv", ["memory", str(bundle.path), "16", "3", *more])
    memory.main()
    assert int(capsys.readouterr().out) > 0
    assert opened == [(16, threads)]
    assert ran == [(3, 3, 56, 56)]


@LINUX
def test_freed_arrays_are_given_back():
    """Many small ones, as weights are, with one at the end that is still in use."""
    blocks = [np.ones(100_000, np.uint8) for _ in range(600)]
    last = np.ones(100_000, np.uint8)
    del blocks
    before = own_memory()
    give_back()
    after = own_memory()
    assert before is not None and after is not None
    assert before - after > 30_000_000
    assert last.all()
