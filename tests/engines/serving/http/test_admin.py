"""An administrator's wishes, and what becomes of those of others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import write_bundle
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
        ("switch", {}, 400, "JSON is not as expected"),
        ("switch", {"variant": "r99"}, 400, "no variant r99"),
        ("switch", {"variant": [1]}, 400, "variant"),
        ("refit", {"bank": "nowhere.safetensors"}, 400, "nowhere.safetensors"),
        ("refit", {"checkpoint": "/etc/hosts", "bank": "none"}, 400, "hosts"),
        ("refit", {"bank": "../x/./../nowhere.safetensors"}, 400, "nowhere.safetensors: no"),
        ("refit", {"checkpoint": "a\0b"}, 400, "NUL"),
        ("refit", {"checkpoint": "x" * 5000}, 400, "too long"),
        ("refit", {"scale": -1, "bank": "none"}, 400, "'scale'"),
        ("refit", {"scala": 1}, 400, "scala"),
        ("refit", {}, 400, "say what is to change"),
        ("refit", {"weights_key": "ema"}, 400, "checkpoint"),
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


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"x" * 9)])
def test_a_bundle_that_is_damaged_meanwhile(ruled, fresh: Bundle, images, damage):
    damage(fresh.path / "r08.onnx")
    reply = wish(ruled, "reload")
    assert reply.status == 500
    assert str(fresh.path) not in reply.error
    assert "reload" not in reply.error, "no advice to do what was just done"
    assert ruled.infer(images).status == 200


def test_a_bundle_whose_bytes_were_changed(ruled, fresh: Bundle, images):
    file = fresh.path / "r08.onnx"
    file.write_bytes(bytes(file.stat().st_size))
    reply = wish(ruled, "reload")
    assert "SHA-256 differs" in reply.error
    assert "reload" not in reply.error
    assert ruled.infer(images).status == 200


def test_the_log_names_what_was_asked_for(ruled, caplog):
    caplog.set_level("INFO", "tocom_export.serve")
    wish(ruled, "refit", scale=-1, bank="none")
    found = [record for record in caplog.records if record.name == "tocom_export.serve"]
    (said,) = (record.getMessage() for record in found)
    assert said.startswith('small: refit {"bank": "none", "scale": -1.0} by 127.0.0.1 was refused')


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


def rebuild(make_blueprint, fresh: Bundle, folder: Path, *targets: int, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    write_bundle(make_blueprint(folder, targets=targets, **more), fresh.path, force=True)


def test_reload_brings_what_is_in_the_bundle(ruled, fresh, images, make_blueprint, tmp_path):
    known = ruled.service.seconds["r08"]
    rebuild(make_blueprint, fresh, tmp_path, 0, 4, 8)
    assert ruled.infer(images, "r04").status == 404
    reply = wish(ruled, "reload")
    assert reply.status == 200
    assert [v["name"] for v in reply.document["variants"]] == ["r00", "r04", "r08"]
    assert all(v["expected_ms"] for v in reply.document["variants"])
    assert ruled.infer(images, "r04").status == 200
    assert ruled.infer(images, "r16").status == 404
    assert ruled.infer(images).status == 200
    with ruled.client() as client:
        assert client.get_model_metadata("small")["versions"] == ["r00", "r04", "r08"]
    assert ruled.service.seconds["r08"] is not known, "all were measured, to compare"
    known = ruled.service.seconds["r08"]
    rebuild(make_blueprint, fresh, tmp_path, 0, 8)
    assert wish(ruled, "reload").status == 200
    assert ruled.service.seconds == {"r00": ruled.service.seconds["r00"], "r08": known}
    assert ruled.infer(images, "r04").status == 404
    assert b'nv_inference_request_success{model="small",version="r04"} 1' in (
        ruled.ask("GET", "/metrics").content
    ), "a counter doesn't vanish"


def test_what_is_pinned_has_to_stay(ruled, fresh, images, make_blueprint, tmp_path):
    assert wish(ruled, "switch", variant="r16").status == 200
    rebuild(make_blueprint, fresh, tmp_path, 0, 8)
    reply = wish(ruled, "reload")
    assert reply.status == 409
    assert "no variant r16 now, which was switched to; it has r00, r08." in reply.error
    assert ruled.infer(images).status == 200
    assert wish(ruled, "switch", variant="r08").status == 200
    assert wish(ruled, "reload").document["policy"]["pinned"] == "r08"
    assert ruled.service.control.variant == "r08"


def test_another_model_is_not_taken(ruled, fresh, images, make_blueprint, tmp_path):
    import dataclasses

    (tmp_path / "other").mkdir()
    other = make_blueprint(
        tmp_path / "other", dataclasses.replace(fresh.spec, depth=3), bank=None, targets=(0, 8)
    )
    write_bundle(other, fresh.path, force=True)
    reply = wish(ruled, "reload")
    assert (reply.status, "another model now" in reply.error) == (409, True)
    assert str(fresh.path) not in reply.error
    assert ruled.infer(images, "r16").status == 200


def test_runs_under_way_end_on_the_old(
    serve, fresh, gate, images, in_background, make_blueprint, tmp_path
):
    gate.open.set()
    with serve(fresh.path, token=TOKEN, policy="fixed") as running:
        gate.open.clear()
        while gate.entered.acquire(blocking=False):
            pass
        first = in_background(lambda: running.infer(images, "r16"))
        assert gate.entered.acquire(timeout=20)
        gone = in_background(lambda: running.infer(images, "r16"))
        rebuild(make_blueprint, fresh, tmp_path, 0, 4)
        assert wish(running, "reload").status == 200
        gate.open.set()
        assert first().status == 200
        assert gone().status == 404, "it waited, and there is no such variant any more"
        assert running.infer(images, "r04").status == 200


@pytest.fixture
def sourced(fresh: Bundle, tmp_path: Path):
    """A bundle of weights that say that they were trained at degree 0."""
    from safetensors.numpy import load_file, save_file

    from tocom_export.bundle.manifest import WEIGHTS
    from tocom_export.compression.metadata import ModelInfo, to_metadata

    file = tmp_path / "sourced.safetensors"
    metadata = to_metadata(ModelInfo(fresh.spec, source=0))
    save_file(load_file(fresh.path / WEIGHTS), file, metadata)
    return file


def test_weights_that_say_their_source_have_no_other(
    serve, fresh: Bundle, sourced: Path, tmp_path: Path, make_bank, make_checkpoint
):
    """As ``tocom-export refit`` has it."""
    bank = tmp_path / "bank.safetensors"
    make_bank(fresh.spec, seed=3).save(bank)
    with serve(fresh.path, token=TOKEN, policy="fixed") as running:
        assert wish(running, "refit", bank=str(bank), source=4).status == 200
        assert wish(running, "refit", checkpoint=str(sourced), bank=str(bank)).status == 200
        for checkpoint in ({"checkpoint": str(sourced)}, {}):
            reply = wish(running, "refit", bank=str(bank), source=8, **checkpoint)
            assert reply.status == 400
            assert "'source' 8, but sourced.safetensors was trained at degree 0" in reply.error
        assert wish(running, "refit", bank=str(bank), source=0, scale=0.3).status == 200
        other = make_checkpoint(tmp_path, fresh.spec, seed=7)
        named = {"checkpoint": str(other), "bank": str(bank), "source": 8}
        assert wish(running, "refit", **named).status == 200
        assert running.service.pool.bundle.variants["r16"].source == 8


def test_an_administrators_changes_are_logged(ruled, caplog):
    caplog.set_level("INFO", "tocom_export.serve")
    wish(ruled, "switch", variant="r16")
    wish(ruled, "switch", variant="r99\n")
    for _ in range(3):
        wish(ruled, "switch", {}, variant="r16")
    said = [record.getMessage() for record in caplog.records if record.name.endswith("serve")]
    assert len(said) == 3
    assert said[0].startswith('small: switch {"variant": "r16"} by 127.0.0.1, in ')
    assert said[0].endswith("in force is r16, of r00, r08, r16")
    assert said[1].startswith(r'small: switch {"variant": "r99\n"} by 127.0.0.1 was refused: ')
    assert said[2] == ("127.0.0.1: no administrator's token, for /admin/models/small/switch")


def test_each_request_may_be_logged(running, caplog):
    running.ask("GET", "/v2/health/live")
    assert not [r for r in caplog.records if r.name.endswith("access")]
    caplog.set_level("INFO", "tocom_export.serve.access")
    running.ask("GET", "/v2/health/live?secret")
    running.ask("GET", "/v2/nowhere%0A")
    said = [r.getMessage() for r in caplog.records if r.name.endswith("access")]
    assert said[0].startswith("127.0.0.1 GET /v2/health/live 200 ")
    assert said[1].startswith("127.0.0.1 GET /v2/nowhere%0A 404 ")
