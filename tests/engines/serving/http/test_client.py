"""What Triton's own client asks of a server, and what it makes of the answers."""

from __future__ import annotations

import dataclasses
import http.client
import re
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tocom_export._version import __version__
from tocom_export.bundle.writing import write_bundle

ROOT = Path(__file__).parents[4]


def test_health(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("small")
    assert client.is_model_ready("small", "r08")
    assert not client.is_model_ready("large")
    assert not client.is_model_ready("small", "r99")


def test_metadata(client):
    server = client.get_server_metadata()
    assert (server["name"], server["version"]) == ("tocom-export", __version__)
    assert "binary_tensor_data" in server["extensions"]
    found = client.get_model_metadata("small")
    assert found == {
        "name": "small",
        "versions": ["r00", "r08", "r16"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 56, 56]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
    }
    assert client.get_model_metadata("small", "8")["versions"] == ["r08"]


def test_config(client, bundle):
    config = client.get_model_config("small")
    assert config["max_batch_size"] == 8
    assert config["input"][0] == {
        "name": "images", "data_type": "TYPE_FP32", "dims": [3, 56, 56],
    }  # fmt: skip
    known = {name: value["string_value"] for name, value in config["parameters"].items()}
    assert known["size"] == "56,56"
    assert tuple(map(float, known["mean"].split(","))) == bundle.preprocess.mean


def test_config_is_one_of_triton(client):
    json_format = pytest.importorskip("google.protobuf.json_format")
    from tritonclient.grpc import model_config_pb2

    json_format.ParseDict(client.get_model_config("small"), model_config_pb2.ModelConfig())


def test_repository(client):
    index = client.get_model_repository_index()
    assert [(m["name"], m["version"], m["state"]) for m in index] == [
        ("small", name, "READY") for name in ("r00", "r08", "r16")
    ]


@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary_out", [None, True, False])
@pytest.mark.parametrize("binary_in", [True, False])
def test_infer(client, images, logits, as_input, same, binary_in, binary_out, packed):
    outputs = None
    if binary_out is not None:
        outputs = [triton.InferRequestedOutput("logits", binary_data=binary_out)]
    found = client.infer(
        "small", [as_input(images, binary_in)], outputs=outputs, request_id="this one",
        request_compression_algorithm=packed, response_compression_algorithm=packed,
    )  # fmt: skip
    assert same(found.as_numpy("logits"), logits["r00"])
    answer = found.get_response()
    assert (answer["model_name"], answer["id"]) == ("small", "this one")
    assert answer["model_version"] == "r00"
    assert answer["parameters"] == {"variant": "r00", "source": 0, "scale": 0.1}


@pytest.mark.parametrize("version, variant", [("r08", "r08"), ("16", "r16"), ("0", "r00")])
def test_a_version_is_a_variant(client, images, logits, as_input, same, version, variant):
    found = client.infer("small", [as_input(images)], model_version=version)
    assert same(found.as_numpy("logits"), logits[variant])
    assert found.get_response()["model_version"] == variant


def test_many_at_a_time(client, images, logits, as_input, same):
    names = ["", "r00", "r08", "r16"] * 10
    asked = [client.async_infer("small", [as_input(images)], model_version=n) for n in names]
    for name, request in zip(names, asked, strict=True):
        assert same(request.get_result().as_numpy("logits"), logits[name or "r00"])


def test_half_precision(client, images, logits):
    tensor = triton.InferInput("images", list(images.shape), "FP16")
    tensor.set_data_from_numpy(images.astype(np.float16))
    found = client.infer("small", [tensor]).as_numpy("logits")
    np.testing.assert_allclose(found, logits["r00"], atol=0.05)


def test_statistics(client, images, as_input):
    def read() -> dict:
        (found,) = client.get_inference_statistics("small", "r16")["model_stats"]
        return found

    before = read()
    client.infer("small", [as_input(images)], model_version="r16")
    after = read()
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] - before["execution_count"] == 1
    success = after["inference_stats"]["success"]
    assert success["count"] - before["inference_stats"]["success"]["count"] == 1
    assert success["ns"] >= after["inference_stats"]["compute_infer"]["ns"] > 0
    batches = {one["batch_size"]: one["compute_infer"]["count"] for one in after["batch_stats"]}
    assert batches[3] >= 1  # others may have run together
    assert len(client.get_inference_statistics()["model_stats"]) == 3
    assert len(client.get_inference_statistics("small")["model_stats"]) == 3


