"""Messages of the protocol without a server: what is read, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from tocom_export.engines.serving.http.protocol import (
    Form,
    InferRequest,
    format_answer,
    parse_request,
)
from tocom_export.engines.serving.http.refusals import Refusal

FORM = Form((3, 2, 2), 4)
PIXELS = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7


def message(data: Any = None, binary: bytes | None = None, **changes: Any) -> tuple[bytes, str]:
    """A request and the length of its JSON; ``images__x`` changes the tensor's x."""
    tensor: dict[str, Any] = {"name": "images", "shape": [2, 3, 2, 2], "datatype": "FP32"}
    if binary is not None:
        tensor["parameters"] = {"binary_data_size": len(binary)}
    else:
        tensor["data"] = PIXELS.tolist() if data is None else data
    for name in [name for name in changes if name.startswith("images__")]:
        tensor[name.removeprefix("images__")] = changes.pop(name)
    text = json.dumps({"inputs": [tensor], **changes}).encode()
    return text + (binary or b""), str(len(text))


@pytest.mark.parametrize("data", [PIXELS.tolist(), PIXELS.ravel().tolist()], ids=["lists", "flat"])
def test_numbers_in_json(data):
    asked = parse_request(message(data, id="x")[0], None, FORM)
    np.testing.assert_array_equal(asked.images, PIXELS)
    assert (asked.id, asked.outputs, asked.seconds) == ("x", {"logits": False}, None)


@pytest.mark.parametrize("datatype, dtype", [("FP32", "<f4"), ("FP16", "<f2")])
def test_binary(datatype: str, dtype: str):
    body, length = message(binary=PIXELS.astype(dtype).tobytes(), images__datatype=datatype)
    asked = parse_request(body, length, FORM)
    assert asked.images.dtype == np.float32
    assert asked.images.flags.owndata or asked.images.base.flags.owndata
    np.testing.assert_array_equal(asked.images, PIXELS.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    "changes, binary",
    [
        ({}, False),
        ({"parameters": {"binary_data_output": True}}, True),
        ({"outputs": [{"name": "logits"}]}, False),
        ({"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}, True),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "logits", "parameters": {"binary_data": False}}],
            },
            False,
        ),
    ],
    ids=str,
)
def test_which_form_the_answer_has(changes: Any, binary: bool):
    assert parse_request(message(**changes)[0], None, FORM).outputs == {"logits": binary}


def test_timeouts_are_microseconds():
    assert parse_request(message(parameters={"timeout": 2500})[0], None, FORM).seconds == 0.0025
    assert parse_request(message(parameters={"timeout": 0})[0], None, FORM).seconds is None


BINARY = PIXELS.tobytes()


