"""A pool under NVIDIA's Triton itself, where that is installed (scripts/triton_server.py)."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.serving.triton import write_repository
from tocom_export.engines.serving.triton_options import TritonOptions
from tocom_export.refitting import refit

SCRIPTS = Path(__file__).parents[3] / "scripts"
CLASSES = tuple(f"class {letter}" for letter in "abcdefghij")


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The scripts' own modules."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("try_triton")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def environment(scripts: Any) -> Path:
    server = importlib.import_module("triton_server")
    try:
        found: Path = server.find_environment()
    except server.Missing as error:
        pytest.skip(f"no Triton: {error}")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def soak(scripts: Any, folder: Path, make_blueprint) -> Any:
    """Bundles of four kinds of weights and what their engines say; Triton serves the first."""
    falling = {"fast": (16, 11, 6, 0)}
    small: Blueprint = make_blueprint(folder, targets=(0, 8, 16), schedules=falling)
    named = dataclasses.replace(small, classes=CLASSES)
    return importlib.import_module("soak").Soak(named, folder)


@pytest.fixture(scope="module")
def server(environment: Path, soak: Any, folder: Path) -> Iterator[Any]:
    """Four models: one that may be changed, one that is steered, one to unload, a damaged one."""
    bundle, models = Bundle.open(soak.bundle), folder / "models"
    models.mkdir()
    for name, options in {
        "tried": {"control": True}, "steered": {"slo_ms": 60_000.0}, "other": {}, "damaged": {},
    }.items():  # fmt: skip
        made = folder / "made"
        write_repository(bundle, made, TritonOptions("python", name, threads=1, **options))
        (made / name).rename(models / name)
        shutil.rmtree(made)
    (models / "damaged/1/bundle/r08.onnx").unlink()
    loaded = [f"--load-model={name}" for name in ("tried", "steered", "other")]
    run = importlib.import_module("triton_server").run_triton
    with run(environment, models, folder, "--model-control-mode=explicit", *loaded) as server:
        yield server


@pytest.fixture(scope="module")
def wanted(soak: Any) -> dict[str, Any]:
    """Variant → logits of the soak's first batch and of its last."""
    bundle = Bundle.open(soak.bundle)
    return {
        name: [OnnxEngine(bundle, name, threads=1).run(images) for images in soak.images]
        for name in bundle.variants
    }


@pytest.fixture(scope="module")
def ask(server: Any, soak: Any, folder: Path) -> Any:
    """All outputs of a model, over gRPC."""
    remote = importlib.import_module("remote_pool").RemotePool

    def call(images: Any, model: str = "tried", **parameters: Any) -> dict[str, Any]:
        pool = remote(server.grpc, model, (), images, folder)
        try:
            found: dict[str, Any] = pool.infer(images, **parameters)
            return found
        finally:
            pool.close()

    return call


def post(url: str, document: Any) -> tuple[int, Any]:
    """Status and answer of HTTP."""
    request = Request(f"http://{url}", json.dumps(document).encode(), method="POST")
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read() or "{}")
    except HTTPError as error:
        return error.code, json.loads(error.read())


def as_json(images: Any, **parameters: Any) -> Any:
    given = {"name": "images", "datatype": "FP32", "shape": images.shape}
    return {"inputs": [{**given, "data": images.ravel().tolist()}], "parameters": parameters}


@pytest.mark.parametrize(
    "variant, name", [("r00", "r00"), (8, "r08"), ("16", "r16"), ("fast",) * 2]
)
def test_grpc(ask, soak: Any, wanted: Any, variant: Any, name: str):
    found = ask(soak.images[2], variant=variant)
    np.testing.assert_allclose(found["logits"], wanted[name][2], atol=1e-5)
    assert found["variant"].tolist() == [[name.encode()]] * len(soak.images[2])
    assert found["source"].dtype == np.int32
    assert found["scale"].dtype == np.float32