def test_errors(client, images, as_input):
    def fails(says: str, status: int, call, *arguments, **options) -> None:
        with pytest.raises(InferenceServerException) as caught:
            call(*arguments, **options)
        assert caught.value.status() == str(status)
        assert says in caught.value.message()

    right = as_input(images)
    fails("no model 'large'; there are small", 404, client.infer, "large", [right])
    fails("it has r00, r08, r16", 404, client.infer, "small", [right], model_version="r99")
    fails("[B, 3, 56, 56]", 400, client.infer, "small", [as_input(images[..., :55])])
    fails("8 are taken at most", 400, client.infer, "small", [as_input(np.repeat(images, 3, 0))])
    fails("sequences", 400, client.infer, "small", [right], sequence_id=3)
    broken = images.copy()
    broken[1, 0, 3, 4] = np.nan
    fails("image 1 of the batch has pixels", 400, client.infer, "small", [as_input(broken)])
    wanted = [triton.InferRequestedOutput("logits", class_count=3)]
    fails("classification", 400, client.infer, "small", [right], outputs=wanted)
    shared = triton.InferInput("images", [1, 3, 56, 56], "FP32")
    shared.set_shared_memory("region", 1)
    fails("shared memory", 400, client.infer, "small", [shared])


def test_what_is_not_supported(client):
    for call in (
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.get_trace_settings,
        client.get_log_settings,
        lambda: client.load_model("small"),
        lambda: client.unload_model("small"),
    ):
        with pytest.raises(InferenceServerException, match="not supported"):
            call()


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/nothing", 404),
        ("GET", "/v2/models/small/nothing", 404),
        ("GET", "/v2/models/small/infer", 405),
        ("POST", "/v2", 405),
        ("GET", "/v2/", 404),
        ("GET", "/v2/models/small%2F..%2Fsmall", 404),
        ("GET", "/v2/models/small/versions/..%2F..", 404),
        ("POST", "/admin/models/small/switch", 404),
    ],
)
def test_other_addresses(running, method: str, path: str, status: int):
    reply = running.ask(method, path)
    assert reply.status == status
    assert reply.error


def test_the_example_in_the_docs(running, monkeypatch, capsys):
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    (example,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
        if "triton" in block
    ]
    for told, here in {
        "deit-source0": "small", "224": "56", "localhost:8000": running.address,
    }.items():  # fmt: skip
        assert told in example
        example = example.replace(told, here)
    exec(compile(example, "docs/serving.md", "exec"), {})
    assert "'variant': 'r00'" in capsys.readouterr().out


def test_a_connection_lasts_after_a_body_that_wasnt_read(running):
    connection = http.client.HTTPConnection(running.address, timeout=20)
    for path, status in (("/v2/models/large/infer", 404), ("/v2/models/small/infer", 413)):
        connection.request("POST", path, b" " * (running.service.form.largest + 1))
        found = connection.getresponse()
        assert (found.status, bool(found.read())) == (status, True)
        connection.request("GET", "/v2/health/live")
        found = connection.getresponse()
        assert (found.status, found.read()) == (200, b'{"live":true}')
    connection.close()


def test_headers_are_spelt_as_the_protocol_does(running, images, as_input):
    body, length = triton.InferenceServerClient.generate_request_body([as_input(images)])
    connection = http.client.HTTPConnection(running.address, timeout=20)
    headers = {"Inference-Header-Content-Length": str(length)}
    connection.request("POST", "/v2/models/small/infer", body, headers)
    found = connection.getresponse()
    assert "Inference-Header-Content-Length" in dict(found.getheaders())
    assert found.read()
    connection.close()


def test_a_head_is_a_get_without_a_body(running):
    reply = running.ask("HEAD", "/v2/health/ready")
    assert (reply.status, reply.content) == (200, b"")


def test_a_bundle_of_several_outputs(serve, make_blueprint, images, as_input, same, tmp_path: Path):
    made = dataclasses.replace(make_blueprint(tmp_path), outputs=("embedding", "logits"))
    bundle = write_bundle(made, tmp_path / "both")
    wanted = bundle.engine("r08").run_all(images)
    with serve(bundle.path, policy="fixed") as running, running.client() as client:
        forms = {o["name"]: o["shape"] for o in client.get_model_metadata("small")["outputs"]}
        assert forms == {"embedding": [-1, 64], "logits": [-1, 10]}
        config = client.get_model_config("small")
        assert [output["dims"] for output in config["output"]] == [[64], [10]]
        found = client.infer("small", [as_input(images)], model_version="r08")
        for name, rows in wanted.items():
            assert same(found.as_numpy(name), rows)
        asked = [triton.InferRequestedOutput("embedding", binary_data=True)]
        found = client.infer("small", [as_input(images)], model_version="r08", outputs=asked)
        assert same(found.as_numpy("embedding"), wanted["embedding"])
        assert found.as_numpy("logits") is None
