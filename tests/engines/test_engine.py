"""What every engine has in common, whichever its backend."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, get_type_hints

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import write_bundle
from tocom_export.engines.engine import Engine, check_usable
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.errors import BundleError, ImageError

CLASSES = {"onnx": OnnxEngine, "tensorrt": TensorRtEngine}
Images = Callable[..., Any]


@pytest.fixture(params=CLASSES)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def engine(backend: str, nvidia: Any, fresh: Bundle, write_plan: Callable[..., Any]) -> Engine:
    if backend == "onnx":
        return OnnxEngine(fresh, "r08")
    return TensorRtEngine(write_plan(fresh))


def test_what_the_protocol_names_is_there(engine: Engine, backend: str, fresh: Bundle):
    assert isinstance(engine, CLASSES[backend])
    assert set(get_type_hints(Engine)) == {"spec", "variant"}
    assert (engine.spec, engine.variant) == (fresh.spec, fresh.variant("r08"))
    assert engine.largest == {"onnx": None, "tensorrt": 32}[backend]
    for method in ("run", "run_all", "refit"):
        theirs = inspect.signature(getattr(engine, method)).parameters
        assert list(theirs) == list(inspect.signature(getattr(Engine, method)).parameters)[1:]


def test_it_runs_and_is_refitted(engine: Engine, fresh: Bundle, make_images: Images):
    images = make_images(fresh.spec, 3)
    before = engine.run(images)
    assert (before.shape, before.dtype) == ((3, 10), np.float32)
    engine.refit(fresh.tensors("r16"))
    assert not np.array_equal(engine.run(images), before)
    engine.refit(fresh.tensors("r08"))
    np.testing.assert_array_equal(engine.run(images), before)


@pytest.mark.parametrize(
    "shape",
    [(3, 56, 56), (1, 3, 56, 48), (1, 3, 8, 8), (1, 1, 56, 56), (0, 3, 56, 56), (1, 56, 56, 3)],
    ids=str,
)
def test_a_batch_of_another_shape(engine: Engine, shape: tuple[int, ...]):
    with pytest.raises(ImageError, match=re.escape(f"{shape}; (B, 3, 56, 56) with B ≥ 1")):
        engine.run(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8"])
def test_a_batch_of_another_dtype(engine: Engine, dtype: str):
    with pytest.raises(ImageError, match=f"images are {dtype}; float32 is expected"):
        engine.run(np.zeros((1, 3, 56, 56), dtype))


def test_images_are_checked_in_one_place_and_once(
    engine: Engine, backend: str, monkeypatch: pytest.MonkeyPatch, make_images: Images
):
    seen: list[Any] = []
    module = f"tocom_export.engines.{backend}.engine"
    monkeypatch.setattr(f"{module}.check_images", lambda *arguments: seen.append(arguments))
    images = make_images(engine.spec)
    engine.run(images)
    ((checked, spec, *largest),) = seen
    assert checked is images
    assert spec == engine.spec
    assert (largest or [None]) == [engine.largest]


def test_logits_that_are_no_numbers_say_which_image():
    images = np.zeros((3, 1, 2, 2), np.float32)
    good = np.zeros((3, 10), np.float32)
    check_usable({"logits": good}, images)
    found = {"logits": good, "embedding": np.full((3, 64), np.nan, np.float32)}
    with pytest.raises(ImageError, match="embeddings are NaN or Inf, though all pixels are finite"):
        check_usable(found, images)
    images[0, 0, 1, 1], images[2, 0, 0, 0] = np.inf, np.nan
    with pytest.raises(ImageError, match="image 0, 2 of the batch has pixels that are NaN or Inf"):
        check_usable(found, images)


class Damaged:
    """A session of a graph that was changed: it fails, or gives other shapes."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def run(self, *_: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            RuntimeError("GatherND: invalid index\nmore"),
            r"can't run it \(GatherND: invalid index\)",
        ),
        ([np.zeros((1, 3), np.float32)], r"gave logits of shape \(1, 3\) where \(2, 10\)"),
    ],
)
def test_a_graph_that_was_changed(bundle: Bundle, make_images: Images, answer: Any, says: str):
    engine = OnnxEngine(bundle, "r08")
    engine._opened = (Damaged(answer), [])
    with pytest.raises(BundleError, match=says):
        engine.run(make_images(engine.spec, 2))


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_int8_makes_no_numbers_of_pixels_that_are_none(
    make_blueprint: Any, tmp_path: Any, make_images: Images, backend: Any
):
    if backend == "openvino":
        pytest.importorskip("openvino")
    made = write_bundle(make_blueprint(tmp_path, targets=(0,), precision="int8"), tmp_path / "b")
    engine = made.engine("r00", backend=backend)
    images = make_images(engine.spec, 3)
    engine.run(images)
    images[1, 0, 2, 2] = np.nan
    with pytest.raises(ImageError, match="image 1 of the batch has pixels that are NaN or Inf"):
        engine.run(images)