@pytest.mark.parametrize("given, name", [({"variant": "r08"}, "r08"), ({"degree": 16}, "r16")])
def test_http(server: Any, soak: Any, wanted: Any, given: Any, name: str):
    status, found = post(f"{server.http}/v2/models/tried/infer", as_json(soak.images[1], **given))
    assert status == 200
    outputs = {output["name"]: output for output in found["outputs"]}
    logits = np.reshape(outputs["logits"]["data"], outputs["logits"]["shape"])
    np.testing.assert_allclose(logits, wanted[name][1], atol=1e-5)
    assert outputs["variant"]["data"] == [name] * 2


def test_http_by_nvidia_s_client(server: Any, soak: Any, wanted: Any):
    pytest.importorskip("geventhttpclient")  # of tritonclient's extra [http]
    client_module = importlib.import_module("tritonclient.http")
    client = client_module.InferenceServerClient(server.http)
    given = client_module.InferInput("images", list(soak.images[2].shape), "FP32")
    given.set_data_from_numpy(soak.images[2])
    found = client.infer("tried", [given], parameters={"variant": "r16"})
    np.testing.assert_allclose(found.as_numpy("logits"), wanted["r16"][2], atol=1e-5)
    client.close()


def test_the_best_variant_where_there_is_time(ask, soak: Any, wanted: Any):
    found = ask(soak.images[0], "steered")
    assert found["variant"].tolist() == [[b"r00"]]
    np.testing.assert_allclose(found["logits"], wanted["r00"][0], atol=1e-5)


def test_labels(server: Any, soak: Any, wanted: Any):
    client = triton.InferenceServerClient(server.grpc)
    given = triton.InferInput("images", list(soak.images[0].shape), "FP32")
    given.set_data_from_numpy(soak.images[0])
    best = triton.InferRequestedOutput("logits", class_count=2)
    found = client.infer("tried", [given], outputs=[best], parameters={"degree": 8})
    order = wanted["r08"][0][0].argsort()[::-1][:2]
    assert [line.decode().split(":")[1:] for line in found.as_numpy("logits")[0]] == [
        [str(index), CLASSES[index]] for index in order
    ]
    assert len(found.get_response().outputs) == 1
    client.close()


@pytest.mark.parametrize(
    "given, says",
    [
        ({"variant": "r12"}, "the pool has no variant r12; it has r00, r08, fast, r16."),
        ({"degree": "x"}, "`degree` 'x': a whole number is expected."),
        ({"control": "switch"}, "`control` switch: `variant` or `degree` must say to which."),
        ({"control": "refit", "bank": "/none"}, "/none"),
    ],
)
def test_bad_parameters(server: Any, soak: Any, given: Any, says: str):
    status, found = post(f"{server.http}/v2/models/tried/infer", as_json(soak.images[0], **given))
    assert status == 400
    assert says in found["error"]


def test_bad_images(server: Any, ask, soak: Any):
    from tocom_export.errors import ImageError

    broken = soak.images[2].copy()
    broken[1, 0, 0, 0] = np.nan
    with pytest.raises(ImageError, match="image 1 of the batch has pixels that are NaN or Inf"):
        ask(broken)
    url = f"{server.http}/v2/models/tried/infer"
    assert post(url, as_json(soak.images[0][:, :, 1:]))[0] == 400
    assert post(url, as_json(np.zeros((33, *soak.images[0].shape[1:]), np.float32)))[0] == 400
    assert post(url, {"inputs": []})[0] == 400


def test_control_is_off_unless_asked_for(server: Any, soak: Any):
    url = f"{server.http}/v2/models/other/infer"
    status, found = post(url, as_json(soak.images[0], control="switch", degree=8))
    assert status == 400
    assert "`control`: this model takes no changes by request" in found["error"]


def test_a_bundle_that_can_t_be_opened(server: Any):
    status, found = post(f"{server.http}/v2/repository/models/damaged/load", {})
    assert status == 400
    assert "r08.onnx is missing" in found["error"]


