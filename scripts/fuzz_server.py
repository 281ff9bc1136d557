"""Send a server requests that are broken in all ways, and see what it makes of them.

python scripts/fuzz_server.py REQUESTS [--seed N] [--bundle DIR]

Serves a bundle (default: the shipped model with two variants) in this process and sends it requests
that were right before their bytes, headers, JSON, tensors, parts or images were changed at random.
Each has to be answered, or the connection closed, without a status of 500 and more but 503 and
504; in between, a right request has to get its right answer. Prints what came out, and exits with 1
where anything else did.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
import random
import socket
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from tocom_export.engines.serving.http.serve_options import ServeOptions
from tocom_export.engines.serving.http.server import bind, make_server
from tocom_export.engines.serving.http.service import Service
from tocom_export.engines.serving.http.site import Site
from tocom_export.exporting import export

SECONDS = 20.0
"""That an answer to a whole request may take."""
PATIENCE = 0.15
"""Seconds that are waited for an answer to a request that may not be whole."""
ALLOWED = {503, 504}
TOKEN = "0123456789abcdef"
Request = tuple[bytes, dict[str, str], bytes]
"""The first line, headers, and the body."""

VALUES = [
    None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**40, 1e308, -0.5, "", "x", "\x00", "é" * 99, [],
    {}, [[]], ["images"], {"a": {}}, "FP32", "BYTES", "images", "logits", [1, 3, 32, 32],
    [2**40] * 4,
]  # fmt: skip
HEADERS = [
    ("Content-Encoding", "gzip"), ("Content-Encoding", "deflate"), ("Content-Encoding", "br"),
    ("Content-Encoding", "gzip, gzip"), ("Inference-Header-Content-Length", "0"),
    ("Inference-Header-Content-Length", "-5"), ("Inference-Header-Content-Length", "9" * 40),
    ("Inference-Header-Content-Length", "²"), ("X-Timeout-Ms", "1e-9"), ("X-Timeout-Ms", "-1"),
    ("X-Timeout-Ms", "nan"), ("X-Timeout-Ms", "1e999"), ("Content-Type", "multipart/form-data"),
    ("Content-Type", "multipart/form-data; boundary="),
    ("Content-Type", "multipart/form-data; boundary=x"),
    ("Content-Type", "\x80"), ("Transfer-Encoding", "chunked"), ("Expect", "100-continue"),
    ("Authorization", f"Bearer {TOKEN}"), ("Connection", "close"), ("Upgrade", "websocket"),
    ("Range", "bytes=0-" + "1,2-" * 500), ("Accept-Encoding", "gzip"), ("Host", ""),
]  # fmt: skip


@contextmanager
def serve(bundle: Path) -> Iterator[tuple[Site, tuple[str, int]]]:
    """A bundle served as a model called ``m``."""
    service = Service.open("m", bundle, ServeOptions(policy="fixed"), backend="onnx", threads=1)
    site, listener = Site({"m": service}, TOKEN, 2**20), bind("127.0.0.1", 0)
    ready = threading.Event()
    server = make_server(site, listener, lambda address: ready.set())
    place = listener.getsockname()
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        ready.wait(SECONDS)
        yield site, place
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        site.close()


def make_requests(shape: tuple[int, ...]) -> list[Request]:
    """Right requests of all kinds."""
    images = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32"}
    output = {"name": "logits", "parameters": {"binary_data": True}}
    known = {"parameters": {"binary_data_size": images.nbytes}}
    more = {"id": "1", "parameters": {"timeout": 10**7}, "outputs": [output]}
    text = json.dumps({"inputs": [{**tensor, **known}], **more}).encode()
    length = {"Inference-Header-Content-Length": str(len(text))}
    numbers = json.dumps({"inputs": [{**tensor, "data": images.round(2).tolist()}]}).encode()
    stream = io.BytesIO()
    Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(stream, "png")
    picture = stream.getvalue()
    part = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n' + picture
    parts = part + b"\r\n" + part + b"\r\n--b--\r\n"
    infer, classify = b"POST /v2/models/m/infer", b"POST /v2/models/m/versions/r08/classify?top_k=2"
    right = {"Authorization": f"Bearer {TOKEN}"}
    return [
        (infer, length, text + images.tobytes()),
        (infer, {}, numbers),
        (infer, {**length, "Content-Encoding": "gzip"}, gzip.compress(text + images.tobytes(), 1)),
        (infer, {"Content-Encoding": "deflate"}, zlib.compress(numbers, 1)),
        (classify, {}, picture),
        (classify, {"Content-Type": "multipart/form-data; boundary=b"}, parts),
        (b"POST /admin/models/m/switch", right, b'{"variant": "r08"}'),
        (b"POST /admin/models/m/refit", right, b'{"bank": "nowhere", "source": 4, "scale": 0.1}'),
        (b"POST /v2/repository/index", {}, b"{}"),
        *((b"GET " + path, {}, b"") for path in (
            b"/v2", b"/v2/models/m", b"/v2/models/m/versions/r08/stats", b"/v2/models/m/config",
            b"/metrics", b"/stats", b"/v2/health/ready",
        )),
    ]  # fmt: skip


def flip(data: bytes, rng: random.Random) -> bytes:
    """Change, lose, double or add some bytes."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.choice((1, 4, 64, 4096)))
        kind = rng.randrange(4)
        if kind == 0 and at < len(found):
            found[at] ^= rng.randrange(1, 256)
        elif kind == 1:
            del found[at:end]
        elif kind == 2:
            found[at:at] = found[at:end]
        else:
            found[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
    return bytes(found)


def change_json(value: object, rng: random.Random) -> object:
    """One place within a document, another value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        if rng.random() < 0.1:
            return {other: v for other, v in value.items() if other != name}
        if rng.random() < 0.1:
            return {**value, rng.choice(("outputs", "parameters", "data", "x")): rng.choice(VALUES)}
        return {**value, name: change_json(value[name], rng)}
    if isinstance(value, list) and 0 < len(value) < 9 and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], change_json(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def change_document(request: Request, rng: random.Random) -> Request:
    """The JSON of a request with another value in it, and its length as it is then."""
    line, headers, body = request
    length = int(headers.get("Inference-Header-Content-Length", len(body)))
    try:
        document = json.loads(body[:length])
    except ValueError:
        return line, headers, flip(body, rng)
    for _ in range(rng.choice((1, 1, 2))):
        document = change_json(document, rng)
    text = json.dumps(document).encode()
    if "Inference-Header-Content-Length" in headers:
        headers = {**headers, "Inference-Header-Content-Length": str(len(text))}
    return line, headers, text + body[length:]


def break_request(request: Request, rng: random.Random) -> tuple[bytes, bool]:
    """What goes over the wire, and whether it is a whole request."""
    line, headers, body = request
    kind = rng.randrange(6)
    if kind == 0:
        body = flip(body, rng)
    elif kind in (1, 2):
        line, headers, body = change_document(request, rng)
    elif kind == 3:
        headers = {**headers, **dict(rng.choices(HEADERS, k=rng.choice((1, 2))))}
    elif kind == 4:
        method, _, path = line.partition(b" ")
        method = rng.choice((method, b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"GET", b"POST"))
        line = method + b" " + rng.choice((path, path + b"/", path + b"/../x", b"//", b"*", b"/%00"
            b"/%2e%2e/%ff", path.replace(b"m", b"%6d"), path.replace(b"r08", b"r99")))  # fmt: skip
    whole = "Transfer-Encoding" not in headers and "Expect" not in headers
    headers = {"Host": "x", "Content-Length": str(len(body)), **headers}
    if rng.random() < 0.05:
        headers["Content-Length"] = rng.choice(("0", "1", "-1", "x", "9" * 18, str(len(body) + 1)))
        whole = False
    head = (
        line
        + b" HTTP/1.1\r\n"
        + b"".join(
            f"{name}: {value}\r\n".encode("latin-1", "replace") for name, value in headers.items()
        )
    )
    sent = head + b"\r\n" + body
    if kind == 5:
        return flip(sent[: len(head) + 2], rng) + body, False
    return sent, whole


def send(place: tuple[str, int], data: bytes, seconds: float) -> bytes:
    """What comes back until the answer seems whole, the connection ends or time is up."""
    found = b""
    until = time.monotonic() + seconds
    with socket.create_connection(place, SECONDS) as connection:
        with suppress(OSError):  # refused before it was read; the answer may have come even so
            connection.sendall(data)
        while (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            try:
                part = connection.recv(65536)
            except OSError:
                break
            found += part
            if not part or is_whole(found, data[:5] == b"HEAD "):
                break
    return found


def is_whole(answer: bytes, headers_alone: bool) -> bool:
    """Whether an answer has all of its body, or has none."""
    head, end, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    lengths = [line.split(b":")[1] for line in lines if line.startswith(b"content-length:")]
    return bool(end) and (headers_alone or not lengths or len(body) >= int(lengths[0]))


def fuzz(
    bundle: Path, count: int, seed: int = 0, say: Callable[[str], None] = print
) -> Counter[str]:
    """Send so many broken requests; how often which status came, and ``wrong`` where it mustn't."""
    rng, found = random.Random(seed), Counter[str]()
    with serve(bundle) as (site, place):
        right = make_requests(site.services["m"].form.image)
        plain, *_ = ((line, headers, body) for line, headers, body in right)
        head = plain[0] + b" HTTP/1.1\r\nHost: x\r\n" + b"".join(
            f"{name}: {value}\r\n".encode() for name, value in plain[1].items()
        )  # fmt: skip
        known = head + b"Content-Length: %d\r\n\r\n" % len(plain[2]) + plain[2]
        wanted = send(place, known, SECONDS)[-40:]
        for number in range(count):
            data, whole = break_request(rng.choice(right), rng)
            answer = send(place, data, SECONDS if whole else PATIENCE)
            first = answer[9:12].decode("ascii", "replace") if answer else "none"
            found[first] += 1
            status = int(first) if first.isdigit() else 0
            fault = status >= 500 and status not in ALLOWED
            if fault or (whole and not answer):
                found["wrong"] += 1
                say(f"request {number}: {data[:300]!r} … → {answer[:300]!r}")
            if number % 50 == 49:
                site.services["m"].pin(None)  # what a wish that was right all the same has changed
                site.services["m"].reload()
                if send(place, known, SECONDS)[-40:] != wanted:
                    found["wrong"] += 1
                    say(f"after request {number} a right one is answered wrongly")
        until = time.monotonic() + SECONDS
        while site.working and time.monotonic() < until:
            time.sleep(0.01)
        held = site.budget.held, site.working, len(site.services["m"].line)
        if held != (0, 0, 0):
            found["wrong"] += 1
            say(f"bytes, requests and images that are still held: {held}")
    return found


def main() -> int:
    """Exit status 1 where a request was not answered well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requests", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        bundle = (
            options.bundle or export(out=Path(folder) / "bundle", targets=(0, 8), verify=False).path
        )
        began = time.monotonic()
        found = fuzz(bundle, options.requests, options.seed)
    told = ", ".join(f"{status} {times}" for status, times in sorted(found.items()))
    print(f"{options.requests} requests in {time.monotonic() - began:.0f} s: {told}")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
