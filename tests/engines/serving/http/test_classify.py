"""Image files in, classes out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.classifying import run_files

PLACE = "/v2/models/small/classify"


def encode(kind: str = "png", size: tuple[int, int] = (90, 60), **options: Any) -> bytes:
    rng = np.random.default_rng(size[0])
    stream = io.BytesIO()
    pixels = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def multipart(*parts: bytes, boundary: str = "xyz") -> tuple[bytes, dict[str, str]]:
    body = b""
    for number, part in enumerate(parts):
        body += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="f"; filename="{number}.png"\r\n'
            "Content-Type: image/png\r\n\r\n"
        ).encode() + part + b"\r\n"  # fmt: skip
    body += f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm"])
def test_it_says_what_run_says(running, bundle: Bundle, tmp_path: Path, kind: str):
    file = tmp_path / f"image.{kind}"
    file.write_bytes(encode(kind))
    (wanted,) = run_files(bundle, bundle.engine("r08", threads=1), [file])
    reply = running.ask("POST", f"{PLACE}?top_k=3".replace("/classify", "/versions/r08/classify"),
                        file.read_bytes())  # fmt: skip
    assert reply.status == 200
    answer = reply.document
    assert (answer["model_version"], answer["parameters"]["variant"]) == ("r08", "r08")
    (found,) = answer["images"]
    assert [c["index"] for c in found["classes"]] == [index for index, _ in wanted.rank(3)]
    assert [c["name"] for c in found["classes"]] == [f"class {i}" for i, _ in wanted.rank(3)]
    np.testing.assert_allclose(
        [c["probability"] for c in found["classes"]], [p for _, p in wanted.rank(3)], rtol=1e-4
    )


def test_several_files(running):
    parts = encode(), encode(size=(70, 70)), encode("jpeg")
    body, headers = multipart(*parts)
    reply = running.ask("POST", PLACE, body, headers)
    found = reply.document["images"]
    assert [image["file"] for image in found] == ["0.png", "1.png", "2.png"]
    for part, image in zip(parts, found, strict=True):
        alone = running.ask("POST", PLACE, part).document["images"][0]["classes"]
        assert len(alone) == 5
        assert [c["index"] for c in image["classes"]] == [c["index"] for c in alone]


LARGE = b"P5 60000 60000 255\n"  # 3.6 billion pixels, by its header


@pytest.mark.parametrize(
    "body, headers, status, says",
    [
        (b"", {}, 400, "no image"),
        (b"text", {}, 400, "can't be read; JPEG, PNG"),
        (encode()[:-60], {}, 400, "the image can't be read: a PNG that is damaged or ends early"),
        (LARGE, {}, 400, "too many pixels"),
        (b"P5 9000 9000 255\n", {}, 400, "the image can't be used: more than 50 million pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, 400, "can't be read"),
        (encode(size=(30000, 1)), {}, 400, "too thin"),
        (b"x" * (2**20 + 1), {}, 413, "more than 1048576 bytes"),
        (b"x" * (2**20 + 1), {}, 413, "the server's --max-image-mb says so"),
        (*multipart(encode(), b"text"), 400, "'1.png' can't be read; JPEG, PNG"),
        (*multipart(encode(), encode()[:-60]), 400, "'1.png' can't be read: a PNG that is"),
        (*multipart(), 400, "no image"),
        (*multipart(*[b"x"] * 9), 400, "8 images are taken at most; there are more"),
        (multipart(b"x")[0][:-8], multipart()[1], 400, "last part"),
        (multipart(b"x")[0], {"Content-Type": "multipart/form-data; boundary=y"}, 400, "damaged"),
        (multipart(b"x")[0], {"Content-Type": "multipart/form-data"}, 400, "part"),
        (b"junk", {"Content-Type": "multipart/form-data; boundary=" + "y" * 999}, 400, "damaged"),
    ],
)
def test_what_is_refused(running, body: bytes, headers: dict[str, str], status: int, says: str):
    reply = running.ask("POST", PLACE, body, headers)
    assert (reply.status, says in reply.error) == (status, True), reply.error


def test_many_parts_are_not_taken_apart(monkeypatch: pytest.MonkeyPatch):
    """Each takes the processor for some microseconds, and a body has room for millions."""
    from tocom_export.engines.serving.http import images as module
    from tocom_export.engines.serving.http.refusals import Refusal

    made: list[Any] = []
    picture = module.Picture

    def make(name: str, content: bytes) -> Any:
        made.append(name)
        return picture(name, content)

    monkeypatch.setattr(module, "Picture", make)
    body = b"--b\r\nA: b\r\n\r\n\r\n" * 1000 + b"--b--\r\n"
    with pytest.raises(Refusal, match="8 images are taken at most"):
        module.split_pictures(body, "multipart/form-data; boundary=b", 8)
    assert len(made) == 8


def test_an_image_of_too_many_pixels_is_not_decoded(running, monkeypatch: pytest.MonkeyPatch):
    def load(self: Image.Image) -> None:
        raise AssertionError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert "pixels" in running.ask("POST", PLACE, b"P5 9000 9000 255\n").error


def test_what_is_not_asked_so(running):
    reply = running.ask("POST", f"{PLACE}?topk=3", encode())
    assert (reply.status, reply.error) == (400, "?topk isn't known; top_k may stand there.")


@pytest.mark.parametrize("top", ["0", "-1", "x", "1.5", ""])
def test_how_many_classes(running, top: str):
    reply = running.ask("POST", f"{PLACE}?top_k={top}", encode())
    assert (reply.status, "top_k" in reply.error) == (400, True)
    many = running.ask("POST", f"{PLACE}?top_k=99999999999", encode())
    assert len(many.document["images"][0]["classes"]) == 10


def test_a_model_without_a_head(serve, tmp_path: Path, make_blueprint, make_spec):
    from tocom_export.bundle.writing import write_bundle

    blueprint = make_blueprint(tmp_path, make_spec(classes=0))
    bundle = write_bundle(blueprint, tmp_path / "headless")
    with serve(bundle.path, policy="fixed") as running:
        (image,) = running.ask("POST", PLACE, encode()).document["images"]
    assert len(image["embedding"]) == bundle.spec.width


def test_classes_have_their_names(serve, tmp_path: Path, make_blueprint):
    from tocom_export.bundle.writing import write_bundle

    names = tuple(f"kind-{letter}" for letter in "abcdefghij")
    bundle = write_bundle(make_blueprint(tmp_path, classes=names), tmp_path / "named")
    with serve(bundle.path, policy="fixed") as running:
        (image,) = running.ask("POST", PLACE, encode()).document["images"]
    assert all(c["name"] == names[c["index"]] for c in image["classes"])
