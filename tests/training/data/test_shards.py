from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from tocom_export.errors import DataError, TocomError
from tocom_export.training.data import shard_index
from tocom_export.training.data.images import UnreadableImage
from tocom_export.training.data.opening import open_images
from tocom_export.training.data.shards import Shards, find_shards, is_shards

# From Python 3.12 on, where a worker is forked beside torch's own threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

Members = dict[str, bytes]


def png(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(stream, "png")
    return stream.getvalue()


def write(shard: Path, members: Members, mode: str = "w") -> Path:
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, mode) as tar:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return shard


PAIR: Members = {"0.png": png(), "0.cls": b"0", "1.png": png(9), "1.cls": b"1\n"}


@pytest.fixture
def shards(tmp_path: Path, folder: Path) -> Path:
    """The images of ``folder`` in its order, five a shard, labels in .cls and .json in turn."""
    images = open_images(folder)
    for start in range(0, len(images), 5):
        members: Members = {}
        for index in range(start, min(start + 5, len(images))):
            file = Path(images.where(index))
            label = images.read(index)[1]
            key = f"{file.parent.name}/{file.stem}"
            members[f"{key}.png"] = file.read_bytes()
            members[f"{key}.seg.png"] = png(255)
            if index % 2:
                members[f"{key}.cls"] = str(label).encode()
            else:
                members[f"{key}.json"] = json.dumps({"label": label}).encode()
        write(tmp_path / "shards" / f"train-{start // 5:03d}.tar", members)
    (tmp_path / "shards" / "classes.txt").write_text("a\nb\n")
    return tmp_path / "shards"


def test_the_same_images_as_the_folder(folder: Path, shards: Path):
    expected, found = open_images(folder), open_images(shards)
    assert len(found) == len(expected) == 12
    assert found.classes == expected.classes
    for index in [*range(12), 7, 0]:
        image, label = found.read(index)
        other, other_label = expected.read(index)
        assert np.array_equal(image, other)
        assert label == other_label
    assert found.where(6) == f"{shards / 'train-001.tar'}: b/0.png"


@pytest.mark.parametrize("pattern", ["train-{000..002}.tar", "train-*.tar", "train-00[0-2].tar"])
def test_patterns(shards: Path, pattern: str):
    found = open_images(f"{shards}/{pattern}")
    assert (len(found), found.name) == (12, f"{shards}/{pattern}")


def test_a_pattern_takes_what_it_says(shards: Path):
    names = [file.name for file in find_shards(f"{shards}/train-{{001..002}}.tar")]
    assert names == ["train-001.tar", "train-002.tar"]
    assert len(Shards(str(shards / "train-002.tar"))) == 2


@pytest.mark.parametrize("pattern", ["train-{000..999999999999}.tar", "none-*.tar"])
def test_a_pattern_that_lacks_a_shard(shards: Path, pattern: str):
    with pytest.raises(DataError, match=r"there is no file .*(train-003|none-\*)\.tar"):
        open_images(f"{shards}/{pattern}")


class _Bytes:
    """Images of a set, for a DataLoader to read."""

    def __init__(self, images: Shards) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> bytes:
        return self.images.read(index)[0].tobytes()


def test_processes_and_pickles(shards: Path):
    images = Shards(str(shards))
    images.read(3)
    expected = [images.read(n)[0].tobytes() for n in range(12)]
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.read(n)[0].tobytes() for n in range(12)] == expected
    loader = DataLoader(_Bytes(images), batch_size=None, num_workers=2)  # type: ignore[arg-type]
    assert list(loader) == expected


def test_the_index_is_compact(shards: Path):
    arrays = [v for v in vars(Shards(str(shards))).values() if isinstance(v, np.ndarray)]
    assert sum(array.itemsize for array in arrays) == 28


def test_class_names(tmp_path: Path):
    shard = write(tmp_path / "a.tar", {**PAIR, "2.png": png(), "2.cls": b"11"})
    assert open_images(shard).classes == tuple(map(str, range(12)))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"a\.tar: 2 has label 11, but classes.txt names 2"):
        open_images(shard)
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(DataError, match=r"classes\.txt: empty, or with an empty line"):
        open_images(shard)


