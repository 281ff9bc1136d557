"""The model that Triton's Python backend runs, within a stand-in for the backend."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.serving import triton_model
from tocom_export.engines.serving.steering import Steering
from tocom_export.engines.serving.triton_model import TritonPythonModel
from tocom_export.errors import BundleError

ALL = ("logits", "variant", "source", "scale")


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class Error(SimpleNamespace):
    INTERNAL, INVALID_ARG = "internal", "invalid"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message=message, code=code)


class Request:
    """What a client sends, and what comes back where a sender sends it."""

    def __init__(self, images: Any, outputs: Sequence[str] = ALL, **parameters: Any) -> None:
        self.images, self.outputs, self.given = images, outputs, parameters
        self.sent: Any = None
        self.done = threading.Event()

    def parameters(self) -> str:
        return json.dumps(self.given) if self.given else ""

    def inputs(self) -> list[Tensor]:
        return [Tensor("images", self.images)]

    def requested_output_names(self) -> set[str]:
        return set(self.outputs)

    def get_response_sender(self) -> Any:
        return SimpleNamespace(send=self._send)

    def _send(self, response: Any, flags: int) -> None:
        assert flags == 1
        self.sent = response
        self.done.set()


class Metric:
    def __init__(self, labels: dict[str, str]) -> None:
        self.labels, self.value = labels, 0

    def increment(self, by: int) -> None:
        self.value += by


class Family:
    COUNTER = "counter"
    made: list[Metric]

    def __init__(self, name: str, description: str, kind: str) -> None:
        assert (name, kind) == ("tocom_images_total", "counter")
        Family.made = []

    def Metric(self, labels: dict[str, str]) -> Metric:
        Family.made.append(Metric(labels))
        return Family.made[-1]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stand-in, and what is logged to it."""
    lines: list[str] = []
    backend = SimpleNamespace(
        Tensor=Tensor,
        TritonError=Error,
        InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(
            outputs={tensor.name(): tensor.as_numpy() for tensor in output_tensors}, error=error
        ),
        TritonModelException=RuntimeError,
        MetricFamily=Family,
        Logger=SimpleNamespace(log_error=lines.append),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        get_input_tensor_by_name=lambda request, name: next(
            tensor for tensor in request.inputs() if tensor.name() == name
        ),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    return lines


@pytest.fixture
def start(fresh: Bundle, logged: list[str], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A model that has been loaded, of r00, r08 and r16."""
    place = tmp_path / "models" / "tried"
    shutil.copytree(fresh.path, place / "1" / "bundle")
    started: list[TritonPythonModel] = []

    def call(**parameters: str) -> TritonPythonModel:
        config = {
            "max_batch_size": 8,
            "dynamic_batching": {"max_queue_delay_microseconds": "1000"},
            "parameters": {
                name: {"string_value": value}
                for name, value in {"threads": "1", **parameters}.items()
            },
        }
        model = TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config), "model_repository": str(place),
                "model_version": "1", "model_name": "tried",
            }
        )  # fmt: skip
        started.append(model)
        return model

    yield call
    for model in started:
        model.finalize()


@pytest.fixture
def wanted(fresh: Bundle, images: Any) -> dict[str, Any]:
    return {name: OnnxEngine(fresh, name, threads=1).run(images) for name in fresh.variants}


def answer(model: TritonPythonModel, request: Request) -> Any:
    """The response to one request, changes included."""
    (response,) = model.execute([request])
    if response is None:
        assert request.done.wait(60)
        return request.sent
    return response


def test_a_variant_for_each_request(start, images: Any, wanted: dict[str, Any]):
    model = start()
    asked = [{}, {"variant": "r16"}, {"degree": 8}, {"variant": "8"}, {"degree": "16"}]
    responses = model.execute([Request(images, **given) for given in asked])
    for response, name in zip(responses, ["r00", "r16", "r08", "r08", "r16"], strict=True):
        assert response.error is None
        np.testing.assert_allclose(response.outputs["logits"], wanted[name], atol=1e-5)
        assert response.outputs["variant"].tolist() == [[name.encode()]] * 3
    counted = {metric.labels["variant"]: metric.value for metric in Family.made}
    assert counted == {"r00": 3, "r08": 6, "r16": 6}
    assert {metric.labels["model"] for metric in Family.made} == {"tried"}


def test_what_is_told_of_the_weights(start, images: Any, fresh: Bundle):
    outputs = answer(start(), Request(images, variant="r08")).outputs
    variant = fresh.variants["r08"]
    assert outputs["source"].tolist() == [[variant.source]] * 3
    assert outputs["source"].dtype == np.int32
    assert outputs["scale"] == pytest.approx(variant.scale)
    assert outputs["scale"].dtype == np.float32


def test_the_outputs_asked_for(start, images: Any):
    found = answer(start(), Request(images, outputs=["scale", "logits"])).outputs
    assert {*found} == {"scale", "logits"}


@pytest.mark.parametrize(
    "given, says",
    [
        ({"variant": "r12"}, "the pool has no variant r12; it has r00, r08, r16."),
        ({"degree": 12}, "the pool has no variant 12; it has r00, r08, r16."),
        ({"degree": "x"}, "`degree` 'x': a whole number is expected."),
        ({"degree": 8.5}, "`degree` 8.5: a whole number is expected."),
        ({"degree": True}, "`degree` True: a whole number is expected."),
        ({"variant": True}, "`variant` True: a name or a degree is expected."),
        ({"variant": "r08", "degree": 8}, "`variant` and `degree` say the same"),
        ({"control": "switch", "variant": 8}, "`control`: this model takes no changes by request"),
    ],
)
def test_bad_parameters(start, images: Any, given: dict[str, Any], says: str):
    good, bad = Request(images), Request(images, **given)
    first, second, third = start().execute([good, bad, good])
    assert second.error.code == "invalid"
    assert says in second.error.message
    assert first.error is third.error is None


def test_bad_images(start, images: Any, logged: list[str]):
    model = start()
    broken = images.copy()
    broken[1] = np.inf
    first, second, third = model.execute([Request(images), Request(broken), Request(images[:, :1])])
    assert first.error is None
    assert second.error.message == "image 1 of the batch has pixels that are NaN or Inf."
    assert "images have shape (3, 1, 56, 56)" in third.error.message
    assert second.error.code == third.error.code == "invalid"
    assert logged == []


def test_faults_of_ours_are_told_and_logged(start, images: Any, logged: list[str], monkeypatch):
    model = start()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(triton_model, "run_grouped", fail)
    (response,) = model.execute([Request(images)])
    assert response.error.message == "ZeroDivisionError: division by zero"
    assert response.error.code == "internal"
    (line,) = logged
    assert "Traceback" in line


def test_other_parameters_are_let_be(start, images: Any):
    """Triton passes on headers among them, where it is told to."""
    assert answer(start(), Request(images, header="x", priority=1)).error is None


def test_a_switch(start, images: Any, wanted: dict[str, Any]):
    model = start(control="on")
    changed = answer(model, Request(images, control="switch", degree=16))
    later = answer(model, Request(images))
    for response in (changed, later):
        assert response.outputs["variant"][0, 0] == b"r16"
        np.testing.assert_allclose(response.outputs["logits"], wanted["r16"], atol=1e-5)


def test_a_refit_and_a_reload(start, images: Any, make_bank, fresh: Bundle, tmp_path: Path):
    bank = tmp_path / "bank.safetensors"
    make_bank(fresh.spec).save(bank)
    model = start(control="on")
    before = answer(model, Request(images, variant="r08")).outputs
    changed = answer(
        model, Request(images, control="refit", bank=str(bank), source=4, scale=0.5, variant="r08")
    ).outputs
    assert changed["source"][0, 0] == 4
    assert changed["scale"][0, 0] == 0.5
    assert not np.allclose(changed["logits"], before["logits"], atol=1e-3)
    after = answer(model, Request(images, variant="r08")).outputs
    np.testing.assert_array_equal(after["logits"], changed["logits"])
    again = answer(model, Request(images, control="reload", variant="r08")).outputs
    np.testing.assert_array_equal(again["logits"], before["logits"])


@pytest.mark.parametrize(
    "given, says",
    [
        ({"control": "swich"}, "`control` 'swich': it is switch, reload or refit."),
        ({"control": "switch"}, "`control` switch: `variant` or `degree` must say to which."),
        ({"control": "switch", "variant": "r12"}, "the pool has no variant r12"),
        ({"control": "refit", "scale": "x"}, "`scale` 'x': a number is expected."),
        ({"control": "refit", "source": "1.5"}, "`source` '1.5': a whole number is expected."),
        ({"control": "refit", "checkpoint": "none"}, "none"),
        ({"control": "refit", "source": 99, "bank": "none"}, "`source` 99"),
    ],
)
def test_changes_that_can_t_be(start, images: Any, given: dict[str, Any], says: str):
    model = start(control="on")
    refused = answer(model, Request(images, **given))
    assert refused.error.code == "invalid"
    assert says in refused.error.message
    assert answer(model, Request(images)).outputs["variant"][0, 0] == b"r00"


def test_requests_are_answered_while_a_change_is_made(start, images: Any, monkeypatch):
    model = start(control="on")
    under_way, go_on = threading.Event(), threading.Event()

    def reload() -> None:
        under_way.set()
        assert go_on.wait(60)

    monkeypatch.setattr(model._pool, "reload", reload)
    changing = Request(images, control="reload")
    first, second = model.execute([changing, Request(images)])
    assert first is None
    assert second.error is None
    assert under_way.wait(60)
    assert answer(model, Request(images, degree=8)).error is None
    assert changing.sent is None
    go_on.set()
    assert changing.done.wait(60)
    assert changing.sent is not None and changing.sent.error is None


def test_steered(start, images: Any, monkeypatch):
    """What it picks is Steering's; here: that it is asked, told, and obeyed."""
    told: list[Any] = []
    plain = Steering.step, Steering.observe

    def step(self: Steering, state: Any, load: Any) -> Any:
        told.append(load)
        return plain[0](self, state, load)

    def observe(self: Steering, state: Any, variant: str, seconds: float, batch: int) -> Any:
        told.append((variant, batch))
        return plain[1](self, state, variant, seconds, batch)

    monkeypatch.setattr(Steering, "step", step)
    monkeypatch.setattr(Steering, "observe", observe)
    calm = start(slo_ms="60000")
    assert {*calm._steered._steering.seconds} == {"r00", "r08", "r16"}
    assert answer(calm, Request(images)).outputs["variant"][0, 0] == b"r00"
    load, seen = told
    assert (load.queued, seen) == (3, ("r00", 3))
    assert 0 <= load.waited <= 0.01
    assert load.slacks == [60 - load.waited] * 3
    assert answer(calm, Request(images, degree=8)).outputs["variant"][0, 0] == b"r08"
    hurried = start(slo_ms="0.001")
    first, second = hurried.execute([Request(images), Request(images, variant="r00")])
    assert first.outputs["variant"][0, 0] == hurried._steered._steering.ladder[-1].encode()
    assert second.outputs["variant"][0, 0] == b"r00"


def test_a_switch_of_what_is_steered(start, images: Any):
    refused = answer(
        start(slo_ms="50", control="on"), Request(images, control="switch", variant="r08")
    )
    assert "what serves is steered by `slo_ms`" in refused.error.message


def test_a_reload_times_the_variants_anew(start, images: Any, monkeypatch):
    model = start(slo_ms="60000", control="on")
    before = model._steered
    assert answer(model, Request(images, control="reload")).error is None
    assert model._steered is not before
    # Between the two, what was picked may be gone.
    monkeypatch.setattr(model._steered, "choose", lambda: "gone")
    assert answer(model, Request(images)).outputs["variant"][0, 0] == b"r00"


@pytest.mark.parametrize(
    "parameters, says",
    [
        ({"control": "yes"}, "`control` 'yes': it is on or off"),
        ({"slo_ms": "0"}, "`slo_ms` 0: a positive number"),
        ({"slo_ms": "fast"}, "`slo_ms` 'fast': a number is expected"),
        ({"threads": "0"}, "`threads` 0: there is one at least"),
        ({"runtime": "torch"}, "`backend` 'torch': it is onnx, openvino"),
    ],
)
def test_it_isn_t_loaded(start, parameters: dict[str, str], says: str):
    with pytest.raises(RuntimeError, match=says):
        start(**parameters)


def test_a_bundle_that_is_damaged(start, tmp_path: Path):
    (tmp_path / "models" / "tried" / "1" / "bundle" / "r08.onnx").unlink()
    with pytest.raises(RuntimeError, match=r"r08\.onnx is missing") as raised:
        start()
    assert raised.value.__cause__ is None
    assert not isinstance(raised.value, BundleError)


def test_a_backend_that_is_older_than_its_numpy(start, monkeypatch):
    monkeypatch.setattr(builtins, "__pybind11_internals_v4_gcc__", None, raising=False)
    monkeypatch.setattr(np, "__version__", "2.1.0")
    with pytest.raises(RuntimeError, match=r"can't read arrays of NumPy 2\.1\.0.*numpy<2"):
        start()
    monkeypatch.setattr(np, "__version__", "1.26.4")
    start()