@pytest.mark.parametrize(
    "body, length, says",
    [
        (b"", None, "not as the protocol has it"),
        (b"{}", None, "inputs"),
        (b"[" * 100_000, None, "not as the protocol has it"),
        (b'{"inputs": []}', None, "takes one input, 'images'; the request has none"),
        (message(images__name="pixels")[0], None, "the request has pixels"),
        (message(images__shape=[2, 3, 2])[0], None, "[B, 3, 2, 2] with B ≥ 1"),
        (message(images__shape=[0, 3, 2, 2])[0], None, "[B, 3, 2, 2] with B ≥ 1"),
        (message(images__shape=[2, 3, 2, 3])[0], None, "[B, 3, 2, 2] with B ≥ 1"),
        (message(images__shape=[10**30, 3, 2, 2])[0], None, "4 are taken at most"),
        (message(images__shape=[2**62, 3, 2, 2])[0], None, "4 are taken at most"),
        (message(images__shape=[5, 3, 2, 2])[0], None, "4 are taken at most"),
        (message(images__datatype="FP64")[0], None, "FP32 or FP16 is expected"),
        (message([1.0] * 23)[0], None, "24 numbers"),
        (message([1.0] * 25)[0], None, "24 numbers"),
        (message(["a"] * 24)[0], None, "numbers alone"),
        (message([None] * 24)[0], None, "numbers alone"),
        (message([[1.0] * 12] * 2)[0], None, "lists as deep as [2, 3, 2, 2]"),
        (message(["1"] * 24)[0], None, "numbers alone"),
        (message([True] * 24)[0], None, "numbers alone"),
        (message([[[[1.0] * 12]]] * 2)[0], None, "of shape [2, 1, 1, 12]"),
        (message([1e39] * 24)[0], None, "not numbers that FP32 can hold"),
        (message({"a": 1})[0], None, "24 numbers"),
        (message("," * 23)[0], None, "numbers alone"),
        (message(outputs=[{"name": "probabilities"}])[0], None, "no 'probabilities'"),
        (
            message(outputs=[{"name": "logits", "parameters": {"classification": 3}}])[0],
            None,
            "POST an image to …/classify",
        ),
        (
            message(outputs=[{"name": "logits", "parameters": {"shared_memory_region": "x"}}])[0],
            None,
            "shared memory",
        ),
        (message(images__parameters={"shared_memory_region": "x"})[0], None, "shared memory"),
        (message(parameters={"sequence_id": 4})[0], None, "sequences are not supported"),
        (message(parameters={"timeout": -4})[0], None, "microseconds"),
        (message(parameters={"timeout": "soon"})[0], None, "microseconds"),
        (message(parameters={"timeout": 10**400})[0], None, "microseconds"),
        (message(parameters={"binary_data_output": 1})[0], None, "true or false"),
        (message()[0], "12", "not as the protocol has it"),
        (message()[0], "-1", "isn't as long"),
        (message()[0], "many", "isn't as long"),
        (message()[0], "99999", "isn't as long"),
        (message()[0] + b"more", message()[1], "no binary_data_size, but binary data follow"),
        (message(binary=BINARY)[0][:-1], message(binary=BINARY)[1], "95 follow"),
        (message(binary=BINARY)[0] + b"x", message(binary=BINARY)[1], "97 follow"),
        (message(binary=BINARY[:-4])[0], message(binary=BINARY[:-4])[1], "has 96 bytes"),
        (
            message(images__parameters={"binary_data_size": 96}, data=[1])[0],
            None,
            "both data and binary_data_size",
        ),
        (
            message(BINARY.hex(), images__parameters={"binary_data_size": True})[0],
            None,
            "both data and binary_data_size",
        ),
    ],
)
def test_what_is_refused(body: bytes, length: str | None, says: str):
    with pytest.raises(Refusal) as caught:
        parse_request(body, length, FORM)
    assert caught.value.status == 400
    assert says in caught.value.text
    assert len(caught.value.text) < 400


def test_wrong_numbers_are_counted_before_they_are_made():
    body = message([0] * 2_000_000)[0]
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match="24 numbers"):
            parse_request(body, None, FORM)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body)
    finally:
        tracemalloc.stop()


DEEP = b"[" * 900 + b"]" * 900


@pytest.mark.parametrize(
    "body",
    [
        message(parameters={"x": [{}] * 200_000})[0],
        message(outputs=[{"name": "logits"}] * 50_000)[0],
        message(images__shape=[1] * 200_000)[0],
        json.dumps({"inputs": [{}] * 200_000}).encode(),
        message("deep")[0].replace(b'"deep"', b"[" + b",".join([DEEP] * 24) + b"]"),
    ],
    ids=["parameters", "outputs", "shape", "inputs", "deep"],
)
def test_little_is_made_of_json_that_is_no_tensor(body: bytes):
    tracemalloc.start()
    try:
        with pytest.raises(Refusal) as caught:
            parse_request(body, None, FORM)
        assert caught.value.status == 400
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body)
    finally:
        tracemalloc.stop()


def test_json_whose_length_is_told():
    form = Form((3, 64, 64), 4)
    body, length = message([0.5] * (2 * 3 * 64 * 64), images__shape=[2, 3, 64, 64])
    assert len(body) > 65_536
    assert parse_request(body, length, form).images.shape == (2, 3, 64, 64)


def test_a_request_may_be_as_large_as_its_numbers():
    widest = [-1.2345678901234567e-300] * 48
    body, _ = message(widest, images__shape=[4, 3, 2, 2])
    assert len(body) < FORM.largest
    assert parse_request(body, None, FORM).images.shape == (4, 3, 2, 2)


