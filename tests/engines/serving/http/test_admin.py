"""An administrator's wishes, and what becomes of those of others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.serving.http.admin import read_token
from tocom_export.errors import InputError

TOKEN = "0123456789abcdef"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def ruled(serve, fresh: Bundle):
    with serve(fresh.path, token=TOKEN, slo=10.0) as found:
        yield found


@pytest.fixture(scope="module")
def unmoved(serve, bundle: Bundle):
    """One that no wish of a test changes."""
    with serve(bundle.path, token=TOKEN, policy="fixed") as found:
        yield found


def wish(running, name: str, headers: dict[str, str] = RIGHT, **what: Any):
    return running.ask("POST", f"/admin/models/small/{name}", json.dumps(what).encode(), headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {TOKEN}0"},
        {"Authorization": "Bearer \xff"},
    ],
)
def test_others_are_refused(unmoved, headers):
    for name in ("switch", "refit", "reload"):
        reply = wish(unmoved, name, headers, variant="r16")
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert unmoved.service.control.variant == "r00"


def test_switch(ruled, images, logits, same):
    reply = wish(ruled, "switch", variant="r16")
    assert (reply.status, reply.document["variant"]) == (200, "r16")
    assert reply.document["policy"]["pinned"] == "r16"
    with ruled.client() as client:
        answer = ruled.infer(images)
        assert answer.status == 200
        assert client.get_inference_statistics("small", "r16")["model_stats"][0]["execution_count"]
    assert wish(ruled, "switch", variant=8).document["variant"] == "r08"
    assert wish(ruled, "switch", variant=None).document["variant"] == "r00"
    until = time.monotonic() + 20
    while ruled.service.pool.serving.variant.name != "r00":
        assert time.monotonic() < until
        time.sleep(0.005)
    assert ruled.service.counts.read().changes[-1][1] == "r00"
    assert [name for _, name in ruled.service.counts.read().changes][:2] == ["r00", "r16"]


def test_refit(ruled, bundle: Bundle, images, logits, tmp_path: Path, make_bank):
    bank = tmp_path / "bank.safetensors"
    make_bank(bundle.spec, seed=3).save(bank)
    before = json.loads(ruled.infer(images, "r16", outputs=[_in_json()]).content)
    reply = wish(ruled, "refit", bank=str(bank), source=4, scale=0.2)
    assert reply.status == 200
    assert reply.document["refits"] == 1
    after = json.loads(ruled.infer(images, "r16", outputs=[_in_json()]).content)
    assert after["parameters"] == {"variant": "r16", "source": 4, "scale": 0.2}
    assert not np.allclose(before["outputs"][0]["data"], after["outputs"][0]["data"])
    assert wish(ruled, "reload").status == 200
    back = json.loads(ruled.infer(images, "r16", outputs=[_in_json()]).content)
    assert back["outputs"] == before["outputs"]


def _in_json():
    from tritonclient.http import InferRequestedOutput

    return InferRequestedOutput("logits", binary_data=False)


@pytest.mark.parametrize(
    "name, what, status, says",
    [
        ("switch", {}, 400, "variant"),
        ("switch", {"variant": "r99"}, 400, "no variant r99"),
        ("switch", {"variant": [1]}, 400, "variant"),
        ("refit", {"bank": "nowhere.safetensors"}, 400, "nowhere.safetensors"),
        ("refit", {"checkpoint": "/etc/hosts", "bank": "none"}, 400, "hosts"),
        ("refit", {"bank": "../x/./../nowhere.safetensors"}, 400, "nowhere.safetensors: no"),
        ("refit", {"checkpoint": "a\0b"}, 400, "NUL"),
        ("refit", {"checkpoint": "x" * 5000}, 400, "too long"),
        ("refit", {"scale": -1, "bank": "none"}, 400, "'scale'"),
        ("refit", {"scala": 1}, 400, "scala"),
        ("refit", {"bank": "none", "source": 99}, 400, "'source'"),
        ("reload", {"all": True}, 400, "all"),
    ],
)
def test_wishes_that_cant_be_granted(unmoved, bundle: Bundle, name, what, status, says):
    reply = wish(unmoved, name, **what)
    assert (reply.status, says in reply.error) == (status, True), reply.error
    for path in (str(bundle.path), str(bundle.path.parent), "/etc/", "../x"):
        assert path not in reply.error
    assert unmoved.service.control.pinned is None


def test_of_a_model_that_isnt_there(unmoved):
    assert unmoved.ask("POST", "/admin/models/large/reload", b"", RIGHT).status == 404


def test_a_bundle_that_is_damaged_meanwhile(ruled, fresh: Bundle, images):
    (fresh.path / "r08.onnx").unlink()
    reply = wish(ruled, "reload")
    assert reply.status == 500
    assert str(fresh.path) not in reply.error
    assert ruled.infer(images).status == 200


def test_tokens(tmp_path: Path):
    file = tmp_path / "token"
    file.write_text(f" {TOKEN}\n")
    assert read_token(file) == TOKEN
    for content in (b"", b"short", b"two words of sixteen", b"\xff" * 20, b"x" * 5000):
        file.write_bytes(content)
        with pytest.raises(InputError, match="16 to 4096 ASCII"):
            read_token(file)
    with pytest.raises(InputError, match="can't be read"):
        read_token(tmp_path / "nowhere")
