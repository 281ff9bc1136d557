from __future__ import annotations

from pathlib import Path

import pytest

from tocom_export.errors import OutputError
from tocom_export.training.loop.log import RunLog


def written(file: Path, done: int, *steps: int) -> list[str]:
    """The file's lines after noting some steps of a run that resumed after ``done``."""
    with RunLog(file, done) as log:
        for step in steps:
            log.step(step, step / 3, step * 1e-5)
    return file.read_text().splitlines()


def test_a_header_and_a_line_per_step(tmp_path: Path):
    assert written(tmp_path / "new" / "run.csv", 0, 1, 2) == [
        "step,loss,lr",
        "1,0.333333,1.000e-05",
        "2,0.666667,2.000e-05",
    ]


@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_lines_the_state_hasnt_seen_are_dropped(tmp_path: Path, done: int):
    unbroken = written(tmp_path / "unbroken.csv", 0, *range(1, 8))
    written(tmp_path / "run.csv", 0, *range(1, 6))
    kept = (tmp_path / "run.csv").read_text().splitlines()[: done + 1]
    with RunLog(tmp_path / "run.csv", done):
        assert (tmp_path / "run.csv").read_text().splitlines() == kept
    assert written(tmp_path / "run.csv", done, *range(done + 1, 8)) == unbroken


def test_half_a_line_is_dropped(tmp_path: Path):
    written(tmp_path / "run.csv", 0, 1, 2)
    with (tmp_path / "run.csv").open("a") as stream:
        stream.write("3,0.9")
    assert [line[0] for line in written(tmp_path / "run.csv", 2, 3)] == ["s", "1", "2", "3"]


def test_a_flush_hands_the_lines_over(tmp_path: Path):
    with RunLog(tmp_path / "run.csv", 0) as log:
        log.step(1, 0.5, 1e-3)
        log.flush()
        assert len((tmp_path / "run.csv").read_text().splitlines()) == 2


def test_the_old_lines_stay_until_the_trimmed_ones_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = written(tmp_path / "run.csv", 0, 1, 2, 3)

    def full(file: Path, text: str) -> None:
        file.write_bytes(text[:5].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match=r"run\.csv: can't be written: the disk is full"):
            RunLog(tmp_path / "run.csv", 2)
    assert (tmp_path / "run.csv").read_text().splitlines() == before


def test_a_place_that_cant_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        RunLog(tmp_path / "file" / "run.csv", 0)


def test_without_tensorboard_there_is_only_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    written(tmp_path / "run.csv", 0, 1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["run.csv"]


def test_tensorboards_events(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written(tmp_path / "run.csv", 0, 1, 2, 3, 4, 5)
    written(tmp_path / "run.csv", 3, 4, 5, 6)
    events = EventAccumulator(str(tmp_path / "run.tensorboard"))
    events.Reload()
    for tag, factor in (("loss", 1 / 3), ("lr", 1e-5)):
        found = events.Scalars(tag)
        assert [event.step for event in found] == [1, 2, 3, 4, 5, 6]  # 4 and 5 only once
        for event in found:
            assert event.value == pytest.approx(event.step * factor)