def test_unload_and_load(server: Any, ask, soak: Any, wanted: Any):
    models = f"{server.http}/v2/repository/models"
    assert post(f"{models}/other/unload", {})[0] == 200
    for _ in range(100):  # it ends what it has begun first
        if post(f"{server.http}/v2/models/other/infer", as_json(soak.images[0]))[0] != 200:
            break
        time.sleep(0.05)
    with pytest.raises(InferenceServerException, match=r"not found|not ready|no available"):
        ask(soak.images[0], "other")
    assert post(f"{models}/other/load", {})[0] == 200
    found = ask(soak.images[0], "other", degree=8)
    np.testing.assert_allclose(found["logits"], wanted["r08"][0], atol=1e-5)


class Asking:
    """Requests one after another from a thread, while something else goes on."""

    def __init__(self, ask: Any, images: Any, model: str) -> None:
        self.answers: list[Any] = []
        self._over = threading.Event()
        self._call = lambda: ask(images, model, degree=8)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.answers.append(self._call())
            except Exception as error:
                self.answers.append(error)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_a_bundle_refitted_in_its_place_and_loaded_again(
    server: Any, ask, soak: Any, wanted: Any, folder: Path
):
    """Triton's own way of other weights: no request is lost meanwhile."""
    place = folder / "models" / "other" / "1" / "bundle"
    bank = folder / "bank-of-the-test.safetensors"
    soak.bank.save(bank)
    refit(place, bank=bank, scale=0.5)
    client = triton.InferenceServerClient(server.grpc)
    with Asking(ask, soak.images[0], "other") as asking:
        client.load_model("other")
        found = ask(soak.images[0], "other", degree=8)
    assert found["scale"].tolist() == [[0.5]]
    new = OnnxEngine(Bundle.open(place), "r08", threads=1).run(soak.images[0])
    np.testing.assert_allclose(found["logits"], new, atol=1e-5)
    assert len(asking.answers) > 2
    for answer in asking.answers:
        assert isinstance(answer, dict), answer
        right = new if answer["scale"][0, 0] == 0.5 else wanted["r08"][0]
        np.testing.assert_allclose(answer["logits"], right, atol=1e-5)
    client.close()


def test_a_configuration_given_when_it_is_loaded(server: Any, ask, soak: Any):
    client = triton.InferenceServerClient(server.grpc)
    with urlopen(f"http://{server.http}/v2/models/other/config") as response:
        config = json.load(response)  # gRPC's own JSON is not what a load takes
    config["dynamic_batching"]["preferred_batch_size"] = []  # Triton has put the largest there
    client.load_model("other", config=json.dumps(config | {"max_batch_size": 2}))
    with pytest.raises(Exception, match="batch-size must be <= 2"):
        ask(soak.images[2], "other")
    config["parameters"]["slo_ms"] = {"string_value": "fast"}
    with pytest.raises(InferenceServerException, match="`slo_ms` 'fast': a number is expected"):
        client.load_model("other", config=json.dumps(config))
    ask(soak.images[1], "other")  # what was loaded before stays
    client.close()


def test_metrics(server: Any, ask, soak: Any):
    def read() -> dict[str, float]:
        with urlopen(f"http://{server.metrics}/metrics") as response:
            lines = response.read().decode().splitlines()
        return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[:1] != "#")}

    def count(found: dict[str, float], name: str) -> float:
        return sum(value for key, value in found.items() if key.startswith(name))

    before = read()
    ask(soak.images[2], "steered", variant="fast")
    after = read()
    ours = 'tocom_images_total{model="steered",variant="fast"}'
    theirs = 'nv_inference_count{model="steered"'
    for name in (ours, theirs):
        assert count(after, name) - count(before, name) == 3


def test_switched_and_refitted_under_load(scripts: Any, server: Any, soak: Any, folder: Path):
    """The last test: it leaves other weights behind."""
    (tried,) = [
        pid
        for pid in server.find_model_processes()
        if f"{folder}/models/tried" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    found = scripts.soak_triton(soak, server, folder, 15, 6, process=tried)
    assert found["failures"] == []
    assert found.get("wrong", 0) == found.get("lost", 0) == 0
    assert found["right"] + found["refused"] == found["requests"] > 100
    assert found["switches"] > 10
    assert found["refits"] > 2
    assert found["refits refused"] > 0