@pytest.mark.parametrize("extra", ["0.pyd", "0.pth", "0.txt", "__notes__", "._0.png"])
def test_other_members_are_not_read(tmp_path: Path, extra: str):
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("unpickled",)

    shard = write(tmp_path / "a.tar", {extra: pickle.dumps(Trap()), **PAIR})
    images = open_images(shard)
    assert [images.read(n)[1] for n in range(len(images))] == [0, 1]


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/../../evil"])
def test_names_are_no_paths(tmp_path: Path, name: str):
    place = tmp_path / "deep" / "er"
    shard = write(place / "a.tar", {**PAIR, f"{name}.png": png(7), f"{name}.cls": b"1"})
    before = sorted(tmp_path.rglob("*"))
    images = open_images(shard)
    assert images.read(2)[0].getpixel((0, 0)) == (7, 0, 0)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_not_followed(tmp_path: Path, kind: bytes):
    (tmp_path / "secret.png").write_bytes(png())
    shard = write(tmp_path / "a.tar", PAIR)
    with tarfile.open(shard, "a") as tar:
        info = tarfile.TarInfo("2.png")
        info.type, info.linkname = kind, str(tmp_path / "secret.png")
        tar.addfile(info)
        info = tarfile.TarInfo("2.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"0"))
    with pytest.raises(DataError, match=r"a\.tar: 2 has no images"):
        open_images(shard)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"2.cls": b"0"}, "2 has no images .*; a sample has one"),
        ({"2.png": png(), "2.jpg": png(), "2.cls": b"0"}, "2 has 2 images"),
        ({"2.png": png()}, "2 has no label: a whole number from 0 on"),
        ({"2.png": png(), "2.cls": b"cat"}, "2 has no label"),
        ({"2.png": png(), "2.cls": b"-1"}, "2 has no label"),
        ({"2.png": png(), "2.cls": b"9" * 5000}, "2 has no label"),
        ({"2.png": png(), "2.cls": b"99999999999"}, "2 has no label"),
        ({"2.png": png(), "2.json": b'{"label": true}'}, "2 has no label"),
        ({"2.png": png(), "2.json": b'{"label": 1.5}'}, "2 has no label"),
        ({"2.png": png(), "2.json": b"[1]"}, "2 has no label"),
        ({"2.png": png(), "2.json": b"[" * 99999}, "2 has no label"),
        ({"d.x/2.png": png()}, r"d\.x/2 has no label"),
    ],
)
def test_samples_that_lack_something(tmp_path: Path, members: Members, message: str):
    shard = write(tmp_path / "a.tar", {**PAIR, **members})
    with pytest.raises(DataError, match=rf"a\.tar: {message}"):
        open_images(shard)


@pytest.mark.parametrize("fields", [{"label": 1}, {"cls": 1}])
def test_labels_in_json(tmp_path: Path, fields: dict[str, int]):
    shard = write(tmp_path / "a.tar", {"a.JPG": png(), "a.json": json.dumps(fields).encode()})
    assert open_images(shard).read(0)[1] == 1


def test_an_oversized_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shard = write(tmp_path / "a.tar", PAIR)
    monkeypatch.setattr(shard_index, "LARGEST_IMAGE", 10)
    with pytest.raises(DataError, match=r"a\.tar: 0\.png has \d+ bytes; 512 MiB are the most"):
        open_images(shard)


def test_a_size_beyond_the_file(tmp_path: Path):
    shard = write(tmp_path / "a.tar", PAIR)
    info = tarfile.TarInfo("2.png")
    info.size = 2**30
    raw = shard.read_bytes().rstrip(b"\0")
    raw += bytes(-len(raw) % 512) + info.tobuf() + bytes(1024)
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.tar: 2\.png reaches beyond the end"):
        open_images(shard)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6])
def test_a_shard_cut_short(shards: Path, share: float):
    shard = shards / "train-001.tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw[: int(len(raw.rstrip(b"\0")) * share)])
    with pytest.raises(DataError, match=r"train-001\.tar"):
        open_images(shards)


def test_a_damaged_header_is_not_the_end(shards: Path):
    shard = shards / "train-001.tar"
    with tarfile.open(shard) as tar:
        position = tar.getmembers()[6].offset
    raw = bytearray(shard.read_bytes())
    raw[position : position + 8] = b"damaged!"
    shard.write_bytes(raw)
    with pytest.raises(
        DataError, match=rf"train-001\.tar: damaged or cut short at byte {position}"
    ):
        open_images(shards)


def test_any_damage_is_an_error_of_ours_or_none(tmp_path: Path):
    whole = write(tmp_path / "a.tar", PAIR).read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 4, 64])):
            raw[rng.randrange(4096)] = rng.randrange(256)
        (tmp_path / "a.tar").write_bytes(raw)
        try:
            images = Shards(str(tmp_path / "a.tar"))
            for index in range(len(images)):
                images.read(index)
        except TocomError:
            pass


@pytest.mark.parametrize(("suffix", "mode"), [(".tar.gz", "w:gz"), (".tar", "w:xz")])
def test_compressed_shards(tmp_path: Path, suffix: str, mode: str):
    shard = write(tmp_path / f"a{suffix}", PAIR, mode)
    for data in (shard, tmp_path):
        with pytest.raises(DataError, match=r"compressed \((gzip|xz)\).* plain \.tar"):
            open_images(data)


@pytest.mark.parametrize("data", ["pipe:cat a.tar", "https://example.org/a.tar", "s3://b/a.tar"])
def test_remote_shards(data: str):
    with pytest.raises(DataError, match="local files; fetch them first"):
        open_images(data)


def test_shards_without_samples(tmp_path: Path):
    with pytest.raises(DataError, match="the shards hold no samples"):
        open_images(write(tmp_path / "a.tar", {"notes": b""}))


def test_one_class_only(tmp_path: Path):
    with pytest.raises(DataError, match=r"one class only \('0'\)"):
        open_images(write(tmp_path / "a.tar", {"0.png": png(), "0.cls": b"0"}))


def test_a_broken_image_and_a_shard_that_is_gone(tmp_path: Path):
    shard = write(tmp_path / "a.tar", {**PAIR, "2.png": b"no image", "2.cls": b"0"})
    images = open_images(shard)
    with pytest.raises(UnreadableImage, match=r"a\.tar: 2\.png"):
        images.read(2)
    shard.unlink()
    with pytest.raises(UnreadableImage, match=r"a\.tar: image 0"):
        images.read(0)


def test_a_download_beside_its_class_folders(folder: Path):
    write(folder / "images.tar.gz", PAIR, "w:gz")
    assert not is_shards(str(folder))
    assert len(open_images(folder)) == 12
