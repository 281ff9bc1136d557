"""Names of classes, from lists and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tocom_export.errors import InputError
from tocom_export.model.class_names import read_classes

NAMES = ("tench, Tinca tinca", "crane", "crane", "Möwe")


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(NAMES),
        "\r\n".join(NAMES) + "\r\n\r\n",
        "\ufeff" + "\n".join(f"  {name}\t" for name in NAMES),
        json.dumps(NAMES),
        "\n " + json.dumps(NAMES, indent=1, ensure_ascii=False),
        json.dumps({str(i): name for i, name in reversed(list(enumerate(NAMES)))}),
    ],
)
def test_every_form_of_a_file(tmp_path: Path, text: str):
    file = tmp_path / "classes.any"
    file.write_bytes(text.encode())
    assert read_classes(file, 4) == NAMES
    assert read_classes(str(file), 4) == NAMES


def test_a_list_is_taken_as_it_is():
    assert read_classes(list(NAMES), 4) == NAMES


@pytest.mark.parametrize("count", [0, 3, 5])
def test_their_number_is_that_of_the_head(tmp_path: Path, count: int):
    (tmp_path / "names.txt").write_text("\n".join(NAMES), "utf-8")
    for classes, what in ((tmp_path / "names.txt", rf" {tmp_path}/names\.txt"), (NAMES, "")):
        head = f"the head has {count}" if count else "the model has no head"
        with pytest.raises(InputError, match=f"`classes`{what} names 4 classes, but {head}"):
            read_classes(classes, count)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a\n\nb", "line 2 is empty"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
        (b"[1, 2]", "`classes`"),
        (b'["a", ', "`classes`"),
        (b'{"0": "a", "2": "b"}', "no name for index 1"),
        (b'{"a": 0, "b": 1}', "`classes`"),
        (b'{"0": ["n01", "tench"]}', "`classes`"),
    ],
)
def test_a_file_that_names_no_classes(tmp_path: Path, content: bytes, says: str):
    file = tmp_path / "classes.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_classes(file, 2)
    assert f"`classes` {file}" in str(caught.value)
    assert says in str(caught.value)


def test_a_file_that_can_t_be_read(tmp_path: Path):
    with pytest.raises(InputError, match="can't be read: No such file"):
        read_classes(tmp_path / "none.txt", 2)
    with pytest.raises(InputError, match="can't be read: Is a directory"):
        read_classes(tmp_path, 2)
