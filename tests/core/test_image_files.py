"""Whatever a file holds, a model sees the picture that it shows."""

from __future__ import annotations

import random
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tocom_export import Bundle, export
from tocom_export.errors import ImageError
from tocom_export.model.image_files import SUFFIXES, convert_image, decode_image
from tocom_export.model.preprocess import Preprocess

ORIENTATION = 274
STORED = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""EXIF's orientation → how the pixels of an upright picture lie in the file."""


def draw(size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A picture that is no longer the same when it is turned or mirrored."""
    coarse = np.random.default_rng(3).integers(0, 256, (4, 5, 3), np.uint8)
    pixels = np.array(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    pixels[5:30, 8:20] = (250, 20, 30)
    pixels[40:48, 30:] = (10, 240, 60)
    return Image.fromarray(pixels)


RGB = draw()
GREY = RGB.convert("L")
DEEP = np.asarray(GREY).astype(np.uint16) * 257  # (H, W)
PALETTE = RGB.quantize(64)
OTHER = ImageOps.invert(RGB)
"""The second frame, which nobody sees."""


def png16(pixels: Any, exif: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel, grey (H, W) or RGB (H, W, 3); Pillow writes grey alone."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">2I5B", width, height, 16, 2 * (pixels.ndim == 3), 0, 0, 0)
    chunks = [(b"IHDR", header), (b"eXIf", exif), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(raw)) + name + raw + struct.pack(">I", zlib.crc32(name + raw))
        for name, raw in chunks if raw or name == b"IEND"
    )  # fmt: skip


def tiff(raw: bytes, bits: int, white_is_zero: bool = False, kind: int = 1) -> bytes:
    """A little-endian TIFF of one channel; ``kind`` 1: unsigned, 2: signed, 3: float."""
    width, height = RGB.size
    values = {
        256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero),
        273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: height, 279: len(raw), 339: kind,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(values)) + entries + bytes(4) + raw


def pack12(pixels: Any) -> bytes:
    """Pixels of 12 bits, two in three bytes."""
    a, b = pixels.reshape(-1, 2).astype(np.uint16).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int, image: Image.Image = RGB) -> tuple[Image.Image, bytes]:
    """An image as it lies in the file, and the EXIF data that say so."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    how = STORED[orientation]
    return (image if how is None else image.transpose(how)), exif.tobytes()


def saved_turned(orientation: int, kind: str, image: Image.Image = RGB, **options: Any) -> bytes:
    stored, exif = turned(orientation, image)
    return saved(stored, kind, exif=exif, **options)


FADED = RGB.copy()
FADED.putalpha(GREY)
FRAMES = {"save_all": True, "append_images": [OTHER]}
LOSSLESS: dict[str, tuple[bytes, Image.Image]] = {
    "16-bit grey.png": (png16(DEEP), GREY),
    "16-bit colour.png": (png16(np.asarray(RGB).astype(np.uint16) * 257), RGB),
    "16-bit turned.png": (png16(np.rot90(DEEP), turned(6)[1][6:]), GREY),
    "16-bit.tif": (saved(Image.fromarray(DEEP), "TIFF"), GREY),
    "16-bit packed.tif": (saved(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"), GREY),
    "16-bit big-endian.tif": (
        saved(Image.frombytes("I;16B", RGB.size, DEEP.astype(">u2").tobytes()), "TIFF"),
        GREY,
    ),
    "16-bit.jp2": (saved(Image.fromarray(DEEP), "JPEG2000"), GREY),
    "16-bit.pgm": (b"P5 96 72 65535\n" + DEEP.astype(">u2").tobytes(), GREY),
    "12-bit.tif": (tiff(pack12(DEEP >> 4), 12), GREY),
    "32-bit.tif": (tiff((DEEP.astype("<u4") * 65537).tobytes(), 32), GREY),
    "white is 0.tif": (tiff((~DEEP).tobytes(), 16, white_is_zero=True), GREY),
    "float.tif": (saved(Image.fromarray(np.asarray(GREY) / np.float32(255)), "TIFF"), GREY),
    "float, white is 0.tif": (
        tiff((1 - np.asarray(GREY) / np.float32(255)).tobytes(), 32, True, 3),
        GREY,
    ),
    "grey.png": (saved(GREY, "PNG"), GREY),
    "grey.bmp": (saved(GREY, "BMP"), GREY),
    "grey.tif": (saved(GREY, "TIFF"), GREY),
    "grey alpha.png": (saved(FADED.convert("LA"), "PNG"), GREY),
    "alpha.png": (saved(FADED, "PNG"), RGB),
    "alpha.webp": (saved(FADED, "WEBP", lossless=True, exact=True), RGB),
    "1-bit.png": (saved(GREY.convert("1"), "PNG"), GREY.convert("1")),
    "palette.png": (saved(PALETTE, "PNG"), PALETTE),
    "palette, one clear.png": (saved(PALETTE, "PNG", transparency=3), PALETTE),
    "palette, alpha.png": (saved(PALETTE, "PNG", transparency=bytes(range(64))), PALETTE),
    "palette turned.png": (saved_turned(8, "PNG", PALETTE), PALETTE),
    "CMYK.tif": (saved(RGB.convert("CMYK"), "TIFF"), RGB.convert("CMYK")),
    "animated.gif": (saved(PALETTE, "GIF", **FRAMES), PALETTE),
    "animated.webp": (saved(RGB, "WEBP", lossless=True, **FRAMES), RGB),
    "animated.png": (saved(RGB, "PNG", **FRAMES), RGB),
    "animated.tif": (saved(RGB, "TIFF", **FRAMES), RGB),
    "colour.ppm": (saved(RGB, "PPM"), RGB),
    **{f"turned {n}.png": (saved_turned(n, "PNG"), RGB) for n in STORED},
    **{f"turned {n}.tif": (saved_turned(n, "TIFF"), RGB) for n in STORED},
    **{f"turned {n}.webp": (saved_turned(n, "WEBP", lossless=True), RGB) for n in STORED},
}
LOSSY: dict[str, tuple[bytes, Image.Image]] = {
    "plain.jpg": (saved(RGB, "JPEG", quality=95), RGB),
    "CMYK.jpg": (saved(RGB.convert("CMYK"), "JPEG", quality=95), RGB),
    **{f"turned {n}.jpg": (saved_turned(n, "JPEG", quality=95), RGB) for n in STORED},
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_the_very_pixels(tmp_path: Path, name: str):
    raw, shown = LOSSLESS[name]
    (tmp_path / name).write_bytes(raw)
    for file in (tmp_path / name, str(tmp_path / name), BytesIO(raw)):
        image = decode_image(file)
        assert image.mode == "RGB"
        assert np.array_equal(image, shown.convert("RGB"))
    grey = decode_image(tmp_path / name, channels=1)
    assert grey.mode == "L"
    assert np.abs(np.asarray(grey, int) - np.asarray(shown.convert("RGB").convert("L"))).max() <= 1


@pytest.mark.parametrize("name", LOSSY)
def test_nearly_the_pixels(name: str):
    raw, shown = LOSSY[name]
    found = np.asarray(decode_image(BytesIO(raw)), float)
    assert np.abs(found - np.asarray(shown)).mean() < 3


@pytest.mark.parametrize("orientation", STORED)
def test_turned_as_pillow_turns_it(orientation: int):
    raw = saved_turned(orientation, "JPEG")
    with Image.open(BytesIO(raw)) as image:
        wanted = ImageOps.exif_transpose(image)
    found = decode_image(BytesIO(raw))
    assert np.array_equal(found, wanted)
    assert np.array_equal(convert_image(found), wanted)  # not once more


def test_the_reference_model_sees_the_same(tmp_path: Path):
    """Its likeliest classes of each file are those of the picture as a plain 8-bit RGB file."""
    bundle: Bundle = export(out=tmp_path / "bundle", targets=[8], verify=False)

    def classify(files: list[Path]) -> list[list[int]]:
        images = bundle.preprocess.load_batch(files, bundle.spec.image_size)
        order = bundle.engine("r08").run(images).argsort(axis=1)  # (B, classes)
        return order[:, :-6:-1].tolist()

    cases = {**LOSSLESS, **LOSSY}
    files, plain = [], []
    for number, (name, (raw, shown)) in enumerate(cases.items()):
        files.append(tmp_path / name)
        files[-1].write_bytes(raw)
        plain.append(tmp_path / f"{number}.png")
        shown.convert("RGB").save(plain[-1])
    found, wanted = classify(files), classify(plain)
    for name, mine, its in zip(cases, found, wanted, strict=True):
        exact = name in LOSSLESS
        assert mine == its if exact else mine[0] == its[0], name
    turned(6)[0].save(plain[0])
    turned(3)[0].save(plain[1])
    upright = cases["turned 1.png"][1]
    upright.save(plain[2])
    assert len({tuple(classes) for classes in classify(plain[:3])}) == 3


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (saved(Image.fromarray(np.asarray(GREY, np.float32)), "TIFF"), "floats from 11 to 2"),
        (saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "floats from nan"),
        (saved(Image.fromarray(np.full((4, 4), np.inf, np.float32)), "TIFF"), "from inf to inf"),
        (saved(Image.fromarray(np.full((4, 4), -0.1, np.float32)), "TIFF"), "from -0.1"),
        (saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "isn't known which of"),
        (tiff(DEEP.tobytes(), 16, kind=2), "isn't known which of them is white"),
    ],
)
def test_pixels_that_cannot_be_used(tmp_path: Path, raw: bytes, reason: str):
    (tmp_path / "a.tif").write_bytes(raw)
    with pytest.raises(ImageError, match=reason) as caught:
        Preprocess().load(tmp_path / "a.tif", (8, 8))
    assert str(caught.value).startswith(f"{tmp_path / 'a.tif'}: its pixels are ")
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=f"an open file: its pixels are .*{reason}"):
        Preprocess().load(BytesIO(raw), (8, 8))


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """400 million pixels, of which the file has none."""
    raw = bytearray(png16(DEEP[:1, :1]))
    raw[16:24] = struct.pack(">2I", 20_000, 20_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(bytes(raw[12:29])))
    (tmp_path / "huge.png").write_bytes(raw)
    return tmp_path / "huge.png"


def test_too_many_pixels(huge: Path):
    with pytest.raises(ImageError) as caught:
        Preprocess().load(huge, (8, 8))
    assert str(caught.value) == f"{huge}: more than 178 million pixels; make it smaller."


@pytest.mark.parametrize("name", ["turned 6.jpg", "palette, alpha.png"])
def test_nothing_is_printed_of_what_pillow_warns_of(
    name: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
):
    warnings.simplefilter("always")
    raw, _ = {**LOSSLESS, **LOSSY}[name]
    with Image.open(BytesIO(raw)) as image:
        most = image.width * image.height
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most - 1)
    with Image.open(BytesIO(raw)) as image:
        image.convert("RGB")
    assert recwarn.pop(Image.DecompressionBombWarning)
    recwarn.clear()
    assert decode_image(BytesIO(raw)).size == RGB.size
    assert not recwarn.list


