from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tocom_export.errors import OutputError
from tocom_export.io.atomic import replace_file, replace_folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path):
    target = tmp_path / "new" / "file"
    with replace_file(target) as beside:
        beside.write_text("new")
        assert not target.exists()
        assert beside.parent == target.parent
    assert target.read_text() == "new"
    assert names(target.parent) == ["file"]


def test_a_failing_block_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), replace_file(target) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_when_the_block_ends(tmp_path: Path):
    target = tmp_path / "new" / "folder"
    with replace_folder(target) as beside:
        (beside / "a").write_text("new")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["folder"]


def test_a_folder_is_replaced_whole(tmp_path: Path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with replace_folder(target) as beside:
        (beside / "new").touch()
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_failing_block_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(error), replace_folder(target) as beside:
        (beside / "new").touch()
        raise error
    assert names(target) == ["old"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int):
    old = os.umask(mask)
    try:
        with replace_file(tmp_path / "file"):
            pass
        with replace_folder(tmp_path / "folder") as beside:
            (beside / "a").touch()
    finally:
        os.umask(old)
    assert mode(tmp_path / "file") == 0o666 & ~mask
    assert mode(tmp_path / "folder") == 0o777 & ~mask
    assert mode(tmp_path / "folder" / "a") == 0o666 & ~mask


@pytest.mark.parametrize("write", [replace_file, replace_folder])
def test_a_parent_that_is_a_file(tmp_path: Path, write):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "out"
    with pytest.raises(OutputError) as caught, write(target):
        pass
    assert str(target) in str(caught.value)


def test_a_file_over_a_folder(tmp_path: Path):
    (tmp_path / "out" / "kept").mkdir(parents=True)
    with pytest.raises(OutputError, match="out"), replace_file(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["kept"]


def test_an_interrupt_while_renaming_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.replace

    def interrupted(self: Path, to: Path) -> Path:
        if self.name.endswith(".old") or to.name.endswith(".old"):
            return rename(self, to)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    monkeypatch.setattr("tocom_export.io.atomic.exchange", lambda *_: False)
    with pytest.raises(KeyboardInterrupt), replace_folder(target) as beside:
        (beside / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert [p.name for p in target.iterdir()] == ["old"]
