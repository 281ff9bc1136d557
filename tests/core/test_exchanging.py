"""Exchanging two names, and replacing a folder while it is killed at every step."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from tocom_export.errors import OutputError
from tocom_export.io import exchanging
from tocom_export.io.atomic import recover, replace_folder
from tocom_export.io.exchanging import exchange


def make(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "content").write_text(content)
    return folder


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="has no such call")
def test_two_folders_exchange_their_names(tmp_path: Path):
    one, other = make(tmp_path / "one", "1"), make(tmp_path / "other", "2")
    assert exchange(one, other)
    assert ((one / "content").read_text(), (other / "content").read_text()) == ("2", "1")
    with pytest.raises(OSError) as caught:
        exchange(one, tmp_path / "none")
    assert caught.value.errno == errno.ENOENT


def test_a_system_that_can_t(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, other = make(tmp_path / "one", "1"), make(tmp_path / "other", "2")
    monkeypatch.setattr(exchanging, "_find_call", lambda: None)
    assert not exchange(one, other)
    with replace_folder(one) as beside:
        (beside / "content").write_text("3")
    assert (one / "content").read_text() == "3"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one", "other"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_can_t(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    def fail(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    one, other = make(tmp_path / "one", "1"), make(tmp_path / "other", "2")
    monkeypatch.setattr(exchanging, "_find_call", lambda: fail)
    assert not exchange(one, other)


def test_a_renaming_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch):
    """Of the two that stand for an exchange, the second."""
    target = make(tmp_path / "target", "old")
    monkeypatch.setattr(exchanging, "_find_call", lambda: None)
    replace = Path.replace

    def fail(self: Path, to: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(errno.EIO, "broken", str(self))
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", fail)
    with (
        pytest.raises(OutputError, match="target: can't be written: broken"),
        replace_folder(target) as beside,
    ):
        (beside / "content").write_text("new")
    assert (target / "content").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


KILLED = """
import os, sys
from pathlib import Path
from tocom_export.io import exchanging
from tocom_export.io.atomic import replace_folder
from tocom_export.io.locking import hold

if sys.argv[2] == "renaming":
    exchanging._find_call = lambda: None
else:
    found = exchanging._find_call()
    def call(*names):
        watch("exchange", ())
        done = found(*names)
        watch("exchange", ())
        return done
    exchanging._find_call = lambda: call
calls = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "open", "exchange"}
count, step, child = 0, 0, 1

def watch(event, _):
    global count
    if not child and event in calls:
        count += 1
        if count == step:
            os._exit(9)

sys.addaudithook(watch)
with hold(Path(sys.argv[1])):  # imports what it needs
    pass
code = 9
while code == 9:
    step += 1
    folder = Path(sys.argv[1], str(step))
    (folder / "target").mkdir(parents=True)
    (folder / "target" / "content").write_text("old")
    child = os.fork()
    if not child:
        with replace_folder(folder / "target") as beside:
            (beside / "content").write_text("new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(step if code == 0 else f"exit status {code}")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="forks")
@pytest.mark.parametrize("way", ["exchange", "renaming"])
def test_killed_between_any_two_system_calls(tmp_path: Path, way: str):
    if way == "exchange" and sys.platform not in ("linux", "darwin"):
        pytest.skip("has no such call")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), way], capture_output=True, text=True
    )
    assert done.stdout.strip().isdecimal(), done.stdout + done.stderr
    steps, found, missing = int(done.stdout), [], 0
    assert steps > 8
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        target = folder / "target"
        if not target.exists():
            missing += 1
            assert recover(target)
        content = {file.name: file.read_text() for file in target.iterdir()}
        assert content in ({"content": "old"}, {"content": "new"})
        found.append(content["content"])
        with pytest.raises(KeyboardInterrupt), replace_folder(target):  # the next writer
            raise KeyboardInterrupt
        assert [file.name for file in folder.iterdir()] == ["target"]
        assert (target / "content").read_text() == found[-1]
    assert found == sorted(found, reverse=True)  # old, and from some step on new
    assert {"old", "new"} == set(found)
    assert (missing > 0) is (way == "renaming")


def test_what_was_replaced_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed while it removes what it replaced by two renamings, and the new one removed later."""
    target = make(tmp_path / "target", "old")
    monkeypatch.setattr(exchanging, "_find_call", lambda: None)
    monkeypatch.setattr("tocom_export.io.atomic.shutil.rmtree", lambda *_, **__: None)
    with replace_folder(target) as beside:
        (beside / "content").write_text("new")
    monkeypatch.undo()
    (target / "content").unlink()
    target.rmdir()
    assert not recover(target)