def test_any_exif_data_turn_it_or_leave_it():
    """Whatever else is wrong in them: Pillow reads what it can, and so the orientation."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[271], exif[282], exif[0x9286] = 6, "Maker" * 3, 72.0, b"notes" * 3
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    whole, stored = exif.tobytes(), turned(6)[0]
    sizes = []
    for place in range(6, len(whole)):
        for value in (0, 2, 255):
            damaged = whole[:place] + bytes([value]) + whole[place + 1 :]
            sizes.append(decode_image(BytesIO(saved(stored, "JPEG", exif=damaged))).size)
    assert {*sizes} == {RGB.size, stored.size}
    assert sizes.count(RGB.size) > 0.8 * len(sizes)


@pytest.mark.parametrize("name", ["16-bit grey.png", "float.tif", "palette.png", "animated.gif"])
def test_any_damage_is_an_error_of_ours_or_none(
    tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder
):
    whole, _ = LOSSLESS[name]
    rng = random.Random(0)
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 4, 64])):
            raw[rng.randrange(min(len(raw), 400))] = rng.randrange(256)
        (tmp_path / name).write_bytes(raw[: rng.choice([len(raw), rng.randrange(len(raw))])])
        try:
            assert Preprocess().load(tmp_path / name, (8, 8)).shape == (3, 8, 8)
        except ImageError as error:
            assert str(tmp_path / name) in str(error)
    assert not recwarn.list


def test_each_suffix_is_of_a_kind_that_pillow_reads():
    known = Image.registered_extensions()
    assert all(known[suffix] in Image.OPEN for suffix in SUFFIXES)


def test_python_does_not_forget_which_warnings_it_has_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It does at each change of the filters, which is for the first image alone."""
    file = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(file)
    decode_image(file)
    changes: list[object] = []
    monkeypatch.setattr(warnings, "filterwarnings", lambda *given, **_: changes.append(given))
    decode_image(file)
    assert changes == []
