"""One writer at a time, and what killed ones leave."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tocom_export.errors import BusyError, OutputError
from tocom_export.io.atomic import replace_file, replace_folder
from tocom_export.io.locking import hold, is_left

HOLDER = """
import sys
from pathlib import Path
from tocom_export.io.locking import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds ``target`` until its stdin is closed."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "target")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()
    child.stdin.close()


def test_another_process_is_not_waited_for_where_that_is_not_wanted(tmp_path: Path, holder):
    target = tmp_path / "target"
    says = "target is being written by another; try again later"
    with pytest.raises(BusyError, match=says), hold(target, wait=False):
        raise AssertionError("both hold it")
    with pytest.raises(BusyError), replace_folder(target, wait=False):
        raise AssertionError("both write it")
    with hold(tmp_path / "other", wait=False):
        pass


def test_another_process_is_waited_for(tmp_path: Path, holder):
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        holder.stdin.close()

    with hold(tmp_path / "target", tell=tell):
        assert holder.wait(10) == 0
    assert told == [f"Waiting for another that writes {tmp_path / 'target'}."]
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_a_killed_holder_holds_nothing(tmp_path: Path, holder):
    holder.kill()
    holder.wait()
    with hold(tmp_path / "target", wait=False):
        pass
    assert names(tmp_path) == []


def test_a_thread_waits_for_another_and_may_hold_again_what_it_holds(tmp_path: Path):
    target, order = tmp_path / "target", []

    def other() -> None:
        with hold(target):
            order.append("other")

    with hold(target), hold(target, wait=False):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]
    assert names(tmp_path) == []


def test_many_writers_lose_nothing(tmp_path: Path):
    """A waiting one doesn't go on with the lock file that the one before it removed."""
    target = tmp_path / "count"
    target.write_text("0")

    def add() -> None:
        for _ in range(20):
            with hold(target):
                count = int(target.read_text())
                with replace_file(target) as beside:
                    beside.write_text(str(count + 1))

    threads = [threading.Thread(target=add) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() == "120"
    assert names(tmp_path) == ["count"]


def test_what_killed_writers_left_is_swept(tmp_path: Path):
    target = tmp_path / "a[b]"
    mine = [".a[b].0123abcd.part", ".a[b].zz_zz9zz.part"]
    (tmp_path / mine[0]).mkdir()
    (tmp_path / mine[0] / "half").touch()
    (tmp_path / mine[1]).touch()
    others = [".a[b].part", ".a[b].env", ".ab.0123abcd.part", ".other.0123abcd.part"]
    for name in others:
        (tmp_path / name).touch()
    with replace_folder(target) as beside:
        assert names(tmp_path) == sorted([*others, ".a[b].lock", beside.name])
    assert names(tmp_path) == sorted([*others, "a[b]"])


def test_what_a_killed_writer_moved_away_is_put_back(tmp_path: Path):
    away = tmp_path / ".target.0123abcd.old"
    away.mkdir()
    (away / "old").touch()
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "target"):
        raise KeyboardInterrupt
    assert names(tmp_path / "target") == ["old"]
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        (".manifest.json.lock", True),
        (".manifest.json.0123abcd.part", True),
        (".manifest.json.0123abcd.old", True),
        (".manifest.json.0123abc.part", False),
        (".other.json.0123abcd.part", False),
        ("manifest.json.0123abcd.part", False),
    ],
)
def test_what_is_left_of_a_writer(name: str, left: bool):
    assert is_left(name, ["weights.safetensors", "manifest.json"]) is left


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_that_can_t_be_written(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="can't be written"), hold(tmp_path / "target"):
        raise AssertionError


def test_a_name_that_is_too_long(tmp_path: Path):
    says = "can't be written: File name too long"
    with pytest.raises(OutputError, match=says), hold(tmp_path / ("x" * 250)):
        raise AssertionError