@pytest.mark.parametrize("binary", [False, True])
def test_answers(binary: bool):
    logits = np.array([[0.1, -2.5], [3e-8, 7]], np.float32)
    request = InferRequest(PIXELS, "7", {"logits": binary}, None)
    body, length = format_answer("m", "r08", request, {"logits": logits}, {"variant": "r08"})
    answer = json.loads(body[:length])
    (output,) = answer.pop("outputs")
    assert answer == {
        "model_name": "m",
        "model_version": "r08",
        "id": "7",
        "parameters": {"variant": "r08"},
    }
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [2, 2])
    if binary:
        assert output["parameters"] == {"binary_data_size": 16}
        assert body[length:] == logits.tobytes()
    else:
        np.testing.assert_array_equal(np.array(output["data"], np.float32), logits.ravel())


def test_outputs_are_those_that_are_asked_for():
    form = dataclasses.replace(FORM, outputs=("embedding", "logits"))

    def ask(*names: str) -> dict[str, bool]:
        wanted = [{"name": name, "parameters": {"binary_data": name == "logits"}} for name in names]
        return dict(parse_request(message(outputs=wanted)[0], None, form).outputs)

    assert ask() == {"embedding": False, "logits": False}
    assert ask("logits") == {"logits": True}
    request = InferRequest(PIXELS, "", {"map": True, "tokens": False}, None)
    dense = {"tokens": np.zeros((2, 3, 1), np.float32), "map": np.array([[0, 7]], np.int32)}
    body, length = format_answer("m", "r08", request, dense, {})
    whole, tokens = json.loads(body[:length])["outputs"]
    assert (whole["datatype"], whole["shape"]) == ("INT32", [1, 2])
    assert np.frombuffer(body[length:], "<i4").tolist() == [0, 7]
    assert (tokens["datatype"], tokens["shape"]) == ("FP32", [2, 3, 1])
    request = InferRequest(PIXELS, "", ask("logits", "embedding"), None)
    found = {
        "embedding": np.arange(6, dtype=np.float32).reshape(2, 3),
        "logits": np.ones((2, 1), np.float32),
    }
    body, length = format_answer("m", "r08", request, found, {})
    first, second = json.loads(body[:length])["outputs"]
    assert (first["name"], first["parameters"]) == ("logits", {"binary_data_size": 8})
    assert (second["name"], second["data"]) == ("embedding", [0, 1, 2, 3, 4, 5])
    assert body[length:] == found["logits"].tobytes()


@pytest.mark.parametrize("given", [{"variant": "r16"}, {"degree": 16}, {"variant": 16}], ids=str)
def test_a_variant_may_be_asked_for_by_parameter(running, images, given):
    reply = running.infer(images, parameters=given)
    assert reply.status == 200
    length = int(reply.headers["inference-header-content-length"])
    answer = json.loads(reply.content[:length])
    assert answer["model_version"] == answer["parameters"]["variant"] == "r16"
    assert running.infer(images, "r16", parameters=given).status == 200


@pytest.mark.parametrize(
    "version, given, says",
    [
        ("", {"variant": "r99"}, "no variant r99"),
        ("", {"degree": 9}, "no variant 9"),
        ("", {"degree": "x"}, "'degree' 'x'"),
        ("", {"variant": True}, "'variant' True"),
        ("", {"variant": "r08", "degree": 8}, "give one of them"),
        ("r08", {"variant": "r16"}, "asks for version r08, the parameters for r16"),
    ],
    ids=str,
)
def test_variants_that_cant_be_had(running, images, version, given, says):
    reply = running.infer(images, version, parameters=given)
    assert (reply.status, says in reply.error) == (400, True), reply.error


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "nan"])
def test_json_has_no_such_numbers(running, number):
    tensor = {"name": "images", "shape": [1, 3, 56, 56], "datatype": "FP32"}
    text = json.dumps({"inputs": [tensor]})[:-3] + f', "data": [0.0, {number}]}}]}}'
    reply = running.ask("POST", "/v2/models/small/infer", text.encode())
    assert (reply.status, reply.error) == (400, "JSON has no NaN and no Infinity.")


def test_nothing_stands_behind_the_address(running, images):
    reply = running.ask("POST", "/v2/models/small/infer?variant=r16", b"")
    assert (reply.status, reply.error) == (400, "?variant isn't known; nothing may stand there.")
